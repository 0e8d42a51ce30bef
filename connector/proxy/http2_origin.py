"""HTTP/2 to origins (`http2Origin`): many exchanges on one connection, flow-controlled both ways, with trailers.

Owns: Http2Origins (the sessions of one rule), Http2Session (one connection on the library h2).
In: Http2Exchange, the requests of rules that offer HTTP/2 in TLS. Out: calls of theirs; frames to the origin.
Never: offers HTTP/2 to WebSockets, to `matchSNItoHost` or PROXY protocol rules (a connection then belongs to one name
or eyeball); dials by itself.

*Strategy*: the first request dials, the others wait for what it negotiates: HTTP/2, and they join it; HTTP/1.1, and
each goes its own way, as do all later ones. Credit goes back to the edge when a byte is in a DATA frame, and to the
origin when the edge takes more, so that nothing between them grows. The library ends a connection with GOAWAY at once,
where RFC 9113 section 6.8 lets streams finish; so it gets frame by frame and is put back into service after that one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, cast

from h2.config import H2Configuration
from h2.connection import ConnectionState, H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import H2Error, ProtocolError
from h2.settings import SettingCodes, Settings

from connector.errors import OriginError, OriginProtocolError
from connector.proxy import limits
from connector.proxy.origins import OriginConnection, OriginPool

if TYPE_CHECKING:
    from connector.proxy.http2_exchange import Http2Exchange

_HEADER: Final = 9
"""Bytes of a frame's header."""


class Http2Origins:
    """The HTTP/2 side of one rule's pool: its sessions, and who waits for the first dial."""

    def __init__(self, pool: OriginPool) -> None:
        self.pool = pool
        self.sessions: list[Http2Session] = []
        self.plain = False
        """The origin chose HTTP/1.1 the last time: nobody waits for another's dial."""
        self.dialler: Http2Exchange | None = None
        self.waiting: dict[Http2Exchange, None] = {}
        self.closed = False

    @classmethod
    def of(cls, pool: OriginPool) -> Http2Origins:
        """Return the one that belongs to a pool."""
        if pool.http2 is None:
            pool.http2 = cls(pool)
        return cast("Http2Origins", pool.http2)

    def usable(self) -> Http2Session | None:
        """Return a session with room for one more stream."""
        return next((session for session in self.sessions if session.has_room), None)

    def dialled(self) -> None:
        """The dial that others waited for is over: let them look again."""
        self.dialler = None
        waiting, self.waiting = self.waiting, {}
        for exchange in waiting:
            exchange.look_again()

    def failed(self, error: OriginError) -> None:
        """The dial that others waited for failed: theirs would, too."""
        self.dialler = None
        waiting, self.waiting = self.waiting, {}
        for exchange in waiting:
            exchange.on_dial_failed(error)

    def close(self) -> None:
        """End idle sessions, and the others with their last stream."""
        self.closed = True
        for session in list(self.sessions):
            session.close_when_idle()


