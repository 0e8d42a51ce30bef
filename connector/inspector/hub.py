"""The inspector's memory: every stream, link and event of one process, within a ceiling.

Owns: Inspector (a Tap): the records, their total size, who goes first when it is full, the topic tree.
In: calls of links and watched streams. Out: rows and details for page, terminal and captures.
Never: holds traffic up; raises into it; does I/O (a capture hangs on `on_record`).
"""

from __future__ import annotations

import difflib
import json
from collections import deque
from collections.abc import Callable
from itertools import islice
from time import monotonic, time
from typing import Any

from connector.errors import WireError
from connector.inspector.frames import Entry, describe_entry
from connector.inspector.links import LinkRecord
from connector.inspector.redact import redact_bytes, redact_values
from connector.inspector.streams import STREAM_COST, StreamRecord, WatchedPort, WatchedSink
from connector.inspector.topics import TopicTree
from connector.inspector.verdict import SAME_SILENCE, TELLING_SILENCE, label, silence
from connector.protocol.ports import Acceptor, Buffer, LinkTap, Request, StreamPort, StreamSink

MAX_STREAMS = 2_000
"""Streams remembered; the oldest ended one goes first. A person scrolls through hundreds."""

MEMORY_CEILING = 64 * 1024 * 1024
"""Bytes that all records together count as. Above it ended streams go, then bodies stop growing and rings shrink."""

EXPLAINED = 500
"""Streams that are searched for the one that a log line means; it has just failed, so it is among the newest."""

MAX_CONTROL = 1_000
MAX_EVENTS = 1_000
MAX_LINKS = 64
MAX_CONFIGURATIONS = 50
"""Entries of the control plane's views: a reconnect makes about ten messages and five events."""

LARGEST_CONFIGURATION = 1_048_576
"""Bytes of a configuration push that are looked at; the proxy takes no larger one."""

Describe = Callable[[Request], tuple[int | None, str]]
Record = Callable[[str, Any, Any], None]
"""Called with what happened (`open`, `head`, `frame`, `end`, `control`, `event`, `link`), the record, and details."""


class ControlRow:
    """One message of the control plane, secrets masked."""

    __slots__ = ("at", "data", "link", "name", "notes", "outgoing", "seq", "text", "value", "wall", "where")

    def __init__(self, seq: int, link: LinkRecord, outgoing: bool, where: str, name: str, text: str) -> None:
        self.seq = seq
        self.at = monotonic()
        self.wall = time()
        self.link = link
        self.outgoing = outgoing
        self.where = where
        self.name = name
        self.text = text
        self.value: Any = None
        self.data = b""
        self.notes: list[tuple[int, int, str, str]] = []

    def row(self, *, full: bool = False) -> dict[str, Any]:
        """Return it for the page; `full` adds values, bytes and notes."""
        found: dict[str, Any] = {
            "seq": self.seq, "time": round(self.wall, 3), "link": self.link.identity, "conn": self.link.conn_index,
            "protocol": self.link.protocol, "out": self.outgoing, "where": self.where, "name": self.name,
            "text": self.text,
        }  # fmt: skip
        if full:
            found |= {"value": self.value, "hex": self.data.hex(), "notes": [list(note) for note in self.notes]}
        return found


