"""One link as the inspector sees it: RPC messages, HTTP/2 frames, QUIC streams and datagrams.

Owns: LinkRecord (a LinkTap): the rings of frames and of control-plane messages. In: calls of a link, decrypted bytes.
Out: rows for the page. Never: keeps payload of proxied streams (their records do); raises.

*Strategy*: of a DATA frame only the header is kept: its payload belongs to a stream, whose page shows it with secrets
masked. Header blocks are decoded in order with a table of their own, and shown re-encoded without secrets.
"""

from __future__ import annotations

from collections import deque
from time import monotonic, time
from typing import TYPE_CHECKING, Any

from connector.errors import WireError
from connector.inspector.capnp_values import Reader
from connector.inspector.decode import (
    DATA_PREAMBLE,
    FRAME_NAMES,
    RPC_PREAMBLE,
    V3_CODES,
    decode_rpc,
    describe_frame,
    flags_text,
)
from connector.inspector.redact import mask_spans, redact_bytes, redact_headers, redact_notes, redact_values
from connector.inspector.render import hex_rows
from connector.inspector.streams import StreamRecord, WatchedPort, WatchedSink
from connector.inspector.values import jsonable
from connector.protocol.ports import Acceptor, Buffer, Request, RequestKind, StreamPort, StreamSink
from connector.wire.capnp import MessageSplitter, message_length
from connector.wire.h2_frames import (
    CONTINUATION,
    DATA,
    FLAG_END_HEADERS,
    FRAME_HEADER,
    FRAME_HEADER_LENGTH,
    GOAWAY,
    HEADERS,
    PREFACE,
    STREAM_ID_MASK,
)
from connector.wire.h2_headers import (
    CONNECTION_UPGRADE,
    RESPONSE_HEADERS,
    UPGRADE_CONFIGURATION,
    UPGRADE_CONTROL,
    decode_serialised_headers,
)
from connector.wire.h2_hpack import HpackDecoder, hpack_literal

if TYPE_CHECKING:
    from connector.inspector.hub import Inspector

RING = 2_000
"""Frames (or QUIC events) remembered per link."""

MAX_RPC_MESSAGE = 256 * 1024
"""Bytes of an RPC message; what the links themselves take at most."""

MAX_BLOCK = 256 * 1024
"""Bytes of a header block that is followed; after a larger one headers of this link are not decoded any more."""

MAX_PUSH = 1_048_576
"""Bytes of a configuration push that are looked at; the proxy takes no larger one."""

MAX_RPC_STREAMS = 64
"""RPC streams followed at a time; what a link serves at most."""

MAX_STREAMS = 10_000
"""QUIC streams whose openings are followed at a time: what a link may have open."""

KEPT_PREAMBLE = 16_384
"""Bytes of a QUIC stream's opening that are waited for."""


class FrameRow:
    """One frame or QUIC event as kept."""

    __slots__ = ("at", "data", "kind", "length", "outgoing", "seq", "stream", "text")

    def __init__(self, seq: int, outgoing: bool, kind: str, stream: int, length: int, text: str, data: bytes) -> None:
        self.seq = seq
        self.at = monotonic()
        self.outgoing = outgoing
        self.kind = kind
        self.stream = stream
        self.length = length
        self.text = text
        self.data = data


class _H2Way:
    """One direction of an HTTP/2 connection: finds frames in any pieces."""

    __slots__ = ("block", "flags", "head", "hpack", "kept", "kind", "left", "length", "preface", "stream")

    def __init__(self, preface: int) -> None:
        self.preface = preface
        self.head = bytearray()
        self.left = -1  # payload still to come; -1: within a frame header
        self.kind = self.flags = self.stream = self.length = 0
        self.kept = bytearray()
        self.block = bytearray()
        self.hpack: HpackDecoder | None = HpackDecoder(4_096)


