"""UDP sessions of both versions, without sockets."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connector.errors import ConnectorError
from connector.protocol.counts import COUNTS
from connector.protocol.datagrams import DatagramsV2, DatagramsV3, Shared, UdpFlow
from connector.protocol.idle_wheel import IdleWheel
from connector.protocol.ports import StreamPort, StreamSink

ADDRESS = b"\x0a\x00\x00\x35"
ID, OTHER = b"I" * 16, b"O" * 16


class Link:
    """A DatagramPort that keeps what is sent."""

    def __init__(self, limit: int = 1300) -> None:
        self.sent: list[bytes] = []
        self.datagram_limit = limit
        self.datagram_room = 32

    def send_datagram(self, data: bytes) -> bool:
        if len(data) > self.datagram_limit or not self.datagram_room:
            return False
        self.sent.append(data)
        return True

    def open_rpc(self, data: bytes, sink: StreamSink) -> StreamPort | None:
        return None

    def take(self) -> list[bytes]:
        sent, self.sent = self.sent, []
        return sent


class Origin:
    def __init__(self, flow: UdpFlow) -> None:
        self.flow = flow
        self.sent: list[bytes] = []
        self.closed = self.resumed = 0
        self.local_address = "127.0.0.1:1"

    def send(self, payload: bytes, now: float) -> None:
        assert not self.closed
        self.sent.append(payload)

    def resume_reading(self) -> None:
        self.resumed += 1

    def close(self) -> None:
        self.closed += 1


class Slots:
    def __init__(self) -> None:
        self.limit = 100
        self.taken = 0

    def take_udp(self) -> bool:
        if self.taken >= self.limit:
            return False
        self.taken += 1
        return True

    def release(self) -> None:
        assert self.taken
        self.taken -= 1


class Rig:
    """A process with its connections."""

    def __init__(self) -> None:
        self.slots = Slots()
        self.wheel = IdleWheel(0.0)
        self.origins: list[Origin] = []
        self.events: list[tuple[str, str, dict[str, object]]] = []
        self.ended: list[tuple[bytes, str]] = []
        self.icmp: list[tuple[Any, bytes]] = []
        self.refuse: OSError | None = None
        self.shared = Shared(
            open_origin=self._open, slots=self.slots, wheel=self.wheel, wake=lambda: None,
            on_event=lambda level, message, fields: self.events.append((level, message, fields)),
            on_started=lambda flow: self.started.append((flow.flow_id, flow.began)),
        )  # fmt: skip
        self.started: list[tuple[bytes, float]] = []
        self.links: list[Link] = []

    def _open(self, flow: UdpFlow) -> None:
        if self.refuse is not None:
            raise self.refuse
        origin = Origin(flow)
        self.origins.append(origin)
        flow.origin = origin

    def v3(self, index: int = 0) -> DatagramsV3:
        end = DatagramsV3(self.shared, index, lambda end, packet, now, identity: self.icmp.append((end, packet)))
        self.links.append(Link())
        end.attach(self.links[-1])
        return end

    def v2(self, index: int = 0) -> DatagramsV2:
        end = DatagramsV2(
            self.shared, index, lambda end, packet, now, identity: self.icmp.append((end, packet)),
            lambda end, session, text: self.ended.append((session, text)),
        )  # fmt: skip
        self.links.append(Link())
        end.attach(self.links[-1])
        return end


def registration(flow: bytes = ID, idle: int = 0, payload: bytes | None = None) -> bytes:
    return struct.pack("!BBHH", 0, 0 if payload is None else 4, 53, idle) + flow + ADDRESS + (payload or b"")


def ok(flow: bytes = ID, code: int = 0) -> bytes:
    return bytes([3, code]) + flow + b"\0\0"


def count(family: str, *labels: str) -> float:
    return COUNTS.numbers.get((family, labels), 0)


def test_version_3_registers_answers_and_carries_both_ways() -> None:
    rig = Rig()
    end = rig.v3()
    end.receive(registration(payload=b"first"), 1.0)
    [link], [origin] = rig.links, rig.origins
    assert link.take() == [ok()]
    assert (origin.flow.address, origin.flow.port, origin.flow.idle) == (ADDRESS, 53, 210.0)
    end.receive(b"\x01" + ID + b"second", 2.0)
    end.receive(b"\x01" + ID, 2.5)  # empty payloads are payloads
    assert origin.sent == [b"first", b"second", b""]
    origin.flow.answer(b"reply", 3.0)
    origin.flow.answer(b"", 3.5)
    assert link.take() == [b"\x01" + ID + b"reply", b"\x01" + ID]
    assert origin.flow.active_at == 3.5
    assert (rig.slots.taken, rig.wheel.size, end.flows) == (1, 1, 1)


def test_a_flow_that_began_anew_in_another_process_ends_here() -> None:
    here, there = Rig(), Rig()
    here.v3().receive(registration(), 1.0)
    here.v3(1).receive(registration(), 2.0)  # moves within the process: nothing new
    assert here.started == [(ID, 1.0)]
    assert not there.shared.moved_away(*here.started[0])
    there.v3().receive(registration(), 3.0)
    assert not there.shared.moved_away(*here.started[0])  # older news than its own
    assert here.shared.moved_away(*there.started[0])
    assert here.origins[0].closed
    assert (here.slots.taken, there.slots.taken) == (0, 1)
    assert ID in there.shared.flows


def test_version_3_retry_and_migration() -> None:
    rig = Rig()
    first, second = rig.v3(0), rig.v3(1)
    retries, moves = "cloudflared_udp_retry_flow_responses", "cloudflared_udp_migrated_flows"
    before = count(retries, "0"), count(moves, "1")
    first.receive(registration(), 1.0)
    first.receive(registration(), 2.0)  # the answer was lost
    [origin] = rig.origins
    assert rig.links[0].take() == [ok(), ok()]
    assert origin.flow.active_at == 2.0
    second.receive(registration(), 3.0)
    assert rig.links[1].take() == [ok()]
    assert (count(retries, "0") - before[0], count(moves, "1") - before[1]) == (1, 1)
    origin.flow.answer(b"reply", 4.0)
    assert (rig.links[0].take(), rig.links[1].take()) == ([], [b"\x01" + ID + b"reply"])
    first.receive(b"\x01" + ID + b"by the old way", 5.0)  # accepted on any connection
    assert origin.sent == [b"by the old way"]
    first.on_lost()  # nothing of the flow hangs on it any more
    assert not origin.closed
    second.on_lost()
    assert origin.closed == 1
    assert (rig.slots.taken, rig.wheel.size, rig.shared.flows) == (0, 0, {})
    second.receive(b"\x01" + ID + b"late", 6.0)


def test_a_paused_flow_goes_on_when_it_moves() -> None:
    rig = Rig()
    first, second = rig.v3(0), rig.v3(1)
    first.receive(registration(), 0.0)
    [origin] = rig.origins
    first.pause(origin.flow)
    second.receive(registration(), 1.0)
    assert origin.resumed == 1
    first.on_datagram_room()
    assert origin.resumed == 1
    second.pause(origin.flow)
    second.on_datagram_room()
    second.on_datagram_room()
    assert origin.resumed == 2


def test_version_3_refusals() -> None:
    rig = Rig()
    end = rig.v3()
    rig.slots.limit = 0
    end.receive(registration(), 0.0)
    rig.slots.limit = 1
    rig.refuse = OSError(101, "Network is unreachable")
    for _ in range(3):
        end.receive(registration(), 0.0)
    assert rig.links[0].take() == [ok(code=3), ok(code=2), ok(code=2), ok(code=2)]
    assert rig.slots.taken == 0  # a failed socket gives its slot back
    assert end.register_udp_session(ID, ADDRESS, 53, 0, 0.0) == "datagram v3 does not support RegisterUdpSession RPC"
    with pytest.raises(ConnectorError, match="datagram v3 does not support UnregisterUdpSession RPC"):
        end.unregister_udp_session(ID, "")


def test_version_3_drops_what_it_does_not_know() -> None:
    rig = Rig()
    end = rig.v3(7)
    unknown = count("cloudflared_udp_dropped_datagrams", "7", "write_flow_unknown")
    for data in (b"", b"\x01", b"\x01" + OTHER + b"x", b"\x03\x00" + ID + b"\0\0", b"\x09", b"\x00short"):
        end.receive(data, 0.0)
    assert count("cloudflared_udp_dropped_datagrams", "7", "write_flow_unknown") - unknown == 2
    assert rig.links[0].sent == []
    end.receive(b"\x02packet", 0.0)
    assert rig.icmp == [(end, b"packet")]
    end.receive(registration(), 0.0)
    end.receive(b"\x01" + ID + b"x" * 1281, 0.0)
    assert rig.origins[0].sent == []


def test_payloads_that_do_not_fit_are_dropped_and_the_flow_goes_on() -> None:
    rig = Rig()
    three, two = rig.v3(5), rig.v2(6)
    three.receive(registration(), 0.0)
    assert two.register_udp_session(OTHER, ADDRESS, 53, 0, 0.0) == ""
    rig.links[0].take()
    before = (
        count("cloudflared_udp_dropped_datagrams", "5", "read_too_large"),
        count("quic_client_packet_too_big_dropped"),
    )
    for origin, link in zip(rig.origins, rig.links, strict=True):
        link.datagram_limit = 1188
        origin.flow.answer(b"x" * 1281, 1.0)
        origin.flow.answer(b"x" * 1280, 1.0)
        origin.flow.answer(b"x" * (1188 - 17), 1.0)
        assert [len(data) for data in link.take()] == [1188]
        link.datagram_limit = 1400
        origin.flow.answer(b"x" * 1281, 1.0)
        origin.flow.answer(b"x" * 1280, 1.0)
        assert [len(data) for data in link.take()] == [1297]
    after = (
        count("cloudflared_udp_dropped_datagrams", "5", "read_too_large"),
        count("quic_client_packet_too_big_dropped"),
    )
    assert (after[0] - before[0], after[1] - before[1]) == (3, 3)


def test_idle_flows_of_version_3_end_silently() -> None:
    rig = Rig()
    end = rig.v3()
    end.receive(registration(idle=2), 0.0)
    rig.links[0].take()
    rig.wheel.advance(1.9)
    end.receive(b"\x01" + ID + b"x", 1.9)
    rig.wheel.advance(3.0)
    assert not rig.origins[0].closed
    rig.wheel.advance(4.0)
    assert rig.origins[0].closed == 1
    assert rig.links[0].sent == []
    assert rig.events[-1][:2] == ("debug", "flow closed: session idle for 2s")
    end.receive(registration(), 5.0)  # the same ID may come again
    assert rig.links[0].take() == [ok()]


def test_version_2_sessions() -> None:
    rig = Rig()
    end = rig.v2()
    mapped = b"\0" * 10 + b"\xff\xff" + ADDRESS
    assert end.register_udp_session(ID, mapped, 53, 1_500_000_000, 0.0) == ""
    [link], [origin] = rig.links, rig.origins
    assert (origin.flow.address, origin.flow.idle) == (ADDRESS, 1.5)
    end.receive(b"hello" + ID + b"\0", 1.0)
    end.receive(ID + b"\0", 1.0)
    end.receive(b"lost" + OTHER + b"\0", 1.0)
    assert origin.sent == [b"hello", b""]
    origin.flow.answer(b"reply", 1.0)
    assert link.take() == [b"reply" + ID + b"\0"]
    end.receive(b"packet\x01", 1.0)
    end.receive(b"traced" + b"i" * 25 + b"\x02", 1.0)
    end.receive(b"spans" + b"i" * 25 + b"\x03", 1.0)
    assert rig.icmp == [(end, b"packet"), (end, b"traced")]
    assert end.send_icmp(b"answer")
    assert link.take() == [b"answer\x01"]
    rig.wheel.advance(3.0)
    assert rig.ended == [(ID, "session idle for 1.5s")]
    assert (origin.closed, rig.slots.taken) == (1, 0)


def test_ends_of_version_2() -> None:
    rig = Rig()
    end = rig.v2()
    for session in (ID, OTHER):
        assert end.register_udp_session(session, ADDRESS, 53, 0, 0.0) == ""
    end.unregister_udp_session(ID, "enough")
    end.unregister_udp_session(ID, "again")
    assert rig.ended == []  # the edge knows
    rig.origins[1].flow.failed(ConnectionRefusedError(111, "Connection refused"))
    assert rig.ended == [(OTHER, "Connection refused")]
    assert end.register_udp_session(ID, ADDRESS, 53, 0, 0.0) == ""
    assert end.register_udp_session(ID, ADDRESS, 54, 0, 0.0) == ""  # the same ID anew: the old one is over
    assert (rig.origins[2].closed, rig.slots.taken) == (1, 1)
    end.on_lost()
    assert rig.ended[1:] == []
    assert (rig.slots.taken, rig.wheel.size) == (0, 0)
    assert end.register_udp_session(ID, ADDRESS, 53, 0, 0.0) == "the connection is closed"


def test_version_2_refusals() -> None:
    rig = Rig()
    end = rig.v2()
    rig.slots.limit = 0
    assert end.register_udp_session(ID, ADDRESS, 53, 0, 0.0) == (
        "failed to start udp session due to rate limiting: too many active flows"
    )
    rig.slots.limit = 1
    rig.refuse = OSError(101, "Network is unreachable")
    assert "Network is unreachable" in end.register_udp_session(ID, ADDRESS, 53, 0, 0.0)
    assert rig.slots.taken == 0


@pytest.mark.parametrize(
    ("nanoseconds", "seconds"), [(0, 210.0), (-5, 210.0), (10**9, 1.0), (2**63 - 1, 24 * 3600.0), (-(2**63), 210.0)]
)
def test_idle_times_of_the_edge(nanoseconds: int, seconds: float) -> None:
    rig = Rig()
    assert rig.v2().register_udp_session(ID, ADDRESS, 53, nanoseconds, 0.0) == ""
    assert rig.origins[0].flow.idle == seconds


@settings(max_examples=60)
@given(st.data())
def test_any_order_of_events_keeps_the_books(data: st.DataObject) -> None:
    rig = Rig()
    rig.slots.limit = 3
    ends: list[DatagramsV3 | DatagramsV2] = [rig.v3(0), rig.v3(1), rig.v2(2)]
    now = 0.0
    for _ in range(data.draw(st.integers(0, 30))):
        end = data.draw(st.sampled_from(ends))
        flow = data.draw(st.sampled_from([ID, OTHER, b"T" * 16]))
        what = data.draw(st.sampled_from(["register", "payload", "lose", "time", "fail", "unregister", "garbage"]))
        if what == "register" and isinstance(end, DatagramsV2):
            if end.port is not None:
                end.register_udp_session(flow, ADDRESS, 53, 10**9, now)
        elif what == "register":
            if end.port is not None:
                end.receive(registration(flow, 1), now)
        elif what == "payload":
            end.receive(b"\x01" + flow + b"x" if isinstance(end, DatagramsV3) else b"x" + flow + b"\0", now)
        elif what == "garbage":
            end.receive(data.draw(st.binary(max_size=40).filter(lambda each: not each.startswith(b"\0"))), now)
        elif what == "lose":
            end.on_lost()
            end.attach(Link())
        elif what == "time":
            now += data.draw(st.floats(0.1, 2.0))
            rig.wheel.advance(now)
        elif what == "fail":
            alive = [origin for origin in rig.origins if not origin.closed]
            if alive:
                alive[0].flow.failed(OSError("gone"))
        elif isinstance(end, DatagramsV2):
            end.unregister_udp_session(flow, "")
        alive = [origin for origin in rig.origins if not origin.closed]
        assert len(alive) == rig.slots.taken == rig.wheel.size == sum(end.flows for end in ends) <= 3
        assert all(origin.closed <= 1 for origin in rig.origins)
