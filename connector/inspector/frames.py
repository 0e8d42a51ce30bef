"""The inside of a WebSocket (or of a bare TCP stream that speaks MQTT): frames, messages, MQTT packets.

Owns: FrameLog: both directions' splitters, inflating, the ring of the last frames, masking of secrets before anything
is kept. In: payload of both directions. Out: Entry values. Never: keeps more than its ring; raises.

*Strategy*: a frame is kept as soon as it cannot hold an unknown part of a secret any more. That is at once, except
within a message in fragments and within an MQTT CONNECT or AUTH packet that is not whole: those wait, for some KiB.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from typing import Any

from connector.errors import WireError
from connector.inspector.mqtt_session import MqttSession, Summary
from connector.inspector.redact import mask_spans, redact_bytes, redact_text
from connector.inspector.topics import TopicTree
from connector.inspector.values import bytes_to_json
from connector.wire import mqtt, websocket

RING = 1_000
"""Frames remembered per stream."""

KEPT_PAYLOAD = 1_024
"""Bytes of a frame's payload in the ring; the capture gets all that the splitter keeps."""

ENTRY_COST = 400
"""Bytes of memory that an entry counts as, beside its payload."""

HELD_LIMIT = 65_536
"""Bytes that wait for the end of a secret; beyond it they are masked whole."""

INFLATE_LIMIT = 65_536
"""Bytes that one compressed message is unpacked to."""


class Entry:
    """One frame as kept: time, way (0 from the visitor, 1 from the origin), payload without secrets."""

    __slots__ = ("fin", "length", "now", "opcode", "packets", "payload", "seq", "way")

    def __init__(self, seq: int, now: float, way: int, opcode: int, fin: bool, length: int, payload: bytes) -> None:
        self.seq = seq
        self.now = now
        self.way = way
        self.opcode = opcode
        self.fin = fin
        self.length = length
        self.payload = payload
        self.packets: list[Summary] = []


class _Way:
    """What is remembered of one direction."""

    __slots__ = ("compressed", "fed", "held", "held_bytes", "inflate", "splitter")

    def __init__(self) -> None:
        self.splitter = websocket.FrameSplitter()
        self.inflate: Any = None  # a zlib object once a compressed message was seen
        self.compressed = False  # whether the message at hand is
        self.fed = 0  # payload bytes given to the MQTT session
        self.held: list[tuple[Entry, int]] = []  # entries that wait, each with where its payload begins
        self.held_bytes = 0


