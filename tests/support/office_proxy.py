"""An office's proxy on loopback: HTTP CONNECT, requests in absolute form, SOCKS5 and the refusals that proxies make.

`async with OfficeProxy() as proxy:`; `proxy.port`; what it was asked for stands in `asked`. In a thread of its own by
`office_proxy()`, for tests that wait for child processes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address


class OfficeProxy:
    def __init__(
        self, *, tls: ssl.SSLContext | None = None, user: str = "", password: str = "", goes_to: str = ""
    ) -> None:
        self.user, self.password, self.goes_to = user, password, goes_to
        self.asked: list[tuple[str, str, int]] = []
        """(protocol, host, port) in the order of arrival."""
        self.answer: bytes | None = None
        """Sent instead of everything, then the connection is closed."""
        self.silent = False
        self.port = 0
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> OfficeProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            first = await reader.readexactly(1)
            if self.silent:
                await reader.read()
            elif self.answer is not None:
                writer.write(self.answer)
                await writer.drain()
            elif first == b"\x05":
                await self._socks(reader, writer)
            else:
                await self._http(reader, writer, first.decode())
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            with contextlib.suppress(Exception):
                writer.close()

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: str) -> None:
        head = first + (await reader.readuntil(b"\r\n\r\n")).decode()
        target = head.split()[1]
        absolute = target.startswith("http://")
        host, _, port = target.removeprefix("http://").partition("/")[0].rpartition(":")
        self.asked.append(("absolute" if absolute else "http", host.strip("[]"), int(port)))
        if self.user:
            secret = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
            if f"Proxy-Authorization: Basic {secret}\r\n" not in head:
                writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                return
        if absolute:
            path = target.removeprefix("http://").partition("/")[2]
            await self._pass_on(reader, writer, b"", first=head.replace(target, f"/{path}", 1).encode())
            return
        await self._pass_on(reader, writer, b"HTTP/1.1 200 Connection established\r\n\r\n")

    async def _socks(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        methods = await reader.readexactly((await reader.readexactly(1))[0])
        if self.user:
            if 2 not in methods:
                writer.write(b"\x05\xff")
                return
            writer.write(b"\x05\x02")
            await reader.readexactly(1)
            user = await reader.readexactly((await reader.readexactly(1))[0])
            password = await reader.readexactly((await reader.readexactly(1))[0])
            good = (user, password) == (self.user.encode(), self.password.encode())
            writer.write(b"\x01\x00" if good else b"\x01\x01")
            if not good:
                return
        else:
            writer.write(b"\x05\x00")
        kind = (await reader.readexactly(4))[3]
        if kind == 3:
            host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        else:
            host = str(ip_address(await reader.readexactly(4 if kind == 1 else 16)))
        self.asked.append(("socks5", host, int.from_bytes(await reader.readexactly(2), "big")))
        await self._pass_on(
            reader, writer, b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00", refusal=b"\x05\x05\x00\x01" + bytes(6)
        )

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        yes: bytes,
        refusal: bytes = b"HTTP/1.1 502 Bad Gateway\r\n\r\n",
        first: bytes = b"",
    ) -> None:
        _, host, port = self.asked[-1]
        try:
            there_reader, there_writer = await asyncio.open_connection(self.goes_to or host, port)
        except OSError:
            writer.write(refusal)
            return
        writer.write(yes)
        there_writer.write(first)
        try:
            await asyncio.gather(_copy(reader, there_writer), _copy(there_reader, writer))
        finally:
            there_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


@contextmanager
def office_proxy(proxy: OfficeProxy) -> Iterator[OfficeProxy]:
    """Run `proxy` in a thread until the end of the context."""
    up = threading.Event()
    over: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        end = asyncio.Event()
        async with proxy:
            over.append((asyncio.get_running_loop(), end))
            up.set()
            await end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert up.wait(20)
        yield proxy
    finally:
        loop, end = over[0]
        loop.call_soon_threadsafe(end.set)
        thread.join(20)
