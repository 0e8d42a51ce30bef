"""A connector's connection over QUIC.

Owns: what each stream is for: the control stream, proxied requests, configuration pushes, RPC of the connector.
In: streams of quicsession.py; calls of `Link`. Out: streams; events.
Never: touches aioquic, or decides about a connection (connectors.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import capnp

from connector.devedge.connectors import PUSH_LIMIT, Link, Roster
from connector.devedge.headers import Head
from connector.devedge.quicmessages import (
    PREAMBLE,
    RPC_SIGNATURE,
    connect_request,
    decode_connect_response,
    response_length,
)
from connector.devedge.quicsession import Owner, QuicSession, QuicStream
from connector.devedge.rpcbridge import RpcBridge
from connector.devedge.streams import RawHeaders, StreamHandler, StreamLostError
from connector.errors import WireError
from connector.transport.rpc import load_schema

if TYPE_CHECKING:
    from aioquic.quic.configuration import QuicConfiguration

DROPPED = 1
"""Application error code of a connection that is dropped; the connector's own is always 0."""

DATAGRAM_REPORT = 1.0
"""Seconds between two events about datagrams."""


class QuicLink(QuicSession, Link):
    """Made by the listener for the first datagram of a connection."""

    protocol = "quic"

    def __init__(self, roster: Roster, owner: Owner, configuration: QuicConfiguration, first_id: bytes) -> None:
        QuicSession.__init__(self, owner, configuration, first_id)
        Link.__init__(self, roster)
        self.datagrams = 0
        self.datagram_bytes = 0
        self.datagram_listeners: list[Callable[[bytes], None]] = []
        self._report_due = False

    # QuicSession.

    def on_connected(self) -> None:
        """The handshake is done: the connector opens its control stream."""
        address = self.quic.get_peer_address() or ("?", 0)
        self.begin((address[0], address[1]))

    def on_peer_stream(self, stream: QuicStream) -> None:
        """The first stream is the control stream; others are RPC of the connector."""
        if stream.id == 0:
            control = self.begin_control()
            stream.handler = control
            control.start(stream)
        else:
            stream.handler = _PeerRpc(stream)

    def on_datagram(self, data: bytes) -> None:
        """Count it; the event comes at most once a second."""
        self.datagrams += 1
        self.datagram_bytes += len(data)
        for listener in self.datagram_listeners:
            listener(data)
        if not self._report_due:
            self._report_due = True
            self._after(0 if self.datagrams == 1 else DATAGRAM_REPORT, self._report_datagrams)

    def on_lost(self, error: BaseException | None) -> None:
        """Tell the roster."""
        self.finish(error)

    def _report_datagrams(self) -> None:
        self._report_due = False
        self.roster.events.emit("datagrams", **self._identity(), count=self.datagrams, bytes=self.datagram_bytes)

    # Link.

    @property
    def attached(self) -> bool:
        """Whether the connection is there."""
        return not self.over

    def new_stream(self, headers: RawHeaders, handler: StreamHandler, *, end_stream: bool) -> QuicStream:
        """Open the stream of a request."""
        if self.over:
            raise StreamLostError("the connection takes no new streams")
        try:
            request = connect_request(headers, end_stream=end_stream)
        except Exception as error:  # pycapnp's own kinds
            raise StreamLostError(f"the request cannot be put into a ConnectRequest: {error}") from error
        response = _Response(handler)
        response.stream = stream = self.open_stream(response)
        stream.write(request)
        if end_stream:
            stream.write_eof()
        return stream

    def read_head(self, headers: RawHeaders) -> Head:
        """Read a ConnectResponse: its error text is the first field, without a name."""
        return Head.of_quic(headers[0][1], headers[1:])

    def push(self, version: int, config: object) -> None:
        """Call updateConfiguration on a stream of its own."""
        if not self.over:
            push = _Push(self, version, json.dumps(config, separators=(",", ":")).encode())
            self.roster.watch(self.loop.create_task(push.run(), name="devedge configuration push"))

    def send_goaway(self) -> None:
        """QUIC has no such word."""

    def close(self) -> None:
        """Close with code 0."""
        self.close_connection(0, "", None)

    def abort(self, reason: str | None = None) -> None:
        """Close with an error."""
        text = reason or "dropped by the dev edge"
        self.close_connection(DROPPED, text, StreamLostError(text))


