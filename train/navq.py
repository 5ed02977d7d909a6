"""Noise-Augmented Quantization (paper section 3.2): what training does to an exchange, and what it learns from it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Shaped

from astra_jax.codecs.base import Quantizer
from astra_jax.models.interface import Estimates, Report
from astra_jax.models.mask import Block
from astra_jax.strategies.coded import Astra, Heard
from astra_jax.strategies.transport import Delivery, Virtual
from train.memory import Frugal


@dataclasses.dataclass(frozen=True)
class NoiseAugmented(Frugal, Astra):
    """ASTRA on virtual shards as training runs it: remote tokens are noisy estimates with straight-through gradients,
    and every block reports a `codecs.base.Observation`.

    Attributes:
      key: what the noise is drawn from.
      strength: lambda of the noise; the paper's best is 1.
    """

    key: Key[Array, ""] = dataclasses.field(kw_only=True)
    strength: float = dataclasses.field(default=1.0, kw_only=True)

    folds = False

    def heard(
        self,
        codec: Quantizer,
        mine: Float[Array, "N B S W"],
        expected: Any,
        delivery: Delivery | None,
        estimate: Any,
        block: Block,
    ) -> Heard:
        noise_key, revive_key = jax.random.split(jax.random.fold_in(self.key, block.number))
        p = jax.lax.stop_gradient(expected)
        rest = mine - self.own(p)
        z = codec.encode(rest) if delivery is None else delivery.codes
        match block.kind:
            case "coded":
                assert isinstance(self.transport, Virtual)
                said = codec.straight_through(rest, z, noise_key, self.strength, self.transport.groups)
            case "known":
                said = rest
            case _:
                said = jnp.zeros_like(rest)
        sent = self._sent(*mine.shape[:3])
        seen = codec.observe(_by_sequence(rest), _by_sequence(z), revive_key, _by_sequence(sent))
        if codec.remembers:
            unexpected = jnp.sum((jax.lax.stop_gradient(mine) - self.own(expected)) ** 2, axis=-1)
            seen = seen._replace(surprise=jnp.mean(unexpected, where=sent))
        if delivery is not None and delivery.by_token:
            said = jnp.where(jnp.asarray(delivery.groups)[..., None] > 0, said, 0)
        return Heard(Estimates(p + said), Report(observed=seen))

    def _sent(self, N: int, B: int, S: int) -> Bool[Array, "N B S"]:
        """Which slots hold a token that is sent."""
        tokens = self.sent_tokens()
        return jnp.broadcast_to(jnp.asarray(tokens.valid & tokens.sent), (B, N, S)).swapaxes(0, 1)


def _by_sequence(a: Shaped[Array, "N B S *feature"]) -> Shaped[Array, "BN S *feature"]:
    """The shards of all sequences, those of one beside each other, as devices have them that share the batch."""
    return a.swapaxes(0, 1).reshape(-1, *a.shape[2:])
