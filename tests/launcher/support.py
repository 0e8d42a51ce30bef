"""What the launcher's tests share: a broker with users, ends of processes, programs that stand in for others."""

from __future__ import annotations

import asyncio
import os
import select
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from launcher import mosquitto, selfcheck
from launcher.credentials import User, new_password
from launcher.errors import HopError
from launcher.mosquitto import Broker

needs_mosquitto = pytest.mark.skipif(
    mosquitto.find_program("mosquitto") is None,
    reason="NO MOSQUITTO HERE: the broker is not tested (apt install mosquitto)",
)
linux = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd (Linux)")


def users() -> tuple[User, User]:
    return User("demo", new_password(), ("demo/#",)), User("health", new_password(), (selfcheck.CHECK_TOPIC,))


async def accepts(broker: Broker, user: User) -> None:
    """Until both listeners let `user` in."""
    for port, path in ((broker.mqtt_port, None), (broker.ws_port, "/mqtt")):
        proxied = broker.proxied and path is not None
        target = selfcheck.Target("127.0.0.1", port, path, mqtt5=broker.mqtt5, proxied=proxied)
        while True:
            try:
                await asyncio.to_thread(selfcheck.check_listener, target, user)
                break
            except HopError:
                await asyncio.sleep(0.02)


@asynccontextmanager
async def running_mosquitto(directory: Path, demo: User, health: User) -> AsyncIterator[Broker]:
    binary = mosquitto.find_mosquitto()
    assert binary is not None
    broker = await mosquitto.start(
        directory, [demo, health], binary, on_line=None, ready=lambda broker: accepts(broker, health)
    )
    try:
        yield broker
    finally:
        await broker.child.stop()


def wait_gone(pid: int, limit: float = 15.0) -> None:
    """Until the process `pid` has ended (reaped or not)."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        readable, _, _ = select.select([descriptor], [], [], limit)
        assert readable, f"process {pid} still runs after {limit} s"
    finally:
        os.close(descriptor)


def marked(mark: str) -> dict[int, str]:
    """Live processes whose environment holds `mark`, with their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if mark.encode() not in (entry / "environ").read_bytes():
                continue
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except (OSError, ValueError):
            continue  # it ended while we looked, or is another user's
        if state != "Z":
            found[int(entry.name)] = command
    return found


def wait_none_marked(mark: str, limit: float = 20.0) -> None:
    """Until no process with `mark` lives; waits for each by its pid."""
    deadline = time.monotonic() + limit
    while left := marked(mark):
        assert time.monotonic() < deadline, f"still running: {left}"
        for pid in left:
            wait_gone(pid, max(0.1, deadline - time.monotonic()))


def program(path: Path, script: str) -> str:
    """An executable shell script."""
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return str(path)
