"""Finds the edge: several ways to ask for its addresses, the last good answer on disk, and the two TXT records.

Owns: the order of the ways, their limits, the names that are asked for, and the saved answer. In: resolvers, a region
name. Out: Found, or DiscoveryError that names the first failure and what to do. Never: picks addresses for connections
(`protocol/edge_addresses.py` does), decides when to look again.

*Strategy*: the ways are tried in a fixed order (`_look_up`); the next one starts when one failed or stayed silent for a
while, and the first answer wins, so that a resolver that swallows SRV questions costs two seconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import stat
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from connector.errors import DiscoveryError
from connector.protocol.edge_addresses import EdgeAddress, RegionAddresses, order_services, split_static
from connector.protocol.protocol_choice import (
    FEATURE_RECORD,
    FEATURE_SECONDS,
    PROTOCOL_RECORD,
    RemoteFeatures,
    Share,
    decode_feature_record,
    decode_protocol_record,
)
from connector.transport.resolvers import HttpsResolver, Resolver, SystemResolver, TlsResolver

EDGE_PORT = 7844
"""The published port, used where no SRV record names one."""

STAGGER_SECONDS = 2.0
"""How long a way may stay silent before the next one starts beside it. A slow resolver answers within one second."""

WAY_SECONDS = 20.0
"""Limit of one way from its first question to its last address: one encrypted question and a plain one behind it."""

MAX_SAVED = 64 * 1024
"""Bytes of a saved answer that are read; real ones have two."""

MAX_SAVED_ADDRESSES = 64
"""Addresses of one region taken from a saved answer; the edge publishes twenty."""


def service_name(region: str) -> str:
    """Give the SRV name; a region goes before the service."""
    return f"_{_prefix(region)}v2-origintunneld._tcp.argotunnel.com"


def host_names(region: str) -> tuple[str, str]:
    """Give the names of the two regions' addresses, which the SRV records normally point to."""
    return f"{_prefix(region)}region1.v2.argotunnel.com", f"{_prefix(region)}region2.v2.argotunnel.com"


def _prefix(region: str) -> str:
    return f"{region}-" if region else ""


class Found(NamedTuple):
    """An answer."""

    regions: RegionAddresses
    way: str
    """Which way led to it, for a log line."""
    failures: tuple[str, ...] = ()
    """What the ways before it said, for a log line."""