class FrameLog:
    """All frames of one stream. `on_entry` gets each when it is ready. `raw`: no WebSocket around the MQTT."""

    def __init__(
        self,
        on_entry: Callable[[Entry], None],
        topics: TopicTree | None,
        *,
        raw: bool = False,
        keep_secrets: bool = False,
        context_takeover: bool = True,
    ) -> None:
        self._on_entry = on_entry
        self._topics = topics
        self._raw = raw
        self._keep_secrets = keep_secrets
        self._takeover = context_takeover
        self._ways = (_Way(), _Way())
        self._seq = 0
        self.ring: deque[Entry] = deque()
        self.kept = 0
        """Bytes that the ring counts as."""
        self.dropped = 0
        """Frames that the ring has forgotten."""
        self.counts = [0, 0]
        self.mqtt: MqttSession | None = None
        self._may_be_mqtt = True
        self.broken = ""
        """Why the stream is not understood any more; empty while it is."""
        self.closed: list[str] = ["", ""]
        """Close frame of each direction, as text."""

    def feed(self, way: int, data: Any, now: float) -> None:
        """Take payload of one direction."""
        if self.broken:
            return
        if self._raw:
            self._frame(way, websocket.Frame(websocket.BINARY, bytes(data)), now)
            return
        try:
            frames = self._ways[way].splitter.feed(data)
        except WireError as error:
            self.broken = str(error)
            return
        for frame in frames:
            self._frame(way, frame, now)

    def load(self, entry: Entry, missing: int) -> None:
        """Take a frame out of a capture: its secrets are masked already."""
        self._seq += 1
        entry.seq = self._seq
        self.counts[entry.way] += 1
        if entry.opcode < 8 and self._may_be_mqtt:
            session = self.mqtt or self._maybe_mqtt(entry.way, entry.payload)
            if session is not None:
                entry.packets = session.feed(entry.way, entry.payload, missing, entry.now)
        self._keep(entry)

    def flush(self) -> None:
        """The stream is over: what waits comes out, masked where it could hold a part of a secret."""
        for way in self._ways:
            if way.held:
                self._release(way, [(0, way.held_bytes)] if self.mqtt is not None else [])

    # -- inside

    def _frame(self, way: int, frame: websocket.Frame, now: float) -> None:
        self._seq += 1
        self.counts[way] += 1
        payload = frame.payload
        opcode = frame.opcode
        side = self._ways[way]
        if opcode == websocket.CLOSE:
            try:
                code, reason = websocket.decode_close(payload)
                words = reason if self._keep_secrets else redact_text(reason)
                self.closed[way] = f"{code} {words}".strip()
            except WireError:
                self.closed[way] = "malformed"
        data = opcode < 8
        missing = frame.length - len(payload)
        if data:
            if opcode:
                side.compressed = bool(frame.rsv & 4)
            if side.compressed:
                payload, missing = self._inflate(side, frame), 0
        entry = Entry(self._seq, now, way, opcode, frame.fin, frame.length, payload)
        secrets: list[tuple[int, int]] = []
        start = side.fed
        if data and self._may_be_mqtt:
            session = self.mqtt
            if session is None:
                session = self._maybe_mqtt(way, payload)
            if session is not None:
                entry.packets = session.feed(way, payload, missing, now)
                side.fed += len(payload) + missing
                for packet in entry.packets:
                    secrets += [(packet.offset + at, size) for at, size in packet.secrets]
                if session.opening(way) or side.held or secrets:
                    self._hold(side, entry, start, secrets, whole=not session.opening(way))
                    return
        if data and (not frame.fin or side.held):
            self._hold(side, entry, start, secrets, whole=frame.fin)
            return
        self._keep(entry)

    def _maybe_mqtt(self, way: int, payload: bytes) -> MqttSession | None:
        """The first data of the visitor tells: a CONNECT, or no MQTT."""
        if way:
            return None
        if payload[:1] == b"\x10" or not payload:
            head = payload[2:14] if len(payload) > 2 else b""
            if not payload or b"MQ" in head or len(payload) < 8:
                self.mqtt = MqttSession(self._topics)
                return self.mqtt
        self._may_be_mqtt = False
        return None

    def _hold(self, side: _Way, entry: Entry, start: int, secrets: list[tuple[int, int]], *, whole: bool) -> None:
        side.held.append((entry, start))
        side.held_bytes += len(entry.payload)
        if whole:
            begin = side.held[0][1]
            self._release(side, [(at - begin, size) for at, size in secrets])
        elif side.held_bytes > HELD_LIMIT or len(side.held) > RING:
            self._release(side, [(0, side.held_bytes)])

    def _release(self, side: _Way, spans: list[tuple[int, int]]) -> None:
        held, side.held, side.held_bytes = side.held, [], 0
        joined = b"".join(entry.payload for entry, _ in held)
        if not self._keep_secrets:
            if spans:
                joined = mask_spans(joined, spans)
            if len(held) > 1:
                joined = redact_bytes(joined)
        at = 0
        for entry, _ in held:
            size = len(entry.payload)
            entry.payload = joined[at : at + size]
            at += size
            self._keep(entry)

    def _keep(self, entry: Entry) -> None:
        self._on_entry(entry)
        if len(entry.payload) > KEPT_PAYLOAD:  # masked before it is cut: half a secret does not look like one
            payload = entry.payload if self._keep_secrets else redact_bytes(entry.payload)
            entry.payload = payload[:KEPT_PAYLOAD]
        ring = self.ring
        ring.append(entry)
        self.kept += ENTRY_COST + len(entry.payload)
        if len(ring) > RING:
            self.forget(1)

    def forget(self, count: int) -> None:
        """Drop the oldest entries."""
        ring = self.ring
        for _ in range(min(count, len(ring))):
            self.kept -= ENTRY_COST + len(ring.popleft().payload)
            self.dropped += 1

    def _inflate(self, side: _Way, frame: websocket.Frame) -> bytes:
        if side.inflate is None:
            side.inflate = zlib.decompressobj(-15)
        data = frame.payload + (b"\0\0\xff\xff" if frame.fin else b"")
        try:
            out: bytes = side.inflate.decompress(data, INFLATE_LIMIT)
        except zlib.error as error:
            self.broken = f"a compressed message that cannot be unpacked: {error}"
            return b""
        if side.inflate.unconsumed_tail or len(frame.payload) < frame.length:
            self.broken = f"a compressed message of more than {INFLATE_LIMIT} bytes"
        if frame.fin and not self._takeover:
            side.inflate = None
        return out

    def rows(self, after: int, limit: int, start: float, no_redact: bool) -> list[dict[str, Any]]:
        """Return the entries with a sequence number above `after`, the newest `limit`, for the page."""
        found: list[dict[str, Any]] = []
        for entry in reversed(self.ring):
            if entry.seq <= after or len(found) >= limit:
                break
            found.append(describe_entry(entry, start, no_redact))
        found.reverse()
        return found


def describe_entry(entry: Entry, start: float, no_redact: bool) -> dict[str, Any]:
    """Return an entry as JSON: seconds from `start`, way, opcode, text or hex."""
    cut = entry.length > len(entry.payload)
    payload = entry.payload if no_redact else redact_bytes(entry.payload, cut=cut)
    return {
        "seq": entry.seq, "at": round(entry.now - start, 4), "way": entry.way, "fin": entry.fin,
        "opcode": websocket.opcode_name(entry.opcode), "length": entry.length, "payload": bytes_to_json(payload),
        "truncated": entry.length > len(entry.payload),
        "packets": [
            {"type": mqtt.NAMES[item.kind], "text": item.shown(no_redact), "size": item.size} for item in entry.packets
        ],
    }  # fmt: skip
