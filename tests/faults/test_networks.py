"""Loss, delay, reordering, a small MTU, NAT rebinding, blocked UDP; edges that die and come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.town import full, town
from tests.support.aio import run, until

everywhere = pytest.mark.parametrize("protocol", ["http2", pytest.param("quic", marks=full)])

WEATHER: dict[str, dict[str, Any]] = {
    "loss 1%": {"loss": 0.01},
    "loss 5%": {"loss": 0.05},
    "delay 100 ms": {"delay": 0.1},
    "reordering": {"delay": 0.002, "jitter": 0.02},
    "MTU 1280": {"mtu": 1_252},
}


SMOKE = {("loss 5%", "quic"), ("delay 100 ms", "http2")}
"""What `make test` runs of it."""


@pytest.mark.parametrize(
    ("weather", "protocol"),
    [
        pytest.param(weather, protocol, marks=() if (name, protocol) in SMOKE else full, id=f"{name}, {protocol}")
        for name, weather in WEATHER.items()
        for protocol in ("http2", "quic")
        if "mtu" not in weather or protocol == "quic"  # the kernel cuts TCP to the path's MTU
    ],
)
def test_bad_weather_costs_no_request(tmp_path: Path, protocol: str, weather: dict[str, Any]) -> None:
    # A path this narrow is known to the edge: its library does not probe.
    edge_args = ("--quic-packet-size", "1232") if "mtu" in weather else ()
    with town(tmp_path, protocol, weather=weather, edge_args=edge_args) as it:
        one, two = it.sides
        with one.traffic() as first, two.traffic() as second:
            first.wait_for(4)
            second.wait_for(4)
            one.request(400_000)
        it.end()
        assert [side.attempts for side in it.sides] == [1, 1]
        assert not it.retries()
        if protocol == "quic" and ("loss" in weather or "mtu" in weather):
            assert one.path.udp.lost


@everywhere
def test_an_edge_that_dies_takes_nothing_along_and_is_found_again(tmp_path: Path, protocol: str) -> None:
    with town(tmp_path, protocol) as it:
        one, two = it.sides
        with two.traffic() as traffic:
            traffic.wait_for(1)
            one.kill()
            # While it is away: one attempt after each wait, and each wait has a longer limit than the one before.
            limits = [it.connector.message("Retrying connection in up to")["message"].split()[-1] for _ in range(3)]
            assert limits == ["1s", "4s", "8s"]
            traffic.wait_for(2)
            one.start()
            before = one.attempts
            one.edge.event("registered")
            it.connector.message("Registered tunnel connection")
            assert one.attempts - before <= 2  # one may have been under way; the next one is it
            one.request()
            traffic.wait_for(2)
        assert two.attempts == 1
        it.end()


@full
@pytest.mark.parametrize("protocol", ["http2", "quic"])
def test_a_path_that_is_cut_again_and_again_makes_no_storm(tmp_path: Path, protocol: str) -> None:
    """Each loss costs one attempt, and no attempt costs the other connection anything."""
    losses = 4
    with town(tmp_path, protocol) as it:
        one, two = it.sides
        with two.traffic() as traffic:
            for _ in range(losses):
                if protocol == "http2":
                    one.path.cut_tcp()
                else:
                    one.path.block_udp(True)
                    it.connector.message("Lost connection with the edge")
                    one.path.block_udp(False)
                one.edge.event("registered")
                it.connector.message("Registered tunnel connection")
            one.request()
            traffic.wait_for(1)
        # One attempt after each wait. There are more waits than losses where blocked UDP met another attempt, and where
        # the edge, which was not told that we are gone, said that we are there already; those grow longer each time.
        retries = it.retries()
        refused = [event for event in one.edge.events if event["event"] == "register_refused"]
        assert one.attempts <= 1 + len(retries)
        assert losses <= len(retries) <= 2 * losses + len(refused)
        assert len(refused) <= 4 * losses
        assert two.attempts == 1
        it.end()


def test_nat_rebinding_is_not_noticed(tmp_path: Path) -> None:
    with town(tmp_path, "quic") as it:
        one, two = it.sides
        with one.traffic() as traffic, two.traffic() as other:
            for _ in range(3):
                one.path.rebind()
                traffic.wait_for(2)
                other.wait_for(1)
        assert [side.attempts for side in it.sides] == [1, 1]
        assert not it.retries()
        it.end()


@full
def test_udp_that_is_blocked_later_ends_on_http2(tmp_path: Path) -> None:
    """`auto` came up over QUIC; then UDP goes away on one of the two paths only."""
    with town(tmp_path, "auto") as it:
        one, two = it.sides
        if not all(side.path.udp.starts for side in it.sides):
            pytest.fail("QUIC should have won the race here")
        with two.traffic() as traffic:
            one.path.block_udp(True)
            event = one.edge.event("registered", limit=60)
            assert event["protocol"] == "http2"
            it.connector.message("Registered tunnel connection")
            one.request()
            traffic.wait_for(2)
        assert not two.lost()
        it.end()


def test_a_region_that_cannot_be_reached_costs_the_other_nothing(tmp_path: Path) -> None:
    """The first edge's path is closed for TCP and UDP alike; its connection tries on, bounded, and comes back."""
    with town(tmp_path, "auto") as it:
        one, two = it.sides
        with two.traffic() as traffic:
            one.path.block_udp(True)
            one.path.block_tcp(True)
            for _ in range(3):
                it.connector.message("Retrying connection in up to", limit=60)
            traffic.wait_for(2)
            dials = (one.path.connects, len(one.path.udp.starts), len(it.retries()))
            assert sum(dials[:2]) <= 2 + 2 * dials[2], dials  # each attempt may be a race of two dials
            one.path.block_tcp(False)
            one.path.block_udp(False)
            one.edge.event("registered", limit=60)
            run(until(lambda: len(it.lines("Registered tunnel connection")) >= 3, what="it is back"))
            one.request()
            traffic.wait_for(1)
        assert not two.lost()
        it.end()
