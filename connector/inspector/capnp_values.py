"""Cap'n Proto messages by schema, without a Cap'n Proto library: values <-> one framed message.

Owns: the layout of RPC messages and of every struct of proto/*.capnp that is sent; a bounded reader and a writer.
In: one framed message (untrusted), or values. Out: values and notes of where they lie; framed bytes; WireError.
Never: speaks RPC. `connector/transport/rpc.py` does, on pycapnp; this module only looks, and nothing crashes it.

*Strategy*: layouts are tables. A reader follows pointers within their segments, at most LARGEST_WALK of them, so that
a message that points at itself ends. Where a call's results are not known to be of one kind (they carry no type), the
caller says which call they answer, or they are taken for a ConnectionResponse.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from connector.errors import WireError
from connector.inspector.values import as_bytes
from connector.wire.capnp import MAX_SEGMENTS, frame_message, table_length

Note = tuple[int, int, str, str]

LARGEST_WALK = 20_000
"""Pointers followed in one message. A registration has about 20, a header list of 16,384 entries 32,769 at worst, which
nobody wants to read in a dump."""

LARGEST_DEPTH = 32
"""Nested structs. The deepest real message (a call with options) has 5."""


class Field(NamedTuple):
    """One field: type, and where it lies. `at` is in units of the type (bits for bool), or a pointer's number."""

    name: str
    kind: str
    at: int
    default: int = 0
    tag: int = -1
    """Discriminant value that makes it the active member of the struct's union; -1: always there."""


class Layout(NamedTuple):
    """One struct: words of data, pointers, fields; where the discriminant (u16) lies, -1 without a union."""

    words: int
    pointers: int
    fields: tuple[Field, ...]
    union_at: int = -1


