"""Readiness: told on any loop, also after errors, which uvloop alone takes for the end of a socket."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref

import pytest

from connector.transport.readiness import Readiness
from tests.support.aio import run, until
from tests.support.loops import LOOPS

both_loops = pytest.mark.parametrize("loop", LOOPS)


class User:
    """Notes what it is told; reads a socket to its end, or nothing at all."""

    def __init__(self, sock: socket.socket, *, reads: bool = True) -> None:
        self.sock = sock
        self.reads = reads
        self.received: list[bytes] = []
        self.errors: list[OSError] = []
        self.writable = 0
        self.ready = Readiness(
            sock, asyncio.get_running_loop(), on_readable=self.on_readable, on_writable=self.on_writable
        )

    def on_readable(self) -> None:
        try:
            self.received.append(self.sock.recv(100))
        except BlockingIOError:
            pass
        except OSError as error:
            self.errors.append(error)

    def on_writable(self) -> None:
        self.writable += 1
        self.ready.write(False)


def deaf(peer: socket.socket) -> socket.socket:
    """Return a socket that is connected to `peer`, which is then gone."""
    peer.bind(("127.0.0.1", 0))
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.connect(peer.getsockname())
    peer.close()
    return sock


@both_loops
@pytest.mark.parametrize("taken", [False, True])
def test_an_error_is_not_the_end(loop: str, taken: bool) -> None:
    async def main() -> None:
        with deaf(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
            user = User(sock)
            user.ready.read(True)
            sock.send(b"anybody?")
            if taken:
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            else:
                await until(lambda: user.errors)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as back:
                back.bind(sock.getpeername())
                back.connect(sock.getsockname())
                for number in range(3):
                    back.send(b"%d" % number)
                    await until(lambda number=number: len(user.received) == number + 1)  # type: ignore[misc]
            user.ready.write(True)
            await until(lambda: user.writable)
            user.ready.close()

    run(main(), loop_factory=LOOPS[loop])


@both_loops
def test_both_ways_go_on(loop: str) -> None:
    """Data before the error: the reader leaves some, the writer waits for room, and neither sees the error."""

    async def main() -> None:
        near, far = socket.socketpair()
        near.setblocking(False)
        user = User(near)
        with near:
            near.send(b"never read")
            far.send(b"x" * 350)
            far.close()  # with something unread: a reset, behind the data
            user.ready.read(True)
            user.ready.write(True)
            await until(lambda: user.errors)
            assert b"".join(user.received) == b"x" * 350
            assert isinstance(user.errors[0], ConnectionResetError)
            await until(lambda: user.writable)
            user.ready.close()

    run(main(), loop_factory=LOOPS[loop])


@both_loops
def test_closed_is_closed_and_nothing_is_kept(loop: str) -> None:
    async def main() -> None:
        this = asyncio.get_running_loop()
        near, far = socket.socketpair()
        near.setblocking(False)
        with near, far:
            user = User(near)
            user.ready.read(True)
            user.ready.read(False)
            user.ready.read(True)
            user.ready.write(True)
            user.ready.close()
            user.ready.close()
            far.send(b"x")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not user.received
            assert not user.writable
            assert not this.remove_reader(near)
            assert not this.remove_writer(near)
            gone = weakref.ref(user.ready)
            del user
            gc.collect()
            assert gone() is None

    run(main(), loop_factory=LOOPS[loop])
