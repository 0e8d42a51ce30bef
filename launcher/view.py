"""What people and programs see: progress, checks, and one line per event of all three services.

Owns: reading the children's log lines, the wording, colours, widths, folding of floods; JSON lines for programs.
In: lines and facts. Out: text on one stream.
Never: prints a secret it was told about, or a control character that came from a client.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

COLOURS = {"broker": "32", "edge": "36", "connector": "35", "demo": "1", "check": "34"}
LINES_PER_SECOND = 40
MESSAGES_PER_SECOND = 5
"""More events (of them: more messages) than that in one second are counted instead of shown: nobody reads faster, and
a slow terminal would hold up the children. Programs (`--json`) get all."""

CLIENT_SHOWN = 16
"""Characters of a client id for people: generated ones are 41 long and differ early."""

SHOWN_FIELDS = ("connIndex", "ip", "protocol", "version", "originService", "error")
"""Fields of the connector's log lines that people see; `--json` has all."""

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened in one service: `text` for people, `facts` for programs."""

    service: str
    name: str
    text: str
    facts: Facts = field(default_factory=dict)
    bad: bool = False


def clean(text: str) -> str:
    """`text` without control characters: client ids and topics are chosen by strangers."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def size(count: float) -> str:
    """Bytes for people: `312 B`, `4.2 kB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def duration(ms: float) -> str:
    """Milliseconds for people: `12 ms`, `4.2 s`, `3 min`."""
    if ms < 1000:
        return f"{ms:.0f} ms"
    return f"{ms / 1000:.1f} s" if ms < 100_000 else f"{ms / 60_000:.0f} min"


def _json_object(line: str) -> Facts | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


class EdgeReader:
    """The dev edge's events, in words. One instance per edge: answers are told with what they answer."""

    MAX_OPEN = 1_000
    """Requests remembered until their stream closes; older ones are told by their ray only."""

    def __init__(self) -> None:
        self._open: dict[str, str] = {}

    def read(self, line: str) -> Event:
        """One line of its standard output or error."""
        facts = _json_object(line)
        if facts is None or not isinstance(facts.get("event"), str):
            return Event("edge", "log", line, {"line": line}, bad="error" in line.lower())
        name = facts["event"]
        bad = bool(facts.get("error")) or name == "register_refused"
        return Event("edge", name, self._words(name, facts), facts, bad)

    def _words(self, name: str, f: Facts) -> str:
        ray = str(f.get("ray", ""))[:8]
        if name == "request":
            what = (
                f"{f.get('method')} {f.get('path')}" if f.get("kind") != "websocket" else f"WebSocket {f.get('path')}"
            )
            if len(self._open) >= self.MAX_OPEN:
                self._open.pop(next(iter(self._open)))
            self._open[ray] = what
            return f"{ray} {what} from {f.get('client')}"
        if name == "response":
            return f"{ray} {self._open.get(ray, '')} -> {f.get('status')}"
        if name == "stream_closed":
            what = self._open.pop(ray, "")
            up, down, ms = (float(f.get(key) or 0) for key in ("bytes_up", "bytes_down", "ms"))
            return f"{ray} {what} closed: {size(up)} up, {size(down)} down, {duration(ms)}"
        if name == "registered":
            return f"connector {str(f.get('connector'))[:8]} registered from {f.get('address')} ({f.get('protocol')})"
        if name == "register_refused":
            return f"refused a connector: {f.get('cause')}"
        if name == "configuration":
            state = "applied" if f.get("applied") else f"refused: {f.get('error')}"
            return f"configuration version {f.get('version')} {state}"
        if name in {"disconnected", "unregistered"}:
            return f"connector {name}" + (f": {f['error']}" if f.get("error") else "")
        rest = " ".join(f"{key}={value}" for key, value in f.items() if key not in {"event", "time"})
        return f"{name} {rest}"


def read_connector(line: str) -> Event:
    """One log line of the connector."""
    facts = _json_object(line)
    if facts is None:
        return Event("connector", "log", line, {"line": line}, bad="error" in line.lower())
    level = str(facts.get("level", "info"))
    message = str(facts.get("message", ""))
    extra = " ".join(f"{key}={facts[key]}" for key in SHOWN_FIELDS if key in facts)
    bad = level in {"error", "fatal", "panic"}
    return Event("connector", "log", f"{message} {extra}".strip(), facts, bad or level == "warn")


