"""Folders that hold a model in a form that is not read here: each is called what it is, with what to do about it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astra_jax.errors import AstraError
from checkpoints.fields import shorten

POINTER = b"version https://git-lfs.github.com/spec/"  # what a file begins with that git-lfs has not fetched
SMALL = 1024  # bytes; such a pointer has fewer
# A file that is there instead of, or beside, config.json -> what the folder is, and what to do.
INSTEAD = {
    "adapter_config.json": "is an adapter (LoRA or the like) of another model: merge it into that with peft's "
    "merge_and_unload() and give what save_pretrained writes of it",
    "model_index.json": "is a pipeline of diffusers, which is not read",
    "open_clip_config.json": "is an OpenCLIP model, whose weights have other names: give the same model as "
    "transformers saves it",
    "params.json": "is in the format of Llama's first release: convert it with transformers' "
    "convert_llama_weights_to_hf.py",
    "*.gguf": "is a GGUF file for llama.cpp, whose weights are quantized: give the model that it was made of",
    "*.onnx": "is an ONNX model, which is not read: give the model that it was made of",
    "*.mlmodelc": "is a CoreML model, which is not read: give the model that it was made of",
}
# Weights in a form that may hold code, or that another program reads.
UNREAD = (".bin", ".h5", ".msgpack", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".ot")


def check_folder(folder: Path) -> None:
    """Raises AstraError where a folder is not one of Hugging Face's, or git-lfs has not fetched all of its files."""
    if not (folder / "config.json").is_file():
        for pattern, what in INSTEAD.items():
            if any(folder.glob(pattern)):
                raise AstraError(f"{folder}: {what}")
    pointers = sorted(path.name for path in folder.iterdir() if path.is_file() and is_pointer(path))
    if pointers:
        raise AstraError(
            f"{folder}: {pointers[0]} is only git-lfs' pointer to the file"
            + f" ({len(pointers)} such files)" * (len(pointers) > 1)
            + f": run `git lfs pull` in {folder}, or download the repository with `hf download`"
        )


def is_pointer(path: Path) -> bool:
    """Whether a file is a pointer of git-lfs."""
    try:
        if path.stat().st_size > SMALL:
            return False
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def check_plain(content: Mapping[str, Any], where: Path) -> None:
    """Raises AstraError where a config.json says that the weights are quantized."""
    settings = content.get("quantization_config") or content.get("quantization") or content.get("compression_config")
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is None and isinstance(settings, dict):
        bits = [name for name in ("load_in_4bit", "load_in_8bit") if settings.get(name)]
        method = "bitsandbytes" if bits else "mlx" if {"group_size", "bits"} <= settings.keys() else None
    raise AstraError(
        f"{where}: the weights are quantized ({shorten(method or settings)}), which is not read: give the model that "
        "was quantized; `--weights int8` of `astra run` rounds its weights"
    )


def no_weights(folder: Path, wanted: str) -> AstraError:
    """The error for a folder without the files `wanted`: it says which weights there are instead, if any."""
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name.endswith(UNREAD)]
    if any(name.startswith("adapter_model") for name in names):
        return AstraError(f"{folder}: {INSTEAD['adapter_config.json']}")
    if others:
        return AstraError(
            f"{folder}: has its weights only as {others[0]}, which is not read, since such files may hold code: "
            "re-save it as safetensors with `from_pretrained(...).save_pretrained(...)` of the model's class in "
            "transformers"
        )
    for pattern, what in INSTEAD.items():
        if any(folder.glob(pattern)):
            return AstraError(f"{folder}: {what}")
    return AstraError(f"{folder}: has neither {wanted}")
