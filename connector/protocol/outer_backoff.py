"""The supervisor's back-off: connections that ended with an error wait together and restart together.

Owns: the waiting list, the one shared timer and its schedule (edge-connection section 8.2). In: what happened, `now`,
`random` in [0, 1). Out: the next state and the indices to start. Never: sleeps, reads a clock, draws random numbers.

*Strategy*: a value; the caller arms one timer for `fire_at` and calls `fire` when it is due.
"""

from __future__ import annotations

from typing import NamedTuple

BASE_SECONDS = 10.0
MAX_EXPONENT = 5
"""Caps the schedule at 320 s; cloudflared's own, like the base. Nobody ever gives up."""


class OuterBackoff(NamedTuple):
    """The waiting connections of one process and the shared schedule."""

    counter: int = 0
    waiting: tuple[int, ...] = ()
    fire_at: float | None = None
    """When all of `waiting` restart."""
    calm_at: float | None = None
    """The grace deadline: a failure later than this finds the schedule at its start."""

    @property
    def wait_limit(self) -> float:
        """The longest that the running wait can have been, in seconds."""
        limit: float = BASE_SECONDS * 2**self.counter
        return limit

    def failed(self, conn_index: int, *, now: float, random: float) -> OuterBackoff:
        """Put a connection on the waiting list; arm the timer unless it runs."""
        waiting = self.waiting if conn_index in self.waiting else (*self.waiting, conn_index)
        if self.fire_at is not None:
            return self._replace(waiting=waiting)
        calm = self.calm_at is not None and now > self.calm_at
        counter = min((0 if calm else self.counter) + 1, MAX_EXPONENT)
        return OuterBackoff(
            counter=counter,
            waiting=waiting,
            fire_at=now + BASE_SECONDS * 2**counter * random,
            calm_at=None if calm else self.calm_at,
        )

    def fire(self, now: float) -> tuple[OuterBackoff, tuple[int, ...]]:
        """Give the indices to start now: all, when the time has come, else none."""
        if self.fire_at is None or now < self.fire_at:
            return self, ()
        return self._replace(waiting=(), fire_at=None), self.waiting

    def wake(self) -> tuple[OuterBackoff, tuple[int, ...]]:
        """Restart all at once: the network came back, or somebody asked for it. The schedule goes on."""
        return self._replace(waiting=(), fire_at=None), self.waiting

    def all_connected(self, *, now: float, random: float) -> OuterBackoff:
        """Note that nobody is connecting any more: set the grace deadline. Nothing changes while somebody waits."""
        if self.waiting:
            return self
        return self._replace(calm_at=now + BASE_SECONDS * 2 * 2 ** (self.counter + 1) * random)
