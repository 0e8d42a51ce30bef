"""Any bytes of the edge protocol, explained: the decoders behind `connector decode` and the page's hex views.

Owns: the forms, the guess which form bytes have (`auto`), and each form's value and notes.
In: bytes (untrusted). Out: Decoded; WireError. Never: prints; keeps state between calls.
"""

from __future__ import annotations

import binascii
import ipaddress
from collections.abc import Callable
from typing import Any

from connector.errors import WireError
from connector.inspector.capnp_values import LAYOUTS, Note, Reader
from connector.inspector.redact import (
    is_secret_name,
    mask_spans,
    redact_bytes,
    redact_headers,
    redact_notes,
    redact_target,
)
from connector.wire import mqtt, websocket
from connector.wire.capnp import message_length
from connector.wire.h2_frames import (
    CONTINUATION,
    DATA,
    FLAG_END_HEADERS,
    FRAME_HEADER,
    FRAME_HEADER_LENGTH,
    GOAWAY,
    HEADERS,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    STREAM_ID_MASK,
    WINDOW_UPDATE,
    Setting,
    decode_goaway,
    decode_settings,
    decode_word,
    error_name,
    strip_padding,
)
from connector.wire.h2_headers import decode_serialised_headers
from connector.wire.h2_hpack import HpackDecoder
from connector.wire.token import decode_token

DATA_PREAMBLE = bytes.fromhex("0a36cd12a13e")
RPC_PREAMBLE = bytes.fromhex("52bb825cdb65")

FRAME_NAMES = ("DATA", "HEADERS", "PRIORITY", "RST_STREAM", "SETTINGS", "PUSH_PROMISE", "PING", "GOAWAY",
               "WINDOW_UPDATE", "CONTINUATION")  # fmt: skip

V3_CODES = {0: "OK", 1: "destination unreachable", 2: "unable to bind socket", 3: "too many active flows", 255: "error"}


class Decoded:
    """What bytes turned out to be: the form, the value (JSON-like with bytes), and where each part lies.

    `secrets` are the spans that must not be shown, as offset and length in `data`; `safe` what may be said of one, by
    its offset.
    """

    __slots__ = ("data", "form", "notes", "safe", "secrets", "value")

    def __init__(
        self, form: str, data: bytes, value: Any, notes: list[Note], secrets: list[tuple[int, int]] | None = None
    ) -> None:
        self.form = form
        self.data = data
        self.value = value
        self.notes = notes
        self.secrets = secrets or []
        self.safe: dict[int, str] = {}

    def masked(self) -> tuple[bytes, list[Note]]:
        """Return bytes and notes without secrets; lengths and offsets stay."""
        notes: list[Note] = []
        for start, size, name, text in self.notes:
            hidden = size and any(start < at + length and at < start + size for at, length in self.secrets)
            words = self.safe.get(start) or f"({size} bytes, masked)" if hidden and "bytes)" not in text else text
            notes.append((start, size, name, words))
        return redact_bytes(mask_spans(self.data, self.secrets)), redact_notes(notes)


def decode(data: bytes, form: str = "auto") -> Decoded:
    """Return what `data` is, by `form` or by the best guess. Errors: WireError."""
    if form == "auto":
        return guess(data)
    found = FORMS.get(form)
    if found is None:
        raise WireError(f"no form {form!r}", advice=f"Forms: auto, {', '.join(FORMS)}.")
    return found(data)


def guess(data: bytes) -> Decoded:
    """Try the forms from the most telling to the least. Errors: WireError when nothing fits."""
    stripped = data.strip()
    order: list[str] = []
    if data.startswith(PREFACE):
        order.append("h2")
    if data.startswith((DATA_PREAMBLE, RPC_PREAMBLE)):
        order += ["connect-request", "connect-response", "capnp"]
    if stripped.startswith(b"eyJ"):
        order.append("token")
    order += ["capnp", "connect-request", "mqtt", "headers", "h2", "websocket", "datagram-v3", "datagram-v2"]
    for form in dict.fromkeys(order):
        try:
            found = FORMS[form](data)
        except WireError:
            continue
        if form == "headers" and not found.value:
            continue
        return found
    raise WireError(
        f"{len(data)} {'byte that is' if len(data) == 1 else 'bytes that are'} no known form of the edge protocol"
        f"{f': {data.hex()}' if len(data) <= 16 else ''}",
        advice=f"Say which it should be: --as {', '.join(FORMS)}.",
    )


