"""A tunnel as a part of a program: the examples of LIBRARY.md, and what an ASGI application sees."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import re
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import capnp
import pytest
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus

import connector
from connector.devedge.server import DevEdge, Settings
from connector.errors import ConfigError, ConnectorError, WireError
from connector.transport.kj import kj_loop
from tests.support.aio import run, until
from tests.support.processes import ROOT, Child, dev_edge, edge_token
from tests.support.ws_client import ws_connect

EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "connector/LIBRARY.md").read_text(), re.M | re.S)
RUN = """
import functools, runpy, sys
import connector
connector.Tunnel = functools.partial(connector.Tunnel, edge=[sys.argv[2]], cacert=sys.argv[3])
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@contextmanager
def example(tmp_path: Path, number: int) -> Iterator[tuple[Child, int, ssl.SSLContext]]:
    script = tmp_path / "example.py"
    script.write_text(EXAMPLES[number])
    with dev_edge(tmp_path) as (edge, listening):
        command = (sys.executable, "-c", RUN, str(script), listening["edge"], listening["ca"])
        with Child(*command, env={"TUNNEL_TOKEN": edge_token(tmp_path)}) as child:
            edge.event("registered", limit=40)
            port = int(listening["public"].rpartition(":")[2])
            yield child, port, ssl.create_default_context(cafile=listening["ca"])


def test_the_first_example(tmp_path: Path) -> None:
    with example(tmp_path, 0) as (_, port, context):
        eyeball = http.client.HTTPSConnection("localhost", port, context=context, timeout=30)
        eyeball.request("GET", "/a%20path?query")
        answer = eyeball.getresponse()
        assert (answer.status, answer.read()) == (200, b"You asked for /a path")
        eyeball.close()


def test_the_second_example(tmp_path: Path) -> None:
    with example(tmp_path, 1) as (_, port, context):
        with ws_connect(f"wss://localhost:{port}/echo", context, open_timeout=30, close_timeout=5) as websocket:
            websocket.send("hello")
            assert websocket.recv(30) == "hello"
        eyeball = http.client.HTTPSConnection("localhost", port, context=context, timeout=30)
        eyeball.request("GET", "/else")
        assert eyeball.getresponse().status == 404
        eyeball.close()
    assert len(EXAMPLES) == 2


Check = Callable[["Visit"], Awaitable[None]]


class Visit:
    """One tunnel with an application, and eyeballs of the dev edge."""

    def __init__(self, edge: DevEdge, tunnel: connector.Tunnel) -> None:
        self.edge = edge
        self.tunnel = tunnel
        self.port = edge.public_address[1]
        self.context = ssl.create_default_context(cafile=str(edge.ca_file))

    async def ask(self, text: bytes) -> bytes:
        """Send a request's bytes, read the whole answer."""
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=self.context, server_hostname="localhost"
        )
        writer.write(text)
        answer = await reader.read()
        writer.transport.abort()
        return answer

    def websocket(self, path: str = "/", **options: Any) -> connect_async:
        return connect_async(f"wss://localhost:{self.port}{path}", ssl=self.context, open_timeout=30, **options)


def visiting(tmp_path: Path, app: Any, check: Check, *, protocol: str = "http2", **options: Any) -> None:
    async def main() -> None:
        async with (
            capnp.kj_loop(),
            DevEdge(Settings(tmp_path, tunnel_names=["test"])) as edge,
            connector.Tunnel(
                token=edge.token(),
                ingress=app,
                edge=[f"127.0.0.1:{edge.edge_address[1]}"],
                cacert=str(edge.ca_file),
                protocol=protocol,
                **options,
            ) as tunnel,
        ):
            assert tunnel.ready_connections == 1
            await check(Visit(edge, tunnel))

    run(main(), limit=60)


GET = b"GET /p%C3%A4th?q=1 HTTP/1.1\r\nHost: localhost\r\nX-Test: a\r\nConnection: close\r\n\r\n"


async def show(scope: Any, receive: Any, send: Any) -> None:
    """Answers what it sees."""
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            break
    seen = {key: scope[key] for key in ("method", "scheme", "path", "root_path", "server", "http_version")}
    seen["query"] = scope["query_string"].decode()
    seen["headers"] = [[name.decode(), value.decode()] for name, value in scope["headers"]]
    seen["body"] = len(body)
    await send({"type": "http.response.start", "status": 203, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(seen).encode()[:10], "more_body": True})
    await send({"type": "http.response.body", "body": json.dumps(seen).encode()[10:]})


