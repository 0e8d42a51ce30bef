"""Budgets in counts over QUIC: Python calls and calls into C per WebSocket message and per request.

From the datagram in the socket to the origin's transport, and back to the socket: link, engine adapter, stream table
and proxy together. The QUIC library is real on both sides; a key that is given to both stands for the handshake.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from time import monotonic
from typing import Any
from uuid import UUID

import pytest

from connector.protocol.ports import Acceptor, Batch
from connector.proxy.dispatch import Dispatcher
from connector.proxy.ingress import parse_remote_config
from connector.proxy.origin_open import OriginOpener
from connector.proxy.origins import OriginConnection, OriginPool
from connector.transport.quic import QuicLink
from connector.transport.quic_engine import EngineSettings
from connector.wire.connect import encode_connect_request
from tests.benchmarks.test_counts import ANSWER, SWITCH, UNITS, Calls, OriginTransport, check
from tests.support.aio import run, until

qh3_core = pytest.importorskip("qh3._hazmat", reason="NO QH3: aioquic's own calls would be counted")

PREAMBLE = bytes.fromhex("0a36cd12a13e") + b"01"
METADATA = [
    (b"HttpMethod", b"GET"),
    (b"HttpHost", b"app.example.com"),
    (b"HttpHeader:User-Agent", b"Mozilla/5.0"),
    (b"HttpHeader:Accept", b"*/*"),
    (b"HttpHeader:Cf-Connecting-Ip", b"203.0.113.7"),
    (b"HttpHeader:X-Forwarded-For", b"203.0.113.7"),
    (b"HttpHeader:X-Forwarded-Proto", b"https"),
]
UPGRADE = [(b"HttpHeader:Sec-Websocket-Key", b"dGhlIHNhbXBsZSBub25jZQ==")]
WINDOW = 1 << 24
EDGE_SOCKET = ("127.0.0.1", 9)


class QuicEdge:
    """The other end: qh3's core as a server, and a UDP socket."""

    def __init__(self, accept: Acceptor, batch: Batch) -> None:
        from connector.transport.quic_engine_qh3 import Qh3Engine

        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        ours = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        ours.setblocking(False)
        ours.bind(("127.0.0.1", 0))
        ours.connect(self.socket.getsockname())
        self.socket.connect(ours.getsockname())
        self.socket.setblocking(False)
        now = monotonic()
        engine: Any = Qh3Engine(EngineSettings(server_name="edge.invalid", cadata=b""))
        engine.connect(ours.getpeername(), now)
        client = engine._core
        connection = engine._connection
        self.core: Any = qh3_core.QuicConnectionCore(
            False, 1, EDGE_SOCKET, ours.getsockname(),
            connection.original_destination_connection_id, connection.host_cid, True,
            4, 1232, False, 30.0, 3, None, None, WINDOW, 0, WINDOW, 0, 0, 0, WINDOW, 100, 0, 0, 0, 0.333, 0.025, now,
        )  # fmt: skip
        key = (3, ("aes-128-gcm", "aes-128-ecb"), b"k" * 16, b"i" * 12, b"h" * 16, 0)
        for core in (client, self.core):
            for epoch in (0, 2):
                core.discard_keys(epoch)
            for direction in ("send", "receive"):
                core.install_packet_key(direction, *key)
            core.apply_peer_transport_parameters(WINDOW, WINDOW, WINDOW, 0, 1000, 0, 3, 0.025, None, None)
            core.handshake_complete()
            core.handshake_confirmed()
        engine._established = True
        loop = asyncio.get_running_loop()
        self.link = QuicLink(engine, ours, accept, loop=loop, batch=batch)
        loop.remove_reader(ours)  # the test says when it is readable
        self.link.on_handshake_done()

    def send(self, stream_id: int, data: bytes, *, fin: bool = False) -> None:
        """Write to a stream and put the packets into the connector's socket."""
        self.core.send_stream(stream_id, data, fin)
        self.transmit()

    async def sent(self) -> None:
        """Wait until nothing waits for its turn: the core paces."""

        def empty() -> bool:
            self.transmit()
            return not self.core.get_send_buffer_size()

        await until(empty)

    def transmit(self) -> None:
        """Put the packets that may go into the connector's socket."""
        while (transmit := self.core.poll_transmit(monotonic())) is not None:
            self.socket.send(transmit[0])

    def received(self) -> bytes:
        """Read the socket; payload of all streams, acknowledged."""
        found = b""
        while True:
            try:
                data = self.socket.recv(2048)
            except BlockingIOError:
                break
            self.core.receive_datagram(data, self.link.local_address, monotonic())
        while (native := self.core.next_event()) is not None:
            if native[0] == "stream_data":
                found += native[2]
        self.transmit()
        return found


