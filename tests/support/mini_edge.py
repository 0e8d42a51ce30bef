"""A small edge for transport tests: real TLS, the `h2` library as HTTP/2 client, pycapnp or raw bytes as RPC server.

It shares nothing with the connector but the schema files. Every connection is one MiniEdgeConnection; tests take them
from `accepted()` and drive them: open requests, answer registration, cut at any stage.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import capnp
import h2.config
import h2.connection
import h2.events
import h2.exceptions

from connector.transport.rpc import load_schema
from tests.support.aio import until
from tests.support.certs import Authority

EDGE_NAME = "h2.cftunnel.com"
CONTROL = (b"cf-cloudflared-proxy-connection-upgrade", b"control-stream")
Headers = list[tuple[bytes, bytes]]


class EdgeStream:
    """What arrived on one stream that the edge opened."""

    def __init__(self, connection: MiniEdgeConnection, stream_id: int) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.status = 0
        self.headers: Headers = []
        self.trailers: Headers = []
        self.data = bytearray()
        self.ended = asyncio.Event()
        self.reset: int | None = None
        self.on_data: Callable[[bytes], None] | None = None
        self.on_end: Callable[[], None] | None = None
        self._changed = asyncio.Event()

    def send(self, data: bytes, end: bool = False) -> None:
        self.connection.send(self.stream_id, data, end)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def read(self, size: int) -> bytes:
        await self.until(lambda: len(self.data) >= size or self.ended.is_set())
        return bytes(self.data[:size])

    def changed(self) -> None:
        self._changed.set()


class MiniEdgeConnection(asyncio.Protocol):
    """One TLS connection from a connector."""

    def __init__(self, edge: MiniEdge) -> None:
        self.edge = edge
        self.transport: asyncio.Transport | None = None
        self.closed = asyncio.Event()
        self.ready = asyncio.Event()
        self.goaway: h2.events.ConnectionTerminated | None = None
        self.streams: dict[int, EdgeStream] = {}
        self.pending: dict[int, tuple[bytearray, bool]] = {}
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
        self.received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no asyncio.Transport
        self.edge.connections.append(self)
        if self.edge.speak:
            self.h2.initiate_connection()
            self.h2.increment_flow_control_window(8 << 20)
            self.flush()
        self.edge.queue.put_nowait(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        for stream in self.streams.values():
            stream.ended.set()
            stream.changed()
            if stream.on_end:
                stream.on_end()

    def flush(self) -> None:
        data = self.h2.data_to_send()
        if data and self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.edge.speak:
            return
        for event in self.h2.receive_data(data):
            self._handle(event)
        for stream_id in list(self.pending):
            self._pump(stream_id)
        self.flush()

    def _handle(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RemoteSettingsChanged):
            self.ready.set()
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.goaway = event
        stream = self.streams.get(getattr(event, "stream_id", None) or 0)
        if stream is None:
            return
        if isinstance(event, h2.events.ResponseReceived):
            stream.headers = [(bytes(k), bytes(v)) for k, v in event.headers]
            stream.status = int(dict(stream.headers)[b":status"])
        elif isinstance(event, h2.events.TrailersReceived):
            stream.trailers = [(bytes(k), bytes(v)) for k, v in event.headers]
        elif isinstance(event, h2.events.DataReceived):
            stream.data += event.data
            self.h2.acknowledge_received_data(event.flow_controlled_length, stream.stream_id)
            if stream.on_data:
                stream.on_data(bytes(event.data))
        elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
            if isinstance(event, h2.events.StreamReset):
                stream.reset = int(event.error_code)
            stream.ended.set()
            if stream.on_end:
                stream.on_end()
        stream.changed()

    def open(
        self,
        headers: Headers,
        *,
        method: bytes = b"GET",
        host: bytes = b"app.example.com",
        path: bytes = b"/",
        end: bool = False,
    ) -> EdgeStream:
        stream_id = self.h2.get_next_available_stream_id()
        stream = self.streams[stream_id] = EdgeStream(self, stream_id)
        fields = [(b":method", method), (b":scheme", b"https"), (b":authority", host), (b":path", path)]
        self.h2.send_headers(stream_id, fields + headers, end_stream=end)
        self.flush()
        return stream

    def open_control(self) -> EdgeStream:
        return self.open([CONTROL])

    def send(self, stream_id: int, data: bytes, end: bool = False) -> None:
        buffer, _ = self.pending.get(stream_id, (bytearray(), False))
        buffer += data
        self.pending[stream_id] = (buffer, end)
        self._pump(stream_id)
        self.flush()

    def _pump(self, stream_id: int) -> None:
        buffer, end = self.pending[stream_id]
        try:
            while buffer:
                size = min(len(buffer), self.h2.local_flow_control_window(stream_id), self.h2.max_outbound_frame_size)
                if size <= 0:
                    return
                self.h2.send_data(stream_id, bytes(buffer[:size]))
                del buffer[:size]
            del self.pending[stream_id]
            if end:
                self.h2.end_stream(stream_id)
        except (h2.exceptions.StreamClosedError, h2.exceptions.ProtocolError):
            self.pending.pop(stream_id, None)

    def send_goaway(self) -> None:
        """GOAWAY as raw bytes: the h2 library takes nothing more after its own."""
        self.send_raw(b"\0\0\x08\x07\0\0\0\0\0" + b"\0\0\0\0" + b"\0\0\0\0")

    def send_raw(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    def close(self) -> None:
        assert self.transport is not None
        self.transport.close()

    def cut(self) -> None:
        """RST on the TCP connection."""
        assert self.transport is not None
        sock: Any = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.transport.abort()

    async def wait_closed(self) -> None:
        async with asyncio.timeout(30):
            await self.closed.wait()


class MiniEdge:
    """`async with MiniEdge(tmp_path) as edge:` listens on `edge.port`; `edge.cacert` is what to trust."""

    def __init__(self, directory: Path, *, speak: bool = True, names: tuple[str, ...] = (EDGE_NAME,)) -> None:
        self.authority = Authority()
        self.cacert = str(directory / "ca.pem")
        Path(self.cacert).write_text(self.authority.pem())
        self.context: ssl.SSLContext | None = self.authority.server_context(directory, *names)
        self.speak = speak
        self.connections: list[MiniEdgeConnection] = []
        self.queue: asyncio.Queue[MiniEdgeConnection] = asyncio.Queue()
        self.server: asyncio.Server | None = None
        self.port = 0

    async def __aenter__(self) -> MiniEdge:
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: MiniEdgeConnection(self), "127.0.0.1", 0, ssl=self.context)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.server is not None
        self.server.close()
        for connection in self.connections:
            if not connection.closed.is_set() and connection.transport is not None:
                connection.transport.abort()
                await connection.wait_closed()
        await self.server.wait_closed()
        # asyncio runs a task of its own per handshake; one that the connector refused may still be ending.
        await until(lambda: not [t for t in asyncio.all_tasks() if "_accept_connection2" in repr(t.get_coro())])

    async def accepted(self) -> MiniEdgeConnection:
        async with asyncio.timeout(30):
            return await self.queue.get()


class RpcServer:
    """pycapnp's server on a control stream, by a socket pair and two pumps."""

    def __init__(self, stream: EdgeStream, registrar: Any) -> None:
        self.stream = stream
        self.registrar = registrar
        self.task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> RpcServer:
        near, far = socket.socketpair()
        reader, self.writer = await asyncio.open_connection(sock=near)
        self.io = await capnp.AsyncIoStream.create_connection(sock=far)
        self.server = capnp.TwoPartyServer(self.io, bootstrap=self.registrar)
        if self.stream.data:
            self.writer.write(bytes(self.stream.data))
        self.stream.on_data = self.writer.write
        self.stream.on_end = lambda: self.writer.write_eof() if not self.writer.is_closing() else None
        if self.stream.ended.is_set():
            self.stream.on_end()

        async def pump() -> None:
            while data := await reader.read(65536):
                self.stream.send(data)

        self.task = asyncio.create_task(pump())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stream.on_data = self.stream.on_end = None
        self.server.close()
        self.io.close()
        assert self.task is not None
        self.task.cancel()
        try:
            await self.task
        except (asyncio.CancelledError, ConnectionError):
            pass
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            pass


