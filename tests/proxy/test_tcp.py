"""TCP-like services over WebSocket, bastions, and private-network flows."""

from __future__ import annotations

import asyncio
import socket

import pytest

from connector.protocol.ports import RequestKind, ResponseSource
from connector.proxy import limits
from connector.proxy.flows import Flows
from connector.proxy.reply import BadRequestError
from connector.proxy.tcp import jump_destination, parse_address
from tests.proxy.conftest import Runner
from tests.proxy.rig import Rig, rig
from tests.proxy.ws_client import ACCEPT, UPGRADE, binary, frame, frames, received
from tests.support.aio import until
from tests.support.memory_port import MemoryPort
from tests.support.raw_origin import RawConnection, RawOrigin

BINARY, TEXT, CLOSE, PING, PONG = 2, 1, 8, 9, 10


async def echo(connection: RawConnection) -> None:
    while data := await connection.read_some():
        connection.send(data)


def private(
    it: Rig, where: str, *, high_water: int | None = None, headers: tuple[tuple[bytes, bytes], ...] = ()
) -> MemoryPort:
    return it.open(
        "CONNECT", "", host=where, kind=RequestKind.TCP, length=-1, headers=list(headers), high_water=high_water
    )


@pytest.mark.parametrize("scheme", ["tcp", "ssh", "rdp", "smb", "weird"])
@pytest.mark.parametrize("websocket", [True, False])
def test_bytes_go_both_ways_in_binary_messages(scheme: str, websocket: bool, on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig(f"{scheme}://127.0.0.1:{origin.port}") as it:
            port = it.websocket(headers=UPGRADE) if websocket else it.open(headers=UPGRADE, length=-1)
            assert await port.head() == 101
            assert port.header(b"sec-websocket-accept") == ACCEPT
            assert [name for name, _ in port.headers] == [b"Connection", b"Sec-Websocket-Accept", b"Upgrade"]
            expected = b""
            for size in (1, 125, 126, 5_000, 70_000, 0, 3):
                data = bytes([size % 251]) * size
                port.send(frame(BINARY, data))
                expected += data
                assert await received(port, len(expected)) == expected
                assert port.outstanding == 0
            assert all(len(payload) <= 16 * 1024 for _, payload in frames(port))
            port.send(frame(CLOSE, b"\x03\xe8bye"))
            await port.whole()
            assert frames(port)[-1] == (0x88, b"\x03\xe8")
            await until(lambda: it.dispatcher.active == 0)
            assert it.dispatcher.responses == {101: 1}
            assert not it.failures()

    on_loop(main())


def test_without_a_key_there_are_no_headers(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig(f"tcp://127.0.0.1:{origin.port}") as it:
            port = it.websocket()
            assert await port.head() == 101
            assert port.headers == []
            port.peer_reset()

    on_loop(main())


def test_what_is_no_binary_message_is_not_payload(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig(f"tcp://127.0.0.1:{origin.port}") as it:
            port = it.websocket()
            port.send(frame(TEXT, b"text is dropped") + frame(PING, b"p") + frame(PONG, b""))
            port.send(frame(BINARY, b"frag", fin=False) + frame(PING, b"q") + frame(0, b"ment"))
            assert await received(port, 8) == b"fragment"
            assert [f for f in frames(port) if f[0] != 0x82] == [(0x8A, b"p"), (0x8A, b"q")]
            await until(lambda: port.outstanding == 0)
            port.send(b"\x82\x01not masked")
            await port.whole()
            assert frames(port)[-1] == (0x88, b"\x03\xea")

    on_loop(main())


def test_frames_cut_anywhere(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig(f"tcp://127.0.0.1:{origin.port}") as it:
            port = it.websocket()
            whole = b"".join(frame(BINARY, bytes([n]) * n, key=bytes([n, 1, 2, 3])) for n in range(1, 200, 7))
            for at in range(len(whole)):
                port.send(whole[at : at + 1])
            expected = b"".join(bytes([n]) * n for n in range(1, 200, 7))
            assert await received(port, len(expected)) == expected
            assert port.outstanding == 0
            port.send_eof()
            await port.whole()

    on_loop(main())


def test_origin_end_is_a_close_and_a_break_is_another(on_loop: Runner) -> None:
    async def ends(connection: RawConnection) -> None:
        connection.send(b"220 ready\r\n")
        await connection.drained()

    async def breaks(connection: RawConnection) -> None:
        await connection.read_some()
        connection.abort()

    async def main() -> None:
        async with RawOrigin(ends) as origin, rig(f"tcp://127.0.0.1:{origin.port}") as it:
            port = it.websocket()
            await port.whole()
            assert frames(port) == [(0x82, b"220 ready\r\n"), (0x88, b"\x03\xe8")]
        async with RawOrigin(breaks) as origin, rig(f"tcp://127.0.0.1:{origin.port}") as it:
            port = it.websocket()
            await port.head()
            port.send(frame(BINARY, b"x"))
            await port.whole()
            assert frames(port) == [(0x88, b"\x03\xf3")]
            assert not it.failures()

    on_loop(main())


def test_close_lets_the_origin_have_everything_first(on_loop: Runner) -> None:
    size = 3_000_000
    got = 0

    async def slow(connection: RawConnection) -> None:
        nonlocal got
        while data := await connection.read_some():
            got += len(data)
            await asyncio.sleep(0)

    async def main() -> None:
        async with RawOrigin(slow) as origin, rig(f"tcp://127.0.0.1:{origin.port}") as it:
            port = it.websocket()
            await port.head()
            await port.send_all(frame(BINARY, b"z" * size) + frame(CLOSE, b""), window=256 * 1024)
            await port.whole()
            await until(lambda: it.dispatcher.active == 0)
            await until(lambda: got == size, what="what the kernel still held")
            assert port.max_outstanding <= 256 * 1024

    on_loop(main())


def test_refused_is_502(on_loop: Runner) -> None:
    async def main() -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            number = probe.getsockname()[1]
            async with rig(f"ssh://127.0.0.1:{number}") as it:
                port = it.websocket(headers=UPGRADE)
                assert await port.head() == 502
                assert port.source is ResponseSource.CONNECTOR
                assert it.failures()[0]["cause"] == "refused"
                await until(lambda: it.dispatcher._destinations.pools == [])

    on_loop(main())


def test_eyeball_that_leaves_during_the_dial(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig(f"tcp://127.0.0.1:{origin.port}") as it:
            port = it.websocket()
            port.send(frame(BINARY, b"x"))
            port.peer_reset()
            await until(lambda: it.dispatcher.active == 0 and it.dispatcher.open_connections == 0)

    on_loop(main())


def test_pings_whatever_passes(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig(f"tcp://127.0.0.1:{origin.port}") as it:
            it.dispatcher._carrier_clock.interval = 0.08
            port = it.websocket()
            await port.until(lambda: frames(port).count((0x89, b"")) >= 3)
            port.peer_reset()
            await until(lambda: len(it.dispatcher._carrier_clock) == 0)
            assert it.dispatcher._carrier_clock._timer is None

    on_loop(main())


def test_slow_eyeball_stops_the_origin_and_pongs_do_not_pile_up(on_loop: Runner) -> None:
    async def floods(connection: RawConnection) -> None:
        for _ in range(256):
            connection.send(b"y" * 65_536)
            await connection.drained()
        await connection.closed()

    async def main() -> None:
        async with RawOrigin(floods) as origin, rig(f"tcp://127.0.0.1:{origin.port}") as it:
            port = it.websocket(high_water=128 * 1024)
            await until(lambda: port._paused)
            pings = 0
            while port.outstanding < 60_000:
                port.send(frame(PING, b"a" * 125))
                pings += 1
            assert port.outstanding >= 60_000, "credit is held while the answers wait"
            taken = 0
            while taken < 256 * 65_536:
                taken += len(port.take())
                await asyncio.sleep(0)
            await until(lambda: port.outstanding == 0)
            assert port.max_queued <= 128 * 1024 + 512 * 1024 + pings * 127
            port.peer_reset()

    on_loop(main())


def test_go_away_is_a_close_1001(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig(f"tcp://127.0.0.1:{origin.port}") as it:
            port = it.websocket()
            await port.head()
            port.send(frame(BINARY, b"last"))
            assert await received(port, 4) == b"last"
            assert it.dispatcher.go_away() == 1
            await port.whole()
            assert frames(port)[-1] == (0x88, b"\x03\xe9")
            await until(lambda: it.dispatcher.active == 0)

    on_loop(main())


@pytest.mark.parametrize("url", [False, True])
def test_bastion(url: bool, on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig("bastion") as it:
            where = f"127.0.0.1:{origin.port}"
            jump = f"ssh://{where}/path".encode() if url else where.encode()
            port = it.websocket(headers=[(b"cf-access-jump-destination", jump)])
            port.send(frame(BINARY, b"hi"))
            assert await received(port, 2) == b"hi"
            port.peer_reset()
            port = it.websocket()
            assert await port.head() == 502
            assert it.failures()[0]["error"].startswith("Did not receive final destination from client.")
            assert it.failures()[0]["cause"] == "request"
            assert "--destination" in it.failures()[0]["advice"]

    on_loop(main())


def test_bastion_mode_of_a_url(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig("http://ignored.invalid", {"bastionMode": True}) as it:
            jump = f"127.0.0.1:{origin.port}".encode()
            port = it.websocket(headers=[(b"Cf-Access-Jump-Destination", jump)])
            assert await port.head() == 101
            port.peer_reset()

    on_loop(main())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("db.internal:5432", ("db.internal", 5432)),
        ("db.internal:5432/x/y", ("db.internal", 5432)),
        ("tcp://db.internal:5432", ("db.internal", 5432)),
        ("tcp://user@db.internal:5432/path?q", ("db.internal", 5432)),
        ("[::1]:22", ("::1", 22)),
        ("ssh://[::1]:22", ("::1", 22)),
        ("db.internal:ssh", ("db.internal", 22)),
    ],
)
def test_jump_destinations(text: str, expected: tuple[str, int]) -> None:
    assert jump_destination(text) == expected


@pytest.mark.parametrize(
    "text", ["db.internal", "ssh://db.internal", "::1", "a:0", "a:70000", "a:nosuchservice", ":22", "/"]
)
def test_jump_destinations_that_lead_nowhere(text: str) -> None:
    with pytest.raises(BadRequestError):
        jump_destination(text)


# -- the private network


def test_a_private_flow_is_raw_bytes(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig("http_status:404") as it:
            port = private(it, f"127.0.0.1:{origin.port}")
            port.send(b"early ")
            assert await port.head() == 101
            assert port.headers == []
            assert port.source is ResponseSource.ORIGIN
            port.send(b"late")
            assert await port.received(10) == b"early late"
            await until(lambda: port.outstanding == 0)
            assert it.dispatcher.flows.limiter.active == 1
            port.send_eof()
            assert await port.whole() == b"early late"
            await until(lambda: it.dispatcher.active == 0)
            assert it.dispatcher.flows.limiter.active == 0
            assert [name for name, _ in it.events] == ["request", "response", "finished"]

    on_loop(main())


def test_a_private_flow_with_a_key_gets_the_handshake(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig("http_status:404") as it:
            port = private(it, f"127.0.0.1:{origin.port}", headers=tuple(UPGRADE))
            await port.head()
            assert port.header(b"sec-websocket-accept") == ACCEPT
            port.send(b"raw")
            assert await port.received(3) == b"raw", "no frames"
            port.peer_reset()

    on_loop(main())


@pytest.mark.parametrize(
    "where", ["db.internal:22", "10.0.0.1", "::1:22", "10.0.0.1:ssh", "10.0.0.1:70000", "[10.0.0.1]:1", ""]
)
def test_private_destinations_are_addresses(where: str, on_loop: Runner) -> None:
    async def main() -> None:
        async with rig("http_status:404") as it:
            port = private(it, where)
            assert (port.status, port.source) == (502, ResponseSource.CONNECTOR)
            assert it.dispatcher.flows.limiter.active == 0
            assert it.failures()[0]["error"].startswith("unable to dial tcp to origin")

    on_loop(main())
    assert parse_address("[fd00::1]:22") == ("fd00::1", 22)


def test_the_flow_limit(on_loop: Runner) -> None:
    async def main() -> None:
        flows = Flows(max_active_flows=2)
        async with RawOrigin(echo) as origin, rig("http_status:404", flows=flows) as it:
            where = f"127.0.0.1:{origin.port}"
            first, second = private(it, where), private(it, where)
            third = private(it, where)
            assert (third.status, third.source) == (502, ResponseSource.FLOW_LIMITED)
            assert it.failures()[0]["cause"] == "flow limit"
            assert b"too many active flows" in third.reason
            assert await first.head() == await second.head() == 101
            first.peer_reset()
            fourth = private(it, where)
            assert await fourth.head() == 101
            fourth.peer_reset()
            second.peer_reset()
            assert flows.limiter.active == 0
            refused = private(it, "127.0.0.1:1")
            assert await refused.head() == 502
            assert refused.reason.startswith(b"unable to dial tcp to origin 127.0.0.1:1: ")
            assert b"connection refused" in refused.reason
            assert flows.limiter.active == 0

    on_loop(main())


def test_a_half_closed_private_flow_lives_while_bytes_move(on_loop: Runner) -> None:
    """The client ends its side at once; the answer takes longer than the limit of silence, but never stops."""

    async def answers(connection: RawConnection) -> None:
        assert await connection.reader.read() == b"question"
        for _ in range(20):
            connection.send(b".")
            await connection.drained()
            await asyncio.sleep(0.05)
        connection.send(b"end")

    async def main() -> None:
        async with RawOrigin(answers) as origin, rig("http_status:404") as it:
            it.dispatcher._tcp_drains._limit = 0.4
            port = private(it, f"127.0.0.1:{origin.port}")
            port.send(b"question")
            port.send_eof()
            assert await port.whole() == b"." * 20 + b"end"
            await until(lambda: it.dispatcher.active == 0)

    on_loop(main())


def test_a_half_closed_private_flow_that_falls_silent_ends(on_loop: Runner) -> None:
    async def silent(connection: RawConnection) -> None:
        await connection.reader.read()
        connection.send(b"wait")
        await asyncio.Event().wait()

    async def main() -> None:
        assert limits.TCP_HALF_CLOSED >= 60
        async with RawOrigin(silent) as origin, rig("http_status:404") as it:
            it.dispatcher._tcp_drains._limit = 0.05
            port = private(it, f"127.0.0.1:{origin.port}")
            port.send_eof()
            assert await port.whole() == b"wait"
            await until(lambda: it.dispatcher.active == 0)
            assert it.dispatcher._tcp_drains._timer is None

    on_loop(main())


def test_the_origins_half_close_lets_the_client_finish(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        connection.send(b"banner")
        connection.writer.write_eof()
        assert await connection.reader.read() == b"all of it"

    async def main() -> None:
        async with RawOrigin(script) as origin, rig("http_status:404") as it:
            port = private(it, f"127.0.0.1:{origin.port}")
            assert await port.whole() == b"banner"
            port.send(b"all of ")
            port.send(b"it")
            port.send_eof()
            await until(lambda: it.dispatcher.active == 0)

    on_loop(main())


def test_close_ends_flows(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig("http_status:404") as it:
            ports = [private(it, f"127.0.0.1:{origin.port}") for _ in range(5)]
            for port in ports:
                await port.head()
            assert it.dispatcher.go_away() == 0, "raw bytes have no word for goodbye"
            await it.dispatcher.close()
            assert all(port.reset_code is not None for port in ports)
            late = private(it, f"127.0.0.1:{origin.port}")
            assert late.status == 502
            assert it.dispatcher.flows.limiter.active == 0
            assert binary(late) == b""

    on_loop(main())
