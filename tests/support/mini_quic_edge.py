"""A small QUIC edge for transport tests, on aioquic: real packets, real TLS, pycapnp for every message.

It shares nothing with the connector but the schema files. Every connection is one MiniQuicConnection; tests take them
from `accepted()` and drive them: open data and RPC streams, answer registration, hold windows, send datagrams, cut.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import capnp
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicProtocolVersion
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from connector.transport.rpc import load_schema
from tests.support.certs import Authority

EDGE_NAME = "quic.cftunnel.com"
DATA = bytes.fromhex("0a36cd12a13e")
RPC = bytes.fromhex("52bb825cdb65")
Metadata = Sequence[tuple[str, str]]


def connect_request(dest: str, metadata: Metadata = (), kind: str = "http") -> bytes:
    message = load_schema("quic_metadata").ConnectRequest.new_message(dest=dest, type=kind)
    entries = message.init("metadata", len(metadata))
    for entry, (key, value) in zip(entries, metadata, strict=True):
        entry.key, entry.val = key, value
    return bytes(message.to_bytes())


class QuicEdgeStream:
    """One bidirectional stream as the edge sees it."""

    def __init__(self, connection: MiniQuicConnection, stream_id: int) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.data = bytearray()
        self.received = 0
        self.keep = True
        self.ended = asyncio.Event()
        self.whole = False
        self.reset: int | None = None
        self.stopped: int | None = None
        self.on_data: Callable[[bytes], None] | None = None
        self.on_end: Callable[[], None] | None = None
        self._changed = asyncio.Event()

    def send(self, data: bytes, end: bool = False) -> None:
        try:
            self.connection._quic.send_stream_data(self.stream_id, data, end)
        except RuntimeError:
            return  # stopped by the connector
        self.connection.flush()

    def send_reset(self, code: int = 0) -> None:
        self.connection._quic.reset_stream(self.stream_id, code)
        self.connection.flush()

    def send_stop(self, code: int = 0) -> None:
        self.connection._quic.stop_stream(self.stream_id, code)
        self.connection.flush()

    @property
    def waiting(self) -> int:
        """Bytes that the connector gives no credit for, or that are on their way."""
        stream = self.connection._quic._streams.get(self.stream_id)
        return 0 if stream is None else len(stream.sender._buffer)

    async def until(self, condition: Callable[[], object], limit: float = 30) -> None:
        async with asyncio.timeout(limit):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def response(self, limit: float = 30) -> tuple[str, list[tuple[str, str]]]:
        """Wait for the ConnectResponse; return error text and metadata. `data` holds what follows."""
        await self.until(lambda: self._whole() or self.ended.is_set(), limit)
        size = self._whole()
        assert size, f"no response: {bytes(self.data)!r} reset={self.reset}"
        assert self.data[:8] == DATA + b"01"
        with load_schema("quic_metadata").ConnectResponse.from_bytes(bytes(self.data[8:size])) as message:
            found = (str(message.error), [(str(e.key), str(e.val)) for e in message.metadata])
        del self.data[:size]
        return found

    def _whole(self) -> int:
        if len(self.data) < 16:
            return 0
        size = 16 + 8 * int.from_bytes(self.data[12:16], "little")
        return size if len(self.data) >= size else 0

    async def body(self, limit: float = 40) -> bytes:
        await self.until(self.ended.is_set, limit)
        assert self.reset is None, "the stream was reset"
        assert self.whole, f"the connection closed: {self.connection.close_code} {self.connection.close_reason}"
        return bytes(self.data)

    async def read(self, size: int, limit: float = 30) -> bytes:
        await self.until(lambda: len(self.data) >= size or self.ended.is_set(), limit)
        taken = bytes(self.data[:size])
        del self.data[:size]
        return taken

    def receive(self, data: bytes) -> None:
        self.received += len(data)
        if self.keep:
            self.data += data
        if self.on_data:
            self.on_data(data)

    def end(self) -> None:
        self.ended.set()
        if self.on_end:
            self.on_end()

    def changed(self) -> None:
        self._changed.set()


class HoldingConnection(QuicConnection):
    """aioquic's connection; while `hold` is set its windows do not move."""

    hold = False

    def _write_connection_limits(self, builder: Any, space: Any) -> None:
        if not self.hold:
            super()._write_connection_limits(builder, space)

    def _write_stream_limits(self, builder: Any, space: Any, stream: Any) -> None:
        if not self.hold:
            super()._write_stream_limits(builder, space, stream)


