from __future__ import annotations

import asyncio
import io
import os
import socket
from pathlib import Path

from connector.app.logs import Logger, LogOutput
from connector.app.service_notify import ServiceNotify
from tests.support.aio import run, until


def log() -> tuple[Logger, io.StringIO]:
    stream = io.StringIO()
    return Logger(LogOutput(stream=stream)), stream


def listen(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(path)
    sock.settimeout(10)
    return sock


def test_systemd_hears_that_the_service_is_ready_and_when_it_ends(tmp_path: Path) -> None:
    for name in (str(tmp_path / "notify"), f"\0connector-test-{os.getpid()}"):
        with listen(name) as sock:
            notify = ServiceNotify(log()[0], {"NOTIFY_SOCKET": name.replace("\0", "@")})
            notify.ready("connected")
            notify.stopping()
            assert sock.recv(1000) == b"READY=1\nSTATUS=connected"
            assert sock.recv(1000) == b"STOPPING=1"


def test_the_watchdog_is_fed_from_the_loop(tmp_path: Path) -> None:
    with listen(str(tmp_path / "notify")) as sock:
        environ = {
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": "20000",
            "WATCHDOG_PID": str(os.getpid()),
        }

        sock.setblocking(False)

        async def main() -> None:
            notify = ServiceNotify(log()[0], environ)
            notify.start()
            beats = 0

            def beat() -> bool:
                nonlocal beats
                try:
                    beats += sock.recv(1000) == b"WATCHDOG=1"
                except BlockingIOError:
                    pass
                return beats >= 3

            await until(beat)
            notify.close()

        run(main())


def test_the_watchdog_of_another_process_is_not_fed(tmp_path: Path) -> None:
    async def main(**environ: str) -> None:
        with listen(str(tmp_path / "notify")) as sock:
            notify = ServiceNotify(log()[0], {"NOTIFY_SOCKET": str(tmp_path / "notify"), **environ})
            notify.start()
            await asyncio.sleep(0)
            notify.ready("up")
            assert sock.recv(1000).startswith(b"READY=1")
            notify.close()
        (tmp_path / "notify").unlink()

    for environ in ({"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}, {}):
        run(main(**environ))


def test_nobody_listening_is_one_line(tmp_path: Path) -> None:
    logger, stream = log()
    notify = ServiceNotify(logger, {"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    notify.ready("up")
    notify.stopping()
    assert stream.getvalue().count("Unable to notify systemd") == 1


def test_a_full_queue_does_not_hold_the_loop(tmp_path: Path) -> None:
    logger, stream = log()
    with listen(str(tmp_path / "notify")):
        notify = ServiceNotify(logger, {"NOTIFY_SOCKET": str(tmp_path / "notify")})
        for _ in range(1000):
            notify.ready("up")
    assert stream.getvalue() == ""


def test_without_systemd_nothing_happens() -> None:
    logger, stream = log()
    notify = ServiceNotify(logger, {"WATCHDOG_USEC": "20000"})
    notify.start()
    notify.ready("up")
    notify.close()
    assert stream.getvalue() == ""
