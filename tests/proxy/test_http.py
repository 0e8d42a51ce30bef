"""HTTP exchanges against raw origins: framing, reuse, retries, early answers, backpressure, every kind of end."""

from __future__ import annotations

import asyncio
import socket

import pytest

from connector.protocol.ports import ResetCode, ResponseSource
from tests.proxy.conftest import Runner
from tests.proxy.rig import rig
from tests.support.aio import until
from tests.support.raw_origin import RawConnection, RawOrigin, answering

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
MEGABYTE = 1024 * 1024
BIG = 16 * MEGABYTE  # more than loopback sockets buffer


def test_connections_are_reused_in_turn(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(origin.url) as it:
            for _ in range(5):
                port = it.open()
                assert await port.whole() == b"ok"
            assert len(origin.connections) == 1
            assert it.pool().idle == 1
            ports = [it.open() for _ in range(4)]
            for port in ports:
                await port.whole()
            await until(lambda: it.pool().idle == it.pool().open, what="all idle")
            assert len(origin.connections) <= 4
            assert it.dispatcher.responses == {200: 9}
            assert it.dispatcher.requests == 9

    on_loop(main())


@pytest.mark.parametrize(
    ("response", "reusable"),
    [
        (OK, True),
        (b"HTTP/1.1 204 N\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", False),
        (OK + b"surprise", False),
    ],
)
def test_only_clean_connections_are_kept(response: bytes, reusable: bool, on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(answering(response)) as origin, rig(origin.url) as it:
            await it.open().whole()
            await until(lambda: it.dispatcher.active == 0)
            assert it.pool().idle == (1 if reusable else 0)
            await it.open().whole()
            await until(lambda: len(origin.connections) == (1 if reusable else 2))

    on_loop(main())


def test_idle_connections_above_the_limit_are_closed(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(origin.url, {"keepAliveConnections": 2}) as it:
            ports = [it.open() for _ in range(5)]
            for port in ports:
                assert await port.whole() == b"ok"
            await until(lambda: it.pool().idle == 2)

    on_loop(main())


def test_idle_connections_expire(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(origin.url, {"keepAliveTimeout": 1}) as it:
            assert await it.open().whole() == b"ok"
            await until(lambda: it.pool().open == 0, what="idle connections expire")
            assert it.pool()._timer is None
            assert await it.open().whole() == b"ok"

    on_loop(main())


@pytest.mark.parametrize("seconds", [0, -1])
def test_idle_connections_stay_without_a_limit(on_loop: Runner, seconds: int) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(origin.url, {"keepAliveTimeout": seconds}) as it:
            assert await it.open().whole() == b"ok"
            assert it.pool()._timer is None
            assert await it.open().whole() == b"ok"
            assert it.pool().dialled == 1

    on_loop(main())


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="the system does not tell the interval")
@pytest.mark.parametrize(("configured", "interval"), [(45, 45), (0, 15), (100_000, 32_767), (-1, None)])
def test_tcp_keep_alive_reaches_the_socket(on_loop: Runner, configured: int, interval: int | None) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(origin.url, {"tcpKeepAlive": configured}) as it:
            assert await it.open().whole() == b"ok"
            [connection] = it.pool()._open
            sock = connection.transport.get_extra_info("socket")
            assert bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) is (interval is not None)
            if interval is not None:
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
                    assert sock.getsockopt(socket.IPPROTO_TCP, option) == interval

    on_loop(main())


def test_a_negative_connect_timeout_is_over_at_once(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(origin.url, {"connectTimeout": -1}) as it:
            port = it.open()
            assert await port.head() == 502
            assert it.failures()[0]["cause"] == "timeout"

    on_loop(main())


def test_a_stale_connection_is_replaced_unseen(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_request()
        connection.send(OK)
        if connection.number == 0:
            await connection.read_request()  # answers the second request with its end
            return
        await connection.closed()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            assert await it.open().whole() == b"ok"
            assert await it.open().whole() == b"ok"
            assert len(origin.connections) == 2
            assert it.dispatcher.errors == 0

    on_loop(main())


@pytest.mark.parametrize(("method", "length", "status"), [("POST", 0, 502), ("PUT", 3, 502), ("PUT", 0, 200)])
def test_what_may_have_happened_is_not_repeated(method: str, length: int, status: int, on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_request()
        connection.send(OK)
        if connection.number == 0:
            await connection.read_request()
            return
        await connection.closed()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            assert await it.open().whole() == b"ok"
            port = it.open(method, length=length)
            if length:
                port.send(b"x" * length)
                port.send_eof()
            assert await port.head() == status
            assert len(origin.connections) == (1 if status == 502 else 2)

    on_loop(main())


def test_a_dead_idle_connection_is_not_used_for_what_cannot_be_repeated(on_loop: Runner) -> None:
    """The origin closed in this very moment: the loop does not know yet, the kernel does."""

    async def main() -> None:
        async with RawOrigin(answering(OK, close=True)) as origin, rig(origin.url) as it:
            port = it.open()
            assert await port.whole() == b"ok"
            connection = it.pool()._idle[""][-1] if it.pool().idle else None
            # Block the loop until the kernel has the FIN.
            for _ in range(1000):
                if connection is None or connection.hung_up():
                    break
                await asyncio.sleep(0)
            port = it.open("POST", length=0)
            assert await port.head() == 200
            assert len(origin.connections) == 2

    on_loop(main())


def test_a_new_connection_that_ends_without_answer_is_not_retried(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_request()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            port = it.open()
            assert await port.head() == 502
            assert port.source is ResponseSource.CONNECTOR
            assert len(origin.connections) == 1
            assert "without an answer" in it.failures()[0]["error"]
            assert it.dispatcher.errors == 1

    on_loop(main())


# -- request bodies


def test_get_of_unknown_length_without_body_is_plain(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(origin.url) as it:
            port = it.open("GET", length=-1)
            port.send_eof()
            assert await port.whole() == b"ok"
            assert b"Transfer-Encoding" not in origin.connections[0].received
            assert b"Content-Length" not in origin.connections[0].received

    on_loop(main())


def test_get_of_unknown_length_with_body_is_chunked(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(origin.url) as it:
            port = it.open("GET", length=-1)
            port.send(b"query")
            port.send(b"!")
            port.send_eof()
            assert await port.whole() == b"ok"
            received = bytes(origin.connections[0].received)
            assert received.endswith((b"5\r\nquery\r\n1\r\n!\r\n0\r\n\r\n", b"6\r\nquery!\r\n0\r\n\r\n"))

    on_loop(main())


def test_get_of_unknown_length_that_says_nothing_goes_out_chunked_after_a_moment(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(origin.url) as it:
            port = it.open("GET", length=-1)
            await until(lambda: origin.connections and b"\r\n\r\n" in origin.connections[0].received)
            assert b"Transfer-Encoding: chunked\r\n" in origin.connections[0].received
            port.send_eof()
            assert await port.whole() == b"ok"

    on_loop(main())


def test_empty_post_says_so(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(origin.url) as it:
            await it.open("POST", length=0).whole()
            await it.open("DELETE", length=0).whole()
            received = bytes(origin.connections[0].received)
            assert received.count(b"Content-Length: 0\r\n") == 1

    on_loop(main())


def test_body_without_chunks_is_buffered_for_its_length(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(origin.url, {"disableChunkedEncoding": True}) as it:
            port = it.open("POST", length=-1)
            port.send(b"a" * 10)
            port.send(b"b" * 10)
            assert port.outstanding == 0
            port.send_eof()
            assert await port.whole() == b"ok"
            assert b"Content-Length: 20\r\n" in origin.connections[0].received
            port = it.open("POST", length=-1)
            for _ in range(65):
                port.send(b"a" * 16_384)
            assert port.status == 411
            assert "disableChunkedEncoding" in it.failures()[0]["advice"]

    on_loop(main())


@pytest.mark.parametrize("body", [b"12", b"1234"])
def test_body_that_breaks_its_length_fails(body: bytes, on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(origin.url) as it:
            port = it.open("POST", length=3)
            port.send(body)
            port.send_eof()
            await port.head()
            assert port.status == 502
            assert "Content-Length" in it.failures()[0]["error"]
            await until(lambda: it.pool().open == 0)

    on_loop(main())


def test_head_that_cannot_go_out_is_refused(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(origin.url) as it:
            port = it.open(headers=[(b"x", b"a\r\nEvil: 1")])
            assert await port.head() == 502
            assert it.failures()[0]["cause"] == "request"
            assert await it.open().whole() == b"ok"
            assert bytes(origin.connections[0].received).count(b"GET ") == 1

    on_loop(main())


@pytest.mark.parametrize("length", [BIG, -1], ids=["length", "chunked"])
def test_slow_origin_stops_the_edge(length: int, on_loop: Runner) -> None:
    gate: asyncio.Event

    async def script(connection: RawConnection) -> None:
        await connection.read_head()
        await gate.wait()
        while not connection.received.endswith(b"0\r\n\r\n" if length < 0 else b"END"):
            await connection.read_some()
        connection.send(OK)
        await connection.closed()

    async def main() -> None:
        nonlocal gate
        gate = asyncio.Event()
        body = b"x" * (BIG - 3) + b"END"
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            port = it.open("POST", length=length)
            sender = asyncio.create_task(port.send_all(body, window=256 * 1024))
            await until(lambda: port.outstanding > 200 * 1024)
            [exchange] = it.dispatcher._active
            await until(lambda: exchange._connection is not None)
            sent = -1
            while sent != port.sent:
                sent = port.sent
                for _ in range(200):
                    await asyncio.sleep(0)
            connection = exchange._connection
            assert connection is not None
            assert connection.transport.get_write_buffer_size() < 400 * 1024
            assert port.sent < BIG
            gate.set()
            await sender
            assert await port.whole() == b"ok"
            assert port.max_outstanding <= 256 * 1024

    on_loop(main())


# -- responses


def test_slow_edge_stops_the_origin(on_loop: Runner) -> None:
    size = 16 * MEGABYTE
    sent = 0

    async def script(connection: RawConnection) -> None:
        nonlocal sent
        await connection.read_request()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while sent < size:
            connection.send(b"y" * 65_536)
            sent += 65_536
            await connection.drained()
        await connection.closed()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            port = it.open(high_water=128 * 1024)
            await port.head()
            await until(lambda: port._paused)
            before = -1
            while before != sent:
                before = sent
                for _ in range(200):
                    await asyncio.sleep(0)
            assert sent < size
            got = 0
            while not port.ended:
                got += len(port.take())
                await asyncio.sleep(0)
            got += len(port.take())
            assert got == size
            assert port.max_queued <= 128 * 1024 + 512 * 1024

    on_loop(main())


def test_edge_paused_before_there_is_a_connection(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(origin.url) as it:
            port = it.open()
            port.pause()
            await until(lambda: origin.connections and b"\r\n\r\n" in origin.connections[0].received)
            for _ in range(50):
                await asyncio.sleep(0)
            assert not port.status
            port.take()
            assert await port.whole() == b"ok"
            assert await it.open().whole() == b"ok"
            assert len(origin.connections) == 1

    on_loop(main())


def test_response_is_streamed_piece_by_piece(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_request()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for number in range(3):
            connection.send(b"data: %d\n\n" % number)
            await connection.drained()
            await asked[number].wait()

    asked: list[asyncio.Event] = []

    async def main() -> None:
        asked.extend(asyncio.Event() for _ in range(3))
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            port = it.open()
            for number in range(3):
                assert (await port.received(9 * (number + 1))).endswith(b"data: %d\n\n" % number)
                asked[number].set()
            await port.whole()

    on_loop(main())
    asked.clear()


def test_origin_dies_in_the_body(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_request()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsome")
        await connection.drained()
        await go.wait()
        connection.abort()

    async def main() -> None:
        nonlocal go
        go = asyncio.Event()
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            port = it.open()
            await port.received(4)
            go.set()
            await port.whole()
            assert port.reset_code is ResetCode.FAILED
            assert it.dispatcher.responses == {}
            assert "in the middle" in it.failures()[0]["error"]

    go: asyncio.Event
    on_loop(main())


def test_eyeball_that_goes_away_frees_everything(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_request()
        await connection.closed()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            port = it.open()
            await until(lambda: origin.connections and origin.connections[0].received)
            assert it.dispatcher.active == 1
            port.peer_reset()
            assert it.dispatcher.active == 0
            await until(lambda: it.dispatcher.open_connections == 0)
            assert it.dispatcher.errors == 0
            assert it.events[-1][0] == "finished"
            assert it.events[-1][1]["whole"] is False

    on_loop(main())


def by_name(origin: RawOrigin) -> str:
    """Return a URL whose host must be looked up: such a dial is not over at once."""
    return origin.url.replace("127.0.0.1", "localhost")


def test_eyeball_that_goes_away_during_the_dial(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(by_name(origin)) as it:
            port = it.open()
            assert it.dispatcher.dialling
            port.peer_reset()
            await until(lambda: it.dispatcher.dialling == 0)
            assert it.dispatcher.active == 0

    on_loop(main())


def test_early_answer_goes_out_while_the_body_comes(on_loop: Runner) -> None:
    """The origin answers at the head, goes on reading, and both directions end cleanly."""

    async def script(connection: RawConnection) -> None:
        await connection.read_head()
        connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nearly\r\n")
        await connection.read_exactly(10)
        connection.send(b"4\r\nlate\r\n0\r\n\r\n")
        await connection.closed()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            port = it.open("POST", length=10)
            assert await port.received(5) == b"early"
            port.send(b"0123456789")
            port.send_eof()
            assert await port.whole() == b"earlylate"
            await until(lambda: it.pool().idle == 1)
            assert len(origin.connections) == 1

    on_loop(main())


def test_early_refusal_ends_the_upload(on_loop: Runner) -> None:
    """413 and close in the middle of an upload: the answer counts, the connection does not live on."""

    async def script(connection: RawConnection) -> None:
        await connection.read_head()
        await connection.read_exactly(1000)
        connection.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            for _ in range(10):
                port = it.open("POST", length=8 * MEGABYTE)
                sender = asyncio.create_task(port.send_all(b"x" * 8 * MEGABYTE))
                assert await port.head() == 413
                assert await port.whole() == b"big"
                assert port.stopped
                await sender
            await until(lambda: it.dispatcher.open_connections == 0)
            assert it.dispatcher.errors == 0

    on_loop(main())


def test_waiters_get_connections_that_come_free(on_loop: Runner) -> None:
    """A released connection serves who waits longest; no dial is wasted twice."""

    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(by_name(origin)) as it:
            first = it.open()
            second = it.open()
            assert it.dispatcher.dialling
            await first.whole()
            await second.whole()
            await until(lambda: it.dispatcher.dialling == 0)
            assert it.pool().open <= 2

    on_loop(main())


def test_unix_socket(on_loop: Runner, tmp_path: object) -> None:
    async def main() -> None:
        path = f"{tmp_path}/origin.sock"
        async with RawOrigin(answering(OK), path=path) as origin, rig(f"unix:{path}") as it:
            assert await it.open(host="app.example.com").whole() == b"ok"
            assert b"Host: app.example.com\r\n" in origin.connections[0].received

    on_loop(main())


def test_host_header_is_replaced_and_tags_are_added(on_loop: Runner) -> None:
    async def main() -> None:
        settings = {"httpHostHeader": "inside.example"}
        async with (
            RawOrigin(answering(OK)) as origin,
            rig(origin.url, settings, tags=[("env", "test")]) as it,
        ):
            await it.open(headers=[(b"x-forwarded-host", b"forged"), (b"x-forwarded-for", b"203.0.113.7")]).whole()
            lines = bytes(origin.connections[0].received).split(b"\r\n")
            assert lines[1] == b"Host: inside.example"
            assert b"X-Forwarded-Host: app.example.com" in lines
            assert b"Cf-Warp-Tag-Env: test" in lines
            assert b"X-Forwarded-For: 203.0.113.7" in lines
            assert not any(b"forged" in line for line in lines)

    on_loop(main())


def test_missing_host_falls_back_to_the_service(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(origin.url) as it:
            await it.open(host="").whole()
            assert b"Host: 127.0.0.1:%d\r\n" % origin.port in origin.connections[0].received

    on_loop(main())
