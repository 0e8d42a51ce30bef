"""What can go wrong in the launcher, always with the hop that failed.

Owns: the exceptions that end a demo.
In: nothing. Out: `HopError`, whose parts the command line prints.
Never: prints, exits or knows a process.
"""

from __future__ import annotations

from collections.abc import Sequence


class HopError(Exception):
    """One hop of the path failed. `hop` names it, `advice` says what to do, `tail` holds the last log lines."""

    def __init__(self, hop: str, message: str, *, advice: str = "", tail: Sequence[str] = ()) -> None:
        super().__init__(f"{hop}: {message}")
        self.hop = hop
        self.message = message
        self.advice = advice
        self.tail = list(tail)


class UsageError(Exception):
    """The command line asks for something impossible. `advice` says what is possible."""

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice
