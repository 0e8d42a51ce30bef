"""100,000 connectors lose one edge at once: the load on the edge that the schedules promise, in virtual time."""

from __future__ import annotations

import math

import pytest

from benchmarks.load_spread import (
    OUTAGE_CONNECTORS,
    OUTAGE_SECONDS,
    PLOT,
    PUBLISHED,
    SEED,
    Storm,
    all_edges_lost,
    histogram,
    one_edge_lost,
    plot,
    report,
    supervisors_restart,
)

CONNECTORS = 100_000


@pytest.fixture(scope="module")
def storm() -> Storm:
    return one_edge_lost(CONNECTORS, seed=SEED)


def bounds(expected: float) -> tuple[float, float]:
    """Six standard deviations of a count around `expected`: a seed that leaves them means a wrong schedule."""
    return expected - 6 * math.sqrt(expected), expected + 6 * math.sqrt(expected)


def assert_flat(counts: list[int], expected: float) -> None:
    low, high = bounds(expected)
    assert low <= min(counts)
    assert max(counts) <= high


def test_first_dials_fill_one_second_evenly(storm: Storm) -> None:
    assert len(storm.first) == CONNECTORS
    counts = histogram(storm.first, 0.1)
    assert len(counts) == 10
    assert_flat(counts, CONNECTORS / 10)


def test_second_dials_are_spread_as_the_sum_of_two_waits(storm: Storm) -> None:
    """Uniform over 1 s plus uniform over 4 s: rises for 1 s, stays for 3 s, falls for 1 s."""
    counts = histogram(storm.second, 0.5)
    rising = [1 / 32, 3 / 32]
    shares = [*rising, *[1 / 8] * 6, *rising[::-1]]
    assert len(counts) == len(shares)
    for count, share in zip(counts, shares, strict=True):
        low, high = bounds(CONNECTORS * share)
        assert low <= count <= high


def test_no_slot_sees_more_than_the_first_tenth(storm: Storm) -> None:
    together = histogram([*storm.first, *storm.second], 0.1)
    assert max(together) < 1.4 * CONNECTORS / 10
    assert sum(together) == 2 * CONNECTORS  # two dials each: a lost edge costs one failed dial, not a series


def test_they_land_evenly_on_the_region_with_room_and_never_on_the_dead_address(storm: Storm) -> None:
    assert set(storm.landed) == set(PUBLISHED[0][1:])
    assert_flat(list(storm.landed.values()), CONNECTORS / 9)


def test_a_slow_dial_moves_the_second_wave_and_does_not_sharpen_it() -> None:
    storm = one_edge_lost(10_000, seed=2, dial_seconds=15.0)
    assert min(storm.second) >= 15.0
    assert max(storm.second) < 20.0
    assert max(histogram(storm.second, 0.5)) <= bounds(10_000 / 8)[1]


def test_a_long_outage_ends_in_a_flat_hum() -> None:
    """With nothing answering, each connection dials every 16 s on average, and no two connectors stay in step."""
    connectors, seconds = 20_000, 400.0
    dials = all_edges_lost(connectors, seconds, seed=3)
    counts = histogram(dials, 1.0)
    assert max(counts) == max(counts[:3])  # the first waves are the highest
    assert max(counts) < 1.2 * connectors  # everybody's first dial, within LOST_WAIT
    # From 200 s on the exponent is at its cap for everybody: one dial in 16 s each.
    assert_flat(counts[200:400], connectors / 16)
    minutes = histogram(dials, 60.0)
    assert minutes[0] < 8 * connectors
    assert all(count < 4 * connectors for count in minutes[1:])


def test_supervisors_restart_over_twenty_seconds() -> None:
    counts = histogram(supervisors_restart(CONNECTORS, seed=4), 1.0)
    assert len(counts) == 20
    assert_flat(counts, CONNECTORS / 20)


def test_the_committed_plot_and_numbers_are_these(storm: Storm) -> None:
    """`python -m benchmarks.load_spread` makes them anew when a schedule changes."""
    outage = all_edges_lost(OUTAGE_CONNECTORS, OUTAGE_SECONDS, seed=SEED)
    restarts = supervisors_restart(CONNECTORS, seed=SEED)
    assert PLOT.read_text(encoding="utf-8") == plot(storm, outage, restarts)
    text = PLOT.with_suffix(".md").read_text(encoding="utf-8")
    for line in report(storm, outage, restarts):
        assert line in text
