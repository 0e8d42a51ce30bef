"""UDP flows and pings through a connector, as the edge opens them for a device in a private network.

Owns: the edge's half of both datagram versions on one QUIC link: registration with repeats, the flows that are open,
the pings that wait for an answer.
In: calls; datagrams of the link. Out: datagrams and session RPC; payloads and ends to whoever opened a flow.
Never: shares a codec with the connector (what is here was written from the wire contract a second time).
"""

from __future__ import annotations

import asyncio
import struct
import uuid
from collections.abc import Callable
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

from connector.devedge.quicrpc import register_udp_session, unregister_udp_session

if TYPE_CHECKING:
    from connector.devedge.quiclink import QuicLink

VERSION_3 = "support_datagram_v3_2"
"""The feature of a connector that speaks version 3; the others speak version 2."""

REPEAT = 0.5
"""Seconds after which a registration of version 3 is sent again: datagrams may be lost, either way."""

OPEN_LIMIT = 10.0
"""Seconds for a flow to be opened."""

REFUSALS = {1: "destination unreachable", 2: "unable to bind a socket", 3: "too many active flows", 255: "error"}

PING_TTL = 64

Address = tuple[str, int]
OnPayload = Callable[[bytes], None]
OnEnd = Callable[[str], None]


class FlowRefusedError(Exception):
    """The connector does not open a flow; the text says why. `code` is version 3's, 0 without one."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class UdpFlow:
    """One open flow. `on_payload` hears every payload, `on_end` the end where the connector tells it or is lost."""

    def __init__(self, desk: DatagramDesk, flow_id: bytes, dest: Address, on_payload: OnPayload, on_end: OnEnd) -> None:
        self.desk = desk
        self.flow_id = flow_id
        self.dest = dest
        self.on_payload = on_payload
        self.on_end = on_end
        self.open = True

    def send(self, payload: bytes) -> bool:
        """Send one payload; False when it is too long, the link takes no more, or the flow is over."""
        return self.open and self.desk.send_payload(self.flow_id, payload)

    async def move(self, desk: DatagramDesk) -> None:
        """Go on over another link of the same connector (version 3). Raises FlowRefusedError, TimeoutError."""
        await desk.register(self)
        self.desk.flows.pop(self.flow_id, None)
        self.desk = desk
        desk.flows[self.flow_id] = self

    async def close(self) -> None:
        """End the flow; in version 3 that means to forget it, and the connector's idle time does the rest."""
        if not self.open:
            return
        self.open = False
        self.desk.flows.pop(self.flow_id, None)
        if self.desk.version == 2 and self.desk.attached:
            await unregister_udp_session(self.desk.link, uuid.UUID(bytes=self.flow_id), "closed by the dev edge")

    def ended(self, why: str) -> None:
        """The connector ended it."""
        if self.open:
            self.open = False
            self.on_end(why)


class Pong(NamedTuple):
    """An answer to a ping: from whom, which ICMP type (0 and 129: an echo; 11 and 3: the TTL ran out), its bytes."""

    source: str
    kind: int
    ttl: int
    data: bytes


