"""What is benchmarked and planned for: a model and one input, from a checkpoint or a known architecture."""

import dataclasses
import itertools
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import checkpoints
from astra_jax.codecs.config import AstraConfig, Site, VQConfig
from astra_jax.errors import AstraError
from astra_jax.inputs.token_batches import Text, most_tokens
from astra_jax.serving.compile import STRATEGIES, Make
from astra_jax.strategies.coded import Astra
from astra_jax.strategies.rivals import BlockParallel
from checkpoints.tensor_maps import build
from eval.cost.presets import PRESETS

DRAWN = 1 << 20  # random numbers that fill all weights
TOKENS = 1024  # T where neither the user nor the model says it: the paper's setting


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to run a model.

    Attributes:
      strategy: a name of `STRATEGIES`.
      N: devices.
      groups: G of `astra` and `astra-plain`; None for the others.
      exchanges: Nb of `bp-ag` and `bp-sp`; None for the others.
      codec: of those two, with a predictor behind a plus sign; None for what the workload has.
    """

    strategy: str
    N: int
    groups: int | None = None
    exchanges: int | None = None
    codec: str | None = None

    def __str__(self) -> str:
        more = f" G={self.groups}" if self.groups else f" Nb={self.exchanges}" if self.exchanges else ""
        return self.strategy + (f" {self.codec}" if self.codec else "") + more

    @property
    def make(self) -> Make:
        """What makes the strategy for a model."""
        strategy = STRATEGIES[self.strategy]
        if issubclass(strategy, BlockParallel) and self.exchanges is not None:
            return partial(strategy.of, exchanges=self.exchanges)
        return strategy.of


ONE = Setting("single", 1)


def settings(
    strategies: tuple[str, ...],
    N: int,
    groups: tuple[int, ...],
    exchanges: tuple[int, ...],
    codecs: tuple[str, ...] = (),
) -> list[Setting]:
    """Every way to run these strategies on N devices; `single` on one.

    Args:
      codecs: of `astra` and `astra-plain` a way for each; none for what the workload has.

    Raises:
      AstraError: a strategy is not known.
    """
    ways: list[Setting] = []
    for name in strategies:
        if name not in STRATEGIES:
            raise AstraError(f"there is no strategy {name!r}; known are {', '.join(STRATEGIES)}")
        if issubclass(STRATEGIES[name], Astra):
            ways += [Setting(name, N, G, codec=codec) for codec, G in itertools.product(codecs or (None,), groups)]
        elif issubclass(STRATEGIES[name], BlockParallel):
            ways += [Setting(name, N, exchanges=Nb) for Nb in exchanges]
        else:
            ways.append(Setting(name, 1 if name == "single" else N))
    return ways


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, and how long one input is.

    Attributes:
      name: what the user called it.
      family, config: the architecture, under the names of `checkpoints.tensor_maps`.
      astra: how it is compressed; G is another for every setting.
      T: tokens of one input, class token not counted.
      dtype: what is computed in, and what weights are kept in.
      checkpoint: where weights are; None for random ones.
      has_codes: whether `astra` is the checkpoint's, and not the paper's for want of any.
    """

    name: str
    family: str
    config: Any
    astra: AstraConfig
    T: int
    dtype: Any
    checkpoint: Path | None = None
    has_codes: bool = False

    def of(self, setting: Setting) -> "Workload":
        """The same with the codec of a setting, before calibration. Raises AstraError for one that does not fit."""
        if setting.codec is None or setting.groups is None:
            return self
        attention = self.abstract(None).blocks.attention
        axes = self.config.hidden_size if self.astra.site == "hidden" else 2 * attention.J * attention.E
        return dataclasses.replace(self, astra=self.astra.with_codec(setting.codec, setting.groups, axes))

    def abstract(self, groups: int | None) -> Any:
        """The model with shapes in place of weights; without codebooks where G is None."""
        astra = None if groups is None else self.astra.with_groups(groups)
        graphdef, params, rest = nnx.split(build(self.family, self.config, astra, self.dtype), nnx.Param, ...)  # type: ignore[misc]
        params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, self.dtype), params)
        return nnx.merge(graphdef, params, rest)

    def weights(self) -> Any:
        """The parameters: those of the checkpoint, or random ones. Raises AstraError if these do not fit in memory."""
        if self.checkpoint:
            model = checkpoints.load(self.checkpoint, self.dtype, param_dtype=self.dtype).model
            return nnx.state(model, nnx.Param)
        shapes = nnx.state(self.abstract(None), nnx.Param)
        needed = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(shapes))
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > 0.8 * there:
            raise AstraError(
                f"{self.name} takes {needed / 1e9:.1f} GB in {self.dtype} and this machine has {there / 1e9:.1f} GB: "
                "predict its compute time with --device-profile FILE"
            )
        return jax.tree_util.tree_map_with_path(_random, shapes)

    def model(self, weights: Any, groups: int | None) -> Any:
        """The model with these parameters, and random codebooks of unit variance, as normalised inputs have."""
        graphdef, params, rest = nnx.split(self.abstract(groups), nnx.Param, ...)  # type: ignore[misc]
        nnx.replace_by_pure_dict(params, nnx.to_pure_dict(weights))
        return nnx.merge(graphdef, params, jax.tree_util.tree_map_with_path(_random, rest))

    def inputs(self) -> Any:
        """One image, or one text of T tokens."""
        if self.config.input_kind == "images":
            return jnp.zeros((1, self.config.side, self.config.side, self.config.num_channels), self.dtype)
        length = self.T + build(self.family, self.config).shards(1).class_slots
        return Text(np.zeros((1, length), np.int32), np.full((1,), length, np.int32))


