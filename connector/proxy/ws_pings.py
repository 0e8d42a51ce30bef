"""When WebSockets are pinged: one timer for all that share an interval.

Owns: PingClock and the set of them. In: whoever wants to be called. Out: calls of `tick`.
Never: knows what a tick is good for; makes a timer per stream.

*Strategy*: a clock ticks PARTS times in its interval while anybody listens, and each listener counts ticks, so traffic
costs a stream one assignment and no look at the clock. An interval is kept to one part: 40 s means 40 to 45 s.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

PARTS: Final = 8
"""Ticks in an interval."""


class Ticked(Protocol):
    """Who listens to a clock."""

    def tick(self) -> None:
        """One part of the interval has passed."""


class PingClock:
    """One interval, in seconds. `tick` calls may remove listeners."""

    __slots__ = ("_listeners", "_loop", "_timer", "interval")

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self.interval = interval
        self._loop = loop
        self._listeners: dict[Ticked, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._listeners)

    def add(self, listener: Ticked) -> None:
        """Call `listener.tick` from now on."""
        self._listeners[listener] = None
        if self._timer is None:
            self._arm()

    def discard(self, listener: Ticked) -> None:
        """Call it no more."""
        self._listeners.pop(listener, None)
        if not self._listeners and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self._timer = self._loop.call_later(self.interval / PARTS, self._tick)

    def _tick(self) -> None:
        self._timer = None
        for listener in list(self._listeners):
            if listener in self._listeners:
                listener.tick()
        if self._listeners and self._timer is None:
            self._arm()


class PingClocks:
    """All intervals in use. Rules name few; a clock that nobody listens to is let go with its rule."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._clocks: dict[float, PingClock] = {}

    def get(self, interval: float) -> PingClock:
        """Return the clock of an interval."""
        clock = self._clocks.get(interval)
        if clock is None:
            self._clocks = {known: it for known, it in self._clocks.items() if len(it)}
            clock = self._clocks[interval] = PingClock(self._loop, interval)
        return clock
