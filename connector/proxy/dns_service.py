"""The virtual DNS address: a flow to `[2606:4700:cf1:2000::1]:53` goes to a resolver of this machine instead.

Owns: which resolver that is.
In: `--dns-resolver-addrs`, or the system's configuration. Out: addresses.
Never: reads what a flow asks, caches an answer.

*Strategy*: addresses given by flag are used as they are. Otherwise the first resolver of resolv.conf serves at once,
and one look-up in the background, at most every five minutes and only while somebody uses the address, finds out which
of them answers. A connector without a private network never asks anything.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from os import PathLike
from typing import Final

from connector.protocol.counts import COUNTS

VIRTUAL_DNS: Final = (bytes.fromhex("26064700 0cf12000 00000000 00000001"), 53)
"""Address (packed) and port."""

REFRESH_SECONDS: Final = 300.0
"""Age at which the resolver that answers is looked for again. Precedent: cloudflared 5 min."""

LOOKUP_SECONDS: Final = 5.0
"""Limit of that look-up over all resolvers. Precedent: cloudflared 5 s."""

LOOKUP_HOST: Final = "region1.v2.argotunnel.com"
"""What is looked up: a name that this program asks for anyway, so that no firewall is surprised."""

CONNECT_SECONDS: Final = 5.0
"""Limit of a TCP connect to a resolver; keep-alive is off. Precedent: cloudflared 5 s."""

MAX_RESOLVERS: Final = 10
"""Addresses that `--dns-resolver-addrs` may hold. Precedent: cloudflared 10."""

RESOLV_CONF: Final = "/etc/resolv.conf"
_LOOPBACK: Final = (ip_address("127.0.0.1").packed, 53)

Address = tuple[bytes, int]
Probe = Callable[[Sequence[Address]], Awaitable[Address | None]]


class VirtualDns:
    """One per process. `fixed` are the resolvers given by flag; one is drawn for every flow."""

    __slots__ = ("_clock", "_draw", "_due", "_fixed", "_found", "_probe", "_read", "_task")

    def __init__(
        self,
        fixed: Sequence[Address] = (),
        *,
        read: Callable[[], list[Address]] | None = None,
        probe: Probe | None = None,
        clock: Callable[[], float] | None = None,
        draw: Callable[[Sequence[Address]], Address] = random.choice,
    ) -> None:
        self._fixed = tuple(fixed)
        self._read = read or read_resolv_conf
        self._probe = probe or find_answering
        self._clock = clock
        self._draw = draw
        self._due = float("-inf")
        self._found: Address | None = None
        self._task: asyncio.Task[None] | None = None

    def maybe_resolver(self, address: bytes, port: int, *, tcp: bool) -> Address | None:
        """Return the resolver that a flow to `address` (packed) and `port` goes to; None: where it says."""
        if port != VIRTUAL_DNS[1] or address != VIRTUAL_DNS[0]:
            return None
        COUNTS.add("cloudflared_virtual_origins_dns_requests_total", "tcp" if tcp else "udp")
        if self._fixed:
            return self._draw(self._fixed)
        loop = asyncio.get_running_loop()
        now = self._clock() if self._clock is not None else loop.time()
        if now >= self._due:
            self._due = now + REFRESH_SECONDS
            known = self._read()
            if self._found not in known:
                self._found = known[0]
            if len(known) > 1 and self._task is None:  # one resolver alone needs no comparison
                self._task = loop.create_task(self._refresh(known), name="find the resolver that answers")
        return self._found

    async def close(self) -> None:
        """End a look-up that is on its way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _refresh(self, known: list[Address]) -> None:
        try:
            found = await self._probe(known)
            if found is not None:
                self._found = found
        finally:
            self._task = None


def read_resolv_conf(path: str | PathLike[str] = RESOLV_CONF) -> list[Address]:
    """Return the resolvers of a resolv.conf in order; 127.0.0.1:53 when there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return [_LOOPBACK]
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                found.append((ip_address(words[1].partition("%")[0]).packed, 53))
            except ValueError:
                continue
    return found or [_LOOPBACK]


async def find_answering(resolvers: Sequence[Address]) -> Address | None:
    """Ask one after the other; return the first that answers anything, None when nobody does."""
    import dns.asyncquery  # noqa: PLC0415  (slow to import, and only machines with several resolvers need it)
    import dns.exception  # noqa: PLC0415
    import dns.message  # noqa: PLC0415

    query = dns.message.make_query(LOOKUP_HOST, "A")
    each = LOOKUP_SECONDS / len(resolvers)
    for address, port in resolvers:
        try:
            await dns.asyncquery.udp(query, str(ip_address(address)), timeout=each, port=port)
        except (dns.exception.DNSException, OSError, EOFError):
            continue
        return address, port
    return None


def parse_resolvers(texts: Sequence[str]) -> list[Address]:
    """Read `--dns-resolver-addrs`: `ip:port` each. Errors: ValueError, with the words for the user."""
    if len(texts) > MAX_RESOLVERS:
        raise ValueError(f"{len(texts)} addresses, at most {MAX_RESOLVERS} are possible")
    found = []
    for text in texts:
        host, colon, port = text.strip().rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        try:
            address = ip_address(bare)
        except ValueError:
            address = None
        whole = colon and port.isascii() and port.isdigit() and 0 < int(port) <= 65535
        if address is None or not whole or (address.version == 6) == (bare is host):
            raise ValueError(f'"{text}" is not IP:PORT, such as 10.0.0.53:53 or [fd00::53]:53')
        found.append((address.packed, int(port)))
    return found
