"""One HTTP exchange: a stream of the edge on one side, an HTTP/1.1 origin connection on the other.

Owns: request framing, both directions of payload, early answers, retries of stale connections, and the end.
In: calls of StreamSink (edge), OriginUser (connection) and ResponseHandler (parser). Out: calls on StreamPort.
Never: chooses the rule or dials.

*Strategy*: no task and no queue; each call passes what it brings straight on. Request bytes that come before the origin
is connected are kept and not acknowledged, so the edge's window bounds them.
"""

from __future__ import annotations

import asyncio
from typing import Final

from connector.errors import ConnectorError, OriginError, OriginProtocolError
from connector.protocol.http1 import (
    CHUNK_END,
    CHUNKED_LINE,
    LAST_CHUNK,
    OwnFields,
    ResponseParser,
    chunk_head,
    content_length_line,
    encode_chunk,
    encode_request_head,
)
from connector.protocol.ports import Buffer, Headers, Request, ResetCode, StreamPort
from connector.proxy import limits
from connector.proxy.exchange import Owner
from connector.proxy.ingress import Rule
from connector.proxy.origins import OriginConnection, OriginPool
from connector.proxy.proxy_protocol import client_address
from connector.proxy.reply import BadRequestError, LengthRequiredError, refuse
from connector.proxy.watch import RequestTrace

# What a client may send again unasked (RFC 9110 section 9.2.2); nothing of a body may have been passed on.
_IDEMPOTENT: Final = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"))
_IDEMPOTENCY_KEYS: Final = frozenset((b"idempotency-key", b"x-idempotency-key"))
# Methods that state `Content-Length: 0`, and methods that usually have no body (Go's client has the same lists).
_STATES_EMPTY: Final = frozenset((b"POST", b"PUT", b"PATCH"))
_LACKS_BODY: Final = frozenset((b"GET", b"HEAD", b"OPTIONS", b"DELETE", b"PROPFIND", b"SEARCH"))


class Route:
    """One rule with an HTTP origin at work: its pool and the header fields that the connector adds."""

    __slots__ = ("absolute", "fields", "introduces", "pool", "rule", "upgrade_fields")

    def __init__(self, rule: Rule, pool: OriginPool, fields: OwnFields) -> None:
        self.rule = rule
        self.introduces = bool(rule.settings.proxy_protocol)
        self.pool = pool
        hop = pool.hop
        self.absolute = b"" if hop is None else hop.absolute
        """What request targets begin with on the way to an HTTP proxy."""
        if hop is not None and hop.authorization:
            fields = fields.plus((b"Proxy-Authorization", hop.authorization))
        self.fields = fields.plus((b"Connection", b"keep-alive"))
        self.upgrade_fields = fields.plus(
            (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), (b"Sec-Websocket-Version", b"13")
        )


# What the request side does.
_DECIDING: Final = 0  # framing is not known yet: probing a GET's body, or buffering for a length
_WAITING: Final = 1  # for a connection
_SENDING: Final = 2
_SENT: Final = 3


