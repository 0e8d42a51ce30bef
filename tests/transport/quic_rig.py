"""What the QUIC transport tests share: sinks, and links to a mini edge."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from connector.protocol.ports import Buffer, Request, StreamPort, StreamSink
from connector.transport.quic import QuicLink, dial_quic
from connector.transport.quic_trust import quic_context
from tests.support.aio import run
from tests.support.loops import LOOPS
from tests.support.mini_quic_edge import MiniQuicConnection, MiniQuicEdge

ENGINES = ("qh3", "aioquic")

both = pytest.mark.parametrize("engine", ENGINES)
everywhere = pytest.mark.parametrize(
    ("engine", "loop"), [(engine, loop) for engine in ENGINES for loop in LOOPS], ids=str
)


def run_on(loop: str, main: Coroutine[Any, Any, None], *, limit: float = 60.0) -> None:
    run(main, limit=limit, loop_factory=LOOPS[loop])


class Echo:
    """Answers at once and sends back what comes; consumes at once."""

    def __init__(self, request: Request, port: StreamPort, status: int = 200) -> None:
        self.request = request
        self.port = port
        self.calls: list[str] = []
        self.error: BaseException | None = None
        self.ended = asyncio.Event()
        port.respond(status, ((b"x-path", request.target),))

    def on_data(self, data: Buffer) -> None:
        self.port.write(data)
        self.port.consumed(len(data))

    def on_eof(self) -> None:
        self.calls.append("eof")
        self.port.write_eof()
        self.ended.set()

    def on_reset(self, error: BaseException | None) -> None:
        self.calls.append("reset")
        self.error = error
        self.ended.set()

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")


class Slow(Echo):
    """Keeps what comes and consumes only when told to."""

    def __init__(self, request: Request, port: StreamPort) -> None:
        super().__init__(request, port)
        self.held = 0
        self.total = 0
        self.most_held = 0
        self.greedy = False

    def on_data(self, data: Buffer) -> None:
        self.total += len(data)
        self.held += len(data)
        self.most_held = max(self.most_held, self.held)
        if self.greedy:
            self.take(self.held)

    def take(self, n: int) -> None:
        n = min(n, self.held)
        self.held -= n
        self.port.consumed(n)


class Acceptor:
    """Makes sinks and keeps them."""

    def __init__(self, make: Callable[[Request, StreamPort], Any] = Echo) -> None:
        self.make = make
        self.sinks: list[Any] = []

    def __call__(self, request: Request, port: StreamPort) -> StreamSink:
        sink: StreamSink = self.make(request, port)
        self.sinks.append(sink)
        return sink


@asynccontextmanager
async def linked(
    directory: Path,
    engine: str,
    make: Callable[[Request, StreamPort], Any] = Echo,
    *,
    edge_options: dict[str, Any] | None = None,
    idle_timeout: float = 60.0,
    **options: Any,
) -> AsyncIterator[tuple[QuicLink, MiniQuicConnection, Acceptor]]:
    accept = Acceptor(make)
    async with MiniQuicEdge(directory, **(edge_options or {})) as edge:
        link = await dial_quic(
            "127.0.0.1",
            edge.port,
            context=quic_context(edge.cacert),
            accept=accept,
            engine=engine,
            idle_timeout=idle_timeout,
            **options,
        )
        try:
            yield link, await edge.accepted(), accept
        finally:
            link.abort()