@pytest.mark.parametrize("protocol", ["http2", "quic"])
def test_an_application_sees_the_request(tmp_path: Path, protocol: str) -> None:
    async def check(visit: Visit) -> None:
        head, _, body = (await visit.ask(GET)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 203 ")
        seen = json.loads(_unchunked(head, body))
        assert (seen["method"], seen["path"], seen["query"], seen["body"]) == ("GET", "/päth", "q=1", 0)
        assert (seen["scheme"], seen["server"]) == ("https", ["localhost", 443])
        assert ["x-test", "a"] in seen["headers"]
        assert seen["headers"][0] == ["host", "localhost"]
        size = 3_000_000
        post = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % size
        head, _, body = (await visit.ask(post + bytes(size))).partition(b"\r\n\r\n")
        assert json.loads(_unchunked(head, body))["body"] == size
        assert (await visit.ask(GET.replace(b"GET", b"HEAD"))).endswith(b"\r\n\r\n")

    visiting(tmp_path, show, check, protocol=protocol)


def _unchunked(head: bytes, body: bytes) -> bytes:
    if b"chunked" not in head.lower():
        return body
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        whole += body[:length]
        body = body[length + 2 :]
        if not length:
            break
    return whole


def test_what_an_application_does_wrong_is_an_answer_and_a_log_line(tmp_path: Path) -> None:
    async def wrong(scope: Any, receive: Any, send: Any) -> None:
        match scope["path"]:
            case "/raise":
                raise ValueError("broken")
            case "/nothing":
                return
            case "/header":
                start = {"type": "http.response.start", "status": 200, "headers": [(b"a", b"b\r\nc: d")]}
                await send(start)
                await send({"type": "http.response.body"})
            case "/late":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"begun", "more_body": True})
                raise ValueError("later")

    records: list[str] = []
    logger = logging.Logger("test")
    logger.addHandler(handler := logging.Handler())
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]

    async def check(visit: Visit) -> None:
        for path in ("/raise", "/nothing", "/header"):
            answer = await visit.ask(GET.replace(b"/p%C3%A4th?q=1", path.encode()))
            assert answer.startswith(b"HTTP/1.1 500 "), (path, answer)
        answer = await visit.ask(GET.replace(b"/p%C3%A4th?q=1", b"/late"))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert not answer.endswith(b"0\r\n\r\n")
        text = "\n".join(records)
        assert "raised ValueError: broken" in text
        assert "returned without a complete response" in text
        assert visit.edge.token()[40:] not in text

    visiting(tmp_path, wrong, check, logger=logger)


def test_a_slow_eyeball_slows_the_application_and_one_that_leaves_ends_it(tmp_path: Path) -> None:
    sent: list[int] = []
    ended = asyncio.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
                sent.append(65536)
                await asyncio.sleep(0)
        except OSError:
            assert (await receive())["type"] == "http.disconnect"
            ended.set()

    async def check(visit: Visit) -> None:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", visit.port, ssl=visit.context, server_hostname="localhost"
        )
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        before = -1
        while len(sent) != before:  # it comes to a halt
            before = len(sent)
            await asyncio.sleep(0.5)
        assert sum(sent) < 64 * 1024 * 1024
        writer.transport.abort()
        async with asyncio.timeout(30):
            await ended.wait()

    visiting(tmp_path, endless, check)


async def chat(scope: Any, receive: Any, send: Any) -> None:
    """A WebSocket server."""
    if scope["type"] != "websocket":
        return
    assert (await receive())["type"] == "websocket.connect"
    if scope["path"] == "/no":
        await send({"type": "websocket.close"})
        return
    subprotocol = scope["subprotocols"][0] if scope["subprotocols"] else None
    await send({"type": "websocket.accept", "subprotocol": subprotocol, "headers": [(b"x-chat", b"yes")]})
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            return
        if message.get("text") == "bye":
            await send({"type": "websocket.close", "code": 3000, "reason": "as asked"})
            return
        if message.get("text") == "raise":
            raise ValueError("broken")
        await send({"type": "websocket.send", "text": message.get("text"), "bytes": message.get("bytes")})


@pytest.mark.parametrize("protocol", ["http2", "quic"])
def test_websockets(tmp_path: Path, protocol: str) -> None:
    async def check(visit: Visit) -> None:
        async with visit.websocket(subprotocols=["one", "two"], max_size=None) as websocket:
            assert websocket.subprotocol == "one"
            assert websocket.response is not None
            assert websocket.response.headers["x-chat"] == "yes"
            large = bytes(range(256)) * 8192
            for payload in ("häl", b"", b"bytes", "x" * 70_000, large):
                await websocket.send(payload)
                assert await websocket.recv() == payload
            await websocket.send(iter(["in ", "three ", "parts"]))  # fragments
            assert await websocket.recv() == "in three parts"
            await (await websocket.ping())
            await websocket.send("bye")
            with pytest.raises(ConnectionClosed) as closed:
                await websocket.recv()
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (3000, "as asked")
        async with visit.websocket() as websocket:
            await websocket.send("raise")
            with pytest.raises(ConnectionClosed) as closed:
                await websocket.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1011
        with pytest.raises(InvalidStatus) as refused:
            async with visit.websocket("/no"):
                pass
        assert refused.value.response.status_code == 403

    visiting(tmp_path, chat, check, protocol=protocol)


