"""UDP flows over real sockets, and the sink of a link: no task, bounded queues, ends that let everything go."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from connector.protocol.counts import COUNTS
from connector.protocol.ports import ResetCode, StreamPort, StreamSink
from connector.proxy import udp
from connector.proxy.dns_service import VIRTUAL_DNS, VirtualDns
from connector.proxy.flows import Flows
from connector.proxy.udp import LinkDatagrams, PrivateNetwork
from connector.wire.session_rpc import FAREWELL, encode_unregister
from tests.support.aio import run, until
from tests.support.loops import LOOPS
from tests.support.vectors import vector

ID = b"I" * 16
OK = b"\x03\x00" + ID + b"\0\0"


class Stream:
    """The port of an RPC stream that the connector opened."""

    def __init__(self, data: bytes, sink: StreamSink) -> None:
        self.written = [data]
        self.sink = sink
        self.ended: object = None
        self.reset_by: object = None
        self.credit = 0

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def write_eof(self, trailers: object = ()) -> None:
        self.ended = True

    def stop_reading(self) -> None:
        pass

    def consumed(self, n: int) -> None:
        self.credit += n

    def reset(self, code: ResetCode) -> None:
        self.reset_by = code


class Link:
    """A DatagramPort with a queue that somebody must empty."""

    def __init__(self, room: int = 1000) -> None:
        self.sent: list[bytes] = []
        self.datagram_limit = 1400
        self.datagram_room = room
        self.streams: list[Stream] = []

    def send_datagram(self, data: bytes) -> bool:
        assert self.datagram_room > 0, "a full link is not written to"
        self.datagram_room -= 1
        self.sent.append(data)
        return True

    def open_rpc(self, data: bytes, sink: StreamSink) -> StreamPort | None:
        self.streams.append(Stream(data, sink))
        return self.streams[-1]  # type: ignore[return-value]


class Origin:
    """A UDP server on loopback that shows what came."""

    def __init__(self, family: socket.AddressFamily = socket.AF_INET) -> None:
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        self.socket.settimeout(20)
        host, self.port = self.socket.getsockname()[:2]
        self.address = ip_address(host).packed

    def __enter__(self) -> Origin:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def receive(self) -> tuple[bytes, tuple[str, int]]:
        data, address = self.socket.recvfrom(65536)
        return data, address


def open_link(network: PrivateNetwork, version: int = 3, room: int = 1000) -> tuple[LinkDatagrams, Link]:
    sink, link = network.open_sink(0, version), Link(room)
    sink.attach(link)
    return sink, link


def registration(address: bytes, port: int, idle: int = 0, payload: bytes | None = None, flow: bytes = ID) -> bytes:
    flags = (1 if len(address) == 16 else 0) | (4 if payload is not None else 0)
    return struct.pack("!BBHH", 0, flags, port, idle) + flow + address + (payload or b"")


@pytest.mark.parametrize("loop_factory", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_both_ways_over_both_families(
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None, family: socket.AddressFamily
) -> None:
    async def main() -> None:
        tasks = asyncio.all_tasks()
        network = PrivateNetwork(Flows(), asyncio.get_running_loop())
        with Origin(family) as origin:
            three, link = open_link(network)
            three.on_datagram(registration(origin.address, origin.port, payload=b"first"))
            two, link2 = open_link(network, 2)
            assert two.register_udp_session(ID, origin.address, origin.port, 0, "") == ("", b"")
            two.on_datagram(b"x" * 1280 + ID + b"\0")
            data, address = origin.receive()
            assert data == b"first"
            for answer in (b"", b"answer", b"y" * 1280, b"z" * 1281, b"end"):
                origin.socket.sendto(answer, address)
            data, address = origin.receive()
            assert data == b"x" * 1280
            origin.socket.sendto(b"back", address)
            head = b"\x01" + ID
            await until(lambda: link.sent == [OK, head, head + b"answer", head + b"y" * 1280, head + b"end"])
            await until(lambda: link2.sent == [b"back" + ID + b"\0"])
            assert asyncio.all_tasks() == tasks
            three.on_lost()
            two.on_lost()
            assert network.watched == 0
            await network.close()

    run(main(), loop_factory=loop_factory)


@pytest.mark.parametrize("loop_factory", LOOPS.values(), ids=LOOPS)
def test_a_full_link_stops_reading_and_goes_on(
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None,
) -> None:
    async def main() -> None:
        network = PrivateNetwork(Flows(), asyncio.get_running_loop())
        with Origin() as origin:
            sink, link = open_link(network, room=4)
            sink.on_datagram(registration(origin.address, origin.port, payload=b"hello"))
            _, address = origin.receive()
            for number in range(40):
                origin.socket.sendto(b"%d" % number, address)
            await until(lambda: link.datagram_room == 0)
            for _ in range(50):
                await asyncio.sleep(0)
            assert len(link.sent) == 4  # the rest waits in the kernel
            link.datagram_room = 1000
            sink.on_datagram_room()
            await until(lambda: len(link.sent) == 41)
            assert link.sent[1:] == [b"\x01" + ID + b"%d" % number for number in range(40)]
            link.datagram_room = 0
            origin.socket.sendto(b"more", address)
            for _ in range(50):
                await asyncio.sleep(0)
            sink.on_lost()  # while paused
            sink.on_datagram_room()
            await network.close()

    run(main(), loop_factory=loop_factory)


def test_nobody_listens() -> None:
    """ICMP "port unreachable" ends the flow, in version 2 with a word to the edge."""

    async def main() -> None:
        network = PrivateNetwork(Flows(), asyncio.get_running_loop())
        with Origin() as origin:
            port = origin.port
        two, link = open_link(network, 2)
        assert two.register_udp_session(ID, ip_address("127.0.0.1").packed, port, 0, "") == ("", b"")
        two.on_datagram(b"hello" + ID + b"\0")
        await until(lambda: link.streams)
        [stream] = link.streams
        assert stream.written == [encode_unregister(ID, "Connection refused")]
        answer = vector("rpc_return_bootstrap")
        for part in (answer[:50], answer[50:], vector("rpc_finish_q0_keep")):
            assert stream.ended is None
            stream.sink.on_data(part)
        assert stream.written[1:] == [FAREWELL]
        assert stream.ended
        assert stream.credit == len(answer) + 40
        assert network.watched == 0
        two.on_lost()
        await network.close()

    run(main())


@pytest.mark.parametrize("how", ["silence", "end", "reset", "garbage"])
def test_an_edge_that_does_not_answer_the_end_of_a_session(how: str) -> None:
    async def main() -> None:
        network = PrivateNetwork(Flows(), asyncio.get_running_loop())
        with Origin() as origin:
            two, link = open_link(network, 2)
            two.register_udp_session(ID, origin.address, origin.port, 1, "")  # idle at once
            await until(lambda: link.streams)
            [stream] = link.streams
            if how == "end":
                stream.sink.on_eof()
            elif how == "reset":
                stream.sink.on_reset(None)
            elif how == "garbage":
                stream.sink.on_data(b"\xff" * 64)
            await until(lambda: network.watched == 0, limit=20)
            assert stream.reset_by is (None if how == "reset" else ResetCode.CANCELLED)
            stream.sink.on_data(b"late")
            two.on_lost()
            await network.close()

    run(main())


def test_an_idle_flow_ends_by_the_wheel() -> None:
    async def main() -> None:
        flows = Flows(max_active_flows=1)
        network = PrivateNetwork(flows, asyncio.get_running_loop())
        with Origin() as origin:
            sink, link = open_link(network)
            sink.on_datagram(registration(origin.address, origin.port, idle=1))
            sink.on_datagram(registration(origin.address, origin.port, idle=1, flow=b"O" * 16))
            assert link.sent == [OK, b"\x03\x03" + b"O" * 16 + b"\0\0"]
            await until(lambda: flows.limiter.active == 0)
            sink.on_datagram(registration(origin.address, origin.port, flow=b"O" * 16))
            assert link.sent[2] == b"\x03\x00" + b"O" * 16 + b"\0\0"
            sink.on_lost()
            await network.close()

    run(main())


class Blocked(socket.socket):
    """A socket that takes nothing while `blocked`."""

    blocked = True

    def send(self, data: bytes, flags: int = 0) -> int:  # type: ignore[override]
        if self.blocked:
            raise BlockingIOError
        return super().send(data, flags)


def test_a_socket_that_takes_no_more_has_a_short_queue_with_a_short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        network = PrivateNetwork(Flows(), loop)
        full = ("cloudflared_udp_dropped_datagrams", ("0", "write_full"))
        late = ("cloudflared_udp_dropped_datagrams", ("0", "write_deadline_exceeded"))
        before = COUNTS.numbers.get(full, 0), COUNTS.numbers.get(late, 0)
        with Origin() as origin:
            sink, _ = open_link(network)
            monkeypatch.setattr(udp.socket, "socket", Blocked)
            sink.on_datagram(registration(origin.address, origin.port))
            for number in range(udp.WRITE_QUEUE + 3):
                sink.on_datagram(b"\x01" + ID + b"%d" % number)
            assert COUNTS.numbers.get(full, 0) - before[0] == 3
            await asyncio.sleep(udp.WRITE_SECONDS * 1.5)  # what waits grows too old
            Blocked.blocked = False
            await until(lambda: COUNTS.numbers.get(late, 0) - before[1] == udp.WRITE_QUEUE)
            sink.on_datagram(b"\x01" + ID + b"fresh")
            assert origin.receive()[0] == b"fresh"
            sink.on_lost()
            await network.close()

    run(main())


def test_too_long_for_the_way_is_lost_alone() -> None:
    async def main() -> None:
        network = PrivateNetwork(Flows(), asyncio.get_running_loop())
        with Origin() as origin:
            sink, _ = open_link(network, 2)
            sink.register_udp_session(ID, origin.address, origin.port, 0, "")
            sink.on_datagram(b"x" * 65530 + ID + b"\0")  # no UDP datagram is that long
            sink.on_datagram(b"short" + ID + b"\0")
            assert origin.receive()[0] == b"short"
            sink.on_lost()
            await network.close()

    run(main())


def test_the_virtual_dns_address_leads_to_the_resolver() -> None:
    async def main() -> None:
        with Origin() as origin:
            flows = Flows(dns=VirtualDns([(origin.address, origin.port)]))
            network = PrivateNetwork(flows, asyncio.get_running_loop())
            sink, link = open_link(network)
            sink.on_datagram(registration(*VIRTUAL_DNS, payload=b"question"))
            data, address = origin.receive()
            assert data == b"question"
            origin.socket.sendto(b"answer", address)
            await until(lambda: link.sent == [OK, b"\x01" + ID + b"answer"])
            sink.on_lost()
            await network.close()

    run(main())


def test_an_address_without_a_route_is_refused() -> None:
    async def main() -> None:
        network = PrivateNetwork(Flows(), asyncio.get_running_loop())
        sink, link = open_link(network)
        sink.on_datagram(registration(ip_address("255.255.255.255").packed, 53))  # broadcast is not allowed
        assert link.sent == [b"\x03\x02" + ID + b"\0\0"]
        assert network.watched == 0
        await network.close()

    run(main())
