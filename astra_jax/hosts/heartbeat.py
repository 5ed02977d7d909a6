"""Knowing which hosts are alive: one TCP connection from every host to host 0, beside what JAX does.

JAX raises in some of its processes when a host is gone, in others not, and none of it says which host; where a link is
cut nothing happens at all. Here a killed process shows at once, because its connection ends, and a cut link after
`patience` seconds without a sign of life. Every host that is left then ends with one line that names host and cause, or
those that are left begin anew without it, as host 0 says.
"""

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from astra_jax.hosts.connection import BEAT_SECONDS, GONE, MOST_BYTES, Line
from astra_jax.hosts.options import Policy
from astra_jax.terminal import one_line

GRACE_SECONDS = 0.5  # for news of other hosts that went at the same time
MOST_TOLD = 1 << 20  # bytes that another host sends at once


def die(message: str) -> NoReturn:
    """Ends this process at once with one line and exit code 2. By itself JAX would wait for hosts that are gone."""
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what other threads, also XLA's, say from now on is no last line
    os.write(stderr, f"astra: error: {one_line(message)}\n".encode())
    os._exit(2)


class Lifeline:
    """This host's connections, and the threads that watch them.

    Args:
      lines: the connections: on host 0 one to each other host, elsewhere one to host 0.
      host: which one this is.
      patience: seconds without a sign of life after which a host counts as gone.
      policy: on host 0, what happens when another host is gone: all end ("fail"), host 0 begins anew alone ("single"),
        or all that are left do together ("shrink").
      end: what to do with the line that says which host is gone and why, where this host ends.
      again: what to do where this host begins anew: it is given the line, how many hosts there are now, and which of
        them this one is.
    """

    def __init__(
        self,
        lines: Mapping[int, Line],
        host: int,
        patience: float,
        policy: Policy = "fail",
        end: Callable[[str], Any] = die,
        again: Callable[[str, int, int], Any] = lambda message, hosts, host: die(message),
    ):
        self.host, self.patience, self.policy, self.end, self.again = host, patience, policy, end, again
        self._lines, self._gone, self._needed = lines, dict[int, str](), True
        self._told = {other: queue.SimpleQueue[bytes]() for other in lines}  # what they told, and nobody heard yet
        self._read: dict[int, list[str]] = {number: [] for number in (0, *lines)}  # what hosts said that they read
        self._over, self._lock = threading.Event(), threading.Lock()
        self._done = {other: threading.Event() for other in lines}
        for other, line in lines.items():
            line.limit_silence(0.0)  # from here on, signs of life do
            threading.Thread(target=self._watch, args=(other,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def gather(self, value: Any, seconds: float | None = None) -> list[Any] | None:
        """Brings what every host gives here, which JSON can say, to host 0.

        Args:
          seconds: how long a host may take; None where it may take as long as it lives.

        Returns:
          On host 0, all of it, by the hosts' numbers; None on the others, which do not wait.

        Raises:
          TimeoutError: a host took longer.
        """
        if self.host:
            self._send(json.dumps(value).encode(), told=True)
            return None
        return [value, *(self._heard(other, seconds) for other in sorted(self._lines))]

    def spread(self, value: Any, seconds: float | None = None) -> Any:
        """What host 0 gives here, which JSON can say, on all hosts. For `seconds` and errors see `gather`."""
        if self.host:
            return self._heard(0, seconds)
        self._send(json.dumps(value).encode(), told=True)
        return value

    def _heard(self, other: int, seconds: float | None) -> Any:
        try:
            return json.loads(self._told[other].get(timeout=seconds))
        except queue.Empty:
            raise TimeoutError(f"host {other} said nothing for {seconds} s") from None
        except (ValueError, RecursionError):
            return None

    def _send(self, body: bytes, **message: Any) -> None:
        """Sends bytes to all hosts that this one has a connection to."""
        for line in self._lines.values():
            try:
                line.send(self.patience, body, **message)
            except OSError:  # it has a part of it, and what follows would not be understood: it is gone, which shows
                line.close()

    def say_read(self, what: str) -> None:
        """Says what this host read, in words that are others where it is something else. All have to read the same, one
        thing after the other, or all end with one line, wherever they are: nobody waits here."""
        if self.host == 0:
            self._compare(0, what)
            return
        with contextlib.suppress(OSError):  # host 0 is gone, which shows elsewhere
            self._lines[0].send(self.patience, read=what)

    def _compare(self, host: int, what: str) -> None:
        with self._lock:
            place = len(self._read[host])
            self._read[host].append(what)
            there = {number: said[place] for number, said in self._read.items() if len(said) > place}
        for other, said in there.items():
            if 0 in there and said != there[0]:
                why = f"host 0 has read {there[0]}, and host {other} {said}: give the same on every host"
                self._fail(why, a_fault=False)

    def need(self, needed: bool) -> None:
        """On host 0: whether the others are needed. While they are not, one that is gone does no harm; it does
        afterwards. The others need host 0 always."""
        if self.host:
            return
        with self._lock:
            self._needed, gone = needed, list(self._gone.values())
        if needed and gone:
            self._fail(gone[0], a_fault=True)

    def abandon(self, message: str, a_fault: bool) -> None:
        """Tells the other hosts that this one ends with an error; `a_fault` is one that they can do without it."""
        self._over.set()
        self._tell(failed=message, fault=a_fault)

    def close(self, shutdown: Callable[[], Any]) -> None:
        """Ends the watch when all hosts are done. Host 0, without which the others cannot end in order, ends last.

        Args:
          shutdown: ends what else holds the hosts together.
        """
        if self.host:
            shutdown()
            self._tell(done=True)
        for done in self._done.values():
            done.wait()  # where this host fails, it ends here
        if self.host == 0:
            shutdown()
            self._tell(done=True)
        self._over.set()

    def _tell(self, **message: Any) -> None:
        """Says something to all other hosts that are left, and waits for none: a cut link takes nothing."""
        for other in self._left():
            with contextlib.suppress(OSError):
                self._lines[other].send(0.0, **message)

    def _left(self) -> list[int]:
        return [other for other in sorted(self._lines) if other not in self._gone]

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            for line in self._lines.values():
                line.beat()

    def _watch(self, other: int) -> None:
        while not self._over.is_set():
            message = self._next(other)
            if "read" in message:
                self._compare(other, str(message["read"])[:200])
            elif "told" in message:
                self._told[other].put(message.get("body", b""))
            elif self._ends(other, message):
                return

    def _next(self, other: int) -> dict[str, Any]:
        """The next message of a host; `lost` where it is gone, or `gone` where it ended all by an error of its own."""
        try:
            message = self._lines[other].receive(self.patience, MOST_BYTES if self.host else MOST_TOLD)
        except TimeoutError:
            return {"lost": f"host {other} has given no sign of life for {self.patience:.3g} s: is its link cut?"}
        except OSError:
            return {"lost": f"host {other} {GONE}"}
        if "failed" in message:
            why = f"host {other} ended with an error: {str(message['failed'])[:1000]}"
            return {"lost" if message.get("fault") else "gone": why}
        return message

    def _ends(self, other: int, message: dict[str, Any]) -> bool:
        """Whether nothing more is to be heard of a host after this message, on which it acts."""
        if "done" in message:  # that its connection ends now is as it should be
            self._done[other].set()
        elif "again" in message:
            self._over.set()
            self.again(str(message.get("why")), int(message["again"]), int(message["host"]))
        elif "gone" in message:
            self._fail(str(message["gone"]), a_fault=False)
        elif "lost" in message:
            self._lose(other, message["lost"])
        else:
            return False
        return True

    def _lose(self, other: int, message: str) -> None:
        with self._lock:
            first, needed = not self._gone, self._needed
            self._gone[other] = message
        if needed and first:
            self._fail(message, a_fault=True)
        self._done[other].set()  # only now: whoever waits in `close` would take it for an end in order

    def _fail(self, message: str, a_fault: bool) -> None:
        """Ends all hosts, or begins anew with those that are left."""
        if self._over.is_set():
            return
        if self.host or self.policy == "fail" or not a_fault:
            self._over.set()
            self._tell(gone=message)
            self.end(message)
        elif self.policy == "single":
            self._over.set()
            self._tell(gone=f"{message}; host 0 goes on alone")
            self.again(message, 1, 0)
        else:
            time.sleep(GRACE_SECONDS)
            self._over.set()
            left = self._left()
            for number, other in enumerate(left, 1):
                with contextlib.suppress(OSError):
                    self._lines[other].send(0.0, again=1 + len(left), host=number, why=message)
            self.again(message, 1 + len(left), 0)
