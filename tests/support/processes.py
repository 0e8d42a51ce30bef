"""The programs as their users start them: child processes whose JSON lines a test can wait for."""

from __future__ import annotations

import base64
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from connector.devedge.authority import StateDir
from connector.devedge.server import tunnel_token
from connector.devedge.tunnels import Declaration, TunnelStore
from connector.wire.token import decode_token

Event = dict[str, Any]

SECRETS: set[str] = set()
"""Texts that no line of any program in any test may show: every token that a test got, and the secrets in them."""
ROOT = Path(__file__).resolve().parents[2]
MOSQUITTO = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")


class Child:
    """One child process: both its output streams are read to the end, JSON lines become events.

    `wait_for` returns the first event, already seen or still to come, for which the predicate holds; each call goes on
    where the last one stopped. Leaving the context ends the process (SIGTERM, then SIGKILL) by its id.
    """

    def __init__(
        self,
        *command: str | Path,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        self.command = [str(part) for part in command]
        base = {k: v for k, v in os.environ.items() if not k.startswith(("TUNNEL_", "NO_"))}
        self.process = subprocess.Popen(
            self.command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**base, "PYTHONUNBUFFERED": "1", "TUNNEL_NO_PRECHECKS": "true", **(env or {})},
            cwd=cwd or ROOT,
        )
        self.lines: list[str] = []
        self.events: list[Event] = []
        self._queue: queue.Queue[Event | None] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read, args=(stream,), daemon=True)
            for stream in (self.process.stdout, self.process.stderr)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any) -> None:
        with stream:
            for raw in stream:
                line = raw.decode("utf-8", "replace").rstrip("\n")
                self.lines.append(line)
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict):
                    self.events.append(event)
                    self._queue.put(event)
        self._queue.put(None)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, predicate: Callable[[Event], object], *, what: str, limit: float = 40) -> Event:
        deadline = time.monotonic() + limit
        ended = 0
        while True:
            try:
                event = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {what} within {limit} s from {self.command}:\n{self.text}") from None
            if event is None:
                ended += 1
                if ended == 2:
                    raise AssertionError(f"{self.command} ended without {what}:\n{self.text}")
            elif predicate(event):
                return event

    def event(self, name: str, *, limit: float = 40, **fields: object) -> Event:
        """Wait for a dev-edge event (`event` key) with the given fields."""
        return self.wait_for(
            lambda e: e.get("event") == name and all(e.get(k) == v for k, v in fields.items()),
            what=f"event {name} {fields or ''}",
            limit=limit,
        )

    def message(self, start: str, *, limit: float = 40) -> Event:
        """Wait for a log line (`message` key) that starts with `start`."""
        return self.wait_for(lambda e: str(e.get("message", "")).startswith(start), what=f"log {start!r}", limit=limit)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, limit: float = 40) -> int:
        """The exit status; both output streams have been read to their ends when this returns."""
        try:
            status = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.command} still runs after {limit} s:\n{self.text}") from None
        for reader in self._readers:
            reader.join(5)
        return status

    def memory(self, key: str = "VmRSS") -> int:
        """Bytes of `VmRSS` or `VmHWM` (peak)."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"no {key} for {self.pid}")

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        for reader in self._readers:
            reader.join(5)
        if kind is None:
            self.check_no_secret()

    def check_no_secret(self) -> None:
        """Fail when a line shows a secret; each Child of the suite is looked through at its end."""
        leaks = [line for line in self.lines if any(secret in line for secret in SECRETS)]
        assert not leaks, f"{self.command[:4]} shows a secret in {len(leaks)} lines; the first begins {leaks[0][:60]!r}"


def know_secret(token: str) -> str:
    """Let every Child be searched for a token, and for the secret in it in each form it could be printed."""
    decoded = decode_token(token)
    raw = decoded.secret
    forms = {token, base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode(), raw.hex(), repr(raw)[2:-1]}
    SECRETS.update(text.rstrip("=") for text in forms)
    return token


def connector(*args: str | Path, **kwargs: Any) -> Child:
    return Child(sys.executable, "-m", "connector", *args, **kwargs)


class Tunnel:
    """A dev edge and a connector that have found each other; what end-to-end tests start from."""

    def __init__(self, edge: Child, connector: Child, listening: Event, registered: Event, state: Path) -> None:
        self.edge = edge
        self.registered = registered
        self.connector = connector
        self.listening = listening
        self.ca = Path(listening["ca"])
        self.public: str = listening["public"]
        self.port = int(self.public.rpartition(":")[2])
        self.state = state


def edge_token(state: Path, name: str = "test") -> str:
    """What `connector edge token NAME --state-dir STATE` prints; a process for it is in tests/devedge/test_cli.py."""
    tunnel = TunnelStore(StateDir(state)).resolve([Declaration(name)])[0]
    return know_secret(tunnel_token(tunnel))


@contextmanager
def dev_edge(state: Path, *args: str, env: dict[str, str] | None = None) -> Iterator[tuple[Child, Event]]:
    with connector("edge", "--state-dir", state, "--output", "json", "--tunnel", "test", *args, env=env) as edge:
        yield edge, edge.event("listening")


@contextmanager
def tunnel(
    state: Path,
    ingress: str,
    *,
    edge_args: tuple[str, ...] = (),
    run_args: tuple[str, ...] = (),
    command: tuple[str, ...] | None = None,
    env: dict[str, str] | None = None,
) -> Iterator[Tunnel]:
    """Dev edge plus connector (or, with `command`, another connector's command line), registered and configured."""
    with dev_edge(state, "--ingress", ingress, *edge_args) as (edge, listening):
        token_file = state / "token"
        token_file.write_text(edge_token(state))
        token_file.chmod(0o600)
        if command is None:
            command = (
                *(sys.executable, "-m", "connector", "run", "--edge", listening["edge"], "--cacert", listening["ca"]),
                *("--output", "json", "--token-file", str(token_file)),
            )
        else:
            command = tuple(
                part.format(edge=listening["edge"], ca=listening["ca"], token_file=token_file) for part in command
            )
        with Child(*command, *run_args, env=env) as run:
            try:
                registered = edge.event("registered")
                edge.event("configuration", applied=True)
            except AssertionError as error:
                raise AssertionError(f"{error}\n--- connector:\n{run.text}") from None
            yield Tunnel(edge, run, listening, registered, state)
