"""Floating-point operations of a program, counted from its jaxpr."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

# Matrix products too, but nothing here uses them: better an error than a count that leaves them out.
_UNCOUNTED = {"conv_general_dilated", "pallas_call", "ragged_dot", "ragged_dot_general", "scaled_matmul_wrapper"}


def flops(function: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations of the matrix products of `function(*args)`: 2 M N K for [M,K] times [K,N].

    Batches count, and so do the turns of a scan. Of a condition the branch with most counts, of a `shard_map` one
    device. Everything else (softmax, norms, gathers) is left out, as it is in the paper's and everybody's GFLOPs.

    JAX's own counts serve another purpose: `lowered.cost_analysis()` and `jax.experimental.roofline` count the body of
    a loop once (JAX 0.10.2: a scan over 12 matmuls of 262,144 operations is 262,146 and 262,144), and every model here
    is a scan over its blocks. They add elementwise operations, too.

    Args:
      function: any function that JAX can trace. Nothing is computed or compiled.
      args: its arguments; trees of `jax.ShapeDtypeStruct` do.

    Raises:
      NotImplementedError: the program has a matrix product in a `while`, whose turns are not known, or a convolution,
        ragged product or Pallas kernel.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_flops(jaxpr: Any) -> int:
    return sum(map(_equation_flops, jaxpr.eqns))


def _equation_flops(equation: Any) -> int:
    name = equation.primitive.name
    if name in _UNCOUNTED:
        raise NotImplementedError(f"the FLOPs of {name} are not counted")
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        K = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * K * math.prod(equation.outvars[0].aval.shape)
    inner = [_jaxpr_flops(jaxpr) for jaxpr in _jaxprs_in(equation.params)]
    if name == "while" and any(inner):
        raise NotImplementedError("the FLOPs of a matrix product in a while loop are not known: use a scan")
    if name == "cond":
        return max(inner)
    return sum(inner) * (equation.params["length"] if name == "scan" else 1)


def _jaxprs_in(params: Any) -> Iterator[Any]:
    """The programs that an equation runs: bodies of loops, branches, functions that are called."""
    for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, ClosedJaxpr | Jaxpr)):
        if isinstance(leaf, ClosedJaxpr | Jaxpr):
            yield getattr(leaf, "jaxpr", leaf)
