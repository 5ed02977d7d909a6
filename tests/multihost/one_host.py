"""One of several hosts, as a process: python one_host.py COORDINATOR HOSTS HOST CHECKPOINT OUT

Writes to OUT what a language model makes of fixed texts: logits, and the tokens that it goes on with.
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


def texts_for(checkpoint: checkpoints.Checkpoint) -> Text:
    """Of different lengths, the same on every host."""
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (2, 24)).astype(np.int32)
    return Text(ids, np.array([24, 9], np.int32))


def answer(path: Path, mesh) -> dict[str, np.ndarray]:
    """What the checkpoint makes of its inputs on a mesh."""
    checkpoint = checkpoints.load(path, shardings=lambda model: shardings(model, mesh))
    texts, generator = texts_for(checkpoint), Generator(checkpoint.model, mesh)
    return {
        "logits": np.asarray(parallelize(checkpoint.model, mesh)(texts)),
        "tokens": np.array(list(tokens(generator, texts, 8, Sampling()))),
    }


if __name__ == "__main__":
    coordinator, hosts, host, path, out = sys.argv[1:]
    mesh = open_mesh(None, Hosts(coordinator, int(hosts), int(host)))
    np.savez(out, **answer(Path(path), mesh))
