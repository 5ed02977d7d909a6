"""Train a GPT-2 from scratch on text and write it as a Hugging Face folder (`GPT2LMHeadModel`).

    python -m train.recipes.pretrain_lm OUT --data train.txt

ASTRA starts from a trained model; this recipe makes one where none can be downloaded. Its tokenizer is that of
--tokenizer, or byte-level BPE of --vocab-size entries found on the text itself. The folder is what `transformers` would
have written, so the rest of the way is the same as for any other checkpoint: `astra convert`, and on.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro
from flax import nnx

import checkpoints
from astra_jax.cli.arguments import parse
from astra_jax.cli.main import guarded
from astra_jax.files import write_atomically
from astra_jax.inputs.tokenizer import Tokenizer
from astra_jax.models.gpt2 import GPT2, GPT2Config
from astra_jax.report import say
from checkpoints.huggingface import write_folder
from eval.datasets.labelled import DataArgs
from train.data import packed, text_batches
from train.loop import Training, train
from train.memory import ONE_DEVICE

END = "<|endoftext|>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(DataArgs):
    """Arguments of the recipe. The defaults are a small GPT-2."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The Hugging Face folder; the run's state and log are kept beside it, in OUT-training."""
    training: Annotated[Training, tyro.conf.arg(name="training"), tyro.conf.OmitArgPrefixes] = Training(
        steps=3000, batch_size=16, learning_rate=2e-3, weight_decay=0.1, shards=(1,)
    )
    tokenizer: Path | None = None
    """A folder with a tokenizer; without it one is found on the text."""
    vocab_size: int = 4096
    """Entries of the tokenizer that is found on the text."""
    length: int = 256
    """Tokens of a sequence: the model's limit."""
    hidden_size: int = 128
    """D."""
    layers: int = 4
    """L."""
    heads: int = 4
    """H."""
    save_every: int = 500
    """Steps between saved states."""


def find_tokenizer(documents: list[str], vocab_size: int, length: int, folder: Path) -> None:
    """Finds byte-level BPE on the documents and writes it as a tokenizer that `transformers` loads."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size=vocab_size, special_tokens=[END], show_progress=False)
    names = {f"{role}_token": END for role in ("bos", "eos", "unk")}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, **names}
    write_atomically(folder / "tokenizer.json", bpe.to_str())
    write_atomically(folder / "tokenizer_config.json", json.dumps(described, indent=2) + "\n")


def main(args: Args) -> None:
    """Runs the recipe."""
    training = args.out.with_name(args.out.name + "-training")
    documents = args.open_documents()
    say(str(documents.account))
    folder = args.tokenizer or training / "tokenizer"
    if args.tokenizer is None and not (folder / "tokenizer_config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        say(f"finding a tokenizer of {args.vocab_size:,} entries")
        find_tokenizer(documents, args.vocab_size, args.length, folder)
    tokenizer = Tokenizer(folder, sys.maxsize)
    config = GPT2Config(
        vocab_size=tokenizer.size,
        n_positions=args.length,
        n_embd=args.hidden_size,
        n_layer=args.layers,
        n_head=args.heads,
    )
    (eos,) = tokenizer.encode(END)
    text, how = packed(documents, tokenizer, [eos], args.length)
    say(how)
    model = nnx.jit(lambda: GPT2(config, rngs=nnx.Rngs(args.training.seed)))()  # one program instead of many small ones
    model, done = train(
        model,
        args.training,
        text_batches(text, None, args.training.batch_size, args.training.seed),
        training,
        memory=ONE_DEVICE,
        source={"config": dataclasses.asdict(config), **args.source()},
        save_every=args.save_every,
        label="train the original",
    )
    if done < args.training.steps:
        raise KeyboardInterrupt
    checkpoint = checkpoints.Checkpoint(
        family="gpt2",
        config=config,
        astra=None,
        labels=None,
        preprocessing=None,
        hf_config={},
        dtype="float32",
        history=(),
        model=model,
        tokenizer_files=folder,
        generation={"eos_token_id": eos},
    )
    write_folder(checkpoint, args.out)
    say(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Args, description=__doc__))))
