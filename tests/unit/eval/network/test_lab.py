"""The lab's arithmetic and refusals, which need no root."""

import os
import shutil
import sys

import pytest

from astra_jax.errors import AstraError
from eval.network.lab import Cgroups, Lab, cores_of, parse_packet_loss, token_bucket


def test_a_bucket_is_two_frames_or_a_millisecond():
    assert token_bucket(10e6) == ["rate", "10000000bit", "burst", "3028b", "limit", "125000b"]
    assert token_bucket(500e6) == ["rate", "500000000bit", "burst", "75000b", "limit", "6250000b"]
    assert token_bucket(1e5)[-1] == "65536b"


@pytest.mark.parametrize(
    "hosts, cpu, found",
    [
        (4, 0.4, [3, 5, 3, 5]),
        (8, 0.2, [3, 5] * 4),
        (2, 1.0, [3, 5]),
        (1, 0.7, [3]),
        (3, 0.6, None),  # two of them would need 1.2 of a core
        (1, 1.5, None),
        (2, None, None),
    ],
)
def test_a_share_of_a_core_is_of_one_core(hosts, cpu, found):
    assert cores_of(hosts, cpu, [3, 5]) == found


@pytest.mark.parametrize("text, loss", [("5%", 0.05), ("0%", 0.0), ("0.1 %", 0.001)])
def test_packet_loss_is_a_percentage(text, loss):
    assert parse_packet_loss(text) == pytest.approx(loss)


@pytest.mark.parametrize("text", ["0.05", "5", "-1%", "%", "5 %%", "101%"])
def test_packet_loss_that_is_no_percentage_is_refused(text):
    with pytest.raises(AstraError, match="write a percentage, such as 5%"):
        parse_packet_loss(text)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(hosts=0), "cannot have 0 hosts: choose 1 to 100"),
        (dict(hosts=101), "cannot have 101 hosts"),
        (dict(rate=0.0), "0 bits per second cannot be made: choose 1kbit to 10gbit"),
        (dict(rate=float("nan")), "nan bits per second"),
        (dict(rate=[10e6, 0.0]), "0 bits per second"),
        (dict(rate=[10e6] * 3), "3 rates were given for 2 hosts: give one for all"),
        (dict(cpu=0.1), "a share of 0.1 of a core is too little: Linux gives 0.2 or more"),
        (dict(cpu=float("nan")), "a share of nan"),
        (dict(packet_loss=1.0), "a loss of 100% of the packets leaves no link: choose 0% to less than 100%"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(AstraError, match=message):
        Lab(**{"hosts": 2, "rate": 10e6, **values})


def enter():
    with Lab(2, 10e6):
        pass


def test_only_root_and_only_linux(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(AstraError, match="only root may make the lab's network: run it with sudo"):
        enter()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(AstraError, match="this is darwin: run it on Linux"):
        enter()


def test_missing_tools_are_named_with_their_packages(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool in ("tc", "ip", "nft") else tool)
    with pytest.raises(AstraError, match="the lab needs ip, tc, nft: apt-get install iproute2 nftables$"):
        enter()


def test_either_version_of_cgroups_is_found(tmp_path):
    v1, v2, mounts = tmp_path / "cpu,cpuacct", tmp_path / "unified", tmp_path / "mounts"
    v1.mkdir()
    v2.mkdir()
    one, two = f"cgroup {v1} cgroup rw,relatime,cpu,cpuacct 0 0\n", f"cgroup2 {v2} cgroup2 rw,nosuid 0 0\n"
    mounts.write_text("proc /proc proc rw 0 0\ncgroup /x cgroup rw,cpuset 0 0\n" + one)
    assert Cgroups.find(mounts) == Cgroups(v1, False)
    (v2 / "cgroup.controllers").write_text("hugetlb\n")
    mounts.write_text(two)
    assert Cgroups.find(mounts) is None
    mounts.write_text(two + one)
    assert Cgroups.find(mounts) == Cgroups(v1, False), "the controller is in one of them alone"
    (v2 / "cgroup.controllers").write_text("cpuset cpu io\n")
    mounts.write_text(two)
    assert Cgroups.find(mounts) == Cgroups(v2, True)


def test_a_share_of_the_cpu_is_a_quota_of_5_ms(tmp_path):
    for unified in (True, False):
        (tmp_path / f"{unified}").mkdir()
    assert str(tmp_path / "True/astralab/host1/cgroup.procs") in Cgroups(tmp_path / "True", True).add(1, 0.4)
    assert (tmp_path / "True/astralab/host1/cpu.max").read_text() == "2000 5000"
    for parent in ("True", "True/astralab"):
        assert (tmp_path / parent / "cgroup.subtree_control").read_text() == "+cpu"
    Cgroups(tmp_path / "False", False).add(1, 0.4)
    group = tmp_path / "False/astralab/host1"
    assert [(group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")] == ["2000", "5000"]
    Cgroups(tmp_path / "True", True).set(1, 0.1)
    assert (tmp_path / "True/astralab/host1/cpu.max").read_text() == "1000 10000", "the kernel counts no shorter times"