class Rig:
    """A link over QUIC with a dispatcher behind it; the test is the edge and the origin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
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
        self.edge = QuicEdge(self.dispatcher.accept, self.dispatcher.writes)

    def open(self, kind: int, metadata: list[tuple[bytes, bytes]], *, fin: bool) -> int:
        """Open a stream with a ConnectRequest of its own."""
        stream_id = int(self.edge.core.open_stream(False))
        ray = (b"HttpHeader:Cf-Ray", b"%020d" % stream_id)
        request = encode_connect_request(kind, b"https://app.example.com/", [*METADATA, *metadata, ray])
        self.edge.send(stream_id, PREAMBLE + request, fin=fin)
        return stream_id

    def turn(self) -> None:
        """What the loop would call when the socket is readable."""
        self.edge.link._on_readable()

    async def answered(self, part: bytes) -> None:
        """Wait until the edge got `part`; pacing may hold it back for a moment."""
        found = b""

        def there() -> bool:
            nonlocal found
            found += self.edge.received()
            return part in found

        await until(there)

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def close(self) -> None:
        self.edge.link.abort()
        self.edge.socket.close()
        await self.dispatcher.close()
        await self.settle()


def messages(monkeypatch: pytest.MonkeyPatch, flight: int) -> Calls:
    """Count for UNITS messages there and back, `flight` of them per read."""
    counted = Calls()

    async def main() -> None:
        rig = Rig(monkeypatch)
        edge = rig.edge
        stream_id = rig.open(1, UPGRADE, fin=False)
        await edge.sent()
        rig.turn()
        await rig.settle()
        [origin] = rig.origins
        origin.protocol.data_received(SWITCH)
        await rig.answered(b"HttpStatus")
        payload = bytes(range(128))
        readable, flush, back = rig.turn, edge.link._flush, origin.protocol.data_received
        for _ in range(UNITS // flight):
            edge.send(stream_id, payload * flight)
            await edge.sent()
            with counted:
                readable()
                back(payload)
                flush()
            await rig.answered(payload)
        assert origin.written == payload * flight, "what one wake-up brings for an origin must be one write"
        await rig.close()

    run(main())
    return counted


def requests(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Count for UNITS requests one after the other on a kept connection."""
    counted = Calls()

    async def main() -> None:
        rig = Rig(monkeypatch)
        edge = rig.edge
        for number in range(UNITS + 3):  # the first dial, and fill the caches
            rig.open(0, [], fin=True)
            await edge.sent()
            if number < 3:
                rig.turn()
                await rig.settle()
                rig.origins[0].protocol.data_received(ANSWER)
                edge.link._flush()
            else:
                readable, flush, back = rig.turn, edge.link._flush, rig.origins[0].protocol.data_received
                with counted:
                    readable()
                    back(ANSWER)
                    flush()
            await rig.answered(b"hello, world\n")
        assert len(rig.origins) == 1, "the origin connection was not reused"
        await rig.close()

    run(main())
    return counted


def test_calls_per_websocket_message(monkeypatch: pytest.MonkeyPatch) -> None:
    check(messages(monkeypatch, 1), python=63, c=47)


def test_calls_per_websocket_message_sixteen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check(messages(monkeypatch, 16), python=5.5, c=4.5)


def test_calls_per_request(monkeypatch: pytest.MonkeyPatch) -> None:
    # Before 3.12 a comprehension is a call of its own.
    check(requests(monkeypatch), python=191 if sys.version_info >= (3, 12) else 194, c=259)
