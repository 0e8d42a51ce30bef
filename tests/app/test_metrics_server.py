"""The metrics address as a server: where it listens, what it bears."""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import Callable

import pytest

from connector.app import metrics_server
from connector.app.answers import Answer, Query, Routes, text_answer
from connector.app.config import RUNTIME_VARIABLE
from connector.app.logs import Logger, LogOutput
from connector.app.metrics_server import KNOWN_PORTS, MAX_CONNECTIONS, MetricsServer, known_addresses
from connector.errors import ConfigError
from tests.support.aio import run, until
from tests.support.loops import LOOPS

Loop = Callable[[], asyncio.AbstractEventLoop]
both_loops = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)


async def slow(_: Query) -> Answer:
    await asyncio.sleep(0)
    return text_answer("slow\n")


def broken(_: Query) -> Answer:
    raise RuntimeError("no page")


ROUTES: Routes = {"/fast": lambda query: text_answer(f"fast {dict(query)}"), "/slow": slow, "/broken": broken}


def server(address: str = "127.0.0.1:0", stream: io.StringIO | None = None) -> MetricsServer:
    return MetricsServer(address, ROUTES, Logger(LogOutput(stream=stream or io.StringIO())))


async def ask(address: str, request: bytes) -> bytes:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    writer.write(request)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


def get(path: str, *, method: str = "GET", more: str = "Connection: close\r\n") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{more}\r\n".encode()


def test_pages_pipelines_and_heads() -> None:
    stream = io.StringIO()

    async def main() -> None:
        async with server(stream=stream) as it:
            answer = await ask(it.address, get("/fast?a=1"))
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert answer.endswith(b"fast {'a': ['1']}")
            assert (await ask(it.address, get("/fast", method="HEAD"))).endswith(b"\r\n\r\n")
            assert (await ask(it.address, get("/other"))).startswith(b"HTTP/1.1 404 ")
            assert (await ask(it.address, get("/broken"))).startswith(b"HTTP/1.1 500 ")
            assert (await ask(it.address, b"nonsense\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
            assert (await ask(it.address, get("/" + "x" * metrics_server.MAX_HEAD))).startswith(b"HTTP/1.1 400 ")
            # HTTP/1.0, a body that nobody reads, an upgrade that is not taken
            assert b"slow" in await ask(it.address, b"GET /slow HTTP/1.0\r\n\r\n")
            length = "Connection: close\r\nContent-Length: 3\r\n"
            assert b"fast" in await ask(it.address, get("/fast", method="POST", more=length) + b"abc")
            several = await ask(it.address, get("/slow", more="") + get("/fast?b=2", more="") + get("/slow"))
            assert [several.count(text) for text in (b"slow\n", b"fast {'b'", b"200 OK")] == [2, 1, 3]
            assert several.index(b"fast {'b'") > several.index(b"slow\n")

    run(main())
    assert "no page" in stream.getvalue()


@both_loops
def test_who_says_nothing_is_closed(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "REQUEST_SECONDS", 0.05)

    async def main() -> None:
        async with server() as it:
            host, _, port = it.address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /fast HT")
            try:
                assert await reader.read() == b""
            except ConnectionResetError:
                pass
            writer.close()

    run(main(), loop_factory=loop)


@both_loops
def test_who_takes_no_answers_is_asked_for_no_more_requests(loop: Loop) -> None:
    page = text_answer("x" * 100_000)

    async def main() -> None:
        it = MetricsServer("127.0.0.1:0", {"/big": lambda _: page}, Logger(LogOutput(stream=io.StringIO())))
        async with it:
            host, _, port = it.address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port), limit=1000)
            writer.write(get("/big", more="") * 499 + get("/big"))
            await until(lambda: it._connections, what="the connection")
            (connection,) = it._connections
            await until(lambda: connection._full, what="a client that takes nothing")
            assert connection._transport is not None
            assert connection._transport.get_write_buffer_size() < 1_000_000
            size = 0
            while data := await reader.read(1_000_000):
                size += len(data)
            assert size > 500 * 100_000
            writer.close()

    run(main(), loop_factory=loop)


def test_connections_are_bounded() -> None:
    async def main() -> None:
        async with server() as it:
            host, _, port = it.address.rpartition(":")
            held = [await asyncio.open_connection(host, int(port)) for _ in range(MAX_CONNECTIONS)]
            await until(lambda: len(it._connections) == MAX_CONNECTIONS)
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                assert await reader.read() == b""
            except ConnectionResetError:
                pass
            for _, each in [*held, (reader, writer)]:
                each.close()
            await until(lambda: not it._connections)

    run(main())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "", "0.0.0.0"])
def test_every_host_form_listens(host: str) -> None:
    async def main() -> None:
        async with server(f"{host}:0") as it:
            port = it.address.rpartition(":")[2]
            assert b"200" in await ask(f"127.0.0.1:{port}", get("/fast"))
            if socket.has_dualstack_ipv6() and host in {"", "0.0.0.0"}:
                assert it.address == f"[::]:{port}"

    run(main())


def test_a_taken_port_is_a_clear_error() -> None:
    async def main(address: str) -> None:
        async with server(address):
            raise AssertionError("it bound")

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match="failed to bind to address") as caught:
            run(main(address))
        assert address in str(caught.value)
        assert "--metrics" in caught.value.advice


def test_the_default_address_takes_the_first_free_port_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    free = []
    for _ in range(3):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            free.append(probe.getsockname()[1])
    monkeypatch.setattr(metrics_server, "KNOWN_PORTS", tuple(free))

    async def main() -> None:
        async with server("localhost:0") as one, server("localhost:0") as two:
            assert [int(it.address.rpartition(":")[2]) for it in (one, two)] == free[:2]
            async with server("localhost:0") as three, server("localhost:0") as beyond:
                assert three.address == f"127.0.0.1:{free[2]}"
                assert int(beyond.address.rpartition(":")[2]) not in free

    run(main())


def test_in_a_container_the_default_is_open_to_the_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_addresses()[0] == f"localhost:{KNOWN_PORTS[0]}"
    monkeypatch.setenv(RUNTIME_VARIABLE, "container")
    assert known_addresses() == [f"0.0.0.0:{port}" for port in (20241, 20242, 20243, 20244, 20245)]
