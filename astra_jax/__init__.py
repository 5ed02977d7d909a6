"""ASTRA in JAX: one Transformer on several devices that exchange only integer codes (arXiv 2505.19342)."""

from astra_jax.config import AstraConfig
from astra_jax.errors import AstraError
from astra_jax.sharding import make_mesh
from astra_jax.strategies import parallelize

__version__ = "0.1.0"

__all__ = ["AstraConfig", "AstraError", "__version__", "make_mesh", "parallelize"]
