"""What a load sees of a connector's connection, whichever transport carries it.

Owns: the interfaces between links and loads.
In, Out: nothing. Never: behaviour.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

Fields = Sequence[tuple[bytes, bytes]]
"""A request's fields as HTTP/2 has them, pseudo fields first. One object for all requests of a kind: links encode it
once and put a `cf-ray` of its own into each."""

BULK = bytes(range(256)) * 256
"""What uploads consist of."""


class StreamUser(Protocol):
    """Who opened a stream."""

    def on_head(self, ok: bool) -> None:
        """The response head is here; `ok`: status 200, of a WebSocket 101 where the transport has it."""

    def on_data(self, data: bytes, start: int, stop: int) -> None:
        """Payload: `data[start:stop]`. Its credit is given back already."""

    def on_end(self) -> None:
        """The connector ended the stream."""

    def on_reset(self) -> None:
        """The connector reset the stream, or the link is gone."""


class LoadStream(Protocol):
    """One stream."""

    def send(self, data: bytes, *, end: bool = False) -> None:
        """Send one small message; windows are the connector's affair (it must give credit in time)."""

    def send_bulk(self, size: int) -> None:
        """Send so many bytes and the end, as windows and socket allow."""

    def end(self) -> None:
        """End this side."""


class LoadLink(Protocol):
    """One connection. `now`: the time of the last read; `features`: what the connector announced; `room`: how
    many streams it lets the edge have open beside the control stream."""

    protocol: str
    loop: asyncio.AbstractEventLoop
    now: float
    features: list[str]
    room: int

    def open(self, fields: Fields, user: StreamUser, *, end: bool = False) -> LoadStream:
        """Open a stream."""

    def close(self) -> None:
        """End the connection in order."""

    def abort(self) -> None:
        """End it at once."""
