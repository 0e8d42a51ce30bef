"""Starting a dev edge and visiting it, for the tests here."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import capnp

from connector.devedge.events import Event, EventLog
from connector.devedge.faults import parse_faults
from connector.devedge.server import DevEdge, Settings
from tests.devedge.fake_connector import FakeConnector, Handler
from tests.support.aio import run


class Recorder:
    """An edge's events, kept."""

    def __init__(self) -> None:
        self.log = EventLog()
        self.events: list[Event] = []
        self.log.listen(self.events.append)

    def named(self, name: str) -> list[Event]:
        return [event for event in self.events if event["event"] == name]


def run_edge(main: Coroutine[Any, Any, None], **options: Any) -> None:
    """Run a test inside pycapnp's loop."""

    async def inside() -> None:
        async with capnp.kj_loop():
            await main

    run(inside(), **options)


@contextlib.asynccontextmanager
async def running_edge(
    state_dir: Path, *, faults: tuple[str, ...] = (), tunnel_names: tuple[str, ...] = ("demo",), **settings: Any
) -> AsyncIterator[tuple[DevEdge, Recorder]]:
    recorder = Recorder()
    made = Settings(state_dir, tunnel_names=list(tunnel_names), faults=parse_faults(list(faults)), **settings)
    async with DevEdge(made, recorder.log) as edge:
        yield edge, recorder


@contextlib.asynccontextmanager
async def edge_and_connector(
    state_dir: Path, handler: Handler | None = None, **settings: Any
) -> AsyncIterator[tuple[DevEdge, FakeConnector, Recorder]]:
    """A running edge with one registered fake connector."""
    async with (
        running_edge(state_dir, **settings) as (edge, recorder),
        await FakeConnector.connect(edge, handler) as connector,
    ):
        answer = await connector.register(edge.tunnel())
        assert answer.which() == "connectionDetails", answer
        yield edge, connector, recorder


def cancelled(error: object) -> bool:
    """Whether a stream's error says that the edge gave it up, in the words of either protocol."""
    return "CANCEL" in str(error) or str(error).endswith("code 0")


def visitor_tls(edge: DevEdge, *alpn: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(edge.ca_file))
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


@contextlib.asynccontextmanager
async def visit(edge: DevEdge, *, name: str = "localhost") -> AsyncIterator[tuple[asyncio.StreamReader, Any]]:
    """A raw HTTP/1.1 visitor: reader and writer."""
    host, port = edge.public_address
    reader, writer = await asyncio.open_connection(
        host, port, ssl=visitor_tls(edge, "http/1.1"), server_hostname=name, limit=2**20
    )
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Read a response head: status and headers, names in lower case."""
    async with asyncio.timeout(30):
        block = await reader.readuntil(b"\r\n\r\n")
    lines = block.decode("latin-1").split("\r\n")
    headers = [line.split(":", 1) for line in lines[1:] if line]
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, value in headers}


async def get(
    edge: DevEdge, target: str = "/", *, host: str = "localhost", head: str = ""
) -> tuple[int, dict[str, str], bytes]:
    """One GET with `Connection: close`."""
    async with visit(edge) as (reader, writer):
        writer.write(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{head}\r\n".encode())
        status, headers = await read_head(reader)
        async with asyncio.timeout(30):
            return status, headers, await reader.read()
