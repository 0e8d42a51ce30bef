"""HTTP/2 origins: one connection for many, trailers, credit both ways, refusals and goodbyes, and HTTP/1.1 instead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from connector.protocol.ports import ResetCode
from connector.proxy import limits
from tests.proxy.conftest import Runner
from tests.proxy.rig import Rig, rig
from tests.support.aio import until
from tests.support.certs import Authority
from tests.support.h2_origin import TRAILERS, H2Origin
from tests.support.raw_origin import RawConnection, RawOrigin

H2 = {"noTLSVerify": True, "http2Origin": True}


def origin(tmp_path: Path, **options: Any) -> H2Origin:
    return H2Origin(Authority().server_context(tmp_path, "a.example"), **options)


def test_a_grpc_call_with_trailers(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with origin(tmp_path) as peer, rig(peer.url, H2) as it:
            port = it.open(
                "POST", "/echo", host="grpc.example", length=-1,
                headers=[(b"te", b"trailers"), (b"content-type", b"application/grpc"), (b"connection", b"x"),
                         (b"cf-warp-tag-id", b"spoofed")],
            )  # fmt: skip
            assert await port.head() == 200
            for number in range(3):  # both directions at once
                port.send(b"message %d" % number)
                await port.received(9 * (number + 1))
            port.send_eof()
            assert await port.whole() == b"message 0message 1message 2"
            assert port.trailers == TRAILERS
            assert port.header(b"x-proto") == b"h2"
            headers = dict(peer.requests[0])
            assert headers[b":authority"] == b"grpc.example"
            assert headers[b":scheme"] == b"https"
            assert headers[b"te"] == b"trailers"
            assert headers[b"cf-warp-tag-id"] == b"11111111-2222-4333-8444-555555555555"
            assert b"connection" not in headers
            assert b"content-length" not in headers

    on_loop(main())


def test_many_requests_share_one_connection(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with origin(tmp_path) as peer, rig(peer.url, H2) as it:
            ports = [it.open("POST", "/echo", length=5) for _ in range(50)]
            assert [await port.head() for port in ports] == [200] * 50
            for port in ports:
                port.send(b"hello")
                port.send_eof()
            assert [await port.whole() for port in ports] == [b"hello"] * 50
            assert len(peer.connections) == 1
            assert peer.connections[0].most == 50
            assert dict(peer.requests[0])[b"content-length"] == b"5"
            assert await it.open("GET", "/early").whole() == b"early"
            assert len(peer.connections) == 1

    on_loop(main())


def test_a_full_connection_gets_a_sister(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with origin(tmp_path, streams=2) as peer, rig(peer.url, H2) as it:
            assert await it.open("GET", "/early").whole() == b"early"  # its settings are known from now on
            held = [it.open("GET", "/hold") for _ in range(3)]
            await until(lambda: len(peer.requests) == 4)
            assert len(peer.connections) == 2
            for port in held:
                port.peer_reset()

    on_loop(main())


def test_long_bodies_both_ways(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        body = os.urandom(3 * 1024 * 1024)
        async with origin(tmp_path) as peer, rig(peer.url, H2) as it:
            port = it.open("POST", "/echo", length=len(body))
            await port.send_all(body)
            assert await port.whole() == body
            assert port.credited == len(body)
            assert peer.connections[0].received == len(body)

    on_loop(main())


def test_a_slow_eyeball_stops_the_origin(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        size = 4 * limits.HTTP2_STREAM_WINDOW
        async with origin(tmp_path) as peer, rig(peer.url, H2) as it:
            port = it.open("GET", f"/big?{size}", high_water=65_536)
            await until(lambda: len(port.body) >= limits.HTTP2_STREAM_WINDOW)
            assert await it.open("GET", "/early").whole() == b"early"  # a neighbour is not stopped
            assert len(port.body) < size
            got = 0
            while got < size:
                got += len(port.take())
                await port.until(lambda: port._queued or port.ended)
            assert got == size
            assert await port.whole()
            assert port.max_queued <= 65_536 + limits.HTTP2_STREAM_WINDOW
            assert port.trailers == TRAILERS

    on_loop(main())


def test_an_origin_that_does_not_read_stops_the_edge(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with origin(tmp_path) as peer, rig(peer.url, H2) as it:
            port = it.open("POST", "/head", length=-1)
            assert await port.head() == 200
            for _ in range(20):
                port.send(b"x" * 10_000)
            await until(lambda: peer.connections[0].received == 65_535)
            assert port.credited == 65_535
            port.peer_reset()
            await until(lambda: peer.resets == [8])  # CANCEL

    on_loop(main())


def test_an_early_answer_ends_the_upload(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with origin(tmp_path) as peer, rig(peer.url, H2) as it:
            port = it.open("POST", "/early", length=1000)
            port.send(b"x")
            assert await port.whole() == b"early"
            assert (port.status, port.stopped) == (201, True)
            assert await it.open("GET", "/early").whole() == b"early"
            assert len(peer.connections) == 1

    on_loop(main())


def test_what_was_not_looked_at_is_asked_again(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with origin(tmp_path) as peer, rig(peer.url, H2) as it:
            assert await it.open("POST", "/refuse").whole() == b"second"
            assert peer.refused == 1

    on_loop(main())


def test_an_origin_that_leaves_finishes_what_it_has(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with origin(tmp_path) as peer, rig(peer.url, H2) as it:
            assert await it.open("GET", "/goaway").whole() == b"late"
            assert await it.open("GET", "/early").whole() == b"early"
            assert len(peer.connections) == 2
            await until(lambda: it.dispatcher.open_connections == 1)

    on_loop(main())


async def failure(it: Rig, target: str) -> dict[str, Any]:
    port = it.open("GET", target)
    assert await port.head() == 502
    return it.failures()[-1]


def test_failures_are_named(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with origin(tmp_path) as peer, rig(peer.url, H2) as it:
            assert "reset the HTTP/2 stream: INTERNAL_ERROR" in (await failure(it, "/abort"))["error"]
            assert "HTTP/2 connection to the origin ended" in (await failure(it, "/cut"))["error"]
            assert await it.open("GET", "/early").whole() == b"early"
            port = it.open("GET", "/head")
            assert await port.head() == 200
            peer.connections[-1].transport.abort()
            await port.until(lambda: port.reset_code is not None)
            assert port.reset_code is ResetCode.FAILED

    on_loop(main())


def test_garbage_ends_the_connection_only(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with origin(tmp_path) as peer, rig(peer.url, H2) as it:
            port = it.open("GET", "/hold")
            await until(lambda: peer.requests)
            peer.connections[0].transport.write(b"\x00\x00\x05\x00\x00\x00\x00\x00\x09hello")
            assert await port.head() == 502
            assert "broke HTTP/2" in it.failures()[-1]["error"]
            assert await it.open("GET", "/early").whole() == b"early"

    on_loop(main())


def test_a_dead_origin_fails_all_who_wait(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with origin(tmp_path) as peer:
            url = peer.url
        async with rig(url, H2) as it:
            ports = [it.open("GET", "/x") for _ in range(5)]
            assert [await port.head() for port in ports] == [502] * 5
            assert it.pool().dialled == 0

    on_loop(main())


def test_a_first_eyeball_that_leaves_does_not_take_the_others_along(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with origin(tmp_path) as peer, rig(peer.url, H2) as it:
            first, second = it.open("GET", "/early"), it.open("GET", "/early")
            first.peer_reset()
            assert await second.whole() == b"early"

    on_loop(main())


@pytest.mark.parametrize("alpn", [True, False])
def test_an_origin_without_http2_gets_http1(on_loop: Runner, tmp_path: Path, alpn: bool) -> None:
    async def script(connection: RawConnection) -> None:
        while (await connection.read_head()) is not None:
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async def main() -> None:
        context = Authority().server_context(tmp_path, "a.example")
        if alpn:
            context.set_alpn_protocols(["http/1.1"])
        async with RawOrigin(script, tls=context) as peer, rig(peer.url, H2) as it:
            ports = [it.open() for _ in range(4)]
            assert [await port.whole() for port in ports] == [b"ok"] * 4
            assert await it.open().whole() == b"ok"
            assert it.pool().idle >= 1

    on_loop(main())


@pytest.mark.parametrize("settings", [{}, {"http2Origin": True, "matchSNItoHost": True}])
def test_http2_is_offered_only_where_the_rule_says_so(
    on_loop: Runner, tmp_path: Path, settings: dict[str, Any]
) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_head()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await connection.read_head()

    async def main() -> None:
        context = Authority().server_context(tmp_path, "a.example")
        context.set_alpn_protocols(["h2", "http/1.1"])
        async with RawOrigin(script, tls=context) as peer, rig(peer.url, {**settings, "noTLSVerify": True}) as it:
            assert await it.open().whole() == b"ok"

    on_loop(main())


def test_a_websocket_goes_over_http1(on_loop: Runner, tmp_path: Path) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_head()
        connection.send(b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        while data := await connection.read_some():
            connection.send(data)

    async def main() -> None:
        context = Authority().server_context(tmp_path, "a.example")
        context.set_alpn_protocols(["h2", "http/1.1"])
        async with RawOrigin(script, tls=context) as peer, rig(peer.url, H2) as it:
            port = it.websocket()
            assert await port.head() == 101
            port.send(b"raw")
            assert await port.received(3) == b"raw"
            port.peer_reset()

    on_loop(main())


def test_a_host_of_its_own_and_bad_fields(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with origin(tmp_path) as peer, rig(peer.url, {**H2, "httpHostHeader": "inside"}) as it:
            assert await it.open("GET", "/early", host="outside").whole() == b"early"
            headers = dict(peer.requests[0])
            assert (headers[b":authority"], headers[b"x-forwarded-host"]) == (b"inside", b"outside")
            port = it.open("GET", "/early", headers=[(b"x", b"a\r\nb")])
            assert await port.head() == 502
            assert it.failures()[-1]["cause"] == "request"
            assert await it.open("GET", "/early").whole() == b"early"

    on_loop(main())


def test_new_rules_let_streams_finish(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with origin(tmp_path) as peer, rig(peer.url, H2) as it:
            port = it.open("POST", "/echo", length=-1)
            assert await port.head() == 200
            it.dispatcher.set_ingress(it.dispatcher.ingress)
            port.send(b"still")
            port.send_eof()
            assert await port.whole() == b"still"
            await until(lambda: it.dispatcher.open_connections == 0)

    on_loop(main())


def test_an_idle_connection_ends(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with origin(tmp_path) as peer, rig(peer.url, {**H2, "keepAliveTimeout": 1}) as it:
            assert await it.open("GET", "/early").whole() == b"early"
            await until(lambda: it.dispatcher.open_connections == 0, limit=20)

    on_loop(main())