class _Response:
    """Reads preamble and ConnectResponse, then gets out of the way."""

    __slots__ = ("_data", "_handler", "_head", "stream")

    def __init__(self, handler: StreamHandler) -> None:
        self._handler = handler
        self._data = bytearray()
        self._head = False
        self.stream: QuicStream | None = None

    def on_headers(self, headers: RawHeaders) -> None:
        """QUIC streams have none."""

    def on_data(self, data: bytes) -> None:
        if self._head:
            self._handler.on_data(data)
            return
        self._data += data
        try:
            length = response_length(self._data)
            if length is None or len(self._data) < length:
                return
            error, metadata = decode_connect_response(bytes(self._data[PREAMBLE:length]))
        except WireError as error:
            if self.stream is not None:
                self.stream.reset()
            self._handler.on_reset(StreamLostError(str(error)))
            return
        self._head = True
        rest = bytes(self._data[length:])
        self._data.clear()
        stream = self.stream
        if stream is not None:
            stream.consumed(length)
        self._handler.on_headers([(b"", error), *metadata])
        if rest and stream is not None and stream.handler is not None:
            self._handler.on_data(rest)

    def on_eof(self, trailers: RawHeaders) -> None:
        self._handler.on_eof(trailers)

    def on_reset(self, error: BaseException | None) -> None:
        self._handler.on_reset(error)

    def pause_writing(self) -> None:
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        self._handler.resume_writing()


class RpcCall(RpcBridge):
    """An RPC stream that the edge opens: one call on the connector's CloudflaredServer."""

    def __init__(self, link: QuicLink) -> None:
        super().__init__()
        self._link = link
        self._lost = False

    def on_reset(self, error: BaseException | None) -> None:
        """The stream or the connection is gone."""
        self._lost = True
        super().on_reset(error)

    async def call(self, make: Callable[[Any], Any], read: Callable[[Any], Any]) -> Any:
        """Open the stream, call what `make` makes of the capability, return what `read` finds in the answer."""
        stream = self._link.open_stream(self)
        self.attach(stream)
        stream.write(RPC_SIGNATURE)
        client: Any = None
        server: Any = None
        try:
            client = capnp.TwoPartyClient(await self.open())
            server = client.bootstrap().cast_as(load_schema("tunnelrpc").CloudflaredServer)
            await self.serve()
            async with asyncio.timeout(PUSH_LIMIT):
                return read(await make(server))
        finally:
            server = None  # the last reference: sends the release
            if client is not None:
                client.close()
            self.close()
            stream.write_eof()


class _Push(RpcCall):
    """One configuration push."""

    def __init__(self, link: QuicLink, version: int, config: bytes) -> None:
        super().__init__(link)
        self._version = version
        self._config = config

    async def run(self) -> None:
        """Push, and tell how it went."""
        try:
            applied, refusal = await self.call(
                lambda server: server.updateConfiguration(version=self._version, config=self._config),
                lambda answer: (int(answer.result.latestAppliedVersion), str(answer.result.err)),
            )
        except TimeoutError:
            self._link.configuration_told(self._version, f"no reply within {PUSH_LIMIT:g} s")
        except Exception as error:  # what pycapnp makes of a KjException
            if not self._lost:
                text = str(getattr(error, "description", None) or error)
                self._link.configuration_told(self._version, f"the connector's RPC failed: {text}")
        else:
            told = f"{refusal} (version {applied} stays in force)" if refusal else None
            self._link.configuration_told(self._version, told)


class _PeerRpc:
    """A stream that the connector opens beside its control stream: nothing here wants its calls, so it is refused."""

    __slots__ = ("_stream",)

    def __init__(self, stream: QuicStream) -> None:
        self._stream = stream

    def on_headers(self, headers: RawHeaders) -> None:
        """QUIC streams have none."""

    def on_data(self, data: bytes) -> None:
        self._stream.reset()

    def on_eof(self, trailers: RawHeaders) -> None:
        self._stream.reset()

    def on_reset(self, error: BaseException | None) -> None:
        """It is over."""

    def pause_writing(self) -> None:
        """Nothing is written."""

    def resume_writing(self) -> None:
        """Nothing is written."""
