"""Capture files: an append-only record of what the inspector saw, whole up to the last moment before a crash.

Owns: the format (CAPTURE.md beside this file), CaptureWriter, and reading with a cut tail. In: records of the hub.
Out: bytes in a file; parsed records. Never: stops or slows traffic (a full disk ends the capture, with one event);
writes a secret unless told to.
"""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from time import monotonic, time
from typing import Any, BinaryIO, NamedTuple

from connector import __version__
from connector.errors import ConfigError, WireError
from connector.inspector.frames import Entry
from connector.inspector.hub import ControlRow, Inspector
from connector.inspector.links import LinkRecord
from connector.inspector.redact import redact_bytes, redact_headers, redact_target, redact_text
from connector.inspector.streams import DOWN, UP, StreamRecord
from connector.wire import mqtt

MAGIC = b"TTAPCAP\n"
VERSION = 1
HEADER = struct.Struct(">8sHHI")
RECORD = struct.Struct(">II")
JSON_LENGTH = struct.Struct(">I")
FLAG_REDACTED = 1

LARGEST_RECORD = 8 * 1024 * 1024
"""Bytes of one record; headers (1 MiB), or a frame's payload (64 KiB). A larger length: a damaged file."""

FLUSH_SECONDS = 0.1
FLUSH_BYTES = 256 * 1024
"""What a killed process may lose: so much time, or so many bytes."""

DEFAULT_LIMIT = 4 * 1024 * 1024 * 1024
"""Bytes of a capture file, after which it takes no more: an hour at 5,000 messages a second."""


class Item(NamedTuple):
    """One record of a file: its JSON, its payload, and where it begins."""

    fields: dict[str, Any]
    payload: bytes
    offset: int


