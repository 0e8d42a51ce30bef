"""WebSockets: the upgrade, raw bytes both ways, and every way to end."""

from __future__ import annotations

import asyncio

import pytest

from connector.protocol.ports import ResponseSource
from connector.proxy.websocket import choose_subprotocol
from tests.proxy.conftest import Runner
from tests.proxy.rig import rig
from tests.support.aio import until
from tests.support.raw_origin import RawConnection, RawOrigin, answering

SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


async def echo(connection: RawConnection) -> None:
    await connection.read_head()
    connection.send(SWITCH)
    while data := await connection.read_some():
        connection.send(data)


def test_bytes_go_both_ways(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig(origin.url) as it:
            port = it.websocket("/mqtt", headers=[(b"sec-websocket-key", b"k"), (b"connection", b"close")])
            assert await port.head() == 101
            assert port.header(b"upgrade") == b"websocket"
            expected = b""
            for number in range(100):
                message = b"%d," % number
                port.send(message)
                expected += message
                assert await port.received(len(expected)) == expected
                assert port.outstanding == 0
            assert asyncio.all_tasks() - {asyncio.current_task()} == origin._tasks
            port.send_eof()
            assert await port.whole() == expected
            await until(lambda: it.dispatcher.active == 0)
            assert it.dispatcher.responses == {101: 1}
            assert it.dispatcher.errors == 0

    on_loop(main())


def test_bytes_around_the_upgrade_are_not_lost(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_head()
        connection.send(SWITCH + b"hello from behind the head")
        assert await connection.read_exactly(11) == b"impatient! "
        connection.send(b"!")
        await connection.closed()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            port = it.websocket()
            port.send(b"impatient! ")
            assert port.outstanding == 11
            assert await port.received(27) == b"hello from behind the head!"
            assert port.outstanding == 0
            port.peer_reset()

    on_loop(main())


def test_edge_that_ends_before_the_upgrade(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig(origin.url) as it:
            port = it.websocket()
            port.send(b"bye")
            port.send_eof()
            assert await port.whole() == b"bye"
            await until(lambda: it.dispatcher.active == 0)

    on_loop(main())


@pytest.mark.parametrize("status", [403, 200])
def test_refusal_is_an_ordinary_response_and_keeps_the_connection(status: int, on_loop: Runner) -> None:
    async def main() -> None:
        answer = b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\nno" % status
        async with RawOrigin(answering(answer)) as origin, rig(origin.url) as it:
            for _ in range(3):
                port = it.websocket()
                port.send(b"early")
                assert await port.whole() == b"no"
                assert port.status == status
                assert port.source is ResponseSource.ORIGIN
                assert port.stopped
            assert len(origin.connections) == 1

    on_loop(main())


def test_origin_end_goes_to_the_edge_and_the_edge_may_finish(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_head()
        connection.send(SWITCH + b"last words")
        connection.writer.write_eof()
        assert await connection.read_exactly(6) == b"answer"
        await connection.closed()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            port = it.websocket()
            assert await port.whole() == b"last words"
            assert it.dispatcher.active == 1
            port.send(b"answer")
            port.send_eof()
            await until(lambda: it.dispatcher.active == 0)
            assert bytes(origin.connections[0].received).endswith(b"answer")

    on_loop(main())


def test_origin_that_closes_ends_the_stream(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_head()
        connection.send(SWITCH)
        await connection.read_exactly(1)

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            port = it.websocket()
            await port.head()
            port.send(b"x")
            assert await port.whole() == b""
            port.send(b"y")
            port.send_eof()
            await until(lambda: it.dispatcher.active == 0)
            assert it.dispatcher.errors == 0

    on_loop(main())


def test_origin_that_breaks_just_ends_the_stream(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_head()
        connection.send(SWITCH)
        await connection.read_exactly(1)
        connection.abort()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            port = it.websocket()
            await port.head()
            port.send(b"x")
            assert await port.whole() == b""
            assert port.reset_code is None
            assert port.stopped
            await until(lambda: it.dispatcher.active == 0)
            assert it.dispatcher.errors == 0

    on_loop(main())


def test_drain_is_bounded(on_loop: Runner) -> None:
    """An origin that ignores the edge's end is cut off when the drain limit is over."""

    async def script(connection: RawConnection) -> None:
        await connection.read_head()
        connection.send(SWITCH)
        while await connection.read_some():
            pass
        await asyncio.Event().wait()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            it.dispatcher._drains._limit = 0.05
            port = it.websocket()
            await port.head()
            port.send_eof()
            await port.whole()
            await until(lambda: it.dispatcher.active == 0)
            assert len(it.dispatcher._drains) == 0
            assert it.dispatcher._drains._timer is None

    on_loop(main())


def test_reset_after_the_end_cuts_the_drain_short(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_head()
        connection.send(SWITCH)
        while await connection.read_some():
            pass
        await asyncio.Event().wait()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            port = it.websocket()
            await port.head()
            port.send_eof()
            port.peer_reset()
            await until(lambda: it.dispatcher.active == 0)
            assert it.dispatcher._drains._timer is None

    on_loop(main())


def test_slow_origin_holds_credit(on_loop: Runner) -> None:
    gate: asyncio.Event
    size = 16 * 1024 * 1024

    async def script(connection: RawConnection) -> None:
        await connection.read_head()
        connection.send(SWITCH)
        await gate.wait()
        await connection.read_exactly(size)
        connection.send(b"all")
        await connection.closed()

    async def main() -> None:
        nonlocal gate
        gate = asyncio.Event()
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            port = it.websocket()
            await port.head()
            sender = asyncio.create_task(port.send_all(b"z" * size, window=256 * 1024))
            await until(lambda: port.outstanding > 200 * 1024)
            gate.set()
            assert await port.received(3) == b"all"
            await sender
            assert port.max_outstanding <= 256 * 1024
            assert port.outstanding == 0

    on_loop(main())


def test_slow_edge_stops_the_origin(on_loop: Runner) -> None:
    size = 16 * 1024 * 1024
    sent = 0

    async def script(connection: RawConnection) -> None:
        nonlocal sent
        await connection.read_head()
        connection.send(SWITCH)
        while sent < size:
            connection.send(b"y" * 65_536)
            sent += 65_536
            await connection.drained()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            port = it.websocket(high_water=128 * 1024)
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
            assert got + len(port.take()) == size
            assert port.max_queued <= 128 * 1024 + 512 * 1024
            port.send_eof()
            await until(lambda: it.dispatcher.active == 0)

    on_loop(main())


def test_upgrade_on_a_reused_stale_connection_is_repeated(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_request()
        if connection.number == 0:
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await connection.read_request()
            return
        connection.send(SWITCH)
        await connection.closed()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            await it.open().whole()
            port = it.websocket()
            assert await port.head() == 101
            assert len(origin.connections) == 2
            port.peer_reset()

    on_loop(main())


def test_close_ends_open_websockets(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig(origin.url) as it:
            ports = [it.websocket() for _ in range(10)]
            for port in ports:
                assert await port.head() == 101
            await it.dispatcher.close()
            assert all(port.reset_code is not None for port in ports)
            assert it.dispatcher.active == 0

    on_loop(main())


@pytest.mark.parametrize(
    ("offered", "accepted", "expected"),
    [
        ([b"mqtt, mqttv3.1"], ("mqtt",), [b"mqtt"]),
        ([b"mqttv3.1,mqtt"], ("mqtt", "mqttv3.1"), [b"mqtt"]),
        ([b"mqttv3.1", b"MQTT"], ("mqtt",), [b"MQTT"]),
        ([b"wamp"], ("mqtt",), [b"wamp"]),
        ([b"mqtt, x"], (), []),
        ([], ("mqtt",), []),
        ([b" , "], ("mqtt",), [b" , "]),
    ],
)
def test_the_one_subprotocol(offered: list[bytes], accepted: tuple[str, ...], expected: list[bytes]) -> None:
    headers = [(b"origin", b"x"), *((b"sec-websocket-protocol", value) for value in offered)]
    found = choose_subprotocol(headers, accepted)
    assert [value for name, value in found if name == b"sec-websocket-protocol"] == expected
    assert (b"origin", b"x") in found


def test_a_broker_that_hangs_up_at_a_list_is_explained(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_head()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            port = it.websocket(headers=[(b"sec-websocket-protocol", b"mqtt, mqttv3.1")])
            assert await port.head() == 502
            assert "wsSubprotocols" in it.failures()[0]["advice"]
            port = it.websocket(headers=[(b"sec-websocket-protocol", b"mqtt")])
            assert await port.head() == 502
            assert "wsSubprotocols" not in it.failures()[1]["advice"]

    on_loop(main())