class HttpExchange:
    """One request and its response. Call `start` once; then the callbacks run it."""

    __slots__ = ("_body", "_body_sent", "_chunked", "_connection", "_edge_paused", "_eof", "_left", "_origin_full",
                 "_owed", "_owner", "_parser", "_pending", "_pending_size", "_phase", "_reused", "_timer", "aborted",
                 "client", "finished", "port", "request", "route", "rule", "started", "status", "trace",
                 "whole")  # fmt: skip

    upgrade = False

    def __init__(self, owner: Owner, request: Request, port: StreamPort, route: Route) -> None:
        self._owner = owner
        self.request = request
        self.port = port
        self.route = route
        self.rule: Rule | None = route.rule
        self.client = client_address(request.headers) if route.introduces else None
        self.status = 0
        """Status that went to the edge; 0 before."""
        self.whole = False
        """Whether the edge got a whole response (or, after an upgrade, the stream ended by itself)."""
        self.aborted = False
        """Whether the eyeball went away (or its link)."""
        self.started = 0.0
        self.trace: RequestTrace | None = None
        self.finished = False
        self._phase = _WAITING
        self._connection: OriginConnection | None = None
        self._parser: ResponseParser | None = None
        self._pending: list[bytes] = []
        self._body: list[Buffer] = []
        self._pending_size = 0
        self._chunked = False
        self._left = 0
        self._owed = 0
        self._eof = False
        self._edge_paused = False
        self._origin_full = False
        self._body_sent = False
        self._reused = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin: dial, or find out first how the body must be framed."""
        length = self.request.content_length
        if self.upgrade:
            self._acquire()
        elif length >= 0:
            self._left = length
            self._acquire()
        elif self.route.rule.settings.disable_chunked_encoding:
            self._phase = _DECIDING
        else:
            self._chunked = True
            if self.request.method in _LACKS_BODY:
                self._phase = _DECIDING
                self._timer = self._owner.loop.call_later(limits.BODY_PROBE, self._acquire)
            else:
                self._acquire()

    # -- from the edge

    def on_data(self, data: Buffer) -> None:
        """Pass request payload on, or keep it until there is a connection."""
        size = len(data)
        if self._phase == _SENDING:
            if not self._chunked:
                self._left -= size
                if self._left < 0:
                    self._fail(BadRequestError("the request body is longer than its Content-Length"))
                    return
            writes = self._owner.writes
            body = self._body
            body.append(data)
            if not writes.holding:
                self.flush()
            elif len(body) == 1:
                writes.add(self)
            self._body_sent = True
            if self._origin_full:
                self._owed += size
            else:
                self.port.consumed(size)
            if not self._left and not self._chunked:
                self._phase = _SENT
        elif self._phase == _SENT or self.finished:
            self.port.consumed(size)
            if size and not self.finished:
                self._fail(BadRequestError("the request body is longer than its Content-Length"))
        else:
            self._pending.append(bytes(data))
            self._pending_size += size
            if self._phase == _DECIDING:
                self._more_to_decide(size)

    def flush(self) -> None:
        """Write what this read brought of the body; as one chunk, where it is chunked."""
        body = self._body
        connection = self._connection
        if not body or connection is None:
            return
        self._body = []
        if self._chunked:
            body.insert(0, chunk_head(sum(map(len, body))))
            body.append(CHUNK_END)
        if len(body) == 1:
            connection.write(body[0])
        else:
            connection.write_all(body)

    def on_eof(self) -> None:
        """End the request."""
        self._eof = True
        if self.finished:
            return
        if self._phase == _SENDING:
            self._end_request()
        elif self._phase == _DECIDING:
            self._chunked = False
            self._left = self._pending_size
            self._acquire()

    def on_reset(self, error: BaseException | None) -> None:
        """Stop both ways: the eyeball went away, or the link is gone."""
        self.aborted = True
        self._finish()

    def pause_writing(self) -> None:
        """Stop reading the origin."""
        self._edge_paused = True
        if self._connection is not None:
            self._connection.transport.pause_reading()

    def resume_writing(self) -> None:
        """Read the origin again."""
        self._edge_paused = False
        if self._connection is not None:
            self._connection.transport.resume_reading()

    # -- the request side

    def _more_to_decide(self, size: int) -> None:
        """React to body bytes of unknown length: a GET has a body after all, or a buffered body grew."""
        if self._chunked:
            self._acquire()
            return
        self.port.consumed(size)
        if self._pending_size > limits.MAX_BUFFERED_BODY:
            self._fail(
                LengthRequiredError(
                    f"the body has no length and exceeds {limits.MAX_BUFFERED_BODY // 1024} KiB",
                    advice="the rule sets disableChunkedEncoding: the client must send Content-Length",
                )
            )

    def _acquire(self, *, fresh: bool = False) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._phase = _WAITING
        pool = self.route.pool
        # What cannot be asked twice is not given a connection that the origin has closed already.
        careful = self._chunked or self._left > 0 or not self._may_repeat()
        fresh = fresh or self.client is not None
        connection = pool.acquire(self, pool.key_for(self._host(), upgrade=self.upgrade), fresh=fresh, careful=careful)
        if connection is not None:
            self.on_connected(connection)

    def _wait(self) -> None:
        """Note that framing is decided and a connection is to come, for subclasses that get it elsewhere."""
        self._phase = _WAITING

    def _sending(self, *, done: bool) -> None:
        """Note that the head is out; `done` says the whole request is."""
        self._phase = _SENT if done else _SENDING

    @property
    def _sent_all(self) -> bool:
        """Whether the whole request is out."""
        return self._phase == _SENT

    def _host(self) -> bytes:
        settings = self.route.rule.settings
        return settings.http_host_header.encode() or self.request.host or self.route.rule.service.authority.encode()

    def on_connected(self, connection: OriginConnection) -> None:
        """Send the head and what is there of the body."""
        self._connection = connection
        self._reused = connection.uses > 1
        if self._owner.tap is not None:
            self._owner.tap.on_origin(self.port, "reused" if self._reused else "connected")
        request = self.request
        try:
            head = self._encode_head()
        except OriginProtocolError as error:
            # Nothing was written: the connection is as good as before.
            self._connection = None
            if self.client is None:
                connection.pool.release(connection)
            else:
                connection.abort()
            self._fail(BadRequestError(str(error)))
            return
        self._parser = ResponseParser(self, request.method, upgrade=self.upgrade)
        if self._edge_paused:
            connection.transport.pause_reading()
        write = connection.write
        pending = self._pending
        if pending and not self.upgrade:
            self._pending = []
            size = self._pending_size
            self._body_sent = True
            body = b"".join(pending)
            if self._chunked:
                body = encode_chunk(body)
            else:
                self._left -= size
                if self._left < 0:
                    self._fail(BadRequestError("the request body is longer than its Content-Length"))
                    return
            self._phase = _SENDING
            write(head + body)
            if self.request.content_length >= 0 or self._chunked:
                # A body that was buffered for its length is acknowledged already.
                if self._origin_full:
                    self._owed += size
                else:
                    self.port.consumed(size)
        else:
            self._phase = _SENDING
            write(head)
        if self._phase == _SENDING and not self._chunked and not self._left:
            self._phase = _SENT
        elif self._eof and self._phase == _SENDING:
            self._end_request()

    def _encode_head(self) -> bytes:
        request, route = self.request, self.route
        if self.upgrade:
            framing, fields = b"", route.upgrade_fields
        else:
            fields = route.fields
            if self._chunked:
                framing = CHUNKED_LINE
            elif self._left or request.method in _STATES_EMPTY:
                framing = content_length_line(self._left)
            else:
                framing = b""
        host = self._host()
        if route.rule.settings.http_host_header:
            fields = fields.plus((b"X-Forwarded-Host", request.host))
        target = route.absolute + request.target if route.absolute else request.target
        return encode_request_head(request.method, target, host, self._headers(), framing=framing, own=fields)

    def _headers(self) -> Headers:
        """Return the eyeball's header fields as the origin gets them."""
        return self.request.headers

    def _end_request(self) -> None:
        self.flush()
        connection = self._connection
        if connection is None:
            return
        if self._chunked:
            connection.write(LAST_CHUNK)
        elif self._left:
            self._fail(BadRequestError(f"the request body ended {self._left} bytes before its Content-Length"))
            return
        self._phase = _SENT

    def on_dial_failed(self, error: OriginError) -> None:
        """No connection: answer 502."""
        self._fail(error)

    def on_origin_full(self) -> None:
        """Hold the edge's credit back."""
        self._origin_full = True

    def on_origin_ready(self) -> None:
        """Give back the credit that was held."""
        self._origin_full = False
        owed, self._owed = self._owed, 0
        if owed:
            self.port.consumed(owed)

    # -- from the origin

    def on_origin_data(self, data: Buffer) -> None:
        """Parse; the parser calls on_head, on_body and on_complete."""
        parser = self._parser
        assert parser is not None
        try:
            parser.receive_data(data)
        except OriginProtocolError as error:
            self._fail(error)

    def on_origin_eof(self) -> bool:
        """Take the end of the origin's bytes: the end of a response, or a failure. Nothing more is written."""
        parser = self._parser
        assert parser is not None
        try:
            parser.receive_eof()
        except OriginProtocolError as error:
            self._origin_gone(error)
        return False

    def on_origin_lost(self, error: Exception | None) -> None:
        """Take the loss of the connection as an end, or as a failure when it broke."""
        self._connection = None
        parser = self._parser
        assert parser is not None
        if error is None:
            self.on_origin_eof()
            return
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        when = "in the middle of its response" if parser.started else "before it answered"
        cause = "reset" if isinstance(error, ConnectionError) else "timeout" if isinstance(error, TimeoutError) else ""
        self._origin_gone(OriginProtocolError(f"the connection to the origin broke {when}: {text}", cause=cause))

    def _origin_gone(self, error: OriginProtocolError) -> None:
        """Fail, unless this was a reused connection that the origin had given up: then ask once more on a new one."""
        connection, parser = self._connection, self._parser
        if self._reused and parser is not None and not parser.started and self._may_repeat():
            self._connection = self._parser = None
            self._reused = self._origin_full = False
            if connection is not None:
                connection.abort()
            self._acquire(fresh=True)
        else:
            self._fail(error)

    def _may_repeat(self) -> bool:
        """Return whether asking twice does no harm: nothing of a body is gone, and the method promises it."""
        if self._body_sent:
            return False
        if self.request.method in _IDEMPOTENT:
            return True
        return any(name.lower() in _IDEMPOTENCY_KEYS for name, _ in self.request.headers)

    def on_head(self, status: int, headers: Headers) -> None:
        """Answer the edge."""
        self.status = status
        if self.trace is not None:
            self.port.spans = self.trace.answered(status)
        self.port.respond(status, headers)
        self._owner.exchange_answered(self)

    def on_body(self, data: Buffer) -> None:
        """Pass response payload on."""
        self.port.write(data)

    def on_complete(self, trailers: Headers) -> None:
        """End the response; keep the connection if both directions ended cleanly."""
        self.port.write_eof(trailers)
        self.whole = True
        connection, parser = self._connection, self._parser
        self._connection = None
        if connection is not None:
            kept = self.client is None and not self._origin_full and self._phase == _SENT
            if kept and parser is not None and parser.keep_alive:
                if self._edge_paused:
                    connection.transport.resume_reading()
                connection.pool.release(connection)
            else:
                # An origin that answers early does not want the rest (Go's server and client agree on that).
                connection.abort()
        if not self._eof:
            self.port.stop_reading()
        self._finish()

    # -- ends

    def _fail(self, error: ConnectorError) -> None:
        if self.finished:
            return
        sent = refuse(self.port, error, responded=self.status != 0)
        if sent:
            self.status = sent
            self.whole = True
        self._owner.exchange_failed(self, error)
        self._finish()

    def go_away(self) -> bool:
        """Tell the eyeball that this side leaves: a plain request has no way to."""
        return False

    def cancel(self) -> None:
        """End both sides at once: the dispatcher closes."""
        if not self.finished:
            self.port.reset(ResetCode.CANCELLED)
            self._finish()

    def _finish(self) -> None:
        if self.finished:
            return
        self.finished = True
        self._phase = _SENT
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.route.pool.cancel(self)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()
        self._parser = None
        self._pending = []
        self._body = []
        self._owner.exchange_finished(self)
