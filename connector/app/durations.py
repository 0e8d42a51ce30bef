"""Durations as Go spells them: `30s`, `1m30s`, `1.5h`.

Owns: parsing and printing of that syntax. In: text or seconds. Out: seconds or text.
Never: knows which flag asked.
"""

from __future__ import annotations

import re

_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """Give the seconds that `text` means; ValueError when it is no duration. A bare number needs a unit, except 0."""
    body, sign = (text[1:], -1.0 if text[0] == "-" else 1.0) if text[:1] in {"-", "+"} else (text, 1.0)
    if body == "0":
        return 0.0
    total, at = 0.0, 0
    while at < len(body):
        part = _PART.match(body, at)
        if part is None:
            break
        total += float(part[1]) * _SECONDS[part[2]]
        at = part.end()
    if at == 0 or at != len(body):
        raise ValueError(f"not a duration: {text!r}")
    return sign * total


def format_duration(seconds: float) -> str:
    """Print `seconds` (0 or more) as Go does: 64 is `1m4s`, 180 is `3m0s`, 0.25 is `250ms`."""
    if seconds == 0:
        return "0s"
    if seconds < 1:
        return f"{round(seconds * 1000, 3):g}ms"
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
