"""Nobody keeps a borrowed buffer: both read buffers are overwritten each loop turn, and every byte is still right.

A real link (TLS, our engine, the dispatcher), real origins; responses of every framing, uploads, a WebSocket, a TCP
flow of the private network and a SOCKS flow, all at once, so that streams share reads in both directions.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from connector.proxy.dispatch import Dispatcher
from connector.proxy.ingress import parse_remote_config
from connector.transport import streams, tls_stream
from connector.transport.h2 import dial_h2
from connector.transport.streams import READ_SIZE
from connector.transport.tls import edge_context
from tests.proxy.rig import CONNECTOR_ID
from tests.proxy.test_socks import GREETING, LOOPBACK, connect
from tests.proxy.ws_client import frame
from tests.support.aio import run, until
from tests.support.mini_edge import EdgeStream, MiniEdge, MiniEdgeConnection
from tests.support.raw_origin import RawConnection, RawOrigin
from tests.support.stream_ends import Loop, both_loops

DOWN = random.Random(1).randbytes(600_001)
UP = random.Random(2).randbytes(400_003)
JUNK = b"\xaa" * READ_SIZE
UPGRADE = (
    (b"cf-cloudflared-proxy-connection-upgrade", b"websocket"),
    (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="),
    (b"sec-websocket-version", b"13"),
)


class Scribbler:
    """Overwrites what streams lend, once a loop turn."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.turns = 0
        self._over = False
        self._scribble()

    def _scribble(self) -> None:
        self.turns += 1
        streams._RAW.view[:] = JUNK
        tls_stream._PLAIN.view[:] = JUNK
        if not self._over:
            self._loop.call_soon(self._scribble)

    def stop(self) -> None:
        self._over = True


def pieces(data: bytes) -> list[bytes]:
    """Cut `data` into pieces of 1 byte to 40,000, in an order that is the same each time."""
    sizes, at, cut = random.Random(3), 0, []
    while at < len(data):
        size = min(sizes.choice((1, 7, 100, 1_460, 16_384, 40_000)), len(data) - at)
        cut.append(data[at : at + size])
        at += size
    return cut


def server_frames(data: bytes) -> bytes:
    return b"".join(b"\x82\x7e" + len(part).to_bytes(2, "big") + part for part in pieces(data))


async def serve(connection: RawConnection) -> None:
    """/length, /chunked and /close answer DOWN; /ws too, in frames; /echo answers the request's body."""
    while True:
        request = await connection.read_request()
        head, _, body = request.partition(b"\r\n\r\n")
        path = head.split(b" ")[1]
        begin = b"HTTP/1.1 200 OK\r\n"
        if path == b"/ws":
            connection.send(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
                + server_frames(DOWN)
            )
            assert await connection.read_exactly(len(UP)) == UP
            connection.send(b"\x8a\x00")
            await connection.closed()
            return
        if path == b"/length":
            connection.send(begin + b"Content-Length: %d\r\n\r\n" % len(DOWN) + DOWN)
        elif path == b"/chunked":
            connection.send(begin + b"Transfer-Encoding: chunked\r\n\r\n")
            for part in pieces(DOWN):
                connection.send(b"%x\r\n%s\r\n" % (len(part), part))
            connection.send(b"0\r\n\r\n")
        elif path == b"/close":
            connection.send(begin + b"Connection: close\r\n\r\n" + DOWN)
            return
        else:
            if b"chunked" in head:
                body = unchunk(body)
            connection.send(begin + b"Content-Length: %d\r\n\r\n" % len(body) + body)


def unchunk(data: bytes) -> bytes:
    body = bytearray()
    while True:
        line, _, data = data.partition(b"\r\n")
        size = int(line, 16)
        if not size:
            return bytes(body)
        body += data[:size]
        data = data[size + 2 :]


async def echo(connection: RawConnection) -> None:
    while data := await connection.read_some():
        connection.send(data)


def upload(stream: EdgeStream, data: bytes = UP, *, end: bool = False, framed: bool = False) -> None:
    for part in pieces(data):
        stream.send(frame(2, part) if framed else part)
    if end:
        stream.send(b"", end=True)


def payload(data: bytearray) -> bytes:
    """Return what unmasked frames carry, as far as they are whole."""
    found, at = bytearray(), 0
    while at + 2 <= len(data):
        size, head = data[at + 1], 2
        if size == 126:
            size, head = int.from_bytes(data[at + 2 : at + 4], "big"), 4
        found += data[at + head : at + head + size]
        at += head + size
    return bytes(found)


@both_loops
def test_nobody_keeps_a_borrowed_buffer(tmp_path: Path, loop: Loop) -> None:
    async def passes(peer: MiniEdgeConnection, port: int) -> None:
        responses = [
            peer.open([], path=b"/" + path, end=True) for path in (b"length", b"chunked", b"close") for _ in range(2)
        ]
        sized = peer.open([(b"content-length", b"%d" % len(UP))], method=b"POST", path=b"/echo")
        unsized = peer.open([], method=b"POST", path=b"/echo")
        websocket = peer.open([*UPGRADE], path=b"/ws")
        flow = peer.open([(b"cf-cloudflared-proxy-src", b"tcp")], host=b"127.0.0.1:%d" % port)
        socks = peer.open([*UPGRADE], host=b"socks.example.com")
        socks.send(frame(2, GREETING + connect("127.0.0.1", port) + b"first"))
        for stream in (sized, unsized):
            upload(stream, end=True)
        for stream in (websocket, flow):
            upload(stream)
        upload(socks, framed=True)
        await until(lambda: all(stream.ended.is_set() for stream in (*responses, sized, unsized)), limit=50)
        assert all(stream.data == DOWN for stream in responses)
        assert sized.data == UP
        assert unsized.data == UP
        expected = server_frames(DOWN) + b"\x8a\x00"
        await until(lambda: len(websocket.data) >= len(expected))
        assert websocket.data == expected
        await until(lambda: len(flow.data) >= len(UP))
        assert flow.data == UP
        negotiated = 2 + 10
        await until(lambda: len(payload(socks.data)) >= negotiated + 5 + len(UP))
        assert payload(socks.data)[negotiated:] == b"first" + UP

    async def main() -> None:
        async with RawOrigin(serve) as origin, RawOrigin(echo) as plain, MiniEdge(tmp_path) as edge:
            rules = [
                {"hostname": "socks.example.com", "service": "socks-proxy", "originRequest": LOOPBACK},
                {"service": origin.url},
            ]
            dispatcher = Dispatcher(
                ingress=parse_remote_config(1, {"ingress": rules}),
                connector_id=CONNECTOR_ID,
                loop=asyncio.get_running_loop(),
            )
            link = await dial_h2(
                "127.0.0.1",
                edge.port,
                context=edge_context(edge.cacert),
                accept=dispatcher.accept,
                batch=dispatcher.writes,
            )
            scribbler = Scribbler()
            try:
                await passes(await edge.accepted(), plain.port)
            finally:
                scribbler.stop()
                link.abort()
                await link.wait_closed()
                await dispatcher.close()
            assert scribbler.turns > 10

    run(main(), loop_factory=loop)
