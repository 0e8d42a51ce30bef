"""Notices that the network may work again: a link came up, an address changed, the machine woke from suspend.

Owns: one netlink socket (Linux) and one slow timer that compares clocks. In: the kernel's notices. Out: one call of
`on_wakeup` for each change, at once, and at most one a second. Never: decides what a change means for a connection.

*Strategy*: netlink also tells about what did not change (renewed lifetimes, wireless statistics), so the links that run
and the addresses that exist are remembered, and only differences count. Suspend stops the monotonic clock, not the
boot-time clock (Linux) or the wall clock: a difference in their pace is a jump.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

from connector.transport.readiness import Readiness

TICK_SECONDS = 5.0
"""Pause between two comparisons of the clocks: a wake from suspend is noticed within it, at a few microseconds each."""

JUMP_SECONDS = 3.0
"""Difference between the clocks that counts as a jump. NTP slews by 0.5 ms a second; a step of it is harmless."""

MIN_INTERVAL = 1.0
"""At most one wake-up in this time: a link that flaps must not become a storm of dials."""

MAX_KNOWN = 4096
"""Links and addresses remembered, each; beyond that changes count as news. Machines with thousands of containers."""

RECEIVE_BUFFER = 256 * 1024
"""Bytes of notices that the kernel keeps for us; what does not fit makes it say ENOBUFS, and we look at everything."""

MAX_READS = 64
"""Reads of the socket in one turn of the loop, so that a flood of notices cannot starve it."""


class Cause(Enum):
    """Why a wake-up came. The value is the metric's label."""

    LINK_UP = "link_up"
    ADDRESS_NEW = "address_new"
    ADDRESS_GONE = "address_gone"
    ROUTE_NEW = "route_new"
    MISSED = "missed"
    """The kernel had more notices than it could keep for us: anything may have changed."""
    RESUMED = "resumed"


class Wakeup(NamedTuple):
    """One call's news: every cause since the last call, in the order of `Cause`."""

    causes: tuple[Cause, ...]


# -- netlink messages (linux/netlink.h, linux/rtnetlink.h) ------------------------------------------------------------

_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")

_DONE, _ERROR = 3, 2
_NEW_LINK, _DEL_LINK, _GET_LINK = 16, 17, 18
_NEW_ADDRESS, _DEL_ADDRESS, _GET_ADDRESS = 20, 21, 22
_NEW_ROUTE, _DEL_ROUTE = 24, 25
_REQUEST_DUMP = 0x001 | 0x300
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
"""RTMGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE."""

_UP, _LOOPBACK, _RUNNING = 0x1, 0x8, 0x40
_TENTATIVE = 0x40
_SCOPE_LINK = 253
_TABLE_MAIN = 254
_UNICAST = 1
_ADDRESS_ATTRIBUTE, _LOCAL_ATTRIBUTE = 1, 2
_MASTER_OF_LINK = 10
_LINK_OF_ROUTE = 4
_ROUTE_KEY = (5, 6, 9, 18)
"""Gateway, priority, multipath, via: what makes one default route another than the next."""


def _messages(data: bytes) -> Iterator[tuple[int, int, memoryview]]:
    """Split one read into (type, sequence number, payload); what is cut short ends it."""
    view, offset = memoryview(data), 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > len(data):
            return
        yield kind, sequence, view[offset + _HEADER.size : offset + length]
        offset += length + 3 & ~3


