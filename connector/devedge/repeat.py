"""A request that no visitor sent: one of the inspector's, sent again through the edge.

Owns: the visitor's side of it. In: the parts of a request. Out: an Exchange that runs; the answer goes nowhere but to
whoever looks on. Never: opens a socket.
"""

from __future__ import annotations

from connector.devedge.connectors import Roster
from connector.devedge.exchange import Exchange
from connector.devedge.streams import RawHeaders


class _Nobody:
    """A visitor that takes everything at once and keeps nothing."""

    def __init__(self) -> None:
        self.exchange: Exchange | None = None

    def respond(self, status: int, headers: RawHeaders) -> None:
        """Ignore."""

    def switch(self, headers: RawHeaders) -> None:
        """Ignore."""

    def write(self, data: bytes) -> None:
        """Ignore."""
        if self.exchange is not None:
            self.exchange.accepted(len(data))

    def write_eof(self, trailers: RawHeaders) -> None:
        """Ignore."""

    def abort(self) -> None:
        """Ignore."""

    def pause_reading(self) -> None:
        """There is nothing to pause: the body is sent at once."""

    def resume_reading(self) -> None:
        """Ignore."""


def repeat(roster: Roster, method: bytes, host: bytes, target: bytes, headers: RawHeaders, body: bytes) -> str:
    """Send a request to the connector that is next; return its ray."""
    visitor = _Nobody()
    kept = [(name, value) for name, value in headers if name.lower() not in {b"cf-ray", b"cf-connecting-ip"}]
    exchange = visitor.exchange = Exchange(
        roster, visitor, method=method, host=host, target=target, headers=kept, client="127.0.0.1", websocket=False
    )
    exchange.start(end_stream=not body)
    if body:
        exchange.body(body)
        exchange.body_end()
    return exchange.ray
