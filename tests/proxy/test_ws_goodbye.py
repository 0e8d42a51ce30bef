"""What the connector itself says on a spliced WebSocket: Close 1001 when it leaves, PINGs where a rule asks for it."""

from __future__ import annotations

import asyncio
import random

import pytest

from connector.proxy import limits
from connector.proxy.ingress import OriginSettings
from tests.proxy.conftest import Runner
from tests.proxy.rig import Rig, rig
from tests.proxy.ws_client import frame, frames, parse
from tests.support.aio import until
from tests.support.memory_port import MemoryPort
from tests.support.raw_origin import RawConnection, RawOrigin

SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
GOODBYE = (0x88, b"\x03\xe9")


def server_frame(first: int, payload: bytes) -> bytes:
    size = len(payload)
    return bytes([first]) + (bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")) + payload


class Speaker:
    """An origin whose words the test writes as it goes."""

    def __init__(self, first: bytes = b"") -> None:
        self.first = first
        self.connection: RawConnection | None = None

    async def __call__(self, connection: RawConnection) -> None:
        await connection.read_head()
        connection.send(SWITCH + self.first)
        self.connection = connection
        await connection.closed()

    async def say(self, port: MemoryPort, data: bytes) -> None:
        assert self.connection is not None
        before = len(port.body)
        self.connection.send(data)
        await port.until(lambda: len(port.body) >= before + len(data) or port.ended)


async def opened(it: Rig, speaker: Speaker) -> MemoryPort:
    port = it.websocket()
    assert await port.head() == 101
    await until(lambda: speaker.connection)
    return port


@pytest.mark.parametrize("first", [b"", server_frame(0x82, b"x" * 200), server_frame(0x02, b"half of a message")])
def test_between_two_frames_goodbye_is_said_at_once(first: bytes, on_loop: Runner) -> None:
    async def main() -> None:
        speaker = Speaker(first)
        async with RawOrigin(speaker) as origin, rig(origin.url) as it:
            port = await opened(it, speaker)
            await port.received(len(first))
            await speaker.say(port, server_frame(0x89, b"ping") + server_frame(0x82, b"y" * 70))
            assert it.dispatcher.go_away() == 1
            assert port.ended
            assert frames(port)[-1] == GOODBYE
            await until(lambda: it.dispatcher.active == 0)
            assert speaker.connection is not None
            assert it.dispatcher.responses == {101: 1}

    on_loop(main())


def test_within_a_frame_goodbye_waits_for_its_end(on_loop: Runner) -> None:
    async def main() -> None:
        for seed in range(12):
            random_ = random.Random(seed)
            message = server_frame(0x82, bytes(random_.randbytes(random_.choice([3, 60, 300, 3000]))))
            cut = random_.randrange(1, len(message))
            second = random_.randrange(cut, len(message))
            speaker = Speaker()
            async with RawOrigin(speaker) as origin, rig(origin.url) as it:
                port = await opened(it, speaker)
                await speaker.say(port, message[:cut])
                assert it.dispatcher.go_away() == 1
                assert not port.ended
                if second > cut:
                    await speaker.say(port, message[cut:second])
                assert not port.ended
                await speaker.say(port, message[second:] + server_frame(0x82, b"too late"))
                await port.whole()
                assert bytes(port.body) == message + b"\x88\x02\x03\xe9"
                await until(lambda: it.dispatcher.active == 0)

    on_loop(main())


def test_an_origin_that_closes_by_itself_or_speaks_something_else_is_left_alone(on_loop: Runner) -> None:
    async def main() -> None:
        speaker = Speaker()
        async with RawOrigin(speaker) as origin, rig(origin.url) as it:
            port = await opened(it, speaker)
            await speaker.say(port, server_frame(0x88, b"\x03\xe8"))
            assert it.dispatcher.go_away() == 1
            assert frames(port) == [(0x88, b"\x03\xe8")]
            assert not port.ended
            port.peer_reset()
        speaker = Speaker()
        async with RawOrigin(speaker) as origin, rig(origin.url) as it:
            port = await opened(it, speaker)
            await speaker.say(port, b"SSH-2.0-not a websocket at all\r\n")
            assert it.dispatcher.go_away() == 0
            await speaker.say(port, b"more")
            assert bytes(port.body) == b"SSH-2.0-not a websocket at all\r\nmore"
            port.peer_reset()

    on_loop(main())


def test_a_close_that_comes_while_goodbye_waits_is_the_goodbye(on_loop: Runner) -> None:
    async def main() -> None:
        speaker = Speaker()
        async with RawOrigin(speaker) as origin, rig(origin.url) as it:
            port = await opened(it, speaker)
            close = server_frame(0x88, b"\x03\xe8")
            await speaker.say(port, close[:3])
            it.dispatcher.go_away()
            await speaker.say(port, close[3:])
            assert bytes(port.body) == close
            port.peer_reset()

    on_loop(main())


def test_goodbye_does_not_lose_what_the_eyeball_had_sent(on_loop: Runner) -> None:
    async def main() -> None:
        speaker = Speaker()
        async with RawOrigin(speaker) as origin, rig(origin.url) as it:
            port = await opened(it, speaker)
            port.send(b"last words")
            it.dispatcher.go_away()
            connection = speaker.connection
            assert connection is not None
            await until(lambda: connection.received.endswith(b"last words"))

    on_loop(main())


# -- keep-alive

KEEP = {"wsKeepAlive": 1}


def quicken(it: Rig) -> None:
    it.dispatcher._clocks.get(1).interval = 0.08


def pings(port: MemoryPort) -> list[bytes]:
    return [payload for first, payload in parse(bytes(port.body))[0] if first == 0x89]


def test_an_idle_eyeball_is_pinged_and_its_pong_goes_no_further(on_loop: Runner) -> None:
    async def main() -> None:
        speaker = Speaker()
        async with RawOrigin(speaker) as origin, rig(origin.url, KEEP) as it:
            quicken(it)
            port = await opened(it, speaker)
            for number in range(1, 4):
                await port.until(lambda number=number: len(pings(port)) >= number)
                port.send(frame(10, pings(port)[number - 1]))
            assert len(set(pings(port))) == len(pings(port)), "each has its own payload"
            port.send(frame(10, b"unasked") + frame(2, b"data") + frame(10, b""))
            expected = frame(10, b"unasked") + frame(2, b"data") + frame(10, b"")
            connection = speaker.connection
            assert connection is not None
            await until(lambda: connection.received.endswith(expected))
            assert connection.received.partition(b"\r\n\r\n")[2] == expected, "the origin saw none of it"
            assert port.outstanding == 0
            port.peer_reset()
            clock = it.dispatcher._clocks.get(1)
            assert len(clock) == 0
            assert clock._timer is None

    on_loop(main())


def test_the_pong_may_come_in_pieces_and_among_others(on_loop: Runner) -> None:
    async def main() -> None:
        speaker = Speaker()
        async with RawOrigin(speaker) as origin, rig(origin.url, KEEP) as it:
            quicken(it)
            port = await opened(it, speaker)
            await port.until(lambda: pings(port))
            it.dispatcher._clocks.get(1).interval = 60
            data = frame(2, b"a" * 300) + frame(10, pings(port)[-1]) + frame(1, b"b")
            for at in range(len(data)):
                port.send(data[at : at + 1])
            expected = frame(2, b"a" * 300) + frame(1, b"b")
            connection = speaker.connection
            assert connection is not None
            await until(lambda: connection.received.endswith(expected))
            assert connection.received.partition(b"\r\n\r\n")[2] == expected
            assert port.outstanding == 0
            port.send(frame(10, b"whatever")[:5])
            port.send_eof()
            await port.whole()
            await until(lambda: connection.received.endswith(expected + frame(10, b"whatever")[:5]))

    on_loop(main())


def test_a_flood_of_tiny_frames_is_not_looked_at_for_long(on_loop: Runner) -> None:
    async def main() -> None:
        speaker = Speaker()
        async with RawOrigin(speaker) as origin, rig(origin.url, KEEP) as it:
            port = await opened(it, speaker)
            [listener] = it.dispatcher._clocks.get(1)._listeners
            flood = frame(2, b"") * (limits.WS_WATCHED_FRAMES // 8 + 2)
            await port.send_all(flood)
            connection = speaker.connection
            assert connection is not None
            await until(lambda: len(connection.received.partition(b"\r\n\r\n")[2]) == len(flood))
            for _ in range(30):
                listener.tick()
            assert pings(port) == []
            port.peer_reset()

    on_loop(main())


def test_no_ping_within_a_frame_nor_while_something_moves(on_loop: Runner) -> None:
    async def main() -> None:
        speaker = Speaker()
        async with RawOrigin(speaker) as origin, rig(origin.url, KEEP) as it:
            clock = it.dispatcher._clocks.get(1)
            clock.interval = 60
            port = await opened(it, speaker)
            [listener] = clock._listeners
            for _ in range(30):
                listener.tick()
                port.send(frame(2, b"x"))
            assert pings(port) == []
            for _ in range(30):
                listener.tick()
                await speaker.say(port, server_frame(0x82, b"y"))
            assert pings(port) == []
            message = server_frame(0x82, b"z" * 50)
            await speaker.say(port, message[:10])
            for _ in range(30):
                listener.tick()
            assert bytes(port.body).endswith(message[:10])
            await speaker.say(port, message[10:])
            for _ in range(8):
                listener.tick()
            assert pings(port) == [], "a whole interval must pass"
            listener.tick()
            assert len(pings(port)) == 1
            port.pause()
            for _ in range(30):
                listener.tick()
            assert len(pings(port)) == 1, "an eyeball that does not read is not pinged"
            port.take()
            it.dispatcher.go_away()
            for _ in range(30):
                listener.tick()
            assert frames(port)[-1] == GOODBYE

    on_loop(main())


def test_a_default_of_this_process_turns_it_on_and_a_rule_off(on_loop: Runner) -> None:
    async def main() -> None:
        speaker, base = Speaker(), OriginSettings(ws_keep_alive=0.08)
        async with RawOrigin(speaker) as origin, rig(origin.url, base=base) as it:
            port = await opened(it, speaker)
            await port.until(lambda: pings(port))
            port.peer_reset()
        async with RawOrigin(speaker) as origin, rig(origin.url, {"wsKeepAlive": 0}, base=base) as it:
            port = await opened(it, speaker)
            assert it.dispatcher._clocks._clocks == {}
            port.peer_reset()
            await asyncio.sleep(0)

    on_loop(main())


def test_streams_that_do_not_ask_have_no_clock(on_loop: Runner) -> None:
    async def main() -> None:
        speaker = Speaker()
        async with RawOrigin(speaker) as origin, rig(origin.url) as it:
            port = await opened(it, speaker)
            assert it.dispatcher._clocks._clocks == {}
            port.peer_reset()
            await asyncio.sleep(0)

    on_loop(main())
