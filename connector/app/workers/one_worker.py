"""One worker as the leading process sees it: its process, its pipe, its end, and when it is started again.

Owns: the process, the socket pair, what it writes to its standard output. In: `start`, messages to send.
Out: messages and the news of its end to a CrewMember's owner. Never: knows what a message means.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import connector
from connector import __version__
from connector.app.logs import Logger
from connector.app.workers.messages import Message, to_leader
from connector.app.workers.pipe import Pipe

PAUSES: Final = (0.5, 1.0, 2.0, 4.0)
"""Seconds before a worker that ended by itself is started again, by how often it did in a row. Once more, and the run
ends: what kills a worker within a minute of its start five times will do so again."""

STEADY_SECONDS: Final = 60.0
"""A worker that ran for so long had a good start: its end does not count with those before."""

MAX_LINE: Final = 4096
"""Bytes of one line of what a worker writes past the log: the interpreter's last words, a library's."""


class OneWorker:
    """Worker number `index`, whichever process it is now."""

    def __init__(
        self,
        index: int,
        log: Logger,
        descriptors: tuple[int, int],
        *,
        on_start: Callable[[OneWorker], None],
        on_message: Callable[[OneWorker, Any], None],
        on_lost: Callable[[OneWorker, str], None],
    ) -> None:
        self.index = index
        self.pid = 0
        self.unanswered = 0
        """Pings in a row without an answer."""
        self.crashes = 0
        """Ends in a row that nobody asked for, each within STEADY_SECONDS."""
        self.wanted = True
        self.running: set[int] = set()
        """Connections that it has to keep up."""
        self.asked: dict[int, asyncio.Future[Any]] = {}
        self.served: tuple[list[Any], list[Any]] = ([], [])
        """Counters and histograms as it told them last."""
        self._log = log
        self._descriptors = descriptors
        self._on_start = on_start
        self._on_message = on_message
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._pipe: Pipe | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def up(self) -> bool:
        """Whether it can be told something."""
        return self._pipe is not None and not self._pipe.closed

    def start(self) -> None:
        """Start its process."""
        self._timer = None
        self._task = self._loop.create_task(self._live(), name=f"worker {self.index}")

    def send(self, message: Message) -> None:
        """Tell it something; nothing happens while it is down."""
        if self._pipe is not None:
            self._pipe.send(message)

    def send_if_room(self, message: Message) -> None:
        """Tell it something that may get lost."""
        if self._pipe is not None:
            self._pipe.send_if_room(message)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None and self._process.returncode is None:
            try:
                self._process.kill()
            except ProcessLookupError:
                pass

    def start_again(self) -> float | None:
        """Start it again after a pause; give the seconds, or None when it has failed too often."""
        if self.crashes > len(PAUSES):
            return None
        pause = PAUSES[max(0, self.crashes - 1)]
        self._timer = self._loop.call_later(pause, self.start)
        return pause

    async def wait_ended(self, limit: float) -> None:
        """Wait until the process is gone; after `limit` seconds it is killed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is None:
            return
        done, _ = await asyncio.wait([self._task], timeout=limit)
        if not done:
            self.kill()
            await asyncio.wait([self._task], timeout=limit)
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _live(self) -> None:
        """The life of one process."""
        began = self._loop.time()
        ended = asyncio.Event()
        why = ""

        def on_end(text: str) -> None:
            nonlocal why
            why = text
            ended.set()

        ours, theirs = socket.socketpair()
        status: int | None = None
        try:
            with theirs:
                process = self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "connector.app.workers.child", __version__, str(self.index)),
                    *map(str, (theirs.fileno(), *self._descriptors)),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    pass_fds=(theirs.fileno(), *self._descriptors),
                    env=child_environment(),
                )
            self.pid, self.unanswered = process.pid, 0
            self._pipe = await Pipe.open(ours, to_leader, lambda message: self._on_message(self, message), on_end)
            self._on_start(self)
            await self._read(process)
            status = await process.wait()
            try:  # what it said last is still on its way
                async with asyncio.timeout(1):
                    await ended.wait()
            except TimeoutError:
                pass
        except OSError as error:
            ours.close()
            why = f"it cannot be started: {error.strerror or error}"
        except Exception as error:
            ours.close()
            self._log.bug(f"Worker {self.index} cannot be looked after", error)
            why = f"{type(error).__name__}: {error}"
        finally:
            self.kill()
            pipe, self._pipe, self._process = self._pipe, None, None
            if pipe is not None:
                pipe.close()
            for future in self.asked.values():
                future.cancel()
            self.asked.clear()
        self.crashes = 1 if self._loop.time() - began > STEADY_SECONDS else self.crashes + 1
        self._on_lost(self, describe_status(status) if not why or (status or 0) < 0 else why)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Put what it writes past the log into the log, line by line, until it is gone."""
        stream = process.stdout
        assert stream is not None
        rest = b""
        while data := await stream.read(MAX_LINE):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > MAX_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._said(line)
        self._said(rest)

    def _said(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").strip()
        if text:
            self._log.warn(f"Worker {self.index} says: {text[:MAX_LINE]}")


def child_environment() -> dict[str, str]:
    """Give a worker's environment: without our flags' variables, some of which are secrets, and with our package."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TUNNEL_", "NOTIFY_SOCKET"))}
    root = str(Path(connector.__file__).resolve().parents[1])
    paths = [root, *(path for path in kept.get("PYTHONPATH", "").split(os.pathsep) if path)]
    kept["PYTHONPATH"] = os.pathsep.join(paths)
    return kept


def describe_status(status: int | None) -> str:
    """Say how a process ended."""
    if status is None:
        return "it ended"
    if status < 0:
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"
    return f"it ended with status {status}"
