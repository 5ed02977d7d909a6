"""Packets between hosts by UDP: sealed, in no order, some lost. What is missing is asked for again, by its number.

Every packet is sealed with ChaCha20-Poly1305 under a key for one sender and one receiver, its counter is the nonce, and
a window of counters keeps a packet from being taken twice. What does not open is dropped and counted; it has no effect.

A receiver sees in the counters what is missing: from each sender they come in order, but for what networks reorder. It
asks for that, and is sent it anew, under a new counter. So a slow link is never asked twice for what still waits before
it, and only the last packets of a burst, behind which nothing comes, need a sign of life that says how many there were.

All of it is plain Python and NumPy, in two threads of its own, as it is called from within programs that run.
"""

import contextlib
import dataclasses
import errno
import math
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from astra_jax.hosts.counters import Usual
from astra_jax.hosts.remote import OF_CONTROL, OF_DATA, Peer, Remote
from astra_jax.hosts.room import Room, in_time
from astra_jax.hosts.sockets import listening

Late = Literal["wait", "predict"]  # what becomes of codes that are late: they are waited for, or done without

_OUTER = struct.Struct("<BHQ")  # class, sender, counter: in clear, and sealed with the rest
_NONCE = struct.Struct("<BxxxQ")
_DATA = struct.Struct("<BIiHHQ")  # kind, pass, channel, packet, packets in all, counter that it had before (+ 1)
_PING = struct.Struct("<BQQ")  # kind, time, packets sent so far
_PONG = struct.Struct("<BQ")
_LIST = struct.Struct("<BH")
_LATE = struct.Struct("<BHHH")  # kind, packets of a block that were in time, that were sent, and that there are
DATA, PING, PONG, ASK, VOID, LATE = range(6)
TRAIN = -(1 << 30)  # the channel of packets that measure a link
TOLD = -(1 << 31)  # the channel of messages to one host, which have numbers in the place of passes

KEPT = 8192  # packets to each host that can be sent again
MOST_BYTES = 1 << 28  # that wait to be read
MOST_TOLD = 1 << 22  # bytes of a message: less than is kept to be sent again
TOLD_BYTES = 1200  # of it in a packet
BUFFER = 1 << 14  # bytes that wait in the system to be sent: what is behind them can be overtaken
PROBE_SECONDS = 0.008  # after the last of a burst
BEAT_SECONDS = 0.25


@dataclasses.dataclass
class Tally:
    """What happened in a pass.

    Attributes:
      sent, received: bytes on the wire, headers of UDP and IP not counted.
      again: packets that were sent anew.
      missing: packets that this host went on without.
      left_out: packets that were not sent to it, as they would have been late.
      waited: seconds that programs waited for others.
      dropped: packets that came and did not open, or came twice.
      gone: numbers of hosts that were gone.
    """

    sent: int = 0
    received: int = 0
    again: int = 0
    missing: int = 0
    left_out: int = 0
    waited: float = 0.0
    dropped: int = 0
    gone: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class _Burst:
    """What came of one host in a block: packets by their numbers, of how many; how many of them were not sent again,
    and when the first and the last of these came."""

    count: int
    first: float
    last: float
    fresh: int = 0
    packets: dict[int, bytes] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(map(len, self.packets.values()))


