"""An HTTP/2 origin over TLS, on the library h2: what it does is told by the path of each request.

/echo    sends the body back as it comes, and trailers
/big?N   sends N bytes, as the client's windows allow
/hold    takes the request and says nothing
/head    answers without looking at the body, which it gives no credit for
/early   answers whole and at once
/refuse  refuses the stream the first time, then echoes
/abort   resets the stream
/goaway  says that it leaves, then answers; later streams on that connection are not looked at
/cut     ends the connection
/plain   as /early, without trailers
"""

from __future__ import annotations

import asyncio
import ssl
from types import TracebackType
from typing import Any, cast

from h2.config import H2Configuration
from h2.connection import ConnectionState, H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.settings import SettingCodes, Settings

TRAILERS = [(b"grpc-status", b"0"), (b"grpc-message", b"fine")]


class H2Origin:
    """`async with` it; `url` is what a rule names."""

    def __init__(self, context: ssl.SSLContext, *, alpn: tuple[str, ...] = ("h2",), streams: int = 100) -> None:
        context.set_alpn_protocols(list(alpn))
        self._context = context
        self.streams = streams
        self.connections: list[H2Peer] = []
        self.requests: list[list[tuple[bytes, bytes]]] = []
        self.refused = 0
        self.resets: list[int] = []

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> H2Origin:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: H2Peer(self), "127.0.0.1", 0, ssl=self._context)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._server.close()
        for peer in self.connections:
            peer.transport.abort()
        await self._server.wait_closed()


class H2Peer(asyncio.Protocol):
    """One connection of the origin."""

    transport: asyncio.Transport

    def __init__(self, origin: H2Origin) -> None:
        self.origin = origin
        self.h2 = H2Connection(H2Configuration(client_side=False, header_encoding=None))
        self.paths: dict[int, str] = {}
        self.queues: dict[int, bytearray] = {}
        self.done: set[int] = set()
        self.received = 0
        self.most = 0
        """The most streams that were open at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.origin.connections.append(self)
        self.h2.local_settings = Settings(
            client=False, initial_values={SettingCodes.MAX_CONCURRENT_STREAMS: self.origin.streams}
        )
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.transport.write(self.h2.data_to_send())

    def data_received(self, data: bytes) -> None:
        for event in self.h2.receive_data(data):
            if isinstance(event, RequestReceived):
                self.on_request(event.stream_id, cast("Any", event.headers))
            elif isinstance(event, DataReceived):
                self.on_data(event)
            elif isinstance(event, StreamEnded):
                self.on_end(event.stream_id)
            elif isinstance(event, StreamReset):
                self.origin.resets.append(int(event.error_code))
                self.paths.pop(event.stream_id, None)
            elif isinstance(event, (WindowUpdated, RemoteSettingsChanged)):
                for stream in list(self.queues):
                    self.pump(stream)
        self.flush()

    def on_request(self, stream: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.origin.requests.append(headers)
        path = next(value for name, value in headers if name == b":path").decode()
        self.paths[stream] = path
        self.most = max(self.most, len(self.paths))
        match path.partition("?")[0]:
            case "/echo":
                self.h2.send_headers(stream, [(b":status", b"200"), (b"x-proto", b"h2")])
            case "/big":
                self.h2.send_headers(stream, [(b":status", b"200")])
                self.queues[stream] = bytearray(int(path.partition("?")[2]))
                self.done.add(stream)
                self.pump(stream)
            case "/head":
                self.h2.send_headers(stream, [(b":status", b"200")])
            case "/early" | "/plain":
                self.h2.send_headers(stream, [(b":status", b"201")])
                self.h2.send_data(stream, b"early", end_stream=True)
            case "/refuse" if not self.origin.refused:
                self.origin.refused += 1
                self.h2.reset_stream(stream, ErrorCodes.REFUSED_STREAM)
            case "/refuse":
                self.h2.send_headers(stream, [(b":status", b"200")])
                self.h2.send_data(stream, b"second", end_stream=True)
            case "/abort":
                self.h2.reset_stream(stream, ErrorCodes.INTERNAL_ERROR)
            case "/goaway":
                self.h2.close_connection(last_stream_id=stream)
                self.h2.state_machine.state = ConnectionState.SERVER_OPEN
                self.flush()
                self.h2.send_headers(stream, [(b":status", b"200")])
                self.h2.send_data(stream, b"late", end_stream=True)
            case "/cut":
                self.transport.abort()

    def on_data(self, event: DataReceived) -> None:
        stream, data = event.stream_id, event.data or b""
        self.received += len(data)
        if self.paths.get(stream, "").startswith("/echo"):
            self.h2.acknowledge_received_data(event.flow_controlled_length or 0, stream)
            self.queues.setdefault(stream, bytearray()).extend(data)
            self.pump(stream)

    def on_end(self, stream: int) -> None:
        if self.paths.get(stream, "").startswith("/echo"):
            self.queues.setdefault(stream, bytearray())
            self.done.add(stream)
            self.pump(stream)

    def pump(self, stream: int) -> None:
        queue = self.queues[stream]
        while queue and (room := min(self.h2.local_flow_control_window(stream), 16_384)) > 0:
            self.h2.send_data(stream, bytes(queue[:room]))
            del queue[:room]
        if not queue and stream in self.done:
            del self.queues[stream]
            self.paths.pop(stream, None)
            self.h2.send_headers(stream, TRAILERS, end_stream=True)

    def connection_lost(self, error: Exception | None) -> None:
        self.queues.clear()