class Discovery:
    """One per run. `await find()` at start, `await refresh()` later; static addresses need `find_static` only.

    `saved` is the file of the last good answer, None for no file. `draw` gives numbers in [0, 1), `clock` seconds since
    1970. `tls` and `https` may be None: then these ways are left out.
    """

    def __init__(
        self,
        *,
        region: str = "",
        system: Resolver | None = None,
        tls: Resolver | None = None,
        https: Resolver | None = None,
        saved: Path | None = None,
        stagger: float = STAGGER_SECONDS,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._region = region
        self._system: Resolver = system or SystemResolver()
        self._tls = tls
        self._https = https
        self._saved = saved
        self._stagger = stagger
        self._draw = draw
        self._clock = clock
        self.save_error = ""
        """Why the last good answer could not be saved; empty when it was."""

    async def find(self) -> Found:
        """Look the addresses up, and fall back to the saved answer. Errors: DiscoveryError."""
        try:
            found = await self._look_up()
        except DiscoveryError as error:
            saved = None if self._saved is None else await asyncio.to_thread(load_saved, self._saved, self._region)
            if saved is None:
                raise
            age = max(0.0, self._clock() - saved.saved_at)
            return Found(saved.regions, f"answer saved {age / 3600:.1f} h ago", (str(error),))
        await self._save(found.regions)
        return found

    async def refresh(self) -> Found | None:
        """Look the addresses up again; None when nobody answers: what is known stays in force."""
        try:
            found = await self._look_up()
        except DiscoveryError:
            return None
        await self._save(found.regions)
        return found

    async def _save(self, regions: RegionAddresses) -> None:
        if self._saved is None:
            return
        try:
            await asyncio.to_thread(save, self._saved, self._region, regions, self._clock())
            self.save_error = ""
        except OSError as error:
            self.save_error = f"{self._saved}: {error.strerror or error}"

    async def _look_up(self) -> Found:
        ways: list[tuple[str, Callable[[], Awaitable[RegionAddresses]]]] = [
            ("SRV records", lambda: self._by_service(self._system, [self._system])),
        ]
        if self._tls is not None:
            tls = self._tls
            ways.append((f"SRV records over {tls.label}", lambda: self._by_service(tls, [self._system, tls])))
        ways.append(("addresses of the regions' names", lambda: self._by_names([self._system])))
        if self._https is not None:
            https = self._https
            ways.append((f"SRV records over {https.label}", lambda: self._by_service(https, [https])))
        failures: list[str] = []
        regions, way = await _first(ways, self._stagger, failures)
        if regions is not None:
            return Found(regions, way, tuple(failures))
        raise DiscoveryError(
            f"Cannot find the addresses of the edge: {failures[0]}",
            advice=f"Asked: {', '.join(name for name, _ in ways)}; none gave an answer. Check the network and its DNS: "
            f"{service_name(self._region)} (SRV) must resolve, or port 853 or 443 of 1.1.1.1 be reachable. "
            "--edge HOST:PORT names an edge without discovery.",
        )

    async def _by_service(self, asked: Resolver, lookers: Sequence[Resolver]) -> RegionAddresses:
        """Ask `asked` for the SRV records, and each of `lookers` in turn for the addresses of their targets."""
        services = order_services(await asked.services(service_name(self._region)), self._draw)
        if len(services) < 2:
            raise DiscoveryError(
                f"{asked.label}: expected at least 2 Cloudflare Regions regions, but SRV only returned {len(services)}"
            )
        return await self._resolve([(each.target, each.port) for each in services[:2]], lookers)

    async def _by_names(self, lookers: Sequence[Resolver]) -> RegionAddresses:
        return await self._resolve([(host, EDGE_PORT) for host in host_names(self._region)], lookers)

    async def _resolve(self, targets: Sequence[tuple[str, int]], lookers: Sequence[Resolver]) -> RegionAddresses:
        results = await asyncio.gather(*(_addresses(host, lookers) for host, _ in targets), return_exceptions=True)
        regions: list[tuple[EdgeAddress, ...]] = []
        for result, (_, port) in zip(results, targets, strict=True):
            if isinstance(result, BaseException):
                raise result
            regions.append(tuple(EdgeAddress(address, port) for address in result))
        first, second = regions
        # An address that stands in both regions is one address.
        return first, tuple(each for each in second if each not in first)


async def _addresses(host: str, lookers: Sequence[Resolver]) -> list[str]:
    failed: DiscoveryError | None = None
    for looker in lookers:
        try:
            return await looker.addresses(host)
        except DiscoveryError as error:
            failed = failed or error
    assert failed is not None
    raise failed


async def _first(
    ways: Sequence[tuple[str, Callable[[], Awaitable[RegionAddresses]]]], stagger: float, failures: list[str]
) -> tuple[RegionAddresses | None, str]:
    """Run the ways, each `stagger` after the one before it or when all that run have failed; the first answer wins."""
    running: dict[asyncio.Task[RegionAddresses], str] = {}
    left = list(ways)
    try:
        while left or running:
            if left:
                name, way = left.pop(0)
                running[asyncio.create_task(_limited(way), name=f"discovery: {name}")] = name
            done, _ = await asyncio.wait(
                running, timeout=stagger if left else None, return_when=asyncio.FIRST_COMPLETED
            )
            # Two may be done in one turn; the earlier way is the better one.
            for task in [each for each in running if each in done]:
                name = running.pop(task)
                error = task.exception()
                if error is None:
                    return task.result(), name
                if not isinstance(error, DiscoveryError):
                    raise error
                failures.append(f"{name}: {error}")
        return None, ""
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _limited(way: Callable[[], Awaitable[RegionAddresses]]) -> RegionAddresses:
    try:
        async with asyncio.timeout(WAY_SECONDS):
            return await way()
    except TimeoutError:
        raise DiscoveryError("no answer in time") from None


async def find_static(
    edges: Sequence[tuple[str, int]], *, resolver: Resolver | None = None, skipped: Callable[[str, str], None]
) -> RegionAddresses:
    """Resolve what `--edge` named, one address each, IPv4 preferred. Errors: DiscoveryError when nothing is left.

    `skipped(edge, error)` is told about names that do not resolve.
    """
    resolver = resolver or SystemResolver()
    results = await asyncio.gather(*(_one(host, port, resolver) for host, port in edges), return_exceptions=True)
    found: list[EdgeAddress] = []
    for (host, port), result in zip(edges, results, strict=True):
        if isinstance(result, EdgeAddress):
            found.append(result)
        elif isinstance(result, DiscoveryError):
            skipped(f"{host}:{port}", str(result))
        else:
            raise result
    if not found:
        raise DiscoveryError(
            "failed to resolve any edge address",
            advice="Check the names given with --edge and the DNS resolver of this machine.",
        )
    return split_static(found)


async def _one(host: str, port: int, resolver: Resolver) -> EdgeAddress:
    try:
        return EdgeAddress(str(ip_address(host)), port)
    except ValueError:
        pass
    addresses = await resolver.addresses(host)
    return EdgeAddress(next((each for each in addresses if ":" not in each), addresses[0]), port)


# -- the saved answer -------------------------------------------------------------------------------------------------


class Saved(NamedTuple):
    """An answer from the disk."""

    regions: RegionAddresses
    saved_at: float
    """Seconds since 1970."""


def saved_path(region: str) -> Path | None:
    """Give the file of the last good answer below the user's state directory (XDG); None without a home directory."""
    state = os.environ.get("XDG_STATE_HOME", "")
    try:
        base = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    name = f"edge-addresses-{quote(region, safe='')}.json" if region else "edge-addresses.json"
    return base / "tunnel-connector" / name


def load_saved(path: Path, region: str) -> Saved | None:
    """Read a saved answer; None for a file that is missing, broken, for another region, or another user's to write."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        with open(descriptor, "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode) or (
                os.name == "posix" and facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            ):
                return None
            data = file.read(MAX_SAVED + 1)
    except OSError:
        return None
    return decode_saved(data, region)


def decode_saved(data: bytes, region: str) -> Saved | None:
    """Read the bytes of a saved answer; None when they are not one for `region`."""
    if len(data) > MAX_SAVED:
        return None
    try:
        value = json.loads(data)
        if value["version"] != 1 or value["region"] != region:
            return None
        first, second = (
            tuple(_saved_address(*each) for each in addresses[:MAX_SAVED_ADDRESSES]) for addresses in value["regions"]
        )
        saved_at = float(value["saved_at"])
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None
    if not (first or second) or not abs(saved_at) < 1e12:
        return None
    return Saved((first, second), saved_at)


def _saved_address(host: object, port: object) -> EdgeAddress:
    if not isinstance(host, str) or not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536:
        raise ValueError("no address")
    return EdgeAddress(str(ip_address(host)), port)


def save(path: Path, region: str, regions: RegionAddresses, now: float) -> None:
    """Write an answer so that a reader sees the old one or the new one, never half of it. Errors: OSError.

    Nobody else may read it: it tells which networks this user reaches.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = json.dumps({"version": 1, "region": region, "saved_at": now, "regions": regions}, indent=1)
    descriptor, name = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)  # made with mode 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# -- TXT records ------------------------------------------------------------------------------------------------------


async def protocol_shares(resolver: Resolver) -> tuple[Share, ...]:
    """Look the protocol record up. Errors: DiscoveryError, WireError."""
    return decode_protocol_record((await resolver.texts(PROTOCOL_RECORD))[0])


async def remote_features(resolver: Resolver, limit: float = FEATURE_SECONDS) -> RemoteFeatures:
    """Look the feature record up. Errors: DiscoveryError, WireError."""
    try:
        async with asyncio.timeout(limit):
            texts = await resolver.texts(FEATURE_RECORD)
    except TimeoutError:
        raise DiscoveryError(f"{resolver.label}: TXT {FEATURE_RECORD}: no answer in time") from None
    return decode_feature_record(texts[0])


def default_discovery(region: str = "") -> Discovery:
    """Make the discovery of a normal run: all ways, and the saved answer in the user's state directory."""
    return Discovery(region=region, tls=TlsResolver(), https=HttpsResolver(), saved=saved_path(region))
