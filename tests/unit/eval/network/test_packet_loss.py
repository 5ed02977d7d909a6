"""Packet loss: how much is lost, in how long bursts, what is lost together, and by whom."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import Shards
from eval.network.packet_loss import PacketLoss, arrived, lost

losses = st.builds(
    PacketLoss,
    rate=st.floats(0, 0.8),
    burst=st.one_of(st.none(), st.floats(5, 20)),
    packet=st.integers(5, 60),
)


def by_sender(there: np.ndarray, shards: Shards) -> np.ndarray:
    """[L,B,N,slots] -> [L,B,receiver,sender,slots of a shard]."""
    return there.reshape(*there.shape[:3], shards.N, -1)


def streaks(row: np.ndarray) -> np.ndarray:
    """Lengths of the runs of True that neither start nor end the row."""
    edges = np.diff(row.astype(int))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    ends = ends[ends > starts[0]]
    return ends - starts[: len(ends)]


# --- the chain ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "burst"), [(0.05, None), (0.5, None), (0.05, 8.0), (0.3, 3.0), (0.5, 1.5)])
def test_the_share_of_lost_packets(rate, burst):
    """Within five standard errors of `rate`, of all packets and of every place in a row."""
    links = 4000
    found = lost(PacketLoss(rate, burst), 40, (links,), np.random.default_rng(0))
    per_link = found.mean(axis=0)  # links are independent, packets of one link are not
    assert abs(per_link.mean() - rate) < 5 * per_link.std() / math.sqrt(links)
    assert (abs(found.mean(axis=1) - rate) < 5 * math.sqrt(rate * (1 - rate) / links)).all()


@pytest.mark.parametrize(
    ("rate", "burst", "expected"), [(0.05, 8.0, 8), (0.3, 3.0, 3), (0.5, 1.0, 1), (0.3, None, 1 / 0.7)]
)
def test_the_mean_length_of_a_burst(rate, burst, expected):
    found = streaks(lost(PacketLoss(rate, burst), 40_000, (1,), np.random.default_rng(1))[:, 0])
    assert abs(found.mean() - expected) <= 5 * found.std() / math.sqrt(len(found))
    # Such lengths are geometric: their standard deviation tells a chain from bursts of one length.
    assert found.std() == pytest.approx(math.sqrt(expected * (expected - 1)), rel=0.2)


def test_lone_losses_are_bursts_of_their_own_mean_length():
    rng = np.random.default_rng
    np.testing.assert_array_equal(
        lost(PacketLoss(0.3), 50, (9,), rng(2)), lost(PacketLoss(0.3, burst=1 / 0.7), 50, (9,), rng(2))
    )


# --- what a lost packet takes with it -----------------------------------------------------------------------------


@given(
    loss=losses,
    T=st.integers(9, 40),
    N=st.integers(2, 4),
    class_token=st.sampled_from([None, "distributed", "single"]),
    bits=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_whole_packets_are_lost_and_nothing_else(loss, T, N, class_token, bits, seed):
    shards, L = Shards.split(T, N, class_token), 2
    B, home, sent = 2, shards.home_slots, shards.sent_slots
    there = arrived(loss, shards, bits, L, B, np.random.default_rng(seed))
    assert there.shape == (L, B, N, N * (shards.class_slots + shards.S)) and there.dtype == bool
    pairs = by_sender(there, shards)
    assert pairs[..., :home].all()  # never sent, so never lost
    for n in range(N):
        assert pairs[:, :, n, n].all()  # nor what a device has itself
    tokens = 8 * loss.packet // bits
    for start in range(home, home + sent, tokens):
        packet = pairs[..., start : start + tokens]
        assert (packet.all(axis=-1) | ~packet.any(axis=-1)).all()
    if loss.rate == 0:
        assert there.all()


def test_packets_are_lost_one_by_one():
    """Some packets of a message are lost and others not, also those that share neither block nor sequence."""
    shards = Shards.split(32, 2)  # 16 tokens of 8 bits, 4 to a packet
    pairs = by_sender(arrived(PacketLoss(0.5, packet=4), shards, 8, 3, 50, np.random.default_rng(0)), shards)
    packets = pairs[:, :, 0, 1].reshape(3, 50, 4, 4)[..., 0]
    assert {tuple(row) for row in packets.reshape(-1, 4)} == {tuple(map(bool, map(int, f"{i:04b}"))) for i in range(16)}


def test_links_lose_packets_on_their_own():
    """No two of the twelve links of four devices agree more than chance has it, nor two sequences."""
    shards, n = Shards.split(8, 4), 4000
    pairs = by_sender(arrived(PacketLoss(0.5), shards, 8, 1, n, np.random.default_rng(0)), shards)[0, ..., 0]  # [n,4,4]
    links = pairs[:, ~np.eye(4, dtype=bool)]  # [n,12]
    together = np.corrcoef(links.T) - np.eye(12)
    assert abs(together).max() < 5 / math.sqrt(n)
    assert abs(np.corrcoef(links[:-1].ravel(), links[1:].ravel())[0, 1]) < 5 / math.sqrt(n)


def test_a_burst_goes_on_in_the_next_block():
    shards, n = Shards.split(8, 2), 4000
    first, second = by_sender(arrived(PacketLoss(0.2, burst=10.0), shards, 8, 2, n, np.random.default_rng(0)), shards)[
        :, :, 0, 1, 0
    ]
    again = 1 - second[~first].mean()
    assert abs(again - 0.9) < 5 * math.sqrt(0.9 * 0.1 / (~first).sum())


def test_ragged_shards_send_the_same_slots():
    lengths = jnp.asarray([5, 17])
    ragged, even = Shards.ragged(lengths, 20, 4, "distributed"), Shards.split(20, 4, "distributed")
    for shards in (ragged, even):
        assert arrived(PacketLoss(0.5, packet=2), shards, 16, 2, 2, np.random.default_rng(3)).shape == (2, 2, 4, 4 * 6)
    np.testing.assert_array_equal(
        *(arrived(PacketLoss(0.5, packet=2), shards, 16, 2, 2, np.random.default_rng(3)) for shards in (ragged, even))
    )


@pytest.mark.parametrize("silent", [1, 2, 3])
def test_blocks_that_send_nothing_have_no_packets(silent):
    """The others lose what they would lose if they were all there are."""
    shards, loss = Shards.split(12, 3), PacketLoss(0.5, burst=3.0, packet=4)
    schedule = ("known",) * silent + ("coded",) * (3 - silent)
    found = arrived(loss, shards, 16, 3, 2, np.random.default_rng(0), schedule)
    assert found.shape == (3, 2, 3, 12) and found[:silent].all()
    if silent < 3:
        others = arrived(loss, shards, 16, 3 - silent, 2, np.random.default_rng(0))
        np.testing.assert_array_equal(found[silent:], others)
        assert not others.all()


def test_a_loss_of_all_leaves_what_was_never_sent():
    shards = Shards.split(12, 3, "distributed")  # 4 tokens of a shard behind its class token, which stays at home
    pairs = by_sender(arrived(PacketLoss(1.0, packet=4), shards, 8, 2, 3, np.random.default_rng(0)), shards)
    expected = np.broadcast_to(np.eye(3, dtype=bool)[..., None], (3, 3, 5)) | (np.arange(5) == 0)
    np.testing.assert_array_equal(pairs, np.broadcast_to(expected, (2, 3, 3, 3, 5)))


# --- wrong values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 1.01}, "loss is 1.01; .* from 0 to 1"),
        ({"rate": -0.1}, "loss is -0.1; "),
        ({"rate": math.nan}, "loss is nan; "),
        ({"rate": 1.0, "burst": 8.0}, "loss is 1: .* leave the burst out"),
        ({"rate": 0.1, "burst": 0.5}, "burst is 0.5; .* at least 1"),
        ({"rate": 0.1, "burst": math.inf}, "burst is inf; "),
        ({"rate": 0.1, "burst": math.nan}, "burst is nan; "),
        ({"rate": 0.9, "burst": 8.0}, "bursts of 8 packets cannot make up a loss of 0.9: let them have 9 packets"),
    ],
)
def test_what_no_link_does(values, message):
    with pytest.raises(AstraError, match=message):
        PacketLoss(**values)


@pytest.mark.parametrize(("rate", "burst"), [(0.9, 9.0), (0.75, 3.0), (0.5, 1.0)])
def test_the_shortest_bursts_of_a_rate(rate, burst):
    """Between two of them a single packet arrives."""
    found = lost(PacketLoss(rate, burst), 200, (1,), np.random.default_rng(0))[:, 0]
    assert (streaks(~found) == 1).all()


def test_a_packet_too_small_for_a_token():
    with pytest.raises(AstraError, match="holds 4 bytes, but the codes of one token take 40"):
        arrived(PacketLoss(0.1, packet=4), Shards.split(8, 2), 320, 1, 1, np.random.default_rng(0))
