"""Several hosts as one mesh: options and addresses. That they compute together is in tests/multihost."""

import jax
import pytest

from astra_jax.errors import AstraError
from astra_jax.hosts.distributed import Hosts, agree, check, have_read, join, open_mesh, parse_address


def test_addresses():
    assert parse_address("10.0.0.1:7777") == ("10.0.0.1", 7777)
    assert parse_address(" localhost:80 ") == ("127.0.0.1", 80)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10.0.0.1", "write the address of host 0 and a port, such as 10.0.0.1:7777"),
        ("10.0.0.1:0", "write the address"),
        ("10.0.0.1:70000", "write the address"),
        ("[::]:7777", "write the address"),
        ("a..b:7777", "the host 'a..b' is not known here"),
        ("nowhere.invalid:7777", "the host 'nowhere.invalid' is not known here: give its IP address"),
        ("8.8.8.8:7777", "8.8.8.8 is a public address, and nothing that these hosts send is protected"),
    ],
)
def test_addresses_that_do_not_do(text, message):
    with pytest.raises(AstraError) as error:
        parse_address(text)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (Hosts("10.0.0.1:1"), "--hosts and --host is missing"),
        (Hosts("10.0.0.1:1", 4), "--host is missing"),
        (Hosts(hosts=4, host=1), "--coordinator is missing"),
        (Hosts("10.0.0.1:1", 0, 0), "--hosts is 0; it must be at least 1"),
        (Hosts("10.0.0.1:1", 4, 4), "--host is 4; with --hosts 4 it is from 0 to 3"),
        (Hosts("auto", 4), "--coordinator auto finds out --hosts and --host: leave them out"),
    ],
)
def test_options_that_do_not_fit(hosts, message):
    with pytest.raises(AstraError, match=message):
        check(hosts)


def test_devices_are_shared_equally():
    with pytest.raises(AstraError, match="--devices 6 cannot be shared equally by 4 hosts: use a multiple of them"):
        open_mesh("6", Hosts("127.0.0.1:7777", 4, 0))


def test_devices_that_only_a_cluster_knows_have_to_be_said():
    assert Hosts().devices(4) == 4 and Hosts("10.0.0.1:1", 3, 0).devices(4) == 3
    with pytest.raises(AstraError, match="--coordinator auto does not say how many devices there are: add --devices"):
        Hosts("auto").devices(4)


def test_where_nothing_started_the_hosts_jax_finds_none(monkeypatch):
    def initialize(**options):
        assert "coordinator_address" not in options
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(AstraError, match="should be defined.*: where nothing started the hosts, give the address"):
        join(Hosts("auto"))


def test_one_host_needs_no_options_and_agrees_with_itself():
    assert join(Hosts()) == 0
    assert open_mesh(None, Hosts(), default="2").size == 2
    assert open_mesh("2x3", Hosts()).devices.shape == (2, 3)
    agree(lambda: pytest.fail("nobody else is there to agree"))
    have_read("all data", ())
