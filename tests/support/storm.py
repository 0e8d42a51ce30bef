"""Many connectors at once, by the policies alone: when each would dial and where, in virtual time.

The functions are pure in their seed, and fast enough for 100,000 connectors; the numbers serve tests and plots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from random import Random
from typing import NamedTuple

from connector.errors import EdgeDialError, EdgeLostError
from connector.protocol.edge_addresses import EdgeAddress, IpVersion, RegionAddresses, Use, learn
from connector.protocol.outer_backoff import OuterBackoff
from connector.protocol.protocol_choice import AddressTrials
from connector.protocol.reconnect import RetryPolicy, RetryState

PUBLISHED: RegionAddresses = (
    tuple(EdgeAddress(f"198.51.100.{number}", 7844) for number in range(10)),
    tuple(EdgeAddress(f"203.0.113.{number}", 7844) for number in range(10)),
)
"""As many addresses as the edge publishes of one family."""

LOST = EdgeLostError("connection with edge closed")
REFUSED = EdgeDialError("connection refused")


class Storm(NamedTuple):
    """What the connectors did after one edge address died at time 0."""

    first: list[float]
    """When each dialled the dead address again."""
    second: list[float]
    """When each dialled the next one."""
    landed: Counter[EdgeAddress]
    """Where that was."""


def one_edge_lost(connectors: int, *, seed: int, dial_seconds: float = 0.0) -> Storm:
    """All connectors hold four connections, one of them to the same address, which dies and stays dead.

    `dial_seconds` is what a failing dial takes: 0 for a refused one.
    """
    random = Random(seed).random
    dead = PUBLISHED[0][0]
    start = learn(PUBLISHED, IpVersion.AUTO)._replace(uses=(Use(0, 0, dead),))
    policy = RetryPolicy()
    storm = Storm([], [], Counter())
    for _ in range(connectors):
        addresses = start
        for conn_index in (1, 2, 3):
            addresses, _ = addresses.get(conn_index, random=random())
        again = policy.decide(RetryState(0).registered(), LOST, now=0.0, random=random(), ever_registered=True)
        storm.first.append(again.retry_at)
        failed_at = again.retry_at + dial_seconds
        decision = policy.decide(again.state, REFUSED, now=failed_at, random=random(), ever_registered=True)
        _, effect = AddressTrials().failed(decision.failure)
        assert effect.rotate
        addresses, address = addresses.rotate(0, unreachable=effect.unreachable, now=failed_at, random=random())
        assert address is not None
        storm.second.append(decision.retry_at)
        storm.landed[address] += 1
    return storm


def all_edges_lost(connectors: int, seconds: float, *, seed: int) -> list[float]:
    """Give every dial of one connection per connector while nothing answers for `seconds` from time 0 on."""
    random = Random(seed).random
    policy = RetryPolicy()
    dials: list[float] = []
    for _ in range(connectors):
        state, now = RetryState(0).registered(), 0.0
        error: Exception = LOST
        while True:
            decision = policy.decide(state, error, now=now, random=random(), ever_registered=True)
            state, now, error = decision.state, decision.retry_at, REFUSED
            if now >= seconds:
                break
            dials.append(now)
    return dials


def supervisors_restart(connectors: int, *, seed: int) -> list[float]:
    """Give the time at which each connector's supervisor restarts its connections after all of them ended at time 0."""
    random = Random(seed).random
    times = []
    for _ in range(connectors):
        backoff = OuterBackoff()
        for conn_index in range(4):
            backoff = backoff.failed(conn_index, now=0.0, random=random())
        assert backoff.fire_at is not None
        times.append(backoff.fire_at)
    return times


def histogram(times: Iterable[float], width: float) -> list[int]:
    """Count the times in slots of `width` seconds from 0 on; slots after the last one are not there."""
    counts = Counter(int(at / width) for at in times)
    return [counts[slot] for slot in range(max(counts, default=-1) + 1)]
