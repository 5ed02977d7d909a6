"""How an answer is printed: tables, texts as they grow, times and bytes; and what of it goes into the JSON."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from astra_jax.report import Report, progress
from eval.service.messages import (
    HostTimes,
    Message,
    NoHostTimes,
    PassTime,
    Piece,
    Quantized,
    ShortText,
    Table,
    TextBegins,
    TextTime,
    Ways,
    Without,
)


class Screen:
    """Prints the messages of an answer as they come.

    Args:
      report: where they go.
      prompts: the texts that were given. One is printed as it grows, several at the end.
    """

    def __init__(self, report: Report, prompts: Sequence[str]):
        self._report, self._prompts = report, prompts
        self._counts, self._texts = Counter[int](), list[str]()
        self._bar = contextlib.ExitStack()
        self._advance: Callable[[], Any] = lambda: None
        self._printers: dict[type, Callable[[Any], None]] = {
            Quantized: self._quantized,
            ShortText: self._short_text,
            Table: self._table,
            PassTime: self._pass_time,
            TextBegins: self._text_begins,
            Piece: self._piece,
            TextTime: self._text_time,
            HostTimes: self._host_times,
            NoHostTimes: self._no_host_times,
            Without: self._without,
            Ways: self._ways,
        }

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    def print(self, message: Message) -> None:
        """Prints a message."""
        self._printers[type(message)](message)

    def _quantized(self, message: Quantized) -> None:
        self._report.say(
            f"the weights take {message.weight_bytes:,} bytes instead of {message.full_weight_bytes:,}",
            **dataclasses.asdict(message),
        )

    def _short_text(self, message: ShortText) -> None:
        self._report.say(
            f"a prompt of {message.tokens} token(s) uses {message.tokens} of the {message.devices} devices"
        )

    def _table(self, message: Table) -> None:
        self._report.table(message.name, f"{message.checkpoint} on {message.devices} device(s)", message.rows)

    def _pass_time(self, message: PassTime) -> None:
        compiled = f", {message.first_seconds:.1f} s with compilation" if message.first_seconds else ""
        self._report.say(
            f"{1e3 * message.seconds:.1f} ms for {message.inputs} input(s){compiled}; "
            f"each device sent {message.sent:,} bytes{' of codes' * message.codes} per input",
            seconds=message.seconds,
            first_seconds=message.first_seconds,
            **{"code_bytes_per_input" if message.codes else "bytes_per_input": message.sent},
        )

    def _text_begins(self, message: TextBegins) -> None:
        self._counts, self._texts = Counter(), [""] * len(self._prompts)
        if len(self._prompts) == 1:
            self._report.show(self._prompts[0])
        else:
            self._advance = self._bar.enter_context(progress("tokens", message.new_tokens))

    def _piece(self, message: Piece) -> None:
        steps = max(self._counts.values(), default=0)
        self._counts[message.row] += 1
        self._texts[message.row] += message.text
        if len(self._prompts) == 1:
            self._report.show(message.text)
        elif self._counts[message.row] > steps:
            self._advance()

    def _text_time(self, message: TextTime) -> None:
        self._bar.close()
        if len(self._prompts) == 1:
            self._report.show("\n")
        else:
            for prompt, text in zip(self._prompts, self._texts, strict=True):
                self._report.show(f"--- {prompt}{text}\n")
        with_compilation = f" ({message.compile_seconds:.1f} s with compilation)" if message.compile_seconds else ""
        self._report.say(
            f"first token after {1e3 * message.first_token_seconds:.1f} ms{with_compilation}, "
            f"then {message.tokens_per_second:.1f} tokens/s; "
            f"each device sent {message.sent:,} bytes of codes per prompt",
            texts=self._texts,
            prompt_tokens=message.prompt_tokens,
            new_tokens=[self._counts[row] for row in range(len(self._prompts))],
            first_token_seconds=message.first_token_seconds,
            compile_seconds=message.compile_seconds,
            tokens_per_second=message.tokens_per_second,
            code_bytes_per_prompt=message.sent,
        )
        if message.devices > 1:
            self._report.say(
                f"the cache keeps remote tokens as {message.cache_code_bytes:,} bytes of codes instead of "
                f"{message.cache_full_bytes:,} of keys and values",
                cache_code_bytes=message.cache_code_bytes,
                cache_full_bytes=message.cache_full_bytes,
            )

    def _host_times(self, message: HostTimes) -> None:
        self._report.table("hosts", "where the time went", message.rows)
        if message.single_ms is None or message.speed_up is None:
            return
        more = message.speed_up > 1
        advice = f"{message.speed_up:.2f} times as long" if more else "which is less: stay on one device"
        self._report.say(
            f"host 0 alone would take {message.single_ms:,.4g} ms (by its operations), {advice}",
            single_ms=message.single_ms,
            speed_up=message.speed_up,
        )

    def _no_host_times(self, message: NoHostTimes) -> None:
        self._report.say(f"where the time went is not known: {message.why}")

    def _without(self, message: Without) -> None:
        gone = f"; gone: {', '.join(message.hosts)}" if message.hosts else ""
        if message.packets or message.hosts:
            self._report.say(f"{message.packets:,} packets did not come to host 0, and were done without{gone}")
        if message.left_out:
            self._report.say(
                f"{message.left_out:,} packets were not sent to host 0, as they would have been late: fewer groups of "
                "some codes (astra worker --groups G sends so many to all)"
            )
        self._report.data["without"] = dataclasses.asdict(message)

    def _ways(self, message: Ways) -> None:
        self._report.table("ways", f"{message.hosts} hosts, and the links between them", message.rows)
        if message.rate is not None:
            trip = f"; longest round trip: {1e3 * message.round_trip:,.4g} ms" if message.round_trip else ""
            self._report.say(
                f"slowest link: {message.rate / 1e6:,.4g} Mbps{trip}",
                slowest_mbps=message.rate / 1e6,
                round_trip_ms=1e3 * (message.round_trip or 0.0),
            )
