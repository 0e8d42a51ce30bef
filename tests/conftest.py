"""Settings for every test: no example is timed, because machines that run this are shared and slow at times."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]

NEWEST_ALONE = {
    "tests/benchmarks/test_benchmarks.py": "a tool of this repository, which its targets run on the newest Python",
}
"""Files whose tests say nothing about the oldest Python, and why. `make test-oldest` skips them by name, counted."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the run on the newest Python has shown; only `make test-oldest` sets the variable."""
    if not os.environ.get("ON_THE_OLDEST"):
        return
    for item in items:
        if why := NEWEST_ALONE.get(item.path.relative_to(ROOT).as_posix()):
            item.add_marker(pytest.mark.skip(reason=f"TESTED ON THE NEWEST PYTHON ALONE: {why}"))
