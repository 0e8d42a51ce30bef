"""What the dev edge tells: one event a line, JSON for programs or text for people.

Owns: the event stream on standard output, and the listeners that tests and embedders register.
In: `EventLog.emit(name, **fields)`. Out: lines; calls of listeners.
Never: prints a token, a tunnel secret or a query string (callers give none).
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from typing import Any, TextIO

Event = dict[str, Any]
Listener = Callable[[Event], None]

_COLOURS = {"registered": "32", "listening": "36", "register_refused": "31", "disconnected": "33", "error": "31"}


def timestamp() -> str:
    """The time now as RFC 3339 in UTC with milliseconds."""
    now = datetime.datetime.now(datetime.UTC)
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class EventLog:
    """Sink of all events of one edge. `output` None keeps them to the listeners."""

    def __init__(self, output: TextIO | None = None, *, as_json: bool = False, colour: bool | None = None) -> None:
        self._output = output
        self._json = as_json
        if colour is None:
            colour = output is not None and output.isatty() and not os.environ.get("NO_COLOR")
        self._colour = colour
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with every event from now on; the returned function ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def emit(self, name: str, /, **fields: Any) -> None:
        """Tell one event."""
        event: Event = {"event": name, "time": timestamp(), **fields}
        if self._output is not None:
            line = json.dumps(event, ensure_ascii=False) if self._json else self._human(name, fields)
            try:
                print(line, file=self._output, flush=True)
            except (OSError, ValueError):
                self._reader_left()
        for listener in list(self._listeners):
            listener(event)

    def _reader_left(self) -> None:
        """Serving goes on. What is left in the buffer goes nowhere: its flush at exit would change the exit status."""
        output, self._output = self._output, None
        try:
            descriptor = output.fileno() if output is not None else -1
            nowhere = os.open(os.devnull, os.O_WRONLY)
        except (OSError, ValueError):
            return
        if descriptor >= 0:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    def _human(self, name: str, fields: dict[str, Any]) -> str:
        clock = datetime.datetime.now().strftime("%H:%M:%S")
        label = f"{name:<16}"
        if self._colour:
            label = f"\x1b[{_COLOURS.get(name, '2')}m{label}\x1b[0m"
        return f"{clock} {label} {_describe(name, fields)}"


def _describe(name: str, f: dict[str, Any]) -> str:
    if name == "listening":
        hosts = sorted({host for tunnel in f["tunnels"] for host in tunnel["hostnames"]})
        names = ", ".join(tunnel["name"] for tunnel in f["tunnels"])
        tail = f"; hostnames {', '.join(hosts)}" if hosts else ""
        return f"edge {f['edge']}, public {f['public']}, ca {f['ca']}; tunnels {names}{tail}"
    if name == "request":
        return f"{f['ray']} {f['kind']} {f['method']} {f['host']}{f['path']} from {f['client']}"
    if name == "response":
        return f"{f['ray']} status {f['status']}"
    if name == "stream_closed":
        return f"{f['ray']} {f['bytes_up']} B up, {f['bytes_down']} B down, {f['ms']} ms"
    if name == "registered":
        return (
            f"connector {f['connector']} connection {f['conn_index']} of {f['address']},"
            f" version {f['version']}, tunnel {f['tunnel']}"
        )
    return " ".join(f"{key}={_plain(value)}" for key, value in f.items() if value is not None)


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False) if " " in text or not text else text
