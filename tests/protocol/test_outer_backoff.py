"""The shared schedule of waiting connections: its table, its grace deadline, and what always holds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connector.protocol.outer_backoff import OuterBackoff

RANDOM = st.floats(0, 1, exclude_max=True)


def test_the_table_of_waits() -> None:
    state, limits, waits = OuterBackoff(), [], []
    for _ in range(8):
        state = state.failed(0, now=1000.0, random=0.5)
        assert state.fire_at is not None
        limits.append(state.wait_limit)
        waits.append(state.fire_at - 1000.0)
        state, due = state.fire(state.fire_at)
        assert due == (0,)
    assert limits == [20, 40, 80, 160, 320, 320, 320, 320]
    assert waits == [limit / 2 for limit in limits]


def test_one_timer_for_all_and_they_restart_together() -> None:
    state = OuterBackoff().failed(2, now=0.0, random=0.5)
    later = state.failed(0, now=5.0, random=0.9).failed(2, now=6.0, random=0.9)
    assert later.fire_at == state.fire_at == 10.0
    assert later.counter == 1
    assert later.fire(9.9) == (later, ())
    done, due = later.fire(10.0)
    assert due == (2, 0)
    assert (done.waiting, done.fire_at) == ((), None)
    assert done.fire(1e9) == (done, ())


def test_a_wake_up_restarts_at_once_and_the_schedule_goes_on() -> None:
    state = OuterBackoff().failed(1, now=0.0, random=0.9)
    state, due = state.wake()
    assert due == (1,)
    assert state.failed(1, now=0.1, random=0.0).counter == 2
    assert OuterBackoff().wake() == (OuterBackoff(), ())


@pytest.mark.parametrize("counter", range(6))
def test_the_grace_deadline(counter: int) -> None:
    state = OuterBackoff(counter=counter).all_connected(now=100.0, random=0.5)
    assert state.calm_at is not None
    assert state.calm_at == 100.0 + 10 * 2 * 2 ** (counter + 1) / 2
    soon = state.failed(0, now=state.calm_at, random=0.5)
    assert soon.counter == min(counter + 1, 5)
    assert soon.calm_at == state.calm_at
    late = state.failed(0, now=state.calm_at + 0.1, random=0.5)
    assert late.counter == 1
    assert late.calm_at is None


def test_no_grace_deadline_while_somebody_waits() -> None:
    state = OuterBackoff().failed(1, now=0.0, random=0.9)
    assert state.all_connected(now=1.0, random=0.5) == state


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["failed", "fire", "wake", "connected"]), st.integers(0, 3), st.floats(0, 500), RANDOM
        )
    )
)
def test_what_always_holds(events: list[tuple[str, int, float, float]]) -> None:
    state, now = OuterBackoff(), 0.0
    for name, index, passed, random in events:
        now += passed
        before = state
        match name:
            case "failed":
                state = state.failed(index, now=now, random=random)
                assert index in state.waiting
                assert state.fire_at is not None
                if before.fire_at is None:
                    assert now <= state.fire_at <= now + state.wait_limit
            case "fire":
                state, due = state.fire(now)
                assert due in {(), before.waiting}
            case "wake":
                state, due = state.wake()
                assert due == before.waiting
            case _:
                state = state.all_connected(now=now, random=random)
        assert (state.fire_at is None) == (not state.waiting)
        assert 0 <= state.counter <= 5
        assert len(set(state.waiting)) == len(state.waiting) <= 4
