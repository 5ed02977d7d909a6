"""What tests of `astra eval` leave out."""

import pytest

from eval.verbs import evaluate


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that does not ask how long a device computes: to measure that is to compile one more program."""
    monkeypatch.setattr(evaluate, "compute_seconds", lambda *_: 1e-3)