F = Field
LAYOUTS: dict[str, Layout] = {
    # rpc.capnp of the Cap'n Proto distribution
    "Message": Layout(1, 1, (
        F("unimplemented", "Message", 0, tag=0), F("abort", "Exception", 0, tag=1), F("call", "Call", 0, tag=2),
        F("return", "Return", 0, tag=3), F("finish", "Finish", 0, tag=4), F("resolve", "Unknown", 0, tag=5),
        F("release", "Release", 0, tag=6), F("bootstrap", "Bootstrap", 0, tag=8), F("disembargo", "Unknown", 0, tag=13),
    ), 0),
    "Unknown": Layout(0, 0, ()),
    "Bootstrap": Layout(1, 1, (F("questionId", "u32", 0),)),
    "Call": Layout(3, 3, (
        F("questionId", "u32", 0), F("target", "MessageTarget", 0), F("interfaceId", "u64", 1), F("methodId", "u16", 2),
        F("sendResultsTo", "u16", 3), F("params", "Params", 1),
    )),
    "MessageTarget": Layout(1, 1, (
        F("importedCap", "u32", 0, tag=0), F("promisedAnswer", "PromisedAnswer", 0, tag=1),
    ), 2),
    "PromisedAnswer": Layout(1, 1, (F("questionId", "u32", 0), F("transform", "[Op]", 0))),
    "Op": Layout(1, 0, (F("noop", "void", 0, tag=0), F("getPointerField", "u16", 1, tag=1)), 0),
    "Params": Layout(0, 2, (F("content", "any", 0), F("capTable", "[CapDescriptor]", 1))),
    "CapDescriptor": Layout(1, 1, (
        F("none", "void", 0, tag=0), F("senderHosted", "u32", 1, tag=1), F("senderPromise", "u32", 1, tag=2),
        F("receiverHosted", "u32", 1, tag=3), F("receiverAnswer", "PromisedAnswer", 0, tag=4),
    ), 0),
    "Return": Layout(2, 1, (
        F("answerId", "u32", 0), F("releaseParamCaps", "bool", 32, 1), F("results", "Params", 0, tag=0),
        F("exception", "Exception", 0, tag=1), F("canceled", "void", 0, tag=2),
        F("resultsSentElsewhere", "void", 0, tag=3), F("takeFromOtherQuestion", "u32", 2, tag=4),
    ), 3),
    "Finish": Layout(1, 0, (F("questionId", "u32", 0), F("releaseResultCaps", "bool", 32, 1))),
    "Release": Layout(1, 0, (F("id", "u32", 0), F("referenceCount", "u32", 1))),
    "Exception": Layout(1, 2, (F("reason", "text", 0), F("type", "u16", 2), F("trace", "text", 1))),
    # proto/tunnelrpc.capnp
    "TunnelAuth": Layout(0, 2, (F("accountTag", "text", 0), F("tunnelSecret", "data", 1))),
    "ClientInfo": Layout(0, 4, (
        F("clientId", "data", 0), F("features", "[text]", 1), F("version", "text", 2), F("arch", "text", 3),
    )),
    "ConnectionOptions": Layout(1, 2, (
        F("client", "ClientInfo", 0), F("originLocalIp", "data", 1), F("replaceExisting", "bool", 0),
        F("compressionQuality", "u8", 1), F("numPreviousAttempts", "u8", 2),
    )),
    "ConnectionResponse": Layout(1, 1, (
        F("error", "ConnectionError", 0, tag=0), F("connectionDetails", "ConnectionDetails", 0, tag=1),
    ), 0),
    "ConnectionError": Layout(2, 1, (F("cause", "text", 0), F("retryAfter", "i64", 0), F("shouldRetry", "bool", 64))),
    "ConnectionDetails": Layout(1, 2, (
        F("uuid", "data", 0), F("locationName", "text", 1), F("tunnelIsRemotelyManaged", "bool", 0),
    )),
    "registerConnection": Layout(1, 3, (
        F("auth", "TunnelAuth", 0), F("tunnelId", "data", 1), F("connIndex", "u8", 0),
        F("options", "ConnectionOptions", 2),
    )),
    "unregisterConnection": Layout(0, 0, ()),
    "updateLocalConfiguration": Layout(0, 1, (F("config", "data", 0),)),
    "registerUdpSession": Layout(2, 3, (
        F("sessionId", "data", 0), F("dstIp", "data", 1), F("dstPort", "u16", 0), F("closeAfterIdleHint", "i64", 1),
        F("traceContext", "text", 2),
    )),
    "unregisterUdpSession": Layout(0, 2, (F("sessionId", "data", 0), F("message", "text", 1))),
    "updateConfiguration": Layout(1, 1, (F("version", "i32", 0), F("config", "data", 0))),
    "RegisterUdpSessionResponse": Layout(0, 2, (F("err", "text", 0), F("spans", "data", 1))),
    "UpdateConfigurationResponse": Layout(1, 1, (F("latestAppliedVersion", "i32", 0), F("err", "text", 0))),
    "results:registerConnection": Layout(0, 1, (F("result", "ConnectionResponse", 0),)),
    "results:registerUdpSession": Layout(0, 1, (F("result", "RegisterUdpSessionResponse", 0),)),
    "results:updateConfiguration": Layout(0, 1, (F("result", "UpdateConfigurationResponse", 0),)),
    "results:unregisterConnection": Layout(0, 0, ()),
    "results:updateLocalConfiguration": Layout(0, 0, ()),
    "results:unregisterUdpSession": Layout(0, 0, ()),
    # proto/quic_metadata.capnp
    "ConnectRequest": Layout(1, 2, (F("dest", "text", 0), F("type", "u16", 0), F("metadata", "[Metadata]", 1))),
    "ConnectResponse": Layout(0, 2, (F("error", "text", 0), F("metadata", "[Metadata]", 1))),
    "Metadata": Layout(0, 2, (F("key", "text", 0), F("val", "text", 1))),
}  # fmt: skip

METHODS = {
    (0xF71695EC7FE85497, 0): "registerConnection", (0xF71695EC7FE85497, 1): "unregisterConnection",
    (0xF71695EC7FE85497, 2): "updateLocalConfiguration", (0x839445A59FB01686, 0): "registerUdpSession",
    (0x839445A59FB01686, 1): "unregisterUdpSession", (0xB48EDFBDAA25DB04, 0): "updateConfiguration",
}  # fmt: skip
NUMBERS = {name: number for number, name in METHODS.items()}

