"""ICMP echo for private networks, by ping sockets that need no privilege (Linux).

Owns: the ping sockets, one per (source, destination, identifier); whether the system allows them at all.
In: IP packets of the edge. Out: echo requests to origins, replies and Time Exceeded to the edge.
Never: any other ICMP, raw sockets, a task.

The kernel writes the socket's own identifier over the one in a request and gives a socket only replies to it; the
original one is put back here.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Protocol

from connector.errors import ConfigError, WireError
from connector.protocol.counts import COUNTS
from connector.protocol.idle_wheel import IdleWheel
from connector.transport.readiness import Readiness
from connector.wire import icmp
from connector.wire.otlp import OK, UNSET, Attribute

IDLE_SECONDS: Final = 10.0
"""Life of an unused flow. Precedent: cloudflared."""

MAX_FLOWS: Final = 1024
"""Ping sockets at once; further requests are dropped. Each is a descriptor, and whoever may send packets through the
edge can make one per identifier. cloudflared has no limit of its own."""

READ_SIZE: Final = 1500
READ_BATCH: Final = 8

GROUP_RANGE: Final = "/proc/sys/net/ipv4/ping_group_range"
IF_INET6: Final = "/proc/net/if_inet6"

_REQUESTS, _REPLIES = "cloudflared_icmp_total_requests", "cloudflared_icmp_total_replies"
_DROPPED = "cloudflared_icmp_dropped_packets"


class IcmpEnd(Protocol):
    """The connection that a flow answers on."""

    label: str

    def send_icmp(self, packet: bytes) -> bool:
        """Send an IP packet to the edge; False when that is not possible."""

    def send_spans(self, identity: bytes, spans: bytes) -> None:
        """Send what tracing recorded of a packet."""


class FlowTrace(Protocol):
    """The spans of one traced packet or session; each begins where the last one ended."""

    def end(self, name: str, attributes: tuple[Attribute, ...] = (), *, status: int = UNSET, error: str = "") -> None:
        """End a span."""

    def spans(self) -> bytes:
        """Give the ended spans as OTLP, once."""


FlowTracing = Callable[[bytes], FlowTrace | None]
"""Gives the trace of a context in text; None when it is not sampled."""

OnEvent = Callable[[str, str, dict[str, object]], None]
Key = tuple[bytes, bytes, int]


class PingFlow:
    """One ping socket: what the edge's `key` (source, destination, identifier) asks of one destination."""

    __slots__ = ("_loop", "_owner", "_ready", "_socket", "active_at", "end", "idle", "key", "slot", "traced")

    def __init__(self, owner: IcmpProxy, key: Key, end: IcmpEnd, sock: socket.socket, now: float) -> None:
        self.key = key
        self.end = end
        self.active_at = now
        self.idle = IDLE_SECONDS
        self.slot = 0
        self.traced: tuple[bytes, FlowTrace] | None = None
        """Identity and trace of the request that opened the flow, until its first reply."""
        self._owner = owner
        self._socket = sock
        self._loop = owner.loop
        self._ready = Readiness(sock, owner.loop, on_readable=self._on_readable)
        self._ready.read(True)

    @property
    def identifier(self) -> int:
        """The one that the kernel puts into requests."""
        return int(self._socket.getsockname()[1])

    def send(self, message: bytes) -> None:
        """Send an echo request. Errors: OSError."""
        self._socket.sendto(message, (str(ip_address(self.key[1])), 0))

    def on_idle(self, now: float) -> None:
        """Nothing was asked or answered for a while."""
        self._owner.forget(self)

    def close(self) -> None:
        """Let the socket go."""
        self._ready.close()
        self._socket.close()

    def _on_readable(self) -> None:
        source, _, identifier = self.key
        wanted = icmp.ECHO4_REPLY if len(source) == 4 else icmp.ECHO6_REPLY
        for _ in range(READ_BATCH):
            try:
                message, address = self._socket.recvfrom(READ_SIZE)
            except BlockingIOError:
                return
            except OSError:  # news of a failed request; the asker's own time-out tells it
                return
            if len(message) < icmp.ECHO_HEAD or message[0] != wanted:
                COUNTS.add(_DROPPED, self.end.label, "read_failed")
                continue
            self.active_at = self._loop.time()
            replier = ip_address(address[0].partition("%")[0]).packed
            packet = icmp.encode_packet(replier, source, icmp.with_identifier(message, identifier, wanted))
            if self.end.send_icmp(packet):
                COUNTS.add(_REPLIES)
                if self.traced is not None:
                    self._trace_reply(message, str(address[0]))
            else:
                COUNTS.add(_DROPPED, self.end.label, "read_too_large")

    def _trace_reply(self, message: bytes, replier: str) -> None:
        assert self.traced is not None
        identity, trace = self.traced
        self.traced = None
        attributes: tuple[Attribute, ...] = (
            ("originalEchoID", self.key[2]), ("dst", replier), ("echoID", int.from_bytes(message[4:6])),
            ("seq", int.from_bytes(message[6:8])),
        )  # fmt: skip
        trace.end("icmp-echo-reply", attributes, status=OK)
        self.end.send_spans(identity, trace.spans())


