"""What a step of finetuning takes on devices that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astra_jax.errors import AstraError
from eval.cost.workload import open_workload
from train.fits import devices_of, lower
from train.loop import Training
from train.memory import Memory, mesh_of


@pytest.mark.parametrize(("trains", "kept"), [("codebooks", 2), ("all", 12)])
def test_arguments_are_what_is_trained_and_what_is_not(trains, kept):
    """Of GPT-2 small's shapes, split over eight devices: parameters of 2 bytes that stay as they are, or of 4 with two
    moments. Nothing of that size is allocated."""
    work = open_workload("gpt2-s", 128, None, "bfloat16")
    training = Training(batch_size=8, dtype="bfloat16", trains=trains)
    memory = Memory(mesh_of(np.asarray(jax.devices())[None]), "block", jnp.dtype("bfloat16"))
    found = lower(work, training, memory).compile().memory_analysis().argument_size_in_bytes
    parameters, codebooks = 124_439_808, 12 * 768 * 1024 * 4 * 2
    expected = (kept * parameters + codebooks) / 8
    assert expected < found < 1.1 * expected, "but for small arrays, which every device has"


def test_what_is_not_known_or_not_here(monkeypatch):
    with pytest.raises(AstraError, match="--on is 'v9'; it must be one of v5e-1, "):
        devices_of("v9")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AstraError, match=r"the compiler for v6e-8 is not here: pip install -e '\.\[tpu\]'"):
        devices_of("v6e-8")
