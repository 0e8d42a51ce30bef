"""A scripted origin that sees the very bytes: loopback TCP, TLS or a unix socket.

`async with RawOrigin(script) as origin:` where `script` is a coroutine function of one RawConnection. Leaving the block
ends all scripts; an exception in a script fails the test.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from types import TracebackType


class RawConnection:
    """One accepted connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        self.reader = reader
        self.writer = writer
        self.number = number
        self.received = bytearray()

    async def read_head(self) -> bytes:
        """Return the next request head; EOFError-like IncompleteReadError when the peer closes first."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        self.received += head
        return head

    async def read_exactly(self, size: int) -> bytes:
        data = await self.reader.readexactly(size)
        self.received += data
        return data

    async def read_some(self) -> bytes:
        data = await self.reader.read(65_536)
        self.received += data
        return data

    async def read_request(self) -> bytes:
        """Return a whole request: head and body, chunked or with a length."""
        head = await self.read_head()
        if re.search(rb"(?mi)^transfer-encoding: chunked\r$", head):
            return head + await self._read_chunks()
        length = re.search(rb"(?mi)^content-length: (\d+)\r$", head)
        return head + (await self.read_exactly(int(length[1])) if length else b"")

    async def _read_chunks(self) -> bytes:
        body = b""
        while True:
            line = await self.reader.readuntil(b"\r\n")
            data = await self.reader.readexactly(int(line, 16) + 2)
            self.received += line + data
            body += line + data
            if int(line, 16) == 0:
                return body

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def drained(self) -> None:
        await self.writer.drain()

    async def closed(self) -> None:
        """Wait until the peer has closed; what it still sends is recorded."""
        try:
            while await self.read_some():
                pass
        except ConnectionError:
            pass

    def close(self) -> None:
        self.writer.close()

    def abort(self) -> None:
        """End with RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[RawConnection], Awaitable[None]]


def answering(response: bytes, *, close: bool = False) -> Script:
    """Return a script that gives every whole request the same answer."""

    async def script(connection: RawConnection) -> None:
        while True:
            try:
                await connection.read_request()
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            connection.send(response)
            if close:
                return

    return script


class RawOrigin:
    """The listening side; `connections` holds every connection in order of arrival."""

    def __init__(self, script: Script, *, tls: ssl.SSLContext | None = None, path: str | None = None) -> None:
        self._script = script
        self._tls = tls
        self._path = path
        self.connections: list[RawConnection] = []
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._problem: BaseException | None = None

    @property
    def url(self) -> str:
        if self._path:
            return f"unix{'+tls' if self._tls else ''}:{self._path}"
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> RawOrigin:
        if self._path:
            self._server = await asyncio.start_unix_server(self._serve, self._path, ssl=self._tls)
        else:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            # Small, so that a script that does not read is felt soon.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
            sock.bind(("127.0.0.1", 0))
            self._server = await asyncio.start_server(self._serve, sock=sock, ssl=self._tls)
            self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in self.connections:
            connection.writer.close()
            try:
                await connection.writer.wait_closed()
            except (OSError, ssl.SSLError):
                pass
        if self._problem is not None and kind is None:
            raise self._problem

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        connection = RawConnection(reader, writer, len(self.connections))
        self.connections.append(connection)
        try:
            await self._script(connection)
        except asyncio.CancelledError:
            pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except BaseException as problem:
            self._problem = problem
        finally:
            self._tasks.discard(task)
            writer.close()
