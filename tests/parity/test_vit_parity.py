"""Our ViT against Hugging Face's in torch: every module, logits, gradients, and the way there and back."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import ViTConfig as TorchViTConfig
from transformers import ViTForImageClassification

import checkpoints
from astra_jax.models.blocks import block_at
from astra_jax.models.mask import Block
from astra_jax.models.vit import ViT, ViTConfig
from astra_jax.strategies.base import Single
from checkpoints import configs, huggingface
from tests.helpers.models import draw

BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 7,
}
VARIANTS = {
    "base": {},
    "no projection bias, relu": {"qkv_bias": False, "hidden_act": "relu"},
    "large patches, silu": {"image_size": 24, "patch_size": 8, "num_channels": 1, "hidden_act": "silu"},
    "one head, gelu_new": {
        "hidden_size": 20,
        "num_attention_heads": 1,
        "intermediate_size": 96,
        "hidden_act": "gelu_new",
    },
    "narrow MLP, wide heads": {"hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 2},
    "large weights": {"initializer_range": 0.2},
    "large weights, large epsilon": {"initializer_range": 0.2, "layer_norm_eps": 1e-3},
    "epsilon 1e-6, one block": {"layer_norm_eps": 1e-6, "num_hidden_layers": 1},
}


@pytest.fixture
def make_torch(randomised: Any) -> Any:
    """Makes a random ViT, given what differs from the base."""
    return lambda options: randomised(
        ViTForImageClassification(TorchViTConfig(**{**BASE, **options}, attn_implementation="eager"))
    )


def images_for(config: Any, B: int = 3) -> np.ndarray:
    """Random images [B, height, width, channels]."""
    shape = (B, config.image_size, config.image_size, config.num_channels)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def to_torch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2))


@nnx.jit
def around_the_blocks(model: Any, images: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What our first block gets, and what our last norm makes of what theirs got."""
    x = model.embed(model.to_tokens(images)) + model.position[...][1:]
    x = Single(model.shards(1)).prepend_class(model.class_states(), x)
    return x, model.norm(last)


