"""How one log line looks: cloudflared's console text, its two JSON forms, and an event of its management stream.

Owns: the formats. In: level, message, fields, time. Out: one line of text each, without its end.
Never: filters, redacts or writes.
"""

from __future__ import annotations

import json
import re
from typing import Any

_CODES = {"trace": "TRC", "debug": "DBG", "info": "INF", "warn": "WRN", "error": "ERR", "fatal": "FTL"}
_COLOURS = {"debug": "33", "info": "32", "warn": "31", "error": "1;31", "fatal": "1;31"}

_NEEDS_QUOTES = re.compile(r'[^!-~]|["\\]')
_ESCAPES = {7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r", 34: '\\"', 92: "\\\\"}

EVENT_NAMES = ("cloudflared", "http", "tcp", "udp")
"""What the numbers of the field `event` mean in the management stream."""

Fields = dict[str, Any]


def quote(text: str) -> str:
    """Give `text` in quotes with Go's escapes: printable characters stay, whatever their script."""
    return (
        '"' + "".join(_ESCAPES.get(ord(char)) or (char if char.isprintable() else _escape(char)) for char in text) + '"'
    )


def _escape(char: str) -> str:
    number = ord(char)
    if number < 0x80:
        return f"\\x{number:02x}"
    if 0xDC80 <= number <= 0xDCFF:  # a byte that was not UTF-8 (surrogateescape)
        return f"\\x{number - 0xDC00:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _value(value: Any) -> str:
    """Give a field's value: text bare or quoted, everything else as JSON."""
    if isinstance(value, str):
        return quote(value) if _NEEDS_QUOTES.search(value) else value
    if isinstance(value, (bool, int, float, dict, list, tuple)) or value is None:
        return _json(value)
    return _value(str(value))


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=str)


def console_line(stamp: str, level: str, message: str, fields: Fields, *, colour: bool = False) -> str:
    """Give the line for people: fields sorted by name, `error` first."""
    names = sorted(fields, key=lambda name: (name != "error", name))
    text = message.replace("\n", "\\n").replace("\r", "\\r")
    if not colour:
        return " ".join([stamp, _CODES[level], text, *(f"{name}={_value(fields[name])}" for name in names)])
    parts = [f"\x1b[90m{stamp}\x1b[0m", f"\x1b[{_COLOURS.get(level, '0')}m{_CODES[level]}\x1b[0m", text]
    for name in names:
        value = _value(fields[name])
        if name == "error":
            parts.append(f"\x1b[31merror=\x1b[0m\x1b[31m{value}\x1b[0m")
        else:
            parts.append(f"\x1b[36m{name}=\x1b[0m{value}")
    return " ".join(parts)


def json_line(stamp: str, level: str, message: str, fields: Fields) -> str:
    """Give the console's JSON: keys sorted."""
    entry = {**fields, "level": level, "message": message, "time": stamp}
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def file_line(stamp: str, level: str, message: str, fields: Fields) -> str:
    """Give the JSON of log files: level first, then the fields as they were given, time, and message last."""
    return _json({"level": level, **fields, "time": stamp, "message": message})


def stream_event(stamp: str, level: str, message: str, fields: Fields) -> str:
    """Give one event of the management stream; what is zero there is left out (debug, cloudflared, empty)."""
    rest = {name: value for name, value in fields.items() if name != "event"}
    entry: Fields = {"time": stamp}
    shown = stream_level(level, fields)
    if shown != "debug":
        entry["level"] = shown
    if message:
        entry["message"] = message
    event = stream_type(fields)
    if event != EVENT_NAMES[0]:
        entry["event"] = event
    if rest:
        entry["fields"] = rest
    return _json(entry)


def stream_level(level: str, fields: Fields) -> str:
    """Give the level in the management stream: whatever carries an error is one; trace and fatal do not exist there."""
    if "error" in fields:
        return "error"
    return level if level in {"info", "warn", "error"} else "debug"


def stream_type(fields: Fields) -> str:
    """Give the event type in the management stream."""
    number = fields.get("event", 0)
    return EVENT_NAMES[number] if isinstance(number, int) and 0 <= number < len(EVENT_NAMES) else EVENT_NAMES[0]
