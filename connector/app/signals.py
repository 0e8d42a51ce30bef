"""SIGTERM and SIGINT: the first stops gracefully, at any time of a run; the second ends the process at once.

Owns: the dispositions of both signals while a run lasts. In: signals; what to do at the first one. Out: one log line.
Never: ends a run itself.
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
    """The first signal came while the run was still starting."""


class Signals:
    """One per process. `install()` first of all; `starting()` around the start; `then(stop)` when it is over."""

    def __init__(self, loop: asyncio.AbstractEventLoop, log: Logger) -> None:
        self._stop: Callable[[], None] = lambda: None
        self._loop = loop
        self._log = log
        self._stopped = False
        self._scope: asyncio.Timeout | None = None

    def install(self) -> None:
        """Take the signals over."""
        for number in _SIGNALS:
            if sys.platform == "win32":
                signal.signal(number, lambda number, _: self._loop.call_soon_threadsafe(self._first, number))
            else:
                self._loop.add_signal_handler(number, self._first, number)

    def then(self, stop: Callable[[], None]) -> None:
        """Have the first signal call `stop`: at once if it came already."""
        self._stop = stop
        if self._stopped:
            stop()

    @asynccontextmanager
    async def starting(self) -> AsyncIterator[None]:
        """Surround waits of the start: a first signal ends them with StoppedEarlyError (also one that came before)."""
        if self._stopped:
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
        if self._stopped:
            raise StoppedEarlyError

    def _first(self, number: int) -> None:
        for each in _SIGNALS:
            if sys.platform != "win32":
                self._loop.remove_signal_handler(each)
            signal.signal(each, self._second)
        self._stopped = True
        self._log.info(f"Initiating graceful shutdown due to signal {_SIGNALS[signal.Signals(number)]} ...")
        if self._scope is not None:
            self._scope.reschedule(self._loop.time())
        self._stop()

    @staticmethod
    def _second(number: int, _: FrameType | None) -> None:
        """Die of the signal itself. Process 1 of a container cannot: the kernel drops it there, so exit by hand."""
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        os._exit(128 + number)
