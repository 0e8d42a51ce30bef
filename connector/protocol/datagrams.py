"""UDP sessions of private networks: who has which, what the edge asked, where answers go. Datagram versions 2 and 3.

Owns: the tables of flows, registration and its answers, migration between connections, the ends of flows.
In: datagrams and RPC of the edge (untrusted), `now`. Out: datagrams to a DatagramPort; calls of FlowOrigin; counts.
Never: opens a socket (`open_origin` does), reads a clock, makes a task.

*Strategy*: a flow is one object that lies in a table and in the idle wheel, and knows the connection that it answers
on (`end`). Version 2 has one table per connection and is set up by RPC; version 3 has one table per process, so that a
flow can move: a registration of a known flow over another connection changes `end`, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from connector.errors import ConnectorError, WireError
from connector.protocol.counts import COUNTS
from connector.protocol.idle_wheel import IdleWheel
from connector.protocol.ports import DatagramPort
from connector.wire import datagram_v2 as v2
from connector.wire import datagram_v3 as v3

DEFAULT_IDLE: Final = 210.0
"""Seconds without a packet after which a flow ends where the edge names no time. Precedent: cloudflared."""

MAX_IDLE: Final = 24 * 3600.0
"""The longest idle time taken from the edge; version 2 could name centuries."""

MAX_PAYLOAD: Final = v3.MAX_PAYLOAD
"""Bytes of one UDP payload towards the edge, in both versions."""

FLOW_LIMITED: Final = "failed to start udp session due to rate limiting: too many active flows"


class FlowOrigin(Protocol):
    """The socket of one flow. No call blocks or raises."""

    @property
    def local_address(self) -> str:
        """`ip:port` of this end."""

    def send(self, payload: bytes, now: float) -> None:
        """Send one datagram, or drop it and count that."""

    def resume_reading(self) -> None:
        """Go on reading after `pause` was told to the connection's end."""

    def close(self) -> None:
        """Let the socket go."""


class FlowSlots(Protocol):
    """The limit of flows."""

    def take_udp(self) -> bool:
        """Take a slot."""

    def release(self) -> None:
        """Give it back."""


OnEvent = Callable[[str, str, dict[str, object]], None]
"""Level, message, fields: for the log. Never per packet."""


OnPacket = Callable[["DatagramsV2 | DatagramsV3", bytes, float, bytes], None]
"""An IP packet of the edge: over which connection, the packet, the time, the identity of its trace or nothing."""


class Shared:
    """What all connections of a process share. `flows` is the table of version 3.

    `open_origin(flow)` opens a connected socket and sets `flow.origin`; errors: OSError. `on_started` hears of each new
    flow of version 3: other processes may serve connections of the same connector.
    """

    __slots__ = ("flows", "on_event", "on_started", "open_origin", "slots", "wake", "wheel")

    def __init__(
        self,
        *,
        open_origin: Callable[[UdpFlow], None],
        slots: FlowSlots,
        wheel: IdleWheel,
        wake: Callable[[], None],
        on_event: OnEvent,
        on_started: Callable[[UdpFlow], None] | None = None,
    ) -> None:
        self.open_origin = open_origin
        self.on_started = on_started
        self.slots = slots
        self.wheel = wheel
        self.wake = wake
        """Sees to the wheel's timer."""
        self.on_event = on_event
        self.flows: dict[bytes, UdpFlow] = {}

    def moved_away(self, flow_id: bytes, began: float) -> bool:
        """End a flow that began anew in another process; whether there was one.

        `began` is that process's `now`; the clock is the machine's.
        """
        flow = self.flows.get(flow_id)
        if flow is None or flow.began > began:
            return False
        flow.end.end_flow(flow, "moved to a connection of another process", failed=False)
        return True


