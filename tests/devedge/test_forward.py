"""Ports that lead into a private network: their flags, and what happens when no connector is there."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from connector.devedge.datagrams import echo_request, internet_checksum, read_pong
from connector.devedge.forward import MAX_CLIENTS, Route, UdpForward, parse_route
from connector.devedge.server import DevEdge, Settings
from connector.errors import ConfigError
from tests.devedge.edges import Recorder, run_edge
from tests.support.aio import until


@pytest.mark.parametrize(
    ("text", "route"),
    [
        ("127.0.0.1:5353=10.0.0.53:53", Route(("127.0.0.1", 5353), ("10.0.0.53", 53))),
        ("5353=10.0.0.53:53", Route(("127.0.0.1", 5353), ("10.0.0.53", 53))),
        ("[::1]:0=[fd00::1]:53", Route(("::1", 0), ("fd00::1", 53))),
    ],
)
def test_routes(text: str, route: Route) -> None:
    assert parse_route(text, "--udp") == route


@pytest.mark.parametrize(
    "text", ["", "5353", "5353=", "5353=name:53", "x:y=10.0.0.1:53", "5353=10.0.0.1:99999", "=1.1.1.1:1"]
)
def test_routes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--udp"):
        parse_route(text, "--udp")


def test_without_a_connector_clients_are_told_by_events(tmp_path: Path) -> None:
    async def main() -> None:
        recorder = Recorder()
        routes = [Route(("127.0.0.1", 0), ("10.0.0.1", 53))]
        settings = Settings(tmp_path, tunnel_names=["demo"], udp=routes, tcp=routes, ping=["10.0.0.1"])
        async with DevEdge(settings, recorder.log) as edge:
            udp, tcp = edge.forwards
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(b"hello", udp.address)
                await until(lambda: recorder.named("udp_flow_refused"))
            reader, writer = await asyncio.open_connection(*tcp.address)
            try:
                assert await reader.read() == b""
            except ConnectionError:
                pass
            writer.close()
            assert "no connector attached" in recorder.named("tcp_flow_refused")[0]["error"]
            assert "no connector attached" in recorder.named("udp_flow_refused")[0]["error"]
            await until(lambda: recorder.named("ping"))
            assert not recorder.named("ping")[0]["answered"]
            assert isinstance(udp, UdpForward)
            assert not udp.clients
            assert MAX_CLIENTS > 1

    run_edge(main())


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
            taken.bind(("127.0.0.1", 0))
            route = Route(taken.getsockname(), ("10.0.0.1", 53))
            with pytest.raises(ConfigError, match=r"--udp 127\.0\.0\.1"):
                async with DevEdge(Settings(tmp_path, tunnel_names=["demo"], udp=[route])):
                    pass

    run_edge(main())


def test_packets_of_the_edges_own_codec() -> None:
    four, six = b"\x0a\0\0\1", b"\xfd" * 16
    for address in (four, six):
        packet = echo_request(address, address, 7, 9, 64, b"odd")
        head = 20 if address is four else 40
        if address is four:
            assert internet_checksum(packet[:20]) == internet_checksum(packet[20:]) == 0
        assert read_pong(packet) is None  # a request is no answer
        for size in range(len(packet)):
            assert read_pong(packet[:size]) is None
        assert packet[head] == (8 if address is four else 128)
