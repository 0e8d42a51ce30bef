"""The process that keeps a native stack running: `python -m launcher.supervise DIRECTORY`.

Owns: both children (behind their guards), their restarts, their logs, native.json, the order of start and end.
In: a stack directory that `up` has prepared. Signals: TERM or INT stop the stack, HUP lets the broker read its users
    and rules again. Out: native.json after every change; logs/*.log; exit status 0, or 1 (native.json says why).
Never: outlives its lock, leaves a child behind (guard.py ends them when this process dies), decides what to run.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import fcntl
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from launcher import selfcheck
from launcher.accounts import CHECK_TOPIC, HEALTH
from launcher.credentials import User
from launcher.errors import HopError
from launcher.identity import Identity
from launcher.processes import Child, Stream
from launcher.stack import BROKER, CONNECTOR

PLAN, STATE, LOCK = "native-plan.json", "native.json", "native.lock"
BROKER_GRACE, CONNECTOR_GRACE = 30.0, 40.0
BROKER_SECONDS = 30.0
HEALTH_EVERY = 30.0
UNHEALTHY_AFTER = 3
BACKOFF_FIRST, BACKOFF_LAST = 0.5, 30.0
STABLE = 60.0
"""A child that ran for so long starts again at once when it ends; one that did not waits twice as long as last time."""

LOG_BYTES = 5_000_000
"""One log file; the one before it is kept, so that a stack needs at most 20 MB for logs."""


class LogFile:
    """Lines with their time; a new file when it grows too long. A full disk loses lines, never the stack."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def write(self, line: str) -> None:
        """Append one line."""
        stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        with contextlib.suppress(OSError):
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(f"{stamp} {line}\n")
            self._file.flush()
            if self._file.tell() > LOG_BYTES:
                self.close()
                os.replace(self.path, self.path.with_suffix(".log.1"))

    def close(self) -> None:
        """Close it; the next line opens it again."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


@dataclass(slots=True)
class Running:
    """One service under supervision."""

    name: str
    state: str = "absent"
    health: str = ""
    restarts: int = 0
    since: str = ""
    detail: str = ""
    child: Child | None = None
    log: LogFile | None = None
    ids: dict[str, list[Any]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What native.json says about it."""
        return {
            "state": self.state,
            "health": self.health,
            "restarts": self.restarts,
            "since": self.since,
            "detail": self.detail,
            **self.ids,
        }


