"""The origin of all rows: a bare HTTP/1.1 server in a process of its own (`python -m benchmarks.origin`).

Owns: answers that are bytes made beforehand, an echo after an upgrade, a source and a sink.
In: requests. Out: the listening ports, as JSON, as the first line on stdout.
Never: does more than a row needs; whatever it costs is shared by the connectors that are compared.

    GET /            200, 13 bytes               GET /fifteen      200, 13 bytes and 15 header fields
    GET /source/N    200, N bytes                POST anything     takes the body, 200, 13 bytes
    Upgrade          101, then every byte comes back as it is (connectors do not look into frames either)

A TCP port and a UDP port beside it send back what they get.
"""

# ruff: noqa: D102  (callbacks of one interface each, described there)
from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import cast

import uvloop

BODY = b"hello, world\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 13\r\n\r\n" + BODY
FIFTEEN = (
    b"HTTP/1.1 200 OK\r\n"
    b"Date: Tue, 24 Nov 2026 08:00:00 GMT\r\nServer: nginx/1.27.3\r\nContent-Type: text/html; charset=utf-8\r\n"
    b"Content-Length: 13\r\nCache-Control: private, max-age=0, must-revalidate\r\nVary: Accept-Encoding, Cookie\r\n"
    b'ETag: "5f3c2a91-1d7"\r\nLast-Modified: Mon, 23 Nov 2026 17:40:12 GMT\r\nX-Frame-Options: SAMEORIGIN\r\n'
    b"X-Content-Type-Options: nosniff\r\nReferrer-Policy: strict-origin-when-cross-origin\r\n"
    b"Strict-Transport-Security: max-age=31536000\r\nX-Request-Id: 0d4e8b52-7c1f-4b8e-9a36-2f0c51d7e6aa\r\n"
    b"Set-Cookie: session=8f14e45fceea167a5a36dedd4bea2543; Path=/; HttpOnly; SameSite=Lax\r\n"
    b"Content-Language: en\r\n\r\n" + BODY
)
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)
CHUNK = memoryview(bytes(range(256)) * 1024)


class Origin(asyncio.Protocol):
    """One connection."""

    def __init__(self, *, echo: bool = False) -> None:
        self.transport: asyncio.Transport
        self.echo = echo
        self.left = 0  # of a request body
        self.source = 0  # of a response body
        self.paused = False
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.echo:
            self.transport.write(data)
            return
        if self.left:
            self.left -= len(data)
            if not self.left:
                self.transport.write(OK)
            return
        data = self.rest + data
        head, end, body = data.partition(b"\r\n\r\n")
        self.rest = b"" if end else data
        if not end:
            return
        if data.startswith(b"GET / "):
            if b"pgrade: websocket" in head:
                self.echo = True
                self.transport.write(SWITCH + body)
            else:
                self.transport.write(OK)
        elif data.startswith(b"GET /fifteen "):
            self.transport.write(FIFTEEN)
        elif data.startswith(b"GET /source/"):
            self.source = int(data[12 : data.index(b" ", 12)])
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % self.source)
            self.pump()
        else:
            lower = head.lower()
            at = lower.index(b"content-length:") + 15  # bodies here always have a length
            self.left = int(lower[at:].split(b"\r\n", 1)[0]) - len(body)
            if not self.left:
                self.transport.write(OK)

    def pump(self) -> None:
        while self.source and not self.paused:
            part = CHUNK[: self.source]
            self.source -= len(part)
            self.transport.write(part)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.pump()


class UdpEcho:
    """One UDP socket; a datagram costs one call to read and one to answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.sock.bind(("127.0.0.1", 0))
        loop.add_reader(self.sock, self.read)

    def read(self) -> None:
        sock = self.sock
        for _ in range(64):
            try:
                data, address = sock.recvfrom(2048)
                sock.sendto(data, address)
            except BlockingIOError:
                return
            except OSError:
                continue  # the connector's socket is gone


async def serve() -> None:
    """Listen until stdin ends."""
    loop = asyncio.get_running_loop()
    http = await loop.create_server(Origin, "127.0.0.1", 0, backlog=4096)
    tcp = await loop.create_server(lambda: Origin(echo=True), "127.0.0.1", 0, backlog=4096)
    udp = UdpEcho(loop)
    sockets = {"http": http.sockets[0], "tcp": tcp.sockets[0], "udp": udp.sock}
    print(json.dumps({name: sock.getsockname()[1] for name, sock in sockets.items()}), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    loop.remove_reader(udp.sock)
    udp.sock.close()
    tcp.close()
    http.close()


if __name__ == "__main__":
    uvloop.run(serve())
