"""Between memory and captures: what is remembered as records of a file, and a file's records as memory.

Owns: both directions. In: an Inspector; records. Out: records; an Inspector that shows them. Never: touches files.
"""

from __future__ import annotations

from typing import Any

from connector.inspector.capture import CapturedStream, CaptureModel, CaptureWriter, Item, read_bytes
from connector.inspector.frames import Entry, FrameLog
from connector.inspector.hub import ControlRow, Inspector
from connector.inspector.links import LinkRecord
from connector.inspector.streams import StreamRecord
from connector.protocol.ports import Request, RequestKind


class _MemoryWriter(CaptureWriter):
    """A writer whose file is memory."""

    def __init__(self, hub: Inspector) -> None:
        self.out = bytearray()
        streams, hub.streams = hub.streams, {}
        try:
            super().__init__("", hub, lambda seconds, call: None, started=hub.started)
        finally:
            hub.streams = streams

    def open_file(self, path: str, redacted: bool) -> int:
        """Write the header to memory."""
        self.out += self.header(redacted)
        return -1

    def write(self, data: bytearray) -> None:
        """Write to memory."""
        self.out += data

    def close(self) -> None:
        """Write the rest."""
        self.flush()


def snapshot_items(hub: Inspector) -> list[Item]:
    """Return everything remembered as the records of one session, secrets masked as in a file."""
    writer = _MemoryWriter(hub)
    for told in (*hub.events, *hub.configurations):
        writer.at = hub.started + told["time"] - writer.wall
        writer.record("event" if "event" in told else "configuration", told, None)
    for link in hub.links.values():
        writer.at = link.opened
        writer.record("link", link, "open")
    for row in hub.control:
        writer.at = row.at
        writer.record("control", row, None)
    for record in list(hub.streams.values()):
        writer.at = record.started
        writer.record("open", record, None)
        if record.status:
            writer.at = record.started + record.marks.get("head", 0.0)
            writer.record("head", record, None)
        if record.frames is not None:
            for entry in record.frames.ring:
                writer.record("frame", record, entry)
        if record.ended is not None:
            writer.at = record.started + record.ended
            writer.record("end", record, None)
    writer.close()
    return read_bytes(bytes(writer.out))[1]


def load_items(hub: Inspector, items: list[Item]) -> None:
    """Fill an inspector of role `capture` with a file's contents."""
    model = CaptureModel(items)
    hub.clear()
    hub.streams.clear()
    hub.links.clear()
    hub.control.clear()
    hub.events.clear()
    hub.configurations.clear()
    hub.kept = 0
    links: dict[tuple[int, Any], LinkRecord] = {}
    for key, fields in model.links.items():
        links[key] = hub.open_link(str(fields.get("protocol")), str(fields.get("remote")), int(fields.get("conn") or 0))
        links[key].wall = model.wall(key[0], fields.get("at", 0.0))
    for number, stream in enumerate(model.streams.values(), 1):
        _load_stream(hub, model, stream, number, links)
    blank = LinkRecord(hub, 0, "", "", -1, client=False)
    for session, item in model.control:
        fields = item.fields
        link = links.get((session, fields.get("link")), blank)
        hub.on_control(
            link, bool(fields.get("out")), str(fields.get("where")), str(fields.get("name")), str(fields.get("text")),
            fields.get("value"), item.payload, [],
        )  # fmt: skip
        row: ControlRow = hub.control[-1]
        row.wall = model.wall(session, fields.get("at", 0.0))
    for session, item in model.events:
        hub.on_event(str(item.fields.get("event")), item.fields.get("fields") or {})
        hub.events[-1]["time"] = model.wall(session, item.fields.get("at", 0.0))
    for session, item in model.configurations:
        hub.on_configuration(item.fields.get("version"), str(item.fields.get("text")))
        if hub.configurations:
            hub.configurations[-1]["time"] = model.wall(session, item.fields.get("at", 0.0))


def _load_stream(
    hub: Inspector, model: CaptureModel, stream: CapturedStream, number: int, links: dict[tuple[int, Any], LinkRecord]
) -> None:
    fields = stream.open
    kinds = {kind.name.lower(): kind for kind in RequestKind}
    request = Request(
        kinds.get(str(fields.get("kind")), RequestKind.HTTP), _raw(fields.get("method")), _raw(fields.get("target")),
        _raw(fields.get("host")), _pairs(fields.get("headers")), scheme=_raw(fields.get("scheme") or "https"),
    )  # fmt: skip
    link = links.get((stream.session, fields.get("link")))
    record = StreamRecord(
        hub, number, request, str(fields.get("transport")), link.identity if link else 0, int(fields.get("conn") or 0)
    )
    role = model.sessions[stream.session - 1].get("role") if 0 < stream.session <= len(model.sessions) else None
    record.role = str(role or hub.role)
    record.wall = float(fields.get("wall") or model.wall(stream.session, fields.get("at", 0.0)))
    record.started = float(fields.get("at", 0.0))
    record.stream_id = fields.get("stream")
    record.rule, record.service = fields.get("rule"), str(fields.get("service") or "")
    record.status = int(stream.head.get("status", 0))
    record.source = str(stream.head.get("source", ""))
    record.response_headers = _pairs(stream.head.get("headers"))
    for way in (0, 1):
        body = record.bodies[way]
        body.kept += stream.bodies[way]
        body.size = int(stream.body_fields[way].get("size", len(stream.bodies[way])))
        if stream.body_fields[way].get("encoding"):  # it is unpacked already
            named = record.headers if way == 0 else record.response_headers
            named[:] = [pair for pair in named if pair[0].lower() != b"content-encoding"]
    record.bytes = [int(stream.end.get("up", 0)), int(stream.end.get("down", 0))]
    record.marks = {str(name): float(at) / 1000 for name, at in (stream.end.get("marks") or {}).items()}
    if stream.frames:
        log = record.frames = FrameLog(lambda entry: None, hub.topics, keep_secrets=True)
        for item in stream.frames:
            _load_frame(log, item, record)
    if stream.end:
        record.ended = float(stream.end.get("ms", 0.0)) / 1000
        record.how, record.error = str(stream.end.get("how", "")), str(stream.end.get("error", ""))
    hub.load(number, record)


def _load_frame(log: FrameLog, item: Item, record: StreamRecord) -> None:
    fields = item.fields
    entry = Entry(
        0, float(fields.get("at", 0.0)), 1 if fields.get("way") else 0, int(fields.get("opcode", 2)),
        bool(fields.get("fin", True)), int(fields.get("length", len(item.payload))), item.payload,
    )  # fmt: skip
    log.load(entry, missing=max(0, entry.length - len(item.payload)))


def _raw(value: Any) -> bytes:
    return str(value or "").encode()


def _pairs(value: Any) -> list[tuple[bytes, bytes]]:
    return [(_raw(pair[0]), _raw(pair[1])) for pair in value or [] if isinstance(pair, list) and len(pair) == 2]