def _random(path: Any, a: Any) -> jax.Array:
    """Weights of usual size: too small ones would underflow and be slow. Drawn by numpy, as XLA would compile for long,
    and the same numbers again and again, as drawing 8 billion takes minutes."""
    name = jax.tree_util.keystr(path)
    if "scale" in name:
        return jnp.ones(a.shape, a.dtype)
    if "bias" in name:
        return jnp.zeros(a.shape, a.dtype)
    values = np.random.default_rng(0).standard_normal(min(a.size, DRAWN), np.float32)
    values = (values if "codebook" in name else 0.02 * values).astype(a.dtype)
    return jnp.asarray(np.resize(values, a.shape))


def open_workload(name: str, tokens: int | None, site: Site | None, dtype: Any) -> Workload:
    """A known architecture, or the checkpoint in a folder.

    Args:
      name: a name of `PRESETS`, or a path.
      tokens: T; None for what the checkpoint's ViT has, or 1,024, or as many as the model can take.
      site: what is quantized; None for what the checkpoint does, else `hidden`.

    Raises:
      AstraError: there is neither, or T does not fit the model.
    """
    path, codes = None, None
    if name in PRESETS:
        family, config = PRESETS[name]
    else:
        path = Path(name)
        if not path.exists():
            raise AstraError(f"{name}: is no checkpoint and no preset: presets are {', '.join(PRESETS)}")
        meta = checkpoints.read_meta(path)
        family, config, codes = meta.family, meta.config, meta.astra
    astra = codes or VQConfig()
    if site:
        astra = dataclasses.replace(astra, site=site)
    if tokens is not None and tokens < 1:
        raise AstraError(f"--tokens is {tokens}; it must be at least 1: try {TOKENS}")
    if config.input_kind == "images":
        T = tokens or (config.num_patches if path else TOKENS)
        side = math.isqrt(T)
        if path and config.num_patches != T:
            raise AstraError(f"--tokens is {T}, but images of {name} have {config.num_patches}: leave the option out")
        if side**2 != T:
            raise AstraError(
                f"--tokens is {T}; an image has a square number of patches: try {side**2} or {(side + 1) ** 2}"
            )
        config = config if path else dataclasses.replace(config, image_size=side * config.patch_size)
    else:
        model = build(family, config)
        class_slots = model.shards(1).class_slots
        limit = most_tokens(config) - class_slots
        if path is None and not model.per_token and limit < (tokens or TOKENS):  # an encoder is stretched as ViT is
            more = (tokens or TOKENS) - limit
            limit += more
            config = dataclasses.replace(config, max_position_embeddings=config.max_position_embeddings + more)
        T = tokens or min(TOKENS, limit)
        if limit < T:
            raise AstraError(f"--tokens is {T}; {name} takes at most {limit}: use fewer")
    return Workload(name, family, config, astra, T, jnp.dtype(dtype), path, codes is not None)