@nnx.jit
def in_a_block(model: Any, number: int, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    """What our block `number` makes of x, and its modules of x and of y, the normalized x."""
    block, strategy = block_at(model.blocks, number), Single(model.shards(1))
    return {
        "norm1": block.norm1(x),
        "q": block.attention.q(y),
        "k": block.attention.k(y),
        "v": block.attention.v(y),
        "o": block.attention.o(y, strategy),
        "attention": block.attention(y, strategy, (), Block(number))[0],
        "mlp": block.mlp(y, strategy),
        "block": block(x, strategy, (), Block(number))[0],
    }


@nnx.jit
def run(model: Any, images: jax.Array) -> jax.Array:
    """The logits of one device."""
    return model(model.to_tokens(images), Single(model.shards(1)))[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_module_and_the_logits(name: str, tmp_path: Path, make_torch: Any, close: Any) -> None:
    theirs = make_torch(VARIANTS[name])
    theirs.save_pretrained(tmp_path)
    checkpoint = huggingface.read(str(tmp_path))
    ours, images = checkpoint.model, images_for(checkpoint.config)
    theirs = theirs.double()  # exact: in float32 its own rounding is as large as ours

    def exactly(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x.astype(np.float64))

    def rounded(x: torch.Tensor) -> np.ndarray:
        return x.numpy().astype(np.float32)

    with torch.no_grad():
        embedded = theirs.vit.embeddings(to_torch(images).double())
        x = rounded(embedded)
        for number, layer in enumerate(theirs.vit.layers):
            normed = layer.layernorm_before(exactly(x))
            output = layer(exactly(x))
            output = output[0] if isinstance(output, tuple) else output
            expected = {
                "norm1": normed,
                "q": layer.attention.q_proj(normed),
                "k": layer.attention.k_proj(normed),
                "v": layer.attention.v_proj(normed),
                "o": layer.attention.o_proj(normed),
                "attention": layer.attention(normed)[0],
                "mlp": layer.mlp(normed),
                "block": output,
            }
            for module, found in in_a_block(ours, number, x, rounded(normed)).items():
                close(found, expected[module])
            x = rounded(output)
        first, last = around_the_blocks(ours, images, x)
        close(first, embedded)
        close(last, theirs.vit.layernorm(exactly(x)))
        close(run(ours, images), theirs(to_torch(images).double()).logits, 1e-4)


def test_gradients(tmp_path: Path, make_torch: Any, close: Any) -> None:
    theirs = make_torch({})
    theirs.save_pretrained(tmp_path)
    checkpoint = huggingface.read(str(tmp_path))
    images, labels = images_for(checkpoint.config), np.array([0, 3, 6])
    torch.nn.functional.cross_entropy(theirs(to_torch(images)).logits, torch.from_numpy(labels)).backward()

    def loss(model: Any) -> jax.Array:
        logits, _ = model(model.to_tokens(jnp.asarray(images)), Single(model.shards(1)))
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(3), labels])

    gradients = nnx.jit(nnx.grad(loss))(checkpoint.model)
    for block, layer in enumerate(theirs.vit.layers):
        close(gradients.blocks.attention.q.kernel[...][block], layer.attention.q_proj.weight.grad.T)
        close(gradients.blocks.attention.v.bias[...][block], layer.attention.v_proj.bias.grad)
        close(gradients.blocks.mlp.up.kernel[...][block], layer.mlp.fc1.weight.grad.T)
        close(gradients.blocks.norm1.scale[...][block], layer.layernorm_before.weight.grad)
    close(gradients.head.kernel[...], theirs.classifier.weight.grad.T)
    close(gradients.cls[...], theirs.vit.embeddings.cls_token.grad[0, 0])
    patches = theirs.vit.embeddings.patch_embeddings.projection.weight.grad  # [D, C, P, P]
    close(gradients.embed.kernel[...], patches.permute(2, 3, 1, 0).reshape(-1, BASE["hidden_size"]))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("base", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        *((name, torch.bfloat16) for name in ("no projection bias, relu", "large patches, silu")),
    ],
)
def test_there_and_back_is_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path, make_torch: Any, tensors: Any
) -> None:
    source, kept, back = tmp_path / "source", tmp_path / "kept", tmp_path / "back"
    theirs = make_torch(VARIANTS[name]).to(dtype)
    theirs.save_pretrained(source)
    (source / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "size": {"height": 16, "width": 16}}'
    )
    checkpoints.save(kept, huggingface.read(str(source)))
    huggingface.write_folder(checkpoints.load(kept), back)
    before, after = tensors(source), tensors(back)
    assert before.keys() == after.keys()
    for tensor, original in before.items():
        assert after[tensor].dtype == original.dtype
        assert after[tensor].tobytes() == original.tobytes(), tensor
    for file in ("config.json", "preprocessor_config.json"):
        assert huggingface.read_json(back / file) == huggingface.read_json(source / file)
    loaded, problems = ViTForImageClassification.from_pretrained(back, output_loading_info=True)
    assert not any(problems.values()), problems
    for ours, original in zip(loaded.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours.to(dtype), original)


def test_half_precision_weights_compute_the_same(tmp_path: Path, make_torch: Any, close: Any) -> None:
    theirs = make_torch({}).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    checkpoint = huggingface.read(str(tmp_path))
    assert checkpoint.dtype == "bfloat16"
    images = images_for(checkpoint.config)
    with torch.no_grad():
        expected = theirs.float()(to_torch(images)).logits
    close(run(checkpoint.model, images), expected, 1e-4)


def test_shards_are_read_like_a_single_file(tmp_path: Path, make_torch: Any) -> None:
    theirs = make_torch({})
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    one, many = (nnx.state(huggingface.read(str(tmp_path / name)).model) for name in ("one", "many"))
    jax.tree.map(np.testing.assert_array_equal, one, many)


def test_an_export_of_a_model_that_came_from_nowhere_loads(tmp_path: Path, close: Any) -> None:
    config = ViTConfig(**BASE)
    checkpoint = checkpoints.Checkpoint(
        family="vit",
        config=config,
        astra=None,
        labels=tuple("abcdefg"),
        preprocessing=None,
        hf_config={},
        dtype="float32",
        history=(),
        model=draw(ViT, config, None),
    )
    huggingface.write_folder(checkpoint, tmp_path)
    loaded, problems = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values()), problems
    assert loaded.config.id2label == dict(enumerate("abcdefg"))
    images = images_for(config)
    with torch.no_grad():
        close(run(checkpoint.model, images), loaded(to_torch(images)).logits, 1e-4)


def test_defaults_are_those_of_hugging_face() -> None:
    theirs = TorchViTConfig()
    for field in dataclasses.fields(ViTConfig):
        if field.name != "num_labels":  # read from the labels; the reader has Hugging Face's default of 2
            assert getattr(theirs, field.name) == field.default, field.name
    assert configs.config_from_hf("vit", {}, Path())[0].num_labels == theirs.num_labels
