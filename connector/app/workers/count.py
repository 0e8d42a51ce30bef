"""How many workers a run has.

Owns: `auto`, the CPUs that this process may use. In: the flag's text, the file systems /proc and /sys. Out: a number.
Never: counts CPUs that a container or an affinity keeps from us.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

from connector.errors import UsageError

MAX_WORKERS: Final = 32
"""As many as there can be HA connections."""


def wanted_workers(text: str, connections: int) -> int:
    """Read the flag: `auto` or a number. Errors: UsageError."""
    if text == "auto":
        return max(1, min(usable_cpus(), connections))
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_WORKERS):
        raise UsageError(f'invalid value "{text}" for --workers', advice=f"Allowed: auto, or 1 to {MAX_WORKERS}.")
    return int(text)


def usable_cpus(root: Path = Path("/")) -> int:
    """Give the number of CPUs that this process may use: affinity and the quota of its control group."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota(root)
    return max(1, cpus if quota is None else min(cpus, math.ceil(quota)))


def cgroup_quota(root: Path) -> float | None:
    """Give the CPUs that the control group of this process, or one above it, allows; None without a limit.

    `root` is where the file systems are mounted.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, read = root / "sys/fs/cgroup", _unified
        elif "cpu" in controllers.split(","):
            base, read = root / "sys/fs/cgroup/cpu", _legacy
        else:
            continue
        place = base / path.strip("/")
        if ".." in Path(path).parts:
            place = base  # a group outside of our namespace; its limit is ours all the same, but cannot be read
        while True:
            quota = read(place)
            if quota is not None:
                quotas.append(quota)
            if place == base:
                break
            place = place.parent
    return min(quotas, default=None)


def _unified(place: Path) -> float | None:
    try:
        limit, period = (place / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _legacy(place: Path) -> float | None:
    try:
        limit = int((place / "cpu.cfs_quota_us").read_text())
        return limit / int((place / "cpu.cfs_period_us").read_text()) if limit > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
