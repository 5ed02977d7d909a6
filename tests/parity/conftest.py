"""What the parity tests of all families share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A model of torch is the same whatever tests ran before. Not 0, which `randomised` begins with once more."""
    torch.manual_seed(1)


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """Asserts that ours is theirs: 1e-5 for the output of a module, 1e-4 for logits."""

    def check(ours: Any, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
        np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=0, atol=tolerance)

    return check


@pytest.fixture(scope="session")
def tensors() -> Callable[[Path], dict[str, np.ndarray]]:
    """Reads all tensors of a folder's model.safetensors."""

    def read(folder: Path) -> dict[str, np.ndarray]:
        with safe_open(folder / "model.safetensors", framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}

    return read


@pytest.fixture(scope="session")
def randomised() -> Callable[[Any], Any]:
    """Makes every parameter of a torch model random: biases, norms and class tokens that are 0 and 1 hide mistakes."""

    def draw(model: Any) -> Any:
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += model.config.initializer_range * torch.randn_like(parameter)
        return model.eval()

    return draw