SECRET_FIELDS = frozenset(("tunnelSecret",))

_SIZES = {"u8": (1, "<B"), "u16": (2, "<H"), "u32": (4, "<I"), "u64": (8, "<Q"), "i32": (4, "<i"), "i64": (8, "<q")}


# --- reading ---------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    segment: int
    at: int  # byte offset in the message
    words: int
    pointers: int


class Reader:
    """Reads one message. `answers` names the method whose results a return carries; `notes` collects places."""

    def __init__(self, message: bytes, *, notes: list[Note] | None = None, answers: str = "") -> None:
        self._data = message
        self._notes = notes
        self._answers = answers
        self._left = LARGEST_WALK
        self.root = (0, 0)
        """Words and pointers of the root struct, once it was read."""
        self.secrets: list[tuple[int, int]] = []
        """Offset and length of every field in SECRET_FIELDS."""
        if len(message) < 8:
            raise WireError("a Cap'n Proto message of less than one word")
        count = int.from_bytes(message[:4], "little") + 1
        if count > MAX_SEGMENTS or table_length(count) > len(message):
            raise WireError(f"a Cap'n Proto message with {count} segments in {len(message)} bytes")
        self._segments: list[tuple[int, int]] = []
        at = table_length(count)
        for number in range(count):
            words = int.from_bytes(message[4 + 4 * number : 8 + 4 * number], "little")
            self._segments.append((at, at + 8 * words))
            at += 8 * words
        if at != len(message):
            raise WireError(f"a Cap'n Proto message of {at} bytes in {len(message)}")
        if notes is not None:
            notes.append((0, table_length(count), "segment table", f"{count} segment{'s' * (count > 1)}, {at} bytes"))

    def read(self, layout: str = "Message") -> dict[str, Any]:
        """Return the root struct's values. Errors: WireError."""
        start, end = self._segments[0]
        if start == end:
            raise WireError("a Cap'n Proto message with an empty first segment")
        try:
            place = self._struct(0, start)
            self.root = (place.words, place.pointers) if place is not None else (0, 0)
            return self._values(place, layout, 0, layout) if place is not None else {}
        except (struct.error, IndexError):
            raise WireError("a pointer of the Cap'n Proto message leads outside of it") from None

    def _word(self, segment: int, at: int) -> int:
        start, end = self._segments[segment]
        if at < start or at + 8 > end:
            raise WireError("a pointer of the Cap'n Proto message leads outside of it")
        return int.from_bytes(self._data[at : at + 8], "little")

    def _follow(self, segment: int, at: int) -> tuple[int, int, int]:
        """Return segment, content offset and the near pointer's word; word 0 for null."""
        self._left -= 1
        if self._left < 0:
            raise WireError(f"a Cap'n Proto message with more than {LARGEST_WALK} pointers")
        word = self._word(segment, at)
        if word & 3 == 2:
            segment = word >> 32
            if segment >= len(self._segments):
                raise WireError("a far pointer to a segment that is not there")
            pad = self._segments[segment][0] + 8 * (word >> 3 & 0x1FFFFFFF)
            if word & 4:
                far = self._word(segment, pad)
                tag = self._word(segment, pad + 8)
                segment = far >> 32
                if far & 3 != 2 or segment >= len(self._segments):
                    raise WireError("a double far pointer that is none")
                return segment, self._segments[segment][0] + 8 * (far >> 3 & 0x1FFFFFFF), tag
            at = pad
            word = self._word(segment, at)
        offset = word >> 2 & 0x3FFFFFFF
        if offset & 0x20000000:
            offset -= 0x40000000
        return segment, at + 8 + 8 * offset, word

    def _struct(self, segment: int, at: int) -> _Place | None:
        segment, content, word = self._follow(segment, at)
        if not word:
            return None
        if word & 3:
            raise WireError("a Cap'n Proto pointer to something that is no struct")
        words, pointers = word >> 32 & 0xFFFF, word >> 48
        self._inside(segment, content, 8 * (words + pointers))
        return _Place(segment, content, words, pointers)

    def _inside(self, segment: int, at: int, size: int) -> None:
        start, end = self._segments[segment]
        if at < start or at + size > end:
            raise WireError("a pointer of the Cap'n Proto message leads outside of it")

    def _blob(self, segment: int, at: int) -> tuple[int, bytes] | None:
        segment, content, word = self._follow(segment, at)
        if not word:
            return None
        if word & 3 != 1 or word >> 32 & 7 != 2:
            raise WireError("a Cap'n Proto pointer to something that is no text or data")
        size = word >> 35
        self._inside(segment, content, size)
        return content, self._data[content : content + size]

    def _values(self, place: _Place, name: str, depth: int, path: str) -> dict[str, Any]:
        if depth > LARGEST_DEPTH:
            raise WireError(f"a Cap'n Proto message with more than {LARGEST_DEPTH} levels")
        layout = LAYOUTS[name]
        tag = -1
        values: dict[str, Any] = {}
        if layout.union_at >= 0:
            tag = self._number(place, "u16", layout.union_at, 0)
        for field in layout.fields:
            if field.tag not in {-1, tag}:
                continue
            values[field.name] = self._value(place, field, values, depth, f"{path}.{field.name}")
        if tag >= 0 and not any(field.tag == tag for field in layout.fields):
            values["unknown"] = tag
        if name == "Call":
            method = METHODS.get((values.get("interfaceId", 0), values.get("methodId", 0)))
            if method is not None:
                values["method"] = method
        return values

    def _number(self, place: _Place, kind: str, at: int, default: int) -> int:
        size, form = _SIZES[kind]
        if (at + 1) * size > 8 * place.words:
            return default
        value: int = struct.unpack_from(form, self._data, place.at + at * size)[0]
        return value ^ default

    def _value(self, place: _Place, field: Field, before: dict[str, Any], depth: int, path: str) -> Any:
        kind = field.kind
        if kind == "void":
            return None
        if kind in _SIZES:
            value = self._number(place, kind, field.at, field.default)
            self._note(place.at + field.at * _SIZES[kind][0], _SIZES[kind][0], path, value)
            return value
        if kind == "bool":
            if field.at >= 64 * place.words:
                return bool(field.default)
            bit = self._data[place.at + field.at // 8] >> field.at % 8 & 1
            value = bit ^ field.default
            self._note(place.at + field.at // 8, 1, path, bool(value))
            return bool(value)
        if field.at >= place.pointers:
            return None
        at = place.at + 8 * (place.words + field.at)
        if kind == "any":
            return self._any(place.segment, at, before, depth, path)
        if kind in {"text", "data"}:
            return self._text(place.segment, at, kind, field.name, path)
        if kind.startswith("["):
            return self._list(place.segment, at, kind[1:-1], depth, path)
        target = self._struct(place.segment, at)
        if target is None:
            return None
        self._note(target.at, 8 * (target.words + target.pointers), path, kind)
        if kind == "Params":  # its content depends on what is called
            return self._params(target, before, depth, path)
        return self._values(target, kind, depth + 1, path)

    def _text(self, segment: int, at: int, kind: str, name: str, path: str) -> Any:
        blob = self._blob(segment, at)
        if blob is None:
            return None
        start, raw = blob
        if name in SECRET_FIELDS:
            self.secrets.append((start, len(raw)))
            self._note(start, len(raw), path, f"({len(raw)} bytes)")
            return raw
        if kind == "data":
            self._note(start, len(raw), path, raw.hex() if len(raw) <= 32 else f"{len(raw)} bytes")
            return raw
        text = raw[:-1].decode("utf-8", "replace") if raw[-1:] == b"\0" else raw.decode("utf-8", "replace")
        self._note(start, len(raw), path, repr(text))
        return text

    def _list(self, segment: int, at: int, kind: str, depth: int, path: str) -> list[Any] | None:
        segment, content, word = self._follow(segment, at)
        if not word:
            return None
        if word & 3 != 1:
            raise WireError("a Cap'n Proto pointer to something that is no list")
        size, count = word >> 32 & 7, word >> 35
        if kind == "text":
            if size != 6:
                raise WireError("a Cap'n Proto list whose elements are no texts")
            self._inside(segment, content, 8 * count)
            return [self._text(segment, content + 8 * n, "text", "", f"{path}[{n}]") for n in range(count)]
        if size != 7:
            raise WireError("a Cap'n Proto list whose elements are no structs")
        tag = self._word(segment, content)
        elements, words, pointers = tag >> 2 & 0x3FFFFFFF, tag >> 32 & 0xFFFF, tag >> 48
        if elements * (words + pointers) > count or elements > LARGEST_WALK:
            raise WireError("a Cap'n Proto list with more elements than it has room for")
        self._inside(segment, content, 8 * (count + 1))
        found = []
        for number in range(elements):
            place = _Place(segment, content + 8 + 8 * number * (words + pointers), words, pointers)
            found.append(self._values(place, kind, depth + 1, f"{path}[{number}]"))
        return found

    def _params(self, place: _Place, before: dict[str, Any], depth: int, path: str) -> dict[str, Any]:
        method = METHODS.get((before.get("interfaceId", -1), before.get("methodId", -1)), "")
        values: dict[str, Any] = {}
        if "answerId" in before:
            method = f"results:{self._answers or 'registerConnection'}"
            if self._answers:
                values["answers"] = self._answers
        if place.pointers:
            at = place.at + 8 * place.words
            values["content"] = self._any(place.segment, at, {"layout": method}, depth, f"{path}.content")
        if place.pointers > 1:
            table = LAYOUTS["Params"].fields[1]
            values["capTable"] = self._value(place, table, {}, depth, f"{path}.capTable")
        return values

    def _any(self, segment: int, at: int, before: dict[str, Any], depth: int, path: str) -> Any:
        word = self._word(segment, at)
        if word & 3 == 3:
            self._note(at, 8, path, f"capability {word >> 32}")
            return {"capability": word >> 32}
        if not word:
            return None
        layout = before.get("layout", "")
        target = self._struct(segment, at) if word & 3 != 1 else None
        if target is None or layout not in LAYOUTS:
            return {"opaque": True}
        self._note(target.at, 8 * (target.words + target.pointers), path, layout.removeprefix("results:"))
        return self._values(target, layout, depth + 1, path)

    def _note(self, start: int, length: int, path: str, value: object) -> None:
        if self._notes is not None:
            self._notes.append((start, length, path, str(value)))


def decode_capnp(
    message: bytes, layout: str = "Message", *, notes: list[Note] | None = None, answers: str = ""
) -> dict[str, Any]:
    """Return the values of one framed message. Errors: WireError."""
    return Reader(message, notes=notes, answers=answers).read(layout)


# --- writing ---------------------------------------------------------------------------------------------------------


class _Writer:
    def __init__(self) -> None:
        self.words = bytearray(8)

    def room(self, words: int) -> int:
        at = len(self.words)
        self.words += bytes(8 * words)
        return at

    def point(self, at: int, target: int, rest: int, kind: int = 0) -> None:
        offset = (target - at - 8) // 8
        struct.pack_into("<Q", self.words, at, (offset & 0x3FFFFFFF) << 2 | kind | rest)

    def put_struct(self, at: int, name: str, values: dict[str, Any], answers: str = "") -> None:
        layout = LAYOUTS[name]
        if not layout.words and not layout.pointers:
            struct.pack_into("<Q", self.words, at, 0xFFFFFFFC)
            return
        target = self.room(layout.words + layout.pointers)
        self.point(at, target, layout.words << 32 | layout.pointers << 48)
        self.fill(target, name, values, answers)

    def fill(self, target: int, name: str, values: dict[str, Any], answers: str) -> None:
        layout = LAYOUTS[name]
        known = {field.name for field in layout.fields} | {"method"}
        if unknown := sorted(set(values) - known):
            raise WireError(f"{name} has no field {unknown[0]!r}", advice=f"It has: {', '.join(sorted(known))}.")
        if name == "Call" and "method" in values:
            if values["method"] not in NUMBERS:
                raise WireError(f"no method {values['method']!r}", advice=f"Known: {', '.join(sorted(NUMBERS))}.")
            interface, method = NUMBERS[values["method"]]
            values = {**values, "interfaceId": interface, "methodId": method}
        if layout.union_at >= 0:
            chosen = [field for field in layout.fields if field.tag >= 0 and field.name in values]
            if len(chosen) != 1:
                raise WireError(f"{name} needs exactly one of {', '.join(f.name for f in layout.fields if f.tag >= 0)}")
            struct.pack_into("<H", self.words, target + 2 * layout.union_at, chosen[0].tag)
        for field in layout.fields:
            if field.name in values:
                self.put(target, layout, field, values, answers)

    def put(self, target: int, layout: Layout, field: Field, values: dict[str, Any], answers: str) -> None:
        value, kind = values[field.name], field.kind
        if kind == "void":
            return
        if kind in _SIZES:
            size, form = _SIZES[kind]
            struct.pack_into(form, self.words, target + field.at * size, int(value) ^ field.default)
            return
        if kind == "bool":
            self.words[target + field.at // 8] |= (int(bool(value)) ^ field.default) << field.at % 8
            return
        at = target + 8 * (layout.words + field.at)
        if value is None:
            return
        if kind in {"text", "data"}:
            self.blob(at, as_bytes(value) + (b"\0" if kind == "text" else b""))
        elif kind == "[text]":
            start = self.room(len(value))
            self.point(at, start, 6 << 32 | len(value) << 35, 1)
            for number, text in enumerate(value):
                self.blob(start + 8 * number, as_bytes(text) + b"\0")
        elif kind.startswith("["):
            self.structs(at, kind[1:-1], value)
        elif kind == "Params":
            method = METHODS.get((values.get("interfaceId", -1), values.get("methodId", -1)), "")
            self.params(at, value, method if "answerId" not in values else f"results:{answers or 'registerConnection'}")
        else:
            self.put_struct(at, kind, value, answers)

    def params(self, at: int, value: dict[str, Any], layout: str) -> None:
        target = self.room(2)
        self.point(at, target, 2 << 48)
        if "answers" in value:
            layout = f"results:{value['answers']}"
        content = value.get("content")
        if isinstance(content, dict) and "capability" in content:
            struct.pack_into("<Q", self.words, target, 3 | int(content["capability"]) << 32)
        elif isinstance(content, dict) and layout in LAYOUTS:
            self.put_struct(target, layout, content)
        if value.get("capTable") is not None:
            self.structs(target + 8, "CapDescriptor", value["capTable"])

    def structs(self, at: int, name: str, items: list[dict[str, Any]]) -> None:
        layout = LAYOUTS[name]
        size = layout.words + layout.pointers
        start = self.room(1 + size * len(items))
        self.point(at, start, 7 << 32 | size * len(items) << 35, 1)
        struct.pack_into("<Q", self.words, start, len(items) << 2 | layout.words << 32 | layout.pointers << 48)
        for number, item in enumerate(items):
            self.fill(start + 8 + 8 * size * number, name, item, "")

    def blob(self, at: int, data: bytes) -> None:
        start = self.room((len(data) + 7) // 8)
        self.words[start : start + len(data)] = data
        self.point(at, start, 2 << 32 | len(data) << 35, 1)


def encode_capnp(values: dict[str, Any], layout: str = "Message", *, answers: str = "") -> bytes:
    """Return the framed message with these values, in one segment. Errors: WireError."""
    writer = _Writer()
    try:
        writer.put_struct(0, layout, values, answers)
    except (struct.error, TypeError, ValueError, AttributeError, KeyError) as error:
        raise WireError(f"a value of this {layout} does not fit its field: {error}") from None
    return frame_message(writer.words)