def _token(data: bytes) -> Decoded:
    text = data.decode("latin-1").strip()
    token = decode_token(text)
    value = {
        "account_tag": token.account_tag, "tunnel_id": str(token.tunnel_id), "secret": token.secret,
        **({"endpoint": token.endpoint} if token.endpoint else {}),
    }  # fmt: skip
    notes = [
        (0, 0, "token", "base64 of JSON"), (0, 0, "a, account tag", token.account_tag),
        (0, 0, "t, tunnel ID", str(token.tunnel_id)), (0, 0, "s, tunnel secret", f"({len(token.secret)} bytes)"),
    ]  # fmt: skip
    return Decoded("token", data, value, notes, [(0, len(data))])


def _capnp(data: bytes) -> Decoded:
    """Decode RPC messages, one after the other, behind the RPC preamble or without it."""
    notes: list[Note] = []
    values: list[Any] = []
    secrets: list[tuple[int, int]] = []
    at = 0
    if data.startswith(RPC_PREAMBLE):
        notes.append((0, 6, "RPC stream preamble", "proto/README.md paragraph 11"))
        at = 6
    questions: dict[int, str] = {}
    while at < len(data):
        length = message_length(data[at:])
        if length is None or length > len(data) - at:
            raise WireError("the bytes end within a Cap'n Proto message")
        value, inner, hidden = decode_rpc(data[at : at + length], questions)
        values.append(value)
        notes += [(start + at, size, name, text) for start, size, name, text in inner]
        secrets += [(start + at, size) for start, size in hidden]
        at += length
    if not values:
        raise WireError("no Cap'n Proto message")
    return Decoded("capnp", data, values if len(values) > 1 else values[0], notes, secrets)


def decode_rpc(
    message: bytes, questions: dict[int, str] | None = None
) -> tuple[dict[str, Any], list[Note], list[tuple[int, int]]]:
    """Return value, notes and secret spans of one RPC message; `questions` remembers which call a return answers."""
    notes: list[Note] = []
    reader = Reader(message, notes=notes)
    value = reader.read()
    if not value or "unknown" in value:
        raise WireError("a Cap'n Proto message that is no RPC message")
    answer = value.get("return")
    method = (questions or {}).get(answer.get("answerId", -1), "") if answer else ""
    if answer and not method and _is_unknown(answer):
        method = "updateConfiguration"  # its answer has the same shape as a registration's, without the union
    if method:
        notes = []
        reader = Reader(message, notes=notes, answers=method)
        value = reader.read()
    call = value.get("call")
    if call and questions is not None and len(questions) < 1_000:
        questions[call.get("questionId", -1)] = call.get("method", "")
    return value, notes, reader.secrets


def _is_unknown(answer: dict[str, Any]) -> bool:
    content = (answer.get("results") or {}).get("content")
    return isinstance(content, dict) and "unknown" in (content.get("result") or {})


def _connect(data: bytes, layout: str, form: str) -> Decoded:
    notes: list[Note] = []
    at = 0
    if data.startswith(DATA_PREAMBLE):
        if len(data) < 8:
            raise WireError("the bytes end within the preamble")
        notes += [
            (0, 6, "data stream preamble", "proto/README.md paragraph 16"),
            (6, 2, "version", data[6:8].decode("latin-1")),
        ]
        at = 8
    length = message_length(data[at:])
    if length is None or length > len(data) - at:
        raise WireError(f"the bytes end within the {layout}")
    inner: list[Note] = []
    reader = Reader(data[at : at + length], notes=inner)
    value = reader.read(layout)
    if reader.root != LAYOUTS[layout][:2]:
        raise WireError(f"a struct that is no {layout}")
    metadata = value.get("metadata") or []
    if layout == "ConnectRequest" and not value.get("dest"):
        raise WireError(f"a {layout} without a destination")
    if not at and not metadata and not value.get("error") and not value.get("dest"):
        raise WireError(f"an empty {layout}")
    if not all(item["key"].startswith(("Http", "Flow", "cf-")) for item in metadata):
        raise WireError(f"a {layout} with metadata that is none of the edge protocol's")
    notes += [(start + at, size, name, text) for start, size, name, text in inner]
    at += length
    if at < len(data):
        notes.append((at, len(data) - at, "payload", f"{len(data) - at} bytes"))
    secrets = []
    for number, item in enumerate(metadata):
        field = (str(item["key"]).removeprefix("HttpHeader:").encode(), str(item["val"]).encode())
        if redact_headers([field]) != [field]:
            secrets += [note[:2] for note in notes if note[2].endswith(f".metadata[{number}].val")]
    target = str(value.get("dest") or "").encode()
    if redact_target(target) != target:
        secrets += [note[:2] for note in notes if note[2].endswith(".dest")]
    return Decoded(form, data, value, notes, secrets)


