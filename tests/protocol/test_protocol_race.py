"""The race between QUIC and HTTP/2, the verdict on QUIC, its probes, the way back, and the reasons in words."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connector.protocol.protocol_choice import Selector, Transport
from connector.protocol.protocol_race import (
    BLOCKED_AFTER,
    HEAD_START,
    LOSSES_LIMIT,
    LOSSES_WINDOW,
    MAX_PROBE_SECONDS,
    MAX_SETTLE_SECONDS,
    PROBE_SECONDS,
    RETURN_SECONDS,
    SAME_EVENT,
    SETTLE_SECONDS,
    STALL_SECONDS,
    Command,
    DialPlan,
    Leg,
    Order,
    PathStatus,
    QuicPath,
    Race,
    Reason,
    explain,
    start_race,
)

QUIC, HTTP2 = Transport.QUIC, Transport.HTTP2
AUTO = Selector(QUIC, HTTP2)


def command(order: Order, transport: Transport) -> Command:
    return Command(order, transport)


# -- the race ----------------------------------------------------------------------------------------------------------


def begin() -> Race:
    race, commands = start_race(100.0)
    assert commands == (command(Order.DIAL, QUIC),)
    assert race.next_timeout() == 100.0 + HEAD_START
    return race


def joined() -> Race:
    race, commands = begin().timed_out(100.0 + HEAD_START)
    assert commands == (command(Order.DIAL, HTTP2),)
    assert race.next_timeout() is None
    return race


def test_quic_alone_when_it_is_up_within_the_head_start() -> None:
    race, commands = begin().heard(QUIC, 100.05)
    assert commands == ()
    race, commands = race.up(QUIC)
    assert commands == (command(Order.USE, QUIC),)
    assert (race.over, race.winner, race.http2) == (True, QUIC, Leg.WAITING)
    assert race.next_timeout() is None
    assert race.timed_out(1e9) == (race, ())


def test_http2_joins_after_300_ms_of_silence() -> None:
    assert begin().timed_out(100.0 + HEAD_START - 0.001) == (begin(), ())
    assert HEAD_START == 0.3
    race, commands = joined().up(HTTP2)
    assert commands == (command(Order.USE, HTTP2), command(Order.CALL_OFF, QUIC))
    assert not race.quic_heard


def test_quic_that_comes_up_first_after_all_wins() -> None:
    race, commands = joined().up(QUIC)
    assert commands == (command(Order.USE, QUIC), command(Order.CALL_OFF, HTTP2))
    assert race.winner is QUIC


def test_an_answer_gives_quic_the_time_of_its_handshake_but_not_for_ever() -> None:
    race, _ = begin().heard(QUIC, 100.2)
    assert race.next_timeout() == 100.0 + STALL_SECONDS
    assert race.timed_out(101.0) == (race, ())
    race, commands = race.timed_out(100.0 + STALL_SECONDS)
    assert commands == (command(Order.DIAL, HTTP2),)
    race, _ = race.up(HTTP2)
    assert race.quic_heard


def test_a_late_answer_does_not_stop_http2() -> None:
    race, commands = joined().heard(QUIC, 100.4)
    assert commands == ()
    assert race.next_timeout() is None
    assert race.quic is Leg.HEARD


def test_http2_joins_at_once_when_quic_fails() -> None:
    race, commands = begin().failed(QUIC)
    assert commands == (command(Order.DIAL, HTTP2),)
    race, commands = race.up(HTTP2)
    assert commands == (command(Order.USE, HTTP2),)


@pytest.mark.parametrize("order", [(QUIC, HTTP2), (HTTP2, QUIC)])
def test_when_both_fail_http2_tells_why(order: tuple[Transport, Transport]) -> None:
    race, commands = joined().failed(order[0])
    assert commands == ()
    race, commands = race.failed(order[1])
    assert commands == (command(Order.GIVE_UP, HTTP2),)
    assert (race.over, race.winner) == (True, None)


def test_when_both_fail_and_quic_was_answered_quic_tells_why() -> None:
    race, _ = joined().heard(QUIC, 100.4)
    race, _ = race.failed(HTTP2)
    race, commands = race.failed(QUIC)
    assert commands == (command(Order.GIVE_UP, QUIC),)


def test_a_link_that_comes_up_after_the_race_is_called_off() -> None:
    race, _ = joined().up(HTTP2)
    assert race.up(QUIC) == (race, (command(Order.CALL_OFF, QUIC),))
    assert race.up(HTTP2) == (race, ())
    assert race.failed(QUIC) == (race, ())
    assert race.heard(QUIC, 1e9) == (race, ())


STEPS = st.lists(
    st.tuples(st.sampled_from(["heard", "up", "failed", "timed out"]), st.sampled_from(Transport), st.floats(0, 2)),
    max_size=12,
)


@settings(deadline=None)
@given(STEPS)
def test_any_race(steps: list[tuple[str, Transport, float]]) -> None:
    race, commands = start_race(0.0)
    now, dialled, ended = 0.0, {QUIC}, False
    for step, transport, passed in steps:
        now += passed
        if step != "timed out" and transport not in dialled:
            continue  # no news from a dial that was never made
        match step:
            case "heard":
                race, commands = race.heard(transport, now)
            case "up":
                race, commands = race.up(transport)
            case "failed":
                race, commands = race.failed(transport)
            case _:
                race, commands = race.timed_out(now)
        for order, about in commands:
            match order:
                case Order.DIAL:
                    assert not ended
                    assert about not in dialled
                    dialled.add(about)
                case Order.USE | Order.GIVE_UP:
                    assert not ended
                    ended = True
                    assert (race.winner is about) == (order is Order.USE)
                case Order.CALL_OFF:
                    assert ended
                    assert about is not race.winner
                    assert about in dialled
        assert ended == race.over
        assert race.over == (
            race.next_timeout() is None and (race.winner is not None or {race.quic, race.http2} == {Leg.FAILED})
        )
        if not race.over and HTTP2 not in dialled:
            at = race.next_timeout()
            assert at is not None
            assert at <= STALL_SECONDS or at <= now  # QUIC is never waited for longer


# -- reasons -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "facts", "reason"),
    [
        (QUIC, {"up": True, "closed_by_edge": True}, Reason.EDGE_CLOSED),
        (QUIC, {"up": True}, Reason.PATH_LOST),
        (HTTP2, {"up": True, "closed_by_edge": True}, Reason.EDGE_CLOSED),
        (HTTP2, {"up": True}, Reason.PATH_LOST),
        (QUIC, {"other_up": True}, Reason.UDP_BLOCKED),
        (QUIC, {}, Reason.UNREACHABLE),
        (HTTP2, {"other_up": True}, Reason.UNREACHABLE),
        (HTTP2, {}, Reason.UNREACHABLE),
        (QUIC, {"heard": True, "other_up": True}, Reason.HANDSHAKE),
        (HTTP2, {"heard": True}, Reason.HANDSHAKE),
        (QUIC, {"forbidden": True}, Reason.UDP_FORBIDDEN),
        (HTTP2, {"forbidden": True}, Reason.UNREACHABLE),
    ],
)
def test_reasons(transport: Transport, facts: dict[str, bool], reason: Reason) -> None:
    names = ("up", "heard", "closed_by_edge", "forbidden", "other_up")
    assert explain(transport, **{name: facts.get(name, False) for name in names}) is reason


def test_reasons_in_words() -> None:
    assert Reason.UDP_BLOCKED.text() == "UDP 7844 blocked"
    assert Reason.UDP_BLOCKED.text(443) == "UDP 443 blocked"
    assert Reason.PATH_LOST.text() == "path lost"
    assert Reason.EDGE_CLOSED.text() == "edge closed"
    assert len({reason.text() for reason in Reason}) == len(Reason)


# -- the verdict -------------------------------------------------------------------------------------------------------


def blocked(now: float = 0.0, random: float = 1.0) -> QuicPath:
    path = QuicPath()
    for _ in range(BLOCKED_AFTER):
        path = path.missed(Reason.UDP_BLOCKED, http2_up=True, now=now, random=random)
    assert path.status is PathStatus.BLOCKED
    return path


@pytest.mark.parametrize(
    ("selector", "status", "plan"),
    [
        (AUTO, PathStatus.UNKNOWN, DialPlan.RACE),
        (AUTO, PathStatus.WORKING, DialPlan.RACE),
        (AUTO, PathStatus.SETTLING, DialPlan.RACE),
        (AUTO, PathStatus.BLOCKED, DialPlan.HTTP2),
        (Selector(QUIC), PathStatus.BLOCKED, DialPlan.QUIC),
        (Selector(HTTP2), PathStatus.WORKING, DialPlan.HTTP2),
        (Selector(HTTP2, HTTP2), PathStatus.UNKNOWN, DialPlan.HTTP2),
        (Selector(HTTP2, HTTP2, guessed=True), PathStatus.UNKNOWN, DialPlan.RACE),
        (Selector(HTTP2, HTTP2, guessed=True), PathStatus.BLOCKED, DialPlan.HTTP2),
    ],
)
def test_dial_plans(selector: Selector, status: PathStatus, plan: DialPlan) -> None:
    assert QuicPath(status=status).plan(selector) is plan


def test_while_http2_fails_too_quic_gets_its_chance() -> None:
    auto = Selector(Transport.QUIC, Transport.HTTP2)
    path = QuicPath(PathStatus.BLOCKED)
    assert path.http2_dialled(False).plan(auto) is DialPlan.HTTP2
    both = path.http2_dialled(False).http2_dialled(False)
    assert both.plan(auto) is DialPlan.RACE
    assert both.http2_dialled(True).plan(auto) is DialPlan.HTTP2
    assert both.plan(Selector(Transport.HTTP2)) is DialPlan.HTTP2
    assert both.answered(5.0).http2_misses == 0
    assert QuicPath().http2_dialled(False) == QuicPath()


def test_two_misses_block_and_one_does_not() -> None:
    path = QuicPath().missed(Reason.UDP_BLOCKED, http2_up=True, now=0.0, random=0.0)
    assert path.status is PathStatus.UNKNOWN
    assert path.answered(1.0).misses == 0
    path = path.missed(Reason.UDP_BLOCKED, http2_up=True, now=0.0, random=0.0)
    assert (path.status, path.reason) == (PathStatus.BLOCKED, Reason.UDP_BLOCKED)


def test_without_http2_silence_says_nothing() -> None:
    path = QuicPath()
    for _ in range(10):
        path = path.missed(Reason.UNREACHABLE, http2_up=False, now=0.0, random=0.0)
    assert path == QuicPath()


def test_a_forbidden_port_blocks_at_once() -> None:
    path = QuicPath().missed(Reason.UDP_FORBIDDEN, http2_up=False, now=0.0, random=0.0)
    assert (path.status, path.reason) == (PathStatus.BLOCKED, Reason.UDP_FORBIDDEN)


def test_lost_paths_block_when_they_repeat() -> None:
    path = QuicPath().answered(0.0)
    for count in range(LOSSES_LIMIT):
        assert path.status is PathStatus.WORKING
        path = path.lost(Reason.PATH_LOST, now=count * 100.0, random=0.0)
    assert (path.status, path.reason, path.setbacks) == (PathStatus.BLOCKED, Reason.PATH_LOST, 1)


def test_what_does_not_count_as_a_lost_path() -> None:
    path = QuicPath().answered(0.0)
    for count in range(50):
        assert path.lost(Reason.EDGE_CLOSED, now=count * 20.0, random=0.0) == path
    for count in range(50):  # one outage takes all connections down
        path = path.lost(Reason.PATH_LOST, now=count * SAME_EVENT / 50, random=0.0)
    assert len(path.losses) == 1
    for count in range(1, 50):
        path = path.lost(Reason.PATH_LOST, now=count * LOSSES_WINDOW, random=0.0)
    assert path.status is PathStatus.WORKING


def test_probes_come_at_doubling_pauses_and_never_end() -> None:
    path, pauses = blocked(), []
    assert path.probe_at == PROBE_SECONDS
    for _ in range(10):
        assert path.probe_at is not None
        assert not path.probe_due(path.probe_at - 0.1)
        assert path.probe_due(path.probe_at)
        now = path.probe_at
        path = path.probing()
        assert not path.probe_due(1e9)
        path = path.probe_failed(now=now, random=1.0)
        assert path.probe_at is not None
        pauses.append(path.probe_at - now)
    assert pauses == [60, 120, 240, 480, *[MAX_PROBE_SECONDS] * 6]
    assert blocked(random=0.0).probe_at == PROBE_SECONDS / 2


def test_the_way_back() -> None:
    path = blocked().probing().answered(100.0)
    assert path.status is PathStatus.SETTLING
    assert path.next_return({0: HTTP2, 1: HTTP2}, last_return=None, now=100.0) is None
    now = 100.0
    probes = 0
    while path.probe_at is not None:
        now = path.probe_at
        path = path.probing().answered(now)
        probes += 1
        assert probes < 10
    assert path.status is PathStatus.WORKING
    assert now == 100.0 + SETTLE_SECONDS
    assert probes >= 2
    connected = {0: HTTP2, 1: HTTP2, 2: QUIC}
    assert path.next_return(connected, last_return=None, now=now) == 0
    assert path.next_return(connected, last_return=now, now=now + RETURN_SECONDS - 1) is None
    assert path.next_return(connected, last_return=now, now=now + RETURN_SECONDS) == 0
    assert path.next_return({0: QUIC, 1: QUIC}, last_return=None, now=now) is None
    assert path.next_return({0: HTTP2}, last_return=None, now=now) is None  # nobody could carry its traffic


def test_every_setback_makes_it_settle_longer() -> None:
    path, waits = blocked(), []
    for _ in range(9):
        path = path.answered(0.0)
        waits.append(path.settled_at)
        path = path.probe_failed(now=1.0, random=0.5)
        assert path.status is PathStatus.BLOCKED
    assert waits == [60, 120, 240, 480, 960, 1920, *[MAX_SETTLE_SECONDS] * 3]


def test_one_miss_while_settling_blocks_again() -> None:
    path = blocked().answered(0.0).missed(Reason.UDP_BLOCKED, http2_up=True, now=1.0, random=0.5)
    assert path.status is PathStatus.BLOCKED


def test_another_network_is_another_chance() -> None:
    path = blocked()
    for _ in range(8):
        path = path.probe_failed(now=0.0, random=1.0)
    path = path.network_changed(now=5000.0, random=0.5)
    assert path.status is PathStatus.BLOCKED
    assert path.probe_at == 5000.5
    assert path.probe_failed(now=5001.0, random=1.0).probe_at == 5001.0 + 2 * PROBE_SECONDS
    settling = blocked()._replace(setbacks=9).answered(0.0)
    assert settling.network_changed(now=10.0, random=0.0).settled_at == 10.0 + SETTLE_SECONDS
    assert QuicPath().answered(0.0).network_changed(now=0.0, random=0.0) == QuicPath()


PATH_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["answered", "missed", "lost", "probe", "network"]),
        st.sampled_from(Reason),
        st.booleans(),
        st.floats(0, 700),
        st.floats(0, 1, exclude_max=True),
    ),
    max_size=50,
)


@settings(deadline=None)
@given(PATH_EVENTS)
def test_a_blocked_path_always_has_a_probe_ahead(events: list[tuple[str, Reason, bool, float, float]]) -> None:
    path, now = QuicPath(), 0.0
    for name, reason, flag, passed, random in events:
        now += passed
        match name:
            case "answered":
                path = path.answered(now)
            case "missed":
                path = path.missed(reason, http2_up=flag, now=now, random=random)
            case "lost":
                path = path.lost(reason, now=now, random=random)
            case "probe" if path.probe_due(now):
                path = path.probing()
                path = path.answered(now) if flag else path.probe_failed(now=now, random=random)
            case "network":
                path = path.network_changed(now=now, random=random)
        if path.status in {PathStatus.BLOCKED, PathStatus.SETTLING}:
            assert path.probe_at is not None
            assert path.probe_at <= now + max(MAX_PROBE_SECONDS, MAX_SETTLE_SECONDS)
            assert path.reason is not None
        else:
            assert path.probe_at is None
        assert len(path.losses) < LOSSES_LIMIT
        assert (path.plan(AUTO) is DialPlan.HTTP2) == (path.status is PathStatus.BLOCKED)


def test_blocked_udp_costs_seconds_not_minutes() -> None:
    """Each dial of four connections on a network without UDP: what it waits for QUIC, by the policy alone."""
    path, waited, dials = QuicPath(), [], itertools.count()
    for _ in range(4):
        next(dials)
        if path.plan(AUTO) is DialPlan.HTTP2:
            waited.append(0.0)
            continue
        race, _ = start_race(0.0)
        at = race.next_timeout()
        assert at is not None
        race, commands = race.timed_out(at)
        assert commands == (command(Order.DIAL, HTTP2),)
        race, _ = race.up(HTTP2)
        waited.append(at)
        reason = explain(QUIC, up=False, heard=race.quic_heard, closed_by_edge=False, forbidden=False, other_up=True)
        path = path.missed(reason, http2_up=True, now=at, random=0.5)
    assert waited == [HEAD_START, HEAD_START, 0.0, 0.0]
    assert path.reason is Reason.UDP_BLOCKED
