"""The small connector over QUIC: aioquic in the client role, pycapnp for every message."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any
from urllib.parse import urlsplit

import capnp
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import StopSendingReceived
from aioquic.quic.packet import QuicProtocolVersion

from connector.devedge.headers import UPGRADE
from connector.devedge.quicmessages import DATA_SIGNATURE, PREAMBLE, RPC_SIGNATURE, VERSION, response_length
from connector.devedge.quicsession import ALPN, STREAM_WINDOW, QuicSession, QuicStream
from connector.devedge.rpcbridge import RpcBridge
from connector.devedge.server import DevEdge
from connector.devedge.streams import RawHeaders, StreamLostError
from connector.transport.rpc import load_schema
from tests.devedge.fake_connector import ORIGIN, FakeConnector, FakeStream, Handler

PSEUDO = {"HttpMethod": ":method", "HttpHost": ":authority"}


class FakeQuicStream(FakeStream):
    """A proxied request over QUIC."""

    stream: QuicStream
    switched = 101

    def respond(self, status: int, headers: RawHeaders = (), *, meta: bytes = ORIGIN, end: bool = False) -> None:
        self.answer("", [("HttpStatus", str(status)), *((f"HttpHeader:{n.decode()}", v) for n, v in headers)])
        if end:
            self.stream.write_eof()

    def answer(self, error: str, metadata: list[tuple[str, Any]]) -> None:
        message = load_schema("quic_metadata").ConnectResponse.new_message(error=error)
        for entry, (key, value) in zip(message.init("metadata", len(metadata)), metadata, strict=True):
            entry.key, entry.val = key, value
        self.stream.write(DATA_SIGNATURE + VERSION + bytes(message.to_bytes()))


class _Opening:
    """The first bytes of a stream that the edge opens."""

    def __init__(self, owner: FakeQuicConnector, stream: QuicStream) -> None:
        self.owner = owner
        self.stream = stream
        self.data = bytearray()

    def on_data(self, data: bytes) -> None:
        self.data += data
        if self.data.startswith(RPC_SIGNATURE):
            call = _Call(self.owner, self.stream)
            self.stream.handler = call
            if rest := bytes(self.data[len(RPC_SIGNATURE) :]):
                call.on_data(rest)
        elif len(self.data) >= PREAMBLE:
            length = response_length(self.data)  # requests are framed the same way
            if length is not None and len(self.data) >= length:
                self.stream.consumed(length)
                self.begin(bytes(self.data[PREAMBLE:length]), bytes(self.data[length:]))

    def begin(self, message: bytes, rest: bytes) -> None:
        with load_schema("quic_metadata").ConnectRequest.from_bytes(message) as request:
            url = urlsplit(str(request.dest))
            kind = str(request.type)
            metadata = [(str(entry.key), str(entry.val)) for entry in request.metadata]
        path = url.path + (f"?{url.query}" if url.query else "")
        headers = [(b":scheme", url.scheme.encode()), (b":path", path.encode())]
        if kind == "websocket":
            headers.append((UPGRADE, b"websocket"))
        for key, value in metadata:
            name = {"HttpMethod": ":method", "HttpHost": ":authority"}.get(key) or key.removeprefix(
                "HttpHeader:"
            ).lower()
            headers.append((name.encode(), value.encode()))
        taken = FakeQuicStream(self.owner, self.stream, headers)
        self.stream.handler = taken
        self.owner.take(taken)
        if rest and self.stream.handler is not None:
            taken.on_data(rest)

    def on_headers(self, headers: RawHeaders) -> None:
        raise AssertionError

    def on_eof(self, trailers: RawHeaders) -> None:
        raise AssertionError("the edge ended a stream before it was opened")

    def on_reset(self, error: BaseException | None) -> None:
        pass

    def pause_writing(self) -> None:
        pass

    def resume_writing(self) -> None:
        pass


class _Call(RpcBridge):
    """An RPC stream of the edge: pycapnp's server with the capability of a connector."""

    def __init__(self, owner: FakeQuicConnector, stream: QuicStream) -> None:
        super().__init__()
        self.owner = owner
        self.attach(stream)
        self.server: Any = None
        owner.calls.append(self)
        self.task = asyncio.get_running_loop().create_task(self.run())

    async def run(self) -> None:
        schema = load_schema("tunnelrpc")
        owner = self.owner

        class Server(schema.CloudflaredServer.Server):  # type: ignore[misc,name-defined]
            async def updateConfiguration(self, version: int, config: Any, _context: Any, **_: Any) -> None:
                error = owner.configured(int(version), json.loads(bytes(config)))
                result = _context.results.init("result")
                result.latestAppliedVersion = int(version)
                if error is not None:
                    result.err = str(error)

            async def registerUdpSession(self, sessionId: Any, dstPort: int, _context: Any, **_: Any) -> None:
                owner.sessions.append((bytes(sessionId), int(dstPort)))
                if dstPort == 1:
                    _context.results.init("result").err = "too many active flows"

            async def unregisterUdpSession(self, sessionId: Any, message: Any, _context: Any, **_: Any) -> None:
                if not str(message):
                    raise RuntimeError("no message")
                owner.sessions.append((bytes(sessionId), 0))

        self.server = capnp.TwoPartyServer(await self.open(), bootstrap=Server())
        await self.serve()

    def on_ended(self) -> None:
        if self.server is not None:
            self.server.close()
            self.server = None
        self.close()