class LinkRecord:
    """A LinkTap. One per link; the hub keeps the last of them."""

    def __init__(
        self, hub: Inspector, identity: int, protocol: str, remote: str, conn_index: int, *, client: bool
    ) -> None:
        self.hub = hub
        self.identity = identity
        self.protocol = protocol
        self.remote = remote
        self.conn_index = conn_index
        self.opened = monotonic()
        self.wall = time()
        self.closed: float | None = None
        self.error = ""
        self.note = "without a word"
        """What came before its end: a GOAWAY, a message that nobody understands."""
        self.broken = ""
        """Why the link is not followed any more; empty while it is."""
        self.frames: deque[FrameRow] = deque(maxlen=RING)
        self.counts: dict[str, int] = {}
        self.datagrams = [0, 0]
        self._seq = 0
        # Who sends the preface: the edge is the HTTP/2 client.
        self._ways = (_H2Way(0 if client else len(PREFACE)), _H2Way(len(PREFACE) if client else 0))
        self._rpc: dict[tuple[str, bool], MessageSplitter] = {}
        self._questions: dict[tuple[str, bool], dict[int, str]] = {}
        self._control = -1  # the HTTP/2 stream that carries the control stream
        self._push = -1  # the one that carries a configuration now
        self._pushed = bytearray()
        self._rpc_streams: dict[int, str] = {0: "control"} if protocol == "quic" else {}
        self._openings: dict[tuple[int, bool], bytearray | None] = {}

    # -- LinkTap

    def acceptor(self, accept: Acceptor) -> Acceptor:
        """Return an Acceptor that watches every stream."""

        def watch(request: Request, port: StreamPort) -> StreamSink:
            if request.kind in {RequestKind.CONTROL, RequestKind.CONFIGURATION}:
                if request.kind is RequestKind.CONFIGURATION:
                    return self.hub.watch_configuration(self, request, port, accept)
                return accept(request, port)
            number = getattr(port, "stream_id", None)
            try:
                record = self.hub.open_stream(request, self.protocol, self.identity, self.conn_index, stream_id=number)
            except Exception as error:
                self._failed(error)
                return accept(request, port)
            watched = WatchedPort(record, port)
            sink = accept(request, watched)
            return WatchedSink(record, sink)

        return watch

    def on_bytes(self, outgoing: bool, data: Buffer) -> None:
        """Find the frames of an HTTP/2 connection."""
        if not self.broken:
            try:
                self._find_frames(outgoing, data)
            except Exception as error:
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        """The inspector itself has a bug here: the link goes on unwatched."""
        self.broken = f"the inspector failed on this link, please report it: {type(error).__name__}: {error}"

    def _find_frames(self, outgoing: bool, data: Buffer) -> None:
        way = self._ways[outgoing]
        pos, end = 0, len(data)
        if way.preface:
            step = min(way.preface, end)
            way.preface -= step
            pos = step
            if not way.preface:
                self._row(outgoing, "PREFACE", 0, len(PREFACE), "the client's opening", PREFACE)
        while pos < end:
            if way.left < 0:
                if not way.head and end - pos >= FRAME_HEADER_LENGTH:
                    word, flags, stream = FRAME_HEADER.unpack_from(data, pos)
                    pos += FRAME_HEADER_LENGTH
                else:
                    step = min(FRAME_HEADER_LENGTH - len(way.head), end - pos)
                    way.head += data[pos : pos + step]
                    pos += step
                    if len(way.head) < FRAME_HEADER_LENGTH:
                        return
                    word, flags, stream = FRAME_HEADER.unpack_from(way.head)
                    way.head.clear()
                way.length = way.left = word >> 8
                way.kind, way.flags, way.stream = word & 0xFF, flags, stream & STREAM_ID_MASK
                way.kept.clear()
            step = min(way.left, end - pos)
            if way.kind == DATA:
                if way.stream == self._control and step:
                    self.on_rpc(outgoing, bytes(data[pos : pos + step]), "control")
                elif way.stream == self._push and outgoing and len(self._pushed) < MAX_PUSH:
                    self._pushed += data[pos : pos + step]
            elif way.kind != DATA and len(way.kept) < MAX_BLOCK:
                way.kept += data[pos : pos + step]
            pos += step
            way.left -= step
            if not way.left:
                way.left = -1
                self._frame(outgoing, way)

    def on_stream_bytes(self, stream_id: int, outgoing: bool, data: Buffer, fin: bool) -> None:
        """Note a piece of a QUIC stream, and decode what it opens with."""
        if not self.broken:
            try:
                self._stream_bytes(stream_id, outgoing, data, fin)
            except Exception as error:
                self._failed(error)

    def _stream_bytes(self, stream_id: int, outgoing: bool, data: Buffer, fin: bool) -> None:
        text = ""
        shown = b""
        key = (stream_id, outgoing)
        if key not in self._openings:
            if len(self._openings) >= MAX_STREAMS:
                del self._openings[next(iter(self._openings))]
            # The control stream, and the far side of RPC streams, have no opening of their own.
            self._openings[key] = bytearray() if stream_id else None
        opening = self._openings[key]
        if opening is not None:
            opening += data
            found = self._opening(opening)
            if found is not None:
                text, shown = found
                self._openings[key] = None
                if shown == RPC_PREAMBLE:
                    if len(self._rpc_streams) > MAX_RPC_STREAMS:
                        del self._rpc_streams[list(self._rpc_streams)[1]]
                    self._rpc_streams[stream_id] = f"rpc {stream_id}"
                    data = bytes(opening[len(RPC_PREAMBLE) :])
        where = self._rpc_streams.get(stream_id)
        if where is not None and data:
            self.on_rpc(outgoing, bytes(data), where)
        self._row(outgoing, "STREAM FIN" if fin else "STREAM", stream_id, len(data), text, shown)

    def on_stream_ended(self, stream_id: int, outgoing: bool, what: str) -> None:
        """Note that a QUIC stream was given up."""
        self._row(outgoing, what, stream_id, 0, "", b"")

    def on_datagram(self, outgoing: bool, data: Buffer) -> None:
        """Note a datagram; its payload is somebody's private traffic and is not kept."""
        self.datagrams[outgoing] += 1
        raw = bytes(data)
        self._row(outgoing, "DATAGRAM", 0, len(raw), _datagram_text(raw), b"")

    def on_rpc(self, outgoing: bool, data: Buffer, where: str) -> None:
        """Find whole messages and decode them by schema."""
        key = (where, outgoing)
        splitter = self._rpc.get(key)
        if splitter is None:
            if len(self._rpc) > 64:  # RPC streams are short; the control stream's entry is the first
                for old in list(self._rpc)[2:34]:
                    del self._rpc[old]
            splitter = self._rpc[key] = MessageSplitter(MAX_RPC_MESSAGE)
        try:
            messages = splitter.feed(data)
        except WireError as error:
            self.note = f"after a malformed message of {'this side' if outgoing else 'the peer'}: {error}"
            self.hub.on_control(self, outgoing, where, "malformed", str(error), None, b"", [])
            del self._rpc[key]
            return
        for message in messages:
            self._message(outgoing, where, bytes(message))

    def on_closed(self, error: BaseException | None) -> None:
        """The link is over."""
        if self.closed is None:
            self.closed = monotonic()
            self.error = str(error) if error is not None else self.note
            self.hub.on_link_closed(self)

    # -- inside

    def _message(self, outgoing: bool, where: str, message: bytes) -> None:
        # A return answers a call of the other side.
        asked = self._questions.setdefault((where, outgoing), {})
        answered = self._questions.setdefault((where, not outgoing), {})
        questions = dict(answered)
        try:
            value, notes, secrets = decode_rpc(message, questions)
            call = value.get("call")
            if call and len(asked) < 1_000:
                asked[call.get("questionId", -1)] = call.get("method", "")
        except WireError as error:
            self.hub.on_control(self, outgoing, where, "malformed", str(error), None, b"", [])
            return
        name = next(iter(value), "?")
        if self.conn_index < 0 and call and call.get("method") == "registerConnection":  # the edge learns it from this
            self.conn_index = int(((call.get("params") or {}).get("content") or {}).get("connIndex") or 0)
        if call and call.get("method"):
            name = call["method"]
        elif name == "return" and (method := answered.get(value["return"].get("answerId", -1))):
            name = f"{method} answered"
        shown = message if self.hub.no_redact else redact_bytes(mask_spans(message, secrets))
        plain: dict[str, Any] = value if self.hub.no_redact else redact_values(value)  # type: ignore[assignment]
        if not self.hub.no_redact:
            notes = redact_notes(notes)
        self.hub.on_control(self, outgoing, where, name, _summary(plain), jsonable(plain), shown, notes)

    def _frame(self, outgoing: bool, way: _H2Way) -> None:
        kind = way.kind
        if kind > CONTINUATION:
            self._row(outgoing, f"0x{kind:x}", way.stream, way.length, "unknown type, ignored", b"")
            return
        name = FRAME_NAMES[kind]
        if kind == DATA:
            text = "END_STREAM" if way.flags & 1 else ""
            self._row(outgoing, name, way.stream, way.length, text, b"")
            if text and outgoing and way.stream == self._push:
                self._push = -1
                self.hub.on_push(self, outgoing, bytes(self._pushed))
            return
        payload = bytes(way.kept)
        text, shown = "", payload
        if kind in {HEADERS, CONTINUATION}:
            text, shown = self._headers(way, payload)
        else:
            try:
                _, text = describe_frame(kind, way.flags, payload, None)
            except WireError as error:
                text = f"malformed: {error}"
        if kind == GOAWAY:
            self.note = f"after a GOAWAY of {'this side' if outgoing else 'the peer'}: {text}"
        flags = flags_text(kind, way.flags)
        text = text if flags == "none" else f"{flags} {text}".strip()
        self._row(outgoing, name, way.stream, way.length, text, shown[:1_024], way.flags)

    def _headers(self, way: _H2Way, payload: bytes) -> tuple[str, bytes]:
        if way.kind == HEADERS:
            way.block.clear()
            if way.flags & 8 and payload:
                payload = payload[1 : len(payload) - payload[0]]
            if way.flags & 0x20:
                payload = payload[5:]
        way.block += payload
        if len(way.block) > MAX_BLOCK:
            way.hpack = None
        if not way.flags & FLAG_END_HEADERS:
            return "more follows", b""
        if way.hpack is None:
            return "header table out of step", b""
        try:
            fields = way.hpack.decode(bytes(way.block))
        except WireError as error:
            way.hpack = None
            return f"malformed: {error}", b""
        if self._control < 0 and (CONNECTION_UPGRADE, UPGRADE_CONTROL) in fields:
            self._control = way.stream
        elif self.hub.role == "edge" and (CONNECTION_UPGRADE, UPGRADE_CONFIGURATION) in fields:
            self._push = way.stream  # a connector's acceptor sees it for itself
            self._pushed.clear()
        shown = fields if self.hub.no_redact else redact_headers(fields)
        text = "; ".join(f"{name.decode('latin-1')}: {_listed(name, value)}" for name, value in shown)
        return text[:2_000], b"".join(hpack_literal(name, value) for name, value in shown)

    def _opening(self, data: bytearray) -> tuple[str, bytes] | None:
        """Return text and bytes of a stream's opening; None while it is not whole."""
        if len(data) < 6:
            return None
        if data.startswith(RPC_PREAMBLE):
            return "RPC stream", bytes(data[:6])
        if not data.startswith(DATA_PREAMBLE):
            return ("", b"")
        try:
            length = message_length(memoryview(data)[8:])
            if length is None or len(data) < 8 + length:
                return ("opening too long to be shown", b"") if len(data) > KEPT_PREAMBLE else None
            message = bytes(data[8 : 8 + length])
            reader = Reader(message)
            for layout in ("ConnectRequest", "ConnectResponse"):
                value = reader.read(layout)
                if (layout == "ConnectRequest") == (reader.root[0] == 1):
                    plain = value if self.hub.no_redact else _redact_metadata(value)
                    return f"{layout} {_connect_text(plain)}"[:2_000], bytes(data[:8])
        except WireError as error:
            return f"malformed opening: {error}", b""
        return ("", b"")

    def _row(
        self, outgoing: bool, kind: str, stream: int, length: int, text: str, data: bytes, flags: int | None = None
    ) -> None:
        self._seq += 1
        counts = self.counts
        counts[kind] = counts.get(kind, 0) + 1
        self.frames.append(FrameRow(self._seq, outgoing, kind, stream, length, text, data))

    # -- for the page

    def summary(self) -> dict[str, Any]:
        """Return the link's row."""
        return {
            "id": self.identity, "protocol": self.protocol, "remote": self.remote, "conn": self.conn_index,
            "time": round(self.wall, 3), "seconds": round((self.closed or monotonic()) - self.opened, 1),
            "open": self.closed is None,
            "error": self.broken or self.error, "frames": self.counts, "datagrams": self.datagrams,
        }  # fmt: skip

    def rows(self, after: int, limit: int, *, payload: bool = True) -> list[dict[str, Any]]:
        """Return the newest `limit` frames above sequence number `after`; without `payload`, not those that only carry
        some.
        """
        found: list[dict[str, Any]] = []
        for row in reversed(self.frames):
            if row.seq <= after or len(found) >= limit:
                break
            if not payload and not row.text and row.kind in {"DATA", "STREAM"}:
                continue
            found.append(
                {
                    "seq": row.seq,
                    "at": round(row.at - self.opened, 4),
                    "out": row.outgoing,
                    "kind": row.kind,
                    "stream": row.stream,
                    "length": row.length,
                    "text": row.text,
                    "hex": [list(part) for part in hex_rows(row.data, 0, len(row.data))],
                }
            )
        found.reverse()
        return found


