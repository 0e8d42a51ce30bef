"""Budgets in counts: Python calls and calls into C per WebSocket message and per request.

Counts do not depend on how busy the machine is. They are taken over engine and proxy together, with the edge's bytes
handed to the engine and an origin transport in memory, so that only this project's own code is counted. A budget is
the count of the day it was written plus a little; who makes it smaller lowers the budget with it.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from types import FrameType
from typing import Any
from uuid import UUID

import hpack
import pytest

from connector.app.meters import Meters
from connector.protocol.h2_connection import H2Connection
from connector.proxy.dispatch import Dispatcher
from connector.proxy.ingress import parse_remote_config
from connector.proxy.origin_open import OriginOpener
from connector.proxy.origins import OriginConnection, OriginPool
from connector.wire.h2_frames import DATA, HEADERS, PREFACE, encode_frame, encode_settings
from tests.support.aio import run

UNITS = 200
BLOCK = [
    (b":method", b"GET"),
    (b":scheme", b"https"),
    (b":authority", b"app.example.com"),
    (b":path", b"/"),
    (b"user-agent", b"Mozilla/5.0"),
    (b"accept", b"*/*"),
    (b"cf-connecting-ip", b"203.0.113.7"),
    (b"x-forwarded-for", b"203.0.113.7"),
    (b"x-forwarded-proto", b"https"),
]
UPGRADE = [
    (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="),
    (b"cf-cloudflared-proxy-connection-upgrade", b"websocket"),
]
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 13\r\n\r\nhello, world\n"


class OriginTransport(asyncio.Transport):
    """An origin connection without a socket: keeps what was written last."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol: Any = None
        self.written = b""
        self.writes = 0
        self.closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written = bytes(data)
        self.writes += 1

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol  # type: ignore[no-any-return]

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closing

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def abort(self) -> None:
        self.close()

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)


class Calls:
    """Counts Python calls and calls into C while it is entered."""

    def __init__(self) -> None:
        self.python = 0
        self.c = 0

    def __enter__(self) -> Calls:
        gc.disable()  # a collection calls what others hung on it: Hypothesis has such a callback, once it was loaded
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        gc.enable()
        self.c -= 1  # the call of `setprofile` itself
        self.python -= 1  # and this method

    def _count(self, frame: FrameType, event: str, arg: object) -> None:
        if event == "call":
            self.python += 1
        elif event == "c_call":
            self.c += 1


class Link:
    """The engine with a dispatcher behind it; the test is the edge and the origin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, metered: bool = False) -> None:
        self.origins: list[OriginTransport] = []

        async def connect(_: object, pool: OriginPool, user: Any, key: str) -> None:
            transport = OriginTransport()
            transport.protocol = OriginConnection(pool, key, user)
            self.origins.append(transport)
            transport.protocol.connection_made(transport)

        monkeypatch.setattr(OriginOpener, "connect", connect)
        self.dispatcher = Dispatcher(
            ingress=parse_remote_config(1, {"ingress": [{"service": "http://127.0.0.1:8"}]}),
            connector_id=UUID("11111111-2222-4333-8444-555555555555"),
            loop=asyncio.get_running_loop(),
            on_event=None,
        )
        if metered:
            self.dispatcher.watch = Meters(lambda: self.dispatcher.ingress.rules)
        self.encoder = hpack.Encoder()
        self.engine = H2Connection(self.dispatcher.accept, wake=lambda: None)
        self.engine.start(0.0)
        self.receive(PREFACE + encode_settings([(4, 1 << 20)]))
        self.stream_id = -1

    def receive(self, data: bytes) -> None:
        self.engine.receive_data(data, 0.0)

    def head(self, *extra: tuple[bytes, bytes], end: bool) -> bytes:
        self.stream_id += 2
        block = self.encoder.encode([*BLOCK, *extra]) + b"\0\x06cf-ray\x14%020d" % self.stream_id
        return encode_frame(HEADERS, 4 | end, self.stream_id, block)

    def sent(self) -> bytes:
        return bytes(self.engine.data_to_send())

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def close(self) -> None:
        self.engine.connection_lost(None)
        await self.dispatcher.close()
        await self.settle()


def messages(monkeypatch: pytest.MonkeyPatch, flight: int, *, metered: bool = False) -> Calls:
    """Count for UNITS messages there and back, `flight` of them per read."""
    counted = Calls()

    async def main() -> None:
        link = Link(monkeypatch, metered=metered)
        link.receive(link.head(*UPGRADE, end=False))
        await link.settle()
        [origin] = link.origins
        origin.protocol.data_received(SWITCH)
        assert b"101 " not in link.sent()
        payload = bytes(range(128))
        frames = encode_frame(DATA, 0, link.stream_id, payload) * flight
        receive, back, take = link.engine.receive_data, origin.protocol.data_received, link.engine.data_to_send
        begin, end = link.dispatcher.writes.begin, link.dispatcher.writes.end
        before = origin.writes
        with counted:
            for _ in range(UNITS // flight):
                begin()
                receive(frames, 0.0)
                end()
                back(payload)
                take()
        assert origin.written == payload * flight
        assert origin.writes - before == UNITS // flight, "what one read brings for an origin must be one write"
        assert len(link.origins) == 1
        await link.close()

    run(main())
    return counted


def requests(monkeypatch: pytest.MonkeyPatch, *, metered: bool = False) -> Calls:
    """Count for UNITS requests one after the other on a kept connection."""
    counted = Calls()

    async def main() -> None:
        link = Link(monkeypatch, metered=metered)
        for _ in range(3):  # dials, and fills the caches
            link.receive(link.head(end=True))
            await link.settle()
            link.origins[0].protocol.data_received(ANSWER)
            assert link.sent()
        heads = [link.head(end=True) for _ in range(UNITS)]
        origin = link.origins[0]
        receive, back, take = link.engine.receive_data, origin.protocol.data_received, link.engine.data_to_send
        with counted:
            for head in heads:
                receive(head, 0.0)
                back(ANSWER)
                sent = take()
        assert b"hello, world" in bytes(sent)
        assert len(link.origins) == 1, "the origin connection was not reused"
        await link.close()

    run(main())
    return counted


def check(counted: Calls, python: float, c: float) -> None:
    found = (counted.python / UNITS, counted.c / UNITS)
    print(f"per unit: {found[0]:.2f} Python calls, {found[1]:.2f} C calls")
    assert found[0] <= python, f"{found[0]:.2f} Python calls per unit; the budget is {python}"
    assert found[1] <= c, f"{found[1]:.2f} C calls per unit; the budget is {c}"


def test_calls_per_websocket_message(monkeypatch: pytest.MonkeyPatch) -> None:
    check(messages(monkeypatch, 1), python=15.5, c=10.5)


def test_calls_per_websocket_message_sixteen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check(messages(monkeypatch, 16), python=4.0, c=4.7)


def test_calls_per_request(monkeypatch: pytest.MonkeyPatch) -> None:
    # Before 3.12 a comprehension is a call of its own.
    check(requests(monkeypatch), python=86.5 if sys.version_info >= (3, 12) else 89.5, c=118)


def test_meters_cost_a_message_nothing_and_a_request_two_calls_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, metered = messages(monkeypatch, 16), messages(monkeypatch, 16, metered=True)
    assert (metered.python, metered.c) == (plain.python, plain.c)
    plain, metered = requests(monkeypatch), requests(monkeypatch, metered=True)
    # started, finished, traffic, twice the rule's meter, one observation
    assert metered.python - plain.python <= (6 if sys.version_info >= (3, 12) else 7) * UNITS  # comprehensions
    assert metered.c - plain.c <= 8 * UNITS