class MiniQuicConnection(QuicConnectionProtocol):
    """One connection from a connector."""

    edge: MiniQuicEdge

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._quic.__class__ = HoldingConnection
        self.streams: dict[int, QuicEdgeStream] = {}
        self.closed = asyncio.Event()
        self.close_code: int | None = None
        self.close_reason = ""
        self.datagrams: list[bytes] = []
        self.pings = 0
        self._flush_due = False
        self.changed = asyncio.Event()

    @property
    def control(self) -> QuicEdgeStream:
        return self.stream(0)

    def stream(self, stream_id: int) -> QuicEdgeStream:
        if stream_id not in self.streams:
            self.streams[stream_id] = QuicEdgeStream(self, stream_id)
        return self.streams[stream_id]

    def hold(self, hold: bool) -> None:
        """Give the connector no more credit, or give it again."""
        self._quic.hold = hold  # type: ignore[attr-defined]
        if not hold:
            self._quic.send_ping(1)
        self.flush()

    def flush(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if not self.closed.is_set():
            self.transmit()

    def quic_event_received(self, event: events.QuicEvent) -> None:
        if isinstance(event, events.HandshakeCompleted):
            self.edge.connections.append(self)
            self.edge.queue.put_nowait(self)
        elif isinstance(event, events.ConnectionTerminated):
            self.close_code, self.close_reason = event.error_code, event.reason_phrase
            self.closed.set()
            for stream in self.streams.values():
                stream.end()
                stream.changed()
        elif isinstance(event, events.DatagramFrameReceived):
            self.datagrams.append(event.data)
        elif isinstance(event, events.StreamDataReceived):
            stream = self.stream(event.stream_id)
            if event.data:
                stream.receive(event.data)
            if event.end_stream:
                stream.whole = True
                stream.end()
            stream.changed()
        elif isinstance(event, events.StreamReset):
            stream = self.stream(event.stream_id)
            stream.reset = event.error_code
            stream.end()
            stream.changed()
        elif isinstance(event, events.StopSendingReceived):
            stream = self.stream(event.stream_id)
            stream.stopped = event.error_code
            stream.changed()
        self.changed.set()

    async def until(self, condition: Callable[[], object], limit: float = 30) -> None:
        async with asyncio.timeout(limit):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def open(self, first: bytes = b"", end: bool = False) -> QuicEdgeStream:
        stream_id = self._quic.get_next_available_stream_id()
        stream = self.stream(stream_id)
        self._quic.send_stream_data(stream_id, first, end)
        self.flush()
        return stream

    def request(
        self, dest: str = "/", metadata: Metadata = (), *, kind: str = "http", body: bytes = b"", end: bool = False
    ) -> QuicEdgeStream:
        return self.open(DATA + b"01" + connect_request(dest, metadata, kind) + body, end)

    def send_datagram(self, data: bytes) -> None:
        self._quic.send_datagram_frame(data)
        self.flush()

    def shut(self, code: int = 0, reason: str = "") -> None:
        self._quic.close(error_code=code, reason_phrase=reason)
        self.transmit()

    async def wait_gone(self) -> None:
        async with asyncio.timeout(30):
            await self.closed.wait()


class MiniQuicEdge:
    """`async with MiniQuicEdge(tmp_path) as edge:` listens on `edge.port`; `edge.cacert` is what to trust."""

    def __init__(
        self,
        directory: Path,
        *,
        names: tuple[str, ...] = (EDGE_NAME,),
        alpn: str = "argotunnel",
        max_data: int = 16 << 20,
        max_stream_data: int = 4 << 20,
        idle_timeout: float = 60.0,
    ) -> None:
        """`idle_timeout` is long: where silence is not what is tested, a machine that stands still ends nothing."""
        self.authority = Authority()
        self.cacert = str(directory / "quic-ca.pem")
        Path(self.cacert).write_text(self.authority.pem())
        certificate, key = self.authority.issue(*names)
        path = directory / f"quic-server-{x509.random_serial_number():x}.pem"
        path.write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        self.configuration = QuicConfiguration(
            is_client=False,
            alpn_protocols=[alpn],
            max_data=max_data,
            max_stream_data=max_stream_data,
            max_datagram_frame_size=16_383,
            idle_timeout=idle_timeout,
            supported_versions=[QuicProtocolVersion.VERSION_1],
        )
        self.configuration.load_cert_chain(path)
        self.connections: list[MiniQuicConnection] = []
        self.queue: asyncio.Queue[MiniQuicConnection] = asyncio.Queue()
        self.server: QuicServer | None = None
        self.transport: asyncio.DatagramTransport | None = None
        self.port = 0

    async def __aenter__(self) -> MiniQuicEdge:
        await self.listen()
        return self

    async def listen(self, port: int = 0) -> None:
        loop = asyncio.get_running_loop()
        bound = type("Bound", (MiniQuicConnection,), {"edge": self})
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind(("127.0.0.1", port))
        self.transport, self.server = await loop.create_datagram_endpoint(
            lambda: QuicServer(configuration=self.configuration, create_protocol=bound), sock=sock
        )
        self.port = sock.getsockname()[1]

    def vanish(self) -> None:
        """The process is gone: the socket closes, nobody is told."""
        assert self.transport is not None
        for connection in self.connections:
            connection.closed.set()
            if connection._timer is not None:
                connection._timer.cancel()
                connection._timer = None
        self.transport.abort()

    def freeze(self) -> None:
        """The process hangs: the socket stays, nothing is answered any more."""
        assert self.server is not None
        self.server.datagram_received = lambda data, addr: None  # type: ignore[method-assign]
        for connection in self.connections:
            connection.transmit = lambda: None  # type: ignore[method-assign]

    async def __aexit__(self, *_: object) -> None:
        assert self.transport is not None
        if not self.transport.is_closing():
            for connection in self.connections:
                if not connection.closed.is_set():
                    connection.shut()
            self.transport.close()
        for connection in self.connections:
            if connection._timer is not None:
                connection._timer.cancel()
        await asyncio.sleep(0)

    async def accepted(self) -> MiniQuicConnection:
        async with asyncio.timeout(30):
            return await self.queue.get()


class RpcClient:
    """pycapnp's client on an RPC stream of the edge. `async with RpcClient(connection) as cloudflared:`."""

    def __init__(self, connection: MiniQuicConnection) -> None:
        self.stream = connection.open(RPC)
        self.task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Any:
        near, far = socket.socketpair()
        reader, self.writer = await asyncio.open_connection(sock=near)
        self.stream.on_data = self.writer.write
        self.stream.on_end = lambda: None if self.writer.is_closing() else self.writer.close()
        self.io = await capnp.AsyncIoStream.create_connection(sock=far)
        self.client = capnp.TwoPartyClient(self.io)

        async def pump() -> None:
            try:
                while data := await reader.read(65536):
                    self.stream.send(data)
            except ConnectionError:
                pass

        self.task = asyncio.create_task(pump())
        return self.client.bootstrap().cast_as(load_schema("tunnelrpc").CloudflaredServer)

    async def __aexit__(self, *_: object) -> None:
        self.stream.on_data = self.stream.on_end = None
        self.client.close()
        self.io.close()
        assert self.task is not None
        self.task.cancel()
        try:
            await self.task
        except (asyncio.CancelledError, ConnectionError):
            pass
        self.stream.send(b"", end=True)
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            pass
