"""A connector's connection over QUIC.

Owns: what each stream is for: the control stream, proxied requests, private TCP, RPC (quicrpc.py); datagrams.
In: streams of quicsession.py; calls of `Link`. Out: streams; events.
Never: touches aioquic, or decides about a connection (connectors.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from connector.devedge.connectors import Link, Roster
from connector.devedge.datagrams import DatagramDesk
from connector.devedge.headers import Head
from connector.devedge.quicmessages import (
    DATA_SIGNATURE,
    PREAMBLE,
    VERSION,
    connect_request,
    decode_connect_response,
    encode_connect_request,
    response_length,
)
from connector.devedge.quicrpc import PeerRpc, Push
from connector.devedge.quicsession import Owner, QuicSession, QuicStream
from connector.devedge.streams import RawHeaders, StreamHandler, StreamLostError
from connector.errors import WireError

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
        self.desk: DatagramDesk = DatagramDesk(self)
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
            rpc = PeerRpc(self)
            stream.handler = rpc
            rpc.start(stream)

    def on_datagram(self, data: bytes) -> None:
        """Count it; the event comes at most once a second."""
        self.datagrams += 1
        self.datagram_bytes += len(data)
        self.desk.receive(data)
        for listener in self.datagram_listeners:
            listener(data)
        if not self._report_due:
            self._report_due = True
            self._after(0 if self.datagrams == 1 else DATAGRAM_REPORT, self._report_datagrams)

    def on_lost(self, error: BaseException | None) -> None:
        """Tell the flows and the roster."""
        self.desk.lost()
        self.finish(error)

    def _report_datagrams(self) -> None:
        self._report_due = False
        self.roster.events.emit("datagrams", **self._identity(), count=self.datagrams, bytes=self.datagram_bytes)

    def rpc_over(self, rpc: PeerRpc) -> None:
        """The connector is done with an RPC stream."""
        self.roster.watch(self.loop.create_task(rpc.stop(), name="devedge rpc close"))

    def session_ended(self, session: bytes, message: str) -> None:
        """The connector ended a UDP session."""
        self.desk.session_ended(session, message)
        self.roster.events.emit("udp_session_ended", **self._identity(), session=session.hex(), message=message)

    def open_tcp(self, dest: str, handler: StreamHandler) -> QuicStream:
        """Open a stream to `ip:port` in the connector's network; `on_headers` brings the answer, see `read_head`."""
        response = _Response(handler)
        response.stream = stream = self.open_stream(response)
        stream.write(DATA_SIGNATURE + VERSION + encode_connect_request("tcp", dest.encode(), []))
        return stream

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
            push = Push(self, version, json.dumps(config, separators=(",", ":")).encode())
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
