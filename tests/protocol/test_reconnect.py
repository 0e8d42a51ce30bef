"""Every kind of failure, in every phase of the schedule, before and after the first registration."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.errors import (
    ConfigError,
    DuplicateConnectionError,
    EdgeDialError,
    EdgeLostError,
    EdgeTlsError,
    ProtocolError,
    RegistrationError,
    UnauthorizedError,
)
from connector.protocol.reconnect import (
    HOPELESS,
    LOST_WAIT,
    MAX_WAIT,
    Action,
    Decision,
    Failure,
    RetryPolicy,
    RetryState,
    classify,
)

ERRORS: dict[Failure, list[BaseException]] = {
    Failure.DIAL: [EdgeDialError("refused"), EdgeTlsError("untrusted")],
    Failure.DUPLICATE: [DuplicateConnectionError("already connected to this server, trying another address")],
    Failure.UNAUTHORIZED: [
        UnauthorizedError("Unauthorized: Tunnel not found"),
        UnauthorizedError("x", should_retry=True),
    ],
    Failure.REFUSED_FOR_NOW: [RegistrationError("try later", should_retry=True)],
    Failure.REFUSED: [RegistrationError("account suspended"), RegistrationError("no answer within 5 s")],
    Failure.LOST: [EdgeLostError("connection with edge closed"), ProtocolError("bad frame")],
    Failure.INTERNAL: [RuntimeError("bug"), ConfigError("not ours"), KeyError("k")],
}
EVERY = [(failure, error) for failure, errors in ERRORS.items() for error in errors]


def decide(
    error: BaseException, state: RetryState | None = None, *, random: float = 0.5, ever: bool = False, retries: int = 5
) -> Decision:
    return RetryPolicy(retries).decide(state or RetryState(0), error, now=100.0, random=random, ever_registered=ever)


def test_every_failure_has_an_example() -> None:
    assert set(ERRORS) == set(Failure)


@pytest.mark.parametrize(("failure", "error"), EVERY)
def test_errors_are_classified_by_class(failure: Failure, error: BaseException) -> None:
    assert classify(error) is failure


@pytest.mark.parametrize(("failure", "ever", "conn_index"), list(itertools.product(Failure, [False, True], [0, 3])))
def test_what_ends_the_process_and_what_rotates(failure: Failure, ever: bool, conn_index: int) -> None:
    for error in ERRORS[failure]:
        decision = decide(error, RetryState(conn_index), ever=ever)
        if failure in HOPELESS:
            assert decision.action is (Action.WAIT_TOGETHER if ever else Action.END_PROCESS)
        else:
            assert decision.action is Action.RETRY
        assert decision.rotate is (failure in {Failure.DIAL, Failure.DUPLICATE})
        assert decision.failure is failure
        assert decision.state.conn_index == conn_index


@pytest.mark.parametrize(("failure", "error"), EVERY)
def test_waits_double_up_to_the_cap_and_stay(failure: Failure, error: BaseException) -> None:
    state, limits, counters = RetryState(1), [], []
    for _ in range(8):
        decision = decide(error, state, ever=True)
        state = decision.state
        limits.append(decision.wait_limit)
        counters.append(state.counter)
    assert limits == [2, 4, 8, 16, 32, 32, 32, 32]
    assert counters == [1, 2, 3, 4, 5, 5, 5, 5]
    assert state.previous_attempts == 5
    assert decide(error, state.registered(), ever=True).wait_limit == (LOST_WAIT if failure is Failure.LOST else 2)


def test_registration_starts_the_schedule_over() -> None:
    assert RetryState(2, 5).registered() == RetryState(2, 0, was_registered=True)
    assert RetryState(2, 5).started_over() == RetryState(2, 0)


def test_only_the_first_wait_after_a_registered_link_was_lost_is_short() -> None:
    first = decide(EdgeLostError("x"), RetryState(2, 5).registered(), ever=True)
    second = decide(EdgeLostError("x"), first.state, ever=True)
    assert (first.wait_limit, second.wait_limit) == (LOST_WAIT, 4)
    assert decide(EdgeLostError("x"), RetryState(2), ever=True).wait_limit == 2


@given(
    counter=st.integers(0, 400),
    retries=st.integers(-3, 500),
    random=st.floats(0, 1, exclude_max=True),
    now=st.floats(0, 1e9),
    error=st.sampled_from([error for _, error in EVERY]),
    ever=st.booleans(),
)
def test_the_wait_lies_in_its_bounds(
    counter: int, retries: int, random: float, now: float, error: BaseException, ever: bool
) -> None:
    decision = RetryPolicy(retries).decide(RetryState(0, counter), error, now=now, random=random, ever_registered=ever)
    assert 0 <= decision.wait <= decision.wait_limit <= 2 * MAX_WAIT
    assert decision.wait < decision.wait_limit
    assert decision.retry_at == now + decision.wait
    assert 0 <= decision.state.counter <= max(retries, 0)
    assert 0 <= decision.state.previous_attempts <= 255


@pytest.mark.parametrize("kind", [RegistrationError, UnauthorizedError, DuplicateConnectionError])
def test_the_edges_retry_after_comes_before_the_wait(kind: type[RegistrationError]) -> None:
    late = decide(kind("later", should_retry=True, retry_after=90.0), random=0.5)
    assert (late.wait, late.wait_limit) == (91.0, 92.0)
    soon = decide(kind("soon", should_retry=True, retry_after=0.5), random=0.75)
    assert (soon.wait, soon.wait_limit) == (2.0, 2.5)
    assert decide(kind("never", should_retry=True, retry_after=1e12), random=0.0).wait == MAX_WAIT
    assert decide(kind("past", should_retry=True, retry_after=-5.0), random=0.0).wait == 0.0


def test_the_ends_of_the_random_range() -> None:
    assert decide(EdgeDialError("x"), random=0.0).wait == 0.0
    assert decide(EdgeDialError("x"), RetryState(0, 4), random=0.999).wait == pytest.approx(31.968)


def test_no_retries_means_one_second_at_most() -> None:
    assert decide(EdgeLostError("x"), retries=0, ever=True).wait_limit == 1.0


def test_states_are_values() -> None:
    state = RetryState(0)
    decide(EdgeDialError("x"), state)
    assert state == RetryState(0)
