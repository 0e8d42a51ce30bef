from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from connector.protocol.wake_budget import BURST, JITTER_SECONDS, REFILL_SECONDS, WakeBudget


def test_three_at_once_then_one_every_twenty_seconds() -> None:
    budget, answers = WakeBudget(), []
    for now in (1000.0, 1001.0, 1002.0, 1003.0, 1019.0, 1025.0, 1026.0):
        budget, delay = budget.woken(now=now, random=0.5)
        answers.append(delay)
    half = JITTER_SECONDS / 2
    assert answers == [half, half, half, None, None, half, None]
    budget, delay = budget.woken(now=1e6, random=0.0)
    assert delay == 0.0
    assert budget.tokens == BURST - 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 1, exclude_max=True)), max_size=80))
def test_never_more_than_the_burst_and_the_refill(events: list[tuple[float, float]]) -> None:
    budget, start, now, counted = WakeBudget(), 500.0, 500.0, 0
    for passed, random in events:
        now += passed
        budget, delay = budget.woken(now=now, random=random)
        if delay is not None:
            counted += 1
            assert 0 <= delay < JITTER_SECONDS
        assert counted <= BURST + (now - start) / REFILL_SECONDS + 1e-6
        assert 0 <= budget.tokens <= BURST
