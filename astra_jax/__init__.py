"""ASTRA in JAX: one Transformer on several devices that exchange only integer codes (arXiv 2505.19342)."""

from typing import TYPE_CHECKING, Any

from astra_jax.codecs.config import AstraConfig
from astra_jax.errors import AstraError

if TYPE_CHECKING:
    from astra_jax.mesh.sharding import make_mesh
    from astra_jax.serving.compile import parallelize
    from astra_jax.serving.engine import Engine

__version__ = "0.1.0"

__all__ = ["AstraConfig", "AstraError", "Engine", "__version__", "make_mesh", "parallelize"]

_LAZY = {
    "Engine": "astra_jax.serving.engine",
    "make_mesh": "astra_jax.mesh.sharding",
    "parallelize": "astra_jax.serving.compile",
}


def __getattr__(name: str) -> Any:
    """Imports what needs JAX only when it is used, so that `astra --help` answers at once."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
