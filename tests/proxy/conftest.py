"""Every test of the proxy runs on asyncio and on uvloop."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.support.aio import run
from tests.support.loops import LOOPS

Runner = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(params=list(LOOPS))
def on_loop(request: pytest.FixtureRequest) -> Runner:
    """Return `run` bound to one kind of loop."""

    def start(main: Coroutine[Any, Any, Any]) -> Any:
        return run(main, loop_factory=LOOPS[request.param])

    return start
