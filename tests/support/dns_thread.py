"""The DNS server of `dns_server.py` in a thread of its own, for tests that wait for child processes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.dns_server import DnsServer, Zone


@contextmanager
def dns_server(zone: Zone) -> Iterator[DnsServer]:
    """Serve `zone` on loopback until the end of the context."""
    server, up = DnsServer(zone), threading.Event()
    over: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        end = asyncio.Event()
        async with server:
            over.append((asyncio.get_running_loop(), end))
            up.set()
            await end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert up.wait(30)
        yield server
    finally:
        loop, end = over[0]
        loop.call_soon_threadsafe(end.set)
        thread.join(10)
