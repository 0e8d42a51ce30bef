"""The task and timer budget over a real link: TLS, our engine, the dispatcher, real origins; 1,000 streams at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from connector.proxy.dispatch import Dispatcher
from connector.proxy.ingress import parse_remote_config
from connector.transport.h2 import dial_h2
from connector.transport.tls import edge_context
from tests.proxy.rig import CONNECTOR_ID
from tests.support.aio import run, until
from tests.support.loops import LOOPS
from tests.support.mini_edge import MiniEdge
from tests.support.origins import http_origin

HALF = 500
KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
MASKED_HI = b"\x81\x82\0\0\0\0hi"
ECHOED_HI = b"\x81\x02hi"


UPGRADE = (
    (b"cf-cloudflared-proxy-connection-upgrade", b"websocket"),
    (b"sec-websocket-key", KEY),
    (b"sec-websocket-version", b"13"),
)


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_thousand_streams_cost_no_task_and_no_timer_each(
    tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def main(port: int) -> None:
        this = asyncio.get_running_loop()
        ingress = parse_remote_config(1, {"ingress": [{"service": f"http://127.0.0.1:{port}"}]})
        dispatcher = Dispatcher(ingress=ingress, connector_id=CONNECTOR_ID, loop=this)
        async with MiniEdge(tmp_path) as edge:
            link = await dial_h2("127.0.0.1", edge.port, context=edge_context(edge.cacert), accept=dispatcher.accept)
            peer = await edge.accepted()
            baseline = len(asyncio.all_tasks())
            requests = [peer.open([], path=b"/stall", end=True) for _ in range(HALF)]
            sockets = [peer.open([*UPGRADE], path=b"/ws") for _ in range(HALF)]
            worst = 0
            while not all(stream.status for stream in sockets) or dispatcher.dialling:
                # Beside the baseline only dials in flight are tasks, one each; a name lookup has one for all of them.
                worst = max(worst, len(asyncio.all_tasks()) - baseline - dispatcher.dialling)
                await asyncio.sleep(0.002)
            assert worst <= 2
            for stream in sockets:
                stream.send(MASKED_HI)
            await until(lambda: all(bytes(s.data) == ECHOED_HI for s in sockets), limit=50, what="every echo")
            assert dispatcher.active == 2 * HALF
            assert len(asyncio.all_tasks()) <= baseline
            if hasattr(this, "_scheduled"):  # plain asyncio keeps its timers where a test can count them
                assert len([timer for timer in this._scheduled if not timer.cancelled()]) <= 8
            assert not any(stream.status for stream in requests)
            peer.cut()
            await until(lambda: dispatcher.active == 0, what="every stream is gone")
            link.abort()
            await dispatcher.close()

    with http_origin() as port:
        run(main(port), limit=110, loop_factory=loop)
