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
