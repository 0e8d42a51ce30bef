"""The debugging commands: decode, encode, capture, inspect, replay, tui, conformance.

Owns: which word runs what. In: the words behind the command. Out: an exit status.
Never: imports a command before it is asked for.
"""

from __future__ import annotations

WORDS = ("decode", "encode", "capture")


def run(word: str, argv: list[str]) -> int:
    """Run the command `word`."""
    if word in {"decode", "encode"}:
        from connector.inspector.wire_commands import run as wire  # noqa: PLC0415

        return wire(word, argv)
    from connector.inspector.capture_commands import main as capture  # noqa: PLC0415

    return capture(argv)
