"""The flow limit, warp-routing and the virtual DNS address."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import cast

import dns.message
import pytest

from connector.proxy.dns_service import (
    REFRESH_SECONDS,
    VIRTUAL_DNS,
    Address,
    VirtualDns,
    find_answering,
    parse_resolvers,
    read_resolv_conf,
)
from connector.proxy.flows import FlowLimiter, FlowLimitError, Flows, WarpRouting
from tests.support.aio import run, until


def packed(text: str) -> bytes:
    return ip_address(text).packed


def test_the_limit_counts_tcp_and_udp_together() -> None:
    limiter = FlowLimiter()
    limiter.take_tcp()
    assert limiter.take_udp()
    limiter.configure(2)
    with pytest.raises(FlowLimitError, match="failed to start tcp flow due to rate limiting: too many active flows"):
        limiter.take_tcp()
    assert not limiter.take_udp()
    assert limiter.active == 2
    limiter.release()
    assert limiter.take_udp()
    limiter.configure(1)  # lower than what is open: nothing is cut, nothing new starts
    assert not limiter.take_udp()
    limiter.configure(0)
    assert limiter.take_udp()


def test_a_limit_by_flag_wins_over_every_configuration() -> None:
    flows = Flows(max_active_flows=1)
    flows.configure({"maxActiveFlows": 100, "connectTimeout": 7})
    assert flows.warp == WarpRouting(7, 30, 100)
    assert flows.limiter.take_udp()
    assert not flows.limiter.take_udp()
    unlimited = Flows(max_active_flows=0)
    unlimited.configure({"maxActiveFlows": 1})
    assert unlimited.limiter.take_udp()
    assert unlimited.limiter.take_udp()
    assert Flows().warp == WarpRouting(5, 30, 0)


def test_resolvers_by_flag() -> None:
    assert parse_resolvers(["10.0.0.53:53", " [fd00::53]:5353"]) == [
        (packed("10.0.0.53"), 53),
        (packed("fd00::53"), 5353),
    ]
    for bad in ("10.0.0.53", "resolver:53", "fd00::53:53", "[10.0.0.1]:53", "10.0.0.1:0", "10.0.0.1:x", ":53", ""):
        with pytest.raises(ValueError, match="is not IP:PORT"):
            parse_resolvers([bad])
    with pytest.raises(ValueError, match="11 addresses"):
        parse_resolvers(["10.0.0.53:53"] * 11)


def test_given_resolvers_are_drawn_and_only_for_the_virtual_address() -> None:
    fixed = [(packed("10.0.0.1"), 53), (packed("10.0.0.2"), 54)]
    service = VirtualDns(fixed)
    assert service.maybe_resolver(packed("10.9.9.9"), 53, tcp=True) is None
    assert service.maybe_resolver(VIRTUAL_DNS[0], 54, tcp=True) is None
    drawn = {service.maybe_resolver(*VIRTUAL_DNS, tcp=False) for _ in range(100)}
    assert drawn == set(fixed)


def test_resolv_conf(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    assert read_resolv_conf(file) == [(packed("127.0.0.1"), 53)]
    file.write_text("# nameserver 1.1.1.1\nnameserver x\nnameserver 10.0.0.2\nnameserver fe80::1%eth0\nsearch x\n")
    assert read_resolv_conf(file) == [(packed("10.0.0.2"), 53), (packed("fe80::1"), 53)]


def test_the_resolver_that_answers_takes_over_and_is_looked_for_again() -> None:
    async def main() -> None:
        first, second = (packed("10.0.0.1"), 53), (packed("10.0.0.2"), 53)
        asked: list[Sequence[Address]] = []
        now = 0.0

        async def probe(known: Sequence[Address]) -> Address | None:
            asked.append(known)
            await asyncio.sleep(0)
            return second if len(asked) == 1 else None

        service = VirtualDns(read=lambda: [first, second], probe=probe, clock=lambda: now)
        assert service.maybe_resolver(*VIRTUAL_DNS, tcp=True) == first
        await until(lambda: service.maybe_resolver(*VIRTUAL_DNS, tcp=True) == second)
        assert len(asked) == 1
        now += REFRESH_SECONDS
        assert service.maybe_resolver(*VIRTUAL_DNS, tcp=True) == second
        await until(lambda: len(asked) == 2)
        assert service.maybe_resolver(*VIRTUAL_DNS, tcp=True) == second  # nobody answered: the known one stays
        await service.close()

    run(main())


def test_silent_resolvers_are_passed_over() -> None:
    class Dns(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast("asyncio.DatagramTransport", transport)  # not an instance of it on Python 3.11

        def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
            self.transport.sendto(dns.message.make_response(dns.message.from_wire(data)).to_wire(), address)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(Dns, local_addr=("127.0.0.1", 0))
        port = transport.get_extra_info("sockname")[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 0))
            resolvers = [(packed("127.0.0.1"), silent.getsockname()[1]), (packed("127.0.0.1"), port)]
            assert await find_answering(resolvers) == resolvers[1]
        transport.close()

    run(main())