class IcmpProxy:
    """One per process. `start`, then `request` for each packet; `lost` for each connection; `close`."""

    def __init__(
        self, source4: IPv4Address, source6: IPv6Address | None, loop: asyncio.AbstractEventLoop, zone: str = ""
    ) -> None:
        self.loop = loop
        self.source4 = source4
        self.source6 = source6
        self.zone = zone
        self._flows: dict[Key, PingFlow] = {}
        self._wheel: IdleWheel | None = None
        self._wake: Callable[[], None] = lambda: None
        self._on_event: OnEvent = lambda level, message, fields: None
        self._tracing: FlowTracing | None = None

    def start(
        self, wheel: IdleWheel, wake: Callable[[], None], on_event: OnEvent, tracing: FlowTracing | None = None
    ) -> None:
        """Take the process's wheel, what sees to its timer, the log, and who traces."""
        self._tracing = tracing
        self._wheel = wheel
        self._wake = wake
        self._on_event = on_event

    @property
    def flows(self) -> int:
        """Ping sockets that are open."""
        return len(self._flows)

    def request(self, end: IcmpEnd, packet: bytes, now: float, identity: bytes = b"") -> None:
        """Take a packet of the edge that came over `end`; `identity` is there when it is traced."""
        try:
            echo = icmp.decode_echo_request(packet)
        except WireError as error:
            COUNTS.add(_DROPPED, end.label, "write_failed")
            self._on_event("error", "Failed to decode ICMP packet from quic datagram", {"error": str(error)})
            return
        if echo.ttl <= 1:
            self._answer_exceeded(end, packet, echo)
            return
        key = (echo.source, echo.destination, echo.identifier)
        flow = self._flows.get(key)
        if flow is not None and flow.end is not end:  # the edge moved: answers belong where the question came from
            self.forget(flow)
            flow = None
        trace = self._tracing(_context(identity)) if identity and self._tracing is not None else None
        new = flow is None
        try:
            if flow is None:
                flow = self._open(end, key, now)
                flow.traced = None if trace is None else (identity, trace)
            flow.active_at = now
            flow.send(echo.message)
        except OSError as error:
            if trace is not None:
                trace.end("icmp-echo-request", _request_attributes(echo), error=error.strerror or str(error))
                end.send_spans(identity, trace.spans())
            COUNTS.add(_DROPPED, end.label, "write_failed")
            fields: dict[str, object] = {
                "src": str(ip_address(echo.source)), "dst": str(ip_address(echo.destination)),
                "error": error.strerror or str(error),
            }  # fmt: skip
            self._on_event("error", "Failed to send ICMP packet", fields)
            return
        COUNTS.add(_REQUESTS)
        if trace is not None:
            opened = (("newFlow", True), ("port", flow.identifier)) if new else ()
            trace.end("icmp-echo-request", (*_request_attributes(echo), *opened), status=OK)
            end.send_spans(identity, trace.spans())

    def forget(self, flow: PingFlow) -> None:
        """Let a flow go."""
        if self._flows.get(flow.key) is flow:
            del self._flows[flow.key]
            assert self._wheel is not None
            self._wheel.remove(flow)
            flow.close()

    def lost(self, end: IcmpEnd) -> None:
        """A connection is over."""
        for flow in [flow for flow in self._flows.values() if flow.end is end]:
            self.forget(flow)

    def close(self) -> None:
        """Let everything go."""
        for flow in list(self._flows.values()):
            self.forget(flow)

    def _open(self, end: IcmpEnd, key: Key, now: float) -> PingFlow:
        if len(self._flows) >= MAX_FLOWS:
            raise OSError(f"more than {MAX_FLOWS} flows at once")
        if len(key[1]) == 4:
            sock = open_ping(self.source4)
        elif self.source6 is not None:
            sock = open_ping(self.source6, self.zone)
        else:
            raise OSError("no ping sockets for IPv6 here")
        assert self._wheel is not None
        flow = self._flows[key] = PingFlow(self, key, end, sock, now)
        self._wheel.add(flow)
        self._wake()
        return flow

    def _answer_exceeded(self, end: IcmpEnd, packet: bytes, echo: icmp.EchoRequest) -> None:
        source = self.source4 if len(echo.source) == 4 else self.source6
        if source is not None and not end.send_icmp(icmp.encode_time_exceeded(packet, echo, source.packed)):
            COUNTS.add(_DROPPED, end.label, "write_failed")


