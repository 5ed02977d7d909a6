"""Interpolated tables of places are torch's, with its anti-aliasing and without."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from astra_jax.models.interpolation import resized


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("given", "wanted"), [(5, 3), (37, 16), (3, 7), (1, 2), (4, 4)])
def test_as_torch_does(given, wanted, antialias):
    table = np.random.default_rng(given).normal(size=(given**2, 3)).astype(np.float32)
    grid = torch.from_numpy(table).reshape(1, given, given, 3).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(
        grid, size=(wanted, wanted), mode="bicubic", align_corners=False, antialias=antialias
    )
    theirs = theirs.permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    np.testing.assert_allclose(resized(jnp.asarray(table), wanted, antialias), theirs, rtol=0, atol=1e-5)
