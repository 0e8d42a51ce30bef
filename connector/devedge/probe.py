"""The two ends of a conformance case: an origin that answers by path, and a visitor that sees every byte.

Owns: Origin and Visitor, both HTTP/1.1 on plain asyncio streams. In: requests. Out: what was seen.
Never: serves anything but conformance cases: it trusts the length fields of its peers.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import ssl
import struct
from pathlib import Path

BLOCK = bytes(range(256)) * 256
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
LIMIT = 30.0
"""Seconds of every wait."""


class Reply:
    """What a visitor got. `whole` is false when the connection ended before the message."""

    def __init__(self, status: int, headers: list[tuple[str, str]], body: bytes, whole: bool) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.whole = whole

    def all(self, name: str) -> list[str]:
        """Return every value of a header."""
        return [value for key, value in self.headers if key.lower() == name]


class Origin:
    """Answers by path; `async with`. `seen` holds the last request's head and body by path."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[list[str], bytes]] = {}
        self.open = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.release = asyncio.Event()
        """Lets `/hold` answer."""

    async def __aenter__(self) -> Origin:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self.release.set()
        self._server.close()
        for writer in list(self._writers):
            writer.close()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.open += 1
        try:
            while await self._one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, ValueError):
            pass
        finally:
            self.open -= 1
            self._writers.discard(writer)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        method, target, _ = lines[0].split(" ", 2)
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        path = target.partition("?")[0]
        if fields.get("upgrade", "").lower() == "websocket":
            await self._websocket(reader, writer, fields, path)
            return False
        digest, size, body = hashlib.sha256(), 0, b""
        async for data in _body(reader, fields):
            digest.update(data)
            size += len(data)
            body = (body + data)[:65_536]
        self.seen[path] = (lines, body)
        if path.startswith("/status/"):
            answer = b"" if method == "HEAD" else path.encode()
            writer.write(f"HTTP/1.1 {path[8:]} Some\r\nContent-Length: {len(path)}\r\n\r\n".encode() + answer)
        elif path.startswith("/bytes/"):
            left = int(path[7:])
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {left}\r\n\r\n".encode())
            while left:
                writer.write(BLOCK[: min(left, len(BLOCK))])
                left -= min(left, len(BLOCK))
                await writer.drain()
        elif path == "/cookies":
            writer.write(
                b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\nX-Odd: caf\xe9\r\nContent-Length: 0\r\n\r\n"
            )
        elif path == "/events":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            writer.write(b"8\r\ndata: 1\n\r\n")
            await writer.drain()
            async with asyncio.timeout(LIMIT):
                await self.release.wait()
            writer.write(b"8\r\ndata: 2\n\r\n0\r\n\r\n")
        elif path == "/hold":
            if not await self._released(reader):
                return False
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nheld")
        elif path == "/cut":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")
            await writer.drain()
            return False
        elif path == "/cut-late":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + BLOCK * 4)
            await writer.drain()
            return False
        elif path == "/garbage":
            writer.write(b"this is no HTTP\r\n\r\n")
            await writer.drain()
            return False
        else:
            text = json.dumps({"method": method, "target": target, "size": size, "sha256": digest.hexdigest()}).encode()
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n".encode()
            writer.write(head + (b"" if method == "HEAD" else text))
        await writer.drain()
        return True

    async def _released(self, reader: asyncio.StreamReader) -> bool:
        """Wait for `release`; False when the connector hangs up first."""
        waits = {asyncio.create_task(self.release.wait()), asyncio.create_task(reader.read(1))}
        done, left = await asyncio.wait(waits, timeout=LIMIT, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        return bool(done) and self.release.is_set()

    async def _websocket(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fields: dict[str, str], path: str
    ) -> None:
        key = base64.b64encode(hashlib.sha1(fields["sec-websocket-key"].encode() + GUID).digest()).decode()  # noqa: S324
        writer.write(
            f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {key}\r\n\r\n".encode()
        )
        while True:
            opcode, data = await read_frame(reader)
            if opcode == 8 or (path == "/ws-close" and data):
                writer.write(frame(8, b"\x03\xe8"))
                await writer.drain()
                return
            writer.write(frame(opcode, data))
            await writer.drain()


class Visitor:
    """Sends requests to the public side of a dev edge."""

    def __init__(self, port: int, ca: Path, host: str = "localhost") -> None:
        self._port = port
        self._host = host
        self._tls = ssl.create_default_context(cafile=str(ca))

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection."""
        async with asyncio.timeout(LIMIT):
            return await asyncio.open_connection("127.0.0.1", self._port, ssl=self._tls, server_hostname=self._host)

    async def ask(
        self, target: str, *, method: str = "GET", body: bytes | None = None, chunked: bool = False,
        headers: tuple[str, ...] = (),
    ) -> Reply:  # fmt: skip
        """Send a request, read the whole answer."""
        reader, writer = await self.connect()
        try:
            async with asyncio.timeout(LIMIT):
                lines = [
                    f"{method} {target} HTTP/1.1",
                    f"Host: {self._host}:{self._port}",
                    "Connection: close",
                    *headers,
                ]
                if chunked:
                    lines.append("Transfer-Encoding: chunked")
                elif body is not None:
                    lines.append(f"Content-Length: {len(body)}")
                writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
                for start in range(0, len(body or b""), 65_536):
                    part = (body or b"")[start : start + 65_536]
                    writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n" if chunked else part)
                    await writer.drain()
                if chunked:
                    writer.write(b"0\r\n\r\n")
                return await self.read(reader, method)
        finally:
            writer.close()

    async def read(self, reader: asyncio.StreamReader, method: str = "GET") -> Reply:
        """Read one answer."""
        try:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        except asyncio.IncompleteReadError:
            return Reply(0, [], b"", False)
        status = int(lines[0].split(" ")[1])
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])]
        fields = {name.lower(): value for name, value in headers}
        parts = []
        try:
            if method != "HEAD" and status not in {204, 304}:
                async for data in _body(reader, fields, answer=True):
                    parts.append(data)
        except (asyncio.IncompleteReadError, OSError, ValueError) as error:
            parts.append(getattr(error, "partial", b""))
            return Reply(status, headers, b"".join(parts), False)
        return Reply(status, headers, b"".join(parts), True)

    async def websocket(self, target: str) -> tuple[Reply, asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a WebSocket; the reply tells whether it worked."""
        reader, writer = await self.connect()
        writer.write(
            f"GET {target} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        async with asyncio.timeout(LIMIT):
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])]
        return Reply(int(lines[0].split(" ")[1]), headers, b"", True), reader, writer


