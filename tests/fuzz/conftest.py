"""Parsers run as for users, and what they refused and accepted is printed at the end."""

from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest

from tests.fuzz.harness import summary


@pytest.fixture(scope="session", autouse=True)
def as_for_users() -> Iterator[None]:
    """Annotations are not enforced, so that a value of a wrong type goes as far as it does for a user."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if lines := summary():
        terminalreporter.section("what parsers made of mutations")
        for line in lines:
            terminalreporter.write_line(line)
