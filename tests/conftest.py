"""What every test runs under: eight CPU devices, no network, exact matmuls, the same examples every time."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from flax import nnx
from hypothesis import settings

from astra_jax.config import AstraConfig
from astra_jax.models.vit import ViT, ViTConfig

DEVICES = 8

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

    Everything that could hide a mistake while it is zero or small is random: class token, positions, codebooks.
    """

    def make(astra: AstraConfig | None = None, **overrides: int | bool) -> ViT:
        config = ViTConfig(
            **{
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "image_size": 20,
                "patch_size": 4,
                "num_channels": 1,
                "num_labels": 5,
                **overrides,
            }
        )
        model = ViT(config, astra, rngs=nnx.Rngs(0))
        cls, position, codebook = jax.random.split(jax.random.key(1), 3)
        model.cls[...] = jax.random.normal(cls, model.cls.shape)
        model.position[...] = jax.random.normal(position, model.position.shape)
        if astra:
            model.codec.codebook[...] = jax.random.normal(codebook, model.codec.codebook.shape)
        return model

    return make


@pytest.fixture(scope="session")
def rank_coded() -> Callable[..., jax.Array]:
    """Makes images [B,20,20,1] where every patch of every image has a value of its own: misordering shows."""

    def make(B: int) -> jax.Array:
        ranks = jnp.linspace(-2.0, 2.0, B * 25).reshape(B, 5, 5, 1)
        texture = jax.random.normal(jax.random.key(2), (20, 20, 1))
        return ranks.repeat(4, axis=1).repeat(4, axis=2) + 0.3 * texture

    return make
