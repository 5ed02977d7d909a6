"""Our DeiT and others that read pictures against Hugging Face's in torch: modules, outputs, gradients, there and back.

ViT, which they share most with, has more of that in test_vit_parity.py.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import checkpoints
from astra_jax.models.blocks import block_at
from astra_jax.models.mask import Block
from astra_jax.strategies.base import Single
from checkpoints import configs, huggingface
from checkpoints.tensor_maps import FAMILIES
from tests.parity.pictures import BASE, LAST_NORM, MODULES, OUTPUT, SIDES, VARIANTS, WHOLES


def torch_model(name: str, randomised: Any) -> Any:
    """A tiny random model of transformers."""
    architecture, options = VARIANTS[name]
    cls = getattr(transformers, architecture)
    return randomised(cls(cls.config_class(**BASE[family_of(name)] | options, attn_implementation="eager")))


def family_of(name: str) -> str:
    return name.split(",")[0]


def pictures(side: int, channels: int, B: int = 2) -> np.ndarray:
    """Random pictures [B, side, side, channels]."""
    return np.random.default_rng(1).normal(size=(B, side, side, channels)).astype(np.float32)


def output(out: Any) -> torch.Tensor:
    return next(out[name] for name in OUTPUT if name in out)


def save(theirs: Any, name: str, folder: Path) -> np.ndarray:
    """Writes a model, and returns pictures as it reads them."""
    theirs.save_pretrained(folder)
    side = SIDES.get(name, BASE[family_of(name)]["image_size"])
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": side}))
    return pictures(side, theirs.config.num_channels)


def to_torch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def recorded(model: Any, images: torch.Tensor) -> tuple[Any, dict[str, tuple[np.ndarray, torch.Tensor]]]:
    """The output of a model, and input (as float32) and output of each module of its common part."""
    seen: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def keep(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            if isinstance(given, torch.Tensor):
                seen[name.removeprefix(f"{model.base_model_prefix}.")] = (
                    given.numpy().astype(np.float32),
                    out[0] if isinstance(out, tuple) else out,
                )

        return keep

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in model.named_modules()]
    with torch.no_grad():
        out = model(images)
    for handle in handles:
        handle.remove()
    return out, seen


@nnx.jit
def run(model: Any, images: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What our first block gets, what our last norm makes of `last`, and the output, of one device."""
    strategy, patches = Single(model.shards(1)), model.to_tokens(images)
    first = model.embedded(patches, strategy.positions())
    first = strategy.prepend_class(model.class_states(), first)
    return first, model.norm(last), model(patches, strategy)[0]


@nnx.jit
def in_a_block(model: Any, number: int, given: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What every module of our block `number` makes of what theirs got."""
    block, strategy = block_at(model.blocks, number), Single(model.shards(1))
    more = {"attention": (strategy, (), Block(number)), "": (strategy, (), Block(number))}
    more |= {"attention.o": (strategy,), "mlp": (strategy,)}

    def out(path: str, x: jax.Array) -> jax.Array:
        found = functools.reduce(getattr, path.split(".") if path else (), block)(x, *more.get(path, ()))
        return found[0] if isinstance(found, tuple) else found

    return {path: out(path, x) for path, x in given.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_module_and_the_output(name: str, tmp_path: Path, randomised: Any, close: Any) -> None:
    theirs, family = torch_model(name, randomised), family_of(name)
    images = save(theirs, name, tmp_path)
    ours = huggingface.read(str(tmp_path)).model
    # Exact: in float32 its own rounding is as large as ours.
    out, seen = recorded(theirs.double(), to_torch(images).double())
    where, modules = MODULES[family]
    for number in range(theirs.config.num_hidden_layers):
        base = where.format(l=number)
        given = {path: seen[base + their.given][0] for path, their in modules.items()}
        for path, mine in in_a_block(ours, number, given).items():
            close(mine, seen[base + modules[path].expected][1])
    last, normed = seen[LAST_NORM[family]]
    first, norm, found = run(ours, images, last)
    close(first, torch.from_numpy(seen[where.format(l=0)][0]))
    close(norm, normed)
    close(found, output(out), 1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back_is_bit_for_bit(name: str, tmp_path: Path, randomised: Any, tensors: Any) -> None:
    source, kept, back = tmp_path / "source", tmp_path / "kept", tmp_path / "back"
    theirs = torch_model(name, randomised).to(torch.bfloat16)
    save(theirs, name, source)
    checkpoints.save(kept, huggingface.read(str(source)))
    huggingface.write_folder(checkpoints.load(kept), back)
    before, after = tensors(source), tensors(back)
    assert before.keys() == after.keys()
    assert all(after[tensor].tobytes() == before[tensor].tobytes() for tensor in after)
    assert huggingface.read_json(back / "config.json") == huggingface.read_json(source / "config.json")
    _, problems = type(theirs).from_pretrained(back, output_loading_info=True)
    assert not any(problems.values()), problems


@pytest.mark.parametrize("name", [name for name in VARIANTS if "," in name])
def test_gradients(name: str, tmp_path: Path, randomised: Any, close: Any, tensors: Any) -> None:
    """Of every tensor, by the name under which transformers saves it."""
    theirs = torch_model(name, randomised)
    images = save(theirs, name, tmp_path / "model")
    checkpoint = huggingface.read(str(tmp_path / "model"))
    (output(theirs(to_torch(images))) ** 2).mean().backward()

    def loss(model: Any) -> jax.Array:
        return jnp.mean(model(model.to_tokens(jnp.asarray(images)), Single(model.shards(1)))[0] ** 2)

    gradients = nnx.jit(nnx.grad(loss))(checkpoint.model)
    model = nnx.clone(checkpoint.model)
    nnx.update(model, gradients)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    expected = tensors(tmp_path / "gradients")
    for tensor, found in huggingface.tensors_of(dataclasses.replace(checkpoint, model=model), "float32"):
        close(found, torch.from_numpy(expected[tensor]))


@pytest.mark.parametrize("family", BASE)
def test_defaults_are_those_of_hugging_face(family: str) -> None:
    ours = configs.config_class(family)
    theirs = getattr(transformers, next(iter(FAMILIES[family].architectures))).config_class()
    for field in dataclasses.fields(ours):
        if field.name not in ("num_labels", *configs.DERIVED):  # the labels say it; a folder does
            assert getattr(theirs, field.name) == field.default, field.name


@pytest.mark.parametrize("whole", WHOLES)
def test_the_encoder_of_pictures_of_a_whole(whole: str, tmp_path: Path, randomised: Any, close: Any) -> None:
    """It is read as if it were alone, written so, and what else is there is counted."""
    cls, family, texts = getattr(transformers, whole), *WHOLES[whole]
    part = BASE[family]
    theirs = randomised(cls(cls.config_class(text_config=texts, vision_config=part, initializer_range=0.1, **texts)))
    theirs.save_pretrained(tmp_path / "whole")
    opened = huggingface.open_folder(str(tmp_path / "whole"))
    others = len(theirs.state_dict()) - len(opened.tensors)
    (note,) = opened.notes
    assert note.startswith(f"{others} tensor(s) of another head or model are left out: ")
    checkpoint = huggingface.read(str(tmp_path / "whole"))
    huggingface.write_folder(checkpoint, tmp_path / "part")
    architecture = next(iter(FAMILIES[family].architectures))
    alone, problems = getattr(transformers, architecture).from_pretrained(tmp_path / "part", output_loading_info=True)
    assert not any(problems.values()), problems
    images = to_torch(pictures(part["image_size"], 3))
    with torch.no_grad():
        close(output(alone(images)), theirs.get_image_features(images).pooler_output)
