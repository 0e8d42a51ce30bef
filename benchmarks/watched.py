"""The clocks of all parties of one round.

Owns: when they are read, and the differences.
In: process ids. Out: seconds of CPU and of the clock on the wall.
Never: knows the work.
"""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.process import cpu_of, family, memory_of


class Watched:
    """The clocks of the connector, this process and the origin, between `begin` and `end`."""

    def __init__(self, connector: int, origins: list[int]) -> None:
        self.root = connector
        self.groups = {"cpu": family(connector), "edge_cpu": [0], "origin_cpu": origins}
        self.started = 0.0
        self.before: dict[str, Any] = {}

    def begin(self) -> None:
        """Start the clocks."""
        self.before = self._read()
        self.started = time.perf_counter()

    def end(self) -> dict[str, Any]:
        """Stop them; returns seconds of everybody."""
        after = self._read()
        found: dict[str, Any] = {name: after[name].total - self.before[name].total for name in after}
        found["system"] = after["cpu"].system - self.before["cpu"].system
        found["seconds"] = time.perf_counter() - self.started
        return found

    def memory(self) -> int:
        """Resident bytes of the connector now."""
        return memory_of(self.root)

    def _read(self) -> dict[str, Any]:
        return {name: cpu_of([pid or os.getpid() for pid in pids]) for name, pids in self.groups.items()}
