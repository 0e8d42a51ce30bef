"""One stream as the inspector remembers it, and the doubles that sit between the link and the proxy to watch it.

Owns: StreamRecord, Body, and the watching sink and port. In: calls of StreamSink and StreamPort. Out: the same calls,
passed on; records. Never: holds a call back, keeps a borrowed buffer, or raises into traffic (the record keeps it).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from time import monotonic, time
from typing import TYPE_CHECKING, Any

from connector.errors import EdgeLostError
from connector.inspector.frames import Entry, FrameLog
from connector.inspector.redact import redact_bytes, redact_headers, redact_target, redact_text
from connector.inspector.values import bytes_to_json
from connector.inspector.verdict import Verdict, judge, label
from connector.protocol.ports import (
    Buffer,
    Headers,
    Request,
    RequestKind,
    ResetCode,
    ResponseSource,
    StreamPort,
    StreamSink,
)

if TYPE_CHECKING:
    from connector.inspector.hub import Inspector

BODY_KEPT = 65_536
"""Bytes kept of each direction of a body; beyond it only the count goes on. A page's HTML and an API's answers fit."""

INFLATE_LIMIT = 1_048_576
"""Bytes that a compressed body is unpacked to for display."""

STREAM_COST = 4_096
"""Bytes of memory that a stream counts as, beside its payload."""

UP, DOWN = 0, 1
"""Directions of payload: from the visitor to the origin, and back."""


class Body:
    """One direction's payload: its start, and how much there was."""

    __slots__ = ("kept", "size")

    def __init__(self) -> None:
        self.kept = bytearray()
        self.size = 0

    @property
    def truncated(self) -> bool:
        """Whether not all of it was kept."""
        return self.size > len(self.kept)


