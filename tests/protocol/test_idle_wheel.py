"""The timer wheel: nothing ends early, everything ends within a tick, removed things never."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from connector.protocol.idle_wheel import SLOTS, TICK, IdleWheel


class Thing:
    def __init__(self, now: float, idle: float) -> None:
        self.active_at = now
        self.idle = idle
        self.slot = 0
        self.ended: float | None = None

    def on_idle(self, now: float) -> None:
        assert self.ended is None
        self.ended = now


def drive(wheel: IdleWheel, until: float) -> float:
    """Advance as a timer would."""
    now = 0.0
    while (due := wheel.next_due()) is not None and due <= until:
        assert due > now - TICK
        now = due
        wheel.advance(now)
    return now


def test_an_empty_wheel_has_no_timer() -> None:
    wheel = IdleWheel(5.0)
    assert wheel.next_due() is None
    wheel.advance(1e9)
    assert wheel.next_due() is None


@given(st.lists(st.floats(0.001, 5000), min_size=1, max_size=20), st.floats(0, 1e6))
def test_everything_ends_once_and_in_time(idles: list[float], start: float) -> None:
    wheel = IdleWheel(start)
    things = [Thing(start, idle) for idle in idles]
    for thing in things:
        wheel.add(thing)
    drive(wheel, start + 6000)
    for thing in things:
        assert thing.ended is not None
        assert thing.idle - 1e-6 <= thing.ended - start <= thing.idle + 2 * TICK
    assert wheel.size == 0
    assert wheel.next_due() is None


def test_use_postpones_the_end_without_being_told() -> None:
    wheel = IdleWheel(0.0)
    thing = Thing(0.0, 10.0)
    wheel.add(thing)
    thing.active_at = 9.0
    assert drive(wheel, 12.0) == 10.0  # looked at, and left alone
    assert thing.ended is None
    drive(wheel, 100.0)
    assert thing.ended == 19.0


def test_removed_things_do_not_end() -> None:
    wheel = IdleWheel(0.0)
    first, second = Thing(0.0, 1.0), Thing(0.0, 1.0)
    wheel.add(first)
    wheel.add(second)
    wheel.remove(first)
    wheel.remove(first)
    drive(wheel, 10.0)
    assert (first.ended, second.ended, wheel.size) == (None, 1.0, 0)


def test_an_end_may_remove_and_add() -> None:
    wheel = IdleWheel(0.0)

    class Killer(Thing):
        def on_idle(self, now: float) -> None:
            super().on_idle(now)
            for each in list(victims):
                wheel.remove(each)
            wheel.add(late)

    victims = [Thing(0.0, 1.0) for _ in range(5)]
    late = Thing(1.0, 1.0)
    for thing in [*victims, Killer(0.0, 0.9)]:
        wheel.add(thing)
    drive(wheel, 10.0)
    assert late.ended == 2.0
    assert all(each.ended in {None, 1.0} for each in victims)
    assert wheel.size == 0


def test_a_loop_that_stood_still_loses_nothing() -> None:
    wheel = IdleWheel(0.0)
    things = [Thing(0.0, float(idle)) for idle in range(1, 300)]
    for thing in things:
        wheel.add(thing)
    wheel.advance(SLOTS * TICK * 10)
    assert all(thing.ended for thing in things)
    assert wheel.size == 0
