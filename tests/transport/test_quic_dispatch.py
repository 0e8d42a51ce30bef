"""The proxy over QUIC links: the same dispatcher and origins as over HTTP/2."""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path
from uuid import UUID

from aiohttp import WSMsgType, web

from connector.proxy.dispatch import Dispatcher
from connector.proxy.ingress import parse_remote_config
from connector.transport.quic import dial_quic
from connector.transport.quic_trust import quic_context
from tests.support.aio import until
from tests.support.mini_quic_edge import MiniQuicEdge
from tests.support.origins import http_origin
from tests.transport.quic_rig import everywhere, run_on

KEY = [
    ("HttpHeader:Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ("HttpHeader:Sec-WebSocket-Version", "13"),
    ("HttpHeader:Upgrade", "websocket"),
    ("HttpHeader:Connection", "Upgrade"),
]


async def _serve(request: web.Request) -> web.StreamResponse:
    if request.path == "/ws":
        talk = web.WebSocketResponse()
        await talk.prepare(request)
        async for message in talk:
            if message.type is WSMsgType.BINARY:
                await talk.send_bytes(message.data)
        return talk
    if request.path == "/early":
        return web.Response(status=413, text="too large")
    body = await request.read()
    return web.json_response(
        {"method": request.method, "host": request.host, "size": len(body), "headers": sorted(request.headers)},
        headers={"X-Origin": "yes"},
    )


def _application() -> web.Application:
    application = web.Application(client_max_size=0)
    application.router.add_route("*", "/{tail:.*}", _serve)
    return application


@everywhere
def test_dispatcher_over_quic(tmp_path: Path, engine: str, loop: str) -> None:
    async def main(port: int) -> None:
        rules = {
            "ingress": [
                {"hostname": "dead.example.com", "service": "http://127.0.0.1:9"},
                {"hostname": "gone.example.com", "service": "http_status:410"},
                {"service": f"http://127.0.0.1:{port}"},
            ]
        }
        dispatcher = Dispatcher(
            ingress=parse_remote_config(1, rules), connector_id=UUID(int=1), loop=asyncio.get_running_loop()
        )
        async with MiniQuicEdge(tmp_path) as edge:
            link = await dial_quic(
                "127.0.0.1", edge.port, context=quic_context(edge.cacert), accept=dispatcher.accept, engine=engine
            )
            connection = await edge.accepted()
            host = [("HttpHost", "app.example.com")]

            get = connection.request("https://app.example.com/hi?x=1", host)
            error, metadata = await get.response()
            assert error == ""
            assert metadata[0] == ("HttpStatus", "200")
            assert ("HttpHeader:X-Origin", "yes") in metadata
            assert b'"host": "app.example.com"' in await get.body()

            data = gzip.compress(bytes(100_000))
            for framing in (("HttpHeader:Content-Length", str(len(data))), ("HttpHeader:Transfer-Encoding", "chunked")):
                post = connection.request("/post", [("HttpMethod", "POST"), framing, *host])
                post.send(data, end=True)
                assert (await post.response())[0] == ""
                assert f'"size": {len(data)}'.encode() in await post.body()

            long = ("HttpHeader:Content-Length", "9000000")
            early = connection.request("/early", [("HttpMethod", "POST"), long, *host])
            early.send(bytes(50_000))
            assert (await early.response())[1][0] == ("HttpStatus", "413")
            assert await early.body() == b"too large"
            await early.until(lambda: early.stopped == 0)

            head = connection.request("/head", [("HttpMethod", "HEAD"), *host])
            assert (await head.response())[1][0] == ("HttpStatus", "200")
            assert await head.body() == b""

            dead = connection.request("/", [("HttpHost", "dead.example.com")])
            error, metadata = await dead.response()
            assert error
            assert metadata == []
            assert await dead.body() == b""

            gone = connection.request("/", [("HttpHost", "gone.example.com")])
            assert await gone.response() == ("", [("HttpStatus", "410")])

            talk = connection.request("/ws", [*KEY, *host], kind="websocket")
            error, metadata = await talk.response()
            assert metadata[0] == ("HttpStatus", "101")
            assert any(key == "HttpHeader:Sec-Websocket-Accept" for key, _ in metadata)
            talk.send(b"\x82\x84\0\0\0\0ping")
            assert await talk.read(6) == b"\x82\x04ping"
            talk.send(b"\x88\x80\0\0\0\0", end=True)
            await talk.until(talk.ended.is_set)

            cut = connection.request("/ws", [*KEY, *host], kind="websocket")
            await cut.response()
            cut.send_reset()
            await until(lambda: dispatcher.active == 0)
            await until(lambda: link.open_streams == 1)
            link.close()
            await link.wait_closed()
        await dispatcher.close()

    with http_origin(_application) as port:
        run_on(loop, main(port))
