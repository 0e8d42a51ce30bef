"""The connector commands that the suites are made of: ours always, cloudflared's when CLOUDFLARED names a binary."""

from __future__ import annotations

import os
import sys

import pytest

OURS = (sys.executable, "-m", "connector")
CLOUDFLARED = os.environ.get("CLOUDFLARED")

COMMANDS = [
    pytest.param(OURS, id="ours"),
    pytest.param(
        (CLOUDFLARED or "",),
        id="cloudflared",
        marks=pytest.mark.skipif(not CLOUDFLARED, reason="CLOUDFLARED names no binary"),
    ),
]

FULL = bool(CLOUDFLARED or os.environ.get("COMPONENTS"))
"""All combinations (`make components`); else a part of them, which `make test` can afford."""


def some(*values: object) -> list[object]:
    """Give all values in a full run, else the first."""
    return list(values if FULL else values[:1])