def test_lifespan_runs_around_the_tunnel(tmp_path: Path) -> None:
    steps: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            assert (await receive())["type"] == "lifespan.startup"
            scope["state"]["pool"] = "ready"
            steps.append("up")
            await send({"type": "lifespan.startup.complete"})
            assert (await receive())["type"] == "lifespan.shutdown"
            steps.append("down")
            await send({"type": "lifespan.shutdown.complete"})
            return
        steps.append(scope["state"]["pool"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def check(visit: Visit) -> None:
        assert (await visit.ask(GET)).startswith(b"HTTP/1.1 204 ")

    visiting(tmp_path, app, check)
    assert steps == ["up", "ready", "down"]


def test_an_application_that_cannot_start_ends_the_entering(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    async def check(visit: Visit) -> None:
        raise AssertionError("not reached")

    with pytest.raises(ConnectorError, match="no database"):
        visiting(tmp_path, app, check)


def test_rules_of_the_program_are_not_replaced_by_the_edges(tmp_path: Path) -> None:
    async def check(visit: Visit) -> None:
        visit.edge.push(5, {"ingress": [{"service": "http_status:418"}]})
        await visit.edge.wait_event("configuration", applied=False)
        assert (await visit.ask(GET)).startswith(b"HTTP/1.1 404 ")

    visiting(tmp_path, [{"hostname": "a.test", "service": show}, {"service": "http_status:404"}], check)


def test_entering_tells_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(WireError):
        connector.Tunnel(token="nonsense")

    async def main() -> None:
        async with capnp.kj_loop(), DevEdge(Settings(tmp_path, tunnel_names=["test"])) as edge:
            where: dict[str, Any] = {"edge": [f"127.0.0.1:{edge.edge_address[1]}"], "cacert": str(edge.ca_file)}
            with pytest.raises(ConfigError, match="unknown protocol"):
                connector.Tunnel(token=edge.token(), protocol="h3", **where)
            with pytest.raises(ConfigError):
                connector.Tunnel(token=edge.token(), ingress=[{"hostname": "a.test", "service": "http://b"}], **where)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1), connector.Tunnel(token=edge.token(), edge=["127.0.0.1:9"]):
                    raise AssertionError("not reached")
            tunnel = connector.Tunnel(token=edge.token(), **where)
            async with tunnel:
                assert tunnel.connector_id
                assert edge.token()[30:] not in repr(tunnel)
            with pytest.raises(RuntimeError):
                await tunnel.__aenter__()

    run(main(), limit=60)


def test_a_refused_token_is_the_error(tmp_path: Path) -> None:
    async def main() -> None:
        async with capnp.kj_loop(), DevEdge(Settings(tmp_path, tunnel_names=["test"])) as edge:
            from connector.devedge.faults import parse_faults

            edge.settings.faults = parse_faults(["registration=permanent"])
            edge.roster.faults = edge.settings.faults
            where: dict[str, Any] = {"edge": [f"127.0.0.1:{edge.edge_address[1]}"], "cacert": str(edge.ca_file)}
            with pytest.raises(ConnectorError, match="permanent"):
                async with connector.Tunnel(token=edge.token(), protocol="http2", **where):
                    raise AssertionError("not reached")

    run(main(), limit=60)


def test_two_tunnels_of_one_program_share_what_must_be_shared(tmp_path: Path) -> None:
    async def main() -> None:
        async with kj_loop(), DevEdge(Settings(tmp_path, tunnel_names=["one", "two"])) as edge:
            where: dict[str, Any] = {"edge": [f"127.0.0.1:{edge.edge_address[1]}"], "cacert": str(edge.ca_file)}
            first = connector.Tunnel(token=edge.token("one"), ingress="http_status:418", **where)
            async with first:
                async with connector.Tunnel(token=edge.token("two"), ingress="http_status:404", **where) as second:
                    assert (first.ready_connections, second.ready_connections) == (1, 1)
                    get = GET.replace(b"localhost", b"one.localhost")
                    assert (await Visit(edge, first).ask(get)).startswith(b"HTTP/1.1 418 ")
                assert (await Visit(edge, first).ask(get)).startswith(b"HTTP/1.1 418 ")

    run(main(), limit=60)


def test_leaving_drains_what_is_in_flight(tmp_path: Path) -> None:
    begun = asyncio.Event()
    go = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        begun.set()
        await go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"served to the end"})

    asked: list[asyncio.Task[bytes]] = []

    async def check(visit: Visit) -> None:
        asked.append(asyncio.create_task(visit.ask(GET)))
        await begun.wait()
        asyncio.get_running_loop().call_later(0.2, go.set)  # while the tunnel is being left

    async def main() -> None:
        async with capnp.kj_loop(), DevEdge(Settings(tmp_path, tunnel_names=["test"])) as edge:
            where: dict[str, Any] = {"edge": [f"127.0.0.1:{edge.edge_address[1]}"], "cacert": str(edge.ca_file)}
            async with connector.Tunnel(token=edge.token(), ingress=slow, protocol="http2", **where) as tunnel:
                await check(Visit(edge, tunnel))
            assert b"served to the end" in await asked[0]
            await until(lambda: not edge.roster.links)

    run(main(), limit=60)
