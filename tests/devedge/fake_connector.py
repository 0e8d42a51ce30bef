"""A small connector on general-purpose libraries: h2 in the server role, pycapnp's client side.

Over QUIC it is fake_quic_connector.py; tests take either from `FakeConnector.connect`.
"""

from __future__ import annotations

import abc
import asyncio
import json
import socket
import ssl
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import capnp

from connector.devedge.h2session import H2Session, H2Stream
from connector.devedge.headers import websocket_accept
from connector.devedge.server import DevEdge
from connector.devedge.streams import RawHeaders
from connector.devedge.tunnels import Tunnel
from connector.transport.rpc import load_schema
from connector.wire.h2_headers import encode_serialised_headers

UPGRADE = b"cf-cloudflared-proxy-connection-upgrade"
ORIGIN = b'{"src":"origin"}'
PROTOCOL: ContextVar[str] = ContextVar("PROTOCOL", default="http2")
"""What `FakeConnector.connect` speaks; the fixture `protocol` sets it."""


class FakeStream:
    """One proxied request as the connector sees it: collects the body, and answers as the test says."""

    switched = 200  # status of an accepted WebSocket

    def __init__(self, owner: FakeConnector, stream: Any, headers: RawHeaders) -> None:
        self.owner = owner
        self.stream = stream
        self.headers = headers
        self.fields = dict(headers)
        self.body = bytearray()
        self.received = 0
        self.keep_body = True
        self.hold = False  # give no credit: an origin that does not read
        self.held = 0
        self.paused = False
        self.eof = asyncio.Event()
        self.reset: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        self.echo = False
        self.on_resume: Callable[[], None] | None = None

    @property
    def path(self) -> str:
        return self.fields[b":path"].decode()

    def respond(self, status: int, headers: RawHeaders = (), *, meta: bytes = ORIGIN, end: bool = False) -> None:
        head = [
            (b":status", str(status).encode()),
            (b"cf-cloudflared-response-headers", encode_serialised_headers(headers)),
            (b"cf-cloudflared-response-meta", meta),
        ]
        self.stream.send_headers(head, end_stream=end)

    def accept_websocket(self, *more: tuple[bytes, bytes]) -> None:
        accept = websocket_accept(self.fields[b"sec-websocket-key"])
        upgrade = [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), (b"Sec-WebSocket-Accept", accept)]
        self.respond(self.switched, [*upgrade, *more])

    def on_headers(self, headers: RawHeaders) -> None:
        raise AssertionError("no second header block is expected")

    def on_data(self, data: bytes) -> None:
        self.received += len(data)
        if self.keep_body:
            self.body += data
        if self.echo:
            self.stream.write(data)
        if self.hold:
            self.held += len(data)
        else:
            self.stream.consumed(len(data))

    def release(self) -> None:
        self.hold = False
        held, self.held = self.held, 0
        self.stream.consumed(held)

    def on_eof(self, trailers: RawHeaders) -> None:
        self.eof.set()

    def on_reset(self, error: BaseException | None) -> None:
        if not self.reset.done():
            self.reset.set_result(error)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self.on_resume is not None:
            self.on_resume()


Handler = Callable[[FakeStream], None]


class _Configuration(FakeStream):
    """A configuration push: answered when it is complete."""

    def on_eof(self, trailers: RawHeaders) -> None:
        super().on_eof(trailers)
        value = json.loads(self.body)
        error = self.owner.configured(value["version"], value["config"])
        reply = {"lastAppliedVersion": value["version"], "err": error}
        self.stream.send_headers([(b":status", b"200")])
        self.stream.write(json.dumps(reply).encode())
        self.stream.write_eof()


class _Control(asyncio.Protocol):
    """The control stream on one side, a socket pair to pycapnp's client on the other."""

    def __init__(self, stream: H2Stream) -> None:
        self.stream = stream
        self.transport: asyncio.Transport | None = None
        self.ended = asyncio.Event()
        self.early = bytearray()
        self.tap: Callable[[bytes], None] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(bytes(self.early))

    def data_received(self, data: bytes) -> None:
        self.stream.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.stream.write_eof()

    def on_headers(self, headers: RawHeaders) -> None:
        raise AssertionError

    def on_data(self, data: bytes) -> None:
        self.stream.consumed(len(data))
        if self.tap is not None:
            self.tap(data)
        if self.transport is None:
            self.early += data
        elif not self.transport.is_closing():
            self.transport.write(data)

    def on_eof(self, trailers: RawHeaders) -> None:
        self.ended.set()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write_eof()

    def on_reset(self, error: BaseException | None) -> None:
        self.on_eof(())

    def pause_writing(self) -> None:
        pass

    def resume_writing(self) -> None:
        pass


