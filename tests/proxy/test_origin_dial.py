"""OriginDialler: a socket at once where the origin is near, and by `open` where that takes longer or a second try."""

from __future__ import annotations

import asyncio
import gc
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from connector.proxy import limits
from connector.proxy.ingress import OriginSettings
from connector.proxy.ingress_services import parse_service
from connector.proxy.origin_dial import OriginDialler
from tests.support.aio import run, until
from tests.support.stream_ends import LaterLoop, Loop, both_loops, on

Answer = list[tuple[str, int]] | Exception


class Names:
    """The system's resolver, with answers of a test; counts questions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Answer) -> None:
        self.answer = answer
        self.asked = 0
        monkeypatch.setattr(socket, "getaddrinfo", self._getaddrinfo)

    def _getaddrinfo(self, host: Any, port: Any, *_: Any, flags: int = 0, **__: Any) -> list[Any]:
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, where, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, where))
            for address, where in self.answer
        ]


@contextmanager
def listening(*, backlog: int = 10, host: str = "127.0.0.1") -> Iterator[tuple[socket.socket, int]]:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        listener.listen(backlog)
        yield listener, listener.getsockname()[1]


@contextmanager
def full() -> Iterator[int]:
    """A port whose queue is full: connecting there takes for ever."""
    with listening(backlog=0) as (_, port):
        waiting = [socket.socket() for _ in range(3)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
        yield port
        for sock in waiting:
            sock.close()


def refused_port() -> int:
    with listening() as (_, port):
        return port


def dialler(service: str, **settings: Any) -> OriginDialler:
    return OriginDialler(asyncio.get_running_loop(), parse_service(service), OriginSettings(**settings))


def is_connected(sock: socket.socket | None) -> bool:
    """Whether bytes can be sent; closes the socket."""
    if sock is None:
        return False
    with sock:
        assert sock.gettimeout() == 0
        assert sock.getpeername() is not None
        return sock.send(b"x") == 1


@both_loops
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_address_is_connected_at_once(loop: Loop, host: str) -> None:
    async def main() -> None:
        with listening(host=host) as (_, port):
            dial = dialler(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
            sock = dial.maybe_open()
            assert sock is not None
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
            assert is_connected(sock)
            assert len(asyncio.all_tasks()) == 1
            tried: list[str] = []
            assert is_connected(await dial.open(tried))
            assert tried == [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
            sock = dialler(f"http://127.0.0.1:{port}", tcp_keep_alive=-1).maybe_open()
            if sock is not None:
                assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                sock.close()

    on(loop, main)


@both_loops
def test_nobody_listens(loop: Loop) -> None:
    async def main() -> None:
        port = refused_port()
        dial = dialler(f"http://127.0.0.1:{port}")
        for _ in range(2):
            assert dial.maybe_open() is None
            tried: list[str] = []
            with pytest.raises(ConnectionRefusedError):
                await dial.open(tried)
            assert tried == [f"127.0.0.1:{port}"]

    on(loop, main)


@both_loops
def test_an_origin_that_does_not_answer(loop: Loop) -> None:
    """`maybe_open` waits for nothing; `open` can be cancelled. Neither leaves a socket."""

    async def main() -> None:
        with full() as port:
            dial = dialler(f"http://127.0.0.1:{port}")
            assert dial.maybe_open() is None
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await dial.open([])

    on(loop, main)


@both_loops
def test_a_unix_socket(loop: Loop, tmp_path: Path) -> None:
    async def main() -> None:
        path = str(tmp_path / "s")
        dial = dialler(f"unix:{path}")
        assert dial.maybe_open() is None
        with pytest.raises(FileNotFoundError):
            await dial.open([])
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            assert dial.maybe_open() is None
            with pytest.raises(ConnectionRefusedError):
                await dial.open([])
            listener.listen(2)
            assert is_connected(dial.maybe_open())
            assert is_connected(await dial.open([]))
        long = dialler("unix:/" + "x" * 200)
        assert long.maybe_open() is None
        with pytest.raises(OSError, match="too long"):
            await long.open([])

    on(loop, main)


@both_loops
def test_a_unix_socket_whose_queue_is_full(loop: Loop, tmp_path: Path) -> None:
    """Not to be taken for connected (EAGAIN, and the loops take it so): `open` waits until somebody accepts."""

    async def main() -> None:
        path = str(tmp_path / "s")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(0)
            dial = dialler(f"unix:{path}")
            waiting = []
            while (sock := dial.maybe_open()) is not None:
                waiting.append(sock)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await dial.open([])
            opening = asyncio.create_task(dial.open([]))
            await asyncio.sleep(0)
            assert not opening.done()
            accepted, _ = listener.accept()
            assert is_connected(await opening)
            accepted.close()
            for sock in waiting:
                sock.close()

    on(loop, main)


@both_loops
def test_a_name_is_remembered(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        with listening(backlog=30) as (_, port):
            names = Names(monkeypatch, [("127.0.0.1", port)])
            dial = dialler(f"http://origin.internal:{port}")
            assert dial.maybe_open() is None
            assert names.asked == 0
            opening = [asyncio.create_task(dial.open([])) for _ in range(10)]
            await asyncio.sleep(0)
            assert dial.looking_up is not None
            assert all([is_connected(await task) for task in opening])
            assert dial.looking_up is None
            for _ in range(5):
                assert is_connected(dial.maybe_open())
            assert names.asked == 1

    on(loop, main)


def test_a_name_is_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, LaterLoop)
        with listening() as (_, port):
            names = Names(monkeypatch, [("127.0.0.1", port)])
            dial = dialler(f"http://origin.internal:{port}")
            (await dial.open([])).close()
            assert is_connected(dial.maybe_open())
            loop.ahead = limits.RESOLVED_FOR
            assert dial.maybe_open() is None
            (await dial.open([])).close()
            assert names.asked == 2
            assert is_connected(dial.maybe_open())

    run(main(), loop_factory=LaterLoop)
    gc.collect(1)


@both_loops
def test_a_name_that_moved(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The remembered address refuses: it is asked for anew at once."""

    async def main() -> None:
        with listening() as (first, port), listening() as (_, other):
            names = Names(monkeypatch, [("127.0.0.1", port)])
            dial = dialler("http://origin.internal:1")
            (await dial.open([])).close()
            first.close()
            names.answer = [("127.0.0.1", other)]
            assert dial.maybe_open() is None
            assert is_connected(await dial.open([]))
            assert names.asked == 2
            assert is_connected(dial.maybe_open())

    on(loop, main)


