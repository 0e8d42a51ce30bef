"""pycapnp's event loop, shared by everybody who runs in this one.

Owns: the count of its users per asyncio loop. In: `async with kj_loop()`. Out: a KJ loop that runs meanwhile.
Never: ends it while another tunnel of the same program still uses it.

pycapnp takes one KJ loop per thread and refuses a second. Its entering and leaving stay in one task of their own, since
tunnels come and go in any order.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

import capnp


class _Shared:
    """One asyncio loop's KJ loop. `task` runs it from `up` to `over`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.users = 0
        self.up: asyncio.Future[None] = loop.create_future()
        self.over = asyncio.Event()
        self.task = loop.create_task(_run(self), name="KJ loop")


_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _Shared] = WeakKeyDictionary()


@asynccontextmanager
async def kj_loop() -> AsyncIterator[None]:
    """Have a KJ loop inside this asyncio loop: the one that runs already, or a new one for all who come later."""
    loop = asyncio.get_running_loop()
    shared = _loops.get(loop)
    if shared is None:
        shared = _loops[loop] = _Shared(loop)
    shared.users += 1
    try:
        await asyncio.shield(shared.up)
        yield
    finally:
        shared.users -= 1
        if not shared.users:
            _loops.pop(loop, None)
            shared.over.set()
            await asyncio.gather(shared.task, return_exceptions=True)


async def _run(shared: _Shared) -> None:
    entered = capnp.kj_loop()
    try:
        await entered.__aenter__()
    except RuntimeError:
        # The program runs one by itself, and keeps it as long as it needs: ours is not needed.
        shared.up.set_result(None)
        await shared.over.wait()
        return
    try:
        shared.up.set_result(None)
        await shared.over.wait()
    finally:
        await entered.__aexit__(None, None, None)
