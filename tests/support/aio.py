"""Running coroutines in tests: one loop per test, a hard limit, and no task left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(
    main: Coroutine[Any, Any, T],
    *,
    limit: float = 60.0,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> T:
    """Run `main` on a fresh loop; fail after `limit` seconds, or when it returns and leaves tasks running."""

    async def guarded() -> T:
        async with asyncio.timeout(limit):
            result = await main
        for _ in range(20):  # what ended just now may need a few turns to notice
            await asyncio.sleep(0)
            if len(asyncio.all_tasks()) == 1:
                break
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left, f"tasks left behind: {left}"
        return result

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(guarded())


async def until(condition: Callable[[], object], *, limit: float = 30, what: str = "condition") -> None:
    """Poll `condition` each loop turn until it is true; for observables that offer no event."""
    try:
        async with asyncio.timeout(limit):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"still not true after {limit} s: {what}") from None
