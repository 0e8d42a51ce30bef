"""The UDP socket of QUIC links: batches, GRO and GSO, and what the kernel says no to."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest

from connector.errors import EdgeDialError
from connector.transport import udp
from connector.transport.udp import GSO_BYTES, GSO_SEGMENTS, UdpSocket, explain_udp_error, open_udp
from tests.support.aio import run, until
from tests.support.loops import LOOPS

loops = pytest.mark.parametrize("loop", LOOPS)
linux = pytest.mark.skipif(sys.platform != "linux", reason="GRO and GSO are Linux's")


class FaultySocket:
    """A socket whose sends fail as told; everything else is the real one's."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.errors: list[int | None] = []
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def _maybe_fail(self, call: str) -> None:
        self.calls.append(call)
        code = self.errors.pop(0) if self.errors else None
        if code is not None:
            raise OSError(code, "injected")

    def send(self, data: bytes) -> int:
        self._maybe_fail("send")
        return self.sock.send(data)

    def sendmsg(self, *args: Any) -> int:
        self._maybe_fail("sendmsg")
        return self.sock.sendmsg(*args)


class Pair:
    """A UdpSocket and a plain socket that it is connected to."""

    def __init__(self) -> None:
        self.peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.peer.bind(("127.0.0.1", 0))
        self.peer.setblocking(False)
        self.faults = FaultySocket(open_udp(self.peer.getsockname(), socket.AF_INET, None))
        self.peer.connect(self.faults.getsockname())
        self.received: list[tuple[bytes, int]] = []
        self.reads = 0
        self.writable = 0
        self.udp = UdpSocket(
            self.faults,  # type: ignore[arg-type]
            asyncio.get_running_loop(),
            on_readable=self._readable,
            on_writable=self._writable,
        )

    def _readable(self) -> None:
        self.reads += self.udp.receive(lambda data, segment: self.received.append((data, segment)))

    def _writable(self) -> None:
        self.writable += 1

    def datagrams(self) -> list[bytes]:
        """What arrived at the peer."""
        found = []
        while True:
            try:
                found.append(self.peer.recv(65_536))
            except BlockingIOError:
                return found

    def close(self) -> None:
        self.udp.close()
        self.udp.close()
        self.peer.close()


def with_pair(loop: str, test: Callable[[Pair], Any]) -> None:
    async def main() -> None:
        pair = Pair()
        try:
            await test(pair)
        finally:
            pair.close()

    run(main(), loop_factory=LOOPS[loop])


@loops
def test_runs_of_datagrams_arrive_one_by_one(loop: str) -> None:
    async def test(pair: Pair) -> None:
        sent = [bytes([n]) * 1_200 for n in range(10)] + [b"short", b"x" * 1_300, b"y" * 1_300]
        assert pair.udp.send(sent)
        assert pair.datagrams() == sent
        if pair.udp.gso:
            assert pair.faults.calls == ["sendmsg", "sendmsg"]

    with_pair(loop, test)


@loops
@linux
def test_gro_buffers_come_whole(loop: str) -> None:
    async def test(pair: Pair) -> None:
        sent = [bytes([n]) * 1_000 for n in range(12)] + [b"end"]
        pair.peer.sendmsg(sent, [(17, 103, (1_000).to_bytes(2, "little"))])
        await until(lambda: sum(len(data) for data, _ in pair.received) == 12_003)
        cut = [data[at : at + size] for data, size in pair.received for at in range(0, len(data), size)]
        assert cut == sent
        assert pair.reads < len(sent)

    with_pair(loop, test)


@loops
def test_reading_stops_after_a_burst_and_goes_on(loop: str) -> None:
    async def test(pair: Pair) -> None:
        count = udp.READ_BURST * 2 + 5
        for number in range(count):
            pair.peer.send(b"%d" % number * (1 + number % 3))  # no two alike in a row: nothing to coalesce
        first = pair.udp.receive(lambda data, segment: pair.received.append((data, segment)))
        assert first == udp.READ_BURST
        await until(lambda: len(pair.received) == count)

    with_pair(loop, test)


@loops
@linux
@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_gso_is_given_up_where_the_way_out_has_none(loop: str, code: int) -> None:
    async def test(pair: Pair) -> None:
        sent = [bytes([n]) * 500 for n in range(5)]
        pair.faults.errors = [code]
        assert pair.udp.send(sent)
        assert pair.datagrams() == sent
        assert not pair.udp.gso
        assert pair.udp.send(sent)
        assert pair.datagrams() == sent
        assert pair.faults.calls == ["sendmsg"] + ["send"] * 10

    with_pair(loop, test)


@loops
def test_too_large_probes_are_no_error(loop: str) -> None:
    async def test(pair: Pair) -> None:
        pair.faults.errors = [errno.EMSGSIZE]
        assert pair.udp.send([b"probe" * 290])
        assert pair.udp.error is None
        assert pair.udp.dropped == 1
        assert pair.udp.send([b"next"])
        assert pair.datagrams() == [b"next"]

    with_pair(loop, test)