def frame(opcode: int, data: bytes, *, mask: bytes = b"") -> bytes:
    """Return one WebSocket frame."""
    size = len(data)
    bit = 0x80 if mask else 0
    if size < 126:
        head = bytes((0x80 | opcode, bit | size))
    elif size < 65_536:
        head = bytes((0x80 | opcode, bit | 126)) + struct.pack(">H", size)
    else:
        head = bytes((0x80 | opcode, bit | 127)) + struct.pack(">Q", size)
    if mask:
        data = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
    return head + mask + data


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Return opcode and payload of the next frame."""
    first, second = await reader.readexactly(2)
    size = second & 0x7F
    if size == 126:
        size = struct.unpack(">H", await reader.readexactly(2))[0]
    elif size == 127:
        size = struct.unpack(">Q", await reader.readexactly(8))[0]
    mask = await reader.readexactly(4) if second & 0x80 else b""
    data = await reader.readexactly(size)
    return first & 15, bytes(byte ^ mask[at % 4] for at, byte in enumerate(data)) if mask else data


class _Body:
    """Iterates over a message's payload."""

    def __init__(self, reader: asyncio.StreamReader, fields: dict[str, str], answer: bool) -> None:
        self._reader = reader
        self._chunked = "chunked" in fields.get("transfer-encoding", "").lower()
        length = fields.get("content-length")
        self._left = int(length) if length is not None else -1 if answer and not self._chunked else 0

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        if self._chunked:
            size = int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16)
            data = await self._reader.readexactly(size)
            await self._reader.readexactly(2)
            if not size:
                raise StopAsyncIteration
            return data
        if not self._left:
            raise StopAsyncIteration
        data = await self._reader.read(65_536 if self._left < 0 else min(65_536, self._left))
        if not data:
            if self._left > 0:
                raise asyncio.IncompleteReadError(b"", self._left)
            raise StopAsyncIteration
        if self._left > 0:
            self._left -= len(data)
        return data


def _body(reader: asyncio.StreamReader, fields: dict[str, str], *, answer: bool = False) -> _Body:
    return _Body(reader, fields, answer)
