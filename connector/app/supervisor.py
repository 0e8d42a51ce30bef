"""Keeps the HA connections running: starts them, notices when they end, stops them together.

Owns: the tasks of the edge connections, the order in which they start, the slow schedule, and what the process does in
the background for all of them: look-ups, the probe of QUIC, the return to it, wake-ups. In: TunnelState.
Out: returns when all ended. Never: knows why a connection failed, beyond the error that it raises to end the process.

Strategy: one loop over one event. Whatever happens (a registration, a task's end, the wish to stop) sets the event; the
loop then looks at the facts and does what is due.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from connector.app.connection import EdgeConnection, WaitTogetherError
from connector.app.durations import format_duration
from connector.app.state import TunnelState
from connector.errors import EdgeDialError
from connector.protocol.outer_backoff import OuterBackoff
from connector.protocol.protocol_choice import Transport
from connector.protocol.wake_budget import WakeBudget
from connector.wire.token import Token

START_INTERVAL = 1.0
"""Seconds between the starts of further connections, as cloudflared has it."""

STOP_SLACK = 1.0
"""Seconds past the grace period after which connections that still run are cancelled."""


RETURN_TICK = 5.0
"""How often connections over HTTP/2 are looked at while QUIC may be there again."""


class Connection(Protocol):
    """One edge connection, here (EdgeConnection) or in a worker."""

    conn_index: int

    async def run(self) -> None:
        """Keep it up. Returns after `stop`; raises WaitTogetherError, or what ends the process."""

    def stop(self) -> None:
        """Begin the graceful end. Idempotent."""

    def wake(self) -> bool:
        """End the back-off sleep, if one is running."""

    def check(self) -> None:
        """Find out soon whether the link still works."""

    def move_on(self) -> None:
        """Leave the link that serves now to drain apart, and dial again."""

    def reconnect(self, delay: float) -> None:
        """The same, with a pause before the dial."""


class Supervisor:
    """One per run. `await run()`; `stop()` from a signal handler; `woken()` when the machine's network changed.

    `look_up_records` asks the edge's TXT records and tells `TransportChoice`; None where nobody is to be asked.
    `connect` makes the connections.
    """

    def __init__(
        self,
        state: TunnelState,
        wanted: int,
        *,
        look_up_records: Callable[[], Awaitable[None]] | None = None,
        connect: Callable[[int, TunnelState], Connection] = EdgeConnection,
    ) -> None:
        self._state = state
        self._connect = connect
        self._wanted = wanted
        self._look_up_records = look_up_records
        self._changed = asyncio.Event()
        self._connections: list[Connection] = []
        self._tasks: dict[asyncio.Task[None], Connection] = {}
        self._background: dict[str, asyncio.Task[Any]] = {}
        self._error: BaseException | None = None
        self._next_start = 0.0
        self._outer = OuterBackoff()
        self._counted = 0  # registrations that the slow schedule knows of
        self._wakes = WakeBudget()
        state.on_change = self._changed.set

    def stop(self) -> None:
        """End gracefully: every connection unregisters and drains, at most for the grace period. Idempotent."""
        if self._state.stop_deadline is None:
            self._state.stop_deadline = asyncio.get_running_loop().time() + self._state.config.grace_period
        for connection in self._connections:
            connection.stop()
        self._changed.set()

    def woken(self, causes: str) -> None:
        """Take news of the machine's network: links are checked, and connections that wait retry at once.

        `causes` is for the log.
        """
        if self._state.stopping:
            return
        loop = asyncio.get_running_loop()
        self._state.book.network_changed()
        self._state.choice.network_changed()
        for connection in self._connections:
            connection.check()
        self._wakes, wait = self._wakes.woken(now=loop.time(), random=random.random())  # noqa: S311  (jitter)
        self._state.log.debug("The network changed", event=0, causes=causes, retry=wait is not None)
        if wait is not None:
            loop.call_later(wait, self._wake)
        self._changed.set()

    def use_token(self, token: Token) -> None:
        """Register again with `token`, one connection after the other; what is in flight is not cut."""
        self._state.rotation.begin(token, range(len(self._connections)))
        self._changed.set()

    def reconnect(self, delay: float) -> None:
        """Restart one connection, whichever, after `delay` seconds."""
        connected = list(self._state.connected)
        if connected and not self._state.stopping:
            self._connections[random.choice(connected)].reconnect(delay)  # noqa: S311  (no secret)

    async def run(self) -> None:
        """Run until every connection has ended; raises the error that ended the process."""
        state, loop = self._state, asyncio.get_running_loop()
        if not state.stopping:
            self._start()
        try:
            while (self._tasks or self._outer.waiting) and self._error is None:
                self._changed.clear()
                if state.stop_deadline is not None:
                    due: float | None = state.stop_deadline + STOP_SLACK
                    if loop.time() >= state.stop_deadline + STOP_SLACK:
                        return
                    self._outer = OuterBackoff()
                    if not self._tasks:
                        return
                else:
                    due = self._do_what_is_due(loop.time())
                try:
                    async with asyncio.timeout_at(due):
                        await self._changed.wait()
                except TimeoutError:
                    pass
        finally:
            rest = [*self._tasks, *self._background.values()]
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
        if self._error is not None:
            raise self._error

    def _do_what_is_due(self, now: float) -> float | None:
        """Start what should run now; give the time of the next look, None when only an event can bring news."""
        state, choice = self._state, self._state.choice
        due: list[float | None] = []
        if state.registrations and len(self._connections) < self._wanted:
            if now >= self._next_start:
                self._next_start = now + START_INTERVAL
                self._start()
            due.append(self._next_start)
        self._outer, restart = self._outer.fire(now)
        self._restart(restart)
        due.append(self._outer.fire_at)
        if state.registrations > self._counted and len(state.connected) == len(self._tasks):
            self._counted = state.registrations
            self._outer = self._outer.all_connected(now=now, random=random.random())  # noqa: S311  (jitter)
        moving = state.rotation.next_move(state.connected, state.registrations)
        if moving is not None:
            self._connections[moving].move_on()
        if state.book.refresh_due():
            self._run("look the edge up again", state.book.refresh)
        if self._look_up_records is not None and choice.records_due():
            choice.records_tried()
            self._run("look the edge's records up", self._look_up_records)
        if choice.probe_due():
            self._run("probe QUIC", self._probe)
        due.append(choice.next_probe())
        if Transport.HTTP2 in state.transports.values() and choice.may_return:
            conn_index = choice.next_return(state.transports)
            if conn_index is not None:
                self._connections[conn_index].move_on()
            due.append(now + RETURN_TICK)
        return min((at for at in due if at is not None), default=None)

    def _start(self) -> None:
        connection = self._connect(len(self._connections), self._state)
        self._connections.append(connection)
        self._let_run(connection)

    def _restart(self, indices: tuple[int, ...]) -> None:
        for conn_index in indices:
            self._let_run(self._connections[conn_index])

    def _let_run(self, connection: Connection) -> None:
        task = asyncio.create_task(connection.run(), name=f"edge connection {connection.conn_index}")
        self._tasks[task] = connection
        self._state.connection_tasks = len(self._tasks)
        task.add_done_callback(self._ended)

    def _wake(self) -> None:
        if self._state.stopping:
            return
        self._outer, restart = self._outer.wake()
        self._restart(restart)
        woken = sum([connection.wake() for connection in self._connections]) + len(restart)
        if woken:
            self._state.log.info("The network changed: connections that waited retry now", event=0, connections=woken)

    async def _probe(self) -> None:
        """Shake hands over QUIC in the background, to learn whether it works again."""
        state = self._state
        address = state.book.known()
        if address is None:
            return
        state.choice.probing(address.port)
        try:
            await state.dialler.probe_quic(address)
        except EdgeDialError as error:
            state.choice.probed(error)
        else:
            state.choice.probed(None)

    def _run(self, what: str, work: Callable[[], Awaitable[Any]]) -> None:
        """Run `work` in the background, once at a time; a failure of it is a bug, and only logged."""
        if what in self._background:
            return

        def done(task: asyncio.Task[Any]) -> None:
            del self._background[what]
            if not task.cancelled() and (error := task.exception()) is not None:
                self._state.log.bug(f"Failed to {what}", error)
            self._changed.set()

        task = asyncio.create_task(_awaited(work()), name=what)
        self._background[what] = task
        task.add_done_callback(done)

    def _ended(self, task: asyncio.Task[None]) -> None:
        connection = self._tasks.pop(task)
        self._state.connection_tasks = len(self._tasks)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, WaitTogetherError):
            self._outer = self._outer.failed(
                connection.conn_index,
                now=asyncio.get_running_loop().time(),
                random=random.random(),  # noqa: S311  (jitter)
            )
            limit = format_duration(self._outer.wait_limit)
            self._state.log.bind(connIndex=connection.conn_index, event=0).info(
                f"Connection starts over in up to {limit}"
            )
        elif error is not None and self._error is None:
            self._error = error
        self._changed.set()


async def _awaited(work: Awaitable[Any]) -> Any:
    return await work
