"""What every test runs under: eight CPU devices, no network, exact matmuls, the same examples every time."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# Compiling is most of what tests do: the same program is compiled once, also for the processes that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from hypothesis import settings

from astra_jax.config import AstraConfig
from astra_jax.models.vit import ViT, ViTConfig

DEVICES = 8

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 20,
    "patch_size": 4,
    "num_channels": 1,
    "num_labels": 5,
}

jax.config.update("jax_num_cpu_devices", DEVICES)  # works only before JAX starts its backend
jax.config.update("jax_default_matmul_precision", "highest")

settings.register_profile("default", deadline=None, max_examples=20, derandomize=True, database=None)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_sessionstart() -> None:
    """Tests of several devices fail where there is only one; they never skip."""
    found = len(jax.devices("cpu"))
    if found != DEVICES:
        pytest.exit(f"the tests need {DEVICES} CPU devices, JAX has {found}", returncode=1)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not enforced, as for users: what happens to values of a wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tiny_vit() -> Callable[..., ViT]:
    """Makes a ViT of two blocks and 5x5 patches: no number of devices from 2 to 8 but 5 divides its tokens.

    Everything is random, also what starts as 0 or 1 and would hide a mistake. It is drawn by numpy, because XLA takes
    ten seconds to compile the initialisation.
    """

    @functools.cache
    def drawn(astra: AstraConfig | None, overrides: tuple) -> ViT:
        config = ViTConfig(**{**TINY, **dict(overrides)})
        graphdef, shapes = nnx.split(nnx.eval_shape(lambda: ViT(config, astra, rngs=nnx.Rngs(0))))
        rng = np.random.default_rng(0)

        def draw(path: tuple, variable: jax.ShapeDtypeStruct) -> jax.Array:
            name, values = jax.tree_util.keystr(path), rng.normal(size=variable.shape)
            if "kernel" in name:
                values /= np.sqrt(variable.shape[-2])
            elif "residual_var" in name:
                values **= 2
            return jnp.asarray(values, variable.dtype)

        return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, shapes))

    def make(astra: AstraConfig | None = None, **overrides: int | bool) -> ViT:
        return nnx.clone(drawn(astra, tuple(overrides.items())))

    return make


@pytest.fixture(scope="session")
def rank_coded() -> Callable[..., jax.Array]:
    """Makes images [B,20,20,1] where every patch of every image has a value of its own: misordering shows."""

    def make(B: int) -> jax.Array:
        ranks = jnp.linspace(-2.0, 2.0, B * 25).reshape(B, 5, 5, 1)
        texture = jax.random.normal(jax.random.key(2), (20, 20, 1))
        return ranks.repeat(4, axis=1).repeat(4, axis=2) + 0.3 * texture

    return make
