"""The way to an edge, for whole programs: one port that relays TCP and UDP, and what may happen on the way.

Weather is UdpWeather's; over TCP, where the kernel mends what is lost, a lost packet is a wait of RETRANSMIT seconds.
Runs on a loop of its own in a thread, so that tests which drive processes stay plain functions.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.udp_weather import UdpWeather

RETRANSMIT = 0.2
"""Seconds that a loss costs a TCP connection: the kernel's shortest retransmission time-out."""

TCP_AHEAD = 1 << 20
"""Bytes of one direction that may be under way."""


class EdgePath:
    """Relays `port` to the edge; the switches may be used from the test's thread."""

    def __init__(self, edge_port: int, **weather: Any) -> None:
        self.port = 0
        self.connects = 0
        """TCP connections so far."""
        self._edge_port = edge_port
        self._weather_options = weather
        self._random = random.Random(weather.get("seed", 1))
        self._weather: UdpWeather | None = None
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tcp_blocked = False

    @property
    def udp(self) -> UdpWeather:
        assert self._weather is not None
        return self._weather

    def call(self, function: Callable[[], Any]) -> None:
        """Run `function` on the loop of the path, and wait for it."""
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (function(), done.set()))
        assert done.wait(20)

    def block_udp(self, blocked: bool) -> None:
        """Lose every UDP packet, or let them pass again."""
        self.call(lambda: setattr(self.udp, "blocked", blocked))

    def block_tcp(self, blocked: bool) -> None:
        """Cut every TCP connection and close new ones, or let them pass again."""

        def switch() -> None:
            self._tcp_blocked = blocked
            if blocked:
                self._cut()

        self.call(switch)

    def cut_tcp(self) -> None:
        """Reset every TCP connection that is open now."""
        self.call(self._cut)

    def rebind(self) -> None:
        """The edge sees other UDP ports from now on."""
        self.call(self.udp.rebind)

    def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        for _ in range(50):  # a port that is free for TCP may be taken for UDP
            server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            try:
                self._weather = UdpWeather(self._edge_port, port=self.port, **self._weather_options)
                await self._weather.__aenter__()
            except OSError:
                server.close()
                continue
            break
        try:
            ready.set()
            await stop.wait()
        finally:
            server.close()
            self._cut()
            await self.udp.__aexit__()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connects += 1
        if self._tcp_blocked:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._edge_port)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, far_writer}
        self._writers |= both
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            self._writers -= both
            for each in both:
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop, weather = asyncio.get_running_loop(), self.udp
        free_at, under_way = 0.0, 0
        landed = asyncio.Event()

        def land(data: bytes) -> None:
            nonlocal under_way
            under_way -= len(data)
            landed.set()
            if not writer.transport.is_closing():
                writer.write(data)

        try:
            while data := await reader.read(65_536):
                wait = weather.delay + self._random.random() * weather.jitter
                if self._random.random() < weather.loss:
                    wait += RETRANSMIT
                if not wait and not under_way:
                    writer.write(data)
                else:
                    free_at = max(free_at + 1e-6, loop.time() + wait)  # TCP keeps the order
                    under_way += len(data)
                    loop.call_at(free_at, land, data)
                    while under_way > TCP_AHEAD:
                        landed.clear()
                        await landed.wait()
                await writer.drain()
            while under_way:
                landed.clear()
                await landed.wait()
            writer.write_eof()
        except (ConnectionError, OSError):
            writer.transport.abort()


@contextmanager
def edge_path(edge_port: int, **weather: Any) -> Iterator[EdgePath]:
    """Give a path to the edge at `edge_port` of 127.0.0.1; `weather` goes to UdpWeather."""
    path = EdgePath(edge_port, **weather)
    ready, stop = threading.Event(), asyncio.Event()

    def main() -> None:
        asyncio.set_event_loop(path._loop)
        path._loop.run_until_complete(path._serve(ready, stop))
        path._loop.close()

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield path
    finally:
        path._loop.call_soon_threadsafe(stop.set)
        thread.join(20)