def _context(identity: bytes) -> bytes:
    """Write a packet's trace identity as text, the span ID with all its digits: a shorter one counts as none."""
    return f"{identity[:16].hex()}:{identity[16:24].hex()}:0:{identity[24]:x}".encode()


def _request_attributes(echo: icmp.EchoRequest) -> tuple[Attribute, ...]:
    return (
        ("src", str(ip_address(echo.source))), ("dst", str(ip_address(echo.destination))),
        ("originalEchoID", echo.identifier), ("seq", echo.sequence),
    )  # fmt: skip


def open_ping(source: IPv4Address | IPv6Address, zone: str = "") -> socket.socket:
    """Open a ping socket bound to `source`. Errors: OSError."""
    if source.version == 4:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    else:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6)
    try:
        sock.setblocking(False)
        if source.version == 4:
            sock.bind((str(source), 0))
        else:
            sock.bind((str(source), 0, 0, socket.if_nametoindex(zone) if zone else 0))
    except BaseException:
        sock.close()
        raise
    return sock


def make_icmp_proxy(
    loop: asyncio.AbstractEventLoop,
    source4: str = "",
    source6: str = "",
    *,
    group_range: str | os.PathLike[str] = GROUP_RANGE,
) -> IcmpProxy:
    """Make the proxy with `--icmpv4-src` and `--icmpv6-src`, or what the system would use.

    Errors: ConfigError for a flag that is no address of its family; OSError, with the reason, where ping sockets are
    not allowed.
    """
    given4 = _given(source4, 4, "--icmpv4-src")
    given6 = _given(source6, 6, "--icmpv6-src")
    if not sys.platform.startswith("linux"):
        raise OSError("ping sockets are used on Linux only")
    _check_group(group_range)
    address4 = IPv4Address(given4) if given4 else local_ipv4()
    open_ping(address4).close()
    address6, zone = (IPv6Address(given6), "") if given6 else local_ipv6(address4)
    usable6: IPv6Address | None = address6
    try:
        open_ping(address6, zone).close()
    except OSError:
        usable6 = None
    return IcmpProxy(address4, usable6, loop, zone)


def _given(text: str, version: int, flag: str) -> str:
    if not text:
        return ""
    try:
        if ip_address(text).version == version:
            return text
    except ValueError:
        pass
    raise ConfigError(f'{flag}: "{text}" is no IPv{version} address', advice="Give an address of this machine.")


def _check_group(path: str | os.PathLike[str]) -> None:
    """Errors: OSError when the process's group may not open ping sockets."""
    with open(path, encoding="ascii") as file:
        numbers = file.read().split()
    low, high = int(numbers[0]), int(numbers[1])
    group = os.getegid()
    if not low <= group <= high:
        raise OSError(f"Group ID {group} is not between ping group {low} to {high} ({path})")


def local_ipv4() -> IPv4Address:
    """Return the address from which the system would send to a private network; 0.0.0.0 when it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.168.0.1", 53))  # sends nothing
            return IPv4Address(sock.getsockname()[0])
        except OSError:
            return IPv4Address(0)


def local_ipv6(beside: IPv4Address, path: str | os.PathLike[str] = IF_INET6) -> tuple[IPv6Address, str]:
    """Return an IPv6 address, of the interface that has `beside` if possible, and its zone; `::` when there is none."""
    try:
        with open(path, encoding="ascii") as file:
            rows = [line.split() for line in file]
    except OSError:
        rows = []
    found = [(IPv6Address(bytes.fromhex(row[0])), row[5]) for row in rows if len(row) >= 6]
    usable = [(address, name) for address, name in found if not address.is_loopback]
    name = _interface_of(beside)
    # A link-local address reaches nothing behind a router, so that any other is better, even of another interface.
    usable.sort(key=lambda each: (each[0].is_link_local, each[1] != name))
    best = next(iter(usable), None)
    if best is None:
        return IPv6Address(0), ""
    return best[0], best[1] if best[0].is_link_local else ""


def _interface_of(address: IPv4Address) -> str:
    """Return the interface that has `address`; nothing when none is found."""
    import fcntl  # noqa: PLC0415  (not on Windows)
    import struct  # noqa: PLC0415

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(sock, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
            except OSError:
                continue
            if answer[20:24] == address.packed:
                return name
    return ""
