"""Sockets to one rule's origin: how they are opened.

Owns: OriginDialler (addresses of one origin, socket options, the order in which addresses are tried).
In: a Service and its OriginSettings. Out: connected non-blocking sockets; OSError.
Never: knows who wants the connection, TLS, or a time limit of the whole dial (origins.py does).

*Strategy*: most origins are near: their handshake is over before `connect` has returned to us, so `maybe_open` asks a
second time and then has the socket without a task, a timer or a look at the loop. Whatever is not decided at once goes
to `open`, a coroutine that resolves names and races addresses. Names resolved a moment ago are not resolved again: a
look-up takes a thread, and a hundred WebSockets that open together would take a hundred. Meanwhile the address that
answered is the one that is tried (`localhost` is often `::1` first, where few services listen).
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import math
import socket
from typing import Any, Final

from connector.proxy import limits
from connector.proxy.ingress import OriginSettings, Service
from connector.transport.lookup import look_up

AddressInfo = tuple[Any, ...]

_CONNECTED: Final = (0, errno.EISCONN)
_UNDECIDED: Final = (errno.EINPROGRESS, errno.EALREADY, errno.EAGAIN, errno.EINTR)


class OriginDialler:
    """The way to one origin. One task per look-up, shared by all dials that wait for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, service: Service, settings: OriginSettings) -> None:
        self._loop = loop
        self._service = service
        self._happy = not settings.no_happy_eyeballs
        self._options = _socket_options(settings)
        self._lookup: asyncio.Task[list[AddressInfo]] | None = None
        self._literal = _literal_address(service)
        self._known: list[AddressInfo] = [] if self._literal is None else [self._literal]
        self._known_until = 0.0

    @property
    def looking_up(self) -> asyncio.Task[list[AddressInfo]] | None:
        """The look-up that runs, if one does."""
        return self._lookup

    def maybe_open(self) -> socket.socket | None:
        """Return a socket if one is connected at once; None when that takes longer, or fails: use `open` then."""
        service = self._service
        if service.path:
            sock = self._new(socket.AF_UNIX, 0)
            return self._maybe_connect(sock, service.path)
        if self._literal is None and (not self._known or self._loop.time() >= self._known_until):
            return None
        # The first address alone, or the one that answered: if not at once, the whole order is gone through.
        family, _, protocol, _, address = self._known[0]
        return self._maybe_connect(self._new(family, protocol), address)

    def _maybe_connect(self, sock: socket.socket | None, address: Any) -> socket.socket | None:
        if sock is None:
            return None
        try:
            code = sock.connect_ex(address)
            if code == errno.EINPROGRESS:
                code = sock.connect_ex(address)
        except (OSError, ValueError, OverflowError):
            code = errno.EINVAL
        if code in _CONNECTED:
            return sock
        sock.close()
        if code not in _UNDECIDED:
            self._known_until = 0.0  # it has moved, maybe
        return None

    def _new(self, family: int, protocol: int) -> socket.socket | None:
        """Return a socket with its options, or None where the system has none left."""
        try:
            return self._open_socket(family, protocol)
        except OSError:
            return None

    def _open_socket(self, family: int, protocol: int) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM, protocol)
        try:
            sock.setblocking(False)
            if family != socket.AF_UNIX:
                for level, name, value in self._options:
                    sock.setsockopt(level, name, value)
        except BaseException:
            sock.close()
            raise
        return sock

    async def open(self, tried: list[str]) -> socket.socket:
        """Return a connected socket; addresses that were tried are added to `tried`. Errors: OSError, UnicodeError."""
        if self._service.path:
            return await self._connect_path(self._service.path)
        if self._literal is not None:
            infos: list[AddressInfo] = [self._literal]
        else:
            infos = self._known = _interleave(await self._look_up())
            self._known_until = self._loop.time() + limits.RESOLVED_FOR
        return await self._open_in_turn(infos, tried)

    async def _look_up(self) -> list[AddressInfo]:
        """Resolve the service's name; dials that start meanwhile share the answer (a lookup occupies a thread)."""
        lookup = self._lookup
        if lookup is None:
            service = self._service
            lookup = self._lookup = self._loop.create_task(
                resolve(service.host, service.port), name=f"look up {service.host}"
            )
            lookup.add_done_callback(self._looked_up)
        return await asyncio.shield(lookup)

    def _looked_up(self, lookup: asyncio.Task[list[AddressInfo]]) -> None:
        self._lookup = None
        if not lookup.cancelled():
            lookup.exception()  # whoever still waits has it; nobody may

    async def _open_in_turn(self, infos: list[AddressInfo], tried: list[str]) -> socket.socket:
        """Try addresses one after the other; start a race as soon as one is slow."""
        problem: OSError = socket.gaierror(0, "the name has no address")
        for number, info in enumerate(infos):
            rest = infos[number + 1 :]
            hurry = rest and self._happy
            try:
                async with asyncio.timeout(limits.HAPPY_EYEBALLS_DELAY if hurry else None):
                    return await self._open_one(info, tried)
            except TimeoutError as error:
                if hurry:
                    return await self._open_race([*rest, info], tried)
                problem = error
            except OSError as error:
                problem = error
        raise problem

    async def _open_race(self, infos: list[AddressInfo], tried: list[str]) -> socket.socket:
        """Try addresses side by side, the next one when the last failed or is slow (RFC 8305 section 5)."""
        running: set[asyncio.Task[socket.socket]] = set()
        problem: OSError | None = None
        queue = list(infos)
        try:
            while queue or running:
                if queue:
                    running.add(self._loop.create_task(self._open_one(queue.pop(0), tried)))
                done, running = await asyncio.wait(
                    running,
                    timeout=limits.HAPPY_EYEBALLS_DELAY if queue else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                won = None
                for task in done:
                    error = task.exception()
                    if error is None and won is None:
                        won = task.result()
                    elif error is None:
                        task.result().close()
                    elif isinstance(error, OSError):
                        problem = problem or error
                    else:
                        raise error
                if won is not None:
                    return won
        finally:
            for task in running:
                task.cancel()
                task.add_done_callback(_close_result)
        assert problem is not None
        raise problem

    async def _open_one(self, info: AddressInfo, tried: list[str]) -> socket.socket:
        family, _, protocol, _, address = info
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        label = f"{host}:{address[1]}"
        if label not in tried:
            tried.append(label)
        sock = await self._connect(self._open_socket(family, protocol), address)
        known = self._known
        if info in known and known[0] is not info:
            self._known = [info, *(other for other in known if other is not info)]
        return sock

    async def _connect_path(self, path: str) -> socket.socket:
        """Connect to a Unix socket. While its queue is full there is nothing to wait for but time; a loop's own
        `sock_connect` takes such a socket for connected."""
        sock = self._open_socket(socket.AF_UNIX, 0)
        try:
            while True:
                try:
                    sock.connect(path)
                except (BlockingIOError, InterruptedError):
                    await asyncio.sleep(limits.UNIX_QUEUE_FULL)
                else:
                    return sock
        except BaseException:
            sock.close()
            raise

    async def _connect(self, sock: socket.socket, address: Any) -> socket.socket:
        try:
            await self._loop.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        return sock


def _socket_options(settings: OriginSettings) -> list[tuple[int, int, int]]:
    """Return level, name and value of what every TCP socket to an origin has set."""
    options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
    period = math.ceil(settings.tcp_keep_alive) or 15  # Go: 0 means 15 s, below 0 off
    if period > 0:
        options.append((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1))
        for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
            if hasattr(socket, name):
                options.append((socket.IPPROTO_TCP, getattr(socket, name), min(period, 32_767)))
    return options


async def resolve(host: str, port: int) -> list[AddressInfo]:
    """Ask the system's resolver. Errors: OSError, UnicodeError."""
    return await look_up(host, port)


def _close_result(task: asyncio.Task[socket.socket]) -> None:
    """Close the socket of a dial that lost a race in the same moment."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


def _literal_address(service: Service) -> AddressInfo | None:
    """Return the address of an IP literal: no lookup, no thread."""
    try:
        address = ipaddress.ip_address(service.host)
    except ValueError:
        return None
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    where = (service.host, service.port, 0, 0) if address.version == 6 else (service.host, service.port)
    return (family, socket.SOCK_STREAM, 0, "", where)


def _interleave(infos: list[AddressInfo]) -> list[AddressInfo]:
    """Return addresses with the families alternating, the resolver's first one first (RFC 8305 section 4)."""
    if not infos:
        return []
    first = [info for info in infos if info[0] == infos[0][0]]
    second = [info for info in infos if info[0] != infos[0][0]]
    mixed = [info for pair in zip(first, second, strict=False) for info in pair]
    return mixed + first[len(second) :] + second[len(first) :]
