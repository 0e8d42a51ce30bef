"""A thousand streams, half of them WebSockets: no task per stream, and nothing left afterwards."""

from __future__ import annotations

import asyncio
import gc
from typing import cast

from tests.proxy.conftest import Runner
from tests.proxy.rig import rig
from tests.support.aio import until

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nbegin"
SWITCH = b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


class Origin(asyncio.Protocol):
    """Answers at once and never ends; no task of its own, so that the count below is the proxy's."""

    live = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.upgraded = False
        Origin.live += 1

    def data_received(self, data: bytes) -> None:
        if self.upgraded:
            self.transport.write(data)
        else:
            self.upgraded = b"Upgrade: websocket" in data
            self.transport.write(SWITCH if self.upgraded else HEAD)

    def connection_lost(self, error: Exception | None) -> None:
        Origin.live -= 1


def test_tasks_stay_at_the_baseline(on_loop: Runner) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Origin, "127.0.0.1", 0, backlog=2048)
        port_number = server.sockets[0].getsockname()[1]
        baseline = len(asyncio.all_tasks())
        async with rig(f"http://127.0.0.1:{port_number}") as it:
            ports = []
            for _ in range(10):
                for number in range(100):
                    ports.append(it.websocket() if number % 2 else it.open())
                assert len(asyncio.all_tasks()) <= baseline + it.dispatcher.dialling
                assert it.dispatcher.dialling <= 100
                await until(lambda: all(port.status for port in ports), what="answers")
                assert len(asyncio.all_tasks()) <= baseline + it.dispatcher.dialling
            await until(lambda: it.dispatcher.dialling == 0)
            assert it.dispatcher.active == 1000
            assert len(asyncio.all_tasks()) == baseline
            for port in ports[1::2]:
                port.send(b"ping")
            for port in ports[1::2]:
                assert await port.received(4) == b"ping"
            assert len(asyncio.all_tasks()) == baseline
            for port in ports:
                port.peer_reset()
            assert it.dispatcher.active == 0
            await until(lambda: it.dispatcher.open_connections == 0 and Origin.live == 0, what="connections end")
        server.close()
        await server.wait_closed()

    on_loop(main())
    gc.collect()