class CaptureWriter:
    """Writes what a hub records to a file. Hang `record` on `Inspector.recorders`; call `close` at the end.

    `later(seconds, call)` schedules the next flush; an error of the file system ends the capture through `on_failed`.
    """

    def __init__(
        self,
        path: str,
        hub: Inspector,
        later: Callable[[float, Callable[[], None]], Any],
        on_failed: Callable[[str], None] = lambda text: None,
        limit: int = DEFAULT_LIMIT,
        started: float | None = None,
    ) -> None:
        self.path = path
        self.hub = hub
        self.size = 0
        self.records = 0
        self.active = True
        self._later = later
        self._on_failed = on_failed
        self._limit = limit
        self._buffer = bytearray()
        self._flush_due = False
        now = monotonic()
        self._started = now if started is None else started  # the moment that all times count from
        self.wall = time() - (now - self._started)
        self.at: float | None = None
        """Moment of the next records, as of `time.monotonic`; None: now."""
        self._file = self.open_file(path, not hub.no_redact)
        self.size = os.fstat(self._file).st_size if self._file >= 0 else 0
        self._put(
            {
                "t": "session", "wall": self.wall, "role": hub.role, "program": f"connector {__version__}",
                "python": sys.version.split()[0], "redacted": not hub.no_redact,
            }
        )  # fmt: skip
        for record in hub.streams.values():  # what runs already, so that its frames have a beginning
            if record.ended is None:
                self.record("open", record, None)
                if record.status:
                    self.record("head", record, None)

    def record(self, what: str, record: Any, details: Any) -> None:
        """Take one happening; never raises."""
        if not self.active:
            return
        try:
            self._take(what, record, details)
        except OSError as error:
            self._fail(error.strerror or str(error))

    def flush(self) -> None:
        """Write what has gathered."""
        self._flush_due = False
        if not self._buffer or not self.active:
            return
        data, self._buffer = self._buffer, bytearray()
        try:
            self.write(data)
        except OSError as error:
            self._fail(error.strerror or str(error))
            return
        self.size += len(data)
        if self.size > self._limit:
            self._fail(f"it has reached {self._limit} bytes")

    def open_file(self, path: str, redacted: bool) -> int:
        """Return a descriptor to append to. Errors: ConfigError."""
        return _open(path, redacted=redacted)

    def write(self, data: bytearray) -> None:
        """Append. Errors: OSError."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]

    def header(self, redacted: bool) -> bytes:
        """Return what a file begins with."""
        return HEADER.pack(MAGIC, VERSION, FLAG_REDACTED if redacted else 0, 0)

    def close(self) -> None:
        """Write the rest and close."""
        if self.active:
            self.flush()
        if self.active:
            self.active = False
            os.close(self._file)

    # -- inside

    def _fail(self, text: str) -> None:
        self.active = False
        self._buffer.clear()
        os.close(self._file)
        self._on_failed(f"the capture {self.path} has ended: {text}")

    def _put(self, fields: dict[str, Any], payload: bytes = b"") -> None:
        fields.setdefault("at", round((monotonic() if self.at is None else self.at) - self._started, 6))
        text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        body = JSON_LENGTH.pack(len(text)) + text + payload
        self._buffer += RECORD.pack(len(body), zlib.crc32(body)) + body
        self.records += 1
        if len(self._buffer) >= FLUSH_BYTES:
            self.flush()
        elif not self._flush_due:
            self._flush_due = True
            self._later(FLUSH_SECONDS, self.flush)

    def _take(self, what: str, record: Any, details: Any) -> None:
        match what:
            case "frame":
                self._frame(record, details)
            case "open":
                self._open(record)
            case "head":
                self._head(record)
            case "end":
                self._end(record)
            case "link":
                link: LinkRecord = record
                self._put(
                    {
                        "t": "link", "id": link.identity, "what": details, "protocol": link.protocol,
                        "remote": link.remote, "conn": link.conn_index, "error": link.error,
                    }
                )  # fmt: skip
            case "control":
                row: ControlRow = record
                self._put(
                    {
                        "t": "control", "link": row.link.identity, "out": row.outgoing, "where": row.where,
                        "name": row.name, "text": row.text, "value": row.value,
                    },
                    row.data,
                )  # fmt: skip
            case "configuration":
                self._put({"t": "configuration", "version": record["version"], "text": record["text"]})
            case "event":
                self._put({"t": "event", "event": record["event"], "fields": record["fields"]})

    def _open(self, record: StreamRecord) -> None:
        plain = self.hub.no_redact
        self._put(
            {
                "t": "open", "id": record.identity, "link": record.link, "transport": record.transport,
                "conn": record.conn_index, "stream": record.stream_id, "kind": record.kind.name.lower(),
                "method": _text(record.method), "scheme": _text(record.scheme), "host": _text(record.host),
                "target": _text(record.target if plain else redact_target(record.target)),
                "headers": _headers(record.headers, plain), "rule": record.rule, "service": record.service,
                "wall": record.wall, **({"replay": record.replay} if record.replay else {}),
            }
        )  # fmt: skip

    def _head(self, record: StreamRecord) -> None:
        headers = _headers(record.response_headers, self.hub.no_redact)
        self._put(
            {"t": "head", "id": record.identity, "status": record.status, "source": record.source, "headers": headers}
        )

    def _frame(self, record: StreamRecord, entry: Entry) -> None:
        fields: dict[str, Any] = {
            "t": "frame", "id": record.identity, "way": entry.way, "opcode": entry.opcode, "fin": entry.fin,
            "length": entry.length, "at": round(entry.now - self._started, 6),
        }  # fmt: skip
        if entry.packets:
            keep = self.hub.no_redact
            fields["packets"] = [[mqtt.NAMES[packet.kind], packet.shown(keep)] for packet in entry.packets]
        cut = entry.length > len(entry.payload)
        self._put(fields, entry.payload if self.hub.no_redact else redact_bytes(entry.payload, cut=cut))

    def _end(self, record: StreamRecord) -> None:
        for way in (UP, DOWN):
            body = record.bodies[way]
            if body.size:
                data, encoding = record.plain_body(way)
                if not self.hub.no_redact:
                    data = redact_bytes(data, cut=body.truncated)
                self._put(
                    {
                        "t": "body", "id": record.identity, "way": way, "size": body.size,
                        "truncated": body.truncated, "encoding": encoding,
                    },
                    data,
                )  # fmt: skip
        self._put(
            {
                "t": "end", "id": record.identity, "how": record.how,
                "error": record.error if self.hub.no_redact else redact_text(record.error), "up": record.bytes[UP],
                "down": record.bytes[DOWN], "ms": round((record.ended or 0) * 1000, 3),
                "marks": {name: round(at * 1000, 3) for name, at in record.marks.items()},
                "trailers": _headers(record.trailers, self.hub.no_redact), "diagnosis": record.diagnosis(),
            }
        )  # fmt: skip


def _open(path: str, *, redacted: bool) -> int:
    """Return a descriptor at the end of the last whole record of `path`, made if need be. Errors: ConfigError."""
    flags = FLAG_REDACTED if redacted else 0
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    except OSError as error:
        raise ConfigError(
            f"--capture {path}: {error.strerror or error}", advice="Name a file in a directory that can be written."
        ) from None
    try:
        if os.fstat(descriptor).st_size == 0:
            os.write(descriptor, HEADER.pack(MAGIC, VERSION, flags, 0))
            return descriptor
        with os.fdopen(os.dup(descriptor), "rb") as file:
            reader = CaptureReader(file, path)
            if bool(reader.redacted) != redacted:
                word = "redacted" if reader.redacted else "not redacted"
                raise ConfigError(
                    f"--capture {path}: this file is {word}, and what would be appended is not the same",
                    advice="Name another file.",
                )
            for _ in reader:
                pass
            end = reader.position
        if os.lseek(descriptor, 0, os.SEEK_END) > end:
            os.ftruncate(descriptor, end)  # a record that a crash has cut
        os.lseek(descriptor, end, os.SEEK_SET)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(f"--capture {path}: {errno.errorcode.get(error.errno or 0, '')} {error}") from None
    except (WireError, ConfigError) as error:
        os.close(descriptor)
        raise ConfigError(str(error), advice=error.advice) from None
    return descriptor


class CaptureReader:
    """Iterates over the records of a file. `cut` tells at the end how many bytes of a broken tail were left out."""

    def __init__(self, file: BinaryIO, name: str = "the capture") -> None:
        self._file = file
        head = file.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise WireError(
                f"{name} is no capture file", advice="It must be made by --capture, or by the page's button."
            )
        _, self.version, flags, _ = HEADER.unpack(head)
        if self.version != VERSION:
            raise WireError(
                f"{name} has version {self.version} of the capture format, this program knows {VERSION}",
                advice="Update the connector.",
            )
        self.redacted = bool(flags & FLAG_REDACTED)
        self.position = HEADER.size
        self.cut = 0

    def __iter__(self) -> Iterator[Item]:
        while True:
            head = self._file.read(RECORD.size)
            if len(head) < RECORD.size:
                self.cut = len(head)
                return
            length, checksum = RECORD.unpack(head)
            if not JSON_LENGTH.size <= length <= LARGEST_RECORD:
                self.cut = len(head) + len(self._file.read())
                return
            body = self._file.read(length)
            if len(body) < length or zlib.crc32(body) != checksum:
                self.cut = len(head) + len(body) + len(self._file.read())
                return
            size = JSON_LENGTH.unpack_from(body)[0]
            try:
                fields = json.loads(body[4 : 4 + size])
            except (ValueError, RecursionError):
                fields = None
            if not isinstance(fields, dict) or size > length - 4:
                self.cut = len(head) + len(body) + len(self._file.read())
                return
            offset, self.position = self.position, self.position + RECORD.size + length
            yield Item(fields, body[4 + size :], offset)


def read_capture(path: str) -> tuple[CaptureReader, list[Item]]:
    """Return reader and all records of a file. Errors: ConfigError, WireError."""
    try:
        with open(path, "rb") as file:
            reader = CaptureReader(file, path)
            return reader, list(reader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None


def read_bytes(data: bytes, name: str = "the file") -> tuple[CaptureReader, list[Item]]:
    """Return reader and all records of a file's bytes. Errors: WireError."""
    reader = CaptureReader(io.BytesIO(data), name)
    return reader, list(reader)