@both_loops
def test_the_address_that_answers_is_tried_first(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """`localhost` is `::1` and 127.0.0.1, and the service listens on the latter alone: no look-up per connection."""

    async def main() -> None:
        with listening() as (_, port):
            closed = refused_port()
            names = Names(monkeypatch, [("::1", closed), ("127.0.0.1", port)])
            dial = dialler(f"http://localhost:{port}")
            tried: list[str] = []
            assert is_connected(await dial.open(tried))
            assert tried == [f"[::1]:{closed}", f"127.0.0.1:{port}"]
            for _ in range(3):
                assert is_connected(dial.maybe_open())
            assert names.asked == 1

    on(loop, main)


@both_loops
def test_a_race(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent address holds nobody up: the next one is tried beside it, and remembered."""

    async def main() -> None:
        with full() as silent, listening() as (_, port):
            Names(monkeypatch, [("127.0.0.1", silent), ("127.0.0.1", refused_port()), ("127.0.0.1", port)])
            dial = dialler("http://origin.internal:1")
            assert is_connected(await dial.open([]))
            assert is_connected(dial.maybe_open())
            await until(lambda: len(asyncio.all_tasks()) == 1)

    on(loop, main)


@both_loops
@pytest.mark.parametrize("answer", [socket.gaierror(socket.EAI_NONAME, "Name or service not known"), []])
def test_a_name_without_an_address(loop: Loop, monkeypatch: pytest.MonkeyPatch, answer: Answer) -> None:
    async def main() -> None:
        names = Names(monkeypatch, answer)
        dial = dialler("http://origin.internal:1")
        for count in (1, 2):
            with pytest.raises(socket.gaierror):
                await dial.open([])
            assert dial.maybe_open() is None
            assert names.asked == count

    on(loop, main)


@both_loops
def test_a_look_up_outlives_whoever_asked_first(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        with listening() as (_, port):
            names = Names(monkeypatch, [("127.0.0.1", port)])
            dial = dialler("http://origin.internal:1")
            first = asyncio.create_task(dial.open([]))
            await asyncio.sleep(0)
            second = asyncio.create_task(dial.open([]))
            await asyncio.sleep(0)
            first.cancel()
            assert is_connected(await second)
            assert first.cancelled()
            assert names.asked == 1

    on(loop, main)


def without_descriptors(call: Callable[[], object]) -> object:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_descriptor_left(tmp_path: Path) -> None:
    async def main() -> None:
        for service in ("http://127.0.0.1:1", f"unix:{tmp_path}/s"):
            dial = dialler(service)
            assert without_descriptors(dial.maybe_open) is None
            opening = dial.open([])
            with pytest.raises(OSError, match="Too many open files"):
                without_descriptors(lambda opening=opening: opening.send(None))  # type: ignore[misc]

    run(main())