def _listed(name: bytes, value: bytes) -> str:
    if name != RESPONSE_HEADERS:
        return value.decode("latin-1")
    try:
        fields = decode_serialised_headers(value)
    except WireError:
        return value.decode("latin-1")
    return "{" + ", ".join(f"{key.decode('latin-1')}: {text.decode('latin-1')}" for key, text in fields) + "}"


def _summary(value: dict[str, Any]) -> str:
    """One line of an RPC message, without secrets."""
    call = value.get("call")
    if call:
        content = (call.get("params") or {}).get("content")
        if call.get("method") == "registerConnection" and isinstance(content, dict):
            options = content.get("options") or {}
            client = options.get("client") or {}
            tunnel = bytes(content.get("tunnelId") or b"").hex()
            return (
                f"tunnel {tunnel} connection {content.get('connIndex')} version {client.get('version')} "
                f"attempt {options.get('numPreviousAttempts')} features {', '.join(client.get('features') or [])}"
            )
        if call.get("method") == "updateConfiguration" and isinstance(content, dict):
            return f"version {content.get('version')}"
        return f"question {call.get('questionId')}"
    answer = value.get("return")
    if answer:
        if answer.get("exception"):
            return f"exception: {redact_bytes(str(answer['exception'].get('reason')).encode()).decode()}"
        result = ((answer.get("results") or {}).get("content") or {}).get("result") or {}
        if details := result.get("connectionDetails"):
            return f"accepted at {details.get('locationName')}"
        if error := result.get("error"):
            return f"refused: {error.get('cause')}, retry after {(error.get('retryAfter') or 0) / 1e9:g} s"
        if "latestAppliedVersion" in result:
            error = f", {result['err']}" if result.get("err") else ""
            return f"version {result['latestAppliedVersion']} in force{error}"
        return f"answer {answer.get('answerId')}"
    body = next(iter(value.values()), None) or {}
    return ", ".join(f"{key} {item}" for key, item in body.items() if isinstance(item, int | str | bool))