class UdpFlow:
    """One flow: a socket towards `address` (packed), `port`, and the connection that answers go to.

    A payload of the origin goes to the edge between `head` and `tail`.
    """

    __slots__ = (
        "active_at", "address", "began", "closed", "end", "flow_id", "head", "idle", "label", "origin", "port", "slot",
        "tail",
    )  # fmt: skip

    def __init__(
        self,
        end: DatagramsV2 | DatagramsV3,
        flow_id: bytes,
        address: bytes,
        port: int,
        idle: float,
        now: float,
        *,
        head: bytes = b"",
        tail: bytes = b"",
    ) -> None:
        self.end = end
        self.flow_id = flow_id
        self.address = address
        self.port = port
        self.idle = min(idle or DEFAULT_IDLE, MAX_IDLE) if idle >= 0 else DEFAULT_IDLE
        self.active_at = now
        self.began = now
        self.head = head
        self.tail = tail
        self.slot = 0
        self.origin: FlowOrigin | None = None
        self.closed = False
        self.label = end.label
        """`conn_index` under which it is counted: that of the connection that it began on."""

    def on_idle(self, now: float) -> None:
        """Nothing came or went for the idle time."""
        self.end.end_flow(self, f"session idle for {_duration(self.idle)}", failed=False)

    def failed(self, error: OSError) -> None:
        """The socket is of no use any more."""
        self.end.end_flow(self, str(error.strerror or error), failed=True)

    def answer(self, payload: bytes, now: float) -> None:
        """Pass a payload of the origin on to the edge; what does not fit is dropped and counted, the flow goes on."""
        self.active_at = now
        end = self.end
        port = end.port
        if port is None:
            return
        data = b"%b%b%b" % (self.head, payload, self.tail)
        if len(payload) > MAX_PAYLOAD or len(data) > port.datagram_limit:
            end.drop_too_large()
        elif not port.send_datagram(data):
            end.drop("read_failed")

    def drop(self, reason: str) -> None:
        """Count a datagram that goes nowhere."""
        self.end.drop(reason)


class _End:
    """What both versions have in common: one connection's end of all its flows."""

    __slots__ = ("_icmp", "_owned", "_shared", "_waiting", "label", "port")

    def __init__(self, shared: Shared, conn_index: int, icmp: OnPacket | None) -> None:
        self.label = str(conn_index)
        self.port: DatagramPort | None = None
        self._shared = shared
        self._icmp = icmp
        self._owned: set[UdpFlow] = set()
        self._waiting: list[UdpFlow] = []

    @property
    def flows(self) -> int:
        """How many flows answer over this connection."""
        return len(self._owned)

    def attach(self, port: DatagramPort) -> None:
        """See DatagramSink."""
        self.port = port

    def on_datagram_room(self) -> None:
        """See DatagramSink."""
        waiting, self._waiting = self._waiting, []
        for flow in waiting:
            if flow.origin is not None:
                flow.origin.resume_reading()

    def pause(self, flow: UdpFlow) -> None:
        """The origin of `flow` stopped reading, because the link takes no more."""
        self._waiting.append(flow)

    def on_lost(self) -> None:
        """See DatagramSink: flows end with their connection, and nobody is told."""
        self.port = None
        for flow in list(self._owned):
            self._forget(flow)

    def drop(self, reason: str) -> None:
        """Count a UDP datagram that goes nowhere."""
        COUNTS.add("cloudflared_udp_dropped_datagrams", self.label, reason)

    def drop_too_large(self) -> None:
        """Count a payload of an origin that no datagram can carry."""
        raise NotImplementedError

    def send_icmp(self, packet: bytes) -> bool:
        """Send an IP packet to the edge; False when that is not possible."""
        raise NotImplementedError

    def _start(self, flow: UdpFlow) -> None:
        """Open the socket and enter the flow. Errors: OSError; then the slot is free again."""
        try:
            self._shared.open_origin(flow)
        except BaseException:
            self._shared.slots.release()
            raise
        self._owned.add(flow)
        self._shared.wheel.add(flow)
        self._shared.wake()

    def _forget(self, flow: UdpFlow) -> bool:
        """Let a flow go; False when that has happened."""
        if flow.closed:
            return False
        flow.closed = True
        self._owned.discard(flow)
        if flow in self._waiting:
            self._waiting.remove(flow)
        self._shared.wheel.remove(flow)
        if flow.origin is not None:
            flow.origin.close()
        self._shared.slots.release()
        return True

    def _event(self, level: str, message: str, flow_id: bytes, **fields: object) -> None:
        self._shared.on_event(level, message, {"connIndex": int(self.label), "flowID": flow_id.hex(), **fields})


