"""Several hosts as threads of one process, each with a program and a device of its own, and what is between them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from astra_jax.mesh.sharding import DATA, SEQ
from astra_jax.strategies.coded import OnHosts


class Air:
    """What all hosts' packets go through; `lost` says of (channel, sender, receiver, packet) whether it is."""

    def __init__(self, N, lost=lambda *packet: False):
        self.N, self.lost, self.sent, self.heard = N, lost, [], threading.Condition()
        self.there = {}

    def links(self):
        return [InMemory(self, n) for n in range(self.N)]


class InMemory:
    """The link of one host."""

    def __init__(self, air, index):
        self.air, self.index, self.passes = air, index, 0

    def post(self, channel, packets, receivers, least):
        with self.air.heard:
            for receiver in receivers:
                key = (self.passes, channel, self.index, receiver)
                self.air.there[key] = {
                    p: bytes(row)
                    for p, row in enumerate(packets)
                    if not self.air.lost(channel, self.index, receiver, p)
                }
                self.air.sent.append((channel, self.index, receiver, packets.size))
            self.air.heard.notify_all()

    def wait(self, channel, packets, senders):
        keys = [(self.passes, channel, sender, self.index) for sender in senders]
        with self.air.heard:
            assert self.air.heard.wait_for(lambda: all(key in self.air.there for key in keys), 60), (keys, channel)
            return [self.air.there.pop(key) for key in keys]


def here(n):
    """A mesh of one device, the n-th."""
    return Mesh(np.reshape(jax.devices()[n], (1, 1)), (DATA, SEQ), axis_types=(AxisType.Auto,) * 2)


def on_hosts(N, of_host, lost=lambda *packet: False, speeds=None):
    """What `of_host(mesh, make)` gives on each of N hosts at once, and what was sent."""
    air = Air(N, lost)
    makes = [OnHosts(link, N, n, speeds) for n, link in enumerate(air.links())]
    with ThreadPoolExecutor(N) as pool:
        found = [pool.submit(of_host, here(n), make) for n, make in enumerate(makes)]
        return [one.result(120) for one in found], air.sent
