"""From JSON to the same bytes: what stands behind `connector encode`.

Owns: one encoder per form of decode.py that has one meaning. In: JSON values, as `connector decode --json` prints them.
Out: bytes; WireError or UsageError that names the field. Never: reads or writes anything.
"""

from __future__ import annotations

import ipaddress
import uuid
from collections.abc import Callable
from typing import Any

from connector.errors import UsageError, WireError
from connector.inspector.capnp_values import encode_capnp
from connector.inspector.decode import DATA_PREAMBLE, FRAME_NAMES, V3_CODES
from connector.inspector.values import as_bytes, from_json
from connector.wire import mqtt, websocket
from connector.wire.h2_frames import (
    SETTINGS,
    ErrorCode,
    Setting,
    encode_frame,
    encode_goaway,
    encode_rst_stream,
    encode_settings,
    encode_window_update,
)
from connector.wire.h2_headers import encode_serialised_headers
from connector.wire.h2_hpack import hpack_literal
from connector.wire.mqtt_encode import encode_packet
from connector.wire.token import Token, encode_token


def encode(form: str, value: Any) -> bytes:
    """Return the bytes of `value` in `form`; a list is several in a row. Errors: UsageError, WireError."""
    encoder = ENCODERS.get(form)
    if encoder is None:
        raise UsageError(f"no form {form!r} to encode", advice=f"Forms: {', '.join(ENCODERS)}.")
    value = from_json(value)
    try:
        if isinstance(value, list) and form != "headers":
            return b"".join(encoder(item) for item in value)
        return encoder(value)
    except KeyError as error:
        raise UsageError(f"the JSON of this {form} lacks the field {error}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UsageError(f"the JSON of this {form} has a value of the wrong kind: {error}") from None


def _token(value: dict[str, Any]) -> bytes:
    token = Token(
        account_tag=value["account_tag"], secret=as_bytes(value["secret"]), tunnel_id=uuid.UUID(value["tunnel_id"]),
        endpoint=value.get("endpoint", ""),
    )  # fmt: skip
    return encode_token(token).encode()


def _connect_request(value: dict[str, Any]) -> bytes:
    return DATA_PREAMBLE + b"01" + encode_capnp(value, "ConnectRequest")


def _connect_response(value: dict[str, Any]) -> bytes:
    return DATA_PREAMBLE + b"01" + encode_capnp(value, "ConnectResponse")


def _capnp(value: dict[str, Any]) -> bytes:
    return encode_capnp(value)


def _h2(value: dict[str, Any]) -> bytes:
    name = str(value["type"])
    if name not in FRAME_NAMES:
        raise UsageError(f"no HTTP/2 frame {name!r}", advice=f"Frames: {', '.join(FRAME_NAMES)}.")
    kind, flags, stream = FRAME_NAMES.index(name), int(value.get("flags", 0)), int(value.get("stream", 0))
    if kind == SETTINGS and "settings" in value and not flags & 1:
        return encode_settings([(_number(key), int(number)) for key, number in value["settings"].items()])
    if "increment" in value:
        return encode_window_update(stream, int(value["increment"]))
    if name == "RST_STREAM":
        return encode_rst_stream(stream, ErrorCode[value["code"]])
    if name == "GOAWAY":
        return encode_goaway(int(value["last_stream"]), ErrorCode[value["code"]], as_bytes(value.get("debug", b"")))
    if "headers" in value:
        block = b"".join(hpack_literal(as_bytes(key), as_bytes(text)) for key, text in value["headers"])
        return encode_frame(kind, flags & ~0x28, stream, block)  # no padding, no priority
    return encode_frame(kind, flags, stream, as_bytes(value.get("payload", b"")))


def _number(name: str) -> int:
    return int(name, 16) if name.startswith("0x") else int(Setting[name])


def _datagram_v2(value: dict[str, Any]) -> bytes:
    kinds = {"UDP": 0, "IP": 1, "IP with trace": 2, "tracing spans": 3}
    if value["type"] not in kinds:
        raise UsageError(f"no datagram of version 2 of type {value['type']!r}", advice=f"Types: {', '.join(kinds)}.")
    kind = kinds[value["type"]]
    tail = as_bytes(value["session"]) if kind == 0 else as_bytes(value["identity"]) if kind > 1 else b""
    if len(tail) != (16, 0, 25, 25)[kind]:
        raise WireError(f"a session ID has 16 bytes and a trace identity 25, not {len(tail)}")
    return as_bytes(value.get("payload", b"")) + tail + bytes((kind,))


def _datagram_v3(value: dict[str, Any]) -> bytes:
    kind = value["type"]
    if kind == "icmp":
        return b"\x02" + as_bytes(value["packet"])
    request = as_bytes(value["request_id"])
    if len(request) != 16:
        raise WireError(f"a request ID has 16 bytes, not {len(request)}")
    if kind == "payload":
        return b"\x01" + request + as_bytes(value.get("payload", b""))
    if kind == "response":
        codes = {name: number for number, name in V3_CODES.items()}
        error = as_bytes(value.get("error", ""))
        return bytes((3, codes[value["code"]])) + request + len(error).to_bytes(2, "big") + error
    if kind != "registration":
        raise UsageError(
            f"no datagram of version 3 of type {kind!r}", advice="Types: registration, payload, icmp, response."
        )
    address = ipaddress.ip_address(value["address"])
    payload = as_bytes(value.get("payload", b""))
    flags = int(address.version == 6) | (2 if "traced" in value.get("flags", ()) else 0) | (4 if payload else 0)
    head = bytes((0, flags)) + int(value["port"]).to_bytes(2, "big") + int(value["idle_seconds"]).to_bytes(2, "big")
    return head + request + address.packed + payload


def _mqtt(value: dict[str, Any]) -> bytes:
    fields = dict(value)
    name = fields.pop("packet")
    if name not in mqtt.KINDS:
        raise UsageError(f"no MQTT packet {name!r}", advice=f"Packets: {', '.join(mqtt.KINDS)}.")
    version = mqtt.V5 if _uses_version_5(fields) else mqtt.V311
    return encode_packet(
        mqtt.KINDS[name], fields, int(fields.pop("version", version)) if name != "CONNECT" else version
    )


def _uses_version_5(fields: dict[str, Any]) -> bool:
    return (
        "properties" in fields or "reason" in fields or any("retain_handling" in f for f in fields.get("filters", ()))
    )


def _websocket(value: dict[str, Any]) -> bytes:
    names = {name: number for number, name in websocket.OPCODES.items()}
    if value["opcode"] not in names:
        raise UsageError(f"no WebSocket frame {value['opcode']!r}", advice=f"Frames: {', '.join(names)}.")
    return websocket.encode_frame(
        websocket.Frame(
            names[value["opcode"]],
            as_bytes(value.get("payload", b"")),
            fin=bool(value.get("fin", True)),
            rsv=int(value.get("rsv", 0)),
            mask=as_bytes(value.get("mask", b"")),
        )
    )


def _headers(value: list[Any]) -> bytes:
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise UsageError("headers are a list of [name, value] pairs")
    return encode_serialised_headers([(as_bytes(name), as_bytes(text)) for name, text in value])


ENCODERS: dict[str, Callable[[Any], bytes]] = {
    "token": _token, "connect-request": _connect_request, "connect-response": _connect_response, "h2": _h2,
    "datagram-v2": _datagram_v2, "datagram-v3": _datagram_v3, "capnp": _capnp, "mqtt": _mqtt,
    "websocket": _websocket, "headers": _headers,
}  # fmt: skip