class StreamRecord:
    """One stream from its opening on. Fields may be read at any time; the hub is told through `touch`."""

    __slots__ = (
        "advice", "bodies", "bytes", "client", "conn_index", "dirty", "ended", "error", "frames", "headers", "host",
        "how", "hub", "identity", "kind", "link", "marks", "method", "port", "ray", "replay", "response_headers",
        "role", "rule", "scheme", "service", "source", "started", "status", "stream_id", "target", "trailers",
        "transport", "wall",
    )  # fmt: skip

    def __init__(
        self, hub: Inspector, identity: int, request: Request, transport: str, link: int, conn_index: int
    ) -> None:
        self.hub = hub
        self.role = hub.role  # whose view it is: what the edge knows of a cut, the connector can only infer
        self.identity = identity
        self.transport = transport
        self.link = link
        self.conn_index = conn_index
        self.stream_id: int | None = None
        self.kind = request.kind
        self.method = request.method
        self.scheme = request.scheme
        self.host = request.host
        self.target = request.target
        self.headers: list[tuple[bytes, bytes]] = list(request.headers)
        self.wall = time()
        self.started = monotonic()
        self.marks: dict[str, float] = {}
        self.status = 0
        self.response_headers: list[tuple[bytes, bytes]] = []
        self.trailers: list[tuple[bytes, bytes]] = []
        self.source = ""
        self.rule: int | None = None
        self.service = ""
        self.bytes = [0, 0]
        self.bodies = (Body(), Body())
        self.frames: FrameLog | None = None
        self.ended: float | None = None
        self.how = ""
        self.error = ""
        self.advice = ""
        self.replay = 0
        self.port: StreamPort | None = None
        self.dirty = True
        self.client = _first(self.headers, b"cf-connecting-ip") or _first(self.headers, b"x-forwarded-for")
        self.ray = _first(self.headers, b"cf-ray")

    # -- what happens, told by the watching doubles

    def mark(self, name: str) -> None:
        """Remember when something happened for the first time, in seconds from the start."""
        if name not in self.marks:
            self.marks[name] = monotonic() - self.started
            self._touch()

    def on_head(self, status: int, headers: Headers, source: str) -> None:
        """The response head went out."""
        self.status = status
        self.source = source
        self.response_headers = list(headers)
        self.mark("head")
        if self.kind is RequestKind.WEBSOCKET and status in {101, 200}:
            self._watch_frames()
        self.hub.on_head(self)

    def on_payload(self, way: int, data: Buffer) -> None:
        """Payload passed, `way` UP or DOWN."""
        size = len(data)
        if not self.bytes[way]:
            self.mark("first byte up" if way == UP else "first byte down")
        self.bytes[way] += size
        self.dirty = True
        frames = self.frames
        if frames is not None and not frames.broken:
            before = frames.kept
            frames.feed(way, data, monotonic())
            self.hub.kept += frames.kept - before
            return
        if self.kind is RequestKind.WEBSOCKET and not self.status:
            self._watch_frames()  # the visitor may send before the answer is there
            self.on_payload_again(way, data)
            return
        body = self.bodies[way]
        if self.kind is RequestKind.TCP and way == UP and not body.size and bytes(data[:1]) == b"\x10":
            self._watch_frames(raw=True)
            self.on_payload_again(way, data)
            return
        body.size += size
        room = BODY_KEPT - len(body.kept)
        if room > 0 and self.hub.has_room(min(size, room)):
            body.kept += data[:room]
            self.hub.kept += min(size, room)

    def on_payload_again(self, way: int, data: Buffer) -> None:
        """Give payload that was counted already to the frames."""
        assert self.frames is not None
        before = self.frames.kept
        self.frames.feed(way, data, monotonic())
        self.hub.kept += self.frames.kept - before

    def on_eof(self, way: int, trailers: Headers = ()) -> None:
        """One direction ended in order."""
        self.mark("end up" if way == UP else "end down")
        if trailers:
            self.trailers = list(trailers)
        if way == DOWN:
            if self.kind is RequestKind.WEBSOCKET and not self.how:
                self.how = "origin" if "end up" not in self.marks else "visitor"
            if self.kind is not RequestKind.WEBSOCKET or "end up" in self.marks or self.status not in {101, 200}:
                self.end(self.how or "complete")
        elif "end down" in self.marks:
            self.end(self.how or "complete")
        elif self.kind is RequestKind.WEBSOCKET and not self.how:
            self.how = "visitor"

    def end(self, how: str, error: str = "") -> None:
        """The stream is over; once."""
        if self.ended is not None:
            return
        self.ended = monotonic() - self.started
        self.how = how
        self.error = error
        self.port = None
        if self.frames is not None:
            self.frames.flush()
        self._touch()
        self.hub.on_ended(self)

    def failed(self, error: Exception) -> None:
        """The inspector itself has a bug here: the traffic goes on, the record says so."""
        text = f"the inspector failed on this stream, please report it: {type(error).__name__}: {error}"
        self.error = self.error or text
        if self.frames is not None:
            self.frames.broken = text
        self.dirty = True

    def _watch_frames(self, *, raw: bool = False) -> None:
        if self.frames is None:
            extensions = _first(self.response_headers, b"sec-websocket-extensions")
            takeover = b"no_context_takeover" not in extensions
            self.frames = FrameLog(
                self._on_entry, self.hub.topics, raw=raw, keep_secrets=self.hub.no_redact, context_takeover=takeover
            )

    def _on_entry(self, entry: Entry) -> None:
        self.hub.on_entry(self, entry)

    def _touch(self) -> None:
        self.dirty = True

    @property
    def memory(self) -> int:
        """Bytes that this record counts as."""
        frames = self.frames.kept if self.frames is not None else 0
        return STREAM_COST + frames + len(self.bodies[0].kept) + len(self.bodies[1].kept)

    # -- for the page, the terminal and captures

    def row(self, no_redact: bool = False) -> dict[str, Any]:
        """Return the table's row."""
        session = self.frames.mqtt if self.frames is not None else None
        target = self.target if no_redact else redact_target(self.target)
        return {
            "id": self.identity, "time": round(self.wall, 3), "transport": self.transport, "conn": self.conn_index,
            "link": self.link, "stream": self.stream_id, "kind": self.kind.name.lower(), "method": _text(self.method),
            "host": _text(self.host), "target": _text(target), "url": f"{_text(self.scheme)}://{_text(self.host)}{_text(target)}",
            "rule": self.rule, "service": self.service, "status": self.status or None, "source": self.source,
            "up": self.bytes[0], "down": self.bytes[1], "client": _text(self.client), "ray": _text(self.ray),
            "ms": None if self.ended is None else round(self.ended * 1000, 1), "how": self.how,
            "error": self.error if no_redact else redact_text(self.error),
            "mqtt": session.client_id or "?" if session is not None else None, "replay": self.replay or None,
            "frames": sum(self.frames.counts) if self.frames is not None else None, "why": label(self),
        }  # fmt: skip

    def detail(self, no_redact: bool = False) -> dict[str, Any]:
        """Return everything but the frames, for the stream's page."""
        frames = self.frames
        now = monotonic()
        found = self.row(no_redact)
        found["request"] = {"headers": _headers(self.headers, no_redact), "body": self.body(UP, no_redact)}
        found["response"] = {
            "headers": _headers(self.response_headers, no_redact), "trailers": _headers(self.trailers, no_redact),
            "body": self.body(DOWN, no_redact),
        }  # fmt: skip
        found["marks"] = {name: round(at * 1000, 3) for name, at in self.marks.items()}
        found["age"] = round((now - self.started) * 1000, 1)
        found["verdict"] = self.verdict().as_json()
        if frames is not None:
            found["frame_log"] = {
                "counts": frames.counts, "dropped": frames.dropped, "broken": frames.broken, "closed": frames.closed,
            }  # fmt: skip
            if frames.mqtt is not None:
                end = now if self.ended is None else self.started + self.ended
                found["session"] = frames.mqtt.snapshot(end, ended=self.ended is not None, no_redact=no_redact)
        return found

    def body(self, way: int, no_redact: bool = False) -> dict[str, Any]:
        """Return a body: unpacked where it is compressed, as text or hex, with what was left out."""
        body = self.bodies[way]
        data, encoding = self.plain_body(way)
        return {
            "size": body.size, "kept": len(body.kept), "truncated": body.truncated, "encoding": encoding,
            "type": _text(_first(self.headers if way == UP else self.response_headers, b"content-type")),
            "data": bytes_to_json(data if no_redact else redact_bytes(data, cut=body.truncated)),
        }  # fmt: skip

    def plain_body(self, way: int) -> tuple[bytes, str]:
        """Return the kept bytes, unpacked if that is possible, and the encoding that they were in.

        What cannot be unpacked cannot be searched for secrets, so it comes out empty unless secrets are kept.
        """
        data = bytes(self.bodies[way].kept)
        encoding = _text(_first(self.headers if way == UP else self.response_headers, b"content-encoding")).lower()
        if not data or encoding in {"", "identity"}:
            return data, ""
        if encoding in {"gzip", "x-gzip", "deflate"}:
            for bits in (31,) if "gzip" in encoding else (15, -15):
                try:
                    return zlib.decompressobj(bits).decompress(data, INFLATE_LIMIT), encoding
                except zlib.error:
                    continue
        return (data, encoding) if self.hub.no_redact else (b"", f"{encoding}, not shown: cannot be redacted")

    def verdict(self) -> Verdict:
        """Return why the stream ended, or what looks wrong while it runs."""
        return judge(self, monotonic())

    def diagnosis(self) -> list[str]:
        """Return the verdict as sentences, the most telling first."""
        return self.verdict().lines


