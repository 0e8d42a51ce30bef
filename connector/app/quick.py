"""`connector tunnel` without a command: a quick tunnel, or what to do instead.

Owns: that choice. In: a Call. Out: an exit status. Never: runs a tunnel that somebody has a token for.
"""

from __future__ import annotations

from connector.app.command_table import Call
from connector.errors import ConfigError


def quick(call: Call) -> int:
    """Say what is missing."""
    raise ConfigError("tunnel needs a command", advice=f"Use: {call.program} tunnel run [flags].")
