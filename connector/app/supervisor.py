"""Keeps the HA connections running: starts them, notices when they end, stops them together.

Owns: the tasks of the edge connections and the order in which they start. In: TunnelState. Out: returns when all ended.
Never: knows why a connection failed, beyond the error that it raises to end the process.

Strategy: one loop over one event. Whatever happens (a registration, a task's end, the wish to stop) sets the event; the
loop then looks at the facts and does what is due.
"""

from __future__ import annotations

import asyncio
from typing import Any

from connector.app.connection import EdgeConnection
from connector.app.state import TunnelState

START_INTERVAL = 1.0
"""Seconds between the starts of further connections, as cloudflared has it."""

STOP_SLACK = 1.0
"""Seconds past the grace period after which connections that still run are cancelled."""


class Supervisor:
    """One per run. `await run()`; `stop()` from a signal handler."""

    def __init__(self, state: TunnelState, wanted: int) -> None:
        self._state = state
        self._wanted = wanted
        self._changed = asyncio.Event()
        self._connections: list[EdgeConnection] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        self._next_start = 0.0
        self._refresh: asyncio.Task[bool] | None = None
        state.on_change = self._changed.set

    def stop(self) -> None:
        """End gracefully: every connection unregisters and drains, at most for the grace period. Idempotent."""
        if self._state.stop_deadline is None:
            self._state.stop_deadline = asyncio.get_running_loop().time() + self._state.config.grace_period
        for connection in self._connections:
            connection.stop()
        self._changed.set()

    async def run(self) -> None:
        """Run until every connection has ended; raises the error that ended the process."""
        state, loop = self._state, asyncio.get_running_loop()
        if not state.stopping:
            self._start()
        try:
            while self._tasks and self._error is None:
                self._changed.clear()
                due: float | None = None
                if state.stop_deadline is not None:
                    due = state.stop_deadline + STOP_SLACK
                    if loop.time() >= due:
                        return
                elif state.registrations and len(self._connections) < self._wanted:
                    if loop.time() >= self._next_start:
                        self._next_start = loop.time() + START_INTERVAL
                        self._start()
                    due = self._next_start
                if self._refresh is None and state.book.refresh_due() and not state.stopping:
                    self._refresh = asyncio.create_task(state.book.refresh(), name="look the edge up again")
                    self._refresh.add_done_callback(self._refreshed)
                try:
                    async with asyncio.timeout_at(due):
                        await self._changed.wait()
                except TimeoutError:
                    pass
        finally:
            rest: set[asyncio.Task[Any]] = {*self._tasks} if self._refresh is None else {*self._tasks, self._refresh}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
        if self._error is not None:
            raise self._error

    def _start(self) -> None:
        connection = EdgeConnection(len(self._connections), self._state)
        self._connections.append(connection)
        task = asyncio.create_task(connection.run(), name=f"edge connection {connection.conn_index}")
        self._tasks.add(task)
        self._state.connection_tasks = len(self._tasks)
        task.add_done_callback(self._ended)

    def _refreshed(self, task: asyncio.Task[bool]) -> None:
        self._refresh = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._state.log.bug("Looking the edge up again failed", error)  # the known addresses stay in use

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._state.connection_tasks = len(self._tasks)
        if not task.cancelled() and task.exception() is not None and self._error is None:
            self._error = task.exception()
        self._changed.set()
