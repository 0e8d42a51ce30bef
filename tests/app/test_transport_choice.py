"""What the process knows about QUIC, and the lines that it writes about it."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from connector.app.logs import Logger, LogOutput
from connector.app.transport_choice import TransportChoice
from connector.errors import EdgeDialError, EdgeLostError, ProtocolError
from connector.protocol.protocol_choice import RECORD_RETRY_SECONDS, RECORD_SECONDS, RemoteFeatures, Share, Transport
from connector.protocol.protocol_race import DialPlan, PathStatus, Reason

QUIC, HTTP2 = Transport.QUIC, Transport.HTTP2


class World:
    """A choice with a clock that the test moves."""

    def __init__(self, flag: str = "auto", **options: Any) -> None:
        self.now = 0.0
        self.stream = io.StringIO()
        log = Logger(LogOutput(level="debug", json_lines=True, stream=self.stream))
        self.choice = TransportChoice(flag, log, clock=lambda: self.now, draw=lambda: 0.5, **options)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def http2_won(self, *, heard: bool = False, error: BaseException | None = None) -> None:
        self.choice.came_up(HTTP2, raced=True, quic_heard=heard, quic_error=error)


def test_a_blocked_port_is_said_once_and_in_words() -> None:
    world = World()
    world.choice.use_port(7844)
    assert world.choice.plan() is DialPlan.RACE
    for _ in range(4):
        world.http2_won()
    (line,) = [line for line in world.lines if line["message"] == "Switching to fallback protocol http2"]
    assert (line["level"], line["reason"]) == ("warn", "UDP 7844 blocked")
    assert "--protocol http2" in line["advice"]
    assert world.choice.plan() is DialPlan.HTTP2
    assert world.choice.facts == (PathStatus.BLOCKED, Reason.UDP_BLOCKED, "UDP 7844 blocked")
    assert world.choice.link_ends[QUIC, Reason.UDP_BLOCKED] == 4
    assert world.choice.races_lost == 4


def test_a_port_that_the_system_forbids_is_named_as_such_at_once() -> None:
    world = World()
    error = EdgeDialError("cannot send UDP")
    error.forbidden = True
    world.http2_won(error=error)
    assert world.choice.facts.text == "this system does not permit UDP 7844"


def test_the_way_back_is_watched_and_then_taken_one_by_one() -> None:
    world = World()
    world.http2_won()
    world.http2_won()
    assert world.choice.next_return({0: HTTP2, 1: HTTP2}) is None
    probe_at = world.choice.next_probe()
    assert probe_at is not None
    returns = []
    while not returns and world.now < 600:
        world.now += 1
        if world.choice.probe_due():
            world.choice.probing(7844)
            world.choice.probed(None)
        moved = world.choice.next_return({0: HTTP2, 1: HTTP2})
        if moved is not None:
            returns.append(moved)
    assert returns == [0]
    assert world.choice.next_return({0: QUIC, 1: HTTP2}) is None  # not yet
    world.now += 31
    assert world.choice.next_return({0: QUIC, 1: HTTP2}) == 1
    assert [line["message"] for line in world.lines if "again" in line["message"]] == [
        "QUIC answers again; it is watched before connections return to it",
        "QUIC works again: connections return to it one by one",
    ]
    assert world.choice.returns == 2


def test_failing_probes_keep_it_blocked() -> None:
    world = World()
    world.http2_won()
    world.http2_won()
    for _ in range(5):
        world.now = world.choice.next_probe() or 0.0
        world.choice.probing(7844)
        assert world.choice.next_probe() is None
        world.choice.probed(EdgeDialError("silence"))
    assert world.choice.facts.status is PathStatus.BLOCKED
    assert world.choice.plan() is DialPlan.HTTP2


def test_while_http2_fails_too_quic_is_tried_again() -> None:
    world = World()
    world.http2_won()
    world.http2_won()
    for _ in range(2):
        assert world.choice.plan() is DialPlan.HTTP2
        assert world.choice.dial_failed(DialPlan.HTTP2, EdgeDialError("x")) is Reason.UNREACHABLE
    assert world.choice.plan() is DialPlan.RACE
    world.choice.came_up(HTTP2, raced=False, quic_heard=False, quic_error=None)
    assert world.choice.plan() is DialPlan.HTTP2


def by_edge() -> EdgeLostError:
    error = EdgeLostError("closed")
    error.by_edge = True
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, Reason.EDGE_CLOSED),
        (by_edge(), Reason.EDGE_CLOSED),
        (ProtocolError("bad frame"), Reason.EDGE_CLOSED),
        (EdgeLostError("no sign of life"), Reason.PATH_LOST),
    ],
)
def test_why_a_link_ended(error: BaseException | None, reason: Reason) -> None:
    world = World()
    assert world.choice.link_ended(QUIC, error) is reason
    assert world.choice.link_ends == {(QUIC, reason): 1}


def test_a_path_that_keeps_breaking_leads_to_http2() -> None:
    world = World()
    for _ in range(3):
        world.choice.came_up(QUIC, raced=True, quic_heard=True, quic_error=None)
        world.now += 60
        world.choice.link_ended(QUIC, EdgeLostError("no sign of life"))
    assert world.choice.facts.text == "path lost"
    assert world.choice.plan() is DialPlan.HTTP2
    world.choice.network_changed()
    assert world.choice.next_probe() == world.now + 0.5


@pytest.mark.parametrize(
    ("flag", "plan"), [("quic", DialPlan.QUIC), ("http2", DialPlan.HTTP2), ("h2mux", DialPlan.HTTP2)]
)
def test_a_flag_that_names_a_transport_is_followed_whatever_happens(flag: str, plan: DialPlan) -> None:
    world = World(flag)
    for _ in range(3):
        world.choice.dial_failed(plan, EdgeDialError("x"))
        world.choice.link_ended(QUIC, EdgeLostError("x"))
        world.now += 30
    assert world.choice.plan() is plan
    assert world.choice.next_return({0: HTTP2, 1: HTTP2}) is None
    assert (world.choice.needs_quic, world.choice.needs_http2) == (plan is DialPlan.QUIC, plan is DialPlan.HTTP2)
    assert [line["level"] for line in world.lines] == (["warn"] if flag == "h2mux" else [])


def test_post_quantum_means_quic() -> None:
    world = World(post_quantum=True)
    assert world.choice.plan() is DialPlan.QUIC
    assert not world.choice.needs_http2


def test_the_records_count_when_the_token_is_in_a_file() -> None:
    world = World(token_given=False, account_tag="0123456789abcdef0123456789abcdef")  # place 25
    assert world.choice.plan() is DialPlan.RACE  # nothing known
    assert world.choice.initial is QUIC
    assert world.choice.records_due()
    world.choice.records_tried()
    world.choice.learn((Share("http2", 100),), RemoteFeatures(26, True))
    assert world.choice.plan() is DialPlan.HTTP2
    assert (world.choice.datagram_version, world.choice.skip_prechecks) == (3, True)
    assert not world.choice.records_due()
    world.now = RECORD_SECONDS
    assert world.choice.records_due()
    world.choice.records_tried()
    world.choice.learn(None, None)
    assert world.choice.plan() is DialPlan.HTTP2
    world.now += RECORD_RETRY_SECONDS
    assert world.choice.records_due()
    world.choice.learn((Share("quic", 26),), RemoteFeatures(25))
    assert world.choice.plan() is DialPlan.RACE
    assert world.choice.datagram_version == 2
    assert world.lines[-1]["message"] == "Changing protocol to quic"


def test_features_win_over_the_record() -> None:
    world = World(features=("support_datagram_v2",))
    world.choice.learn((), RemoteFeatures(100))
    assert world.choice.datagram_version == 2
