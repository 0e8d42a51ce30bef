"""Child processes behind their guards, seen as lines and one exit.

Owns: starting a command through `guard.py`, its output lines, its last lines, its end.
In: a command line, a callback per output line. Out: `Child`, with `exited` to wait for and `stop()` to call.
Never: reads what a line means; passes a secret on a command line; lets the launcher's `TUNNEL_*` variables through.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

GUARD = Path(__file__).with_name("guard.py")

TAIL_LINES = 12
"""Kept for the report when a child fails: enough for a Python traceback's end, fits half a terminal."""

LINE_LIMIT = 16 * 1024
"""A longer line is cut there: children log lines, not payload; bounds memory per pipe."""

Stream = Literal["stdout", "stderr"]
LineCallback = Callable[[Stream, str], None]


class Child:
    """One command run behind a guard. Make it with `start`; always `stop` it, also when it ended by itself."""

    def __init__(self, name: str, on_line: LineCallback | None = None, *, secret: bool = False) -> None:
        self.name = name
        self._secret = secret
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.pid: int | None = None
        self.status: int | None = None
        self.guard_pid = 0
        self._on_line = on_line
        self._guard: asyncio.subprocess.Process
        self._lifeline: socket.socket
        self.exited: asyncio.Task[int]

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        *,
        on_line: LineCallback | None = None,
        grace: float = 5.0,
        cwd: Path | None = None,
        identity: tuple[int, int] | None = None,
        environment: Mapping[str, str] | None = None,
        secret: bool = False,
    ) -> Child:
        """Start `command`; returns before it is ready.

        `identity` is the (uid, gid) that root becomes for it. `secret`: its standard output stays out of `tail`.
        """
        self = cls(name, on_line, secret=secret)
        argv = [sys.executable, "-I", "-S", str(GUARD), "--grace", str(grace)]
        if cwd is not None:
            argv += ["--cwd", str(cwd)]
        if identity is not None:
            argv += ["--uid", str(identity[0]), "--gid", str(identity[1])]
        ours, theirs = socket.socketpair()
        try:
            ours.setblocking(False)
            self._guard = await asyncio.create_subprocess_exec(
                *argv,
                "--",
                *command,
                stdin=theirs.fileno(),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # a terminal's Ctrl-C and hang-up are for the launcher to act on
                env=child_environment() if environment is None else dict(environment),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.guard_pid = self._guard.pid
        self._lifeline = ours
        self.exited = asyncio.create_task(self._follow(), name=f"child {name}")
        return self

    async def _follow(self) -> int:
        assert self._guard.stdout is not None
        assert self._guard.stderr is not None
        try:
            await asyncio.gather(
                self._read("stdout", self._guard.stdout),
                self._read("stderr", self._guard.stderr),
                self._read_reports(),
            )
            status = await self._guard.wait()
        finally:
            self._lifeline.close()
        if self.status is None:  # the guard was killed; the kernel has killed the child then
            self.status = status
        return self.status

    async def _read(self, name: Stream, stream: asyncio.StreamReader) -> None:
        pending = b""
        while chunk := await stream.read(65536):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._line(name, line)
            if len(pending) > LINE_LIMIT:
                self._line(name, pending)
                pending = b""
        if pending:
            self._line(name, pending)

    def _line(self, name: Stream, raw: bytes) -> None:
        line = raw[:LINE_LIMIT].decode("utf-8", "replace").rstrip()
        if line:
            if not (self._secret and name == "stdout"):
                self.tail.append(line)
            if self._on_line is not None:
                self._on_line(name, line)

    async def _read_reports(self) -> None:
        loop, pending = asyncio.get_running_loop(), b""
        while True:
            try:
                chunk = await loop.sock_recv(self._lifeline, 256)
            except OSError:
                chunk = b""
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                word, _, number = line.partition(b" ")
                if word == b"pid":
                    self.pid = int(number)
                elif word == b"exit":
                    self.status = int(number)

    def describe_end(self) -> str:
        """How it ended, in words: `exit status 3` or `killed by SIGKILL`."""
        if self.status is None:
            return "still running"
        if self.status < 0:
            try:
                return f"killed by {signal.Signals(-self.status).name}"
            except ValueError:
                return f"killed by signal {-self.status}"
        return f"exit status {self.status}"

    def ask_to_stop(self) -> None:
        """SIGTERM for the child's process group, SIGKILL after the grace time. Returns at once."""
        self._say(b"t")

    def kill(self) -> None:
        """SIGKILL for the child's process group now."""
        self._say(b"k")

    def _say(self, what: bytes) -> None:
        try:
            self._lifeline.send(what)
        except OSError:  # the guard has ended, and its child before it
            pass

    async def stop(self) -> int:
        """Ask it to stop and wait for its end, which the guard bounds by the grace time."""
        self.ask_to_stop()
        return await asyncio.shield(self.exited)


def child_environment() -> dict[str, str]:
    """Our environment without the variables that would change what the connector does."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TUNNEL_")}
    kept["PYTHONUNBUFFERED"] = "1"
    return kept
