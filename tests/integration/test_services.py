"""Every kind of service through a whole tunnel, over HTTP/2 and over QUIC: what a visitor sees of each."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import websockets
from aiohttp import web

from tests.support.access_keys import AUDIENCE, KeyServer, key_server
from tests.support.aio import run
from tests.support.certs import Authority
from tests.support.origins import CHUNK, free_port, http_origin
from tests.support.processes import Child, dev_edge, edge_token, tunnel
from tests.support.tcp_servers import answer_with_what_comes_first, count_then_answer, echo, tcp_server

PROTOCOLS = ["http2", "quic"]
MORE = web.AppKey("more", asyncio.Event)
FLOOD = 64 << 20
GROWTH = 24 << 20
"""Bytes that the connector may grow by while one side does not read."""
COUNTED: dict[str, int] = {}
"""What the origin (a thread of this process) has written, and the visitor has sent."""


async def _events(request: web.Request) -> web.StreamResponse:
    """One event now, the next when the visitor has asked for it: nothing may wait for more."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for number in range(3):
        await response.write(b"data: %d\n\n" % number)
        await request.app[MORE].wait()
        request.app[MORE].clear()
    return response


async def _more(request: web.Request) -> web.Response:
    request.app[MORE].set()
    return web.Response(text="ok")


async def _poll(request: web.Request) -> web.Response:
    await request.app[MORE].wait()
    request.app[MORE].clear()
    return web.Response(text="at last")


