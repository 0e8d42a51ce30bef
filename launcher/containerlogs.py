"""The log lines of a stack's containers, merged by time, and taken up again when a container restarts.

Owns: reading and following; the engine's timestamps.
In: services. Out: `LogLine`s.
Never: keeps more lines than its queue; reads what a line means.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Sequence
from typing import Any

from launcher import containerspec as spec
from launcher.engineapi import explained
from launcher.stack import BROKER, CONNECTOR, LogLine
from launcher.stackdir import Settings, StackError

FOLLOW_QUEUE = 1_000
"""Log lines between the engine and a slow terminal; past it the engine's stream waits."""


class Logs:
    """The part of `Containers` that reads logs."""

    settings: Settings

    async def _find(self, name: str) -> tuple[Any, dict[str, Any]] | None:
        raise NotImplementedError

    async def logs(self, services: Sequence[str], *, follow: bool, tail: int) -> AsyncIterator[LogLine]:
        """Lines of both; when one restarts, its stream is taken up again."""
        names = {BROKER: spec.broker_name(self.settings.name), CONNECTOR: spec.connector_name(self.settings.name)}
        lines: list[LogLine] = []
        for service in services if tail else ():
            found = await self._find(names[service])
            if found is None:
                continue
            async with explained(f"reading the log of {names[service]}"):
                chunks = await found[0].log(stdout=True, stderr=True, timestamps=True, tail=tail)
            lines += [_log_line(service, raw) for raw in "".join(chunks).splitlines() if raw]
        last: dict[str, str] = {}
        for line in sorted(lines, key=lambda line: line.time):
            last[line.service] = line.time
            yield line
        if not follow:
            return
        queue: asyncio.Queue[LogLine | StackError] = asyncio.Queue(FOLLOW_QUEUE)
        following = [self._follow(service, names[service], last.get(service, ""), queue) for service in services]
        tasks = [asyncio.create_task(work, name="follow a log") for work in following]
        try:
            while True:
                item = await queue.get()
                if isinstance(item, StackError):
                    raise item
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _follow(self, service: str, name: str, since: str, queue: asyncio.Queue[LogLine | StackError]) -> None:
        """Lines later than the time `since`; from now on when there is none."""
        options = {"since": _unix(since)} if since else {"tail": "0"}
        try:
            while True:
                found = await self._find(name)
                if found is None:
                    options = {}  # what is made later is told from its first line
                else:
                    async with explained(f"following the log of {name}", missing_ok=True):
                        stream = found[0].log(
                            stdout=True, stderr=True, follow=True, timestamps=True, timeout=None, **options
                        )
                        pending = ""
                        async for chunk in stream:
                            *whole, pending = (pending + chunk).split("\n")
                            for raw in whole:
                                line = _log_line(service, raw)
                                if raw and line.time > since:
                                    since = line.time
                                    await queue.put(line)
                    options = {"since": _unix(since)} if since else {}
                await asyncio.sleep(0.5)  # the stream ends with the container, also when that comes back
        except StackError as error:
            await queue.put(error)


def _log_line(service: str, raw: str) -> LogLine:
    stamp, _, text = raw.partition(" ")
    return LogLine(service, stamp, text.rstrip())


def _unix(stamp: str) -> str:
    """Seconds and nanoseconds as the logs API wants `since`."""
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    try:
        moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    except ValueError:
        return "0"
    return f"{int(moment.timestamp())}.{(fraction + '000000000')[:9]}"
