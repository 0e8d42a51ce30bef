"""Faults that the dev edge commits on request, so that a connector's recovery can be watched.

Owns: the grammar of `--fault`, which faults are in force, and the remaining count of each.
In: texts such as `registration=EDUPCONN*2`, at the start or while it runs. Out: `Faults`, asked by registrar.py,
connectors.py, exchange.py and quiclisten.py.
Never: commits a fault itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from connector.errors import UsageError

GRAMMAR = """\
registration=KIND[*N]  the answer to registration (with *N: to the first N)
                       EDUPCONN, unauthorized, permanent, retry-after:SECONDS,
                       exception, stall, garbage, close
goaway-after:SECONDS   GOAWAY that long after registration; close when idle
cut-after:SECONDS      drop the link that long after registration
malformed-after:SECONDS  garbage on the control stream that long after it
close-after:N          drop the link on its Nth request (also N-requests)
reset:N                reset the stream of every Nth request
idle-cut:SECONDS       cut WebSockets that carried nothing for that long
delay:MILLISECONDS     every request reaches the connector that much later
slow:BYTES             take so many bytes a second of a response, no more
loss:PERCENT           lose so many QUIC packets, each way"""

REGISTRATION_KINDS = ("EDUPCONN", "unauthorized", "permanent", "retry-after", "exception", "stall", "garbage", "close")

AFTER_REGISTRATION = ("goaway-after", "cut-after", "malformed-after")
"""Faults that come a time after the registration of a link; switched on later, that time after that."""


class Faults:
    """The faults in force; all off when made from nothing. `on_added` hears of each that is switched on later."""

    def __init__(self) -> None:
        self.on_added: Callable[[str], None] = lambda name: None
        self._random = random.Random(0)  # noqa: S311 - the same packets are lost every time
        self._texts: dict[str, str] = {}
        self._reset()

    def _reset(self) -> None:
        self.registration: str | None = None
        self.registration_left: int | None = None
        self.retry_after = 0.0
        self.after: dict[str, float] = {}
        self.close_after: int | None = None
        self.reset_every: int | None = None
        self.idle_cut: float | None = None
        self.delay = 0.0
        self.rate = 0.0
        self.loss = 0.0
        self.requests = 0

    def take_registration(self) -> str | None:
        """The fault for this registration attempt, counting it."""
        if self.registration is None or self.registration_left == 0:
            return None
        if self.registration_left is not None:
            self.registration_left -= 1
        return self.registration

    def take_request(self) -> bool:
        """Count a request; whether its stream is to be reset."""
        if self.reset_every is None:
            return False
        self.requests += 1
        return self.requests % self.reset_every == 0

    def loses(self) -> bool:
        """Whether this packet is lost."""
        return self._random.random() < self.loss

    def active(self) -> list[str]:
        """The texts of the faults in force."""
        return list(self._texts.values())

    def text(self, name: str) -> str:
        """The text of the fault `name`, as it was switched on; empty when it is off."""
        return self._texts.get(name, "")

    def on_requests(self, protocol: str) -> list[str]:
        """The texts of the faults that every request over `protocol` feels."""
        names = ("delay", "slow", "loss") if protocol == "quic" else ("delay", "slow")
        return [self._texts[name] for name in names if name in self._texts]

    def clear(self, name: str = "") -> None:
        """Switch one fault off, by its text or name; all of them without. Raises UsageError."""
        key = _key(name)
        if name and key not in self._texts:
            raise UsageError(
                f"no fault {name!r} is in force", advice=f"In force: {', '.join(self.active()) or 'none'}."
            )
        left = [text for other, text in self._texts.items() if name and other != key]
        spent, requests = self.registration_left, self.requests
        self._texts.clear()
        self._reset()
        for text in left:
            self._add(text)
        if "registration" in self._texts:  # the others go on where they were
            self.registration_left = spent
        if "reset" in self._texts:
            self.requests = requests

    def add(self, text: str) -> None:
        """Switch one fault on, written as on the command line; raises UsageError."""
        self._add(text.strip())
        self.on_added(_key(text.strip()))

    def _add(self, text: str) -> None:
        name, _, value = text.partition(":")
        if text.startswith("registration="):
            self._add_registration(text)
        elif name in AFTER_REGISTRATION:
            self.after[name] = _seconds(text, value)
        elif name == "idle-cut":
            self.idle_cut = _seconds(text, value)
        elif name == "delay":
            self.delay = _seconds(text, value.removesuffix("ms")) / 1000
        elif name == "slow":
            self.rate = _number(text, value, 1, 1e12)
        elif name == "loss":
            self.loss = _number(text, value.removesuffix("%"), 0, 100) / 100
        elif name == "reset":
            self.reset_every = _count(text, value)
            self.requests = 0
        elif name == "close-after":
            self.close_after = _count(text, value.removesuffix("-requests").removesuffix("-request"))
        else:
            raise UsageError(f"--fault {text}: there is no such fault", advice=f"These exist:\n{GRAMMAR}")
        self._texts[_key(text)] = text

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


def _key(text: str) -> str:
    return text.partition("=")[0] if text.startswith("registration") else text.partition(":")[0]


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


def _number(text: str, value: str, least: float, most: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not least <= number <= most:
        raise UsageError(
            f"--fault {text}: {value!r} is not a number within {least:g} to {most:g}",
            advice=f"{text.split(':', maxsplit=1)[0]}:10",
        )
    return number


def _count(text: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise UsageError(
            f"--fault {text}: {value!r} is not a number of requests", advice=f"{text.split(':', maxsplit=1)[0]}:3"
        )
    return int(value)
