"""`astra net check` without a network: what it says, what it believes, and which advice it gives."""

import dataclasses
import math
import socket

import pytest

from astra_jax.errors import AstraError
from astra_jax.hosts import preflight, rendezvous
from astra_jax.hosts.agreement import digest
from astra_jax.hosts.connection import Line
from astra_jax.hosts.findings import Findings, Pair, Way, pair_rows
from astra_jax.hosts.options import Hosts
from astra_jax.hosts.preflight import check_hosts
from astra_jax.hosts.rendezvous import About
from eval.verbs import net
from tests.helpers.hosts import HELLO

ABOUTS = [
    About(host, 3, f"10.0.0.{host + 1}", f"pi{host}", f"10.0.0.{host + 1}", rendezvous.versions(), "ab" * 32)
    for host in range(3)
]


def pair(a, b, rates=(10e6, 10e6), trips=(2e-3, 2e-3), failures=("", "")):
    return Pair(Way(a, b, trips[0], rates[0], failures[0]), Way(b, a, trips[1], rates[1], failures[1]))


PAIRS = (
    pair(0, 1),
    pair(0, 2, rates=(9e6, 4e6), trips=(9e-3, 3e-3)),
    pair(1, 2, rates=(None, 5e6), trips=(None, 1e-3), failures=("host 1: no connection", "")),
)


def test_what_is_the_same_is_no_difference():
    assert rendezvous.differences(ABOUTS) == []


def test_other_versions_are_named_with_the_hosts():
    other = dataclasses.replace(ABOUTS[2], versions=ABOUTS[2].versions | {"jax": "0.9.1"})
    (found,) = rendezvous.differences([*ABOUTS[:2], other])
    assert found == f"jax is {ABOUTS[0].versions['jax']} on hosts 0, 1 and 0.9.1 on host 2: install the same"


def test_another_checkpoint_is_named_with_the_hosts():
    other, none = dataclasses.replace(ABOUTS[1], digest="cd" * 32), dataclasses.replace(ABOUTS[2], digest=None)
    (found,) = rendezvous.differences([ABOUTS[0], other, none])
    assert found == (
        "the checkpoint's hash is abababababab on host 0 and cdcdcdcdcdcd on host 1 and not given on host 2: copy the "
        "folder of host 0 to the others"
    )


def test_where_gloo_would_listen_by_itself():
    note = preflight._gloo_note
    assert note(ABOUTS[1]) == ""
    assert note(dataclasses.replace(ABOUTS[1], resolves="127.0.1.1")) == (
        "host 1 (pi1, 10.0.0.2): its name leads to 127.0.1.1, which no other host reaches; gloo would listen there, "
        "but astra gives it 10.0.0.2: nothing to do"
    )
    assert "is not known to itself" in note(dataclasses.replace(ABOUTS[1], resolves=""))
    assert note(dataclasses.replace(ABOUTS[1], address="127.0.0.1", resolves="127.0.1.1")) == ""


def test_the_slowest_way_and_the_longest_round_trip():
    """A round trip may have waited for what was sent before it: of 9 and 3 ms between two hosts, 3 are theirs."""
    findings = Findings(pairs=PAIRS)
    assert findings.slowest == PAIRS[1].back and findings.round_trip == 3e-3
    assert Findings().slowest is None and Findings().round_trip == 0


def test_failures_are_one_sentence():
    assert preflight._failures(PAIRS[:2]) == []
    assert preflight._failures(PAIRS) == ["from host 1 to host 2: host 1: no connection"]
    assert preflight._failures([*PAIRS, PAIRS[2]])[0].endswith("no connection (and 1 more: see the table)")


def test_tables():
    other = dataclasses.replace(ABOUTS[1], digest=None, versions=ABOUTS[1].versions | {"flax": "0"})
    rows = net.host_rows(Findings((ABOUTS[0], other)), 3)
    assert [row["as host 0"] for row in rows] == ["yes", "no: flax, checkpoint", "did not take part"]
    assert rows[1] | {"as host 0": 0} == {"host": 1, "address": "10.0.0.2", "name": "pi1", "as host 0": 0}
    assert pair_rows(PAIRS)[1:] == [
        {"hosts": "0 - 2", "round trip ms": 3.0, "Mbps there": 9.0, "Mbps back": 4.0, "problem": "-"},
        {"hosts": "1 - 2", "round trip ms": 1.0, "Mbps there": None, "Mbps back": 5.0}
        | {"problem": "host 1: no connection"},
    ]


