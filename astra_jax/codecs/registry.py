"""Which class is the codec of which configuration."""

from astra_jax.codecs.base import Quantizer
from astra_jax.codecs.config import AstraConfig, NestedPQConfig, VQConfig
from astra_jax.codecs.nested import NestedQuantizer
from astra_jax.codecs.product import VectorQuantizer

CODECS: dict[type[AstraConfig], type[Quantizer]] = {VQConfig: VectorQuantizer, NestedPQConfig: NestedQuantizer}


def make_codec(config: AstraConfig, width: int) -> Quantizer:
    """The codec that a configuration asks for, for vectors of a width."""
    return CODECS[type(config)](config, width)
