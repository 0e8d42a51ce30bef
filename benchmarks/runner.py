"""Runs the rows: connectors started side by side, loaded in turns, measured by the edge process.

Owns: the edge, the origin, the connectors and their cores, for the time of a run.
In: Contender and Row values. Out: one RowResult a row.
Never: prints a table (report.py), loads anything itself.

*Strategy*: every row has fresh connectors, all up at the same time on one core; the rounds go A B, B A, A B ... so that
whatever else the machine does meets all of them. Edge and origin share another core, if there is one.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from benchmarks.process import cpu_of, family, memory_of, raise_file_limit, start, stop
from benchmarks.rows import Row
from connector.wire.token import Token, encode_token

READY_LIMIT = 30.0
"""Seconds for a connector to register and take its configuration."""

ROW_LIMIT = 180.0
"""Seconds for one round of one connector."""

OURS = (
    "{python} -m connector run --edge {edge} --cacert {ca} --protocol {transport} --ha-connections 1 "
    "--token-file {token_file}"
)
CLOUDFLARED = (
    "{binary} tunnel --no-autoupdate --edge {edge} --cacert {ca} --protocol {transport} --ha-connections 1 "
    "--no-prechecks --grace-period 1s --metrics 127.0.0.1:0 run --token-file {token_file}"
)


class Contender(NamedTuple):
    """One connector: its name in the table and its command line, with {edge}, {ca}, {transport}, {token_file}."""

    name: str
    command: list[str]


def ours() -> Contender:
    """This project, on the Python that runs the benchmark."""
    return Contender("ours", [part.replace("{python}", sys.executable) for part in OURS.split()])


def cloudflared(binary: str) -> Contender:
    """The original."""
    return Contender("cloudflared", [part.replace("{binary}", binary) for part in CLOUDFLARED.split()])


def other(text: str) -> Contender:
    """`NAME=command line`; raises ValueError."""
    name, equals, command = text.partition("=")
    if not (name and equals and "{edge}" in command and "{token_file}" in command):
        raise ValueError(f"{text!r} is not NAME=COMMAND with {{edge}}, {{ca}} and {{token_file}} in it")
    return Contender(name, shlex.split(command))


class RowResult:
    """All rounds of one row: per contender what the edge process told, memory added."""

    def __init__(self, row: Row, transport: str) -> None:
        self.row = row
        self.transport = transport
        self.rounds: dict[str, list[dict[str, Any]]] = {}
        self.errors: dict[str, str] = {}

    def add(self, name: str, figures: dict[str, Any]) -> None:
        """Take one round."""
        if "error" in figures:
            self.errors[name] = figures["error"]
        else:
            self.rounds.setdefault(name, []).append(figures)


class EdgeProcess:
    """The load edge as a child that is told what to do."""

    def __init__(self, settings: dict[str, Any], core: int | None) -> None:
        command = [sys.executable, *(os.environ.get("EDGECMD","-m benchmarks.edge").split())]
        self.process = start(command, core=core, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.tell(settings)
        listening = self.wait("listening", limit=10.0)
        self.address = listening["edge"]
        self.ca = listening["ca"]

    def tell(self, order: dict[str, Any]) -> None:
        """Give an order."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()

    def wait(self, event: str, *, name: str = "", limit: float) -> dict[str, Any]:
        """Wait for an event; others that come before it are dropped. Raises TimeoutError, RuntimeError."""
        deadline = time.monotonic() + limit
        while True:
            try:
                found = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"no {event} of {name or 'the edge'} within {limit:g} s") from None
            if found is None:
                raise RuntimeError("the edge process ended")
            if found["event"] == event and (not name or found["name"] == name):
                return found

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._events.put(json.loads(line))
        self._events.put(None)

    def stop(self) -> None:
        """End it."""
        stop(self.process)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Bench:
    """One run. Use as a context manager, then call `run_row` for each row."""

    def __init__(self, contenders: list[Contender], *, transport: str, rounds: int, seconds: float) -> None:
        self.contenders = contenders
        self.transport = transport
        self.rounds = rounds
        self.seconds = seconds
        raise_file_limit()
        cores = sorted(os.sched_getaffinity(0))
        self.cores = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
        self._directory = tempfile.TemporaryDirectory(prefix="bench-")
        self._tokens: dict[str, Path] = {}
        self._values: dict[str, str] = {}
        self._log_path = Path(self._directory.name) / "connectors.log"

    def __enter__(self) -> Bench:
        root = Path(self._directory.name)
        tunnels = {}
        for contender in self.contenders:
            tunnel = uuid.uuid4()
            tunnels[str(tunnel)] = contender.name
            token = Token(account_tag=secrets.token_hex(16), secret=secrets.token_bytes(32), tunnel_id=tunnel)
            path = self._tokens[contender.name] = root / f"{contender.name}.token"
            path.touch(mode=0o600)
            path.write_text(encode_token(token))
        command = [sys.executable, "-m", "benchmarks.origin"]
        self._origin = start(command, core=self.cores[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._origin.stdout is not None
        port = int(self._origin.stdout.readline())
        settings = {"state": str(root / "edge"), "tunnels": tunnels, "port": port, "origin": self._origin.pid,
                    "transport": self.transport}
        self._edge = EdgeProcess(settings, self.cores[1])
        self._values = {"edge": self._edge.address, "ca": self._edge.ca, "transport": self.transport}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._edge.stop()
        stop(self._origin)
        for pipe in (self._origin.stdin, self._origin.stdout):
            if pipe is not None:
                pipe.close()
        self._directory.cleanup()

    def log(self) -> str:
        """The last lines that connectors wrote."""
        return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-15:]) if self._values else ""

    def run_row(self, row: Row, tell: Callable[[str], None] = lambda text: None) -> RowResult:
        """Measure one row; a connector that fails is an error in the result."""
        result = RowResult(row, self.transport)
        if row.work == "start":
            self._run_start(result)
            return result
        rounds = 1 if row.work == "idle" else self.rounds
        with self.connectors(result) as running:
            for number in range(rounds):
                for name, process in running if number % 2 == 0 else reversed(running):
                    if name in result.errors:
                        continue
                    tell(f"{row.name}: round {number + 1}/{rounds}, {name}")
                    figures = self.measure(name, process.pid, row)
                    result.add(name, {**figures, "peak": memory_of(process.pid, "VmHWM")})
        return result

    def measure(self, name: str, pid: int, row: Row) -> dict[str, Any]:
        """Let the edge do one round with a connector that is up; returns its figures, or an `error`."""
        order = {"op": "run", "name": name, "work": row.work, "options": row.options, "pid": pid}
        self._edge.tell({**order, "seconds": self.seconds})
        return self._edge.wait("result", name=name, limit=ROW_LIMIT)

    @contextmanager
    def connectors(self, result: RowResult) -> Iterator[list[tuple[str, subprocess.Popen[bytes]]]]:
        """All contenders up and registered."""
        running: list[tuple[str, subprocess.Popen[bytes]]] = []
        try:
            for contender in self.contenders:
                process = self._spawn(contender)
                running.append((contender.name, process))
                try:
                    self._edge.wait("ready", name=contender.name, limit=READY_LIMIT)
                except TimeoutError as error:
                    result.errors[contender.name] = str(error)
            yield running
        finally:
            for _, process in running:
                stop(process)

    def _run_start(self, result: RowResult) -> None:
        """From the first instruction to a configuration in force; memory a second later."""
        for number in range(self.rounds):
            for contender in self.contenders if number % 2 == 0 else reversed(self.contenders):
                began = time.monotonic()
                process = self._spawn(contender)
                try:
                    ready = self._edge.wait("ready", name=contender.name, limit=READY_LIMIT)
                    cpu = cpu_of(family(process.pid))
                    time.sleep(1.0)
                    took = ready["at"] - began
                    result.add(
                        contender.name,
                        {
                            **{"cpu": cpu.total, "system": cpu.system, "units": 1, "seconds": took},
                            **{"p50": took, "p99": took, "edge_cpu": 0.0, "origin_cpu": 0.0},
                            **{"rss": memory_of(process.pid), "peak": memory_of(process.pid, "VmHWM")},
                        },
                    )
                except TimeoutError as error:
                    result.errors[contender.name] = str(error)
                finally:
                    stop(process)

    def _spawn(self, contender: Contender) -> subprocess.Popen[bytes]:
        values = {**self._values, "token_file": str(self._tokens[contender.name])}
        command = []
        for part in contender.command:
            filled = part
            for key, value in values.items():
                filled = filled.replace("{" + key + "}", value)
            command.append(filled)
        with self._log_path.open("ab") as log:
            return start(command, core=self.cores[0], stdout=log, stderr=log)