def _application() -> web.Application:
    data = bytes(range(256)) * 400

    async def ranged(request: web.Request) -> web.Response:
        part = request.http_range
        if part.start is None:
            return web.Response(body=data, headers={"Accept-Ranges": "bytes"})
        found = data[part.start : part.stop]
        headers = {"Content-Range": f"bytes {part.start}-{part.start + len(found) - 1}/{len(data)}"}
        return web.Response(status=206, body=found, headers=headers)

    async def upload(request: web.Request) -> web.Response:
        return web.json_response({"size": len(await request.read()), "expect": request.headers.get("Expect")})

    async def talk(request: web.Request) -> web.WebSocketResponse:
        seen = web.WebSocketResponse(protocols=("mqtt", "mqttv3.1"), autoping=False)
        await seen.prepare(request)
        await seen.send_str(json.dumps(request.headers.getall("Sec-WebSocket-Protocol", [])))
        async for message in seen:
            await seen.send_str(f"{message.type.name} {len(message.data or b'')}")
        return seen

    async def flood(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        COUNTED["flood"] = 0
        while COUNTED["flood"] < FLOOD:
            await response.write(CHUNK)
            COUNTED["flood"] += len(CHUNK)
        return response

    async def sink(request: web.Request) -> web.Response:
        await request.app[MORE].wait()
        request.app[MORE].clear()
        size = 0
        async for chunk in request.content.iter_any():
            size += len(chunk)
        return web.Response(text=str(size))

    app = web.Application(client_max_size=1 << 24)
    app.router.add_get("/flood", flood)
    app.router.add_route("*", "/sink", sink)

    async def prepare(app: web.Application) -> None:
        app[MORE] = asyncio.Event()

    app.on_startup.append(prepare)
    app.router.add_get("/events", _events)
    app.router.add_get("/more", _more)
    app.router.add_get("/poll", _poll)
    app.router.add_get("/range", ranged)
    app.router.add_route("*", "/upload", upload)
    app.router.add_get("/talk", talk)
    return app


class Everything:
    """One tunnel with a rule of each kind, by hostname."""

    def __init__(
        self, edge: Child, run: Child, port: int, ca: Path, keys: KeyServer, forwarded: dict[str, int]
    ) -> None:
        self.edge = edge
        self.run = run
        self.port = port
        self.keys = keys
        self.forwarded = forwarded
        self.echoes = 0
        self.origin = 0
        self.ca = ca
        self.context = ssl.create_default_context(cafile=str(ca))
        self.context.check_hostname = False

    def get(self, host: str, target: str, method: str = "GET", **kwargs: Any) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPSConnection("localhost", self.port, context=self.context, timeout=60)
        headers = {"Host": host, **kwargs.pop("headers", {})}
        connection.request(method, target, headers=headers, **kwargs)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response, body

    def websocket(self, host: str, path: str = "/", **kwargs: Any) -> Any:
        return websockets.connect(
            f"wss://{host}:{self.port}{path}",
            host="127.0.0.1",
            port=self.port,
            ssl=self.context,
            compression=None,
            max_size=None,
            open_timeout=60,
            ping_interval=None,
            **kwargs,
        )


def _in_thread(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run `main` on a loop of its own; returns what ends it."""
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def work() -> None:
        loop.run_until_complete(main(stop))
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def end() -> None:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)

    return end


def _keys(stack: ExitStack) -> KeyServer:
    ready = threading.Event()
    found: list[KeyServer] = []

    async def main(stop: asyncio.Event) -> None:
        async with key_server("first") as keys:
            found.append(keys)
            ready.set()
            await stop.wait()

    stack.callback(_in_thread(main))
    assert ready.wait(20)
    return found[0]


def _everywhere(state: Path, stack: ExitStack) -> dict[str, str]:
    """Serve the application over TLS and on unix sockets too; return the services, by name."""
    context = Authority().server_context(state, "origin.internal")
    ready, ports = threading.Event(), [free_port()]
    paths = {"unix": str(state / "o.sock"), "unix-tls": str(state / "s.sock")}

    async def main(stop: asyncio.Event) -> None:
        runner = web.AppRunner(_application())
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", ports[0], ssl_context=context).start()
        await web.UnixSite(runner, paths["unix"]).start()
        await web.UnixSite(runner, paths["unix-tls"], ssl_context=context).start()
        ready.set()
        await stop.wait()
        await runner.cleanup()

    stack.callback(_in_thread(main))
    assert ready.wait(20)
    secure = f"127.0.0.1:{ports[0]}"
    return {"https": f"https://{secure}", "wss": f"wss://{secure}", "unix": f"unix:{paths['unix']}",
            "unix-tls": f"unix+tls:{paths['unix-tls']}"}  # fmt: skip


OURS = (
    *(sys.executable, "-m", "connector", "run", "--edge", "{edge}", "--cacert", "{ca}", "--output", "json"),
    *("--token-file", "{token_file}", "--protocol", "{protocol}", "--loglevel", "debug"),
)


@contextmanager
def everything(state: Path, protocol: str, command: tuple[str, ...] = OURS) -> Iterator[Everything]:
    """A dev edge and a connector (by its command line) with one rule of each kind."""
    with ExitStack() as stack:
        origin = stack.enter_context(http_origin(_application))
        echoes = stack.enter_context(tcp_server(echo))
        counts = stack.enter_context(tcp_server(count_then_answer))
        introduced = stack.enter_context(tcp_server(answer_with_what_comes_first))
        keys = _keys(stack)
        forwarded = {"echo": free_port(), "count": free_port(), "nobody": free_port()}
        targets = {"echo": echoes, "count": counts, "nobody": free_port()}
        file = state / "edge.toml"
        file.write_text(
            f"[tunnels.test]\ningress = {_toml(_rules(origin, echoes, introduced, _everywhere(state, stack)))}\n"
        )
        forwards = [
            part
            for name, port in forwarded.items()
            for part in ("--tcp", f"127.0.0.1:{port}=127.0.0.1:{targets[name]}")
        ]
        edge, listening = stack.enter_context(dev_edge(state, "--config", str(file), *forwards))
        token = state / "token"
        token.write_text(edge_token(state))
        token.chmod(0o600)
        values = {"edge": listening["edge"], "ca": listening["ca"], "token_file": str(token), "protocol": protocol}
        parts = [part.format(**values) for part in command]
        run_ = stack.enter_context(Child(*parts, env={"CONNECTOR_ACCESS_KEYS_URL": keys.url}))
        assert edge.event("registered")["protocol"] == protocol
        edge.event("configuration", applied=True)
        it = Everything(edge, run_, int(listening["public"].rpartition(":")[2]), Path(listening["ca"]), keys, forwarded)
        it.echoes, it.origin = echoes, origin
        yield it


def _rules(origin: int, echoes: int, introduced: int, others: dict[str, str]) -> list[dict[str, Any]]:
    def rule(name: str, service: str, **options: Any) -> dict[str, Any]:
        return {"hostname": f"{name}.test", "service": service, "originRequest": options}

    access = {"required": True, "teamName": "team", "audTag": [AUDIENCE]}
    return [
        rule("hello", "hello_world"),
        rule("tcp", f"tcp://127.0.0.1:{echoes}"),
        rule("bastion", "bastion"),
        rule("socks", "socks-proxy", ipRules=[{"prefix": "127.0.0.0/8", "ports": [echoes], "allow": True}]),
        rule("access", "hello_world", access=access),
        rule("proxy", f"http://127.0.0.1:{introduced}", proxyProtocol="v2"),
        rule("mqtt", f"ws://127.0.0.1:{origin}", wsSubprotocols=["mqtt"], wsKeepAlive=1),
        *(rule(name, service, noTLSVerify=True) for name, service in others.items()),
        rule("ws", f"ws://127.0.0.1:{origin}"),
        *(rule(name, f"{name}://127.0.0.1:{echoes}") for name in ("ssh", "rdp", "smb")),
        rule("status", "http_status:418"),
        {"service": f"http://127.0.0.1:{origin}"},
    ]


@pytest.fixture(scope="module", params=PROTOCOLS)
def up(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Everything]:
    with everything(tmp_path_factory.mktemp("state"), str(request.param)) as it:
        yield it


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def test_the_test_site(up: Everything) -> None:
    response, page = up.get("hello.test", "/page?x=1", headers={"X-Own": "<1>"})
    assert response.status == 200
    assert b"/page?x=1" in page
    assert b"&lt;1&gt;" in page
    assert up.get("hello.test", "/_health")[1] == b"ok"
    response, nothing = up.get("hello.test", "/uptime", method="HEAD")
    assert (response.status, nothing) == (200, b"")

    async def main() -> None:
        async with up.websocket("hello.test", "/ws") as talk:
            await talk.send("grüß")
            assert await talk.recv() == "grüß"
            await talk.send(b"x" * 300_000)
            assert await talk.recv() == b"x" * 300_000
            await (await talk.ping(b"there?"))

    run(main(), limit=90)


def test_tcp_over_websocket(up: Everything) -> None:
    async def main() -> None:
        data = os.urandom(1_000_000)
        async with up.websocket("tcp.test") as talk:
            await talk.send(data)
            got = bytearray()
            while len(got) < len(data):
                message = await talk.recv()
                assert len(message) <= 16 * 1024
                got += message
            assert got == data
            await talk.send("text is dropped")
            await talk.send(b"end")
            assert await talk.recv() == b"end"

    run(main(), limit=90)


@pytest.mark.parametrize("name", ["ws", "https", "wss", "unix", "unix-tls"])
def test_http_services_take_requests_and_websockets(up: Everything, name: str) -> None:
    response, body = up.get(f"{name}.test", "/range", headers={"Range": "bytes=1-3"})
    assert (response.status, body) == (206, b"\x01\x02\x03")

    async def main() -> None:
        async with up.websocket(f"{name}.test", "/talk") as talk:
            assert await talk.recv() == "[]"
            await talk.send(b"12345")
            assert await talk.recv() == "BINARY 5"

    run(main(), limit=90)


def test_named_tcp_services_and_a_fixed_status(up: Everything) -> None:
    async def main() -> None:
        for name in ("ssh", "rdp", "smb"):
            async with up.websocket(f"{name}.test") as talk:
                await talk.send(b"SSH-2.0-x\r\n")
                assert await talk.recv() == b"SSH-2.0-x\r\n"

    run(main(), limit=90)
    response, body = up.get("status.test", "/")
    assert (response.status, body) == (418, b"")


def test_bastion(up: Everything) -> None:
    async def main() -> None:
        jump = {"Cf-Access-Jump-Destination": f"127.0.0.1:{up.echoes}"}
        async with up.websocket("bastion.test", additional_headers=jump) as talk:
            await talk.send(b"hi")
            assert await talk.recv() == b"hi"
        with pytest.raises(websockets.InvalidStatus) as refused:
            await up.websocket("bastion.test")
        assert refused.value.response.status_code == 502

    run(main(), limit=90)
    failed = up.run.message("Request failed")
    assert "Did not receive final destination" in failed["error"]
    assert failed["cause"] == "request"


def test_socks(up: Everything) -> None:
    async def main() -> None:
        async with up.websocket("socks.test") as talk:
            await talk.send(b"\x05\x01\x00")
            assert await talk.recv() == b"\x05\x00"
            await talk.send(b"\x05\x01\x00\x03\x09localhost" + struct.pack(">H", up.echoes))
            assert (await talk.recv())[:4] == b"\x05\x00\x00\x01"
            await talk.send(b"through")
            assert await talk.recv() == b"through"
        async with up.websocket("socks.test") as talk:
            await talk.send(b"\x05\x01\x00" + b"\x05\x01\x00\x01\x7f\0\0\1\0\x16")
            assert await talk.recv() == b"\x05\x00"
            assert await talk.recv() == b"\x05\x02\x00\x01\x7f\0\0\1\0\x16"
            with pytest.raises(websockets.ConnectionClosedOK):
                await talk.recv()

    run(main(), limit=90)


def test_access(up: Everything) -> None:
    header = "Cf-Access-Jwt-Assertion"
    assert up.get("access.test", "/_health")[0].status == 403
    assert up.get("access.test", "/_health", headers={header: up.keys.token().decode()})[1] == b"ok"
    assert up.get("access.test", "/_health", headers={header: up.keys.token(aud=["x"]).decode()})[0].status == 403
    assert up.get("access.test", "/_health", headers={header: up.keys.token(exp=1).decode()})[0].status == 502
    assert up.keys.asked == ["/cdn-cgi/access/certs"]


def test_proxy_protocol(up: Everything) -> None:
    response, body = up.get("proxy.test", "/")
    assert response.status == 200
    head = bytes.fromhex(body.decode())
    assert head[:16] == b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c"
    assert socket.inet_ntoa(head[16:20]) == "127.0.0.1"


def test_a_list_of_subprotocols_becomes_the_one_that_the_broker_takes(up: Everything) -> None:
    async def main() -> None:
        async with up.websocket("mqtt.test", "/talk", subprotocols=["mqttv3.1", "mqtt"]) as talk:
            assert talk.subprotocol == "mqtt"
            assert json.loads(await talk.recv()) == ["mqtt"]
        async with up.websocket("localhost", "/talk", subprotocols=["mqttv3.1", "mqtt"]) as talk:
            assert talk.subprotocol == "mqttv3.1"
            assert json.loads(await talk.recv()) == ["mqttv3.1,mqtt"] or talk.subprotocol

    run(main(), limit=90)


def test_an_idle_websocket_is_pinged_and_the_origin_sees_nothing_of_it(up: Everything) -> None:
    async def main() -> None:
        pinged = asyncio.Event()

        class Talk(websockets.ClientConnection):
            def data_received(self, data: bytes) -> None:
                if data.find(b"\x89\x08idle") >= 0:
                    pinged.set()
                super().data_received(data)

        async with up.websocket("mqtt.test", "/talk", create_connection=Talk) as talk:
            assert json.loads(await talk.recv()) == []
            async with asyncio.timeout(60):
                await pinged.wait()
            await talk.pong(b"unasked")
            assert await talk.recv() == "PONG 7", "the first pong that the origin saw"

    run(main(), limit=90)


def test_private_tcp_with_half_close(up: Everything) -> None:
    with socket.create_connection(("127.0.0.1", up.forwarded["echo"]), timeout=60) as client:
        client.sendall(b"raw")
        assert client.recv(3, socket.MSG_WAITALL) == b"raw"
    with socket.create_connection(("127.0.0.1", up.forwarded["count"]), timeout=60) as client:
        client.sendall(b"x" * 200_000)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100, socket.MSG_WAITALL) == b"200000 bytes"
    with socket.create_connection(("127.0.0.1", up.forwarded["nobody"]), timeout=60) as client:
        try:
            assert client.recv(1) == b""
        except ConnectionResetError:
            pass
    up.run.wait_for(
        lambda e: e.get("message") == "Request failed" and e.get("cause") == "refused", what="a refused flow", limit=40
    )


def test_events_arrive_one_by_one(up: Everything) -> None:
    connection = http.client.HTTPSConnection("localhost", up.port, context=up.context, timeout=60)
    connection.request("GET", "/events")
    response = connection.getresponse()
    for number in range(3):
        assert response.readline() == b"data: %d\n" % number
        assert response.readline() == b"\n"
        up.get("localhost", "/more")
    assert response.read() == b""
    connection.close()


def test_long_polling(up: Everything) -> None:
    connection = http.client.HTTPSConnection("localhost", up.port, context=up.context, timeout=60)
    connection.request("GET", "/poll")
    up.edge.event("request", path="/poll")
    up.get("localhost", "/more")
    assert connection.getresponse().read() == b"at last"
    connection.close()


def test_continue_head_and_range(up: Everything) -> None:
    response, body = up.get("localhost", "/upload", "PUT", body=b"z" * 70_000, headers={"Expect": "100-continue"})
    assert json.loads(body)["size"] == 70_000
    response, body = up.get("localhost", "/range", "HEAD")
    assert (response.status, body, response.headers["Content-Length"]) == (200, b"", str(256 * 400))
    response, body = up.get("localhost", "/range", headers={"Range": "bytes=250-300"})
    assert (response.status, body) == (206, (bytes(range(256)) * 400)[250:301])
    assert response.headers["Content-Range"] == f"bytes 250-300/{256 * 400}"


def stalled(name: str) -> int:
    """Wait until a count stands still; return it."""
    still, before = 0, -1
    while still < 20:
        threading.Event().wait(0.05)
        still = still + 1 if COUNTED.get(name, 0) == before > 0 else 0
        before = COUNTED.get(name, 0)
    return before


def test_a_visitor_that_does_not_read_stops_the_origin(up: Everything) -> None:
    memory = up.run.memory()
    client = socket.create_connection(("127.0.0.1", up.port), timeout=60)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    with up.context.wrap_socket(client, server_hostname="localhost") as secure:
        secure.sendall(b"GET /flood HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert secure.recv(12, 0) == b"HTTP/1.1 200"
        assert 0 < stalled("flood") < FLOOD
        assert up.run.memory("VmHWM") - memory < GROWTH
        got = 0
        while data := secure.recv(1 << 18):
            got += len(data)
        assert got > FLOOD


def test_an_origin_that_does_not_read_stops_the_visitor(up: Everything) -> None:
    memory = up.run.memory()
    COUNTED["sent"] = 0
    result: list[bytes] = []

    def body() -> Iterator[bytes]:
        for _ in range(FLOOD // len(CHUNK)):
            yield CHUNK
            COUNTED["sent"] += len(CHUNK)

    def send() -> None:
        headers = {"Content-Length": str(FLOOD)}
        result.append(up.get("localhost", "/sink", "PUT", body=body(), headers=headers)[1])

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    up.edge.event("request", path="/sink")
    assert 0 < stalled("sent") < FLOOD
    assert up.run.memory("VmHWM") - memory < GROWTH
    # Past the tunnel: over QUIC a slow origin holds the others of its link up (ARCHITECTURE.md, Differences).
    direct = http.client.HTTPConnection("127.0.0.1", up.origin, timeout=60)
    direct.request("GET", "/more")
    assert direct.getresponse().read() == b"ok"
    direct.close()
    sender.join(60)
    assert result == [str(FLOOD).encode()]


def test_a_visitor_that_leaves_is_no_error(up: Everything) -> None:
    client = socket.create_connection(("127.0.0.1", up.port), timeout=60)
    with up.context.wrap_socket(client, server_hostname="localhost") as secure:
        secure.sendall(b"GET /poll?left HTTP/1.1\r\nHost: localhost\r\n\r\n")
        up.edge.event("request", path="/poll")
    line = up.run.wait_for(lambda e: e.get("cut"), what="the end of an abandoned request", limit=40)
    assert line["level"] == "debug"
    assert not [e for e in up.run.events if e.get("message") == "Request failed" and e.get("path") == "/poll"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_websockets_get_1001_at_the_end_of_the_grace_period(tmp_path: Path, protocol: str) -> None:
    args = ("--grace-period", "1s", "--protocol", protocol)
    with http_origin() as port, tunnel(tmp_path, f"http://127.0.0.1:{port}", run_args=args) as both:

        async def main() -> None:
            context = ssl.create_default_context(cafile=str(both.ca))
            talks = [
                await websockets.connect(f"wss://localhost:{both.port}/ws", ssl=context, open_timeout=60)
                for _ in range(20)
            ]
            for talk in talks:
                await talk.send("there")
                assert await talk.recv() == "there"
            both.connector.signal(signal.SIGTERM)
            for talk in talks:
                with pytest.raises(websockets.ConnectionClosed):
                    await talk.recv()
                assert talk.close_code == 1001

        run(main(), limit=90)
        assert both.connector.wait() == 0
        assert not [e for e in both.connector.events if "cut off" in e.get("message", "")]
