"""Which edge address each connection uses: regions, address families, hand-out, rotation, give-back.

Owns: the order of SRV records, the split into regions and families, who uses which address, and when a new look-up is
due. In: addresses, conn_index, `now`, `random` in [0, 1). Out: the next state, and an address or None.
Never: resolves a name, reads a clock, draws a random number.

*Strategy*: everything is a value. `EdgeAddresses` is one process's whole knowledge; every operation gives the next one.
A region is a multiset: `--edge` may name one address twice, and then two connections may use it. Nobody uses an address
more often than it is listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import NamedTuple

SECONDARY_SECONDS = 600.0
"""How long a region that gave up its primary family stays with the other one; cloudflared's own 10 minutes."""

REFRESH_FAILURES = 4
"""Failed dials since the last look-up that make a new one due: one round of the default four connections."""

REFRESH_SECONDS = 60.0
"""Pause after a look-up before failures may ask for another, doubled for each one in a row up to the next constant."""

MAX_REFRESH_SECONDS = 3600.0
"""Longest pause between look-ups that failures ask for; edge addresses change over months."""


class EdgeAddress(NamedTuple):
    """Where to dial: a numeric host and a port, for TCP and UDP alike."""

    host: str
    port: int

    @property
    def family(self) -> int:
        """4 or 6."""
        return 6 if ":" in self.host else 4


RegionAddresses = tuple[tuple[EdgeAddress, ...], tuple[EdgeAddress, ...]]
"""What discovery finds: the addresses of region 1 and of region 2, in the resolver's order."""


class Service(NamedTuple):
    """One SRV record (RFC 2782)."""

    priority: int
    weight: int
    port: int
    target: str


def order_services(services: Iterable[Service], draw: Callable[[], float]) -> list[Service]:
    """Sort by priority; within a priority draw by weight (RFC 2782). A target of "." means "no service": left out.

    `draw` gives numbers uniform in [0, 1), one for each record.
    """
    ordered: list[Service] = []
    # Records without weight go first, so that they have the small chance that the RFC gives them.
    left = sorted((each for each in services if each.target.rstrip(".")), key=lambda each: (each.priority, each.weight))
    while left:
        peers = [each for each in left if each.priority == left[0].priority]
        point = int(draw() * (sum(each.weight for each in peers) + 1))
        running = 0
        for chosen in peers:
            running += chosen.weight
            if running >= point:
                break
        ordered.append(chosen)
        left.remove(chosen)
    return ordered


def split_static(addresses: Sequence[EdgeAddress]) -> RegionAddresses:
    """Split what `--edge` gave: entries 0, 2, 4 ... are region 1, the others region 2."""
    return tuple(addresses[::2]), tuple(addresses[1::2])


class IpVersion(Enum):
    """`--edge-ip-version`."""

    AUTO = "auto"
    V4 = "4"
    V6 = "6"


def ip_version(setting: str, bind_address: str | None = None) -> tuple[IpVersion, bool]:
    """Give the version in force, and whether `bind_address` overrode a contradicting setting (worth a warning).

    ValueError for an unknown setting.
    """
    version = IpVersion(setting)
    if bind_address is None:
        return version, False
    forced = IpVersion.V6 if ":" in bind_address else IpVersion.V4
    return forced, version not in {IpVersion.AUTO, forced}


class Region(NamedTuple):
    """One region's two address sets. The primary is active while `secondary_until` is None."""

    primary: tuple[EdgeAddress, ...]
    secondary: tuple[EdgeAddress, ...] = ()
    secondary_until: float | None = None
    """Time from which on a failure at an IPv6 address brings the primary back."""

    @property
    def active(self) -> tuple[EdgeAddress, ...]:
        """The set that addresses are handed out from."""
        return self.primary if self.secondary_until is None else self.secondary

    def holds(self, address: EdgeAddress) -> bool:
        """Tell whether `address` is in either set."""
        return address in self.primary or address in self.secondary

    def unreachable(self, address: EdgeAddress, now: float) -> Region:
        """Answer a connectivity failure at `address`: maybe the other family's turn has come."""
        if self.secondary_until is None:
            if address.family == 6 and self.secondary:
                return self._replace(secondary_until=now + SECONDARY_SECONDS)
            return self
        if address.family == 4 or now >= self.secondary_until:
            return self._replace(secondary_until=None)
        return self


def region(addresses: Sequence[EdgeAddress], version: IpVersion) -> Region:
    """Split one region's addresses by family; with AUTO the family of the first address is the primary one."""
    by_family = {family: tuple(each for each in addresses if each.family == family) for family in (4, 6)}
    if version is IpVersion.AUTO:
        first = addresses[0].family if addresses else 4
        return Region(by_family[first], by_family[10 - first])
    return Region(by_family[int(version.value)])


class Use(NamedTuple):
    """Connection `conn_index` uses `address`, which belongs to region number `region` (0 or 1)."""

    conn_index: int
    region: int
    address: EdgeAddress