def _connect_request(data: bytes) -> Decoded:
    return _connect(data, "ConnectRequest", "connect-request")


def _connect_response(data: bytes) -> Decoded:
    return _connect(data, "ConnectResponse", "connect-response")


def _h2(data: bytes) -> Decoded:
    notes: list[Note] = []
    frames: list[dict[str, Any]] = []
    secrets: list[tuple[int, int]] = []
    safe: dict[int, str] = {}
    at = 0
    if data.startswith(PREFACE):
        notes.append((0, len(PREFACE), "preface", "the client's opening, RFC 9113 section 3.4"))
        at = len(PREFACE)
    hpack = HpackDecoder(4096)
    while at < len(data):
        if len(data) - at < FRAME_HEADER_LENGTH:
            raise WireError("the bytes end within an HTTP/2 frame header")
        word, flags, stream_id = FRAME_HEADER.unpack_from(data, at)
        length, kind = word >> 8, word & 0xFF
        if kind > CONTINUATION or at + FRAME_HEADER_LENGTH + length > len(data):
            raise WireError("the bytes are no whole HTTP/2 frames")
        name = FRAME_NAMES[kind]
        notes += [
            (at, 3, f"{name} length", str(length)), (at + 3, 1, "type", name),
            (at + 4, 1, "flags", flags_text(kind, flags)), (at + 5, 4, "stream", str(stream_id & STREAM_ID_MASK)),
        ]  # fmt: skip
        at += FRAME_HEADER_LENGTH
        payload = data[at : at + length]
        value, text = describe_frame(kind, flags, payload, hpack)
        if length:
            notes.append((at, length, name, text))
        fields = [(bytes(key), bytes(item)) for key, item in value.get("headers", ())]
        if (shown := redact_headers(fields)) != fields:
            secrets.append((at, length))
            safe[at] = "; ".join(f"{key.decode('latin-1')}: {item.decode('latin-1')}" for key, item in shown)
        frames.append({"type": name, "flags": flags, "stream": stream_id & STREAM_ID_MASK, **value})
        at += length
    if not frames:
        raise WireError("no HTTP/2 frame")
    found = Decoded("h2", data, frames, notes, secrets)
    found.safe = safe
    return found


def flags_text(kind: int, flags: int) -> str:
    """Return the names of a frame's flags."""
    names = []
    if flags & 1:
        names.append("ACK" if kind in {SETTINGS, 6} else "END_STREAM")
    for bit, name in ((4, "END_HEADERS"), (8, "PADDED"), (0x20, "PRIORITY")):
        if flags & bit:
            names.append(name)
    return " ".join(names) or "none"


def describe_frame(kind: int, flags: int, payload: bytes, hpack: HpackDecoder | None) -> tuple[dict[str, Any], str]:
    """Return value and one line of text for a frame's payload. Errors: WireError."""
    if kind == SETTINGS:
        pairs = [(_setting(key), value) for key, value in decode_settings(payload)]
        return {"settings": dict(pairs)}, ", ".join(f"{key}={value}" for key, value in pairs)
    if kind == WINDOW_UPDATE:
        increment = decode_word(payload)
        return {"increment": increment}, f"increment {increment}"
    if kind == RST_STREAM:
        code = error_name(decode_word(payload))
        return {"code": code}, code
    if kind == GOAWAY:
        last, number, debug = decode_goaway(payload)
        code = error_name(number)
        text = f"last stream {last}, {code} {debug.decode('latin-1')}"
        return {"last_stream": last, "code": code, "debug": debug}, text
    if kind == HEADERS and flags & FLAG_END_HEADERS and hpack is not None:
        block = strip_padding(payload) if flags & 8 else payload
        fields = hpack.decode(block[5:] if flags & 0x20 else block)
        return {"headers": [list(field) for field in fields]}, "; ".join(
            f"{name.decode('latin-1')}: {value.decode('latin-1')}" for name, value in fields
        )
    return {"payload": payload}, f"{len(payload)} bytes"