class Inspector:
    """A Tap. `role` is `connector` or `edge`; `describe` tells rule and service of a request."""

    def __init__(
        self, role: str, *, no_redact: bool = False, describe: Describe | None = None, title: str = ""
    ) -> None:
        self.role = role
        self.title = title
        self.no_redact = no_redact
        self.describe = describe
        self.started = monotonic()
        self.streams: dict[int, StreamRecord] = {}
        self.links: dict[int, LinkRecord] = {}
        self.control: deque[ControlRow] = deque(maxlen=MAX_CONTROL)
        self.events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self.configurations: deque[dict[str, Any]] = deque(maxlen=MAX_CONFIGURATIONS)
        self.topics = TopicTree()
        self.kept = 0
        """Bytes that all payload in records counts as."""
        self.seen = 0
        self.forgotten = 0
        self.recorders: list[Record] = []
        self._ended: dict[int, None] = {}  # streams that may be forgotten, the oldest first
        self._next_link = 0
        self._next_seq = 0
        self._current_configuration = ""

    # -- Tap

    def open_link(self, protocol: str, remote: str, conn_index: int) -> LinkRecord:
        """Make the record of a link."""
        self._next_link += 1
        link = LinkRecord(self, self._next_link, protocol, remote, conn_index, client=self.role == "edge")
        if len(self.links) >= MAX_LINKS:
            ended = next((key for key, old in self.links.items() if old.closed is not None), None)
            del self.links[ended if ended is not None else next(iter(self.links))]
        self.links[link.identity] = link
        self._record("link", link, "open")
        return link

    def open_exchange(self, request: Request, link: LinkTap | None) -> StreamRecord:
        """Make the record of a request that the edge sends."""
        if isinstance(link, LinkRecord):
            return self.open_stream(request, link.protocol, link.identity, link.conn_index)
        return self.open_stream(request, "", 0, -1)

    def on_origin(self, port: StreamPort, what: str) -> None:
        """Mark the time in the stream's record."""
        if isinstance(port, WatchedPort):
            port.record.mark(what)

    def on_event(self, name: str, fields: dict[str, object]) -> None:
        """Remember an event of the process."""
        self._next_seq += 1
        safe = fields if self.no_redact else redact_values(fields)
        event = {"seq": self._next_seq, "time": round(time(), 3), "event": name, "fields": safe}
        self.events.append(event)
        if "cfRay" in fields and "error" in fields:
            self._explain(str(fields["cfRay"]).encode(), str(fields["error"]), str(fields.get("advice", "")))
        self._record("event", event, None)

    def _explain(self, ray: bytes, error: str, advice: str) -> None:
        """The log says why a request failed: its record should, too."""
        for record in islice(reversed(self.streams.values()), EXPLAINED):
            if record.ray == ray:
                record.error, record.advice, record.dirty = error, advice, True
                return

    # -- called by links and records

    def open_stream(
        self,
        request: Request,
        transport: str,
        link: int,
        conn_index: int,
        *,
        replay: int = 0,
        stream_id: int | None = None,
    ) -> StreamRecord:
        """Make the record of a stream."""
        self.seen += 1
        record = StreamRecord(self, self.seen, request, transport, link, conn_index)
        record.replay = replay
        record.stream_id = stream_id
        if self.describe is not None:
            record.rule, record.service = self.describe(request)
        self.streams[record.identity] = record
        self.kept += STREAM_COST
        if len(self.streams) > MAX_STREAMS or self.kept > MEMORY_CEILING:
            self._make_room()
        self._record("open", record, None)
        return record

    def watch(self, request: Request, port: StreamPort, accept: Acceptor, record: StreamRecord) -> StreamSink:
        """Pass a request of ours (a replay) to `accept` under an existing record."""
        return WatchedSink(record, accept(request, WatchedPort(record, port)))

    def has_room(self, size: int) -> bool:
        """Return whether `size` more bytes may be kept, after letting ended streams go."""
        if self.kept + size <= MEMORY_CEILING:
            return True
        if self._ended:
            self._make_room()
        return self.kept + size <= MEMORY_CEILING

    def on_head(self, record: StreamRecord) -> None:
        """A response head went out."""
        self._record("head", record, None)

    def on_entry(self, record: StreamRecord, entry: Entry) -> None:
        """A frame is there."""
        if self.recorders:
            self._record("frame", record, entry)
        if self.kept > MEMORY_CEILING:
            if self._ended:
                self._make_room()
            if self.kept > MEMORY_CEILING and record.frames is not None:
                # The record adds what its ring grew by after this call, and so takes off what it shrank by.
                record.frames.forget(len(record.frames.ring) // 2)

    def on_ended(self, record: StreamRecord) -> None:
        """A stream is over."""
        if record.identity in self.streams:
            self._ended[record.identity] = None
        self._record("end", record, None)

    def on_link_closed(self, link: LinkRecord) -> None:
        """A link is over."""
        self._record("link", link, "closed")

    def on_control(
        self, link: LinkRecord, outgoing: bool, where: str, name: str, text: str, value: Any, data: bytes,
        notes: list[tuple[int, int, str, str]],
    ) -> None:  # fmt: skip
        """A message of the control plane, masked already."""
        self._next_seq += 1
        row = ControlRow(self._next_seq, link, outgoing, where, name, text)
        row.value, row.data, row.notes = value, data, notes
        self.control.append(row)
        content = ((value or {}).get("call") or {}).get("params") or {} if isinstance(value, dict) else {}
        if name == "updateConfiguration" and isinstance(content.get("content"), dict):
            found = content["content"]
            self.on_configuration(found.get("version"), str(found.get("config", "")))
        self._record("control", row, None)

    def watch_configuration(self, link: LinkRecord, request: Request, port: StreamPort, accept: Acceptor) -> StreamSink:
        """Look into a configuration push over HTTP/2 on its way."""
        return _ConfigurationSink(self, link, accept(request, port))

    def on_push(self, link: LinkRecord, outgoing: bool, body: bytes) -> None:
        """A configuration was pushed in a request of its own, as over HTTP/2."""
        try:
            message = json.loads(body)
            version, config = message.get("version"), json.dumps(message.get("config"))
        except (ValueError, AttributeError, RecursionError, WireError):
            version, config = None, body.decode("utf-8", "replace")
        self.on_configuration(version, config)
        self.on_control(link, outgoing, "request", "update-configuration", f"version {version}", None, b"", [])

    def on_configuration(self, version: Any, config: str) -> None:
        """Remember a pushed configuration and what it changed."""
        safe = config if self.no_redact else redact_bytes(config.encode()).decode("utf-8", "replace")
        try:
            text = json.dumps(json.loads(safe), indent=2, sort_keys=True)
        except ValueError:
            text = safe
        diff = list(difflib.unified_diff(self._current_configuration.splitlines(), text.splitlines(), lineterm="", n=2))
        if diff or not self.configurations:
            self._next_seq += 1
            self.configurations.append(
                {"seq": self._next_seq, "time": round(time(), 3), "version": version, "diff": diff[2:], "text": text}
            )
            self._current_configuration = text
            self._record("configuration", self.configurations[-1], None)

    # -- for page, terminal, captures

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows, oldest first."""
        return [record.row(self.no_redact) for record in self.streams.values()]

    def changed(self) -> list[StreamRecord]:
        """Return the records that changed since this was asked before, and mark them as seen."""
        found = [record for record in self.streams.values() if record.dirty]
        for record in found:
            record.dirty = False
        return found

    def frames(self, record: StreamRecord, after: int, limit: int) -> list[dict[str, Any]]:
        """Return frames of a stream for the page."""
        return record.frames.rows(after, limit, record.started, self.no_redact) if record.frames is not None else []

    def describe_frame(self, record: StreamRecord, entry: Entry) -> dict[str, Any]:
        """Return one frame for the page."""
        return describe_entry(entry, record.started, self.no_redact)

    def sessions(self) -> list[dict[str, Any]]:
        """Return every MQTT session."""
        now = monotonic()
        found = []
        for record in self.streams.values():
            session = record.frames.mqtt if record.frames is not None else None
            if session is not None:
                end = now if record.ended is None else record.started + record.ended
                found.append(
                    {
                        "id": record.identity,
                        "open": record.ended is None,
                        "host": record.host.decode("latin-1"),
                        "time": round(record.wall, 3),
                        "why": label(record),
                        "ms": None if record.ended is None else round(record.ended * 1000, 1),
                        "verdict": record.verdict().as_json(),
                        **session.snapshot(end, ended=record.ended is not None, no_redact=self.no_redact),
                    }
                )
        return found

    def status(self) -> dict[str, Any]:
        """Return the numbers of the page's head line."""
        return {
            "role": self.role, "title": self.title, "redacted": not self.no_redact, "streams": len(self.streams),
            "seen": self.seen, "forgotten": self.forgotten, "kept": self.kept, "ceiling": MEMORY_CEILING,
            "topics": len(self.topics), "uptime": round(monotonic() - self.started, 1),
        }  # fmt: skip

    def same_silence(self, record: StreamRecord) -> tuple[int, int]:
        """Return how many streams of the same client the edge cut after as long a silence, and how many ended."""
        mine, same, ended = silence(record), 0, 0
        for other in self._same_client(record):
            ended += 1
            if other.how == "reset by the edge":
                same += abs(silence(other) - mine) <= max(0.5, mine * SAME_SILENCE)
        return same, ended

    def cut_before(self, record: StreamRecord) -> tuple[int, int, float]:
        """Return the same of the connections before this one, and the silence of the last that was cut."""
        before = [other for other in self._same_client(record) if other.identity < record.identity]
        last = next((other for other in reversed(before) if other.how == "reset by the edge"), None)
        if last is None or silence(last) < TELLING_SILENCE:
            return 0, len(before), 0.0
        same, _ = self.same_silence(last)
        return same, len(before), silence(last)

    def _same_client(self, record: StreamRecord) -> list[StreamRecord]:
        """Return the ended WebSockets of one MQTT client ID, or of one visitor and path, the oldest first."""
        return [
            other
            for other in self.streams.values()
            if other.kind is record.kind and other.ended is not None and _client(other) == _client(record)
        ]

    def clear(self) -> None:
        """Forget every ended stream."""
        for identity in list(self._ended):
            self._forget(identity)

    def load(self, identity: int, record: StreamRecord) -> None:
        """Take a record out of a capture."""
        self.streams[identity] = record
        self.kept += record.memory
        if record.ended is not None:
            self._ended[identity] = None
        if len(self.streams) > MAX_STREAMS or self.kept > MEMORY_CEILING:
            self._make_room()

    # -- inside

    def _make_room(self) -> None:
        """Let ended streams go, the oldest first, until there is a tenth to spare; open ones beyond MAX_STREAMS too."""
        goal = MEMORY_CEILING - MEMORY_CEILING // 10
        for identity in list(self._ended):
            if len(self.streams) <= MAX_STREAMS and self.kept <= goal:
                return
            self._forget(identity)
        while len(self.streams) > MAX_STREAMS:
            self._forget(next(iter(self.streams)))

    def _forget(self, identity: int) -> None:
        record = self.streams.pop(identity)
        self._ended.pop(identity, None)
        self.kept -= record.memory
        self.forgotten += 1
        record.hub = _Nowhere(self)  # type: ignore[assignment]  # it may still be open: what it says goes nowhere

    def _record(self, what: str, record: Any, details: Any) -> None:
        for recorder in self.recorders:
            recorder(what, record, details)


def _client(record: StreamRecord) -> object:
    session = record.frames.mqtt if record.frames is not None else None
    if session is not None and session.client_id:
        return session.client_id
    return record.client, record.host, record.target


class _Nowhere:
    """The hub of a stream that was forgotten: takes everything, keeps nothing."""

    def __init__(self, hub: Inspector) -> None:
        self.kept = 0
        self.role = hub.role
        self.no_redact = hub.no_redact
        self.topics = None

    def has_room(self, size: int) -> bool:
        return False

    def same_silence(self, record: StreamRecord) -> tuple[int, int]:
        """Nothing is known of others."""
        return 0, 0

    def cut_before(self, record: StreamRecord) -> tuple[int, int, float]:
        """Nothing is known of others."""
        return 0, 0, 0.0

    def on_head(self, record: StreamRecord) -> None:
        """Ignore."""

    def on_entry(self, record: StreamRecord, entry: Entry) -> None:
        """Ignore, and keep the ring small."""
        if record.frames is not None:
            record.frames.forget(len(record.frames.ring))

    def on_ended(self, record: StreamRecord) -> None:
        """Ignore."""


class _ConfigurationSink:
    """Reads a configuration push on its way to the proxy."""

    def __init__(self, hub: Inspector, link: LinkRecord, sink: StreamSink) -> None:
        self._hub = hub
        self._link = link
        self._sink = sink
        self._body = bytearray()
        self.pause_writing = sink.pause_writing
        self.resume_writing = sink.resume_writing

    def on_data(self, data: Buffer) -> None:
        """Keep a copy, pass on."""
        if len(self._body) < LARGEST_CONFIGURATION:
            self._body += data
        self._sink.on_data(data)

    def on_eof(self) -> None:
        """Look at it before it is applied."""
        self._hub.on_push(self._link, False, bytes(self._body))
        self._sink.on_eof()

    def on_reset(self, error: BaseException | None) -> None:
        """Pass on."""
        self._sink.on_reset(error)
