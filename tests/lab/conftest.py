"""Tests of the lab need root and its tools, which `.ci/run` installs, and run one at a time on a machine."""

import socket
import time

import pytest

from astra_jax.errors import AstraError
from eval.network.lab import check_machine


@pytest.fixture(scope="module", autouse=True)
def alone():
    """Waits for other tests of the lab on this machine, of this run or another: there is one lab at a time."""
    try:
        check_machine()
    except AstraError as error:
        pytest.skip(str(error))
    with socket.socket(socket.AF_UNIX) as lock:
        while True:
            try:
                lock.bind("\0astralab-tests")
                break
            except OSError:
                time.sleep(0.2)
        yield
