"""Where the edge is, and which address each connection uses.

Owns: the look-ups of one run, and the one mutable copy of `protocol/edge_addresses.py`'s values. In: RunConfig.
Out: AddressBook. Never: connects, decides which address is best (the values do).
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

from connector.app.config import RunConfig, split_address
from connector.app.logs import Logger
from connector.errors import ConfigError, DiscoveryError
from connector.protocol.edge_addresses import (
    EdgeAddress,
    Freshness,
    IpVersion,
    RegionAddresses,
    ip_version,
    learn,
    split_static,
)

Refresh = Callable[[], Awaitable[RegionAddresses | None]]


class AddressBook:
    """Hands out addresses: each conn_index keeps its own; a rotation moves it to one that nobody uses, if there is.

    `refresh` asks the DNS again; None where the addresses are given for good.
    """

    __slots__ = ("_addresses", "_clock", "_draw", "_freshness", "_refresh")

    def __init__(
        self,
        regions: RegionAddresses,
        version: IpVersion = IpVersion.AUTO,
        *,
        refresh: Refresh | None = None,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._addresses = learn(regions, version)
        self._refresh = refresh
        self._draw = draw
        self._clock = clock
        self._freshness = Freshness(clock())

    @property
    def capacity(self) -> int:
        """How many more connections can have an address of their own now."""
        return self._addresses.capacity

    def get(self, conn_index: int) -> EdgeAddress | None:
        """Give the address that `conn_index` has, or a free one; None when all are in use."""
        self._addresses, address = self._addresses.get(conn_index, random=self._draw())
        return address

    async def take(self, conn_index: int) -> EdgeAddress | None:
        """Give what `get` gives. A worker overrides this: there the addresses are another process's."""
        return self.get(conn_index)

    def known(self) -> EdgeAddress | None:
        """Give an address to try something at, without taking it: one that is in use, else any."""
        for use in self._addresses.uses:
            return use.address
        free = [*self._addresses.free(0), *self._addresses.free(1)]
        return free[int(self._draw() * len(free))] if free else None

    def samples(self) -> list[tuple[str, EdgeAddress]]:
        """Give one free address of each region and IP version, with words for where it is."""
        found: dict[str, EdgeAddress] = {}
        for number in (0, 1):
            for address in self._addresses.free(number):
                found.setdefault(f"region {number + 1}, IPv{address.family}", address)
        return list(found.items())

    def rotate(self, conn_index: int, *, unreachable: bool, leave_region: bool) -> None:
        """Take another address for `conn_index` if there is a free one. `unreachable`: nobody answered at the old."""
        self._addresses, _ = self._addresses.rotate(
            conn_index, unreachable=unreachable, now=self._clock(), random=self._draw(), leave_region=leave_region
        )

    def failed(self) -> None:
        """Note a dial that reached nobody."""
        self._freshness = self._freshness.failed()

    def registered(self) -> None:
        """Note a registration."""
        self._freshness = self._freshness.registered()

    def network_changed(self) -> None:
        """Note a new link or address of this machine."""
        self._freshness = self._freshness.network_changed()

    def refresh_due(self) -> bool:
        """Whether to `refresh` now: dials failed again and again."""
        return self._refresh is not None and self._freshness.due(self._clock())

    async def refresh(self) -> bool:
        """Ask for the addresses again and take them; False when nobody answered: what is known stays in force."""
        assert self._refresh is not None
        self._freshness = self._freshness.tried(self._clock())
        found = await self._refresh()
        if found is None:
            return False
        self._addresses = self._addresses.relearned(found)
        return True


async def find_edge(config: RunConfig, log: Logger) -> AddressBook:
    """Look the edge up as the flags say. Errors: ConfigError, DiscoveryError."""
    if config.bind_address is not None:
        _check_bindable(config.bind_address)
    if config.edges:
        book = AddressBook(await _static(config, log))
    else:
        book = await _discover(config, log)
    if book.capacity == 0:
        raise ConfigError(
            "the edge has no address that can be used",
            advice="--edge-ip-version and --edge-bind-address leave only one IP version; try without them.",
        )
    return book


async def _static(config: RunConfig, log: Logger) -> RegionAddresses:
    named = [split_address(edge, "--edge") for edge in config.edges]
    try:
        return split_static([EdgeAddress(str(ip_address(host)), port) for host, port in named])
    except ValueError:
        pass  # a name is among them
    if config.proxy is not None:
        return split_static([EdgeAddress(host, port) for host, port in named])  # the proxy resolves it
    from connector.transport.discovery import find_static  # noqa: PLC0415  (loads dnspython)

    return await find_static(
        named, skipped=lambda edge, error: log.error("Cannot resolve the edge address", edge=edge, error=error)
    )


async def _discover(config: RunConfig, log: Logger) -> AddressBook:
    from connector.transport import discovery  # noqa: PLC0415  (loads dnspython)

    version, overridden = ip_version(config.ip_version, config.bind_address)
    if overridden:
        log.warn(f"--edge-bind-address {config.bind_address} overrides --edge-ip-version: {version.value}")
    search = discovery.default_discovery(config.region)
    try:
        found = await search.find()
    except DiscoveryError as error:
        if config.proxy is None:
            raise
        log.warn("Cannot find the addresses of the edge: the proxy is given their names", error=str(error))
        names = discovery.host_names(config.region)
        first, second = ((EdgeAddress(name, discovery.EDGE_PORT),) for name in names)
        return AddressBook((first, second))
    addresses = len(found.regions[0]) + len(found.regions[1])
    if found.failures:
        log.warn(f"Edge addresses come from: {found.way}", addresses=addresses, failures=list(found.failures))
    else:
        log.debug(f"Edge addresses come from: {found.way}", addresses=addresses)
    if search.save_error:
        log.debug("Cannot save the edge addresses for the next start", error=search.save_error)

    async def refresh() -> RegionAddresses | None:
        found = await search.refresh()
        if found is None:
            log.warn("Looking the edge up again gave no answer; the known addresses stay in use")
            return None
        log.info("The edge was looked up again", way=found.way, addresses=sum(map(len, found.regions)))
        return found.regions

    return AddressBook(found.regions, version, refresh=refresh)


def _check_bindable(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as trial:
            trial.bind((address, 0))
    except OSError as error:
        raise ConfigError(
            f"--edge-bind-address: cannot bind {address}: {error.strerror or error}",
            advice="Give an address of this machine.",
        ) from None