class BrokerReader:
    """Mosquitto's log lines (2.0, 2.1 and our stand-in's), in words; what people need not see gives None."""

    CONNECTED = re.compile(r"New client connected from (\S+) as (.*) \(p(\d), c\d, k(\d+)(?:, u'(.*)')?\)\.$")
    PUBLISH = re.compile(
        r"(Received|Denied) PUBLISH from (.*) \(d\d, q(\d), r(\d), m\d+, '(.*)', \.\.\. \((\d+) bytes\)\)"
    )
    SUBSCRIBED = re.compile(r"(\S+) ([012]) (\S.*)$")
    REFUSED = re.compile(r"Sending CONNACK to (.*) \(0, (\d+)\)$")
    REFUSED_HERE = re.compile(r"Client (.*) refused: (.*)$")
    LEFT = re.compile(r"Client (.*?)(?: \[[^\]]*\])? (disconnected|closed its connection|has exceeded timeout)(.*)$")
    WARNING = re.compile(r"(?i)^(?:\d+: )?(error|warning)\b")
    # 2.0 counts the versions it knows; 2.1 gives the number on the wire.
    PROTOCOLS = {"1": "MQTT 3.1", "2": "MQTT 3.1.1", "3": "MQTT 3.1", "4": "MQTT 3.1.1", "5": "MQTT 5"}  # noqa: RUF012

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    MAX_KNOWN = 10_000
    """Clients remembered for their user; far above what the configuration lets in."""

    def _who(self, client: str) -> str:
        user = self._known.get(client)
        short = client if len(client) <= CLIENT_SHOWN else client[: CLIENT_SHOWN - 1] + "…"
        return f"{short} ({user})" if user else short

    def read(self, line: str) -> Event | None:
        """One line of its output."""
        if found := self.CONNECTED.match(line):
            where, client, level, keepalive, user = found.groups()
            if len(self._known) >= self.MAX_KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[client] = user or ""
            where = where.removeprefix("::ffff:")
            protocol = self.PROTOCOLS.get(level, f"protocol {level}")
            facts = {
                "client": client,
                "user": user,
                "address": where,
                "protocol": protocol,
                "keepalive": int(keepalive),
            }
            return Event("broker", "connected", f"+ {self._who(client)} connected, {protocol}", facts)
        if found := self.PUBLISH.match(line):
            verb, client, qos, retain, topic, count = found.groups()
            facts = {"client": client, "topic": topic, "qos": int(qos), "retain": retain == "1", "bytes": int(count)}
            said = f"{topic} ({count} B, QoS {qos}{', retained' if retain == '1' else ''}) from {self._who(client)}"
            if verb == "Denied":
                return Event("broker", "denied", f"! refused by the rules: {said}", facts, bad=True)
            return Event("broker", "publish", f"> {said}", facts)
        if (found := self.REFUSED.match(line)) and found[2] != "0":
            facts = {"client": found[1], "code": int(found[2])}
            return Event("broker", "refused", f"! {found[1]} refused: not authorised ({found[2]})", facts, bad=True)
        if found := self.REFUSED_HERE.match(line):
            facts = {"client": found[1], "code": 4}
            return Event("broker", "refused", f"! {found[1]} refused: {found[2]}", facts, bad=True)
        if (found := self.LEFT.match(line)) and found[1] in self._known:
            client = found[1]
            text = f"- {self._who(client)} {found[2]}{found[3].rstrip('.')}"
            del self._known[client]
            return Event(
                "broker", "disconnected", text, {"client": client, "reason": (found[2] + found[3]).rstrip(".")}
            )
        if (found := self.SUBSCRIBED.match(line)) and found[1] in self._known:
            facts = {"client": found[1], "qos": int(found[2]), "topic": found[3]}
            return Event(
                "broker", "subscribed", f"< {found[3]} (QoS {found[2]}) wanted by {self._who(found[1])}", facts
            )
        if self.WARNING.match(line) or "error" in line.lower():
            return Event("broker", "log", line, {"line": line}, bad=True)
        return None


