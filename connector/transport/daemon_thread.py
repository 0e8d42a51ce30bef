"""Blocking calls of the system in a thread that nobody has to wait for.

Owns: one daemon thread per call, MAX_THREADS at once and loop. In: a function. Out: what it returns or raises.
Never: holds the end of the process up. The loops' own executor does: its threads are joined at the end, however long
the C library waits for a resolver or a dead mount.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Final, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

MAX_THREADS: Final = 32
"""Calls at once; more wait for their turn. As many as asyncio's own executor has at most."""

_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


async def in_daemon_thread(function: Callable[[], T], name: str) -> T:
    """Return what `function` returns. Errors: its own. May be cancelled at any time; the thread then ends by itself."""
    loop = asyncio.get_running_loop()
    turns = _turns.get(loop)
    if turns is None:
        turns = _turns[loop] = asyncio.Semaphore(MAX_THREADS)
    await turns.acquire()  # given back when the thread has ended, not when nobody waits any more
    answered: asyncio.Future[T] = loop.create_future()

    def end(act: Callable[[], None]) -> None:
        turns.release()
        if not answered.done():
            act()

    def deliver(act: Callable[[], None]) -> None:
        try:
            loop.call_soon_threadsafe(end, act)
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more

    def work() -> None:
        try:
            result = function()
        except Exception as error:
            failure = error
            deliver(lambda: answered.set_exception(failure))
        else:
            deliver(lambda: answered.set_result(result))

    threading.Thread(target=work, name=name, daemon=True).start()
    return await answered
