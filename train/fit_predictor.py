"""The weights of a predictor, from the estimates of one block to what the next one sees: least squares, and for an
`mlp` some training that starts there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

RIDGE = 1e-3  # of the mean variance, added to all variances, so that few tokens do not make wild weights (our choice)
STEPS, BATCH, RATE = 1000, 1024, 3e-3  # of the training of an `mlp` (our choice)


def regress(x: Float[np.ndarray, "M W"], y: Float[np.ndarray, "M W"]) -> dict[str, Float[np.ndarray, "..."]]:
    """The weight and bias of a `Predictor` that predict y from x best in the mean square."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean_x, mean_y = x.mean(0), y.mean(0)
    weight = _solve(x - mean_x, y - mean_y)
    return {"weight": weight, "bias": mean_y - mean_x @ weight}


def _solve(x: Float[np.ndarray, "M U"], y: Float[np.ndarray, "M W"]) -> Float[np.ndarray, "U W"]:
    """The weights of the best linear prediction of y from x, both centred."""
    ridge = RIDGE * (x**2).mean() + 1e-12
    return np.linalg.solve(x.T @ x / len(x) + ridge * np.eye(x.shape[1]), x.T @ y / len(x))


def train_mlp(
    hidden_units: int,
    seen: Float[np.ndarray, "M _"],
    y: Float[np.ndarray, "M W"],
    metric: Float[np.ndarray, "W W"],
    key: Key[Array, ""],
) -> dict[str, Float[np.ndarray, "..."]]:
    """The variables of a `Predictor` of kind `mlp`: the mean of `(y - p) metric (y - p)^T` is made small by Adam.

    Hidden units start as random ones, whose part is found by least squares.

    Args:
      seen: the estimate of every token, and what is around it.
    """
    W = y.shape[1]
    mean, scale = seen.mean(0), seen.std(0) + 1e-6
    seen = (seen - mean) / scale
    linear = regress(seen[:, :W], y)["weight"]
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    down = rng.normal(size=(seen.shape[1], hidden_units)) / np.sqrt(seen.shape[1])
    hidden = np.maximum(seen @ down, 0)
    rest = y - seen[:, :W] @ linear
    up = _solve((hidden - hidden.mean(0)).astype(np.float64), rest - rest.mean(0))
    bias = rest.mean(0) - hidden.mean(0) @ up
    weights = {"weight": linear, "bias": bias, "down": down, "offset": np.zeros(hidden_units), "up": up}
    root = np.linalg.cholesky(metric + 1e-6 * np.trace(metric) / len(metric) * np.eye(len(metric)))
    norm = np.mean(((y - y.mean(0)) @ root) ** 2) + 1e-12
    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (weights, seen, y, root / np.sqrt(norm)))
    found = jax.tree.map(np.asarray, _adam(*arrays, key))
    found["down"] = found["down"] / scale[:, None]
    found["offset"] = found["offset"] - mean @ found["down"]
    found["weight"] = found["weight"] / scale[:W, None]
    found["bias"] = found["bias"] - mean[:W] @ found["weight"]
    return found


@jax.jit
def _adam(weights: Any, seen: Array, y: Array, root: Array, key: Key[Array, ""]) -> Any:
    """The weights after `STEPS` batches of random tokens."""
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def loss(weights: Any, x: Array, y: Array) -> Array:
        hidden = jax.nn.relu(x @ weights["down"] + weights["offset"])
        p = x[:, : y.shape[1]] @ weights["weight"] + weights["bias"] + hidden @ weights["up"]
        return jnp.mean(((y - p) @ root) ** 2)

    def step(state: tuple[Any, Any], key: Key[Array, ""]) -> tuple[tuple[Any, Any], None]:
        weights, moments = state
        rows = jax.random.randint(key, (min(BATCH, len(y)),), 0, len(y))
        updates, moments = optimizer.update(jax.grad(loss)(weights, seen[rows], y[rows]), moments, weights)
        return (optax.apply_updates(weights, updates), moments), None

    return jax.lax.scan(step, (weights, optimizer.init(weights)), jax.random.split(key, STEPS))[0][0]
