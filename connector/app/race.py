"""Runs one race between QUIC and HTTP/2: the dials that `protocol_race.Race` orders, as tasks.

Owns: at most two tasks while one race lasts, and the links that lose. In: a function that dials. Out: a link.
Never: decides who wins; keeps anything after the race.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from connector.protocol.protocol_choice import Transport
from connector.protocol.protocol_race import Command, Order, Race, start_race
from connector.transport.link import Link

Dial = Callable[[Transport, Callable[[], None]], Awaitable[Link]]
"""Dials over the transport, and calls the function when the first packet comes back."""


class Finish(NamedTuple):
    """How a race ended well."""

    link: Link
    transport: Transport
    quic_heard: bool
    quic_error: BaseException | None
    """Why QUIC failed; None when it won, or was still trying."""


async def run_race(dial: Dial) -> Finish:
    """Give the link that came up first. When both fail, raises the error of the one that got further."""
    return await _Course(dial).run()


class _Course:
    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._loop = asyncio.get_running_loop()
        self._race: Race | None = None
        self._tasks: dict[Transport, asyncio.Task[Link]] = {}
        self._settled: set[Transport] = set()
        self._changed = asyncio.Event()
        self._won: Transport | None = None
        self._lost: Transport | None = None

    async def run(self) -> Finish:
        try:
            race, commands = start_race(self._loop.time())
            self._take(race, commands)
            while self._won is None and self._lost is None:
                await self._news()
                self._look()
            if self._won is None:
                assert self._lost is not None
                raise self._tasks[self._lost].exception() or RuntimeError("a race was given up without an error")
            assert self._race is not None
            finish = Finish(
                self._tasks[self._won].result(), self._won, self._race.quic_heard, self._error(Transport.QUIC)
            )
        except BaseException:
            await self._clear_away(None)
            raise
        try:
            await self._clear_away(finish.transport)
        except BaseException:  # called off in the last moment
            finish.link.abort()
            raise
        return finish

    async def _news(self) -> None:
        assert self._race is not None
        try:
            async with asyncio.timeout_at(self._race.next_timeout()):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    def _look(self) -> None:
        """Tell the race everything that happened."""
        assert self._race is not None
        for transport, task in list(self._tasks.items()):
            if task.done() and transport not in self._settled:
                self._settled.add(transport)
                failed = task.cancelled() or task.exception() is not None
                self._take(*(self._race.failed(transport) if failed else self._race.up(transport)))
        self._take(*self._race.timed_out(self._loop.time()))

    def _take(self, race: Race, commands: tuple[Command, ...]) -> None:
        self._race = race
        for order, transport in commands:
            match order:
                case Order.DIAL:
                    self._start(transport)
                case Order.USE:
                    self._won = transport
                case Order.GIVE_UP:
                    self._lost = transport
                case Order.CALL_OFF:
                    pass  # `_clear_away` ends whatever did not win

    def _start(self, transport: Transport) -> None:
        async def dial() -> Link:
            return await self._dial(transport, lambda: self._heard(transport))

        task = asyncio.create_task(dial(), name=f"dial over {transport.value}")
        self._tasks[transport] = task
        task.add_done_callback(lambda _: self._changed.set())

    def _heard(self, transport: Transport) -> None:
        if self._race is not None and not self._race.over:
            self._take(*self._race.heard(transport, self._loop.time()))
            self._changed.set()  # the time of HTTP/2's start moved

    def _error(self, transport: Transport) -> BaseException | None:
        task = self._tasks.get(transport)
        return task.exception() if task is not None and task.done() and not task.cancelled() else None

    async def _clear_away(self, winner: Transport | None) -> None:
        """End the dials that did not win; a link that came up meanwhile is closed."""
        losers = [task for transport, task in self._tasks.items() if transport is not winner]
        for task in losers:
            task.cancel()
            task.add_done_callback(_abort)
        await asyncio.gather(*losers, return_exceptions=True)


def _abort(task: asyncio.Task[Link]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().abort()
