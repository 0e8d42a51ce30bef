"""Address hand-out: the specification's tables one by one, and what must hold after any sequence of events."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connector.protocol.edge_addresses import (
    MAX_REFRESH_SECONDS,
    REFRESH_FAILURES,
    REFRESH_SECONDS,
    SECONDARY_SECONDS,
    EdgeAddress,
    EdgeAddresses,
    Freshness,
    IpVersion,
    Region,
    RegionAddresses,
    ip_version,
    learn,
    region,
    split_static,
)


def v4(number: int) -> EdgeAddress:
    return EdgeAddress(f"192.0.2.{number}", 7844)


def v6(number: int) -> EdgeAddress:
    return EdgeAddress(f"2001:db8::{number}", 7844)


FOUR = ((v4(1), v4(2)), (v4(11), v4(12)))
PUBLISHED: RegionAddresses = (
    tuple([v6(number) for number in range(10)] + [v4(number) for number in range(10)]),
    tuple([v6(number) for number in range(100, 110)] + [v4(number) for number in range(100, 110)]),
)


def take(state: EdgeAddresses, conn_index: int, random: float = 0.0) -> tuple[EdgeAddresses, EdgeAddress]:
    state, address = state.get(conn_index, random=random)
    assert address is not None
    return state, address


# -- families ----------------------------------------------------------------------------------------------------------

MIXED_6 = (v6(1), v4(1), v6(2), v4(2))
MIXED_4 = (v4(1), v6(1))


@pytest.mark.parametrize(
    ("addresses", "version", "primary", "secondary"),
    [
        (MIXED_6, IpVersion.V4, (v4(1), v4(2)), ()),
        (MIXED_6, IpVersion.V6, (v6(1), v6(2)), ()),
        (MIXED_6, IpVersion.AUTO, (v6(1), v6(2)), (v4(1), v4(2))),
        (MIXED_4, IpVersion.AUTO, (v4(1),), (v6(1),)),
        ((v4(1),), IpVersion.AUTO, (v4(1),), ()),
        ((v4(1),), IpVersion.V6, (), ()),
        ((), IpVersion.AUTO, (), ()),
    ],
)
def test_families(
    addresses: tuple[EdgeAddress, ...],
    version: IpVersion,
    primary: tuple[EdgeAddress, ...],
    secondary: tuple[EdgeAddress, ...],
) -> None:
    assert region(addresses, version) == Region(primary, secondary, None)
    assert region(addresses, version).active == primary


@pytest.mark.parametrize(
    ("setting", "bind", "version", "overridden"),
    [
        ("auto", None, IpVersion.AUTO, False),
        ("4", None, IpVersion.V4, False),
        ("6", None, IpVersion.V6, False),
        ("auto", "192.0.2.1", IpVersion.V4, False),
        ("auto", "::1", IpVersion.V6, False),
        ("4", "192.0.2.1", IpVersion.V4, False),
        ("6", "192.0.2.1", IpVersion.V4, True),
        ("4", "2001:db8::1", IpVersion.V6, True),
    ],
)
def test_ip_version(setting: str, bind: str | None, version: IpVersion, overridden: bool) -> None:
    assert ip_version(setting, bind) == (version, overridden)


@pytest.mark.parametrize("setting", ["", "5", "AUTO", "46"])
def test_other_versions_are_errors(setting: str) -> None:
    with pytest.raises(ValueError, match="is not a valid"):
        ip_version(setting)


BOTH = Region((v6(1),), (v4(1),))
FOUR_FIRST = Region((v4(1),), (v6(1),))


@pytest.mark.parametrize(
    ("before", "address", "now", "until"),
    [
        # primary active
        (BOTH, v6(1), 50.0, 650.0),
        (BOTH, v4(1), 50.0, None),
        (Region((v6(1),)), v6(1), 50.0, None),
        (FOUR_FIRST, v4(1), 50.0, None),
        (FOUR_FIRST, v6(1), 50.0, 650.0),
        # secondary active
        (BOTH._replace(secondary_until=650.0), v4(1), 51.0, None),
        (BOTH._replace(secondary_until=650.0), v6(1), 649.0, 650.0),
        (BOTH._replace(secondary_until=650.0), v6(1), 651.0, None),
    ],
)
def test_switching_families(before: Region, address: EdgeAddress, now: float, until: float | None) -> None:
    after = before.unreachable(address, now)
    assert after.secondary_until == until
    assert (after.primary, after.secondary) == (before.primary, before.secondary)
    assert SECONDARY_SECONDS == 600


# -- hand-out ----------------------------------------------------------------------------------------------------------


def test_an_owner_keeps_its_address() -> None:
    state, first = take(learn(FOUR, IpVersion.AUTO), 0, 0.7)
    for random in (0.0, 0.3, 0.99):
        assert take(state, 0, random) == (state, first)


def test_an_owner_keeps_its_address_when_the_other_family_becomes_active() -> None:
    state, old = take(learn(PUBLISHED, IpVersion.AUTO), 0)
    state, _ = take(state, 1)
    state = state.give_back(1, unreachable=True, now=0.0)
    assert take(state, 0) == (state, old)
    assert old.family == 6


@pytest.mark.parametrize(("random", "expected"), [(0.0, v4(1)), (0.3, v4(2)), (0.5, v4(11)), (0.99, v4(12))])
def test_a_tie_is_decided_at_random_and_so_is_the_address(random: float, expected: EdgeAddress) -> None:
    assert take(learn(FOUR, IpVersion.AUTO), 0, random)[1] == expected


@pytest.mark.parametrize("random", [0.0, 0.6, 0.99])
def test_the_region_with_more_free_addresses_is_preferred(random: float) -> None:
    state = learn(((v4(1),), (v4(11), v4(12))), IpVersion.AUTO)
    assert take(state, 0, random)[1] in {v4(11), v4(12)}
    state, first = take(learn(FOUR, IpVersion.AUTO), 0, random)
    second = take(state, 1, random)[1]
    assert (first in FOUR[0]) != (second in FOUR[0])


def test_when_one_region_is_used_up_the_other_serves() -> None:
    state = learn(((v4(1),), ()), IpVersion.AUTO)
    state, _ = take(state, 0)
    assert state.get(1, random=0.5) == (state, None)
    state = learn(((), (v4(1),)), IpVersion.AUTO)
    assert take(state, 0)[1] == v4(1)


def test_capacity_counts_the_active_sets() -> None:
    assert learn(FOUR, IpVersion.AUTO).capacity == 4
    assert learn(PUBLISHED, IpVersion.AUTO).capacity == 20
    assert learn(PUBLISHED, IpVersion.V4).capacity == 20
    assert take(learn(FOUR, IpVersion.AUTO), 0)[0].capacity == 3
    assert learn(FOUR, IpVersion.V6).capacity == 0


def test_rotation_excludes_the_old_address_and_frees_it() -> None:
    state, old = take(learn(FOUR, IpVersion.AUTO), 0, 0.0)
    state, new = state.rotate(0, unreachable=True, now=0.0, random=0.0)
    assert old == v4(1)
    assert new == v4(2)
    assert state.of(0) == new
    assert state.capacity == 3


def test_rotation_without_another_address_frees_the_old_one() -> None:
    state, old = take(learn(((v4(1),), ()), IpVersion.AUTO), 0)
    state, new = state.rotate(0, unreachable=True, now=0.0, random=0.5)
    assert new is None
    assert state.of(0) is None
    assert take(state, 0)[1] == old


def test_rotation_of_nobody_is_a_get() -> None:
    state, address = learn(FOUR, IpVersion.AUTO).rotate(3, unreachable=True, now=0.0, random=0.0)
    assert address == v4(1)
    assert state.of(3) == v4(1)


def test_an_unreachable_ipv6_address_brings_the_other_family_for_ten_minutes() -> None:
    state, first = take(learn(PUBLISHED, IpVersion.AUTO), 0, 0.0)
    state, second = state.rotate(0, unreachable=True, now=100.0, random=0.0)
    assert second is not None
    assert (first.family, second.family) == (6, 4)
    assert [each.secondary_until for each in state.regions] == [700.0, None]
    state, third = state.rotate(0, unreachable=True, now=101.0, random=0.0)  # IPv4 fails too: back at once
    assert third is not None
    assert third.family == 6
    assert state.regions[0].secondary_until is None


def test_a_duplicate_rotates_without_blaming_the_family() -> None:
    state, _ = take(learn(PUBLISHED, IpVersion.AUTO), 0, 0.0)
    state, second = state.rotate(0, unreachable=False, now=100.0, random=0.0)
    assert second is not None
    assert second.family == 6
    assert [each.secondary_until for each in state.regions] == [None, None]


def test_only_the_region_of_the_address_switches() -> None:
    state, first = take(learn(PUBLISHED, IpVersion.AUTO), 0, 0.99)
    assert first in PUBLISHED[1]
    state = state.give_back(0, unreachable=True, now=0.0)
    assert [each.secondary_until for each in state.regions] == [None, 600.0]


def test_a_dead_region_is_left_only_when_asked_to() -> None:
    state = learn(PUBLISHED, IpVersion.V4)
    for conn_index in range(4):
        state, _ = take(state, conn_index, 0.0)
    mine = next(use.conn_index for use in state.uses if use.region == 0)
    for _ in range(20):
        state, address = state.rotate(mine, unreachable=True, now=0.0, random=0.3)
        assert address in PUBLISHED[0]
    state, address = state.rotate(mine, unreachable=True, now=0.0, random=0.3, leave_region=True)
    assert address in PUBLISHED[1]
    full = learn(((v4(1), v4(2)), ()), IpVersion.V4)
    full, _ = take(full, 0)
    assert full.rotate(0, unreachable=True, now=0.0, random=0.0, leave_region=True)[1] == v4(2)


def test_giving_back_nothing_changes_nothing() -> None:
    state = learn(FOUR, IpVersion.AUTO)
    assert state.give_back(5, unreachable=True, now=0.0) == state


# -- static addresses --------------------------------------------------------------------------------------------------


def test_static_addresses_alternate() -> None:
    a, b, c = v4(1), v4(2), v4(3)
    assert split_static([a, b, c]) == ((a, c), (b,))
    assert split_static([a]) == ((a,), ())
    assert split_static([]) == ((), ())


def test_an_address_named_twice_serves_two_connections() -> None:
    state = learn(split_static([v4(1)] * 3), IpVersion.AUTO)
    assert state.capacity == 3
    for conn_index in range(3):
        state, address = take(state, conn_index, 0.9)
        assert address == v4(1)
    assert state.get(3, random=0.1)[1] is None
    state = state.give_back(1, unreachable=True, now=0.0)
    assert state.capacity == 1


# -- a new look-up -----------------------------------------------------------------------------------------------------


def test_addresses_in_use_survive_a_new_answer_until_they_are_given_back() -> None:
    state, gone = take(learn(FOUR, IpVersion.AUTO), 0, 0.0)
    state, kept = take(state, 1, 0.0)
    found = ((v4(21),), (kept, v4(22)))
    state = state.relearned(found)
    assert state.of(0) == gone
    assert state.of(1) == kept
    assert state.free(0) == [v4(21)]
    assert state.free(1) == [v4(22)]
    state = state.give_back(0, unreachable=True, now=0.0)
    assert state.capacity == 2
    assert gone not in state.free(0)


def test_an_address_that_moved_to_the_other_region_is_not_handed_out_twice() -> None:
    state, moved = take(learn(FOUR, IpVersion.AUTO), 0, 0.0)
    state = state.relearned(((v4(21),), (moved,)))
    assert state.free(1) == []
    assert state.uses[0].region == 1


def test_the_active_family_survives_a_new_answer() -> None:
    state, _ = take(learn(PUBLISHED, IpVersion.AUTO), 0, 0.0)
    state = state.give_back(0, unreachable=True, now=0.0)
    again = state.relearned(PUBLISHED)
    assert again.regions == state.regions
    turned = tuple(part[::-1] for part in PUBLISHED)  # now IPv4 comes first: it is the primary one, and active
    assert state.relearned((turned[0], turned[1])).regions[0].secondary_until is None
    assert state.relearned(FOUR).regions[0].secondary_until is None


def test_freshness() -> None:
    fresh = Freshness(0.0)
    for _ in range(REFRESH_FAILURES - 1):
        fresh = fresh.failed()
    assert not fresh.due(1e9)
    fresh = fresh.failed()
    assert not fresh.due(REFRESH_SECONDS - 1)
    assert fresh.due(REFRESH_SECONDS)
    fresh = fresh.tried(100.0)
    assert not fresh.due(1e9)
    pauses = []
    for _ in range(12):
        for _ in range(REFRESH_FAILURES):
            fresh = fresh.failed()
        pause = next(pause for pause in (120, 240, 480, 960, 1920, MAX_REFRESH_SECONDS) if fresh.due(100.0 + pause))
        pauses.append(pause)
        fresh = fresh.tried(100.0)
    assert pauses == [120, 240, 480, 960, 1920, *[MAX_REFRESH_SECONDS] * 7]
    assert fresh.network_changed().in_a_row == 0
    assert fresh.failed().registered() == Freshness(100.0)


# -- what always holds -------------------------------------------------------------------------------------------------

ADDRESSES = st.one_of(st.integers(0, 5).map(v4), st.integers(0, 5).map(v6))
HALVES = st.lists(ADDRESSES, max_size=6).map(tuple)
FOUND = st.tuples(HALVES, HALVES)
RANDOM = st.floats(0, 1, exclude_max=True)
INDEX = st.integers(0, 5)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("get"), INDEX, RANDOM),
        st.tuples(st.just("rotate"), INDEX, RANDOM, st.booleans(), st.booleans()),
        st.tuples(st.just("give back"), INDEX, st.booleans()),
        st.tuples(st.just("learn"), FOUND),
    ),
    max_size=40,
)


def listed(state: EdgeAddresses, number: int, address: EdgeAddress) -> int:
    return [*state.regions[number].primary, *state.regions[number].secondary].count(address)


@settings(deadline=None)
@given(FOUND, st.sampled_from(IpVersion), EVENTS)
def test_nobody_uses_an_address_more_often_than_it_is_listed(
    found: RegionAddresses, version: IpVersion, events: list[tuple[object, ...]]
) -> None:
    state, now = learn(found, version), 0.0
    learnt_again = False
    for event in events:
        now += 100.0
        before = state
        match event:
            case ("get", int(index), float(random)):
                state, address = state.get(index, random=random)
                assert state.of(index) == address
                assert (address is None) == (before.of(index) is None and before.capacity == 0)
            case ("rotate", int(index), float(random), bool(unreachable), bool(leave)):
                old = state.of(index)
                state, address = state.rotate(
                    index, unreachable=unreachable, now=now, random=random, leave_region=leave
                )
                assert state.of(index) == address
                assert address is None or address != old
                if address is None:
                    assert set(state.free(0)) | set(state.free(1)) <= {old}
            case ("give back", int(index), bool(unreachable)):
                state = state.give_back(index, unreachable=unreachable, now=now)
                assert state.of(index) is None
            case ("learn", tuple(again)):
                state = state.relearned(again)
                learnt_again = True
                assert {use.conn_index: use.address for use in state.uses} == {
                    use.conn_index: use.address for use in before.uses
                }
        assert len({use.conn_index for use in state.uses}) == len(state.uses)
        if not learnt_again:
            used = Counter((use.region, use.address) for use in state.uses)
            for (number, address), times in used.items():
                assert times <= listed(state, number, address)
        for number in (0, 1):
            assert len(state.free(number)) <= len(state.regions[number].active)
            if version is not IpVersion.AUTO:
                assert state.regions[number].secondary_until is None
        untouched = {use for use in before.uses if len(event) < 2 or use.conn_index != event[1]}
        assert event[0] == "learn" or untouched <= set(state.uses)


@settings(deadline=None)
@given(FOUND, st.lists(FOUND, max_size=3), st.lists(RANDOM, min_size=6, max_size=6))
def test_with_each_address_listed_once_no_two_connections_share_one(
    found: RegionAddresses, later: list[RegionAddresses], randoms: list[float]
) -> None:
    def once(found: RegionAddresses) -> RegionAddresses:
        first = tuple(dict.fromkeys(found[0]))
        return first, tuple(each for each in dict.fromkeys(found[1]) if each not in first)

    state = learn(once(found), IpVersion.AUTO)
    for answer in [*later, found]:
        for index, random in enumerate(randoms):
            state, _ = state.get(index, random=random)
            state, _ = state.rotate(index, unreachable=random < 0.5, now=0.0, random=random)
        state = state.relearned(once(answer))
        assert max(Counter(use.address for use in state.uses).values(), default=1) == 1