class FakeQuicConnector(QuicSession, FakeConnector):
    """Over QUIC; also the owner of its socket."""

    def __init__(
        self, edge: DevEdge, handler: Handler | None, *, max_streams: int = 2000, alpn: str = ALPN, name: str = ""
    ) -> None:
        configuration = QuicConfiguration(
            is_client=True,
            alpn_protocols=[alpn],
            server_name=name or "quic.cftunnel.com",
            cafile=str(edge.ca_file),
            idle_timeout=12.0,  # a machine that stands still for less ends nothing
            max_data=16 << 20,
            max_stream_data=STREAM_WINDOW,
            max_datagram_size=1452,
            max_datagram_frame_size=16_383,
            supported_versions=[QuicProtocolVersion.VERSION_1],
        )
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        QuicSession.__init__(self, self, configuration, None)
        FakeConnector.__init__(self, handler)
        limit = self.quic._local_max_streams_bidi
        limit.value = limit.sent = max_streams
        self.ready = asyncio.Event()
        self.datagrams: list[bytes] = []
        self.calls: list[_Call] = []
        self.sessions: list[tuple[bytes, int]] = []
        self.control: RpcBridge | None = None
        self.error: BaseException | None = None
        self.loop.add_reader(self.socket, self._read)
        self.quic.connect(edge.edge_address, self.loop.time())
        self.wake()

    @classmethod
    async def dial(cls, edge: DevEdge, handler: Handler | None = None, **options: Any) -> FakeQuicConnector:
        connector = cls(edge, handler, **options)
        async with asyncio.timeout(30):
            await connector.ready.wait()
        return connector

    # QuicSession.

    def on_connected(self) -> None:
        self.ready.set()

    def on_peer_stream(self, stream: QuicStream) -> None:
        stream.handler = _Opening(self, stream)

    def on_datagram(self, data: bytes) -> None:
        self.datagrams.append(data)

    def on_lost(self, error: BaseException | None) -> None:
        self.error = error
        self.lost.set()
        self.vanish()

    def _on_stop(self, event: StopSendingReceived) -> None:
        """A connector takes this for the end of the request."""
        stream = self.streams.get(event.stream_id)
        handler = stream.handler if stream is not None else None
        super()._on_stop(event)
        if handler is not None:
            handler.on_reset(StreamLostError("stopped by the peer, code 0"))

    # Owner.

    def _read(self) -> None:
        while not self.over:
            try:
                data, address = self.socket.recvfrom(65536)
            except BlockingIOError:
                break
            self.receive(data, address)
        self.settle()

    def send(self, data: bytes, address: Any) -> None:
        if self.socket.fileno() >= 0:
            self.socket.sendto(data, address)

    def add_id(self, connection_id: bytes, session: QuicSession) -> None:
        pass

    def drop_id(self, connection_id: bytes) -> None:
        pass

    def rebind(self) -> None:
        """Go on from another port, as behind a NAT that forgot."""
        self.loop.remove_reader(self.socket)
        self.socket.close()
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.loop.add_reader(self.socket, self._read)

    # FakeConnector.

    async def end_session(self, session: bytes, message: str) -> None:
        """Tell the edge over a stream of its own that a UDP session is over."""
        bridge = RpcBridge()
        stream = self.open_stream(bridge)
        bridge.attach(stream)
        stream.write(RPC_SIGNATURE)
        client = capnp.TwoPartyClient(await bridge.open())
        manager = client.bootstrap().cast_as(load_schema("tunnelrpc").SessionManager)
        await bridge.serve()
        async with asyncio.timeout(30):
            await manager.unregisterUdpSession(sessionId=session, message=message)
        del manager
        client.close()
        bridge.close()

    async def open_rpc(self) -> Any:
        if self._server is None:
            self.control = RpcBridge()
            self.control.attach(self.open_stream(self.control))
            self._rpc = capnp.TwoPartyClient(await self.control.open())
            self._server = self._rpc.bootstrap().cast_as(load_schema("tunnelrpc").RegistrationServer)
            await self.control.serve()
        return self._server

    def close_rpc(self) -> None:
        assert self.control is not None
        self.control.close()

    def vanish(self) -> None:
        """The socket closes, nobody is told."""
        if self.socket.fileno() >= 0:
            self.loop.remove_reader(self.socket)
            self.socket.close()

    def close(self) -> None:
        self.close_connection(0, "", None)
        self.vanish()

    def abort(self) -> None:
        self.close_connection(0x77, "gone", None)
        self.vanish()
