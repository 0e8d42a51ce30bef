"""Both ends of a connected socket: a StreamUser that records, and a far end that tests read and write by hand."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.support.aio import run, until
from tests.support.loops import LOOPS

Loop = Callable[[], asyncio.AbstractEventLoop]
both_loops = pytest.mark.parametrize("loop", [pytest.param(make, id=name) for name, make in LOOPS.items()])
both_kinds = pytest.mark.parametrize("kind", ["tcp", "unix"])


class LaterLoop(asyncio.SelectorEventLoop):
    """A loop whose clock a test can put forward."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


class User:
    """Records what a stream tells it. `on_data`, `on_eof` and `on_lost` run inside the calls."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.sizes: list[int] = []
        self.kinds: set[type] = set()
        self.eofs = 0
        self.keep_open: bool | None = None
        self.lost: list[Exception | None] = []
        self.marks: list[str] = []
        self.inside = False
        """Set by tests around their calls of the stream: `connection_lost` must not come then."""
        self.on_data: Callable[[Any], None] | None = None
        self.on_eof: Callable[[], None] | None = None
        self.on_lost: Callable[[], None] | None = None
        self.on_mark: Callable[[str], None] | None = None

    def data_received(self, data: Any) -> None:
        assert not self.lost
        assert not self.eofs
        assert not self.inside
        self.data += data
        self.sizes.append(len(data))
        self.kinds.add(type(data))
        if self.on_data is not None:
            self.on_data(data)

    def eof_received(self) -> bool | None:
        assert not self.lost
        assert not self.inside
        self.eofs += 1
        if self.on_eof is not None:
            self.on_eof()
        return self.keep_open

    def connection_lost(self, error: Exception | None) -> None:
        assert not self.inside
        self.lost.append(error)
        if self.on_lost is not None:
            self.on_lost()

    def pause_writing(self) -> None:
        self._mark("pause")

    def resume_writing(self) -> None:
        self._mark("resume")

    def _mark(self, name: str) -> None:
        assert not self.lost
        self.marks.append(name)
        if self.on_mark is not None:
            self.on_mark(name)


class FarEnd:
    """The peer's socket, not blocking."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.sock, data)

    async def read(self, size: int) -> bytes:
        """Return `size` bytes, or less when the end comes."""
        data = bytearray()
        while len(data) < size and (part := await self._loop.sock_recv(self.sock, min(size - len(data), 65_536))):
            data += part
        return bytes(data)

    async def rest(self) -> bytes:
        """Return all until the end."""
        return await self.read(1 << 40)

    def eof(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """End with RST (TCP)."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def connected(kind: str = "tcp", *, buffers: int = 0) -> tuple[socket.socket, socket.socket]:
    """Return two ends; `buffers` is the size of both kernel buffers, where it matters."""
    if kind == "unix":
        near, far = socket.socketpair()
        for sock in (near, far):
            if buffers:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
    else:
        with socket.socket() as listener, socket.socket() as dialled:
            if buffers:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
                dialled.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            dialled.connect(listener.getsockname())
            far, _ = listener.accept()
            near = socket.socket(fileno=dialled.detach())
    near.setblocking(False)
    return near, far


async def turns(count: int = 3) -> None:
    """Let the loop turn, so that what is due has happened."""
    for _ in range(count):
        await asyncio.sleep(0)


async def over(user: User) -> Exception | None:
    """Wait for the end; return why. It came once, and comes no more."""
    await until(lambda: user.lost, what="connection_lost")
    await turns()
    assert len(user.lost) == 1
    return user.lost[0]


def on(
    loop: Loop, main: Callable[[], Coroutine[Any, Any, None]], *, errors: int = 0, limit: float = 30
) -> list[dict[str, Any]]:
    """Run `main`; return what the loop's exception handler got, which are `errors` calls. Sockets left open fail."""
    reports: list[dict[str, Any]] = []

    async def guarded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
        await main()

    run(guarded(), loop_factory=loop, limit=limit)
    gc.collect(1)
    assert len(reports) == errors, reports
    return reports


def unregistered(descriptor: int) -> bool:
    """Whether the running loop watches nothing by this number (any more)."""
    loop = asyncio.get_running_loop()
    return not loop.remove_reader(descriptor) and not loop.remove_writer(descriptor)
