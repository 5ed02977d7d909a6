"""The weights of a predictor: least squares from the estimates of one block to what the next one sees."""

import numpy as np
from jaxtyping import Float

RIDGE = 1e-3  # of the mean variance, added to all variances, so that few tokens do not make wild weights (our choice)


def regress(
    kind: str, rank: int, x: Float[np.ndarray, "M W"], y: Float[np.ndarray, "M W"]
) -> dict[str, Float[np.ndarray, "..."]]:
    """The variables of a `Predictor` that predicts y from x best in the mean square.

    `low-rank` is the diagonal and, of the best linear predictor of what that leaves, the directions in which its
    predictions vary most (reduced-rank regression).
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    ridge = RIDGE * (x**2).mean() + 1e-12

    def linear(target: Float[np.ndarray, "M W"]) -> Float[np.ndarray, "W W"]:
        covariance = x.T @ x / len(x) + ridge * np.eye(x.shape[1])
        return np.linalg.solve(covariance, x.T @ target / len(x))

    if kind == "linear":
        weight = linear(y)
        return {"weight": weight, "bias": mean_y - mean_x @ weight}
    scale = (x * y).mean(0) / ((x**2).mean(0) + ridge)
    found = {"scale": scale, "bias": mean_y - mean_x * scale}
    if kind == "low-rank":
        weight = linear(y - x * scale)
        predicted = x @ weight
        directions = np.linalg.eigh(predicted.T @ predicted)[1][:, -rank:]
        found |= {"down": weight @ directions, "up": directions.T}
        found["bias"] = found["bias"] - mean_x @ found["down"] @ found["up"]
    return found
