"""One of several hosts, as a process: python one_host.py COORDINATOR HOSTS HOST CHECKPOINT OUT

Writes to OUT what a model makes of fixed inputs: logits, and of a language model also the tokens that it goes on with.
"""

import sys
from pathlib import Path

import numpy as np

import checkpoints
from astra_jax.hosts.distributed import Hosts, open_mesh
from astra_jax.inputs.token_batches import Text
from astra_jax.serving.batch import tokens
from astra_jax.serving.compile import parallelize, shardings
from astra_jax.serving.generate import Generator
from astra_jax.serving.sampling import Sampling


def inputs_for(checkpoint: checkpoints.Checkpoint) -> np.ndarray | Text:
    """Images, or texts of different lengths, the same on every host."""
    rng = np.random.default_rng(0)
    if checkpoint.family == "vit":
        config = checkpoint.config
        return rng.normal(size=(3, config.image_size, config.image_size, config.num_channels)).astype(np.float32)
    ids = rng.integers(0, checkpoint.config.vocab_size, (2, 24)).astype(np.int32)
    return Text(ids, np.array([24, 9], np.int32))


def answer(path: Path, mesh) -> dict[str, np.ndarray]:
    """What the checkpoint makes of its inputs on a mesh."""
    checkpoint = checkpoints.load(path, shardings=lambda model: shardings(model, mesh))
    inputs = inputs_for(checkpoint)
    found = {"logits": np.asarray(parallelize(checkpoint.model, mesh)(inputs))}
    if checkpoint.model.per_token:
        generator = Generator(checkpoint.model, mesh)
        found["tokens"] = np.array(list(tokens(generator, inputs, 8, Sampling())))
    return found


if __name__ == "__main__":
    coordinator, hosts, host, path, out = sys.argv[1:]
    mesh = open_mesh(None, Hosts(coordinator, int(hosts), int(host)))
    np.savez(out, **answer(Path(path), mesh))