def _attributes(payload: memoryview, offset: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while offset + _ATTRIBUTE.size <= len(payload):
        length, kind = _ATTRIBUTE.unpack_from(payload, offset)
        if length < _ATTRIBUTE.size or offset + length > len(payload):
            break
        found[kind & 0x3FFF] = bytes(payload[offset + _ATTRIBUTE.size : offset + length])
        offset += length + 3 & ~3
    return found


class NetworkMemory:
    """Turns notices into changes: what runs and which addresses exist. Feed it every read; it does no I/O."""

    __slots__ = ("_addresses", "_dumped", "_links", "_routes", "_wanted")

    def __init__(self) -> None:
        self._links: set[int] = set()
        self._addresses: set[tuple[int, bytes]] = set()
        self._routes: set[tuple[int, bytes]] = set()
        self._wanted: list[int] = []
        self._dumped: int | None = None

    def dump(self) -> bytes:
        """Give the first request for all that exists; `receive` gives the ones after it."""
        self._wanted = [_GET_LINK, _GET_ADDRESS]
        return self._next_request()

    def _next_request(self) -> bytes:
        if not self._wanted:
            self._dumped = None
            return b""
        # The sequence number is the request's type: answers carry it, the kernel's own notices carry others.
        self._dumped = self._wanted.pop(0)
        return _HEADER.pack(_HEADER.size + 4, self._dumped, _REQUEST_DUMP, self._dumped, 0) + bytes(4)

    def receive(self, data: bytes) -> tuple[set[Cause], bytes]:
        """Take one read; give the changes and the next request to send, if any."""
        changes: set[Cause] = set()
        request = b""
        for kind, sequence, payload in _messages(data):
            if kind in {_DONE, _ERROR}:
                if sequence == self._dumped:
                    request = self._next_request()
                continue
            change = self._change(kind, payload)
            if change is not None and sequence != self._dumped:
                changes.add(change)
        return changes, request

    def _change(self, kind: int, payload: memoryview) -> Cause | None:
        if kind in {_NEW_LINK, _DEL_LINK} and len(payload) >= _LINK.size:
            _, _, index, flags, _ = _LINK.unpack_from(payload)
            runs = kind == _NEW_LINK and bool(flags & _UP and flags & _RUNNING and not flags & _LOOPBACK)
            # A port of a bridge or bond carries our traffic only through its master: a starting container is no news.
            return self._link(index, runs and not any(_attributes(payload, _LINK.size).get(_MASTER_OF_LINK, b"")))
        if kind in {_NEW_ADDRESS, _DEL_ADDRESS} and len(payload) >= _ADDRESS.size:
            return self._address(kind == _NEW_ADDRESS, payload)
        if kind in {_NEW_ROUTE, _DEL_ROUTE} and len(payload) >= _ROUTE.size:
            return self._route(kind == _NEW_ROUTE, payload)
        return None

    def _link(self, index: int, runs: bool) -> Cause | None:
        if not runs:
            self._links.discard(index)
            self._forget_routes(index)
            return None
        if index in self._links:
            return None
        if len(self._links) < MAX_KNOWN:
            self._links.add(index)
        return Cause.LINK_UP

    def _address(self, new: bool, payload: memoryview) -> Cause | None:
        _, _, flags, scope, index = _ADDRESS.unpack_from(payload)
        if scope >= _SCOPE_LINK:
            return None
        attributes = _attributes(payload, _ADDRESS.size)
        address = attributes.get(_LOCAL_ATTRIBUTE) or attributes.get(_ADDRESS_ATTRIBUTE, b"")
        key = (index, address)
        if not new:
            known = key in self._addresses
            self._addresses.discard(key)
            self._forget_routes(index)
            return Cause.ADDRESS_GONE if known else None
        if flags & _TENTATIVE or key in self._addresses:
            return None
        if len(self._addresses) < MAX_KNOWN:
            self._addresses.add(key)
        return Cause.ADDRESS_NEW

    def _route(self, new: bool, payload: memoryview) -> Cause | None:
        family, prefix, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(payload)
        if prefix or table != _TABLE_MAIN or kind != _UNICAST:
            return None  # only default routes: routers learn thousands of others
        attributes = _attributes(payload, _ROUTE.size)
        index = int.from_bytes(attributes.get(_LINK_OF_ROUTE, b""), sys.byteorder)
        key = (index, b"|".join([bytes([family]), *(attributes.get(each, b"") for each in _ROUTE_KEY)]))
        if not new:
            self._routes.discard(key)
            return None
        if key in self._routes:
            return None
        if len(self._routes) < MAX_KNOWN:
            self._routes.add(key)
        return Cause.ROUTE_NEW

    def _forget_routes(self, index: int) -> None:
        """Routes vanish with their link or address, and the kernel does not say so."""
        self._routes = {route for route in self._routes if route[0] not in {index, 0}}


# -- clocks -----------------------------------------------------------------------------------------------------------


def _lasting_clock() -> float:
    """Give seconds on the clock that suspend does not stop: boot time where there is one, else the wall clock."""
    boot: int | None = getattr(time, "CLOCK_BOOTTIME", None)
    return time.time() if boot is None else time.clock_gettime(boot)


class ClockWatch:
    """Compares the paces of two clocks. `jumped()` once in a while."""

    __slots__ = ("_before", "_lasting", "_running")

    def __init__(
        self, running: Callable[[], float] = time.monotonic, lasting: Callable[[], float] = _lasting_clock
    ) -> None:
        self._running = running
        self._lasting = lasting
        self._before = lasting() - running()

    def jumped(self) -> bool:
        """Tell whether the lasting clock gained on the running one since the last call."""
        now = self._lasting() - self._running()
        gained = now - self._before
        self._before = now
        # A wall clock that is set back is no resume; a boot-time clock never is.
        return gained > JUMP_SECONDS


# -- the source of wake-ups -------------------------------------------------------------------------------------------


class Wakeups:
    """Calls `on_wakeup(Wakeup)` on changes, between `start()` and `close()`, on the running loop.

    The first change is told at once, further ones of the same second together at its end. `watches_network` tells
    whether netlink could be had; without it only resumes are noticed.
    """

    def __init__(
        self,
        on_wakeup: Callable[[Wakeup], None],
        *,
        clocks: ClockWatch | None = None,
        tick: float = TICK_SECONDS,
        min_interval: float = MIN_INTERVAL,
    ) -> None:
        self._on_wakeup = on_wakeup
        self._clocks = clocks or ClockWatch()
        self._tick = tick
        self._min_interval = min_interval
        self._memory = NetworkMemory()
        self._socket: socket.socket | None = None
        self._ready: Readiness | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._told: asyncio.TimerHandle | None = None
        self._causes: set[Cause] = set()

    @property
    def watches_network(self) -> bool:
        """True while netlink tells about links and addresses."""
        return self._socket is not None

    def start(self) -> None:
        """Begin to watch. Once."""
        self._loop = asyncio.get_running_loop()
        self._tick_timer = self._loop.call_later(self._tick, self._compare)
        if sys.platform == "linux":
            self._socket = _netlink()
        if self._socket is not None:
            self._ready = Readiness(self._socket, self._loop, on_readable=self._readable)
            self._ready.read(True)
            self._send(self._memory.dump())

    def close(self) -> None:
        """Stop. No call comes after it. Idempotent."""
        for timer in (self._tick_timer, self._told):
            if timer is not None:
                timer.cancel()
        self._tick_timer = self._told = None
        self._drop_socket()
        self._loop = None

    def _drop_socket(self) -> None:
        if self._socket is not None:
            assert self._ready is not None
            self._ready.close()
            self._socket.close()
            self._socket = None

    def _compare(self) -> None:
        assert self._loop is not None
        self._tick_timer = self._loop.call_later(self._tick, self._compare)
        if self._clocks.jumped():
            self._tell({Cause.RESUMED})

    def _readable(self) -> None:
        changes: set[Cause] = set()
        for _ in range(MAX_READS):
            if self._socket is None:
                break
            try:
                data = self._socket.recv(65536)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    self._drop_socket()
                    break
                changes.add(Cause.MISSED)
                self._memory = NetworkMemory()
                self._send(self._memory.dump())
                continue
            if not data:
                self._drop_socket()
                break
            found, request = self._memory.receive(data)
            changes |= found
            self._send(request)
        if changes:
            self._tell(changes)

    def _send(self, request: bytes) -> None:
        if request and self._socket is not None:
            try:
                self._socket.send(request)
            except OSError:
                pass  # without the list of what exists the first notice about each thing counts as news

    def _tell(self, causes: set[Cause]) -> None:
        assert self._loop is not None
        self._causes |= causes
        if self._told is None:
            self._told = self._loop.call_later(self._min_interval, self._interval_over)
            self._call()

    def _interval_over(self) -> None:
        self._told = None
        if self._causes:
            self._tell(set())

    def _call(self) -> None:
        causes = tuple(cause for cause in Cause if cause in self._causes)
        self._causes.clear()
        self._on_wakeup(Wakeup(causes))


def _netlink() -> socket.socket | None:
    """Open the netlink socket; None where a sandbox forbids it."""
    try:
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    except OSError:
        return None
    try:
        netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        netlink.bind((0, _GROUPS))
    except OSError:
        netlink.close()
        return None
    return netlink
