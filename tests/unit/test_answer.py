"""What is said of an answer on several hosts. That they answer is in tests/multihost."""

import numpy as np
import pytest

from eval.answer import ways_out


@pytest.mark.parametrize(
    ("hosts", "ways"),
    [
        ([[1, 2, 0]], [1, 1, 1]),
        ([[1, 1, 0, 0]], [1, 1]),  # a host's first device sends to its second
        ([[1, 0], [1, 0]], [2, 2]),
        ([[1, 3], [2, 0]], [1, 1, 1, 1]),
        ([[1], [0]], [0, 0]),  # each has a batch of its own
    ],
)
def test_from_how_many_devices_a_host_sends_to_others(hosts, ways):
    assert ways_out(np.array(hosts)) == ways