class Datagrams:
    """This host's socket, and the link of its programs to those of other hosts (`astra_jax.strategies.datagrams.Link`).

    Args:
      address, port: where to listen; port 0 for any.
      late: what becomes of codes that are late.

    Attributes:
      port: the one that is listened at.
      adapts: whether fewer groups of codes are sent where more would be late (`astra_jax.hosts.room`).
      told: is called with what another host tells this one, in the thread that receives.
      dropped: packets that did not open, in all: forged, cut, sent twice, or of nobody who is known.

    Raises:
      AstraError: the port is in use, or the address is not this host's.
    """

    def __init__(self, address: str, port: int = 0, late: Late = "wait"):
        self._socket = listening(socket.SOCK_DGRAM, address, port)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self.port: int = self._socket.getsockname()[1]
        self.late, self.dropped, self.tally, self.adapts = late, 0, Tally(), False
        self.rehearsing = False
        self.told: Callable[[int, bytes], Any] = lambda number, message: None
        self._me, self._key = 0, b""
        self._peers: dict[int, Remote] = {}
        self._rooms = defaultdict[int, Room](Room)  # on the way to each of them
        self._order: list[int] = []
        self._pass, self._worked_from = 0, 0.0
        self._inbox: dict[tuple[int, int, int], _Burst] = {}  # of (pass, channel, host)
        self._over = set[tuple[int, int, int]]()
        self._skipped = set[tuple[int, int]]()
        self._usual = Usual()
        self._held = 0
        self._news = threading.Condition()
        self._urgent, self._queue = deque[tuple[Remote, int, bytes]](), deque[tuple[Remote, int, bytes]]()
        self._to_send = threading.Condition()
        self._closed = False
        for work in (self._receive, self._send):
            threading.Thread(target=work, daemon=True, name=f"datagrams {work.__name__}").start()

    def close(self) -> None:
        """Ends both threads."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with self._to_send:
            self._to_send.notify_all()

    # Who is there

    def enter(self, me: int, key: bytes) -> None:
        """This host's number, and the key that all hosts have of this run. Nothing is left of an earlier one."""
        with self._news, self._to_send:
            self._me, self._key, self._pass, self._held = me, key, 0, 0
            for left in (self._peers, self._rooms, self._inbox, self._over, self._skipped, self._urgent, self._queue):
                left.clear()

    def meet(self, where: Mapping[int, Peer]) -> None:
        """Who else is there, by their numbers; a number is never another host's."""
        with self._news:
            for number in [number for number in self._peers if number not in where]:
                del self._peers[number]
            for number, peer in where.items():
                if number != self._me and number not in self._peers:
                    self._peers[number] = Remote(number, self._me, self._key, peer)
        self._wake()

    def gone(self, number: int) -> None:
        """Nobody waits for this host any more."""
        with self._news:
            if number in self._peers:
                self._peers[number].said_gone = True
            self._news.notify_all()

    def skip(self, number: int, hosts: Sequence[int]) -> None:
        """Nobody waits for these hosts in a pass, which may be still to come here."""
        with self._news:
            self._skipped.update((number, host) for host in hosts)
            self._news.notify_all()

    def lost(self) -> set[int]:
        """Whom nothing is heard of any more."""
        now = time.monotonic()
        with self._news:
            return {number for number, peer in self._peers.items() if peer.gone(now)}

    def silent(self, numbers: Sequence[int], seconds: float) -> list[int]:
        """Who of these hosts was not heard within so many seconds from now on."""
        begun = time.monotonic()
        with self._news:
            self._news.wait_for(lambda: not self._unheard(numbers, begun), seconds)
            return self._unheard(numbers, begun)

    def _unheard(self, numbers: Sequence[int], since: float) -> list[int]:
        return [n for n in numbers if n in self._peers and self._peers[n].heard_at < since]

    def round_trip(self, number: int, seconds: float) -> float | None:
        """Seconds to a host and back, as measured lately; None where nothing comes back within so many seconds."""
        with self._news:
            self._news.wait_for(
                lambda: number not in self._peers or self._peers[number].round_trip is not None, seconds
            )
            return self._peers[number].round_trip if number in self._peers else None

    def tell(self, number: int, message: bytes) -> None:
        """Tells a host something of at most `MOST_TOLD` bytes. It comes, and in order, unless the host is gone."""
        if (peer := self._peers.get(number)) is None:
            return
        parts = [message[at : at + TOLD_BYTES] for at in range(0, len(message), TOLD_BYTES)]
        with self._to_send:
            for n, part in enumerate(parts):
                head = _DATA.pack(DATA, peer.telling, TOLD, n, len(parts), 0)
                self._queue.append((peer, OF_DATA, head + part))
            peer.telling += 1
            self._to_send.notify()

    def _hear(self, peer: Remote, number: int, part: int, count: int, content: bytes) -> None:
        if number < peer.hearing:
            return
        peer.told.setdefault(number, {})[part] = content
        peer.lengths[number] = count
        while (parts := peer.told.get(peer.hearing)) and len(parts) == peer.lengths[peer.hearing]:
            del peer.told[peer.hearing], peer.lengths[peer.hearing]
            peer.hearing += 1
            self.told(peer.number, b"".join(parts[n] for n in range(len(parts))))

    # A pass

    def begin(self, number: int, order: Sequence[int], rehearsing: bool = False) -> None:
        """A pass begins.

        Args:
          number: higher than that of all before it.
          order: which host has each shard.
          rehearsing: nothing is sent or waited for: programs are compiled, and say nothing of use.
        """
        with self._news:
            self._order, self.rehearsing, self.tally = list(order), rehearsing, Tally()
            self._worked_from = time.monotonic()
            if not rehearsing:
                self._pass = number
                for key in [key for key in self._inbox if key[0] < number]:
                    self._held -= self._inbox.pop(key).size
                self._over.clear()
                self._skipped = {one for one in self._skipped if one[0] >= number}

    def post(self, channel: int, packets: np.ndarray, receivers: Sequence[int], least: int) -> None:
        """See `Link.post`."""
        if self.rehearsing:
            return
        contents = [bytes(row) for row in packets]
        with self._to_send:
            to = [peer for shard in receivers if (peer := self._peers.get(self._order[shard]))]
            counts = [self._count(peer, least, len(contents)) for peer in to]
            for n, content in enumerate(contents):
                for peer, count in zip(to, counts, strict=True):
                    if n < count:
                        head = _DATA.pack(DATA, self._pass, channel, n, count, 0)
                        self._queue.append((peer, OF_DATA, head + content))
            self._to_send.notify()

    def _count(self, peer: Remote, least: int, count: int) -> int:
        return self._rooms[peer.number].packets(least, count) if self.adapts and least < count else count

    def wait(self, channel: int, packets: Sequence[int], senders: Sequence[int]) -> list[dict[int, bytes]]:
        """See `Link.wait`."""
        if self.rehearsing:
            return [{} for _ in senders]
        hosts, begun = [self._order[shard] for shard in senders], time.monotonic()
        keys = [(self._pass, channel, host) for host in hosts]
        with self._news:
            while True:
                now = time.monotonic()
                due = [n for n, key in enumerate(keys) if self._due(key, packets[n])]
                waited_for = [n for n in due if not self._absent(hosts[n], now)]
                left = begun + self._patience(channel) - now
                if not waited_for or left <= 0:
                    break
                self._news.wait(min(left, 0.1))
            self.tally.gone |= {hosts[n] for n in due if self._absent(hosts[n], now)}
            if not due:
                self._usual.add(now - begun)
            nothing = [_Burst(all_of_it, 0.0, 0.0) for all_of_it in packets]
            found = [self._inbox.pop(key, none) for key, none in zip(keys, nothing, strict=True)]
            self._over.update(keys)
            for host, burst, all_of_it in zip(hosts, found, packets, strict=True):
                self._held -= burst.size
                self.tally.missing += min(burst.count, all_of_it) - len(burst.packets)
                self.tally.left_out += max(all_of_it - burst.count, 0)
                if self.adapts and channel >= 0:
                    self._complain(host, burst, all_of_it, begun)
            self._worked_from = time.monotonic()
            self.tally.waited += self._worked_from - begun
        return [burst.packets for burst in found]

    def train(self, count: int, sender: int, seconds: float) -> tuple[int, float]:
        """Of so many packets that a shard's host posts on channel `TRAIN` one after the other: how many came without
        being sent again, within so many seconds, and the seconds between the first and the last of these."""
        key = (self._pass, TRAIN, self._order[sender])
        with self._news:
            gone = lambda: self._absent(self._order[sender], time.monotonic())  # noqa: E731
            self._news.wait_for(lambda: gone() or not self._due(key, count), seconds)
            burst = self._inbox.pop(key, _Burst(count, 0.0, 0.0))
            self._held -= burst.size
            self._over.add(key)
        return burst.fresh, burst.last - burst.first

    def _due(self, key: tuple[int, int, int], all_of_it: int) -> bool:
        burst = self._inbox.get(key)
        return burst is None or len(burst.packets) < min(burst.count, all_of_it)

    def _complain(self, host: int, burst: _Burst, all_of_it: int, begun: float) -> None:
        """Tells the sender where there is no room for so many packets."""
        fit = in_time(len(burst.packets), burst.first, burst.last, begun, begun - self._worked_from)
        if fit is not None and (peer := self._peers.get(host)):
            self._say(peer, _LATE.pack(LATE, fit, len(burst.packets), all_of_it))

    def _absent(self, host: int, now: float) -> bool:
        return host not in self._peers or (self._pass, host) in self._skipped or self._peers[host].gone(now)

    def _patience(self, channel: int) -> float:
        """How long a block's codes are waited for, once all that is local is done; what is no code always comes."""
        if self.late == "wait" or channel < 0:
            return math.inf
        round_trip = max((peer.round_trip or 0.05 for peer in self._peers.values()), default=0.05)
        return 3 * round_trip + self._usual.most()

    # What comes

    def _receive(self) -> None:
        while not self._closed:
            try:
                packet, where = self._socket.recvfrom(1 << 16)
            except OSError as error:
                if self._closed or error.errno == errno.EBADF:
                    return
                continue  # somebody else's port is closed
            if where is None:  # closed
                return
            try:
                self._open(packet, where)
            except Exception:  # whatever comes, the next packet is read
                self.dropped += 1
                self.tally.dropped += 1

    def _open(self, packet: bytes, where: tuple[str, int]) -> None:
        kind, sender, counter = _OUTER.unpack_from(packet)
        with self._news:
            peer = self._peers[sender]
            counters = peer.heard[kind] if kind in (OF_DATA, OF_CONTROL) else None
            if counters is None or not counters.fresh(counter):
                raise ValueError("it came already")
            inner = peer.of.decrypt(_NONCE.pack(kind, counter), packet[_OUTER.size :], packet[: _OUTER.size])
            now = time.monotonic()
            counters.take(counter)
            peer.heard_at = now
            peer.where = Peer(*where[:2])  # it may have moved
            self.tally.received += len(packet)
            if kind == OF_DATA:
                self._data(peer, counter, inner, now)
            else:
                self._control(peer, inner, now)
            self._news.notify_all()

    def _data(self, peer: Remote, counter: int, inner: bytes, now: float) -> None:
        _, number, channel, packet, count, before = _DATA.unpack_from(inner)
        if noticed := peer.missing.pop(counter, None):  # it was only overtaken
            peer.reordered = min(max(peer.reordered, 1.25 * (now - noticed[0])), 0.5)
        peer.miss(counter, now)
        peer.top = max(peer.top, counter + 1)
        if before:
            peer.missing.pop(before - 1, None)
        content, key = inner[_DATA.size :], (number, channel, peer.number)
        if channel == TOLD:
            self._hear(peer, number, packet, count, content)
            return
        if number < self._pass or packet >= count or key in self._over:
            return
        burst = self._inbox.setdefault(key, _Burst(count, now, now))
        if self._held + len(content) <= MOST_BYTES and packet not in burst.packets:
            burst.packets[packet] = content
            if not before:  # what was lost on the way is not the sender's haste
                burst.last, burst.fresh = now, burst.fresh + 1
            self._held += len(content)

    def _control(self, peer: Remote, inner: bytes, now: float) -> None:
        kind = inner[0]
        if kind == PING:
            _, when, sent = _PING.unpack(inner)
            peer.miss(sent, now)
            self._say(peer, _PONG.pack(PONG, when))
        elif kind == PONG:
            seconds = (time.monotonic_ns() - _PONG.unpack(inner)[1]) / 1e9
            if seconds >= 0:
                before = peer.round_trip
                peer.round_trip = seconds if before is None else 0.8 * before + 0.2 * seconds
        elif kind == LATE:
            self._rooms[peer.number].late(*_LATE.unpack(inner)[1:])
        elif kind in (ASK, VOID):
            _, count = _LIST.unpack_from(inner)
            counters = struct.unpack_from(f"<{count}Q", inner, _LIST.size)
            if kind == VOID:
                for counter in counters:
                    peer.missing.pop(counter, None)
            else:
                self._again(peer, counters)

    def _again(self, peer: Remote, counters: Sequence[int]) -> None:
        """Sends anew what was lost; of what nobody waits for any more it says so."""
        void = []
        for counter in counters:
            content = peer.kept.pop(counter, None)  # who asks again gets what comes now, or asks for that
            fields = _DATA.unpack_from(content) if content else (0, 0, 0)
            if content is None or (fields[1] < self._pass and fields[2] != TOLD):
                void.append(counter)
                continue
            head = _DATA.pack(*_DATA.unpack_from(content)[:5], counter + 1)
            with self._to_send:
                self._queue.appendleft((peer, OF_DATA, head + content[_DATA.size :]))
            self.tally.again += 1
        if void:
            self._say(peer, _LIST.pack(VOID, len(void)) + struct.pack(f"<{len(void)}Q", *void))
        self._wake()

    # What goes

    def _say(self, peer: Remote, inner: bytes) -> None:
        with self._to_send:
            self._urgent.append((peer, OF_CONTROL, inner))
            self._to_send.notify()

    def _wake(self) -> None:
        with self._to_send:
            self._to_send.notify()

    def _send(self) -> None:
        due = 0.0
        while not self._closed:
            with self._to_send:
                if not self._urgent and not self._queue:
                    self._to_send.wait(max(due - time.monotonic(), 0.0))
                one = (self._urgent or self._queue).popleft() if self._urgent or self._queue else None
            if one:
                self._seal(*one)
            if (now := time.monotonic()) >= due:
                due = self._tick(now)

    def _seal(self, peer: Remote, kind: int, inner: bytes) -> None:
        counter = peer.sending[kind]
        peer.sending[kind] += 1
        if kind == OF_DATA:
            peer.kept[counter] = inner
            peer.kept.pop(counter - KEPT, None)
            peer.data_at = time.monotonic()
        outer = _OUTER.pack(kind, self._me, counter)
        packet = outer + peer.to.encrypt(_NONCE.pack(kind, counter), inner, outer)
        try:
            self._socket.sendto(packet, tuple(peer.where))
            self.tally.sent += len(packet)
        except OSError:
            pass  # as if it were lost

    def _tick(self, now: float) -> float:
        """Signs of life, and questions for what is missing; when the next ones are due."""
        busy = False
        with self._news:
            for peer in self._peers.values():
                if peer.said_gone:
                    continue
                if asked := peer.due(now):
                    self._say(peer, _LIST.pack(ASK, len(asked)) + struct.pack(f"<{len(asked)}Q", *asked))
                probe = peer.data_at > peer.ping_at and now - peer.data_at > PROBE_SECONDS
                if probe or now - peer.ping_at > BEAT_SECONDS:
                    peer.ping_at = now
                    self._say(peer, _PING.pack(PING, time.monotonic_ns(), peer.sending[OF_DATA]))
                busy |= bool(peer.missing) or peer.data_at > peer.ping_at
            self._news.notify_all()  # somebody may be gone
        return now + (0.004 if busy else 0.05)
