"""The built-in test site: every endpoint, its bounds, and its ends."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime

import pytest

from connector.proxy.hello_world import _go_duration, parse_period
from tests.proxy.conftest import Runner
from tests.proxy.rig import rig
from tests.proxy.ws_client import ACCEPT, UPGRADE, frame, frames, parse
from tests.support.aio import until
from tests.support.memory_port import MemoryPort


async def ask(port: MemoryPort, body: bytes = b"") -> bytes:
    if body:
        await port.send_all(body)
    else:
        port.send_eof()
    return await port.whole()


def test_the_page_shows_the_request_and_nothing_of_it_is_markup(on_loop: Runner) -> None:
    async def main() -> None:
        async with rig("hello_world") as it:
            headers = [(b"x-evil", b"<script>alert(1)</script>")]
            body = b"<b>body</b> \xff" * 3
            page = await ask(it.open("POST", "/a?<q>", headers=headers, length=len(body)), body)
            assert b"<script>" not in page
            assert b"<b>body" not in page
            for shown in (b"POST", b"/a?&lt;q&gt;", b"app.example.com", b"&lt;script&gt;", b"&lt;b&gt;body&lt;/b&gt;"):
                assert shown in page
            assert it.dispatcher.responses == {200: 1}

    on_loop(main())


def test_a_long_body_is_taken_and_not_kept(on_loop: Runner) -> None:
    async def main() -> None:
        async with rig("hello-world") as it:
            port = it.open("PUT", "/", length=5_000_000)
            page = await ask(port, b"x" * 5_000_000)
            assert b"5000000 bytes (the first 64 KiB)" in page
            assert len(page) < 80_000
            assert port.credited == 5_000_000

    on_loop(main())


def test_uptime_health_and_head(on_loop: Runner) -> None:
    async def main() -> None:
        async with rig("hello_world") as it:
            port = it.open(target="/uptime")
            document = json.loads(await ask(port))
            assert port.header(b"content-type") == b"application/json"
            assert datetime.fromisoformat(document["startTime"]).tzinfo is not None
            assert document["uptime"].endswith("s")
            assert await ask(it.open(target="/_health?x")) == b"ok"
            port = it.open("HEAD", "/_health")
            assert await ask(port) == b""
            assert port.header(b"content-length") == b"2"
            port = it.open(target="/ws")
            await ask(port)
            assert port.status == 400

    on_loop(main())


def test_events_come_while_they_are_read(on_loop: Runner) -> None:
    async def main() -> None:
        async with rig("hello_world") as it:
            port = it.open(target="/sse?freq=10ms")
            port.send_eof()
            await port.until(lambda: port.body.startswith(b"0\n\n1\n\n2\n\n"))
            assert port.header(b"content-type") == b"text/event-stream; charset=utf-8"
            port.pause()
            [exchange] = it.dispatcher._active
            assert exchange._timer is None  # type: ignore[attr-defined]
            seen = len(port.body)
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(port.body) == seen
            port.take()
            await port.until(lambda: len(port.body) > seen)
            port.peer_reset()
            assert exchange._timer is None  # type: ignore[attr-defined]
            assert it.events[-1][1]["aborted"]

    on_loop(main())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1s", 1), ("250ms", 0.25), ("1m30s", 90), ("1.5h", 3600), ("1ns", 0.01), ("", 10), ("-1s", 10), ("0s", 10)],
)
def test_periods(text: str, seconds: float) -> None:
    assert parse_period(text) == seconds


def test_durations_are_printed_as_go_does() -> None:
    assert [_go_duration(s) for s in (0.5, 62.25, 3600, 7325.000001)] == ["0.5s", "1m2.25s", "1h0m0s", "2h2m5.000001s"]


def test_websocket_echo(on_loop: Runner) -> None:
    async def main() -> None:
        async with rig("hello_world") as it:
            port = it.websocket("/ws", headers=UPGRADE)
            assert await port.head() == 101
            assert port.header(b"sec-websocket-accept") == ACCEPT
            port.send(frame(1, "grüß".encode()) + frame(9, b"?") + frame(2, b"frag", fin=False) + frame(0, b"ment"))
            assert frames(port) == [(0x81, "grüß".encode()), (0x8A, b"?"), (0x02, b"frag"), (0x80, b"ment")]
            long = bytes(range(256)) * 1000
            await port.send_all(frame(2, long) + frame(8, b"\x0f\xa0done"))
            found, rest = parse(await port.whole())
            assert not rest
            assert b"".join(payload for first, payload in found[4:-1]) == long
            assert [first for first, _ in found[4:-1]] == [0x02, *[0x00] * (len(found) - 7), 0x80]
            assert found[-1] == (0x88, b"\x0f\xa0")
            await until(lambda: it.dispatcher.active == 0)
            assert it.dispatcher.responses == {101: 1}

    on_loop(main())


def test_websocket_ends(on_loop: Runner) -> None:
    async def main() -> None:
        async with rig("hello_world") as it:
            bad, ended, left, reset, elsewhere = (it.websocket(p) for p in ("/ws", "/ws", "/ws", "/ws", "/"))
            assert elsewhere.status == 400
            bad.send(b"\x82\x01x")
            assert frames(bad) == [(0x88, b"\x03\xea")]
            ended.send_eof()
            assert ended.ended
            reset.peer_reset()
            assert it.dispatcher.go_away() == 1
            assert frames(left) == [(0x88, b"\x03\xe9")]
            assert it.dispatcher.active == 0
            cut = it.websocket("/ws")
            await it.dispatcher.close()
            assert cut.reset_code is not None

    on_loop(main())


def test_an_eyeball_that_does_not_read_its_echo_gets_no_credit(on_loop: Runner) -> None:
    async def main() -> None:
        async with rig("hello_world") as it:
            port = it.websocket("/ws", high_water=10_000)
            port.send(frame(2, bytes(20_000)))
            assert port._paused
            port.send(frame(2, b"more"))
            assert port.outstanding > 0
            port.take()
            assert port.outstanding == 0
            port.peer_reset()

    on_loop(main())
