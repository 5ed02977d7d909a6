"""Several hosts: options and addresses. That they compute together is in tests/multihost."""

import os
import queue
import threading
import time

import pytest

from astra_jax.errors import AstraError
from astra_jax.hosts import runtime
from astra_jax.hosts.options import _CLUSTERS, Hosts, check, own_address, parse_address
from astra_jax.hosts.runtime import open_mesh
from tests.helpers.hosts import Fellows, each


def test_addresses():
    assert parse_address("10.0.0.1:7777", False) == ("10.0.0.1", 7777)
    assert parse_address(" localhost:80 ", False) == ("127.0.0.1", 80)
    assert parse_address("8.8.8.8:7777", True) == ("8.8.8.8", 7777)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10.0.0.1", "write the address of host 0 and a port, such as 10.0.0.1:7777"),
        ("10.0.0.1:0", "write the address"),
        ("10.0.0.1:70000", "write the address"),
        ("10.0.0.1:65535", "write the address"),
        ("[::]:7777", "write the address"),
        ("nowhere.invalid:7777", "the host 'nowhere.invalid' is not known here: give its IP address"),
        ("8.8.8.8:7777", "8.8.8.8 is a public address, and nothing that hosts send is protected"),
    ],
)
def test_addresses_that_do_not_do(text, message):
    with pytest.raises(AstraError) as error:
        parse_address(text, False)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_way_to_a_host_on_this_machine_is_the_loopback():
    assert own_address("127.0.0.1", 7777) == "127.0.0.1"


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (Hosts("10.0.0.1:1"), "--hosts and --host is missing"),
        (Hosts("10.0.0.1:1", 4), "--host is missing"),
        (Hosts(hosts=4, host=1), "--coordinator is missing"),
        (Hosts("10.0.0.1:1", 0, 0), "--hosts is 0; it must be at least 1"),
        (Hosts("10.0.0.1:1", 4, 4), "--host is 4; with --hosts 4 it is from 0 to 3"),
        (Hosts("10.0.0.1:1", 4, 3, start_seconds=0.0), "--start-seconds is 0; it must be above 0"),
        (Hosts("10.0.0.1:1", 4, 3, patience=1.0), "--patience is 1; it must be at least 2 seconds"),
    ],
)
def test_options_that_do_not_fit(hosts, message):
    with pytest.raises(AstraError, match=message):
        check(hosts)


def test_devices_are_shared_equally():
    with pytest.raises(AstraError, match="--devices 6 cannot be shared equally by 4 hosts: use a multiple of them"):
        open_mesh("6", Hosts("127.0.0.1:7777", 4, 0))


def test_one_host_needs_no_options(monkeypatch):
    for name in _CLUSTERS:
        monkeypatch.delenv(name, raising=False)
    assert runtime.join(Hosts()) == 0
    assert open_mesh(None, Hosts(), default="2").size == 2
    assert open_mesh("2x3", Hosts()).devices.shape == (2, 3)


# What hosts agree on


@pytest.fixture
def agree(monkeypatch, unchecked):
    """What `agreed` gives or raises on each of three hosts, which are threads that do these."""
    fellows, mine = Fellows(3), threading.local()
    monkeypatch.setattr(runtime, "TORN_SECONDS", 0.3)

    class Here:
        def __getattr__(self, name):
            return {"lifeline": fellows.lines[mine.host], "slow": 0.0}[name]

    monkeypatch.setattr(runtime, "_membership", Here())

    def run(*works, exchanges=False, rounds=1):
        def call(host, _):
            mine.host = host
            for _ in range(rounds):
                try:
                    found = runtime.agreed(works[host], exchanges, lambda result: [result])
                except Exception as error:
                    found = f"{type(error).__name__}: {error}"
            return found

        return each(fellows, call)

    return run


def fail(error):
    def work():
        raise error

    return work


def test_hosts_go_on_where_all_could(agree):
    found = agree(lambda: "a", lambda: "b", lambda: "c")
    assert found == {0: ("a", [["a"], ["b"], ["c"]]), 1: ("b", []), 2: ("c", [])}


def test_no_host_goes_on_where_one_could_not(agree):
    """Each says the same; and they are in step again afterwards."""
    for _ in range(2):
        found = agree(lambda: 1, fail(AstraError("b.png: not an image")), lambda: 1)
        assert set(found.values()) == {"AstraError: host 1: b.png: not an image"}
        found = agree(lambda: 1, lambda: 1, fail(MemoryError("too\nmuch")))
        assert set(found.values()) == {"AstraError: host 2: MemoryError: too much"}
        found = agree(fail(AstraError("on all")), fail(AstraError("on all")), fail(AstraError("on all")))
        assert set(found.values()) == {"AstraError: on all"}
        assert agree(lambda: "a", lambda: "b", lambda: "c")[1] == ("b", [])


def test_an_error_of_all_hosts_within_what_they_do_together_is_an_answer(agree):
    found = agree(*[fail(RuntimeError("RESOURCE_EXHAUSTED"))] * 3, exchanges=True)
    assert set(found.values()) == {"AstraError: RuntimeError: RESOURCE_EXHAUSTED"}


@pytest.mark.parametrize("alone", [0, 1])
def test_a_host_that_fails_alone_within_what_they_do_together_says_so(agree, alone):
    """The others hear nothing within a collective: they are told otherwise, and end or begin anew."""
    stuck = threading.Event()
    works = [lambda: stuck.wait(2)] * 3
    works[alone] = fail(RuntimeError("a bug"))
    found = agree(*works, exchanges=True)
    assert found[alone] == "Torn: RuntimeError: a bug"


def test_one_host_agrees_with_itself(monkeypatch):
    monkeypatch.setattr(runtime, "_membership", None)
    assert runtime.agreed(lambda: 2, True, lambda two: two + 1) == (2, [3])
    with pytest.raises(ZeroDivisionError):
        runtime.agreed(lambda: 1 / 0, False)


@pytest.mark.parametrize(
    ("given", "straight"),
    [({}, "10.0.0.1"), ({"no_proxy": "a,b"}, "a,b,10.0.0.1"), ({"no_proxy": "a", "no_grpc_proxy": "c"}, "c,10.0.0.1")],
    ids=str,
)
def test_jax_goes_past_proxies_to_host_0(monkeypatch, given, straight):
    """What else is to go straight stays so, and what is to go by a proxy, as downloads are."""
    by_proxy = {"http_proxy": "http://proxy:1", **given}
    monkeypatch.setattr(os, "environ", {**by_proxy, "GRPC_ADDRESS_HTTP_PROXY": "proxy:1"})
    runtime._past_proxies("10.0.0.1")
    assert os.environ == {**by_proxy, "no_grpc_proxy": straight}


def test_what_takes_too_long_ends_this_host(monkeypatch):
    said = queue.Queue()
    monkeypatch.setattr(runtime, "abandon", said.put)
    with runtime._within(0.01, "JAX did not connect"):
        assert said.get(timeout=10) == "JAX did not connect within 0.01 s: is a firewall between them?"
    with runtime._within(0.2, "never said"):
        pass
    time.sleep(0.4)
    assert said.empty()
