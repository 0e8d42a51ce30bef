"""One visitor's request on its way through a connector and back.

Owns: the choice of tunnel and link, the request's ray, the error pages, the count of bytes, and the end of both sides.
In: calls of a `Visitor` (eyeball_h1.py, eyeball_h2.py) and of the connector's stream. Out: calls on both; events.
Never: buffers payload. What one side does not take, the other is told not to send.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
from typing import Protocol

from connector.devedge.connectors import Link, Roster
from connector.devedge.headers import request_headers, websocket_accept
from connector.devedge.management import HOSTS as MANAGEMENT_HOSTS
from connector.devedge.management import ManagementError
from connector.devedge.streams import RawHeaders, Stream, StreamLostError
from connector.errors import WireError
from connector.protocol.ports import Request, RequestKind, StreamTap

HEAD_LIMIT = 100.0
"""Seconds after the last byte of the request until the response head must be there (the real edge: 100 s, then 524)."""

LEAVE_LIMIT = 10.0
"""Seconds that the origin has to end a WebSocket after its visitor closed."""


class Visitor(Protocol):
    """The visitor's side of one exchange. No call may raise.

    For each `write(data)` the visitor calls `Exchange.accepted(len(data))` once its socket took the data.
    """

    def respond(self, status: int, headers: RawHeaders) -> None:
        """Send the head."""

    def switch(self, headers: RawHeaders) -> None:
        """Accept the WebSocket: raw bytes follow both ways."""

    def write(self, data: bytes) -> None:
        """Send payload."""

    def write_eof(self, trailers: RawHeaders) -> None:
        """End the response."""

    def abort(self) -> None:
        """End the response so that the visitor sees that it is cut off."""

    def pause_reading(self) -> None:
        """The connector takes no more of the request."""

    def resume_reading(self) -> None:
        """The connector takes more."""


class Exchange:
    """One request. Made, then `start`ed; then the visitor calls `body`, `body_end`, `left`, `accepted`."""

    def __init__(
        self,
        roster: Roster,
        visitor: Visitor,
        *,
        method: bytes,
        host: bytes,
        target: bytes,
        headers: RawHeaders,
        client: str,
        websocket: bool,
        make_key: bool = False,
    ) -> None:
        self._roster = roster
        self._visitor: Visitor | None = visitor
        self._method = method
        self._host = host
        self._target = target
        self._headers = headers
        self._client = client
        self._websocket = websocket
        self._key = base64.b64encode(secrets.token_bytes(16)) if make_key else b""
        self.ray = secrets.token_hex(8) + "-DEV"
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._last = self._started
        self._up = 0
        self._down = 0
        self._link: Link | None = None
        self._upstream: Stream | None = None
        self._head_sent = False
        self._streaming = False  # payload of the connector goes to the visitor
        self._request_ended = False
        self._response_ended = False
        self._finished = False
        self._timer: asyncio.TimerHandle | None = None
        self._tap: StreamTap | None = None
        self._early: list[bytes] | None = None  # body that comes before a delayed stream is opened
        self._credit_due = 0.0  # when a slow edge has taken everything so far

    def start(self, *, end_stream: bool) -> None:
        """Route the request and open its stream, or answer with a page."""
        host = host_name(self._host)
        self._request_ended = end_stream
        self._roster.events.emit(
            "request",
            ray=self.ray,
            kind="websocket" if self._websocket else "http",
            method=self._method.decode("latin-1"),
            host=self._host.decode("latin-1"),
            path=self._target.partition(b"?")[0].decode("latin-1"),
            client=self._client,
        )
        desk = self._roster.management
        if desk is not None and host in MANAGEMENT_HOSTS:
            try:
                link = desk.route(self._roster, self._target)
            except ManagementError as error:
                self._page(error.status, str(error.status), f"{error}.", error.advice)
                return
            self._open(link, end_stream=end_stream)
            return
        tunnel = self._roster.directory.by_host(host)
        if tunnel is None:
            known = ", ".join(self._roster.directory.hostnames)
            self._page(
                530,
                "1016",
                f"The dev edge knows no tunnel for host {host!r}.",
                f"Known hosts: {known}. Declare it with --ingress {host or 'HOST'}=SERVICE, or under `hostnames` of a"
                " tunnel in --config.",
            )
            return
        picked = self._roster.pick(tunnel)
        if picked is None:
            self._page(
                530,
                "1033",
                f"Tunnel {tunnel.name!r} has no connector attached to the dev edge.",
                f"Print its token with `connector edge token {tunnel.name}` and start a connector with it.",
            )
            return
        if self._roster.tap is not None:
            self._tap = self._roster.tap.open_exchange(self._as_request(end_stream=end_stream), picked.tap)
        delay = self._roster.faults.delay
        if not delay:
            self._open(picked, end_stream=end_stream)
            return
        self._early = []
        if self._visitor is not None and not end_stream:
            self._visitor.pause_reading()
        self._timer = self._loop.call_later(delay, self._open_late, picked, end_stream)

    def _as_request(self, *, end_stream: bool) -> Request:
        kind = RequestKind.WEBSOCKET if self._websocket else RequestKind.HTTP
        headers = [(b"cf-connecting-ip", self._client.encode()), (b"cf-ray", self.ray.encode()), *self._headers]
        return Request(kind, self._method, self._target, self._host, headers, 0 if end_stream else -1)

    def _open_late(self, link: Link, end_stream: bool) -> None:
        """Open the stream of a request that a fault delayed, and send what came meanwhile."""
        early, self._early = self._early or [], None
        visitor = self._visitor
        if self._finished or visitor is None:
            return
        if not link.attached:
            self._page(502, "502", "The connector's link was lost while the request was delayed.", "Try again.")
            return
        self._open(link, end_stream=end_stream)
        upstream = self._upstream
        if upstream is not None and not end_stream:
            for data in early:
                upstream.write(data)
            if self._request_ended:
                upstream.write_eof()
            visitor.resume_reading()

    def _open(self, link: Link, *, end_stream: bool) -> None:
        headers = request_headers(
            self._method,
            self._host,
            self._target,
            self._headers,
            ray=self.ray,
            client=self._client,
            websocket=self._websocket,
        )
        if self._key:
            headers.append((b"sec-websocket-key", self._key))
        try:
            self._upstream = link.open_request(headers, self, end_stream=end_stream)
        except StreamLostError as error:
            self._page(502, "502", f"The dev edge could not send the request to the connector: {error}.", "Try again.")
            return
        self._link = link
        if self._tap is not None:
            for text in self._roster.faults.on_requests(link.protocol):
                self._tap.mark(f"fault {text}")
        self._timer = self._loop.call_later(HEAD_LIMIT, self._head_late)
        if self._roster.faults.take_request():
            self._loop.call_soon(self._reset_by_fault)

    def _reset_by_fault(self) -> None:
        if not self._finished:
            self._page(
                502,
                "502",
                f"The dev edge reset the stream, as the fault {self._roster.faults.text('reset')} demands.",
                "Switch the fault off.",
            )

    # From the visitor.

    def body(self, data: bytes) -> None:
        """Payload of the request."""
        if self._early is not None and not self._request_ended:
            self._up += len(data)
            self._early.append(bytes(data))
            return
        if self._upstream is None or self._request_ended:
            return
        if self._tap is not None:
            self._tap.on_payload(0, data)
        self._up += len(data)
        self._last = self._loop.time()
        self._upstream.write(data)

    def body_end(self) -> None:
        """End of the request."""
        if self._request_ended:
            return
        self._request_ended = True
        if self._tap is not None:
            self._tap.on_eof(0)
        if self._upstream is not None:
            self._upstream.write_eof()
        self._maybe_finish()

    def left(self, *, clean: bool) -> None:
        """The visitor left: `clean` when it closed, not clean when it reset."""
        self._visitor = None
        if self._finished:
            return
        if self._upstream is not None and self._websocket and clean:
            self._streaming = False
            self.body_end()
            if not self._finished:
                self._restart_timer(LEAVE_LIMIT, self._linger_over)
            return
        self._cancel("visitor", "it left" if clean else "its connection broke")

    def _linger_over(self) -> None:
        self._cancel("visitor", f"and the origin did not end it within {LEAVE_LIMIT:g} s")

    def accepted(self, size: int) -> None:
        """The visitor's socket took `size` bytes of the response."""
        upstream = self._upstream
        if upstream is None:
            return
        rate = self._roster.faults.rate
        if rate:
            self._credit_due = max(self._loop.time(), self._credit_due) + size / rate
            self._loop.call_at(self._credit_due, upstream.consumed, size)
        else:
            upstream.consumed(size)

    # From the connector's stream.

    def on_headers(self, raw: RawHeaders) -> None:
        """The response head."""
        self._stop_timer()
        if self._visitor is None or self._link is None:
            return
        try:
            head = self._link.read_head(raw)
        except WireError as error:
            self._give_up(f"The connector sent a response that the dev edge does not understand: {error}.")
            return
        if head.from_connector:
            what = "has reached its limit of flows" if head.flow_limited else "could not get an answer from the origin"
            trouble = f"\nIt says: {head.trouble}" if head.trouble else ""
            self._page(
                502,
                "502",
                f"The connector {what} (hop: connector to origin).{trouble}",
                "Check that the origin service runs, and the connector's log.",
                source="connector",
            )
            return
        if self._tap is not None:
            self._tap.on_head(head.status, head.end_to_end(), "origin")
        accept = head.get(b"sec-websocket-accept")
        if head.switched and self._websocket:
            if self._key and accept != websocket_accept(self._key):
                self._give_up("The origin answered the WebSocket handshake with a wrong Sec-WebSocket-Accept.")
                return
            drop = frozenset((b"content-length",)) | (
                frozenset((b"sec-websocket-accept",)) if self._key else frozenset()
            )
            self._started_response(200 if self._key else 101)
            self._visitor.switch([*head.end_to_end(drop=drop), (b"Cf-Ray", self.ray.encode())])
            self._watch_idle()
            return
        if head.status < 200:
            self._give_up(f"The connector answered status {head.status} to a request that is no WebSocket.")
            return
        if self._websocket:  # refused: an ordinary response, and nothing more to send
            self._websocket = False
            self.body_end()
        self._started_response(head.status)
        self._visitor.respond(head.status, [*head.end_to_end(), (b"Cf-Ray", self.ray.encode())])

    def on_data(self, data: bytes) -> None:
        """Payload of the response."""
        if self._tap is not None:
            self._tap.on_payload(1, data)
        self._down += len(data)
        self._last = self._loop.time()
        if self._streaming and self._visitor is not None:
            self._visitor.write(data)
        elif self._upstream is not None:
            self._upstream.consumed(len(data))

    def on_eof(self, trailers: RawHeaders) -> None:
        """End of the response."""
        if self._tap is not None:
            self._tap.on_eof(1)
        self._response_ended = True
        if not self._head_sent and self._visitor is not None:
            self._give_up("The connector ended the response without a head.")
            return
        if self._streaming and self._visitor is not None:
            self._streaming = False
            self._visitor.write_eof([(name, value) for name, value in trailers if not name.startswith(b":")])
        self._maybe_finish()

    def on_reset(self, error: BaseException | None) -> None:
        """The connector reset the stream, or its link is gone."""
        self._upstream = None
        if self._tap is not None:
            lost = isinstance(error, StreamLostError) and error.code is None
            self._tap.end("link lost" if lost else "reset by the connector", str(error))
        if self._finished:
            return
        if not self._head_sent:
            self._page(
                502,
                "502",
                f"The connector gave the request up: {error} (hop: dev edge to connector).",
                "Check that the connector runs, and its log.",
            )
            return
        if self._streaming and self._visitor is not None:
            self._visitor.abort()
        self._finish()

    def pause_writing(self) -> None:
        """The connector takes no more for now."""
        if self._visitor is not None:
            self._visitor.pause_reading()

    def resume_writing(self) -> None:
        """The connector takes more."""
        if self._visitor is not None:
            self._visitor.resume_reading()

    # Ends.

    def _started_response(self, status: int) -> None:
        self._head_sent = True
        self._streaming = True
        self._roster.events.emit("response", ray=self.ray, status=status)

    def _page(self, status: int, code: str, what: str, advice: str, *, source: str = "edge") -> None:
        """Answer with a text page of the edge's own; `source`: who had to give up."""
        if self._tap is not None:
            if not self._head_sent:
                self._tap.on_head(status, (), source)
            how = "reset by the edge" if source == "edge" and self._upstream is not None else "complete"
            self._tap.end(how, what.replace("\n", " ").rstrip("."))
        visitor = self._visitor
        if visitor is not None and not self._head_sent:
            self._head_sent = True
            self._roster.events.emit("response", ray=self.ray, status=status)
            body = f"error {code}\n\n{what}\n{advice}\n\nray {self.ray}\n".encode()
            visitor.respond(
                status,
                [
                    (b"Content-Type", b"text/plain; charset=utf-8"),
                    (b"Content-Length", str(len(body)).encode()),
                    (b"Cache-Control", b"no-store"),
                    (b"Server", b"connector-dev-edge"),
                    (b"Cf-Ray", self.ray.encode()),
                ],
            )
            if self._method != b"HEAD":
                visitor.write(body)
            visitor.write_eof(())
        self._streaming = False
        self._response_ended = True
        if self._upstream is not None:
            self._upstream.reset()
            self._upstream = None
        self._finish()

    def _give_up(self, what: str) -> None:
        self._page(502, "502", what, "This is a fault of the connector or of the origin behind it.")

    def _cancel(self, how: str = "reset by the edge", error: str = "") -> None:
        if self._tap is not None:
            self._tap.end(how, error)
        if self._upstream is not None:
            self._upstream.reset()
            self._upstream = None
        self._finish()

    def _head_late(self) -> None:
        left = self._last + HEAD_LIMIT - self._loop.time()
        if left > 0:  # the request is still on its way: its last byte counts
            self._restart_timer(left, self._head_late)
            return
        self._page(
            524,
            "524",
            f"No response came through the connector within {HEAD_LIMIT:g} s (hop: origin).",
            "The origin took the request and is too slow.",
        )

    def _watch_idle(self) -> None:
        limit = self._roster.faults.idle_cut
        if limit is None:
            return
        left = self._last + limit - self._loop.time()
        if left > 0:
            self._restart_timer(left, self._watch_idle)
            return
        if self._visitor is not None:
            self._visitor.abort()
        self._cancel(error=f"idle for {limit:g} s, which the fault idle-cut:{limit:g} allows")

    def _maybe_finish(self) -> None:
        if not self._response_ended or self._finished:
            return
        if self._request_ended:
            self._finish()
        elif not self._websocket:  # the origin answered before it had read everything: the rest is not wanted
            self._cancel("complete")

    def _finish(self) -> None:
        if self._finished:
            return
        self._finished = True
        if self._tap is not None:
            self._tap.end("complete" if self._response_ended and self._request_ended else "reset by the edge")
        self._stop_timer()
        if self._link is not None:
            self._link.request_done()
            self._link = None
        self._roster.events.emit(
            "stream_closed",
            ray=self.ray,
            bytes_up=self._up,
            bytes_down=self._down,
            ms=round((self._loop.time() - self._started) * 1000),
        )

    def _restart_timer(self, delay: float, call: object) -> None:
        self._stop_timer()
        self._timer = self._loop.call_later(delay, call)  # type: ignore[arg-type]

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def host_name(host: bytes) -> str:
    """The name in a Host field: lower case, without port, brackets and final dot."""
    text = host.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].rstrip(".")
