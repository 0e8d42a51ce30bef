"""MQTT control packets from the fields that `decode_packet` gives, or a person writes.

Owns: an encoder per packet type. In: kind, fields, version. Out: bytes; WireError that names the field.
Never: keeps anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from connector.errors import WireError
from connector.wire.mqtt import (
    ANSWER_FLAGS,
    AUTH,
    CONNACK,
    CONNECT,
    DISCONNECT,
    LARGEST_REMAINING,
    NAMES,
    PINGREQ,
    PINGRESP,
    PROPERTY_NUMBERS,
    PUBACK,
    PUBCOMP,
    PUBLISH,
    PUBREC,
    PUBREL,
    REPEATED,
    SUBACK,
    SUBSCRIBE,
    UNSUBACK,
    UNSUBSCRIBE,
    V5,
    V31,
    V311,
    Fields,
)


def encode_packet(kind: int, fields: Fields, version: int = V311) -> bytes:
    """Return the bytes of a packet with these fields; missing ones have their usual default. Errors: WireError."""
    encode = _ENCODERS.get(kind)
    if encode is None:
        raise WireError(f"MQTT has no packet type {kind}")
    version = int(fields.get("version", version)) if kind == CONNECT else version
    if version not in {V31, V311, V5}:
        raise WireError(f"MQTT has no protocol level {version}", advice="3 is 3.1, 4 is 3.1.1, 5 is 5.0.")
    try:
        body = encode(fields, version)
    except KeyError as error:
        raise WireError(f"an MQTT {NAMES[kind]} needs the field {error}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise WireError(f"a field of this MQTT {NAMES[kind]} has a value of the wrong kind: {error}") from None
    flags = ANSWER_FLAGS.get(kind, 0)
    if kind == PUBLISH:
        qos = int(fields.get("qos", 0))
        if qos not in {0, 1, 2}:
            raise WireError(f"an MQTT PUBLISH with QoS {qos}")
        flags = (8 if fields.get("dup") else 0) | qos << 1 | (1 if fields.get("retain") else 0)
    return bytes((kind << 4 | flags,)) + _varint(len(body), "remaining length") + body


def _varint(value: int, name: str) -> bytes:
    if not 0 <= value <= LARGEST_REMAINING:
        raise WireError(f"{value} is no {name} of MQTT")
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def _data(value: bytes | bytearray | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else bytes(value)
    if len(raw) > 65_535:
        raise WireError(f"a text of {len(raw)} bytes does not fit into MQTT")
    return len(raw).to_bytes(2, "big") + raw


def _two(value: int) -> bytes:
    return int(value).to_bytes(2, "big")


def _properties(fields: Fields, version: int, key: str = "properties") -> bytes:
    if version != V5:
        return b""
    out = bytearray()
    for name, given in (fields.get(key) or {}).items():
        if name not in PROPERTY_NUMBERS:
            raise WireError(f"MQTT 5 has no property {name!r}")
        number, kind = PROPERTY_NUMBERS[name]
        values: Iterable[Any] = given if name in REPEATED and isinstance(given, list) else [given]
        for value in values:
            out.append(number)
            if kind == "pair":
                out += _data(value[0]) + _data(value[1])
            elif kind in {"text", "data"}:
                out += _data(value)
            elif kind == "varint":
                out += _varint(int(value), name)
            else:
                out += int(value).to_bytes({"byte": 1, "two": 2, "four": 4}[kind], "big")
    return _varint(len(out), "property length") + bytes(out)


def _encode_connect(fields: Fields, version: int) -> bytes:
    will = fields.get("will")
    bits = 2 if fields.get("clean_start", True) else 0
    if will is not None:
        bits |= 4 | int(will.get("qos", 0)) << 3 | (32 if will.get("retain") else 0)
    username, password = fields.get("username"), fields.get("password")
    bits |= (128 if username is not None else 0) | (64 if password is not None else 0)
    out = _data("MQIsdp" if version == V31 else "MQTT") + bytes((version, bits))
    out += _two(fields.get("keep_alive", 60)) + _properties(fields, version) + _data(fields.get("client_id", ""))
    if will is not None:
        out += _properties(will, version) + _data(will["topic"]) + _data(will.get("payload", b""))
    if username is not None:
        out += _data(username)
    if password is not None:
        out += _data(password)
    return out


def _encode_connack(fields: Fields, version: int) -> bytes:
    head = bytes((1 if fields.get("session_present") else 0, int(fields.get("reason", 0))))
    return head + _properties(fields, version)


def _encode_publish(fields: Fields, version: int) -> bytes:
    out = _data(fields["topic"])
    if int(fields.get("qos", 0)):
        out += _two(fields["packet_id"])
    payload = fields.get("payload", b"")
    return out + _properties(fields, version) + (payload.encode() if isinstance(payload, str) else bytes(payload))


def _encode_acknowledgement(fields: Fields, version: int) -> bytes:
    out = _two(fields["packet_id"])
    if version == V5 and ("reason" in fields or fields.get("properties")):
        out += bytes((int(fields.get("reason", 0)),))
        if fields.get("properties"):
            out += _properties(fields, version)
    return out


def _encode_subscribe(fields: Fields, version: int) -> bytes:
    out = _two(fields["packet_id"]) + _properties(fields, version)
    if not fields["filters"]:
        raise WireError("an MQTT SUBSCRIBE needs a topic filter")
    for entry in fields["filters"]:
        options = int(entry.get("qos", 0))
        if version == V5:
            options |= (4 if entry.get("no_local") else 0) | (8 if entry.get("retain_as_published") else 0)
            options |= int(entry.get("retain_handling", 0)) << 4
        out += _data(entry["topic"]) + bytes((options,))
    return out


def _encode_suback(fields: Fields, version: int) -> bytes:
    return _two(fields["packet_id"]) + _properties(fields, version) + bytes(fields["reasons"])


def _encode_unsubscribe(fields: Fields, version: int) -> bytes:
    if not fields["topics"]:
        raise WireError("an MQTT UNSUBSCRIBE needs a topic filter")
    return _two(fields["packet_id"]) + _properties(fields, version) + b"".join(_data(t) for t in fields["topics"])


def _encode_unsuback(fields: Fields, version: int) -> bytes:
    return _encode_suback(fields, version) if version == V5 else _two(fields["packet_id"])


def _encode_ping(fields: Fields, version: int) -> bytes:
    return b""


def _encode_ending(fields: Fields, version: int) -> bytes:
    if version != V5 or ("reason" not in fields and not fields.get("properties")):
        return b""
    out = bytes((int(fields.get("reason", 0)),))
    return out + _properties(fields, version) if fields.get("properties") else out


_ENCODERS: dict[int, Callable[[Fields, int], bytes]] = {
    CONNECT: _encode_connect, CONNACK: _encode_connack, PUBLISH: _encode_publish, PUBACK: _encode_acknowledgement,
    PUBREC: _encode_acknowledgement, PUBREL: _encode_acknowledgement, PUBCOMP: _encode_acknowledgement,
    SUBSCRIBE: _encode_subscribe, SUBACK: _encode_suback, UNSUBSCRIBE: _encode_unsubscribe,
    UNSUBACK: _encode_unsuback, PINGREQ: _encode_ping, PINGRESP: _encode_ping, DISCONNECT: _encode_ending,
    AUTH: _encode_ending,
}  # fmt: skip
