"""What crosses the link in one forward pass: as the strategy predicts, checked against the compiled program."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import DATA, SEQ, make_mesh
from astra_jax.serving.compile import make_for, on_mesh, place
from astra_jax.strategies.base import Message
from eval.cost.hlo import collectives_in
from eval.cost.timing import forward


def abstract(tree: Any) -> Any:
    """Shapes in place of the arrays of a model or of inputs."""
    if isinstance(tree, nnx.Module):
        graphdef, state = nnx.split(tree)
        return nnx.merge(graphdef, abstract(state))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def pass_on_mesh(model: Any, mesh: Mesh, make: Any) -> tuple[Any, Any]:
    """A forward pass on the devices of a mesh (see `timing.forward`): the jitted function of state and inputs, and
    the state.

    Raises:
      AstraError: the strategy cannot split the model.
    """
    N, make = mesh.shape[SEQ], make_for(mesh, make)
    graphdef, state = place(model, mesh, make)
    work = forward(model, graphdef)

    @jax.jit
    def run(state: Any, inputs: Any) -> Array:
        strategy = make(model, N, inputs)
        by_token = model.per_token and strategy.splits_tokens
        return on_mesh(work, mesh, strategy, P(DATA, SEQ) if by_token else P(DATA))(state, model.to_tokens(inputs))

    return run, state


def compiled_pass(model: Any, N: int, inputs: Any, make: Any) -> str:
    """The optimized HLO of a forward pass on N devices, which need not be there. Weights and inputs may be shapes."""
    run, state = pass_on_mesh(abstract(model), make_mesh(N, to_run=False), make)
    text = run.lower(state, abstract(inputs)).compile().as_text()
    assert text is not None
    return text


def sent_bits(compiled_text: str, N: int) -> dict[str, Any]:
    """Bits that one device gives to the collectives of every kind in a compiled program, counted as in `Message`; of
    those in branches a list, under `KIND, sometimes`, of what each gives once."""
    found: dict[str, Any] = {}
    for c in collectives_in(compiled_text):
        once = 8 * c.bytes // (N if c.kind == "all-gather" else 1)
        _count(found, c.kind, once, c.trip_count or 1, c.sometimes)
    return found


def _count(found: dict[str, Any], kind: str, bits: int, times: int, sometimes: bool) -> None:
    if sometimes:
        found[f"{kind}, sometimes"] = sorted([*found.get(f"{kind}, sometimes", []), bits])
    else:
        found[kind] = found.get(kind, 0) + bits * times


def messages(model: Any, N: int, inputs: Any, make: Any) -> list[Message]:
    """What one device sends in a forward pass of one sequence, by prediction and in the compiled program.

    Args:
      inputs: one sequence.

    Raises:
      AstraError: the program sends something else than predicted; or see `compiled_pass`.
    """
    if N == 1:
        return []
    predicted = make(model, N, inputs).messages(model)
    expected: dict[str, Any] = {}
    for message in predicted:
        _count(expected, message.kind, message.bits, message.times, message.sometimes)
    found = sent_bits(compiled_pass(model, N, inputs, make), N)
    if found != expected:
        raise AstraError(f"the program sends {found} bits, not {expected} as predicted: please report it")
    return predicted
