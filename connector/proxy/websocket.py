"""A WebSocket request to an HTTP origin: the upgrade, then a splice.

Owns: what differs from a plain exchange: no body, and after a 101 raw bytes both ways.
In: calls of StreamSink and OriginUser. Out: a Splice, or an ordinary response.
Never: parses WebSocket frames or sends pings.
"""

from __future__ import annotations

from connector.protocol.ports import Buffer, Headers, Request, ResetCode, StreamPort
from connector.proxy.http import HttpExchange, Owner, Route
from connector.proxy.splice import DrainQueue, Splice


class WebSocketExchange(HttpExchange):
    """One WebSocket. What the edge sends before the origin has answered waits unacknowledged."""

    __slots__ = ("_drains", "_splice")

    upgrade = True

    def __init__(self, owner: Owner, request: Request, port: StreamPort, route: Route, drains: DrainQueue) -> None:
        super().__init__(owner, request, port, route)
        self._drains = drains
        self._splice: Splice | None = None

    def on_data(self, data: Buffer) -> None:
        """Pass payload on."""
        splice = self._splice
        if splice is not None:
            splice.on_data(data)
        elif self.finished or self.status:
            # Refused: an ordinary response is on its way.
            self.port.consumed(len(data))
        else:
            self._pending.append(bytes(data))
            self._pending_size += len(data)

    def on_eof(self) -> None:
        """End the edge's direction."""
        self._eof = True
        if self._splice is not None:
            self._splice.on_eof()

    def on_reset(self, error: BaseException | None) -> None:
        """Drop the origin connection."""
        if self._splice is not None:
            self._splice.abort()
        self._finish()

    def pause_writing(self) -> None:
        """Stop reading the origin."""
        if self._splice is not None:
            self._splice.pause_reading()
        else:
            super().pause_writing()

    def resume_writing(self) -> None:
        """Read the origin again."""
        if self._splice is not None:
            self._splice.resume_reading()
        else:
            super().resume_writing()

    def on_head(self, status: int, headers: Headers) -> None:
        """Answer; a refusal needs nothing more from the edge."""
        super().on_head(status, headers)
        if status != 101:
            self._pending = []
            self.port.stop_reading()

    def on_origin_data(self, data: bytes) -> None:
        """Parse the answer to the upgrade, and switch over on 101."""
        super().on_origin_data(data)
        parser = self._parser
        if parser is not None and parser.upgraded:
            self._switch(parser.leftover)

    def _switch(self, leftover: bytes) -> None:
        connection = self._connection
        assert connection is not None
        connection.user = None
        self._connection = self._parser = None
        splice = self._splice = Splice(self.port, connection, self._drains, self._done)
        connection.transport.set_protocol(splice)
        if leftover:
            self.port.write(leftover)
        if self._pending:
            pending, self._pending = self._pending, []
            splice.on_data(b"".join(pending))
        if self._eof:
            splice.on_eof()

    def _done(self) -> None:
        if not self.finished:
            self.whole = True
            self._finish()

    def cancel(self) -> None:
        """End both sides at once: the dispatcher closes."""
        if self._splice is not None and not self.finished:
            self.port.reset(ResetCode.CANCELLED)
            self._splice.abort()
            self._finish()
        else:
            super().cancel()
