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
from astra_jax.models.vit import ViTConfig
from astra_jax.strategies.base import Single
from checkpoints import configs, huggingface

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
    "gelu_new": {"hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
    "silu": {"hidden_act": "silu"},
    "no projection bias": {"qkv_bias": False},
    "large patches": {"image_size": 24, "patch_size": 8, "num_channels": 1},
    "one head": {"hidden_size": 20, "num_attention_heads": 1, "intermediate_size": 96},
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


def images_for(config: Any, B: int = 3) -> jax.Array:
    """Random images [B, height, width, channels]."""
    shape = (B, config.image_size, config.image_size, config.num_channels)
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def to_torch(images: jax.Array) -> torch.Tensor:
    return torch.from_numpy(np.array(images.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_module_and_the_logits(name: str, tmp_path: Path, make_torch: Any, close: Any) -> None:
    theirs = make_torch(VARIANTS[name])
    theirs.save_pretrained(tmp_path)
    checkpoint = huggingface.read(str(tmp_path))
    ours, config = checkpoint.model, checkpoint.config
    images, strategy = images_for(config), Single(ours.shards(1))
    theirs = theirs.double()  # exact: in float32 its own rounding is as large as ours

    def exactly(x: jax.Array) -> torch.Tensor:
        return torch.from_numpy(np.array(x, np.float64))

    def rounded(x: torch.Tensor) -> jax.Array:
        return jnp.asarray(x.numpy(), jnp.float32)

    with torch.no_grad():
        embedded = theirs.vit.embeddings(to_torch(images).double())
        x = ours.embed(ours.to_tokens(images)) + ours.position[...][1:]
        x = strategy.prepend_class(ours.cls[...] + ours.position[...][0], x)
        close(x, embedded)
        x = rounded(embedded)
        for number, layer in enumerate(theirs.vit.layers):
            block = block_at(ours.blocks, number)
            normed = layer.layernorm_before(exactly(x))
            close(block.norm1(x), normed)
            y = rounded(normed)
            for mine, other in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj")):
                close(getattr(block.attention, mine)(y), getattr(layer.attention, other)(normed))
            close(block.attention.o(y, strategy), layer.attention.o_proj(normed))
            close(block.attention(y, strategy, (), Block(number))[0], layer.attention(normed)[0])
            close(block.mlp(y, strategy), layer.mlp(normed))
            output = layer(exactly(x))
            output = output[0] if isinstance(output, tuple) else output
            close(block(x, strategy, (), Block(number))[0], output)
            x = rounded(output)
        close(ours.norm(x), theirs.vit.layernorm(exactly(x)))
        expected = theirs(to_torch(images).double()).logits
    logits, _ = ours(ours.to_tokens(images), strategy)
    close(logits, expected, 1e-4)


def test_gradients(tmp_path: Path, make_torch: Any, close: Any) -> None:
    theirs = make_torch({})
    theirs.save_pretrained(tmp_path)
    checkpoint = huggingface.read(str(tmp_path))
    ours, strategy = checkpoint.model, Single(checkpoint.model.shards(1))
    images, labels = images_for(checkpoint.config), np.array([0, 3, 6])
    torch.nn.functional.cross_entropy(theirs(to_torch(images)).logits, torch.from_numpy(labels)).backward()

    def loss(model: Any) -> jax.Array:
        logits, _ = model(model.to_tokens(images), strategy)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(3), labels])

    gradients = nnx.grad(loss)(ours)
    for block, layer in enumerate(theirs.vit.layers):
        close(gradients.blocks.attention.q.kernel[...][block], layer.attention.q_proj.weight.grad.T)
        close(gradients.blocks.attention.v.bias[...][block], layer.attention.v_proj.bias.grad)
        close(gradients.blocks.mlp.up.kernel[...][block], layer.mlp.fc1.weight.grad.T)
        close(gradients.blocks.norm1.scale[...][block], layer.layernorm_before.weight.grad)
    close(gradients.head.kernel[...], theirs.classifier.weight.grad.T)
    close(gradients.cls[...], theirs.vit.embeddings.cls_token.grad[0, 0])
    patches = theirs.vit.embeddings.patch_embeddings.projection.weight.grad  # [D, C, P, P]
    close(gradients.embed.kernel[...], patches.permute(2, 3, 1, 0).reshape(-1, BASE["hidden_size"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["base", "no projection bias", "large patches"])
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
    logits, _ = checkpoint.model(checkpoint.model.to_tokens(images), Single(checkpoint.model.shards(1)))
    with torch.no_grad():
        expected = theirs.float()(to_torch(images)).logits
    close(logits, expected, 1e-4)


def test_shards_are_read_like_a_single_file(tmp_path: Path, make_torch: Any) -> None:
    theirs = make_torch({})
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    one, many = (nnx.state(huggingface.read(str(tmp_path / name)).model) for name in ("one", "many"))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, many))


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
        model=checkpoints.tensor_maps.build("vit", config, abstract=False),
    )
    huggingface.write_folder(checkpoint, tmp_path)
    loaded, problems = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values()), problems
    assert loaded.config.id2label == dict(enumerate("abcdefg"))
    images = images_for(config)
    logits, _ = checkpoint.model(checkpoint.model.to_tokens(images), Single(checkpoint.model.shards(1)))
    with torch.no_grad():
        close(logits, loaded(to_torch(images)).logits, 1e-4)


def test_defaults_are_those_of_hugging_face() -> None:
    theirs = TorchViTConfig()
    for field in dataclasses.fields(ViTConfig):
        if field.name != "num_labels":  # read from the labels; the reader has Hugging Face's default of 2
            assert getattr(theirs, field.name) == field.default, field.name
    assert configs.config_from_hf("vit", {}, Path())[0].num_labels == theirs.num_labels
