"""Independent servers behind the proxy: aiohttp, websockets, Mosquitto."""

from __future__ import annotations

from pathlib import Path

import pytest
import websockets
from aiohttp import web
from websockets.asyncio.server import serve
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.uri import parse_uri

from connector.protocol.ports import RequestKind
from tests.proxy.conftest import Runner
from tests.proxy.rig import Rig, rig
from tests.support.aio import until
from tests.support.memory_port import MemoryPort
from tests.support.origins import mosquitto
from tests.support.processes import MOSQUITTO


def test_aiohttp(on_loop: Runner) -> None:
    async def hello(request: web.Request) -> web.StreamResponse:
        return web.json_response(
            {"host": request.host, "path": request.path_qs, "ua": request.headers.get("User-Agent")}
        )

    async def upload(request: web.Request) -> web.StreamResponse:
        size = 0
        async for chunk in request.content.iter_any():
            size += len(chunk)
        return web.Response(text=str(size))

    async def download(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(64):
            await response.write(b"d" * 65_536)
        await response.write_eof()
        return response

    async def main() -> None:
        app = web.Application(client_max_size=1 << 30)
        app.add_routes([web.get("/hello", hello), web.post("/upload", upload), web.get("/download", download)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        number = runner.addresses[0][1]
        try:
            async with rig(f"http://127.0.0.1:{number}") as it:
                port = it.open(target="/hello?x=1", headers=[(b"user-agent", b"test")])
                assert b'"path": "/hello?x=1"' in await port.whole()
                for length in (3_000_000, -1):
                    port = it.open("POST", "/upload", length=length)
                    await port.send_all(b"u" * 3_000_000)
                    assert await port.whole() == b"3000000"
                port = it.open(target="/download")
                assert len(await port.whole()) == 64 * 65_536
                port = it.open("HEAD", "/hello")
                await port.whole()
                assert port.body == b""
                assert int(port.header(b"content-length") or 0) > 0
                port = it.open(target="/nowhere")
                await port.whole()
                assert port.status == 404
                assert it.pool().dialled == 1
                assert it.dispatcher.errors == 0
        finally:
            await runner.cleanup()

    on_loop(main())


class Client:
    """The `websockets` library's sans-I/O client on a stream of the memory edge: the eyeball's end of a WebSocket."""

    def __init__(self, it: Rig, target: str, subprotocol: str) -> None:
        uri = parse_uri(f"ws://app.example.com{target}")
        self.protocol = ClientProtocol(uri, subprotocols=[websockets.Subprotocol(subprotocol)])
        opening = self.protocol.connect()
        hidden = {"connection", "upgrade", "sec-websocket-version", "host"}
        headers = [(k.lower().encode(), v.encode()) for k, v in opening.headers.raw_items() if k.lower() not in hidden]
        self.protocol.send_request(opening)
        self.protocol.data_to_send()
        self.port: MemoryPort = it.open("GET", target, kind=RequestKind.WEBSOCKET, headers=headers)
        self.read = 0

    async def connected(self) -> None:
        assert await self.port.head() == 101
        lines = b"".join(b"%b: %b\r\n" % pair for pair in self.port.headers)
        self.protocol.receive_data(b"HTTP/1.1 101 Switching Protocols\r\n" + lines + b"\r\n")
        self.protocol.events_received()
        assert self.protocol.handshake_exc is None

    def send(self, data: bytes) -> None:
        self.protocol.send_binary(data)
        self.flush()

    def flush(self) -> None:
        for data in self.protocol.data_to_send():
            if data:
                self.port.send(data)

    async def message(self) -> bytes:
        """Return the next binary message (unfragmented, as both servers send them)."""
        while True:
            await self.port.received(self.read + 1)
            self.protocol.receive_data(bytes(self.port.body[self.read :]))
            self.read = len(self.port.body)
            self.flush()
            for event in self.protocol.events_received():
                assert isinstance(event, websockets.frames.Frame)
                if event.opcode is Opcode.BINARY:
                    return bytes(event.data)


def test_websockets(on_loop: Runner) -> None:
    async def echo(connection: websockets.asyncio.server.ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async def main() -> None:
        async with serve(echo, "127.0.0.1", 0, subprotocols=[websockets.Subprotocol("mqtt")], max_size=None) as server:
            number = next(iter(server.sockets)).getsockname()[1]
            async with rig(f"ws://127.0.0.1:{number}") as it:
                client = Client(it, "/", "mqtt")
                await client.connected()
                assert client.port.header(b"sec-websocket-protocol") == b"mqtt"
                for size in (0, 1, 125, 126, 65_535, 65_536, 300_000):
                    client.send(b"m" * size)
                    assert await client.message() == b"m" * size
                client.protocol.send_close(1000)
                client.flush()
                client.port.send_eof()
                await client.port.whole()
                await until(lambda: it.dispatcher.active == 0)

    on_loop(main())


@pytest.mark.broker
@pytest.mark.skipif(not MOSQUITTO, reason="no mosquitto binary on this machine (apt install mosquitto)")
def test_mosquitto(on_loop: Runner, tmp_path: Path) -> None:
    """CONNECT, SUBSCRIBE, PUBLISH to oneself and DISCONNECT through the proxy, in MQTT 3.1.1 bytes."""

    async def main(number: int) -> None:
        async with rig(f"http://127.0.0.1:{number}") as it:
            client = Client(it, "/mqtt", "mqtt")
            await client.connected()
            client.send(b"\x10\x16\x00\x04MQTT\x04\xc2\x00\x3c\x00\x04test\x00\x01u\x00\x01p")
            assert await client.message() == b"\x20\x02\x00\x00"
            client.send(b"\x82\x08\x00\x01\x00\x03a/b\x00")
            assert await client.message() == b"\x90\x03\x00\x01\x00"
            client.send(b"\x30\x0a\x00\x03a/bhello")
            assert await client.message() == b"\x30\x0a\x00\x03a/bhello"
            client.send(b"\xe0\x00")
            await client.port.whole()
            client.port.send_eof()
            await until(lambda: it.dispatcher.active == 0)
            assert it.dispatcher.errors == 0

    with mosquitto(tmp_path) as number:
        on_loop(main(number))
