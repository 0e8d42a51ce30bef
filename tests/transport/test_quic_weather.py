"""QUIC links over bad networks: loss, delay, reordering, a small MTU, blocked UDP, NAT rebinding."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from connector.errors import EdgeDialError, EdgeLostError
from connector.transport.quic import QuicLink, dial_quic
from connector.transport.quic_trust import quic_context
from tests.support.aio import run, until
from tests.support.mini_quic_edge import MiniQuicConnection, MiniQuicEdge
from tests.support.udp_weather import UdpWeather
from tests.transport.quic_rig import Acceptor, both, everywhere, run_on

BODY = os.urandom(200_000)


async def dialled(
    edge: MiniQuicEdge, port: int, engine: str, *, idle_timeout: float = 60.0, **options: Any
) -> tuple[QuicLink, MiniQuicConnection]:
    link = await dial_quic(
        "127.0.0.1",
        port,
        context=quic_context(edge.cacert),
        accept=Acceptor(),
        engine=engine,
        idle_timeout=idle_timeout,
        **options,
    )
    return link, await edge.accepted()


async def exchange(edge: MiniQuicConnection, count: int = 8) -> None:
    """Posts that must come back whole, and small messages beside them."""
    posts = [
        edge.request("/post", [("HttpMethod", "POST"), ("HttpHeader:Content-Length", str(len(BODY)))])
        for _ in range(count)
    ]
    chat = edge.request("/ws", kind="websocket")
    for stream in posts:
        stream.send(BODY, end=True)
    await chat.response(60)
    for number in range(20):
        chat.send(b"%08d" % number)
        assert await chat.read(8, 60) == b"%08d" % number
    for stream in posts:
        await stream.response(60)
        assert await stream.body(60) == BODY


@everywhere
@pytest.mark.parametrize(
    "weather",
    [
        {"loss": 0.01, "delay": 0.005},
        {"loss": 0.05, "delay": 0.002},
        {"delay": 0.001, "jitter": 0.01},
        {"mtu": 1_252},
    ],
    ids=["loss 1%", "loss 5%", "reordering", "MTU 1280"],
)
def test_no_request_fails(tmp_path: Path, engine: str, loop: str, weather: dict[str, Any]) -> None:
    async def main() -> None:
        async with MiniQuicEdge(tmp_path) as edge, UdpWeather(edge.port, **weather) as between:
            link, connection = await dialled(edge, between.port, engine)
            try:
                await exchange(connection, 4)
                assert link.mtu <= 1_452
                if "mtu" in weather:
                    assert link.mtu <= weather["mtu"]
                if "loss" in weather:
                    assert between.lost
                assert link.open_streams <= 2
            finally:
                link.abort()

    run_on(loop, main(), limit=110)


@both
def test_nat_rebinding(tmp_path: Path, engine: str) -> None:
    async def main() -> None:
        async with MiniQuicEdge(tmp_path) as edge, UdpWeather(edge.port) as between:
            link, connection = await dialled(edge, between.port, engine)
            try:
                chat = connection.request("/ws", kind="websocket")
                await chat.response()
                between.rebind()
                sink = link._streams.streams[chat.stream_id].sink
                sink.port.write(b"from a new port")  # type: ignore[attr-defined]
                assert await chat.read(15) == b"from a new port"
                chat.send(b"back")
                assert await chat.read(4) == b"back"
            finally:
                link.abort()

    run(main())


@both
def test_blocked_udp(tmp_path: Path, engine: str) -> None:
    async def main() -> None:
        async with MiniQuicEdge(tmp_path) as edge, UdpWeather(edge.port) as between:
            between.blocked = True
            with pytest.raises(EdgeDialError) as caught:
                await dialled(edge, between.port, engine, handshake_timeout=1.0)
            assert "UDP" in caught.value.advice
            between.blocked = False
            link, connection = await dialled(edge, between.port, engine, idle_timeout=3.0)
            await exchange(connection, 1)
            between.blocked = True
            with pytest.raises(EdgeLostError, match="no sign of life"):
                await asyncio.wait_for(link.wait_closed(), 30)

    run(main())


@both
def test_a_short_outage_costs_nothing(tmp_path: Path, engine: str) -> None:
    async def main() -> None:
        async with MiniQuicEdge(tmp_path) as edge, UdpWeather(edge.port) as between:
            link, connection = await dialled(edge, between.port, engine)
            try:
                chat = connection.request("/ws", kind="websocket")
                await chat.response()
                between.blocked = True
                chat.send(b"x" * 1_000)
                before = between.lost
                await until(lambda: between.lost >= before + 4, what="the edge tries again and again")
                between.blocked = False
                assert await chat.read(1_000) == b"x" * 1_000
                await until(lambda: link.open_streams == 2)
            finally:
                link.abort()

    run(main())