class Console:
    """The one place that prints. `on_lost` is called when nobody reads any more."""

    def __init__(self, out: TextIO, *, as_json: bool = False, on_lost: Callable[[], None] | None = None) -> None:
        self._out = out
        self._json = as_json
        self.on_lost = on_lost
        self._lost = False
        tty = out.isatty()
        self._colour = tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._tty = tty
        self._begun = time.monotonic()
        self._secrets: list[str] = []
        self._second = 0
        self._shown = 0
        self._messages = 0
        self._folded = 0

    def hide(self, secret: str) -> None:
        """Never print this text (except by `reveal`)."""
        if secret:
            self._secrets.append(secret)

    @property
    def as_json(self) -> bool:
        """Whether programs read this."""
        return self._json

    def _write(self, text: str) -> None:
        if self._lost:
            return
        try:
            print(text, file=self._out, flush=True)
        except (OSError, ValueError):  # the reader of the pipe left, or the terminal was closed
            self._lost = True
            self._discard()
            if self.on_lost is not None:
                self.on_lost()

    def _discard(self) -> None:
        """Send what is left in the stream's buffer nowhere: its flush at exit would fail and change the exit status."""
        try:
            descriptor = self._out.fileno()
        except (OSError, ValueError):
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)

    def _safe(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and code else text

    def _json_line(self, facts: Facts) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._write(self._safe(json.dumps({"time": now, **facts}, ensure_ascii=False, default=str)))

    def _row(self, stamp: str, service: str, text: str, *, bad: bool = False, fit: bool = False) -> None:
        text = clean(self._safe(text))
        if fit and self._tty:
            room = max(20, shutil.get_terminal_size().columns - len(stamp) - 12)
            text = text if len(text) <= room else text[: room - 1] + "…"
        label = self._paint(COLOURS.get(service, ""), f"{service:<10}")
        self._write(f"{stamp} {label} {self._paint('31' if bad else '', text)}")

    def progress(self, service: str, text: str, **facts: Any) -> None:
        """One step of the start, with the seconds since it began."""
        elapsed = time.monotonic() - self._begun
        if self._json:
            self._json_line(
                {"event": "progress", "service": service, "text": text, "elapsed": round(elapsed, 3), **facts}
            )
        else:
            self._row(f"{elapsed:6.2f} s", service, text)

    def check(self, hop: str, detail: str, ms: float) -> None:
        """One step of the self-check that worked."""
        if self._json:
            self._json_line({"event": "check", "hop": hop, "detail": detail, "ms": round(ms, 2)})
        else:
            elapsed = time.monotonic() - self._begun
            self._row(f"{elapsed:6.2f} s", "check", f"{hop}: {detail}, {ms:.1f} ms")

    def event(self, event: Event) -> None:
        """One line of the live view."""
        if self._json:
            facts = {key: value for key, value in event.facts.items() if key not in {"event", "time", "service"}}
            self._json_line({"event": event.name, "service": event.service, **facts})
            return
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._shown, self._messages = second, 0, 0
            self.flush_folded()
        message = event.name == "publish"
        if self._shown >= LINES_PER_SECOND or (message and self._messages >= MESSAGES_PER_SECOND):
            self._folded += 1
            return
        self._shown += 1
        self._messages += message
        self._row(_clock(), event.service, event.text, bad=event.bad, fit=True)

    def flush_folded(self) -> None:
        """Tell how many events were not shown; the live view calls this each second."""
        if self._folded:
            folded, self._folded = self._folded, 0
            self._row(_clock(), "demo", f"... and {folded} more events")

    def stopping(self) -> None:
        """Its user asked for the end."""
        if self._json:
            self._json_line({"event": "stopping"})
        else:
            self._write("\nStopping (again to stop at once).")

    def text(self, text: str) -> None:
        """Text for people only."""
        if not self._json:
            self._write(self._safe(text))

    def reveal(self, text: str, **facts: Any) -> None:
        """Text or facts that contain the demo user's password: the one place where it is shown."""
        if self._json:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            self._write(json.dumps({"time": now, **facts}, ensure_ascii=False))
        else:
            self._write(text)

    def failure(self, hop: str, message: str, advice: str, tail: list[str]) -> None:
        """Why the demo ends, the failing hop first."""
        if self._json:
            self._json_line({"event": "failed", "hop": hop, "message": message, "advice": advice, "tail": tail})
            return
        self._write("")
        self._write(self._paint("31;1", f"FAILED at {hop}: ") + clean(self._safe(message)))
        if tail:
            self._write("  its last lines:")
            for line in tail:
                self._write("    " + clean(self._safe(line)))
        if advice:
            self._write(self._paint("1", "  what to do: ") + clean(self._safe(advice)))


def _clock() -> str:
    return datetime.datetime.now().strftime("%H:%M:%S")
