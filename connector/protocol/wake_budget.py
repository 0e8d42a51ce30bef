"""How often a wake-up may cut a wait short, so that a flapping network is no reason for a storm of dials.

Owns: a token bucket and a jitter. In: `now`, `random` in [0, 1). Out: the next state, and how long to wait or None.
Never: knows what a wake-up was about, sleeps, reads a clock.
"""

from __future__ import annotations

from typing import NamedTuple

BURST = 3
"""Wake-ups that count in a row: link, address and route of one network that comes up."""

REFILL_SECONDS = 20.0
"""One more every so often: 3 a minute in the long run, below what the first minute of the plain schedule dials."""

JITTER_SECONDS = 0.3
"""Retries after a wake-up spread over this time: a switch that restarts wakes everybody behind it at once."""


class WakeBudget(NamedTuple):
    """One per process."""

    tokens: float = BURST
    counted_at: float = 0.0
    """When `tokens` was right."""

    def woken(self, *, now: float, random: float) -> tuple[WakeBudget, float | None]:
        """Answer one wake-up: seconds until the waiting connections retry, None to leave their waits alone."""
        tokens = min(BURST, self.tokens + max(0.0, now - self.counted_at) / REFILL_SECONDS)
        if tokens < 1:
            return WakeBudget(tokens, now), None
        return WakeBudget(tokens - 1, now), JITTER_SECONDS * random