class DatagramsV3(_End):
    """One connection of version 3. Implements DatagramSink with `receive` instead of `on_datagram`."""

    __slots__ = ()

    version = 3

    def receive(self, data: bytes, now: float) -> None:
        """Take a datagram of the edge."""
        kind = data[0] if data else -1
        if kind == v3.PAYLOAD:
            flow = self._shared.flows.get(data[1 : v3.PAYLOAD_HEAD])
            if flow is None:
                self.drop("write_flow_unknown")
            elif len(data) > v3.PAYLOAD_HEAD + v3.MAX_PAYLOAD:
                self.drop("write_failed")
            else:
                flow.active_at = now
                if flow.origin is not None:
                    flow.origin.send(data[v3.PAYLOAD_HEAD :], now)
        elif kind == v3.ICMP:
            if self._icmp is not None:
                self._icmp(self, data[1:], now, b"")
        elif kind == v3.REGISTRATION:
            try:
                wanted = v3.decode_registration(data)
            except WireError as error:
                self._event("error", "unable to unmarshal session registration datagram", data[6:22], error=str(error))
                return
            self._register(wanted, now)
        else:
            self._event("error", f"unknown datagram type received: {kind}", b"")

    def send_icmp(self, packet: bytes) -> bool:
        """See _End."""
        if self.port is None or len(packet) > v3.MAX_PAYLOAD:
            return False
        return self.port.send_datagram(v3.encode_icmp(packet))

    def send_spans(self, identity: bytes, spans: bytes) -> None:
        """Version 3 traces nothing."""

    def drop_too_large(self) -> None:
        """See _End."""
        self.drop("read_too_large")

    def end_flow(self, flow: UdpFlow, why: str, *, failed: bool) -> None:
        """End a flow; the edge is not told."""
        if not self._forget(flow):
            return
        if failed:
            COUNTS.add("cloudflared_udp_failed_flows", flow.label)
        self._event("error" if failed else "debug", f"flow closed: {why}", flow.flow_id)

    def adopt(self, flow: UdpFlow) -> None:
        """Answer for a flow of another connection from now on."""
        before = flow.end
        before._owned.discard(flow)
        flow.end = self
        self._owned.add(flow)
        if flow in before._waiting:
            before._waiting.remove(flow)
            if flow.origin is not None:
                flow.origin.resume_reading()

    def _register(self, wanted: v3.Registration, now: float) -> None:
        shared = self._shared
        flow = shared.flows.get(wanted.request_id)
        if flow is not None:
            flow.active_at = now
            if flow.end is self:  # the answer was lost
                if self._answer(wanted.request_id, v3.OK):
                    COUNTS.add("cloudflared_udp_retry_flow_responses", self.label)
                return
            self.adopt(flow)
            COUNTS.add("cloudflared_udp_migrated_flows", self.label)
            self._answer(wanted.request_id, v3.OK)
            self._event("debug", "flow registration migration", flow.flow_id)
            return
        if not shared.slots.take_udp():
            self._event("warn", "Too many concurrent sessions being handled, rejecting udp proxy", wanted.request_id)
            self._answer(wanted.request_id, v3.TOO_MANY_FLOWS)
            return
        head = b"%c%b" % (v3.PAYLOAD, wanted.request_id)
        flow = UdpFlow(self, wanted.request_id, wanted.address, wanted.port, float(wanted.idle_seconds), now, head=head)
        try:
            self._start(flow)
        except OSError as error:
            text = error.strerror or str(error)
            self._event("error", "flow registration failure", wanted.request_id, error=text)
            self._answer(wanted.request_id, v3.UNABLE_TO_BIND)
            return
        shared.flows[flow.flow_id] = flow
        COUNTS.add("cloudflared_udp_total_flows", flow.label)
        COUNTS.add("cloudflared_udp_active_flows", flow.label)
        self._answer(flow.flow_id, v3.OK)
        if shared.on_started is not None:
            shared.on_started(flow)
        if wanted.payload is not None and flow.origin is not None:
            flow.origin.send(wanted.payload, now)

    def _forget(self, flow: UdpFlow) -> bool:
        if not super()._forget(flow):
            return False
        del self._shared.flows[flow.flow_id]
        COUNTS.add("cloudflared_udp_active_flows", flow.label, by=-1)
        return True

    def _answer(self, request_id: bytes, code: int) -> bool:
        answer = v3.encode_response(v3.Response(request_id, code))
        return self.port is not None and self.port.send_datagram(answer)

    # RPC: version 3 has none for sessions.

    def register_udp_session(
        self, session_id: bytes, address: bytes, port: int, idle_nanoseconds: int, now: float
    ) -> str:
        """Refuse."""
        COUNTS.add("cloudflared_udp_unsupported_remote_command_total", self.label, "register_udp_session")
        return "datagram v3 does not support RegisterUdpSession RPC"

    def unregister_udp_session(self, session_id: bytes, message: str) -> None:
        """Refuse. Errors: ConnectorError."""
        COUNTS.add("cloudflared_udp_unsupported_remote_command_total", self.label, "unregister_udp_session")
        raise ConnectorError("datagram v3 does not support UnregisterUdpSession RPC")


