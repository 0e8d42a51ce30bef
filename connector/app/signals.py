"""How a run is asked to end: by a signal (SIGTERM, SIGINT), or by the program that it is a part of.

Owns: the wish to stop, and the dispositions of both signals while a process runs. In: signals, `Stop.ask`.
Out: the call that was left with `Stop.then`; one log line. Never: ends a run itself.

The first signal stops gracefully, at any time of a run; the second ends the process at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import FrameType

from connector.app.logs import Logger

_SIGNALS = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupt"}


class StoppedEarlyError(Exception):
    """The wish to stop came while the run was still starting."""


class Stop:
    """The wish to end one run: asked for at most once. `starting()` surrounds the start, `then(stop)` ends it."""

    def __init__(self) -> None:
        self.asked = False
        self.heard: list[Callable[[], None]] = []
        """Called when it is asked for, before anything stops."""
        self._stop: Callable[[], None] = lambda: None
        self._scope: asyncio.Timeout | None = None

    def ask(self) -> None:
        """Stop gracefully. Idempotent; from the loop's thread."""
        if self.asked:
            return
        self.asked = True
        for hear in self.heard:
            hear()
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())
        self._stop()

    def then(self, stop: Callable[[], None]) -> None:
        """Have `ask` call `stop`: at once if it was asked already."""
        self._stop = stop
        if self.asked:
            stop()

    @asynccontextmanager
    async def starting(self) -> AsyncIterator[None]:
        """Surround waits of the start: `ask` ends them with StoppedEarlyError (also one that came before)."""
        if self.asked:
            raise StoppedEarlyError
        try:
            async with asyncio.timeout(None) as scope:
                self._scope = scope
                yield
        except TimeoutError:
            if scope.expired():
                raise StoppedEarlyError from None
            raise
        finally:
            self._scope = None
        if self.asked:
            raise StoppedEarlyError


class Signals:
    """The two signals of a process. `install()` first of all: a signal must never find Python's default in force."""

    def __init__(self, loop: asyncio.AbstractEventLoop, log: Logger, stop: Stop) -> None:
        self._loop = loop
        self._log = log
        self._stop = stop

    def install(self) -> None:
        """Take the signals over."""
        for number in _SIGNALS:
            if sys.platform == "win32":
                signal.signal(number, lambda number, _: self._loop.call_soon_threadsafe(self._first, number))
            else:
                self._loop.add_signal_handler(number, self._first, number)

    def _first(self, number: int) -> None:
        for each in _SIGNALS:
            if sys.platform != "win32":
                self._loop.remove_signal_handler(each)
            signal.signal(each, self._second)
        self._log.info(f"Initiating graceful shutdown due to signal {_SIGNALS[signal.Signals(number)]} ...")
        self._stop.ask()

    @staticmethod
    def _second(number: int, _: FrameType | None) -> None:
        """Die of the signal itself. Process 1 of a container cannot: the kernel drops it there, so exit by hand."""
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        os._exit(128 + number)
