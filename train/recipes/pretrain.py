"""Train a ViT from scratch on labelled images and write it as a Hugging Face folder (`ViTForImageClassification`).

    python -m train.recipes.pretrain OUT --data FOLDER

ASTRA starts from a trained model; this recipe makes one where none can be downloaded. The folder is what `transformers`
would have written, so the rest of the way is the same as for any other checkpoint: `astra convert`, and on.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro
from flax import nnx

import checkpoints
from astra_jax.cli.arguments import parse
from astra_jax.cli.main import guarded
from astra_jax.inputs.images import ImageProcessor
from astra_jax.models.vit import ViT, ViTConfig
from astra_jax.report import say
from checkpoints.huggingface import write_folder
from eval.datasets.labelled import DataArgs
from train.data import Augment, train_batches
from train.loop import Training, train
from train.memory import ONE_DEVICE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(DataArgs):
    """Arguments of the recipe. The defaults are a small ViT for 32x32 pictures."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The Hugging Face folder; the run's state and log are kept beside it, in OUT-training."""
    training: Annotated[Training, tyro.conf.arg(name="training"), tyro.conf.OmitArgPrefixes] = Training(
        steps=1300, learning_rate=4e-3, weight_decay=0.2, shards=(1,), label_smoothing=0.1
    )
    flip: bool = True
    """Mirror images at random."""
    image_size: int = 32
    """Height and width that images are resized to."""
    patch_size: int = 8
    """Height and width of a patch."""
    hidden_size: int = 64
    """D."""
    layers: int = 4
    """L."""
    heads: int = 4
    """H."""
    intermediate_size: int = 128
    """F."""
    save_every: int = 500
    """Steps between saved states."""


def main(args: Args) -> None:
    """Runs the recipe."""
    data = args.open()
    say(str(data.account))
    config = ViTConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=args.intermediate_size,
        image_size=args.image_size,
        patch_size=args.patch_size,
        num_labels=len(data.names),
    )
    processor = ImageProcessor.from_hf(
        {
            "size": {"height": args.image_size, "width": args.image_size},
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
    )
    model = nnx.jit(lambda: ViT(config, rngs=nnx.Rngs(args.training.seed)))()  # one program instead of many small ones
    batches = train_batches(data, processor, args.training.batch_size, args.training.seed, Augment(flip=args.flip))
    training = args.out.with_name(args.out.name + "-training")
    model, done = train(
        model,
        args.training,
        batches,
        training,
        memory=ONE_DEVICE,
        source={"config": dataclasses.asdict(config), "data": args.data, "split": args.split, "flip": args.flip},
        save_every=args.save_every,
        label="train the original",
    )
    if done < args.training.steps:
        raise KeyboardInterrupt
    checkpoint = checkpoints.Checkpoint(
        family="vit",
        config=config,
        astra=None,
        labels=data.names,
        preprocessing=processor.to_hf(),
        hf_config={},
        dtype="float32",
        history=(),
        model=model,
    )
    write_folder(checkpoint, args.out)
    say(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