def test_a_digest_is_of_names_and_contents(tmp_path):
    def of(name, files):
        for file, content in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return digest([tmp_path / name])

    first = of("a", {"astra.json": b"{}", "weights/b": b"12", "weights/a": b"34"})
    assert first == of("b", {"weights/a": b"34", "weights/b": b"12", "astra.json": b"{}"})
    assert len(first) == 64
    others = {
        of("c", {"astra.json": b"{}", "weights/b": b"13", "weights/a": b"34"}),
        of("d", {"astra.json": b"{}", "weights/c": b"12", "weights/a": b"34"}),
        of("e", {"astra.json": b"{}", "weights/b": b"1", "weights/a": b"234"}),
        of("f", {"astra.json": b"{}", "weights/b": b"12"}),
    }
    assert len(others | {first}) == 5
    assert digest([]) is None and digest([tmp_path / "a", tmp_path / "b"]) not in (first, None)
    with pytest.raises(OSError, match="there is no folder"):
        digest([tmp_path / "missing"])


@pytest.mark.parametrize(
    ("hosts", "seconds", "message"),
    [
        (Hosts(), 2.0, "hosts are checked by --coordinator ADDRESS:PORT, --hosts N and --host I: give all three"),
        (Hosts("127.0.0.1:7777", 2), 2.0, "--host is missing"),
        (Hosts("127.0.0.1:7777", 1, 0), 2.0, "--hosts is 1; there is nothing between hosts to check: give at least 2"),
        (Hosts("127.0.0.1:7777", 2, 0, start_seconds=0.0), 2.0, "--start-seconds is 0; it must be above 0: try 60"),
        (Hosts("127.0.0.1:7777", 2, 0), 0.0, "--rate-seconds is 0; it must be above 0 and at most 60: try 2"),
        (Hosts("127.0.0.1:7777", 2, 0), math.nan, "--rate-seconds is nan"),
        (Hosts("8.8.8.8:7777", 2, 0), 2.0, "8.8.8.8 is a public address"),
        (Hosts("192.0.2.1:7777", 2, 0), 2.0, "it is not an address of this host: give that of host 0"),
        (
            Hosts("127.0.0.1:7", 2, 1, start_seconds=0.01),
            2.0,
            "nothing answers at --coordinator 127.0.0.1:7 within 0.01",
        ),
    ],
)
def test_what_cannot_be_checked(hosts, seconds, message):
    with pytest.raises(AstraError) as error:
        check_hosts(hosts, (), seconds)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("second", [0, 1], ids=["this check's", "JAX's"])
def test_a_port_in_use(second):
    """Both ports that host 0 will need; and the one that it names instead is free."""
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1] - second
        with pytest.raises(AstraError, match=f"needs 127.0.0.1:{port + second}, and the port is in use") as error:
            check_hosts(Hosts(f"127.0.0.1:{port}", 2, 0))
    other = int(str(error.value).split("try --coordinator 127.0.0.1:")[1].split()[0])
    socket.create_server(("127.0.0.1", other)).close()


def test_a_failure_is_told_and_does_not_end_the_talk():
    ours, there = socket.socketpair()
    here = Line(ours)
    there.sendall(b'{"failed": "[red]no\\u001b[2J\\nroom"}\n{"port": 1}\n')
    with pytest.raises(ConnectionError, match=r"\(red\]no \(2J room"):
        preflight._hear(here, 1.0)
    assert preflight._hear(here, 1.0) == {"port": 1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": 3},
        {"host": -1},
        {"host": True},
        {"host": "1"},
        {"hosts": 10**9},
        {"hosts": math.nan},
        {"address": "pi1"},
        {"address": "::1"},
        {"address": None},
        {"name": 7},
        {"versions": []},
        {"versions": {}},
    ],
    ids=str,
)
def test_a_host_that_tells_nonsense_is_a_stranger(wrong):
    assert rendezvous._about(HELLO).host == 1
    with pytest.raises(ConnectionError):
        rendezvous._about(HELLO | wrong)


def test_names_are_fit_to_be_printed():
    assert rendezvous._about(HELLO | {"name": "[/b]\x1b[2Jä" + "x" * 99}).name == "??b???2J?" + "x" * 55


@pytest.mark.parametrize(
    "command",
    [
        {"do": "format"},
        {"do": "call", "address": "8.8.8.8", "port": 80},
        {"do": "call", "address": "localhost", "port": 80},
        {"do": "call", "address": "127.0.0.1", "port": 0},
        {"do": "listen", "seconds": 1e9},
        {"do": "listen", "token": None},
    ],
    ids=str,
)
def test_a_host_does_not_do_all_that_it_is_told(command):
    here, there = socket.socketpair()
    with here, there, pytest.raises(ConnectionError):
        preflight._do(Line(here), "127.0.0.1", {"token": "0" * 32, "seconds": 0.1, **command}, False)
