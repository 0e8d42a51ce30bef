"""The entrance: kinds of streams, swaps of rules, configuration pushes, drain and close."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from connector.errors import ConfigError, WireError
from connector.protocol.ports import RequestKind, ResponseSource
from connector.proxy.dispatch import Dispatcher
from connector.proxy.http import Route
from connector.proxy.ingress import parse_remote_config
from tests.proxy.conftest import Runner
from tests.proxy.rig import CONNECTOR_ID, Rig, rig
from tests.support.aio import until
from tests.support.memory_port import open_stream, request
from tests.support.raw_origin import RawConnection, RawOrigin, answering

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def test_without_configuration_everything_is_503(on_loop: Runner) -> None:
    async def main() -> None:
        dispatcher = Dispatcher(connector_id=CONNECTOR_ID, loop=asyncio.get_running_loop())
        for kind in (RequestKind.HTTP, RequestKind.WEBSOCKET):
            port = open_stream(dispatcher.accept, request(kind=kind))
            assert (port.status, port.source, port.headers, port.ended) == (503, ResponseSource.ORIGIN, [], True)
        assert dispatcher.requests == 2
        assert dispatcher.active == 0
        await dispatcher.close()

    on_loop(main())


def test_new_rules_serve_new_requests_and_old_ones_finish(on_loop: Runner) -> None:
    gate: asyncio.Event

    async def slow(connection: RawConnection) -> None:
        await connection.read_request()
        await gate.wait()
        connection.send(OK)
        await connection.closed()

    async def main() -> None:
        nonlocal gate
        gate = asyncio.Event()
        async with RawOrigin(slow) as origin, rig(origin.url) as it:
            old = it.open()
            await until(lambda: origin.connections)
            it.dispatcher.set_ingress(parse_remote_config(2, {"ingress": [{"service": "http_status:418"}]}))
            assert it.open().status == 418
            gate.set()
            assert await old.whole() == b"ok"
            await until(lambda: it.dispatcher.open_connections == 0, what="the retired pool keeps nothing")

    on_loop(main())


def test_rules_that_cannot_start_change_nothing(on_loop: Runner) -> None:
    async def main() -> None:
        async with rig("http_status:200") as it:
            bad = {"ingress": [{"service": "https://h", "originRequest": {"caPool": "/no/such/file"}}]}
            with pytest.raises(ConfigError, match="caPool"):
                it.dispatcher.set_ingress(parse_remote_config(2, bad))
            assert it.open().status == 200
            assert it.dispatcher.ingress.version == 1

    on_loop(main())


def test_drain_waits_for_what_is_active(on_loop: Runner) -> None:
    gate: asyncio.Event

    async def slow(connection: RawConnection) -> None:
        await connection.read_request()
        await gate.wait()
        connection.send(OK)
        await connection.closed()

    async def main() -> None:
        nonlocal gate
        gate = asyncio.Event()
        async with RawOrigin(slow) as origin, rig(origin.url) as it:
            assert await it.dispatcher.drain(0.01)
            port = it.open()
            assert not await it.dispatcher.drain(0.01)
            draining = asyncio.create_task(it.dispatcher.drain(10))
            await until(lambda: origin.connections)
            gate.set()
            assert await draining
            assert port.ended

    on_loop(main())


def test_close_in_the_middle_of_everything(on_loop: Runner) -> None:
    async def stall(connection: RawConnection) -> None:
        await connection.read_head()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbegin")
        await connection.closed()

    async def main() -> None:
        async with RawOrigin(stall) as origin, rig(origin.url) as it:
            streaming = it.open()
            await streaming.received(5)
            dialling = it.open()
            uploading = it.open("POST", length=10)
            await it.dispatcher.close()
            for port in (streaming, dialling, uploading):
                assert port.reset_code is not None
            late = it.open()
            assert late.status == 502
            assert "closing" in it.failures()[-1]["error"]

    on_loop(main())


def configured(body: bytes) -> bytes:
    message = json.loads(body)
    if message.get("boom"):
        raise WireError("boom")
    return b'{"lastAppliedVersion":%d,"err":null}' % message["version"]


def push(it: Rig, *chunks: bytes, eof: bool = True) -> Any:
    port = it.open("POST", kind=RequestKind.CONFIGURATION, length=-1)
    for chunk in chunks:
        port.send(chunk)
    if eof:
        port.send_eof()
    return port


def test_configuration_pushes(on_loop: Runner) -> None:
    async def main() -> None:
        async with rig("http_status:200", on_configuration=configured) as it:
            port = push(it, b'{"version":7,', b'"config":{}}')
            assert (port.status, bytes(port.body), port.ended) == (200, b'{"lastAppliedVersion":7,"err":null}', True)
            assert port.outstanding == 0
            assert push(it, b"no json").status == 502
            assert push(it, b'{"boom":1}').status == 502
            assert "boom" in it.failures()[-1]["error"]
            big = push(it, *[b" " * 65_536] * 17)
            assert big.status == 502
            assert "larger than 1024 KiB" in it.failures()[-1]["error"]
            gone = push(it, b"{", eof=False)
            assert it.dispatcher.active == 1
            gone.peer_reset()
            assert it.dispatcher.active == 0
        async with rig("http_status:200") as it:
            assert push(it, b"{}").status == 502

    on_loop(main())


def test_events_tell_the_story_of_a_request(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin, rig(origin.url) as it:
            await it.open(target="/a?secret=1").whole()
            assert [name for name, _ in it.events] == ["request", "response", "finished"]
            _, fields = it.events[-1]
            assert fields.pop("ms") >= 0
            assert fields.pop("request").target == b"/a?secret=1"
            assert fields == {
                "kind": "http",
                "method": "GET",
                "host": "app.example.com",
                "path": "/a",
                "rule": 0,
                "service": origin.url,
                "status": 200,
                "whole": True,
            }
        async with rig("http://127.0.0.1:1", access_events=False) as it:
            await it.open().whole()
            assert [name for name, _ in it.events] == ["failed"]

    on_loop(main())


def test_rules_that_trust_the_same_share_what_is_slow_to_make(on_loop: Runner) -> None:
    """A context takes 10 to 100 ms: a thousand rules must not hold the loop for a minute."""

    async def main() -> None:
        options = {"http2Origin": True}
        rules = [{"hostname": f"h{number}", "service": "https://h", "originRequest": options} for number in range(3)]
        it = Rig(parse_remote_config(1, {"ingress": [*rules, {"service": "http_status:404"}]}))
        pools = [route.pool for route in it.dispatcher._routes if isinstance(route, Route)]
        assert len(pools) == 3
        assert len({pool.opener.context for pool in pools}) == len({pool.opener.http2_context for pool in pools}) == 1
        assert pools[0].opener.context is not pools[0].opener.http2_context
        await it.dispatcher.close()

    on_loop(main())