class Http2Session(asyncio.Protocol):
    """One HTTP/2 connection to an origin; takes the transport over from the pool's OriginConnection."""

    def __init__(self, connection: OriginConnection, origins: Http2Origins) -> None:
        self._connection = connection
        self._origins = origins
        self._transport = connection.transport
        self._loop = asyncio.get_running_loop()
        self._h2 = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        self._h2.local_settings = Settings(
            client=True,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: limits.HTTP2_STREAM_WINDOW,
                SettingCodes.MAX_HEADER_LIST_SIZE: limits.HTTP2_HEADER_LIST,
            },
        )
        self._streams: dict[int, Http2Exchange] = {}
        self._inbox = bytearray()
        self._credit = 0
        self._full = False
        self._leaving = False
        self._flushing = False
        self._timer: asyncio.TimerHandle | None = None
        self.served = 0
        """Streams that were ever opened."""
        connection.user = None
        self._transport.set_protocol(self)
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(limits.HTTP2_CONNECTION_WINDOW - 65_535)
        self._flush()

    @property
    def has_room(self) -> bool:
        """Whether one more stream may be opened."""
        most = min(self._h2.remote_settings.max_concurrent_streams, limits.HTTP2_STREAMS)
        return not self._leaving and not self._transport.is_closing() and len(self._streams) < most

    # -- for exchanges

    def open(self, exchange: Http2Exchange, headers: list[tuple[bytes, bytes]], *, end: bool) -> int:
        """Open a stream and return its ID. Errors: ProtocolError for fields that HTTP/2 refuses."""
        stream = self._h2.get_next_available_stream_id()
        self._h2.send_headers(stream, headers, end_stream=end)
        self._streams[stream] = exchange
        self.served += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._flush()
        return stream

    def room(self, stream: int) -> int:
        """Return how many bytes of payload a stream may send now."""
        if self._full or stream not in self._streams:
            return 0
        return min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size)

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Send payload within `room`, or the end."""
        self._h2.send_data(stream, data, end_stream=end)
        self._flush()

    def give_credit(self, stream: int, size: int) -> None:
        """Let the origin send `size` bytes more on a stream."""
        try:
            self._h2.increment_flow_control_window(size, stream)
        except H2Error:
            return  # it ended meanwhile
        self._flush()

    def leave(self, stream: int, code: ErrorCodes = ErrorCodes.CANCEL) -> None:
        """Forget a stream; if it is not over for both sides, reset it."""
        if self._streams.pop(stream, None) is None:
            return
        try:
            self._h2.reset_stream(stream, code)
        except H2Error:
            pass  # it is over
        self._flush()
        self._idle()

    def close_when_idle(self) -> None:
        """Take nothing new; end with the last stream."""
        self._leaving = True
        self._forget()
        self._idle()

    # -- from the transport

    def data_received(self, data: bytes) -> None:
        """Give frames to the library one by one, and what they mean to exchanges."""
        self._inbox += data
        try:
            while len(self._inbox) >= _HEADER:
                size = _HEADER + int.from_bytes(self._inbox[:3], "big")
                if len(self._inbox) < size <= _HEADER + self._h2.max_inbound_frame_size:
                    break
                frame = bytes(self._inbox[:size])
                del self._inbox[:size]
                for event in self._h2.receive_data(frame):
                    self._on_event(event)
        except ProtocolError as error:
            self._write()
            self._end(OriginProtocolError(f"the origin broke HTTP/2: {error or type(error).__name__}"))
            return
        self._flush()

    def eof_received(self) -> bool:
        """The origin ends the connection; `connection_lost` follows."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """Tell everybody."""
        text = getattr(error, "strerror", None) or str(error or "") or "closed by the origin"
        self._end(OriginProtocolError(f"the HTTP/2 connection to the origin ended: {text}", cause="reset"))
        self._connection.pool.lost(self._connection)

    def pause_writing(self) -> None:
        """Hold every stream's payload back."""
        self._full = True

    def resume_writing(self) -> None:
        """Go on."""
        self._full = False
        self._push_all()

    # -- inside

    def _on_event(self, event: Event) -> None:
        if isinstance(event, DataReceived):
            size = event.flow_controlled_length or 0
            self._credit += size
            if self._credit >= limits.HTTP2_CONNECTION_WINDOW // 2:
                self._h2.increment_flow_control_window(self._credit)
                self._credit = 0
            if (exchange := self._streams.get(event.stream_id)) is not None:
                exchange.on_stream_data(event.data or b"", size)
        elif isinstance(event, ResponseReceived):
            if (exchange := self._streams.get(event.stream_id)) is not None:
                exchange.on_stream_head(event.headers)
        elif isinstance(event, TrailersReceived):
            if (exchange := self._streams.get(event.stream_id)) is not None:
                exchange.on_stream_trailers(event.headers)
        elif isinstance(event, StreamEnded):
            if (exchange := self._streams.get(event.stream_id)) is not None:
                exchange.on_stream_end()
        elif isinstance(event, StreamReset):
            if (exchange := self._streams.pop(event.stream_id, None)) is not None:
                exchange.on_stream_reset(event.error_code)
                self._idle()
        elif isinstance(event, WindowUpdated) and event.stream_id:
            if (exchange := self._streams.get(event.stream_id)) is not None:
                exchange.push()
        elif isinstance(event, (WindowUpdated, RemoteSettingsChanged)):
            self._push_all()
        elif isinstance(event, ConnectionTerminated):
            self._on_goaway(event)

    def _on_goaway(self, event: ConnectionTerminated) -> None:
        self._h2.state_machine.state = ConnectionState.CLIENT_OPEN
        self._leaving = True
        self._forget()
        last = event.last_stream_id or 0
        for stream in [stream for stream in self._streams if stream > last]:
            self._streams.pop(stream).on_unprocessed()
        self._idle()

    def _push_all(self) -> None:
        for exchange in list(self._streams.values()):
            exchange.push()

    def _flush(self) -> None:
        """Write what the library has, once per turn of the loop."""
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._write)

    def _write(self) -> None:
        self._flushing = False
        data = self._h2.data_to_send()
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def _idle(self) -> None:
        """Without streams: end now, or after keepAliveTimeout."""
        if self._streams or self._transport.is_closing():
            return
        if self._leaving:
            self._close()
        elif self._timer is None and self._origins.pool.settings.keep_alive_timeout > 0:
            self._timer = self._loop.call_later(self._origins.pool.settings.keep_alive_timeout, self.close_when_idle)

    def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            self._h2.close_connection()
        except H2Error:
            pass
        self._write()
        self._connection.close()

    def _forget(self) -> None:
        if self in self._origins.sessions:
            self._origins.sessions.remove(self)

    def _end(self, error: OriginProtocolError) -> None:
        self._leaving = True
        self._forget()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        streams, self._streams = self._streams, {}
        for exchange in streams.values():
            exchange.on_session_lost(error)
        self._transport.abort()