class DatagramDesk:
    """The datagrams of one link."""

    def __init__(self, link: QuicLink) -> None:
        self.link = link
        self.flows: dict[bytes, UdpFlow] = {}
        self._answers: dict[bytes, asyncio.Future[int]] = {}
        self._pings: dict[tuple[int, int], asyncio.Future[Pong]] = {}
        self._sequence = 0

    @property
    def version(self) -> int:
        """2 or 3, by what the connector announced."""
        known = self.link.registration
        return 3 if known is not None and VERSION_3 in known.features else 2

    @property
    def attached(self) -> bool:
        """Whether the link is there."""
        return self.link.attached

    async def open_udp(
        self,
        dest: Address,
        on_payload: OnPayload,
        on_end: OnEnd = lambda why: None,
        *,
        idle: float = 0,
        payload: bytes | None = None,
        flow_id: bytes | None = None,
    ) -> UdpFlow:
        """Open a flow to `dest` (an IP address and a port). `idle`: seconds, 0 for the connector's default.

        `payload` travels with the registration (version 3). Raises FlowRefusedError, TimeoutError.
        """
        flow = UdpFlow(self, flow_id or uuid.uuid4().bytes, dest, on_payload, on_end)
        self.flows[flow.flow_id] = flow  # answers may come before the registration's
        try:
            await self.register(flow, idle=idle, payload=payload)
        except BaseException:
            self.flows.pop(flow.flow_id, None)
            raise
        return flow

    async def register(self, flow: UdpFlow, *, idle: float = 0, payload: bytes | None = None) -> None:
        """Register a flow on this link. Raises FlowRefusedError, TimeoutError."""
        address = ip_address(flow.dest[0]).packed
        if self.version == 2:
            session = uuid.UUID(bytes=flow.flow_id)
            async with asyncio.timeout(OPEN_LIMIT):
                error = await register_udp_session(self.link, session, address, flow.dest[1], int(idle * 1e9))
            if error:
                raise FlowRefusedError(error)
            return
        flags = (len(address) == 16) | (payload is not None) << 2
        head = struct.pack("!BBHH16s", 0, flags, flow.dest[1], round(idle), flow.flow_id)
        datagram = head + address + (payload or b"")
        answer = self._answers[flow.flow_id] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(OPEN_LIMIT):
                while not answer.done():
                    self.link.send_datagram(datagram)
                    await asyncio.wait([answer], timeout=REPEAT)
            code = answer.result()
        finally:
            del self._answers[flow.flow_id]
        if code:
            raise FlowRefusedError(REFUSALS.get(code, f"response {code}"), code)

    async def ping(
        self,
        source: str,
        dest: str,
        *,
        identifier: int = 1,
        ttl: int = PING_TTL,
        data: bytes = b"",
        limit: float = 5.0,
        repeat: float = 1.0,
    ) -> Pong:
        """Send echo requests from `source` until one is answered, or its TTL is. Raises TimeoutError."""
        self._sequence += 1
        sequence = self._sequence & 0xFFFF
        packet = echo_request(ip_address(source).packed, ip_address(dest).packed, identifier, sequence, ttl, data)
        answer = self._pings[identifier, sequence] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(limit):
                while not answer.done():
                    self.send_packet(packet)
                    await asyncio.wait([answer], timeout=repeat)
            pong: Pong = answer.result()
            return pong
        finally:
            del self._pings[identifier, sequence]

    def send_packet(self, packet: bytes) -> bool:
        """Send a whole IP packet."""
        return self.link.send_datagram(packet + b"\x01" if self.version == 2 else b"\x02" + packet)

    def send_payload(self, flow_id: bytes, payload: bytes) -> bool:
        """Send one payload of a flow."""
        if self.version == 2:
            return self.link.send_datagram(payload + flow_id + b"\0")
        return self.link.send_datagram(b"\x01" + flow_id + payload)

    # From the link.

    def receive(self, data: bytes) -> None:
        """Take a datagram of the connector."""
        if self.version == 2:
            if len(data) >= 17 and data[-1] == 0:
                self._payload(data[-17:-1], data[:-17])
            elif data and data[-1] == 1:
                self._packet(data[:-1])
        elif data[:1] == b"\x01" and len(data) >= 17:
            self._payload(data[1:17], data[17:])
        elif data[:1] == b"\x02":
            self._packet(data[1:])
        elif data[:1] == b"\x03" and len(data) >= 20:
            answer = self._answers.get(data[2:18])
            if answer is not None and not answer.done():
                answer.set_result(data[1])

    def session_ended(self, session: bytes, why: str) -> None:
        """The connector ended a session of version 2."""
        flow = self.flows.pop(session, None)
        if flow is not None:
            flow.ended(why)

    def lost(self) -> None:
        """The link is gone, and with it its flows."""
        flows, self.flows = self.flows, {}
        for flow in flows.values():
            flow.ended("the connection to the connector is gone")

    def _payload(self, flow_id: bytes, payload: bytes) -> None:
        flow = self.flows.get(flow_id)
        if flow is not None and flow.open:
            flow.on_payload(payload)

    def _packet(self, packet: bytes) -> None:
        read = read_pong(packet)
        if read is not None:
            identity, pong = read
            answer = self._pings.get(identity)
            if answer is not None and not answer.done():
                answer.set_result(pong)


def echo_request(source: bytes, dest: bytes, identifier: int, sequence: int, ttl: int, data: bytes) -> bytes:
    """Make an IP packet with an echo request; addresses are packed."""
    if len(source) == 4:
        message = struct.pack("!BBHHH", 8, 0, 0, identifier, sequence) + data
        message = message[:2] + struct.pack("!H", internet_checksum(message)) + message[4:]
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(message), 0, 0, ttl, 1, 0) + source + dest
        return head[:10] + struct.pack("!H", internet_checksum(head)) + head[12:] + message
    message = struct.pack("!BBHHH", 128, 0, 0, identifier, sequence) + data
    summed = source + dest + struct.pack("!II", len(message), 58) + message
    message = message[:2] + struct.pack("!H", internet_checksum(summed)) + message[4:]
    return struct.pack("!IHBB", 6 << 28, len(message), 58, ttl) + source + dest + message


def read_pong(packet: bytes) -> tuple[tuple[int, int], Pong] | None:
    """Read an answer: identifier and sequence of the request, and what it says. None: it is no (sound) answer."""
    if len(packet) >= 28 and packet[0] >> 4 == 4:
        at, addresses = (packet[0] & 15) * 4, packet[12:20]
        message = packet[at : int.from_bytes(packet[2:4], "big")]
        sound = internet_checksum(packet[:at]) == 0 == internet_checksum(message)
        ttl, quoted = packet[8], 28
        echo, exceeded = 0, 11
    elif len(packet) >= 48 and packet[0] >> 4 == 6:
        message, addresses = packet[40 : 40 + int.from_bytes(packet[4:6], "big")], packet[8:40]
        sound = internet_checksum(addresses + struct.pack("!II", len(message), 58) + message) == 0
        ttl, quoted = packet[7], 48
        echo, exceeded = 129, 3
    else:
        return None
    if not sound or len(message) < 8:
        return None
    source = str(ip_address(addresses[: len(addresses) // 2]))
    pong = Pong(source, message[0], ttl, message[8:])
    if message[0] == echo:
        return struct.unpack("!HH", message[4:8]), pong
    if message[0] == exceeded and len(message) >= 8 + quoted:
        inner = message[quoted + 4 : quoted + 8]  # identifier and sequence of the quoted request
        return struct.unpack("!HH", inner), pong
    return None


def internet_checksum(data: bytes) -> int:
    """Sum as RFC 1071 has it; 0 for data that holds its own sum."""
    total = 0
    for at in range(0, len(data), 2):
        total += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF
