"""Tests of the lab need root, and run one at a time on a machine."""

import os
import socket
import time

import pytest


@pytest.fixture(scope="module", autouse=True)
def alone():
    """Waits for other tests of the lab on this machine, of this run or another: there is one lab at a time."""
    if os.geteuid() != 0:
        pytest.skip("the lab makes network namespaces, which only root may")
    with socket.socket(socket.AF_UNIX) as lock:
        while True:
            try:
                lock.bind("\0astralab-tests")
                break
            except OSError:
                time.sleep(0.2)
        yield
