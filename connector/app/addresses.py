"""Which edge address each connection uses.

Owns: resolving the configured names, and the assignment conn_index -> address. In: `host:port` texts. Out: addresses.
Never: connects. (Full discovery - SRV records, regions, address families - replaces `resolve_edges`.)
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import NamedTuple

from connector.app.config import split_address
from connector.app.logs import Logger
from connector.errors import ConfigError

LOOKUP_SECONDS = 15.0
"""Limit of one name lookup; cloudflared gives its fall-back resolver as much."""


class EdgeAddress(NamedTuple):
    """Where to dial: a numeric host and a port."""

    host: str
    port: int


async def resolve_edges(edges: Sequence[str], *, one_each: bool, ip_version: str, log: Logger) -> list[EdgeAddress]:
    """Resolve every `host:port`; names that do not resolve are logged and skipped; ConfigError when nothing is left.

    `one_each` takes one address per name (`--edge`, IPv4 preferred); else all, taking turns between the names.
    """
    family = {"4": socket.AF_INET, "6": socket.AF_INET6}.get(ip_version, socket.AF_UNSPEC)
    loop = asyncio.get_running_loop()
    found: list[list[EdgeAddress]] = []
    for text in edges:
        host, port = split_address(text, "--edge")
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                answers = await loop.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError, TimeoutError) as error:
            log.error("Cannot resolve the edge address", error=str(error) or "no answer in time", edge=text)
            continue
        answers.sort(key=lambda answer: one_each and answer[0] != socket.AF_INET)
        addresses = list(dict.fromkeys(EdgeAddress(str(answer[4][0]), int(answer[4][1])) for answer in answers))
        found.append(addresses[:1] if one_each else addresses)
    turns = max((len(addresses) for addresses in found), default=0)
    mixed = [addresses[turn] for turn in range(turns) for addresses in found if turn < len(addresses)]
    if not mixed:
        raise ConfigError(
            "failed to resolve any edge address",
            advice="Check the DNS resolver of this machine, or name an edge with --edge HOST:PORT.",
        )
    return list(dict.fromkeys(mixed))


class AddressBook:
    """Hands out addresses: each conn_index keeps its own; a rotation moves it to one that nobody uses, if there is."""

    __slots__ = ("_addresses", "_used")

    def __init__(self, addresses: Sequence[EdgeAddress]) -> None:
        self._addresses = list(addresses)
        self._used: dict[int, EdgeAddress] = {}

    def __len__(self) -> int:
        return len(self._addresses)

    def get(self, conn_index: int) -> EdgeAddress:
        """Give the address that `conn_index` has, or the first free one."""
        address = self._used.get(conn_index)
        if address is None:
            taken = set(self._used.values())
            free = [candidate for candidate in self._addresses if candidate not in taken]
            address = free[0] if free else self._addresses[conn_index % len(self._addresses)]
            self._used[conn_index] = address
        return address

    def rotate(self, conn_index: int) -> EdgeAddress:
        """Move `conn_index` to the next free address after its own; without a free one it stays."""
        old = self.get(conn_index)
        start = self._addresses.index(old)
        taken = set(self._used.values())
        for step in range(1, len(self._addresses)):
            candidate = self._addresses[(start + step) % len(self._addresses)]
            if candidate not in taken:
                self._used[conn_index] = candidate
                return candidate
        return old
