"""`connector version`, and what `update` says.

Owns: two lines. In: a Call. Out: an exit status. Never: asks a server.
"""

from __future__ import annotations

import sys

from connector import __version__
from connector.app.command_table import Call


def version(call: Call) -> int:
    """Print the version."""
    short = call.flags.value("short")
    print(__version__ if short else f"{call.program} version {__version__} (Python {sys.version.split()[0]})")
    return 0


def update(call: Call) -> int:
    """Say how to update: nothing replaces itself here."""
    print(f"{call.program} {__version__} does not update itself: update the package or the image that holds it.")
    return 0