class Supervisor:
    """One run over one directory. Call `run` once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.plan: dict[str, Any] = {}
        self.services = {name: Running(name) for name in (BROKER, CONNECTOR)}
        self.failure = ""
        self._stopping = asyncio.Event()

    def publish(self) -> None:
        """Write native.json in one step; a full disk keeps the old one."""
        me = Identity.of(os.getpid())
        facts = {
            "pid": me.pid,
            "start": me.start,
            "hash": self.plan.get("hash"),
            "metrics": self.plan.get("metrics"),
            "stopping": self._stopping.is_set(),
            "failure": self.failure,
            "services": {name: one.facts() for name, one in self.services.items()},
        }
        with contextlib.suppress(OSError):
            descriptor, name = tempfile.mkstemp(prefix=".new-", dir=self.directory)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump(facts, file)
                os.replace(name, self.directory / STATE)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise

    async def run(self) -> int:
        """Until told to stop, or the broker cannot be started at all."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        self.plan = json.loads((self.directory / PLAN).read_text(encoding="utf-8"))
        (self.directory / "logs").mkdir(mode=0o700, exist_ok=True)
        for one in self.services.values():
            one.log = LogFile(self.directory / "logs" / f"{one.name}.log")
        self.publish()
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._start(BROKER)
            if not await self._broker_healthy():
                return 1
            tasks.append(asyncio.create_task(self._keep(BROKER), name="keep broker"))
            await self._start(CONNECTOR)
            tasks.append(asyncio.create_task(self._keep(CONNECTOR), name="keep connector"))
            tasks.append(asyncio.create_task(self._watch_health(), name="health"))
            await self._stopping.wait()
            return 0
        finally:
            self._stopping.set()
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            self.publish()
            for name in (CONNECTOR, BROKER):  # the connector drains while the broker still answers
                child = self.services[name].child
                if child is not None:
                    await child.stop()
                    self.services[name].state = "absent" if not self.failure else "exited"
                    self.publish()
            for one in self.services.values():
                if one.log is not None:
                    one.log.close()

    def _reload(self) -> None:
        child = self.services[BROKER].child
        if child is not None and child.pid is not None:
            Identity.of(child.pid).send(signal.SIGHUP)

    async def _start(self, name: str) -> None:
        one, plan = self.services[name], self.plan[name]

        def on_line(_stream: Stream, line: str) -> None:
            if one.log is not None:
                one.log.write(line)

        identity = plan.get("identity")
        one.child = await Child.start(
            name,
            plan["command"],
            on_line=on_line,
            grace=BROKER_GRACE if name == BROKER else CONNECTOR_GRACE,
            cwd=Path(plan["cwd"]) if plan.get("cwd") else None,
            identity=(identity[0], identity[1]) if identity else None,
        )
        one.state = "running"
        one.since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        guard = Identity.of(one.child.guard_pid)
        one.ids = {"guard": [guard.pid, guard.start]}
        while one.child.pid is None and not one.child.exited.done():  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(0.01)  # the guard's first report
        if one.child.pid is not None:
            me = Identity.of(one.child.pid)
            one.ids["process"] = [me.pid, me.start]
        self.publish()

    def _check(self) -> float:
        password = (self.directory / "broker" / "health" / "password").read_text(encoding="utf-8")
        target = selfcheck.Target("127.0.0.1", int(self.plan["mqtt_port"]))
        return selfcheck.round_trip(target, User(HEALTH, password, ()), CHECK_TOPIC)

    async def _healthy(self) -> str:
        """Empty when the broker works, else why not."""
        if not self.plan.get("managed", True):  # somebody's own mosquitto.conf: its users are unknown
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", int(self.plan["mqtt_port"]))
                writer.close()
                return ""
            except OSError as error:
                return str(error)
        try:
            await asyncio.to_thread(self._check)
            return ""
        except (HopError, selfcheck.RefusedError, OSError) as error:
            return str(error)

    async def _broker_healthy(self) -> bool:
        one = self.services[BROKER]
        assert one.child is not None
        deadline, why = time.monotonic() + BROKER_SECONDS, ""
        while time.monotonic() < deadline and not self._stopping.is_set():
            if one.child.exited.done():
                tail = " | ".join(list(one.child.tail)[-4:])
                why = f"it ended ({one.child.describe_end()}): {tail}"
                break
            why = await self._healthy()
            if not why:
                one.health = "healthy"
                self.publish()
                return True
            await asyncio.sleep(0.1)
        if not self._stopping.is_set():
            self.failure = f"the broker did not become healthy: {why}"
        return False

    async def _keep(self, name: str) -> None:
        one, pause = self.services[name], BACKOFF_FIRST
        while True:
            begun = time.monotonic()
            assert one.child is not None
            await asyncio.shield(one.child.exited)
            one.state, one.health = "restarting", ""
            one.detail = one.child.describe_end()
            if one.log is not None:
                one.log.write(f"launcher: the {name} ended ({one.detail}); it is started again")
            asked = one.child.status in {0, -signal.SIGTERM}
            pause = BACKOFF_FIRST if asked or time.monotonic() - begun > STABLE else min(pause * 2, BACKOFF_LAST)
            self.publish()
            await asyncio.sleep(0.0 if asked else pause)
            one.restarts += 1
            await self._start(name)
            if name == BROKER:
                for _ in range(100):
                    if one.child.exited.done() or not await self._healthy():
                        break
                    await asyncio.sleep(0.2)
                one.health = "" if one.child.exited.done() else "healthy"
                self.publish()

    async def _watch_health(self) -> None:
        one, failures = self.services[BROKER], 0
        while True:
            await asyncio.sleep(HEALTH_EVERY)
            if one.state != "running":
                continue
            why = await self._healthy()
            failures = failures + 1 if why else 0
            health = "unhealthy" if failures >= UNHEALTHY_AFTER else "healthy" if not failures else one.health
            if health != one.health:
                one.health, one.detail = health, why
                self.publish()


def supervise(directory: Path) -> int:
    """Take the lock and run; 3 when another supervisor has it."""
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("another supervisor has this directory", file=sys.stderr)
            return 3
        return asyncio.run(Supervisor(directory).run())
    finally:
        os.close(descriptor)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m launcher.supervise DIRECTORY`."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("usage: python -m launcher.supervise DIRECTORY", file=sys.stderr)
        return 2
    return supervise(Path(arguments[0]))


if __name__ == "__main__":
    raise SystemExit(main())