def _setting(key: int) -> str:
    try:
        return Setting(key).name
    except ValueError:
        return f"0x{key:x}"


def _datagram_v2(data: bytes) -> Decoded:
    """Read from the end: payload, session ID or trace identity, type."""
    if not data:
        raise WireError("an empty datagram")
    kind = data[-1]
    names = {0: "UDP", 1: "IP", 2: "IP with trace", 3: "tracing spans"}
    tail = {0: 16, 1: 0, 2: 25, 3: 25}.get(kind)
    if tail is None or len(data) < tail + 1:
        raise WireError(f"a datagram of version 2 with type {kind} in {len(data)} bytes")
    end = len(data) - 1 - tail
    value: dict[str, Any] = {"type": names[kind], "payload": data[:end]}
    notes: list[Note] = [(0, end, "payload", f"{end} bytes")]
    if kind == 0:
        value["session"] = data[end:-1]
        notes.append((end, 16, "session ID", data[end:-1].hex()))
    elif tail:
        value["identity"] = data[end:-1]
        notes.append(
            (end, 25, "trace identity", f"trace {data[end : end + 16].hex()} span {data[end + 16 : end + 24].hex()}")
        )
    notes.append((len(data) - 1, 1, "type", f"{kind}: {names[kind]}"))
    return Decoded("datagram-v2", data, value, notes)


def _datagram_v3(data: bytes) -> Decoded:
    if not data:
        raise WireError("an empty datagram")
    kind = data[0]
    size = len(data)
    if kind == 0:
        flags = data[1] if size > 1 else 0
        wide = 16 if flags & 1 else 4
        if size < 22 + wide or flags > 7:
            raise WireError("a registration of version 3 that is too short, or with unknown flags")
        port, idle = int.from_bytes(data[2:4], "big"), int.from_bytes(data[4:6], "big")
        host = str(ipaddress.ip_address(data[22 : 22 + wide]))
        bits = [name for bit, name in ((1, "ipv6"), (2, "traced"), (4, "bundled")) if flags & bit]
        value: dict[str, Any] = {"type": "registration", "flags": bits, "port": port, "idle_seconds": idle,
                                 "request_id": data[6:22], "address": host}  # fmt: skip
        notes: list[Note] = [
            (0, 1, "type", "0: registration"), (1, 1, "flags", ", ".join(bits) or "none"),
            (2, 2, "destination port", str(port)), (4, 2, "idle time", f"{idle} s"),
            (6, 16, "request ID", data[6:22].hex()), (22, wide, "destination", host),
        ]  # fmt: skip
        if size > 22 + wide:
            if not flags & 4:
                raise WireError("a registration of version 3 with a payload that its flags do not announce")
            value["payload"] = data[22 + wide :]
            notes.append((22 + wide, size - 22 - wide, "first payload", f"{size - 22 - wide} bytes"))
        return Decoded("datagram-v3", data, value, notes)
    if kind == 1 and size >= 17:
        notes = [(0, 1, "type", "1: payload"), (1, 16, "request ID", data[1:17].hex()),
                 (17, size - 17, "payload", f"{size - 17} bytes")]  # fmt: skip
        return Decoded("datagram-v3", data, {"type": "payload", "request_id": data[1:17], "payload": data[17:]}, notes)
    if kind == 2 and size > 1:
        notes = [(0, 1, "type", "2: ICMP"), (1, size - 1, "IP packet", f"{size - 1} bytes")]
        return Decoded("datagram-v3", data, {"type": "icmp", "packet": data[1:]}, notes)
    if kind == 3 and size >= 20:
        length = int.from_bytes(data[18:20], "big")
        if size != 20 + length or data[1] not in V3_CODES:
            raise WireError("a registration response of version 3 of the wrong length, or with an unknown code")
        code = V3_CODES[data[1]]
        value = {
            "type": "response",
            "code": code,
            "request_id": data[2:18],
            "error": data[20:].decode("utf-8", "replace"),
        }
        notes = [
            (0, 1, "type", "3: registration response"),
            (1, 1, "code", code),
            (2, 16, "request ID", data[2:18].hex()),
            (18, 2, "error length", str(length)),
            (20, length, "error", value["error"]),
        ]
        return Decoded("datagram-v3", data, value, notes)
    raise WireError(f"a datagram of version 3 with type {kind} in {size} bytes")


