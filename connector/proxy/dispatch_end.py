"""How a dispatcher ends: waiting for what it serves, then closing it.

Owns: the two coroutines of a Dispatcher. In: a Dispatcher. Out: nothing is left of it.
Never: serves anything.

Apart from the dispatcher, whose callbacks every request runs through: coroutines stay interpreted when it is compiled.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from connector.proxy import limits

if TYPE_CHECKING:
    from connector.proxy.dispatch import Dispatcher


async def drain(dispatcher: Dispatcher, timeout: float) -> bool:
    """Wait until no stream is active, at most `timeout` seconds; return whether that came true."""
    if dispatcher.active:
        await asyncio.wait([dispatcher.when_drained()], timeout=timeout)
    return not dispatcher.active


async def close(dispatcher: Dispatcher) -> None:
    """Cancel what is active, close all pools, and wait until nothing is left."""
    access = dispatcher.cancel_all()
    if access is not None:
        await access.close()
    pools = dispatcher.pools()
    for pool in pools:
        pool.abort()
    await dispatcher.flows.dns.close()
    try:
        async with asyncio.timeout(limits.CLOSE_WAIT):
            for pool in pools:
                await pool.wait_closed()
    except TimeoutError:
        pass
