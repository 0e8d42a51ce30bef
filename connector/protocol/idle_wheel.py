"""One timer wheel for the idle time of all flows.

Owns: which flow may be idle by when. In: flows, `now`. Out: calls of `on_idle`.
Never: reads a clock; is told of single packets: a flow only notes when it was last used.

*Strategy*: a flow lies in the slot of the tick at which it would be idle. Packets do not move it: when its tick comes
and it was used meanwhile, it goes into the slot where it would be idle now. So a packet costs one assignment and a flow
one look per idle time. One timer serves all; without flows there is none.
"""

from __future__ import annotations

from typing import Final, Protocol

TICK: Final = 0.25
"""Seconds of one slot: a flow ends at most that much late. Idle times are seconds to minutes."""

SLOTS: Final = 1024
"""Slots: 256 s, so that the default idle time of 210 s needs one turn. Longer ones are looked at once a turn."""


class Idler(Protocol):
    """What lies in the wheel. `active_at`: when it was last used; `idle`: seconds it may be unused."""

    active_at: float
    idle: float
    slot: int

    def on_idle(self, now: float) -> None:
        """It was unused for too long; it is in the wheel no more."""


class IdleWheel:
    """One per process. After every `add` and `advance` the owner sees to a timer at `next_due`."""

    __slots__ = ("_current", "_next", "_slots", "size")

    def __init__(self, now: float) -> None:
        self.size = 0
        self._current = int(now / TICK)
        self._next = self._current  # no slot before this tick holds anything; exact after `advance`
        self._slots: list[set[Idler]] = [set() for _ in range(SLOTS)]

    def add(self, idler: Idler) -> None:
        """Watch `idler`; its `active_at` is about now."""
        due = self._place(idler)
        if not self.size or due < self._next:
            self._next = due
        self.size += 1

    def remove(self, idler: Idler) -> None:
        """Watch it no more; nothing happens when it is not watched."""
        slot = self._slots[idler.slot]
        if idler in slot:
            slot.discard(idler)
            self.size -= 1

    def advance(self, now: float) -> None:
        """Let time pass: call `on_idle` of what is idle."""
        last = int(now / TICK)
        if last - self._current > SLOTS:
            self._current = last - SLOTS
        while self._current < last:
            self._current += 1
            slot = self._slots[self._current % SLOTS]
            while slot:  # what `on_idle` removes is not met again
                idler = slot.pop()
                if idler.active_at + idler.idle <= now:
                    self.size -= 1
                    idler.on_idle(now)
                else:
                    self._place(idler)
        if self.size:
            self._next = self._current + 1
            while not self._slots[self._next % SLOTS]:
                self._next += 1

    def next_due(self) -> float | None:
        """When `advance` may have something to look at; None while there is nothing."""
        return self._next * TICK if self.size else None

    def _place(self, idler: Idler) -> int:
        """Put it into its slot; return the tick of that."""
        # Rounded up: at that tick it is idle for long enough.
        due = -int(-(idler.active_at + idler.idle) // TICK)
        ahead = min(max(due - self._current, 1), SLOTS - 1)
        idler.slot = (self._current + ahead) % SLOTS
        self._slots[idler.slot].add(idler)
        return self._current + ahead
