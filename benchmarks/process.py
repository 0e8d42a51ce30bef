"""Processes from outside: CPU time, memory, cores.

Owns: reading /proc and the CPU clocks of other processes, and starting a child on a given core.
In: process ids. Out: seconds and bytes.
Never: knows what the process does.

*Strategy*: utime and stime in /proc count in ticks of 10 ms, too coarse for runs of a second. The kernel's CPU clock
of a process counts nanoseconds, over all its threads, those that ended included; /proc only splits it in user and
system.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

TICK = os.sysconf("SC_CLK_TCK")
_SCHED_CLOCK = 2  # CPUCLOCK_SCHED of the whole process (linux/posix-timers.h)


class Cpu(NamedTuple):
    """Seconds of CPU time since the start; `system` is the part spent in the kernel, to 10 ms."""

    total: float
    system: float


def family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    found = [pid]
    for parent in found:
        try:
            tasks = os.listdir(f"/proc/{parent}/task")
            for task in tasks:
                found += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
        except OSError:
            continue  # it ended meanwhile
    return found


def cpu_of(pids: Sequence[int]) -> Cpu:
    """CPU time of these processes, and of children of theirs that ended."""
    total = system = 0.0
    for pid in pids:
        try:
            total += time.clock_gettime(~pid << 3 | _SCHED_CLOCK)
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[13]) + int(fields[14])) / TICK
        system += (int(fields[12]) + int(fields[14])) / TICK
    return Cpu(total, system)


def memory_of(pid: int, key: str = "VmRSS") -> int:
    """Bytes of `VmRSS` or `VmHWM` (peak), over the whole family."""
    total = 0
    for member in family(pid):
        try:
            status = Path(f"/proc/{member}/status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith(key + ":"):
                total += int(line.split()[1]) * 1024
    return total


def reset_peak(pid: int) -> None:
    """Begin `VmHWM` anew for the whole family, where the kernel lets us."""
    for member in family(pid):
        try:
            Path(f"/proc/{member}/clear_refs").write_text("5")
        except OSError:
            continue


def raise_file_limit() -> int:
    """Let this process and its children have as many descriptors as the system allows; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def start(
    command: Sequence[str],
    *,
    core: int | None,
    stdout: IO[Any] | int = subprocess.DEVNULL,
    stderr: IO[Any] | int | None = None,
    stdin: IO[Any] | int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a child that has been on `core` from its first instruction (Go counts the cores it has once, at start)."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        # TUNNEL_ variables would be flags of the connectors; compiled Python files are what an installation has.
        dropped = ("TUNNEL_", "NO_", "PYTHONDONTWRITEBYTECODE")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, env=environment)
    finally:
        os.sched_setaffinity(0, before)


def stop(process: subprocess.Popen[bytes], limit: float = 3.0) -> None:
    """End a child and what it started (a wrapper such as `perf` leaves its program): asked first, then by force."""
    if process.poll() is not None:
        return
    members = family(process.pid)
    for pid in reversed(members):  # the program before its wrapper, which then ends by itself
        _signal(pid, signal.SIGTERM)
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    deadline = time.monotonic() + limit
    for pid in members[1:]:
        while _signal(pid, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> bool:
    """Send a signal; returns whether the process is still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
