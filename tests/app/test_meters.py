"""Rule meters: what is counted where, and that eyeballs cannot make them grow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from uuid import UUID

import pytest

from connector.app.meters import Meters
from connector.app.metrics import Metrics
from connector.protocol.ports import Request, RequestKind
from connector.proxy.dispatch import Dispatcher
from connector.proxy.ingress import parse_remote_config
from tests.proxy.rig import Rig
from tests.support.aio import run
from tests.support.loops import LOOPS
from tests.support.memory_port import open_stream, request
from tests.support.raw_origin import RawOrigin, answering

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
SWITCH = b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"

Loop = Callable[[], asyncio.AbstractEventLoop]
both_loops = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)


def observed(rig: Rig) -> Meters:
    meters = Meters(lambda: rig.dispatcher.ingress.rules)
    rig.dispatcher.watch = meters
    return meters


def text(rig: Rig, meters: Meters) -> dict[str, float]:
    lines = Metrics(rig.dispatcher, meters).render().decode().splitlines()
    rows = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in rows}


@both_loops
def test_requests_bytes_and_failures_by_rule(loop: Loop) -> None:
    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin:
            config = {
                "ingress": [
                    {"hostname": "a.example.com", "service": origin.url},
                    {"hostname": "dead.example.com", "service": "http://127.0.0.1:1"},
                    {"service": "http_status:404"},
                ]
            }
            rig = Rig(parse_remote_config(1, config))
            meters = observed(rig)
            for _ in range(3):
                port = rig.open("POST", host="a.example.com", length=3)
                port.send(b"abc")
                port.send_eof()
                assert await port.whole() == b"hello"
            await rig.open(host="dead.example.com").whole()
            for number in range(50):
                await rig.open(host=f"{number}.example.org").whole()
            assert (meters.requests, meters.active, meters.errors) == (54, 0, 1)
            assert meters.responses == {200: 3, 404: 50}
            assert [(m.requests, m.failures, m.received, m.sent) for m in meters] == [
                (3, 0, 9, 15), (1, 1, 0, 0), (50, 0, 0, 0),
            ]  # fmt: skip
            found = text(rig, meters)
            labels = f'{{hostname="a.example.com",path="",rule="0",service="{origin.url}"}}'
            assert found[f"connector_rule_sent_bytes_total{labels}"] == 15
            assert found[f"connector_rule_request_seconds_count{labels}"] == 3
            assert found['cloudflared_tunnel_response_by_code{status_code="404"}'] == 50
            assert found["cloudflared_tunnel_request_errors"] == 1
            # A rule that reads the same goes on; one that is gone is forgotten with the next new one.
            config["ingress"][1] = {"hostname": "new.example.com", "service": "http_status:204"}
            rig.dispatcher.set_ingress(parse_remote_config(2, config))
            await rig.open(host="new.example.com").whole()
            assert sorted(m.labels[1] for m in meters) == ["", "a.example.com", "new.example.com"]
            assert sorted(m.requests for m in meters) == [1, 3, 50]
            await rig.dispatcher.close()

    run(main(), loop_factory=loop)


@both_loops
def test_a_websocket_is_counted_while_it_is_open(loop: Loop) -> None:
    async def main() -> None:
        async with RawOrigin(answering(SWITCH + b"\x81\x02hi")) as origin:
            rig = Rig(parse_remote_config(1, {"ingress": [{"service": origin.url}]}))
            meters = observed(rig)
            socket = rig.websocket()
            await socket.received(4)
            socket.send(b"12345678")
            labels = f'{{hostname="",path="",rule="0",service="{origin.url}"}}'
            found = text(rig, meters)
            assert found[f"connector_rule_websockets{labels}"] == 1
            assert found[f"connector_rule_sent_bytes_total{labels}"] == 4
            assert found[f"connector_rule_received_bytes_total{labels}"] == 8
            assert found["cloudflared_tunnel_concurrent_requests_per_tunnel"] == 1
            socket.peer_reset()
            found = text(rig, meters)
            assert found[f"connector_rule_websockets{labels}"] == 0
            assert found[f"connector_rule_websockets_total{labels}"] == 1
            assert found[f"connector_rule_sent_bytes_total{labels}"] == 4
            assert found[f"connector_rule_request_seconds_count{labels}"] == 0
            await rig.dispatcher.close()

    run(main(), loop_factory=loop)


@both_loops
def test_the_access_log_hears_of_every_end(loop: Loop) -> None:
    async def main() -> None:
        seen: list[tuple[bytes, int, bool]] = []

        def on_finished(over: Request, rule: object, status: int, whole: bool, *_: object) -> None:
            seen.append((over.target, status, whole))

        ingress = parse_remote_config(1, {"ingress": [{"service": "http_status:204"}]})
        dispatcher = Dispatcher(ingress=ingress, connector_id=UUID(int=1), loop=asyncio.get_running_loop())
        dispatcher.watch = Meters(lambda: dispatcher.ingress.rules, on_finished)
        open_stream(dispatcher.accept, request(target="/a"))
        open_stream(dispatcher.accept, request(target="10.0.0.1:22", kind=RequestKind.TCP))
        assert seen[0] == (b"/a", 204, True)
        await dispatcher.close()

    run(main(), loop_factory=loop)
