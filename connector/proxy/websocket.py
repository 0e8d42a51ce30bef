"""A WebSocket request to an HTTP origin: the upgrade, then a splice.

Owns: what differs from a plain exchange: no body, and after a 101 raw bytes both ways.
In: calls of StreamSink and OriginUser. Out: a WebSocketSplice, or an ordinary response.
Never: parses WebSocket frames or sends pings (`ws_splice.py` does).
"""

from __future__ import annotations

from collections.abc import Sequence

from connector.errors import ConnectorError, OriginProtocolError
from connector.protocol.ports import Buffer, Headers, Request, ResetCode, StreamPort
from connector.proxy.exchange import Owner
from connector.proxy.http import HttpExchange, Route
from connector.proxy.splice import DrainQueue
from connector.proxy.ws_pings import PingClock
from connector.proxy.ws_splice import KeptAliveSplice, WebSocketSplice


class WebSocketExchange(HttpExchange):
    """One WebSocket. What the edge sends before the origin has answered waits unacknowledged.

    With a `clock` an idle eyeball is pinged.
    """

    __slots__ = ("_clock", "_drains", "_splice")

    upgrade = True

    def __init__(
        self,
        owner: Owner,
        request: Request,
        port: StreamPort,
        route: Route,
        drains: DrainQueue,
        clock: PingClock | None = None,
    ) -> None:
        super().__init__(owner, request, port, route)
        self._drains = drains
        self._clock = clock
        self._splice: WebSocketSplice | None = None

    def on_data(self, data: Buffer) -> None:
        """Pass payload on, or keep it until there is an answer."""
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
        self.aborted = True
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

    def _headers(self) -> Headers:
        accepted = self.route.rule.settings.ws_subprotocols
        return self.request.headers if accepted is None else choose_subprotocol(self.request.headers, accepted)

    def _fail(self, error: ConnectorError) -> None:
        unnamed = self.route.rule.settings.ws_subprotocols is None
        if unnamed and isinstance(error, OriginProtocolError) and len(offered_subprotocols(self.request.headers)) > 1:
            error.advice += (
                "; or the origin wants one subprotocol and the eyeball offers several, which Mosquitto 2.1 answers by "
                "closing: set wsSubprotocols of the rule to the one it takes, such as mqtt"
            )
        super()._fail(error)

    def on_head(self, status: int, headers: Headers) -> None:
        """Answer; a refusal needs nothing more from the edge."""
        super().on_head(status, headers)
        if status != 101:
            self._pending = []
            self.port.stop_reading()

    def on_origin_data(self, data: Buffer) -> None:
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
        if self._clock is None:
            splice = WebSocketSplice(self.port, connection, self._drains, self._done)
        else:
            splice = KeptAliveSplice(self.port, connection, self._drains, self._done, self._clock)
        self._splice = splice
        connection.transport.set_protocol(splice)
        if leftover:
            splice.data_received(leftover)
        if self._pending:
            pending, self._pending = self._pending, []
            splice.on_data(b"".join(pending))
        if self._eof:
            splice.on_eof()

    def _done(self) -> None:
        if not self.finished:
            self.whole = True
            self._finish()

    def go_away(self) -> bool:
        """Say Close 1001 to the eyeball if the frames allow it."""
        return self._splice is not None and not self.finished and self._splice.go_away()

    def cancel(self) -> None:
        """End both sides at once: the dispatcher closes."""
        if self._splice is not None and not self.finished:
            self.port.reset(ResetCode.CANCELLED)
            self._splice.abort()
            self._finish()
        else:
            super().cancel()


def offered_subprotocols(headers: Headers) -> list[bytes]:
    """Return what an eyeball offers, its favourite first."""
    values = [value for name, value in headers if name.lower() == b"sec-websocket-protocol"]
    return [offer for offer in (part.strip() for part in b",".join(values).split(b",")) if offer]


def choose_subprotocol(headers: Headers, accepted: Sequence[str]) -> Headers:
    """Return `headers` with one subprotocol: the first of `accepted` that is offered, as the eyeball spells it.

    With none in common the offer stays as it is, and the origin decides; with nothing accepted it is left out.
    """
    offers = {offer.lower(): offer for offer in reversed(offered_subprotocols(headers))}
    chosen = next((offers[name] for entry in accepted if (name := entry.lower().encode()) in offers), None)
    if not offers or (chosen is None and accepted):
        return headers
    kept = [field for field in headers if field[0].lower() != b"sec-websocket-protocol"]
    return kept if chosen is None else [*kept, (b"sec-websocket-protocol", chosen)]
