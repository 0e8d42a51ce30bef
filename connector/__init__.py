"""Cloudflare tunnel connector in asyncio. Start reading at ARCHITECTURE.md beside this file.

As a library: `async with connector.Tunnel(token=..., ingress=...)`, see app/library.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from connector.app.library import Tunnel

__all__ = ["Tunnel", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Load the library when it is asked for: the command line does not need it."""
    if name == "Tunnel":
        from connector.app.library import Tunnel  # noqa: PLC0415

        return Tunnel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