class EdgeAddresses(NamedTuple):
    """All edge addresses of a process and who uses them. Make it with `learn`."""

    regions: tuple[Region, Region]
    version: IpVersion
    uses: tuple[Use, ...] = ()

    @property
    def capacity(self) -> int:
        """Free addresses in both active sets; at start this caps the number of HA connections."""
        return len(self.free(0)) + len(self.free(1))

    def free(self, number: int) -> list[EdgeAddress]:
        """Give the addresses of region `number` (0 or 1) that are active and in nobody's use."""
        left = list(self.regions[number].active)
        for use in self.uses:
            if use.region == number and use.address in left:
                left.remove(use.address)
        return left

    def of(self, conn_index: int) -> EdgeAddress | None:
        """Give the address that `conn_index` uses, if any."""
        use = self._use(conn_index)
        return None if use is None else use.address

    def get(self, conn_index: int, *, random: float) -> tuple[EdgeAddresses, EdgeAddress | None]:
        """Give the address that `conn_index` uses already, else a free one, else None ("no addresses left")."""
        owned = self.of(conn_index)
        return (self, owned) if owned is not None else self._take(conn_index, random, None)

    def give_back(self, conn_index: int, *, unreachable: bool, now: float) -> EdgeAddresses:
        """Free the address of `conn_index`. `unreachable`: it did not answer, which may switch families."""
        use = self._use(conn_index)
        if use is None:
            return self
        regions = self.regions
        if unreachable:
            regions = (
                regions[0].unreachable(use.address, now) if use.region == 0 else regions[0],
                regions[1].unreachable(use.address, now) if use.region == 1 else regions[1],
            )
        return self._replace(regions=regions, uses=tuple(each for each in self.uses if each != use))

    def rotate(
        self, conn_index: int, *, unreachable: bool, now: float, random: float, leave_region: bool = False
    ) -> tuple[EdgeAddresses, EdgeAddress | None]:
        """Give the address back and take another; None when there is no other: the old one is free again.

        With `leave_region` the other region is preferred whatever it has left. The plain rule comes back to the region
        that it left as long as most of that region is free, and so never leaves one that is dead as a whole.
        """
        use = self._use(conn_index)
        back = self.give_back(conn_index, unreachable=unreachable, now=now)
        if use is None:
            return back._take(conn_index, random, None)
        return back._take(conn_index, random, use.address, 1 - use.region if leave_region else None)

    def relearned(self, found: RegionAddresses) -> EdgeAddresses:
        """Take the answer of a new look-up. Addresses in use stay in use until they are given back."""
        fresh = learn(found, self.version)
        kept: list[Use] = []
        for use in self.uses:
            homes = [number for number in (0, 1) if fresh.regions[number].holds(use.address)]
            kept.append(use if use.region in homes or not homes else use._replace(region=homes[0]))
        regions = tuple(
            new._replace(secondary_until=old.secondary_until)
            if old.secondary_until is not None and new.secondary and _family(new.primary) == _family(old.primary)
            else new
            for old, new in zip(self.regions, fresh.regions, strict=True)
        )
        return fresh._replace(regions=(regions[0], regions[1]), uses=tuple(kept))

    def _use(self, conn_index: int) -> Use | None:
        return next((use for use in self.uses if use.conn_index == conn_index), None)

    def _take(
        self, conn_index: int, random: float, excluding: EdgeAddress | None, first: int | None = None
    ) -> tuple[EdgeAddresses, EdgeAddress | None]:
        """Prefer the region with more free addresses. One random number decides both the tie and the address."""
        free = self.free(0), self.free(1)
        if first is None:
            first = 0 if len(free[0]) > len(free[1]) else 1
            if len(free[0]) == len(free[1]):
                first, random = int(random * 2), random * 2 % 1
        for number in (first, 1 - first):
            candidates = [each for each in free[number] if each != excluding]
            if candidates:
                address = candidates[int(random * len(candidates))]
                return self._replace(uses=(*self.uses, Use(conn_index, number, address))), address
        return self, None


def learn(found: RegionAddresses, version: IpVersion) -> EdgeAddresses:
    """Make the state from the first look-up's answer."""
    return EdgeAddresses((region(found[0], version), region(found[1], version)), version)


def _family(addresses: Sequence[EdgeAddress]) -> int:
    return addresses[0].family if addresses else 0


class Freshness(NamedTuple):
    """When the addresses were looked up last, and whether what happened since asks for a new look-up."""

    tried_at: float
    failures: int = 0
    in_a_row: int = 0
    """Look-ups since the last registration."""

    def failed(self) -> Freshness:
        """Note a dial that reached nobody."""
        return self._replace(failures=self.failures + 1)

    def registered(self) -> Freshness:
        """Note a registration: the addresses are good."""
        return self._replace(failures=0, in_a_row=0)

    def due(self, now: float) -> bool:
        """Tell whether to look the addresses up again now."""
        pause = min(REFRESH_SECONDS * 2 ** min(self.in_a_row, 10), MAX_REFRESH_SECONDS)
        return self.failures >= REFRESH_FAILURES and now >= self.tried_at + pause

    def tried(self, now: float) -> Freshness:
        """Note that a look-up began, whatever becomes of it."""
        return Freshness(now, 0, self.in_a_row + 1)

    def network_changed(self) -> Freshness:
        """Note a new link or address: the pauses of the old network do not hold for the new one."""
        return self._replace(in_a_row=0)