@loops
def test_what_the_kernel_does_not_take_waits_in_order_and_has_an_end(loop: str) -> None:
    async def test(pair: Pair) -> None:
        pair.faults.errors = [errno.EAGAIN]
        assert not pair.udp.send([b"1", b"22"])
        assert pair.udp.blocked
        assert not pair.udp.send([b"333"])
        await until(lambda: pair.writable)
        assert not pair.udp.blocked
        assert pair.datagrams() == [b"1", b"22", b"333"]
        pair.faults.errors = [errno.EAGAIN]
        pair.udp.send([b"a%d" % n + b"b" * (n % 7) for n in range(udp.SEND_QUEUE + 200)])
        assert pair.udp.dropped >= 100
        assert "waiting" in repr(pair.udp)

    with_pair(loop, test)


@loops
def test_port_unreachable_shows_as_error_and_the_socket_goes_on(loop: str) -> None:
    async def test(pair: Pair) -> None:
        address = pair.peer.getsockname()
        pair.peer.close()
        pair.udp.send([b"x"])
        await until(lambda: pair.udp.error is not None or pair.udp.send([b"y"]) is False)
        assert pair.udp.error is not None
        assert pair.udp.error.errno == errno.ECONNREFUSED
        pair.udp.error = None
        pair.peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        pair.peer.bind(address)
        pair.peer.setblocking(False)
        pair.udp.send([b"z"])
        pair.udp.send([b"z"])
        await until(lambda: b"z" in pair.datagrams())

    with_pair(loop, test)


def test_runs_obey_the_kernels_limits() -> None:
    runs = udp._runs([b"x" * 1_452] * 100)
    assert [len(group) for group, _ in runs] == [44, 44, 12]
    assert all(sum(map(len, group)) <= GSO_BYTES for group, _ in runs)
    runs = udp._runs([b"x" * 100] * 100)
    assert [len(group) for group, _ in runs] == [GSO_SEGMENTS, 36]
    runs = udp._runs([b"xx", b"x", b"x", b"xxx"])
    assert [[len(datagram) for datagram in group] for group, _ in runs] == [[2, 1], [1], [3]]


@linux
def test_options_of_the_socket() -> None:
    with open_udp(("127.0.0.1", 9), socket.AF_INET, ("127.0.0.1", 0)) as sock:
        assert sock.getsockopt(socket.IPPROTO_IP, 10) == 3  # IP_MTU_DISCOVER: IP_PMTUDISC_PROBE
        assert not sock.getblocking()
        port = sock.getsockname()[1]
        with open_udp(("127.0.0.1", 10), socket.AF_INET, ("127.0.0.1", port)) as other:
            assert other.getsockname()[1] not in (0, port)
    with open_udp(("::1", 9), socket.AF_INET6, None) as sock:
        assert sock.getsockopt(socket.IPPROTO_IPV6, 23) == 3
    with pytest.raises(OSError):  # noqa: PT011
        open_udp(("127.0.0.1", 9), socket.AF_INET, ("203.0.113.1", 0))


@pytest.mark.parametrize(
    ("code", "local", "words"),
    [
        (errno.ECONNREFUSED, None, "refuses UDP"),
        (errno.EADDRNOTAVAIL, ("203.0.113.1", 0), r"cannot bind 203\.0\.113\.1:0"),
        (errno.ENETUNREACH, None, "cannot send UDP"),
    ],
)
def test_errors_say_what_to_do(code: int, local: tuple[str, int] | None, words: str) -> None:
    error = explain_udp_error(OSError(code, "text"), "192.0.2.1", 7844, local)
    assert isinstance(error, EdgeDialError)
    assert error.advice
    with pytest.raises(EdgeDialError, match=words):
        raise error


@loops
@pytest.mark.parametrize("taken", [False, True])
def test_a_socket_hears_again_after_an_error(loop: str, taken: bool) -> None:
    """The peer was away (ICMP) and is back: uvloop alone would never look at the socket again."""

    async def main() -> None:
        this = asyncio.get_running_loop()
        peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        peer.bind(("127.0.0.1", 0))
        where = peer.getsockname()
        sock = open_udp(where, socket.AF_INET, None)
        peer.close()
        received: list[bytes] = []
        woken: list[int] = []

        def on_readable() -> None:
            woken.append(it.receive(lambda data, _: received.append(data)))

        it = UdpSocket(sock, this, on_readable=on_readable, on_writable=lambda: None)
        sock.send(b"anybody?")
        if taken:  # by who sends: nothing is left to read when the loop looks
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        else:
            await until(lambda: woken)
            assert isinstance(it.error, ConnectionRefusedError)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as back:
            back.bind(where)
            back.connect(sock.getsockname())
            for number in range(3):
                back.send(b"here")
                await until(lambda number=number: len(received) == number + 1)  # type: ignore[misc]
        it.close()

    run(main(), loop_factory=LOOPS[loop])