class DatagramsV2(_End):
    """One connection of version 2. `tell_end(session_id, text)` tells the edge of an end that it did not ask for."""

    __slots__ = ("_sessions", "_tell_end")

    version = 2

    def __init__(
        self,
        shared: Shared,
        conn_index: int,
        icmp: OnPacket | None,
        tell_end: Callable[[DatagramsV2, bytes, str], None],
    ) -> None:
        super().__init__(shared, conn_index, icmp)
        self._sessions: dict[bytes, UdpFlow] = {}
        self._tell_end = tell_end

    def receive(self, data: bytes, now: float) -> None:
        """Take a datagram of the edge."""
        try:
            kind, tail, payload = v2.decode(data)
        except WireError as error:
            self._event("error", "Failed to demux datagram", b"", error=str(error))
            return
        if kind == v2.UDP:
            flow = self._sessions.get(tail)
            if flow is None:
                self.drop("write_flow_unknown")
                return
            flow.active_at = now
            if flow.origin is not None:
                flow.origin.send(payload, now)
        elif kind != v2.SPANS and self._icmp is not None:
            self._icmp(self, payload, now, tail)

    def send_spans(self, identity: bytes, spans: bytes) -> None:
        """Send what tracing recorded of a packet."""
        if self.port is not None and len(spans) + v2.IDENTITY_SIZE < v2.MAX_DATAGRAM:
            self.port.send_datagram(v2.encode(v2.SPANS, identity, spans))

    def session(self, session_id: bytes) -> UdpFlow | None:
        """Return an open session."""
        return self._sessions.get(session_id)

    def send_icmp(self, packet: bytes) -> bool:
        """See _End."""
        if self.port is None or len(packet) >= v2.MAX_DATAGRAM:
            return False
        return self.port.send_datagram(v2.encode(v2.IP, b"", packet))

    def drop_too_large(self) -> None:
        """See _End."""
        COUNTS.add("quic_client_packet_too_big_dropped")

    def register_udp_session(
        self, session_id: bytes, address: bytes, port: int, idle_nanoseconds: int, now: float
    ) -> str:
        """Start a session; return an error text, empty when it started. A session of the same ID ends."""
        if self.port is None:
            return "the connection is closed"
        known = self._sessions.get(session_id)
        if known is not None:
            self._forget(known)
        if not self._shared.slots.take_udp():
            self._event("warn", "Too many concurrent sessions being handled, rejecting udp proxy", session_id)
            return FLOW_LIMITED
        if len(address) == 16 and address[:12] == _MAPPED:
            address = address[12:]
        tail = b"%b%c" % (session_id, v2.UDP)
        flow = UdpFlow(self, session_id, address, port, idle_nanoseconds / 1e9, now, tail=tail)
        try:
            self._start(flow)
        except OSError as error:
            text = error.strerror or str(error)
            self._event("error", "Failed to create udp proxy", session_id, error=text)
            return f"unable to create a UDP socket towards the origin: {text}"
        self._sessions[session_id] = flow
        COUNTS.add("cloudflared_udp_total_sessions")
        COUNTS.add("cloudflared_udp_active_sessions")
        return ""

    def unregister_udp_session(self, session_id: bytes, message: str) -> None:
        """The edge ends a session; one that is gone already is none of its business."""
        flow = self._sessions.get(session_id)
        if flow is not None and self._forget(flow):
            self._event("debug", "Session terminated", session_id, error=message)

    def end_flow(self, flow: UdpFlow, why: str, *, failed: bool) -> None:
        """End a session and tell the edge."""
        if not self._forget(flow):
            return
        self._event("debug", "Session terminated", flow.flow_id, error=why)
        if self.port is not None:
            self._tell_end(self, flow.flow_id, why)

    def _forget(self, flow: UdpFlow) -> bool:
        if not super()._forget(flow):
            return False
        del self._sessions[flow.flow_id]
        COUNTS.add("cloudflared_udp_active_sessions", by=-1)
        return True


_MAPPED: Final = b"\0" * 10 + b"\xff\xff"


def _duration(seconds: float) -> str:
    """Write seconds as Go does: `3m30s`, `1s`."""
    whole, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(whole), 60)
    text = f"{hours}h" if hours else ""
    text += f"{minutes}m" if minutes or hours else ""
    return f"{text}{rest:g}s"