class FakeConnector(abc.ABC):
    """One connection to the edge, over either protocol. `async with await connect(edge, ...)`."""

    def __init__(self, handler: Handler | None = None) -> None:
        self.handler = handler or (lambda request: request.respond(204, end=True))
        self.configurations: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.configuration_error: object = None
        self.lost = asyncio.Event()
        self.requests: list[FakeStream] = []
        self.connector_id = uuid.uuid4()
        self._rpc: Any = None
        self._server: Any = None

    @staticmethod
    async def connect(edge: DevEdge, handler: Handler | None = None) -> FakeConnector:
        """Over the protocol that `over` names; HTTP/2 otherwise."""
        if PROTOCOL.get() == "quic":
            from tests.devedge.fake_quic_connector import FakeQuicConnector

            return await FakeQuicConnector.dial(edge, handler)
        return await FakeH2Connector.dial(edge, handler)

    @abc.abstractmethod
    async def open_rpc(self) -> Any:
        """The capability of the edge."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the connection."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Drop the connection."""

    @abc.abstractmethod
    def close_rpc(self) -> None:
        """Take down what `open_rpc` made."""

    def take(self, request: FakeStream) -> None:
        self.requests.append(request)
        self.handler(request)

    def configured(self, version: int, config: object) -> object:
        """A push came; returns the error to report."""
        self.configurations.put_nowait({"version": version, "config": config})
        return self.configuration_error

    async def register(
        self,
        tunnel: Tunnel,
        conn_index: int = 0,
        *,
        secret: bytes | None = None,
        account: str | None = None,
        tunnel_id: uuid.UUID | None = None,
    ) -> Any:
        """Register; returns the `result` union of the answer."""
        server = await self.open_rpc()
        request = server.registerConnection_request()
        request.auth.accountTag = account if account is not None else tunnel.account
        request.auth.tunnelSecret = tunnel.secret if secret is None else secret
        request.tunnelId = (tunnel_id or tunnel.id).bytes
        request.connIndex = conn_index
        request.options.client.clientId = self.connector_id.bytes
        request.options.client.version = "fake"
        request.options.client.arch = "test_none"
        request.options.client.features = ["serialized_headers", "allow_remote_config"]
        async with asyncio.timeout(30):
            answer = await request.send()
        return answer.result.result

    async def unregister(self) -> None:
        async with asyncio.timeout(30):
            await self._server.unregisterConnection_request().send()

    async def leave(self) -> None:
        """End everything and wait until the connection is gone."""
        self._server = None
        if self._rpc is not None:
            self._rpc.close()
            self._rpc = None
            self.close_rpc()
        self.close()
        async with asyncio.timeout(30):
            await self.lost.wait()

    async def __aenter__(self) -> FakeConnector:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()


class FakeH2Connector(H2Session, FakeConnector):
    """Over HTTP/2."""

    def __init__(self, handler: Handler | None = None) -> None:
        H2Session.__init__(self, client=False)
        FakeConnector.__init__(self, handler)
        self.control: asyncio.Future[_Control] = self.loop.create_future()
        self.gone_away = asyncio.Event()
        self._rpc_stream: Any = None

    @classmethod
    async def dial(cls, edge: DevEdge, handler: Handler | None = None) -> FakeH2Connector:
        context = ssl.create_default_context(cafile=str(edge.ca_file))
        host, port = edge.edge_address
        _, protocol = await asyncio.get_running_loop().create_connection(
            lambda: cls(handler), host, port, ssl=context, server_hostname="h2.cftunnel.com"
        )
        return protocol

    def on_request(self, stream: H2Stream, headers: RawHeaders) -> None:
        kind = dict(headers).get(UPGRADE)
        if kind == b"control-stream":
            control = _Control(stream)
            stream.handler = control
            stream.send_headers([(b":status", b"200")])
            self.control.set_result(control)
        elif kind == b"update-configuration":
            stream.handler = _Configuration(self, stream, headers)
        else:
            request = FakeStream(self, stream, headers)
            stream.handler = request
            self.take(request)

    def on_goaway(self) -> None:
        self.gone_away.set()

    def on_lost(self, error: BaseException | None) -> None:
        self.lost.set()
        if self.control.done():
            transport = self.control.result().transport
            if transport is not None:
                transport.abort()

    async def open_rpc(self) -> Any:
        if self._server is None:
            async with asyncio.timeout(30):
                control = await self.control
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            theirs.setblocking(False)
            await self.loop.create_connection(lambda: control, sock=ours)
            self._rpc_stream = await capnp.AsyncIoStream.create_connection(sock=theirs)
            self._rpc = capnp.TwoPartyClient(self._rpc_stream)
            self._server = self._rpc.bootstrap().cast_as(load_schema("tunnelrpc").RegistrationServer)
        return self._server

    def close_rpc(self) -> None:
        self._rpc_stream.close()
