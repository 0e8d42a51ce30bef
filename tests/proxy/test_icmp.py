"""Ping sockets: whether the system allows them, which addresses they use, and the flows without a network."""

from __future__ import annotations

import asyncio
import os
import socket
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest

from connector.errors import ConfigError
from connector.protocol.counts import COUNTS
from connector.protocol.idle_wheel import IdleWheel
from connector.proxy import icmp as proxy
from connector.proxy.icmp import IcmpProxy, PingFlow, local_ipv4, local_ipv6, make_icmp_proxy
from connector.wire import icmp
from tests.support.aio import run, until
from tests.support.loops import LOOPS

HERE, THERE = b"\x64\x60\0\x01", b"\x0a\0\0\x02"


def request(identifier: int, ttl: int = 64, destination: bytes = THERE) -> bytes:
    message = icmp.encode_message(icmp.ECHO4 if len(destination) == 4 else icmp.ECHO6, identifier, 1, b"data")
    return icmp.encode_packet(HERE if len(destination) == 4 else b"\xfd" * 16, destination, message, ttl)


class End:
    label = "3"

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send_icmp(self, packet: bytes) -> bool:
        self.sent.append(packet)
        return True

    def send_spans(self, identity: bytes, spans: bytes) -> None:
        raise AssertionError


class Socket:
    """Half of a socket pair in place of a ping socket, so that no privilege is needed: the test is the kernel."""

    def __init__(self) -> None:
        self.inner, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.inner.setblocking(False)
        self.kernel.setblocking(False)

    def fileno(self) -> int:
        return self.inner.fileno()

    def sendto(self, data: bytes, address: Any) -> int:
        assert address == ("10.0.0.2", 0)
        return self.inner.send(data)

    def recvfrom(self, size: int) -> tuple[bytes, Any]:
        return self.inner.recv(size), ("10.0.0.2", 0)

    def close(self) -> None:
        self.inner.close()
        self.kernel.close()


def made(
    monkeypatch: pytest.MonkeyPatch, source6: IPv6Address | None = None
) -> tuple[IcmpProxy, IdleWheel, list[Socket]]:
    sockets: list[Socket] = []

    def open_ping(source: object, zone: str = "") -> Socket:
        sockets.append(Socket())
        return sockets[-1]

    monkeypatch.setattr(proxy, "open_ping", open_ping)
    it = IcmpProxy(IPv4Address("10.0.0.1"), source6, asyncio.get_running_loop())
    wheel = IdleWheel(0.0)
    it.start(wheel, lambda: None, lambda level, message, fields: None)
    return it, wheel, sockets


def test_flows_replies_idleness_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        it, wheel, sockets = made(monkeypatch)
        first, second = End(), End()
        it.request(first, request(1), 0.0)
        it.request(first, request(1), 1.0)  # the same flow
        it.request(first, request(2), 1.0)
        assert (it.flows, len(sockets), wheel.size) == (2, 2, 2)
        asked = sockets[0].kernel.recv(100)
        assert (asked[0], asked[4:]) == (icmp.ECHO4, b"\0\x01\0\x01data")  # the kernel sums anew
        # The kernel answers with an identifier of its own; anything but a reply goes nowhere.
        sockets[0].kernel.send(icmp.encode_message(icmp.ECHO4_REPLY, 999, 1, b"data"))
        sockets[0].kernel.send(icmp.encode_message(3, 999, 1, b"data"))
        sockets[0].kernel.send(b"short")
        await until(lambda: first.sent)
        assert first.sent == [
            icmp.encode_packet(THERE, HERE, icmp.encode_message(icmp.ECHO4_REPLY, 1, 1, b"data"), icmp.DEFAULT_TTL)
        ]
        it.request(second, request(1), 2.0)  # over another connection: answers go there from now on
        assert (it.flows, len(sockets)) == (2, 3)
        sockets[2].kernel.send(icmp.encode_message(icmp.ECHO4_REPLY, 7, 1, b"more"))
        await until(lambda: second.sent)
        it.lost(second)
        assert it.flows == 1
        wheel.advance(100.0)
        assert (it.flows, wheel.size) == (0, 0)
        it.close()

    run(main())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_flow_hears_again_after_a_request_that_failed(monkeypatch: pytest.MonkeyPatch, loop: str) -> None:
    """The kernel tells of an ICMP error on the socket, after which uvloop alone would never look at that again."""

    async def main() -> None:
        it, _, _ = made(monkeypatch)
        end = End()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as away:
            away.bind(("127.0.0.1", 0))
            where = away.getsockname()
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.connect(where)
        flow = PingFlow(it, (HERE, THERE, 1), end, sock, 0.0)
        sock.send(b"nobody is there")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as back:
            back.bind(where)
            back.connect(sock.getsockname())
            for number in range(1, 4):
                await asyncio.sleep(0)
                back.send(icmp.encode_message(icmp.ECHO4_REPLY, 7, number, b"here"))
                await until(lambda number=number: len(end.sent) == number)  # type: ignore[misc]
        flow.close()
        it.close()

    run(main(), loop_factory=LOOPS[loop])


def test_limits_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(proxy, "MAX_FLOWS", 3)
        it, _, sockets = made(monkeypatch)
        end = End()
        key = ("cloudflared_icmp_dropped_packets", ("3", "write_failed"))
        before = COUNTS.numbers.get(key, 0)
        for identifier in range(5):
            it.request(end, request(identifier), 0.0)
        it.request(end, b"nonsense", 0.0)
        it.request(end, request(1, destination=b"\xfd" * 16), 0.0)  # no IPv6 here
        assert len(sockets) == 3
        assert COUNTS.numbers[key] - before == 4
        it.request(end, request(9, ttl=1), 0.0)
        assert end.sent[0][12:20] == IPv4Address("10.0.0.1").packed + HERE
        it.request(end, request(9, ttl=1, destination=b"\xfd" * 16), 0.0)
        assert len(end.sent) == 1
        it.close()

    run(main())


def test_the_group_decides(tmp_path: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        file = tmp_path / "ping_group_range"
        file.write_text(f"{os.getegid() + 1}\t{os.getegid() + 5}\n")
        with pytest.raises(OSError, match=f"Group ID {os.getegid()} is not between ping group"):
            make_icmp_proxy(loop, group_range=file)
        for flags, flag in (
            (("x", ""), "--icmpv4-src"),
            (("::1", ""), "--icmpv4-src"),
            (("", "1.2.3.4"), "--icmpv6-src"),
        ):
            with pytest.raises(ConfigError, match=flag):
                make_icmp_proxy(loop, *flags, group_range=file)

    run(main())


def test_addresses_of_this_machine(tmp_path: Path) -> None:
    assert local_ipv4().version == 4
    file = tmp_path / "if_inet6"
    assert local_ipv6(IPv4Address(0), file) == (IPv6Address(0), "")
    file.write_text(
        "00000000000000000000000000000001 01 80 10 80       lo\nfe800000000000000000000000000001 02 40 20 80     eth0\n"
    )
    assert local_ipv6(IPv4Address(0), file) == (IPv6Address("fe80::1"), "eth0")
    with file.open("a") as more:
        more.write("fd000000000000000000000000000001 03 40 00 80     eth1\n")
    assert local_ipv6(IPv4Address(0), file) == (IPv6Address("fd00::1"), "")
