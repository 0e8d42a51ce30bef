"""A visitor's HTTP/1.1 connection: one exchange after another, or one WebSocket.

Owns: one `h11.Connection`, keep-alive, the switch to raw bytes.
In: bytes of the visitor. Out: calls on exchanges; response bytes.
Never: routes or changes headers; parses WebSocket frames.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableSet
from http import HTTPStatus
from typing import Any, cast

import h11

from connector.devedge.connectors import Roster
from connector.devedge.exchange import Exchange
from connector.devedge.streams import RawHeaders

MAX_HEAD = 128 * 1024
"""Bytes of a request head (the real edge: 128 KB in total; h11's default is 16 KiB)."""

IDLE_LIMIT = 75.0
"""Seconds between requests, and for a request head to arrive (nginx: 75 s)."""

LINGER_LIMIT = 5.0
"""Seconds in which the rest of an unwanted request body is read and dropped, so that the response is not lost to a
TCP reset (nginx `lingering_timeout`: 5 s)."""

EARLY_LIMIT = 64 * 1024
"""Bytes that may arrive ahead of their turn (pipelined, or before a 101) before reading stops."""


class H1Visitor(asyncio.Protocol):
    """One connection of a visitor; the visitor of one exchange at a time."""

    def __init__(self, roster: Roster, connections: MutableSet[Any]) -> None:
        self._roster = roster
        self._connections = connections
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._transport: asyncio.Transport | None = None
        self._client = ""
        self._exchange: Exchange | None = None
        self._raw = False  # switched: bytes are WebSocket bytes
        self._discarding = False
        self._chunked = False  # only chunked responses have room for trailers
        self._finishing = False
        self._reading_paused = False
        self._writing_paused = False
        self._unwritten = 0
        self._early = 0
        self._idle: asyncio.TimerHandle | None = None

    def finish(self) -> None:
        """Close after the present response; a WebSocket at once, for it has no end of its own."""
        self._finishing = True
        if self._exchange is None or self._raw:
            self._close()

    # asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A visitor came."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=256 * 1024)
        self._client = transport.get_extra_info("peername")[0]
        self._connections.add(self)
        self._start_idle(IDLE_LIMIT)

    def data_received(self, data: bytes) -> None:
        """Take the visitor's bytes."""
        if self._raw:
            if self._exchange is not None:
                self._exchange.body(data)
            return
        if self._discarding:
            return
        try:
            self._http.receive_data(data)
        except h11.RemoteProtocolError:
            self._close()
            return
        self._advance(len(data))

    def connection_lost(self, exc: Exception | None) -> None:
        """The visitor is gone."""
        self._stop_idle()
        self._connections.discard(self)
        self._transport = None
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.left(clean=exc is None)

    def pause_writing(self) -> None:
        """The visitor's socket is full."""
        self._writing_paused = True

    def resume_writing(self) -> None:
        """The visitor's socket takes more."""
        self._writing_paused = False
        unwritten, self._unwritten = self._unwritten, 0
        if self._exchange is not None:
            self._exchange.accepted(unwritten)

    def _advance(self, arrived: int = 0) -> None:
        """Take events out of h11 until it waits for bytes, for the response, or for the connector."""
        while self._transport is not None and not (self._reading_paused or self._discarding or self._raw):
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                self._bad_request(error)
                return
            if event is h11.NEED_DATA:
                return
            if event is h11.PAUSED:
                self._early += arrived
                if self._early > EARLY_LIMIT:
                    self._transport.pause_reading()
                return
            if isinstance(event, h11.Request):
                self._begin(event)
            elif isinstance(event, h11.Data):
                if self._exchange is not None:
                    self._exchange.body(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                if self._exchange is not None:
                    self._exchange.body_end()
            else:  # ConnectionClosed
                return

    def _begin(self, request: h11.Request) -> None:
        self._stop_idle()
        self._early = 0
        headers = list(request.headers)  # names in lower case
        fields = dict(headers)
        if sum(len(name) + len(value) for name, value in headers) + len(request.target) > MAX_HEAD:
            self._answer(431, b"The request head is larger than 128 KiB.\n")  # h11 bounds unfinished heads only
            return
        target = request.target
        if target[:8].lower().startswith((b"http://", b"https://")):  # absolute form (RFC 9112 3.2.2)
            authority, slash, path = target.partition(b"://")[2].partition(b"/")
            target = slash + path or b"/"
            fields.setdefault(b"host", authority)
        has_body = fields.get(b"content-length", b"0").strip(b"0") != b"" or b"transfer-encoding" in fields
        websocket = (
            request.method == b"GET"
            and not has_body
            and fields.get(b"upgrade", b"").lower() == b"websocket"
            and b"sec-websocket-key" in fields
            and b"upgrade" in [part.strip() for part in fields.get(b"connection", b"").lower().split(b",")]
        )
        if request.method == b"CONNECT":
            self._answer(501, b"CONNECT is not served here.\n")
            return
        if websocket and fields.get(b"sec-websocket-version", b"") != b"13":
            self._answer(426, b"WebSocket version 13 is required.\n", (b"Sec-WebSocket-Version", b"13"))
            return
        if self._http.they_are_waiting_for_100_continue:
            self._send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
        if not has_body:
            self._http.next_event()  # EndOfMessage: there is nothing to wait for
        self._exchange = exchange = Exchange(
            self._roster,
            self,
            method=request.method,
            host=fields.get(b"host", b""),
            target=target,
            headers=headers,
            client=self._client,
            websocket=websocket,
        )
        exchange.start(end_stream=not has_body and not websocket)

    def _answer(self, status: int, body: bytes, *more: tuple[bytes, bytes]) -> None:
        """Answer a request that goes to no connector, and close."""
        headers = [
            (b"Content-Type", b"text/plain; charset=utf-8"),
            (b"Content-Length", str(len(body)).encode()),
            (b"Connection", b"close"),
            *more,
        ]
        try:
            self._send(h11.Response(status_code=status, headers=headers, reason=_reason(status)))
            self._send(h11.Data(data=body))
            self._send(h11.EndOfMessage())
        except h11.LocalProtocolError:
            pass
        self._linger()

    def _bad_request(self, error: h11.RemoteProtocolError) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:  # the body went wrong in the middle
            exchange.left(clean=False)
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._answer(error.error_status_hint, f"bad request: {error}\n".encode())
        else:
            self._close()

    # Visitor.

    def respond(self, status: int, headers: RawHeaders) -> None:
        """Send the head; h11 chooses the framing."""
        self._chunked = not any(name.lower() == b"content-length" for name, _ in headers)
        try:
            self._send(h11.Response(status_code=status, headers=list(headers), reason=_reason(status)))
        except h11.LocalProtocolError:
            self._broken()

    def switch(self, headers: RawHeaders) -> None:
        """Send the 101; from here on bytes are raw."""
        upgrade = [(b"Upgrade", b"websocket"), (b"Connection", b"Upgrade")]
        try:
            self._send(
                h11.InformationalResponse(status_code=101, headers=[*upgrade, *headers], reason=b"Switching Protocols")
            )
        except h11.LocalProtocolError:
            self._broken()
            return
        self._raw = True
        early = self._http.trailing_data[0]
        if self._transport is not None and self._early > EARLY_LIMIT:
            self._transport.resume_reading()
        if early and self._exchange is not None:
            self._exchange.body(early)

    def write(self, data: bytes) -> None:
        """Send payload; its credit waits while the socket is full."""
        if self._transport is None:
            return
        if self._raw:
            self._transport.write(data)
        else:
            try:
                self._send(h11.Data(data=data))
            except h11.LocalProtocolError:
                self._broken()
                return
        if self._writing_paused:
            self._unwritten += len(data)
        elif self._exchange is not None:
            self._exchange.accepted(len(data))

    def write_eof(self, trailers: RawHeaders) -> None:
        """End the response; the connection goes on, lingers or closes."""
        if self._raw:
            self._close()
            return
        try:
            self._send(h11.EndOfMessage(headers=list(trailers) if self._chunked else []))
        except h11.LocalProtocolError:
            self._broken()
            return
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE and not self._finishing:
            self._exchange = None
            self._http.start_next_cycle()
            self._start_idle(IDLE_LIMIT)
            if self._transport is not None:
                self._transport.resume_reading()
                asyncio.get_running_loop().call_soon(self._advance)
        else:
            self._exchange = None
            self._linger()

    def abort(self) -> None:
        """Cut the connection, so that an unfinished response is seen as such."""
        if self._transport is not None:
            self._transport.abort()

    def pause_reading(self) -> None:
        """The connector takes no more of the request."""
        self._reading_paused = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """The connector takes more."""
        self._reading_paused = False
        if self._transport is not None:
            self._transport.resume_reading()
            if not self._raw:
                asyncio.get_running_loop().call_soon(self._advance)

    # Ends.

    def _send(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data and self._transport is not None:
            self._transport.write(data)

    def _broken(self) -> None:
        """The response cannot be put into HTTP/1.1 (bad length, bad header)."""
        exchange, self._exchange = self._exchange, None
        self.abort()
        if exchange is not None:
            exchange.left(clean=False)

    def _linger(self) -> None:
        if self._transport is None:
            return
        if self._http.their_state in (h11.SEND_BODY,):
            self._discarding = True
            self._transport.resume_reading()
            self._start_idle(LINGER_LIMIT)
        else:
            self._close()

    def _close(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.close()  # a second time, asyncio of 3.11.2 forgets what `abort` needs

    def _start_idle(self, limit: float) -> None:
        self._stop_idle()
        self._idle = asyncio.get_running_loop().call_later(limit, self._close)

    def _stop_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None


def _reason(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b"Tunnel error"