def write_items(items: list[Item], *, redacted: bool) -> bytes:
    """Return the bytes of a file with these records."""
    out = bytearray(HEADER.pack(MAGIC, VERSION, FLAG_REDACTED if redacted else 0, 0))
    for item in items:
        text = json.dumps(item.fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        body = JSON_LENGTH.pack(len(text)) + text + item.payload
        out += RECORD.pack(len(body), zlib.crc32(body)) + body
    return bytes(out)


class CapturedStream:
    """One stream out of a file, put together again."""

    def __init__(self, fields: dict[str, Any], session: int) -> None:
        self.open = fields
        self.session = session
        self.key = (session, fields.get("id"))
        self.head: dict[str, Any] = {}
        self.end: dict[str, Any] = {}
        self.frames: list[Item] = []
        self.bodies: list[bytes] = [b"", b""]
        self.body_fields: list[dict[str, Any]] = [{}, {}]

    @property
    def url(self) -> str:
        """The request's URL."""
        scheme = self.open.get("scheme") or "https"
        return f"{scheme}://{self.open.get('host', '')}{self.open.get('target', '')}"


class CaptureModel:
    """A whole file as streams, links and control messages; records may come from several runs."""

    def __init__(self, items: list[Item]) -> None:
        self.sessions: list[dict[str, Any]] = []
        self.streams: dict[tuple[int, Any], CapturedStream] = {}
        self.links: dict[tuple[int, Any], dict[str, Any]] = {}
        self.control: list[tuple[int, Item]] = []
        self.events: list[tuple[int, Item]] = []
        self.configurations: list[tuple[int, Item]] = []
        for item in items:
            self._take(item)

    def _take(self, item: Item) -> None:
        fields = item.fields
        kind = fields.get("t")
        if kind == "session":
            self.sessions.append(fields)
            return
        session = len(self.sessions)
        if kind == "open":
            self.streams[session, fields.get("id")] = CapturedStream(fields, session)
        elif kind == "link":
            self.links.setdefault((session, fields.get("id")), fields)
        elif kind == "control":
            self.control.append((session, item))
        elif kind == "event":
            self.events.append((session, item))
        elif kind == "configuration":
            self.configurations.append((session, item))
        else:
            stream = self.streams.get((session, fields.get("id")))
            if stream is None:
                return
            if kind == "head":
                stream.head = fields
            elif kind == "frame":
                stream.frames.append(item)
            elif kind == "end":
                stream.end = fields
            elif kind == "body" and fields.get("way") in {0, 1}:
                stream.bodies[fields["way"]] = item.payload
                stream.body_fields[fields["way"]] = fields

    def wall(self, session: int, at: float) -> float:
        """Return the wall clock time of `at` seconds into a session."""
        start = self.sessions[session - 1].get("wall", 0.0) if 0 < session <= len(self.sessions) else 0.0
        return float(start) + float(at)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _headers(headers: list[tuple[bytes, bytes]], no_redact: bool) -> list[list[str]]:
    return [[_text(name), _text(value)] for name, value in (headers if no_redact else redact_headers(headers))]