class Registrar(load_schema("tunnelrpc").RegistrationServer.Server):  # type: ignore[misc]
    """The edge's bootstrap object. `answer(response builder)` fills in the registration's result."""

    def __init__(self, answer: Callable[[Any], Awaitable[None] | None] | None = None) -> None:
        self.answer = answer or accept
        self.registered: list[dict[str, Any]] = []
        self.configurations: list[bytes] = []
        self.unregistered = 0

    async def registerConnection(
        self, auth: Any, tunnelId: Any, connIndex: int, options: Any, _context: Any, **_: Any
    ) -> None:
        self.registered.append(
            {"auth": auth.to_dict(), "tunnelId": bytes(tunnelId), "connIndex": connIndex, "options": options.to_dict()}
        )
        pending = self.answer(_context.results.init("result").result)
        if pending is not None:
            await pending

    async def unregisterConnection(self, _context: Any, **_: Any) -> None:
        self.unregistered += 1

    async def updateLocalConfiguration(self, config: Any, _context: Any, **_: Any) -> None:
        self.configurations.append(bytes(config))


def accept(result: Any) -> None:
    details = result.init("connectionDetails")
    details.uuid = bytes.fromhex("0a1b2c3d4e5f406182738495a6b7c8d9")
    details.locationName = "lis01"
    details.tunnelIsRemotelyManaged = True


def refuse(cause: str, retry_after_ns: int = 0, should_retry: bool = False) -> Callable[[Any], None]:
    def answer(result: Any) -> None:
        error = result.init("error")
        error.cause = cause
        error.retryAfter = retry_after_ns
        error.shouldRetry = should_retry

    return answer
