"""Which process a number means: a pid together with the moment it started.

Owns: reading start times, telling whether a recorded process still lives, signalling only that one.
In: pids. Out: `Identity`.
Never: signals a process that merely got the same number.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

LINUX = sys.platform.startswith("linux")


@dataclass(frozen=True, slots=True)
class Identity:
    """One process, for as long as the machine runs. `start` is empty when it had ended before it could be read."""

    pid: int
    start: str

    @classmethod
    def of(cls, pid: int) -> Identity:
        """The process that has this number now."""
        return cls(pid, started(pid))

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return bool(self.start) and started(self.pid) == self.start

    def send(self, number: signal.Signals) -> bool:
        """Signal it; False when it has ended. The number cannot be given to another process in between (Linux)."""
        if not hasattr(os, "pidfd_open"):
            if not self.alive:
                return False
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
                return True
            return False
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            if not self.alive:
                return False
            signal.pidfd_send_signal(descriptor, number)
            return True
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)

    def wait_gone(self, seconds: float) -> bool:
        """Whether it ended within the time."""
        deadline = time.monotonic() + seconds
        while self.alive:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True


def started(pid: int) -> str:
    """When the process began, in whatever unit the system has; empty when it does not run."""
    if pid <= 0:
        return ""
    if LINUX:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] in {b"Z", b"X"} else fields[19].decode()
    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, check=False, timeout=10)
    return done.stdout.decode().strip()