def _mqtt(data: bytes) -> Decoded:
    notes: list[Note] = []
    values: list[Any] = []
    secrets: list[tuple[int, int]] = []
    at, version = 0, mqtt.V311
    while at < len(data):
        found = mqtt.packet_length(data, at)
        if found is None or at + found[1] > len(data):
            raise WireError("the bytes end within an MQTT packet")
        value, inner, hidden, version = decode_mqtt(data[at : at + found[1]], version)
        values.append(value)
        notes += [(start + at, size, name, text) for start, size, name, text in inner]
        secrets += [(start + at, size) for start, size in hidden]
        at += found[1]
    if not values:
        raise WireError("no MQTT packet")
    return Decoded("mqtt", data, values if len(values) > 1 else values[0], notes, secrets)


def decode_mqtt(packet: bytes, version: int) -> tuple[dict[str, Any], list[Note], list[tuple[int, int]], int]:
    """Return value, notes, secret spans and the version in force of one packet; tries 5 where 3.1.1 does not fit."""
    notes: list[Note] = []
    try:
        found = mqtt.decode_packet(packet, version, notes)
    except WireError:
        if version != mqtt.V311:
            raise
        notes, version = [], mqtt.V5
        found = mqtt.decode_packet(packet, version, notes)
    version = found.fields.get("version", version)
    # A password is behind its two-byte length, a property behind its identifier as well.
    secrets = [
        (start + 2, size - 2) if name == "password" else (start + 3, size - 3)
        for start, size, name, _ in notes
        if name in mqtt.SECRET_FIELDS
    ]
    for start, size, name, _ in list(notes):  # a user property: identifier, length, name, length, value
        if name == "user_property" and size > 5:
            length = int.from_bytes(packet[start + 1 : start + 3], "big")
            if is_secret_name(packet[start + 3 : start + 3 + length]):
                secrets.append((start + 5 + length, size - 5 - length))
    return {"packet": found.name, **found.fields}, notes, secrets, version


def _websocket(data: bytes) -> Decoded:
    notes: list[Note] = []
    values: list[Any] = []
    for frame in websocket.decode_frames(data):
        name = websocket.opcode_name(frame.opcode)
        head = frame.size - frame.length
        at = frame.offset
        more = "final" if frame.fin else "more follows"
        notes += [
            (at, 1, "frame", f"{name}, {more}{f', rsv {frame.rsv}' if frame.rsv else ''}"),
            (at + 1, head - 1 - len(frame.mask), "length", f"{frame.length}{', masked' if frame.mask else ''}"),
        ]  # fmt: skip
        if frame.mask:
            notes.append((at + head - 4, 4, "masking key", frame.mask.hex()))
        if frame.length:
            notes.append((at + head, frame.length, "payload", repr(frame.payload[:60])))
        values.append(
            {"opcode": name, "fin": frame.fin, "rsv": frame.rsv, "mask": frame.mask, "payload": frame.payload}
        )
    if not values:
        raise WireError("no WebSocket frame")
    return Decoded("websocket", data, values if len(values) > 1 else values[0], notes)


def _headers(data: bytes) -> Decoded:
    raw = data.strip()
    fields = decode_serialised_headers(raw)
    if not fields and raw:
        raise WireError("no serialised header list")
    notes: list[Note] = []
    at = data.find(raw) if raw else 0
    secrets = []
    for part in raw.split(b";"):
        if part:
            name, value = (_unpadded(item) for item in part.partition(b":")[::2])
            notes.append((at, len(part), "header", f"{name.decode('latin-1')}: {value.decode('latin-1')}"))
            if redact_headers([(name, value)]) != [(name, value)]:
                secrets.append((at, len(part)))
        at += len(part) + 1
    return Decoded("headers", data, [list(field) for field in fields], notes, secrets)


def _unpadded(data: bytes) -> bytes:
    return binascii.a2b_base64(data + b"==="[: -len(data) % 4])


FORMS: dict[str, Callable[[bytes], Decoded]] = {
    "token": _token, "connect-request": _connect_request, "connect-response": _connect_response, "h2": _h2,
    "datagram-v2": _datagram_v2, "datagram-v3": _datagram_v3, "capnp": _capnp, "mqtt": _mqtt,
    "websocket": _websocket, "headers": _headers,
}  # fmt: skip

__all__ = ["DATA", "FORMS", "LAYOUTS", "Decoded", "decode", "decode_mqtt", "decode_rpc", "describe_frame", "guess"]