class WatchedSink:
    """Stands in for the proxy's sink of one stream: tells the record, then passes on."""

    __slots__ = ("_record", "_sink", "pause_writing", "resume_writing")

    def __init__(self, record: StreamRecord, sink: StreamSink) -> None:
        self._record = record
        self._sink = sink
        self.pause_writing: Callable[[], None] = sink.pause_writing
        self.resume_writing: Callable[[], None] = sink.resume_writing

    def on_data(self, data: Buffer) -> None:
        """Take request payload."""
        try:
            self._record.on_payload(UP, data)
        except Exception as error:
            self._record.failed(error)
        self._sink.on_data(data)

    def on_eof(self) -> None:
        """Take its end."""
        try:
            self._record.on_eof(UP)
        except Exception as error:
            self._record.failed(error)
        self._sink.on_eof()

    def on_reset(self, error: BaseException | None) -> None:
        """Take the end of everything."""
        record = self._record
        try:
            if isinstance(error, EdgeLostError) or (error is None and record.transport == "http2"):
                record.end("link lost", str(error) if error is not None else "the connector closed it")
            else:
                record.end("reset by the edge", str(error) if error is not None else "")
        except Exception as failure:
            record.failed(failure)
        self._sink.on_reset(error)


class WatchedPort:
    """Stands in for a stream's port towards the proxy."""

    __slots__ = ("_port", "_record", "consumed", "stop_reading", "traffic")

    def __init__(self, record: StreamRecord, port: StreamPort) -> None:
        self._record = record
        self._port = port
        self.consumed: Callable[[int], None] = port.consumed
        self.stop_reading: Callable[[], None] = port.stop_reading
        self.traffic: Callable[[], tuple[int, int]] = port.traffic

    @property
    def spans(self) -> bytes:
        """Tracing spans, the port's own."""
        return self._port.spans

    @spans.setter
    def spans(self, value: bytes) -> None:
        self._port.spans = value

    @property
    def record(self) -> StreamRecord:
        """The record of this stream."""
        return self._record

    def respond(
        self, status: int, headers: Headers, source: ResponseSource = ResponseSource.ORIGIN, reason: bytes = b""
    ) -> None:
        """Send the head."""
        if status >= 200 or status == 101:
            try:
                self._record.on_head(status, headers, source.name.lower())
            except Exception as error:
                self._record.failed(error)
        self._port.respond(status, headers, source, reason)

    def write(self, data: Buffer) -> None:
        """Send payload."""
        try:
            self._record.on_payload(DOWN, data)
        except Exception as error:
            self._record.failed(error)
        self._port.write(data)

    def write_eof(self, trailers: Headers = ()) -> None:
        """End the response."""
        try:
            self._record.on_eof(DOWN, trailers)
        except Exception as error:
            self._record.failed(error)
        self._port.write_eof(trailers)

    def reset(self, code: ResetCode) -> None:
        """Give the stream up."""
        try:
            self._record.end("reset by the connector", code.name.lower())
        except Exception as error:
            self._record.failed(error)
        self._port.reset(code)


def _first(headers: Headers, name: bytes) -> bytes:
    for key, value in headers:
        if len(key) == len(name) and key.lower() == name:
            return value
    return b""


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _headers(headers: list[tuple[bytes, bytes]], no_redact: bool) -> list[list[str]]:
    return [[_text(name), _text(value)] for name, value in (headers if no_redact else redact_headers(headers))]


_TOKEN = re.compile(r"[^A-Za-z0-9_]+")


def identifier(text: str) -> str:
    """Return `text` as a name in Python."""
    return _TOKEN.sub("_", text).strip("_").lower() or "request"
