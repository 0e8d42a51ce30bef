"""TCP streams: to a private network, and to a `tcp://` rule, where the edge speaks WebSocket and the origin does not.

Owns: the echo of both.
In: a link of either transport, the port of the echo. Out: figures of one round.
Never: looks at what comes back, but for its length.
"""

# ruff: noqa: D102  (callbacks of one interface each, described there)
from __future__ import annotations

from typing import Any

from benchmarks.fields import TCP_RULE, private_tcp
from benchmarks.link import LoadLink
from benchmarks.loads import Echo, EchoStream


class PrivateTcp(Echo):
    """Streams to a TCP port: bytes as they are."""

    def __init__(self, link: LoadLink, options: dict[str, Any]) -> None:
        super().__init__(link, options)
        self.fields = private_tcp(options["tcp"])


class TcpRule(Echo):
    """WebSockets to a rule: frames up are undone by the connector, bytes down are framed by it."""

    def __init__(self, link: LoadLink, options: dict[str, Any]) -> None:
        super().__init__(link, options)
        self.fields = TCP_RULE

    def begin(self, slot: int) -> None:
        FramedStream(self, self.options["flight"])


class FramedStream(EchoStream):
    """One WebSocket: what counts is the payload of its frames."""

    __slots__ = ("head", "left", "skip")

    def __init__(self, load: Echo, flight: int) -> None:
        self.head = b""
        self.left = 0  # of a frame's payload
        self.skip = False  # it is a control frame's
        super().__init__(load, flight)
        self.unchecked = False
        self.size = len(load.message) - (6 if len(load.message) < 132 else 8)  # comes back without the frame

    def on_data(self, data: bytes, start: int, stop: int) -> None:
        payload = 0
        while start < stop:
            if self.left:
                size = min(self.left, stop - start)
                self.left -= size
                start += size
                if not self.skip:
                    payload += size
                continue
            if self.head:
                data = self.head + data[start:stop]
                start, stop, self.head = 0, len(data), b""
            length = data[start + 1] & 0x7F if stop - start > 1 else 127
            head = 2 if length < 126 else 4 if length == 126 else 10
            if stop - start < head:
                self.head = data[start:stop]
                break
            if length > 125:
                length = int.from_bytes(data[start + 2 : start + head])
            self.skip = data[start] & 0x08 != 0
            self.left = length
            start += head
        if payload:
            super().on_data(data, 0, payload)
