"""One request of a rule that offers HTTP/2 to its origin.

Owns: Http2Exchange: what a request and its response are on a stream of an Http2Session.
In: calls of StreamSink (edge), of OriginUser until it is known what the origin speaks, and of its session after that.
Out: calls on StreamPort and on the session. Never: knows frames, settings or other streams.
"""

from __future__ import annotations

from typing import Final

from h2.errors import ErrorCodes
from h2.exceptions import H2Error, ProtocolError

from connector.errors import OriginError, OriginProtocolError
from connector.protocol.http1 import encode_target
from connector.protocol.ports import Buffer, Headers, Request, StreamPort
from connector.proxy import limits
from connector.proxy.exchange import Owner
from connector.proxy.http import HttpExchange, Route
from connector.proxy.http2_origin import Http2Origins, Http2Session
from connector.proxy.origins import OriginConnection
from connector.proxy.reply import BadRequestError

_CONNECTION_FIELDS: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade", b"host", b"content-length")
)
"""Fields that mean nothing over HTTP/2 (RFC 9113 section 8.2.2), or that are made here."""
_STATES_EMPTY: Final = frozenset((b"POST", b"PUT", b"PATCH"))
_UNSAFE: Final = b"\r\n\0"


class Http2Exchange(HttpExchange):
    """One request of a rule that offers HTTP/2; where the origin wants HTTP/1.1, what its base class is."""

    __slots__ = ("_held", "_origins", "_queue", "_session", "_stream", "_trailers", "_unacked")

    def __init__(self, owner: Owner, request: Request, port: StreamPort, route: Route) -> None:
        super().__init__(owner, request, port, route)
        self._origins = Http2Origins.of(route.pool)
        self._session: Http2Session | None = None
        self._stream = 0
        self._queue: list[bytes] = []
        self._held = 0
        """Bytes of the queue that the edge has credit for already."""
        self._unacked = 0
        """Bytes of the response that the origin has no credit for yet."""
        self._trailers: Headers = ()

    # -- getting a session

    def _acquire(self, *, fresh: bool = False) -> None:
        origins = self._origins
        session = None if fresh else origins.usable()
        if session is not None:
            self._stop_probing()
            self._attach(session)
        elif origins.dialler is not None and not origins.plain and not fresh:
            self._stop_probing()
            origins.waiting[self] = None
        else:
            if origins.dialler is None and not origins.plain:
                origins.dialler = self
            super()._acquire(fresh=fresh)

    def look_again(self) -> None:
        """The dial of another is over."""
        self._acquire()

    def _stop_probing(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wait()

    def on_connected(self, connection: OriginConnection) -> None:
        """Take what was negotiated."""
        origins = self._origins
        tls = connection.transport.get_extra_info("ssl_object")
        if connection.uses == 1 and tls is not None and tls.selected_alpn_protocol() == "h2":
            origins.plain = False
            session = Http2Session(connection, origins)
            origins.sessions.append(session)
            self._attach(session)
            if origins.closed:
                session.close_when_idle()
        else:
            origins.plain = True
            super().on_connected(connection)
        if origins.dialler is self:
            origins.dialled()

    def on_dial_failed(self, error: OriginError) -> None:
        """Nobody who waited gets a connection."""
        origins = self._origins
        if origins.dialler is self:
            origins.failed(error)
        super().on_dial_failed(error)

    def _attach(self, session: Http2Session) -> None:
        self._reused = session.served > 0
        if self._owner.tap is not None:
            self._owner.tap.on_origin(self.port, "reused" if self._reused else "connected")
        self._queue, self._pending = [piece for piece in self._pending if piece], []
        size = sum(map(len, self._queue))
        self._held = 0 if self._chunked or self.request.content_length >= 0 else size
        if not self._chunked:
            self._left -= size
        if self._left < 0:
            self._fail(BadRequestError("the request body is longer than its Content-Length"))
            return
        ended = not self._queue and (self._eof if self._chunked else not self._left)
        try:
            headers = self._fields(size)
            self._stream = session.open(self, headers, end=ended)
        except (H2Error, OriginProtocolError) as error:
            self._fail(BadRequestError(f"the request cannot be passed on over HTTP/2: {error}"))
            return
        self._session = session
        self._sending(done=ended)
        self.push()

    def _fields(self, buffered: int) -> list[tuple[bytes, bytes]]:
        """Return the request's head. Errors: ProtocolError."""
        request, own = self.request, self.route.fields
        host = self._host()
        found = [
            (b":method", request.method),
            (b":scheme", b"https"),
            (b":authority", host),
            (b":path", encode_target(request.target)),
        ]
        if self.route.rule.settings.http_host_header:
            own = own.plus((b"X-Forwarded-Host", request.host))
        mine = [(name.lower(), value) for name, value in own.pairs if name.lower() not in _CONNECTION_FIELDS]
        taken = {name for name, _ in mine}
        for name, value in self._headers():
            lower = name.lower()
            if lower in taken or lower in _CONNECTION_FIELDS or (lower == b"te" and value.lower() != b"trailers"):
                continue
            found.append((lower, value))
        length = self._left + buffered
        if not self._chunked and (length or request.method in _STATES_EMPTY):
            found.append((b"content-length", b"%d" % length))
        found += mine
        if any(byte in value for _, value in found for byte in _UNSAFE):
            raise ProtocolError("control characters in a header")
        return found

    # -- from the edge

    def on_data(self, data: Buffer) -> None:
        """Pass request payload on as far as the origin has given credit."""
        if self._session is None:
            super().on_data(data)
            return
        if not self._chunked:
            self._left -= len(data)
            if self._left < 0:
                self._fail(BadRequestError("the request body is longer than its Content-Length"))
                return
        self._queue.append(bytes(data))
        self.push()

    def on_eof(self) -> None:
        """End the request."""
        if self._session is None:
            super().on_eof()
            return
        self._eof = True
        if not self._chunked and self._left and not self.finished:
            self._fail(BadRequestError(f"the request body ended {self._left} bytes before its Content-Length"))
            return
        self.push()

    def pause_writing(self) -> None:
        """Give the origin no more credit."""
        if self._session is None:
            super().pause_writing()
        else:
            self._edge_paused = True

    def resume_writing(self) -> None:
        """Give the origin credit for what the edge has taken."""
        if self._session is None:
            super().resume_writing()
            return
        self._edge_paused = False
        self._credit()

    def push(self) -> None:
        """Send what the origin's windows allow of the queue, then the end."""
        session = self._session
        if session is None or self._sent_all:
            return
        sent = 0
        try:
            while self._queue and (room := session.room(self._stream)) > 0:
                piece = self._queue[0]
                if len(piece) <= room:
                    self._queue.pop(0)
                else:
                    piece, self._queue[0] = piece[:room], piece[room:]
                session.send(self._stream, piece)
                sent += len(piece)
            if not self._queue and (self._eof if self._chunked else not self._left):
                session.send(self._stream, b"", end=True)
                self._sending(done=True)
        except H2Error:
            return  # the stream is over; its event says why
        if sent:
            self._body_sent = True
            credited = min(sent, self._held)
            self._held -= credited
            if sent > credited:
                self.port.consumed(sent - credited)

    # -- from the session

    def on_stream_head(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Answer the edge."""
        status = int(headers[0][1])
        self.on_head(status, headers[1:])

    def on_stream_data(self, data: bytes, size: int) -> None:
        """Pass response payload on."""
        self._unacked += size
        if data:
            self.on_body(data)
        self._credit()

    def _credit(self) -> None:
        if self._session is not None and not self._edge_paused and self._unacked >= limits.HTTP2_STREAM_WINDOW // 2:
            size, self._unacked = self._unacked, 0
            self._session.give_credit(self._stream, size)

    def on_stream_trailers(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Keep them for the end."""
        self._trailers = headers

    def on_stream_end(self) -> None:
        """End the response."""
        self.port.write_eof(self._trailers)
        self.whole = True
        if not self._eof:
            self.port.stop_reading()
        self._finish()

    def on_stream_reset(self, code: int | ErrorCodes | None) -> None:
        """The origin gave the stream up."""
        self._session = None
        if code == ErrorCodes.REFUSED_STREAM and not self.status and not self._body_sent:
            self._acquire(fresh=True)
            return
        name = code.name if isinstance(code, ErrorCodes) else str(code)
        self._fail(OriginProtocolError(f"the origin reset the HTTP/2 stream: {name}", cause="reset"))

    def on_unprocessed(self) -> None:
        """The origin leaves and has not looked at this request (RFC 9113 section 6.8): ask again elsewhere."""
        self.on_stream_reset(ErrorCodes.REFUSED_STREAM)

    def on_session_lost(self, error: OriginProtocolError) -> None:
        """Fail, unless the session was an old one and asking twice does no harm."""
        self._session = None
        if self._reused and not self.status and self._may_repeat():
            self._reused = False
            self._acquire(fresh=True)
        else:
            self._fail(error)

    def _finish(self) -> None:
        if self.finished:
            return
        session, self._session = self._session, None
        self._queue = []
        super()._finish()
        if session is not None:
            session.leave(self._stream)
        origins = self._origins
        origins.waiting.pop(self, None)
        if origins.dialler is self:
            origins.dialled()
