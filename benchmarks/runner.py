"""Runs the rows: connectors started side by side, loaded in turns, measured by the edge process.

Owns: the edge, the origin, the broker, the connectors and their cores, for the time of a run over one transport.
In: Contender and Row values. Out: one RowResult a row.
Never: prints a table (report.py), loads anything itself.

*Strategy*: every row has fresh connectors (a quick run shares them where memory is not the question), all up at the
same time on one core; the rounds go A B, B A, A B ... so that whatever else the machine does meets all of them. Edge,
origin and broker share another core, if there is one.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.broker import Broker, BrokerMissingError
from benchmarks.connectors import Contender
from benchmarks.process import cpu_of, family, memory_of, raise_file_limit, reset_peak, start, stop
from benchmarks.rows import MIB, Row
from connector.wire.token import Token, encode_token

READY_LIMIT = 30.0
"""Seconds for a connector to register and take its configuration."""

ROW_LIMIT = 180.0
"""Seconds for one round of one connector."""

SLOW_SECONDS = 1.0
"""Length of the round that follows one in which no unit ended."""

ALIVE_STEP = 0.2
"""Seconds between two looks at whether a connector that is waited for still runs."""

QUIET_STEP = 0.25
QUIET_STEPS = 4
QUIET_LIMIT = 6.0
QUIET_SHARE = 0.02
"""What a connector still does after it registered (checks of the network, say) is no work of a row: the first round
waits until none of them used more than QUIET_SHARE of a core for QUIET_STEPS times QUIET_STEP seconds, but no longer
than QUIET_LIMIT seconds."""

IMAGE_LIMIT = 10.0
"""Seconds for a container engine to name the size of an image."""

Running = list[tuple[str, "subprocess.Popen[bytes]"]]


class BenchError(Exception):
    """The run cannot go on; the text says why."""


class RowResult:
    """All rounds of one row: per contender what the edge process told, memory added."""

    def __init__(self, row: Row, transport: str) -> None:
        self.row = row
        self.transport = transport
        self.rounds: dict[str, list[dict[str, Any]]] = {}
        self.errors: dict[str, str] = {}
        self.skipped = ""
        """Why nobody could do the row: something is missing on this machine."""

    def add(self, name: str, figures: dict[str, Any]) -> None:
        """Take one round."""
        if "error" in figures:
            self.errors[name] = figures["error"]
        else:
            self.rounds.setdefault(name, []).append(figures)


class EdgeProcess:
    """The load edge as a child that is told what to do."""

    def __init__(self, settings: dict[str, Any], core: int | None) -> None:
        command = [sys.executable, "-m", "benchmarks.edge"]
        self.process = start(command, core=core, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._kept: list[dict[str, Any]] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.tell(settings)
        listening = self.wait("listening", limit=10.0)
        self.address = listening["edge"]
        self.ca = listening["ca"]

    def tell(self, order: dict[str, Any]) -> None:
        """Give an order. Errors: BenchError."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise BenchError("the load edge (benchmarks/edge.py) ended; its last words are above") from None

    def wait(
        self, event: str, *, name: str = "", limit: float, process: subprocess.Popen[bytes] | None = None
    ) -> dict[str, Any]:
        """Wait for an event; others of other names are kept. Errors: TimeoutError, BenchError.

        If `process` ends first, what it was waited for will not come: ChildProcessError.
        """
        deadline = time.monotonic() + limit
        for place, kept in enumerate(self._kept):
            if kept["event"] == event and kept.get("name", "") == name:
                return self._kept.pop(place)
        while True:
            try:
                found = self._events.get(timeout=min(ALIVE_STEP, max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                if process is not None and process.poll() is not None:
                    raise ChildProcessError(f"{name} ended with status {process.returncode}") from None
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"no {event} of {name or 'the edge'} within {limit:g} s") from None
                continue
            if found is None:
                raise BenchError("the load edge (benchmarks/edge.py) ended; its last words are above")
            if found["event"] == event and found.get("name", "") == name:
                return found
            if found["event"] == "ready":
                self._kept.append(found)

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
                with suppress(BrokenPipeError):
                    pipe.close()


class Bench:
    """One run over one transport. Use as a context manager, then call `run_row` for each row.

    `share`: rows that do not ask for fresh connectors share them. `late`: whether the run
    is behind its time, so that one short round must do.
    """

    def __init__(
        self,
        contenders: list[Contender],
        *,
        transport: str,
        rounds: int,
        seconds: float,
        share: bool = False,
        late: Callable[[], bool] = lambda: False,
    ) -> None:
        self.contenders = contenders
        self.transport = transport
        self.rounds = rounds
        self.seconds = seconds
        self.broker_missing = ""
        raise_file_limit()
        cores = sorted(os.sched_getaffinity(0))
        self.cores = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
        self._share = share
        self._late = late
        self._directory = tempfile.TemporaryDirectory(prefix="bench-")
        self._tokens: dict[str, Path] = {}
        self._values: dict[str, str] = {}
        self._log_path = Path(self._directory.name) / "connectors.log"
        self._broker: Broker | None = None
        self._origin: subprocess.Popen[bytes] | None = None
        self._edge: EdgeProcess | None = None
        self._shared: tuple[tuple[str, ...], Running] | None = None

    def __enter__(self) -> Bench:
        try:
            self._begin()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _begin(self) -> None:
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
        origin = self._origin = start(command, core=self.cores[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert origin.stdout is not None
        line = origin.stdout.readline()
        if not line:
            raise BenchError("the origin (benchmarks/origin.py) did not start; its last words are above")
        ports = json.loads(line)
        try:
            self._broker = Broker(root, self.cores[1])
            ports["mqtt"] = self._broker.port
        except BrokerMissingError as error:
            self.broker_missing = str(error)
        settings = {
            "state": str(root / "edge"),
            "transport": self.transport,
            "tunnels": tunnels,
            "ports": ports,
            "origins": [origin.pid, *([self._broker.process.pid] if self._broker is not None else [])],
        }
        self._edge = EdgeProcess(settings, self.cores[1])
        self._values = {"edge": self._edge.address, "ca": self._edge.ca, "transport": self.transport}

    def close(self) -> None:
        """End everything that was started."""
        self._end_shared()
        if self._edge is not None:
            self._edge.stop()
        if self._broker is not None:
            self._broker.close()
        if self._origin is not None:
            stop(self._origin)
            for pipe in (self._origin.stdin, self._origin.stdout):
                if pipe is not None:
                    pipe.close()
        self._directory.cleanup()

    def log(self) -> str:
        """The last lines that connectors wrote."""
        if not self._log_path.exists():
            return ""
        return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-15:])

    def run_row(self, row: Row, tell: Callable[[str], None] = lambda text: None) -> RowResult:
        """Measure one row; a connector that fails is an error in the result."""
        result = RowResult(row, self.transport)
        if row.work in {"fan-out", "ping-pong"} and self.broker_missing:
            result.skipped = self.broker_missing
        elif row.work == "start":
            self._run_start(result, tell)
        elif row.work == "image":
            self._run_image(result)
        else:
            self._run_load(result, tell)
        return result

    def measure(self, name: str, pid: int, row: Row, seconds: float = 0.0) -> dict[str, Any]:
        """Let the edge do one round with a connector that is up; returns its figures, or an `error`."""
        assert self._edge is not None
        order = {"op": "run", "name": name, "work": row.work, "options": row.options, "pid": pid}
        self._edge.tell({**order, "seconds": seconds or self.seconds})
        return self._edge.wait("result", name=name, limit=ROW_LIMIT)

    @contextmanager
    def connectors(self, result: RowResult) -> Iterator[Running]:
        """All contenders up and registered."""
        row = result.row
        if self._share and not row.fresh:
            shared = self._shared
            if (
                shared is None
                or shared[0] != row.features
                or any(process.poll() is not None for _, process in shared[1])
            ):
                self._end_shared()
                shared = self._shared = (row.features, [])
                self._start_all(shared[1], result)
            for _, process in shared[1]:
                reset_peak(process.pid)
            yield shared[1]
            if result.errors:
                self._end_shared()  # whatever went wrong must not go on
            return
        self._end_shared()
        running: Running = []
        try:
            self._start_all(running, result)
            yield running
        finally:
            for _, process in running:
                stop(process)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _run_load(self, result: RowResult, tell: Callable[[str], None]) -> None:
        row = result.row
        late = self._late()
        if late and row.work in {"download", "upload"}:
            row = row._replace(options={**row.options, "size": row.options["size"] // 3})
        seconds = self.seconds / 2 if late else self.seconds
        rounds = 1 if row.work == "idle" or late else self.rounds
        with self.connectors(result) as running:
            for number in range(rounds):
                for name, process in running if number % 2 == 0 else reversed(running):
                    if name in result.errors:
                        continue
                    tell(f"{self.transport} {row.name}: round {number + 1}/{rounds}, {name}")
                    figures = self.measure(name, process.pid, row, seconds)
                    if not figures.get("units", 1):  # the machine is busy with other things
                        figures = self.measure(name, process.pid, row, SLOW_SECONDS)
                    if not figures.get("units", 1):
                        figures = {"error": "no unit of work ended within a round"}
                    if "error" in figures and process.poll() is not None:
                        figures["error"] += f" (it ended with status {process.returncode})"
                    result.add(name, {**figures, "peak": memory_of(process.pid, "VmHWM")})

    def _start_all(self, running: Running, result: RowResult) -> None:
        for contender in self.contenders:
            running.append((contender.name, self._spawn(contender, result.row.features)))
        for name, process in running:
            try:
                self._wait_ready(name, process)
            except (TimeoutError, ChildProcessError) as error:
                result.errors[name] = str(error)
        wait_quiet([process.pid for _, process in running])

    def _end_shared(self) -> None:
        if self._shared is not None:
            for _, process in self._shared[1]:
                stop(process)
            self._shared = None

    def _wait_ready(self, name: str, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        assert self._edge is not None
        return self._edge.wait("ready", name=name, limit=READY_LIMIT, process=process)

    def _run_start(self, result: RowResult, tell: Callable[[str], None]) -> None:
        """From the first instruction to a configuration in force; memory a second later.

        The first start of each is not counted: it may have to compile Python files, or to read from a cold disk.
        """
        self._end_shared()
        settle = 0.3 if self._share else 1.0
        for number in range(-1, 1 if self._share else self.rounds):
            for contender in self.contenders if number % 2 == 0 else reversed(self.contenders):
                tell(f"{self.transport} start: {contender.name}")
                began = time.monotonic()
                process = self._spawn(contender, ())
                try:
                    ready = self._wait_ready(contender.name, process)
                    if number < 0:
                        continue
                    cpu = cpu_of(family(process.pid))
                    time.sleep(settle)
                    took = ready["at"] - began
                    result.add(
                        contender.name,
                        {
                            **{"cpu": cpu.total, "system": cpu.system, "units": 1, "seconds": took},
                            **{"p50": took, "p99": took, "edge_cpu": 0.0, "origin_cpu": 0.0},
                            **{"rss": memory_of(process.pid), "peak": memory_of(process.pid, "VmHWM")},
                        },
                    )
                except (TimeoutError, ChildProcessError) as error:
                    result.errors[contender.name] = str(error)
                finally:
                    stop(process)

    def _run_image(self, result: RowResult) -> None:
        """The size of each contender's container image, where an engine has it."""
        sizes = {contender.name: image_size(contender.image) for contender in self.contenders}
        for name, size in sizes.items():
            if size:
                same = {"system": 0.0, "p50": 0.0, "p99": 0.0, "edge_cpu": 0.0, "origin_cpu": 0.0, "peak": 0}
                result.add(name, {"cpu": size / MIB, "units": 1, "seconds": 1.0, **same})
        if not any(sizes.values()):
            result.skipped = "no container engine here has an image of a connector"

    def _spawn(self, contender: Contender, features: Sequence[str]) -> subprocess.Popen[bytes]:
        values = {**self._values, "token_file": str(self._tokens[contender.name])}
        command = contender.filled(values, features)
        with self._log_path.open("ab") as log:
            try:
                return start(command, core=self.cores[0], stdout=log, stderr=log)
            except OSError as error:
                raise BenchError(f"{contender.name} cannot be started: {command[0]}: {error.strerror}") from None


def wait_quiet(pids: Sequence[int]) -> None:
    """Wait until none of these processes has anything to do any more."""
    deadline = time.monotonic() + QUIET_LIMIT
    before = [cpu_of(family(pid)).total for pid in pids]
    quiet = 0
    while quiet < QUIET_STEPS and time.monotonic() < deadline:
        time.sleep(QUIET_STEP)
        after = [cpu_of(family(pid)).total for pid in pids]
        busy = any(now - then > QUIET_SHARE * QUIET_STEP for now, then in zip(after, before, strict=True))
        quiet = 0 if busy else quiet + 1
        before = after


def image_size(image: str) -> int:
    """Bytes of a container image, 0 where there is no engine, or it does not have the image."""
    engine = shutil.which("docker") or shutil.which("podman")
    if engine is None or not image:
        return 0
    command = [engine, "image", "inspect", "--format", "{{.Size}}", image]
    try:
        done = subprocess.run(command, capture_output=True, timeout=IMAGE_LIMIT, check=True)
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0
