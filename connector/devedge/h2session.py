"""HTTP/2 on an asyncio transport in either role, by the general-purpose `h2` library.

Owns: one `h2.connection.H2Connection` per socket, the send queue of every stream, and both kinds of credit.
In: bytes from the transport; `H2Stream.write` and friends. Out: calls on each stream's `StreamHandler`; bytes.
Never: knows what a request means (connectors.py, eyeball_h2.py), or uses the connector's own HTTP/2 engine.

Strategy: callbacks only, no task per stream; everything that one read caused goes out in one write. Stream credit is
given back by `H2Stream.consumed` alone, connection credit at once: what is unread is bounded per stream
(STREAM_WINDOW), so that one slow reader holds up nobody else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import cast

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
from h2.connection import ConnectionState
from h2.settings import SettingCodes

from connector.devedge.streams import RawHeaders, StreamHandler, StreamLostError
from connector.protocol.ports import LinkTap

STREAM_WINDOW = 256 * 1024
"""Bytes that one stream may hold unread (Go's client: 4 MiB, nginx: 64 KiB); 500 stalled ones hold 128 MB at most."""

CONNECTION_WINDOW = 16 * 1024 * 1024
"""Bytes in flight on one connection; never the bottleneck, because it is given back on arrival."""

MAX_FRAME_SIZE = 64 * 1024
"""Largest DATA frame taken and made: four times the default, for fewer frames in bulk transfers."""

MAX_HEADER_LIST = 1024 * 1024
"""Serialised response headers arrive as one field, so this is generous (cloudflared offers 1 MiB as well)."""

QUEUE_HIGH = 256 * 1024
QUEUE_LOW = 64 * 1024
"""Marks of a stream's send queue: above HIGH its producer is paused, below LOW resumed."""

WRITE_BATCH = 256 * 1024
"""DATA framed before the transport is asked again whether it still takes more."""


class H2Stream:
    """One stream of a session. Its handler is set before any event arrives; calls after its end are no-ops."""

    __slots__ = (
        "_buffer",
        "_eof",
        "_eof_sent",
        "_owed",
        "_paused",
        "_queued",
        "_trailers",
        "handler",
        "id",
        "peer_done",
        "session",
    )

    def __init__(self, session: H2Session, stream_id: int, handler: StreamHandler | None) -> None:
        self.session = session
        self.id = stream_id
        self.handler = handler
        self.peer_done = False
        self._buffer = bytearray()
        self._queued = False  # in the session's ready list
        self._eof = False
        self._eof_sent = False
        self._trailers: RawHeaders = ()
        self._paused = False
        self._owed = 0

    @property
    def closed(self) -> bool:
        """Whether nothing more happens on this stream."""
        return self.handler is None

    @property
    def write_ended(self) -> bool:
        """Whether `write_eof` was called."""
        return self._eof

    def send_headers(self, headers: RawHeaders, *, end_stream: bool = False) -> None:
        """Send a header block now, ahead of queued data of other streams."""
        if self.handler is None:
            return
        self.session.h2.send_headers(self.id, headers, end_stream=end_stream)
        if end_stream:
            self._eof = self._eof_sent = True
            self.session.maybe_forget(self)
        self.session.wake()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue payload (copied)."""
        if self.handler is None or self._eof:
            return
        self._buffer += data
        self.session.make_ready(self)
        if not self._paused and len(self._buffer) > QUEUE_HIGH:
            self._paused = True
            self.handler.pause_writing()

    def write_eof(self, trailers: RawHeaders = ()) -> None:
        """End this side behind everything queued."""
        if self.handler is None or self._eof:
            return
        self._eof = True
        self._trailers = trailers
        self.session.make_ready(self)

    def consumed(self, size: int) -> None:
        """Give receive credit back; sent when half the window has gathered."""
        if self.handler is None or self.peer_done:
            return
        self._owed += size
        if self._owed >= STREAM_WINDOW // 2:
            owed, self._owed = self._owed, 0
            try:
                self.session.h2.increment_flow_control_window(owed, self.id)
            except h2.exceptions.ProtocolError:
                return  # one read brought this data and the end of the stream
            self.session.wake()

    def reset(self, code: h2.errors.ErrorCodes = h2.errors.ErrorCodes.CANCEL) -> None:
        """Give the stream up; queued data is dropped and the handler hears nothing more."""
        if self.handler is None:
            return
        self.session.reset_stream(self, code)

    # For the session only.

    def take(self, window: int) -> tuple[bytes, bool]:
        """Cut the next piece of payload; the flag says whether END_STREAM belongs on it."""
        buffer = self._buffer
        size = min(len(buffer), window, MAX_FRAME_SIZE, self.session.h2.max_outbound_frame_size)
        with memoryview(buffer) as view:
            piece = bytes(view[:size])
        del buffer[:size]
        return piece, self._eof and not buffer and not self._trailers

    def after_take(self, *, ended: bool) -> None:
        """Account for what was just framed."""
        if ended:
            self._eof_sent = True
        if self._paused and len(self._buffer) < QUEUE_LOW and self.handler is not None:
            self._paused = False
            self.handler.resume_writing()

    @property
    def pending(self) -> int:
        """Bytes queued."""
        return len(self._buffer)

    @property
    def wants_flush(self) -> bool:
        """Whether data or an unsent end waits."""
        return bool(self._buffer) or (self._eof and not self._eof_sent)

    @property
    def trailers(self) -> RawHeaders:
        """Trailers to send at the end."""
        return self._trailers

    @property
    def eof_sent(self) -> bool:
        """Whether END_STREAM is out."""
        return self._eof_sent

    @property
    def queued(self) -> bool:
        """Whether the session will visit this stream in its next flush."""
        return self._queued

    @queued.setter
    def queued(self, value: bool) -> None:
        self._queued = value


class H2Session(asyncio.Protocol):
    """One HTTP/2 connection. Subclasses fill in `on_connected`, `on_request`, `on_goaway`, `on_lost`."""

    def __init__(self, *, client: bool) -> None:
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=client, header_encoding=None, validate_inbound_headers=True)
        )
        settings: dict[SettingCodes, int] = {
            SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            SettingCodes.MAX_FRAME_SIZE: MAX_FRAME_SIZE,
            SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST,
        }
        if client:
            settings[SettingCodes.ENABLE_PUSH] = 0
        else:
            settings[SettingCodes.MAX_CONCURRENT_STREAMS] = 1000
            settings[SettingCodes.ENABLE_CONNECT_PROTOCOL] = 1
        self.h2.local_settings = h2.settings.Settings(client=client, initial_values=settings)
        self.h2.decoder.max_header_list_size = MAX_HEADER_LIST
        self.h2.max_inbound_frame_size = MAX_FRAME_SIZE
        self.streams: dict[int, H2Stream] = {}
        self.transport: asyncio.Transport | None = None
        self.loop = asyncio.get_running_loop()
        self.peer_gone_away = False
        self._ready: deque[H2Stream] = deque()
        self._blocked = False
        self._flush_scheduled = False
        self._credit = 0
        self._dispatch: dict[type, Callable[..., None]] = {
            h2.events.DataReceived: self._on_data,
            h2.events.RequestReceived: self._on_request,
            h2.events.ResponseReceived: self._on_response,
            h2.events.TrailersReceived: self._on_trailers,
            h2.events.StreamEnded: self._on_ended,
            h2.events.StreamReset: self._on_reset,
            h2.events.WindowUpdated: self._on_window,
            h2.events.RemoteSettingsChanged: self._on_settings,
            h2.events.ConnectionTerminated: self._on_goaway,
        }
        self._trailers: dict[int, RawHeaders] = {}

    # What subclasses fill in.

    def on_connected(self) -> None:
        """The preface is queued: open streams."""

    def on_request(self, stream: H2Stream, headers: RawHeaders) -> None:
        """Take a new stream of the peer (server role) and set its handler."""

    def on_goaway(self) -> None:
        """The peer takes no new streams."""

    def on_idle(self) -> None:
        """The last stream ended."""

    def on_lost(self, error: BaseException | None) -> None:
        """The connection is gone; every stream heard `on_reset` already."""

    # Calls from outside.

    def open_stream(self, headers: RawHeaders, handler: StreamHandler, *, end_stream: bool = False) -> H2Stream:
        """Open a stream (client role). Raises StreamLostError when the connection cannot take one."""
        if self.transport is None or self.transport.is_closing() or self.peer_gone_away:
            raise StreamLostError("the connection takes no new streams")
        try:
            stream_id = self.h2.get_next_available_stream_id()
            stream = self.streams[stream_id] = H2Stream(self, stream_id, handler)
            stream.send_headers(headers, end_stream=end_stream)
        except h2.exceptions.ProtocolError as error:
            self.streams.pop(stream_id, None)
            raise StreamLostError(f"the request cannot be sent over HTTP/2: {error}") from error
        return stream

    def wake(self) -> None:
        """Flush in this loop turn."""
        if not self._flush_scheduled and self.transport is not None:
            self._flush_scheduled = True
            self.loop.call_soon(self._flush)

    def make_ready(self, stream: H2Stream) -> None:
        """Put a stream with something to send in the line."""
        if not stream.queued:
            stream.queued = True
            self._ready.append(stream)
        self.wake()

    def reset_stream(self, stream: H2Stream, code: h2.errors.ErrorCodes) -> None:
        """Send RST_STREAM and forget the stream."""
        try:
            self.h2.reset_stream(stream.id, code)
        except h2.exceptions.ProtocolError:
            pass  # it ended on the wire already
        self._forget(stream)
        self.wake()

    def send_goaway(self) -> None:
        """Tell the peer that no new streams come, and let the open ones finish (RFC 9113 6.8).

        Not by `h2.close_connection`: after that call h2 refuses to serve the streams that are open.
        """
        if self.transport is not None and not self.transport.is_closing():
            self._flush()
            last = self.h2.highest_inbound_stream_id
            self.transport.write(b"\0\0\x08\x07\0\0\0\0\0" + last.to_bytes(4) + b"\0\0\0\0")

    def close(self) -> None:
        """Send what is framed and close the socket."""
        if self.transport is not None and not self.transport.is_closing():
            self._flush()
            self.transport.close()

    def abort(self) -> None:
        """Drop the socket at once."""
        if self.transport is not None:
            self.transport.abort()

    # asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the preface and settings."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=256 * 1024)
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(CONNECTION_WINDOW - 65535)
        self.on_connected()
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Take bytes of the peer."""
        if self.tap is not None:
            self.tap.on_bytes(False, data)
        self._drain()  # h2 clears its out-buffer when a GOAWAY arrives
        try:
            events = self.h2.receive_data(data)
        except h2.exceptions.ProtocolError as error:
            self._drain()
            self.protocol_failed(f"HTTP/2 protocol error: {error}")
            return
        for event in events:
            handler = self._dispatch.get(type(event))
            if handler is not None:
                handler(event)
        if self._credit >= CONNECTION_WINDOW // 4:
            credit, self._credit = self._credit, 0
            self.h2.increment_flow_control_window(credit)
        self.wake()

    def protocol_failed(self, reason: str) -> None:
        """The peer broke HTTP/2: a GOAWAY is on its way, nothing else can be."""
        self.failure = reason
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()

    failure: str | None = None
    tap: LinkTap | None = None

    def pause_writing(self) -> None:
        """The socket is full."""
        self._blocked = True

    def resume_writing(self) -> None:
        """The socket takes more."""
        self._blocked = False
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every stream, then the owner."""
        self.transport = None
        lost = StreamLostError(self.failure or (f"connection lost: {exc}" if exc else "connection closed"))
        for stream in list(self.streams.values()):
            handler = stream.handler
            self._forget(stream)
            if handler is not None:
                handler.on_reset(lost)
        self._ready.clear()
        self.on_lost(lost if self.failure else exc)

    # Events of h2.

    def _on_data(self, event: h2.events.DataReceived) -> None:
        size = event.flow_controlled_length or 0
        self._credit += size
        stream = self.streams.get(event.stream_id or 0)
        if stream is None or stream.handler is None:
            return
        data = event.data or b""
        padding = size - len(data)
        if padding:
            stream.consumed(padding)
        if data:
            stream.handler.on_data(data)

    def _on_request(self, event: h2.events.RequestReceived) -> None:
        stream_id = event.stream_id or 0
        stream = self.streams[stream_id] = H2Stream(self, stream_id, None)
        self.on_request(stream, cast(RawHeaders, event.headers))

    def _on_response(self, event: h2.events.ResponseReceived) -> None:
        stream = self.streams.get(event.stream_id or 0)
        if stream is not None and stream.handler is not None:
            stream.handler.on_headers(cast(RawHeaders, event.headers))

    def _on_trailers(self, event: h2.events.TrailersReceived) -> None:
        self._trailers[event.stream_id or 0] = cast(RawHeaders, event.headers)

    def _on_ended(self, event: h2.events.StreamEnded) -> None:
        stream = self.streams.get(event.stream_id or 0)
        trailers = self._trailers.pop(event.stream_id or 0, ())
        if stream is None:
            return
        stream.peer_done = True
        handler = stream.handler
        if handler is not None:
            handler.on_eof(trailers)
        self.maybe_forget(stream)

    def _on_reset(self, event: h2.events.StreamReset) -> None:
        stream = self.streams.get(event.stream_id or 0)
        self._trailers.pop(event.stream_id or 0, None)
        if stream is None:
            return
        handler = stream.handler
        self._forget(stream)
        if handler is not None:
            code = int(event.error_code or 0)
            handler.on_reset(StreamLostError(f"reset by the peer, {_code_name(code)}", code))

    def _on_window(self, event: h2.events.WindowUpdated) -> None:
        stream = self.streams.get(event.stream_id or 0)
        if stream is not None and stream.wants_flush:
            self.make_ready(stream)

    def _on_settings(self, event: h2.events.RemoteSettingsChanged) -> None:
        if SettingCodes.INITIAL_WINDOW_SIZE in event.changed_settings:
            for stream in self.streams.values():
                if stream.wants_flush:
                    self.make_ready(stream)

    def _on_goaway(self, event: h2.events.ConnectionTerminated) -> None:
        self.peer_gone_away = True
        if event.error_code:
            self.failure = f"the peer ended the connection, {_code_name(int(event.error_code))}"
        # h2 takes GOAWAY for the end of everything; RFC 9113 6.8 lets open streams finish.
        client = self.h2.config.client_side
        self.h2.state_machine.state = ConnectionState.CLIENT_OPEN if client else ConnectionState.SERVER_OPEN
        self.on_goaway()

    # Sending.

    def maybe_forget(self, stream: H2Stream) -> None:
        """Drop a stream whose both sides ended."""
        if stream.peer_done and stream.eof_sent:
            self._forget(stream)

    def _forget(self, stream: H2Stream) -> None:
        stream.handler = None
        if self.streams.pop(stream.id, None) is not None and not self.streams:
            self.on_idle()

    def _drain(self) -> None:
        data = self.h2.data_to_send()
        if data and self.transport is not None and not self.transport.is_closing():
            if self.tap is not None:
                self.tap.on_bytes(True, data)
            self.transport.write(data)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self.transport is None:
            return
        ready = self._ready
        framed = 0
        while ready and not self._blocked and self.h2.outbound_flow_control_window > 0:
            stream = ready.popleft()
            stream.queued = False
            if stream.handler is None:
                continue
            framed += self._send_some(stream)
            if framed >= WRITE_BATCH:
                framed = 0
                self._drain()
        if ready and not self._blocked:  # the connection window is shut, but an end without data costs none
            for stream in [stream for stream in ready if not stream.pending and stream.handler is not None]:
                ready.remove(stream)
                stream.queued = False
                self._send_some(stream)
        self._drain()

    def _send_some(self, stream: H2Stream) -> int:
        try:
            window = self.h2.local_flow_control_window(stream.id)
            if stream.pending and window <= 0:
                return 0  # WINDOW_UPDATE puts it back in line
            piece, end = stream.take(window)
            if piece or end:
                self.h2.send_data(stream.id, piece, end_stream=end)
            if not end and not stream.pending and stream.write_ended and not stream.eof_sent:
                self.h2.send_headers(stream.id, stream.trailers, end_stream=True)
                end = True
        except h2.exceptions.ProtocolError as error:  # the stream or connection ended under our feet
            handler = stream.handler
            self.reset_stream(stream, h2.errors.ErrorCodes.INTERNAL_ERROR)
            if handler is not None:
                handler.on_reset(StreamLostError(f"cannot send: {error}"))
            return 0
        stream.after_take(ended=end)
        self.maybe_forget(stream)
        if stream.handler is not None and stream.wants_flush:
            self.make_ready(stream)
        return len(piece)


def _code_name(code: int) -> str:
    try:
        return h2.errors.ErrorCodes(code).name
    except ValueError:
        return f"error {code:#x}"
