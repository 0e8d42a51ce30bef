"""Gives streams up from which the edge takes nothing for too long (`--write-stream-timeout`).

Owns: one timer per link, and what each waiting stream had sent when it last moved. In: an engine's streams.
Out: streams that end with a StalledWriteError. Never: looks at a stream with nothing waiting; runs without the flag.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from connector.errors import ConnectorError, Scope

LOOKS: Final = 4
"""Looks per timeout: a stream ends a quarter of it late at most."""

SHORTEST_LOOK: Final = 0.05
"""Seconds between two looks at least."""


class StalledWriteError(ConnectorError):
    """The edge takes nothing of what a stream has for it."""

    scope = Scope.STREAM


class Stallable(Protocol):
    """An engine with streams."""

    def waiting(self) -> list[tuple[int, int]]:
        """Return the streams with payload that waits for the edge, and how much of each has left so far."""

    def give_up(self, stream_id: int, error: Exception) -> None:
        """End a stream both ways and tell its sink."""


class WriteTimeout:
    """One per link."""

    def __init__(
        self, engine: Stallable, seconds: float, wake: Callable[[], None], on_timeout: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._seconds = seconds
        self._wake = wake
        self._on_timeout = on_timeout
        self._seen: dict[int, tuple[int, float]] = {}
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(max(seconds / LOOKS, SHORTEST_LOOK), self._look)

    def stop(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _look(self) -> None:
        self._timer = self._loop.call_later(max(self._seconds / LOOKS, SHORTEST_LOOK), self._look)
        now = self._loop.time()
        before, self._seen = self._seen, {}
        for stream_id, sent in self._engine.waiting():
            at, since = before.get(stream_id, (-1, now))
            if at != sent:
                since = now
            elif now - since >= self._seconds:
                self._engine.give_up(stream_id, StalledWriteError(f"the edge took nothing for {self._seconds:g} s"))
                self._on_timeout()
                self._wake()
                continue
            self._seen[stream_id] = (sent, since)