def _redact_metadata(value: dict[str, Any]) -> dict[str, Any]:
    shown = []
    for item in value.get("metadata") or []:
        key, text = str(item.get("key")), str(item.get("val"))
        name = key.removeprefix("HttpHeader:").encode()
        ((_, masked),) = redact_headers([(name, text.encode())])
        shown.append({"key": key, "val": masked.decode("utf-8", "replace")})
    found = {**value, "metadata": shown}
    if found.get("dest"):
        from connector.inspector.redact import redact_target  # noqa: PLC0415

        found["dest"] = redact_target(str(found["dest"]).encode()).decode("utf-8", "replace")
    return found


def _connect_text(value: dict[str, Any]) -> str:
    fields = "; ".join(f"{item['key']}: {item['val']}" for item in value.get("metadata") or [])
    return f"{value.get('dest') or value.get('error') or ''} {fields}".strip()


def _datagram_text(data: bytes) -> str:
    """Both versions in one line; the link does not say which is in use."""
    if not data:
        return "empty"
    if len(data) >= 17 and data[0] == 1:
        return f"v3 payload {data[1:17].hex()}, or v2"
    if len(data) >= 26 and data[0] == 0 and data[1] < 8:
        return f"v3 registration {data[6:22].hex()} port {int.from_bytes(data[2:4], 'big')}, or v2"
    if len(data) >= 20 and data[0] == 3 and data[1] in V3_CODES:
        return f"v3 response {V3_CODES[data[1]]} {data[2:18].hex()}, or v2"
    if len(data) >= 17 and data[-1] == 0:
        return f"v2 UDP session {data[-17:-1].hex()}"
    return {1: "v2 IP packet", 2: "v2 IP packet with trace", 3: "v2 spans"}.get(data[-1], "unknown")


__all__ = ["LinkRecord", "StreamRecord"]
