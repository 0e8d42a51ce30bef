"""Faults that the dev edge commits on request, so that a connector's recovery can be watched.

Owns: the grammar of `--fault` and the remaining count of each fault.
In: texts such as `registration=EDUPCONN*2`. Out: `Faults`, asked by registrar.py, connectors.py and exchange.py.
Never: commits a fault itself.
"""

from __future__ import annotations

from connector.errors import UsageError

GRAMMAR = """\
registration=KIND[*N]  the answer to registration (with *N: to the first N)
                       EDUPCONN, unauthorized, permanent, retry-after:SECONDS,
                       exception, stall, garbage, close
goaway-after:SECONDS   GOAWAY that long after registration; close when idle
close-after:N          drop the link on its Nth request (also N-requests)
idle-cut:SECONDS       cut WebSockets that carried nothing for that long"""

REGISTRATION_KINDS = ("EDUPCONN", "unauthorized", "permanent", "retry-after", "exception", "stall", "garbage", "close")


class Faults:
    """The faults in force; all off when made from nothing."""

    def __init__(self) -> None:
        self.registration: str | None = None
        self.registration_left: int | None = None
        self.retry_after = 0.0
        self.goaway_after: float | None = None
        self.close_after: int | None = None
        self.idle_cut: float | None = None

    def take_registration(self) -> str | None:
        """The fault for this registration attempt, counting it."""
        if self.registration is None or self.registration_left == 0:
            return None
        if self.registration_left is not None:
            self.registration_left -= 1
        return self.registration

    def add(self, text: str) -> None:
        """Switch one fault on, written as on the command line; raises UsageError."""
        if text.startswith("registration="):
            self._add_registration(text)
            return
        name, _, value = text.partition(":")
        if name == "goaway-after":
            self.goaway_after = _seconds(text, value)
        elif name == "idle-cut":
            self.idle_cut = _seconds(text, value)
        elif name == "close-after":
            count = value.removesuffix("-requests").removesuffix("-request")
            if not count.isdecimal() or int(count) < 1:
                raise UsageError(f"--fault {text}: {value!r} is not a number of requests", advice="close-after:3")
            self.close_after = int(count)
        else:
            raise UsageError(f"--fault {text}: there is no such fault", advice=f"These exist:\n{GRAMMAR}")

    def _add_registration(self, text: str) -> None:
        kind, star, count = text.removeprefix("registration=").partition("*")
        if star and (not count.isdecimal() or int(count) < 1):
            raise UsageError(f"--fault {text}: {count!r} is not a number of times", advice="registration=EDUPCONN*2")
        kind, _, seconds = kind.partition(":")
        if kind not in REGISTRATION_KINDS:
            raise UsageError(
                f"--fault {text}: unknown kind {kind!r}", advice=f"One of: {', '.join(REGISTRATION_KINDS)}."
            )
        if kind == "retry-after":
            self.retry_after = _seconds(text, seconds or "5")
        self.registration = kind
        self.registration_left = int(count) if star else None


def parse_faults(texts: list[str]) -> Faults:
    """Make the fault set of a command line."""
    faults = Faults()
    for text in texts:
        faults.add(text)
    return faults


def _seconds(text: str, value: str) -> float:
    try:
        seconds = float(value.removesuffix("s"))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise UsageError(
            f"--fault {text}: {value!r} is not a number of seconds", advice=f"{text.split(':', maxsplit=1)[0]}:5"
        )
    return seconds
