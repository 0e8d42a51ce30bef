"""MQTT control packets, 3.1, 3.1.1 and 5.0: bytes to packets.

Owns: every packet type, all properties of version 5, the remaining length, and cutting a byte stream into packets.
In: bytes (untrusted). Out: Packet values; WireError.
Never: keeps a session (inspector/mqtt_session.py does), answers, or carries traffic.

*Strategy*: one description per packet serves three uses. Decoding walks it with a Cursor, which can note where each
field lies (`notes`) for annotated dumps; mqtt_encode.py takes the same field names back. Fields are JSON-like: text is
str, numbers are int, `payload`, `password`, `correlation_data` and the like are bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from connector.errors import WireError

Buffer = bytes | bytearray | memoryview
Note = tuple[int, int, str, str]
"""Where a field lies: offset, length, name, value as text."""
Fields = dict[str, Any]

CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = range(1, 8)
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT, AUTH = range(8, 16)
NAMES = ("reserved", "CONNECT", "CONNACK", "PUBLISH", "PUBACK", "PUBREC", "PUBREL", "PUBCOMP", "SUBSCRIBE", "SUBACK",
         "UNSUBSCRIBE", "UNSUBACK", "PINGREQ", "PINGRESP", "DISCONNECT", "AUTH")  # fmt: skip
KINDS = {name: number for number, name in enumerate(NAMES) if number}

V31, V311, V5 = 3, 4, 5

LARGEST_REMAINING = 268_435_455
"""Bytes behind the fixed header at most (MQTT 5 section 2.1.4)."""

MAX_PROPERTIES = 1_024
"""Properties of one packet. Only user properties and subscription identifiers repeat, and nobody sends hundreds."""

ANSWER_FLAGS = {PUBREL: 2, SUBSCRIBE: 2, UNSUBSCRIBE: 2}

CONNACK_3 = ("accepted", "unacceptable protocol version", "identifier rejected", "server unavailable",
             "bad user name or password", "not authorized")  # fmt: skip
REASONS = {
    0: "success", 1: "granted QoS 1", 2: "granted QoS 2", 4: "disconnect with will message",
    16: "no matching subscribers", 17: "no subscription existed", 24: "continue authentication", 25: "re-authenticate",
    128: "unspecified error", 129: "malformed packet", 130: "protocol error", 131: "implementation specific error",
    132: "unsupported protocol version", 133: "client identifier not valid", 134: "bad user name or password",
    135: "not authorized", 136: "server unavailable", 137: "server busy", 138: "banned", 139: "server shutting down",
    140: "bad authentication method", 141: "keep alive timeout", 142: "session taken over",
    143: "topic filter invalid", 144: "topic name invalid", 145: "packet identifier in use",
    146: "packet identifier not found", 147: "receive maximum exceeded", 148: "topic alias invalid",
    149: "packet too large", 150: "message rate too high", 151: "quota exceeded", 152: "administrative action",
    153: "payload format invalid", 154: "retain not supported", 155: "QoS not supported", 156: "use another server",
    157: "server moved", 158: "shared subscriptions not supported", 159: "connection rate exceeded",
    160: "maximum connect time", 161: "subscription identifiers not supported",
    162: "wildcard subscriptions not supported",
}  # fmt: skip

# MQTT 5 section 2.2.2.2: identifier -> name and type (byte, two, four, varint, text, data, pair).
PROPERTIES: dict[int, tuple[str, str]] = {
    1: ("payload_format_indicator", "byte"), 2: ("message_expiry_interval", "four"), 3: ("content_type", "text"),
    8: ("response_topic", "text"), 9: ("correlation_data", "data"), 11: ("subscription_identifier", "varint"),
    17: ("session_expiry_interval", "four"), 18: ("assigned_client_identifier", "text"),
    19: ("server_keep_alive", "two"), 21: ("authentication_method", "text"), 22: ("authentication_data", "data"),
    23: ("request_problem_information", "byte"), 24: ("will_delay_interval", "four"),
    25: ("request_response_information", "byte"), 26: ("response_information", "text"),
    28: ("server_reference", "text"), 31: ("reason_string", "text"), 33: ("receive_maximum", "two"),
    34: ("topic_alias_maximum", "two"), 35: ("topic_alias", "two"), 36: ("maximum_qos", "byte"),
    37: ("retain_available", "byte"), 38: ("user_property", "pair"), 39: ("maximum_packet_size", "four"),
    40: ("wildcard_subscription_available", "byte"), 41: ("subscription_identifier_available", "byte"),
    42: ("shared_subscription_available", "byte"),
}  # fmt: skip
PROPERTY_NUMBERS = {name: (number, kind) for number, (name, kind) in PROPERTIES.items()}
REPEATED = frozenset(("user_property", "subscription_identifier"))

SECRET_FIELDS = ("password", "authentication_data")
"""Names of fields that prove who somebody is."""


class Packet:
    """One control packet: `kind` (CONNECT ...), the four flag bits, and its fields by name."""

    __slots__ = ("fields", "flags", "kind", "size")

    def __init__(self, kind: int, fields: Fields, flags: int = 0, size: int = 0) -> None:
        self.kind = kind
        self.flags = flags
        self.fields = fields
        self.size = size
        """Bytes on the wire."""

    @property
    def name(self) -> str:
        """Name of the packet type."""
        return NAMES[self.kind]

    def __repr__(self) -> str:
        return f"<{self.name} {self.size} bytes>"


# --- cursor ----------------------------------------------------------------------------------------------------------


class Cursor:
    """Reads one packet from front to back. Errors of every method: WireError, naming the field."""

    __slots__ = ("_notes", "data", "end", "pos")

    def __init__(self, data: bytes, pos: int, end: int, notes: list[Note] | None = None) -> None:
        self.data = data
        self.pos = pos
        self.end = end
        self._notes = notes

    def note(self, start: int, name: str, value: object) -> None:
        """Remember where a field lies, if anybody asked for it."""
        if self._notes is not None:
            self._notes.append((start, self.pos - start, name, str(value)))

    def take(self, size: int, name: str) -> bytes:
        """Return `size` bytes."""
        start = self.pos
        if size > self.end - start:
            raise WireError(f"an MQTT packet ends within its {name}")
        self.pos = start + size
        return self.data[start : self.pos]

    def byte(self, name: str) -> int:
        """Return one byte."""
        start = self.pos
        if start >= self.end:
            raise WireError(f"an MQTT packet ends before its {name}")
        self.pos = start + 1
        value = self.data[start]
        if self._notes is not None:
            self.note(start, name, value)
        return value

    def two(self, name: str) -> int:
        """Return a two-byte number."""
        start = self.pos
        value = int.from_bytes(self.take(2, name), "big")
        if self._notes is not None:
            self.note(start, name, value)
        return value

    def four(self, name: str) -> int:
        """Return a four-byte number."""
        start = self.pos
        value = int.from_bytes(self.take(4, name), "big")
        if self._notes is not None:
            self.note(start, name, value)
        return value

    def varint(self, name: str) -> int:
        """Return a variable byte integer."""
        start = self.pos
        value, shift = 0, 0
        while True:
            if self.pos >= self.end:
                raise WireError(f"an MQTT packet ends within its {name}")
            byte = self.data[self.pos]
            self.pos += 1
            value |= (byte & 0x7F) << shift
            if not byte & 0x80:
                break
            shift += 7
            if shift > 21:
                raise WireError(f"the {name} of an MQTT packet has more than four bytes")
        if self._notes is not None:
            self.note(start, name, value)
        return value

    def binary(self, name: str) -> bytes:
        """Return bytes with a two-byte length in front."""
        start = self.pos
        value = self.take(int.from_bytes(self.take(2, name), "big"), name)
        if self._notes is not None:
            self.note(start, name, f"({len(value)} bytes)" if name in SECRET_FIELDS else value.hex())
        return value

    def text(self, name: str) -> str:
        """Return UTF-8 text with a two-byte length in front."""
        start = self.pos
        raw = self.take(int.from_bytes(self.take(2, name), "big"), name)
        try:
            value = raw.decode()
        except UnicodeDecodeError:
            raise WireError(f"the {name} of an MQTT packet is not UTF-8") from None
        if self._notes is not None:
            self.note(start, name, repr(value))
        return value

    def properties(self, version: int, name: str = "properties") -> Fields:
        """Return the properties of version 5; earlier versions have none."""
        if version != V5:
            return {}
        length = self.varint(f"{name} length")
        stop = self.pos + length
        if stop > self.end:
            raise WireError(f"the {name} of an MQTT packet are longer than it")
        found: Fields = {}
        count = 0
        while self.pos < stop:
            count += 1
            start = self.pos
            number = self.varint("property identifier") if self._notes is None else self._quiet_varint()
            if number not in PROPERTIES or count > MAX_PROPERTIES:
                raise WireError(f"an MQTT packet with the property {number}, or with too many")
            key, kind = PROPERTIES[number]
            notes, self._notes = self._notes, None
            value: Any
            if kind == "pair":
                value = [self.text(key), self.text(key)]
            else:
                value = getattr(self, "binary" if kind == "data" else kind)(key)
            self._notes = notes
            if notes is not None:
                shown = f"({len(value)} bytes)" if key in SECRET_FIELDS else value
                self.note(start, key, shown.hex() if isinstance(shown, bytes) else shown)
            if key in REPEATED:
                found.setdefault(key, []).append(value)
            elif key in found:
                raise WireError(f"an MQTT packet with two properties {key}")
            else:
                found[key] = value
        if self.pos != stop:
            raise WireError(f"the {name} of an MQTT packet do not end where they should")
        return found

    def _quiet_varint(self) -> int:
        notes, self._notes = self._notes, None
        value = self.varint("property identifier")
        self._notes = notes
        return value


# --- decoding --------------------------------------------------------------------------------------------------------


def packet_length(data: Buffer, at: int = 0) -> tuple[int, int] | None:
    """Return (header bytes, whole bytes) of the packet at `at`; None while unknown. Errors: WireError."""
    value = 0
    size = len(data)
    for number in range(4):
        place = at + 1 + number
        if place >= size:
            return None
        byte = data[place]
        value |= (byte & 0x7F) << 7 * number
        if not byte & 0x80:
            return number + 2, number + 2 + value
    raise WireError("the remaining length of an MQTT packet has more than four bytes")


def decode_packet(data: Buffer, version: int = V311, notes: list[Note] | None = None) -> Packet:
    """Return the packet that `data` holds, exactly one. `version` matters to all but CONNECT. Errors: WireError."""
    data = bytes(data)
    found = packet_length(data)
    if found is None or found[1] != len(data):
        raise WireError(
            f"{len(data)} bytes are not one MQTT packet",
            advice="" if found is None else f"Its header announces {found[1]} bytes.",
        )
    kind, flags = data[0] >> 4, data[0] & 0xF
    decode = _DECODERS.get(kind)
    if decode is None:
        raise WireError("an MQTT packet of the reserved type 0")
    if kind != PUBLISH and flags != ANSWER_FLAGS.get(kind, 0):
        raise WireError(f"an MQTT {NAMES[kind]} packet with the flags {flags}")
    cursor = Cursor(data, found[0], found[1], notes)
    if notes is not None:
        notes.append((0, 1, "packet type", f"{NAMES[kind]}, flags {flags:04b}"))
        notes.append((1, found[0] - 1, "remaining length", str(found[1] - found[0])))
    fields = decode(cursor, flags, version)
    if cursor.pos != cursor.end:
        raise WireError(f"an MQTT {NAMES[kind]} packet has {cursor.end - cursor.pos} bytes too many")
    return Packet(kind, fields, flags, len(data))


def _connect(cursor: Cursor, flags: int, version: int) -> Fields:
    name = cursor.text("protocol name")
    level = cursor.byte("protocol level")
    if (name, level) not in {("MQIsdp", 3), ("MQTT", 4), ("MQTT", 5)}:
        raise WireError(f"an MQTT CONNECT of the unknown protocol {name!r} level {level}")
    bits = cursor.byte("connect flags")
    if bits & 1 or bits >> 3 & 3 == 3 or (not bits & 4 and bits & 0x38):
        raise WireError(f"an MQTT CONNECT with the connect flags {bits:08b}")
    keep_alive = cursor.two("keep alive")
    fields: Fields = {"version": level, "clean_start": bool(bits & 2), "keep_alive": keep_alive}
    if properties := cursor.properties(level):
        fields["properties"] = properties
    fields["client_id"] = cursor.text("client_id")
    if bits & 4:
        will: Fields = {"qos": bits >> 3 & 3, "retain": bool(bits & 32)}
        if properties := cursor.properties(level, "will properties"):
            will["properties"] = properties
        will["topic"] = cursor.text("will topic")
        will["payload"] = cursor.binary("will payload")
        fields["will"] = will
    if bits & 128:
        fields["username"] = cursor.text("username")
    if bits & 64:
        fields["password"] = cursor.binary("password")
    return fields


def _connack(cursor: Cursor, flags: int, version: int) -> Fields:
    acknowledge = cursor.byte("acknowledge flags")
    if acknowledge > 1:
        raise WireError(f"an MQTT CONNACK with the flags {acknowledge}")
    fields: Fields = {"session_present": bool(acknowledge), "reason": cursor.byte("reason code")}
    if properties := cursor.properties(version):
        fields["properties"] = properties
    return fields


def _publish(cursor: Cursor, flags: int, version: int) -> Fields:
    qos = flags >> 1 & 3
    if qos == 3:
        raise WireError("an MQTT PUBLISH with QoS 3")
    fields: Fields = {"topic": cursor.text("topic"), "qos": qos, "retain": bool(flags & 1), "dup": bool(flags & 8)}
    if qos:
        fields["packet_id"] = cursor.two("packet_id")
    if version == V5 and (properties := cursor.properties(version)):
        fields["properties"] = properties
    start = cursor.pos
    fields["payload"] = cursor.take(cursor.end - start, "payload")
    if cursor._notes is not None:
        cursor.note(start, "payload", f"{cursor.pos - start} bytes")
    return fields


def _acknowledgement(cursor: Cursor, flags: int, version: int) -> Fields:
    fields: Fields = {"packet_id": cursor.two("packet_id")}
    if cursor.pos < cursor.end and version == V5:
        fields["reason"] = cursor.byte("reason code")
        if cursor.pos < cursor.end and (properties := cursor.properties(version)):
            fields["properties"] = properties
    return fields


def _subscribe(cursor: Cursor, flags: int, version: int) -> Fields:
    fields: Fields = {"packet_id": cursor.two("packet_id")}
    if properties := cursor.properties(version):
        fields["properties"] = properties
    filters = []
    while cursor.pos < cursor.end:
        topic = cursor.text("topic filter")
        options = cursor.byte("subscription options")
        if options & 3 == 3 or options >> 6 or (version != V5 and options >> 2):
            raise WireError(f"an MQTT SUBSCRIBE with the options {options:08b}")
        entry: Fields = {"topic": topic, "qos": options & 3}
        if version == V5:
            entry["no_local"] = bool(options & 4)
            entry["retain_as_published"] = bool(options & 8)
            entry["retain_handling"] = options >> 4 & 3
        filters.append(entry)
    if not filters:
        raise WireError("an MQTT SUBSCRIBE without a topic filter")
    fields["filters"] = filters
    return fields


def _suback(cursor: Cursor, flags: int, version: int) -> Fields:
    fields: Fields = {"packet_id": cursor.two("packet_id")}
    if properties := cursor.properties(version):
        fields["properties"] = properties
    reasons = []
    while cursor.pos < cursor.end:
        reasons.append(cursor.byte("reason code"))
    fields["reasons"] = reasons
    return fields


def _unsubscribe(cursor: Cursor, flags: int, version: int) -> Fields:
    fields: Fields = {"packet_id": cursor.two("packet_id")}
    if properties := cursor.properties(version):
        fields["properties"] = properties
    topics = []
    while cursor.pos < cursor.end:
        topics.append(cursor.text("topic filter"))
    if not topics:
        raise WireError("an MQTT UNSUBSCRIBE without a topic filter")
    fields["topics"] = topics
    return fields


def _unsuback(cursor: Cursor, flags: int, version: int) -> Fields:
    if version == V5:
        return _suback(cursor, flags, version)
    return {"packet_id": cursor.two("packet_id")}


def _ping(cursor: Cursor, flags: int, version: int) -> Fields:
    return {}


def _ending(cursor: Cursor, flags: int, version: int) -> Fields:
    if cursor.pos == cursor.end or version != V5:
        return {}
    fields: Fields = {"reason": cursor.byte("reason code")}
    if cursor.pos < cursor.end and (properties := cursor.properties(version)):
        fields["properties"] = properties
    return fields


_DECODERS: dict[int, Callable[[Cursor, int, int], Fields]] = {
    CONNECT: _connect, CONNACK: _connack, PUBLISH: _publish, PUBACK: _acknowledgement, PUBREC: _acknowledgement,
    PUBREL: _acknowledgement, PUBCOMP: _acknowledgement, SUBSCRIBE: _subscribe, SUBACK: _suback,
    UNSUBSCRIBE: _unsubscribe, UNSUBACK: _unsuback, PINGREQ: _ping, PINGRESP: _ping, DISCONNECT: _ending,
    AUTH: _ending,
}  # fmt: skip


class PacketSplitter:
    """Cuts one direction's bytes into packets, across whatever pieces they came in.

    `limit` bytes of one packet are kept; a longer one comes out as its start, and `decode_packet` refuses it: the
    second value of the pair is its true length. After WireError feed no further.
    """

    __slots__ = ("_buffer", "_limit", "_skip", "_whole")

    def __init__(self, limit: int) -> None:
        self._buffer = bytearray()
        self._limit = limit
        self._skip = 0  # bytes of a too long packet still to come
        self._whole = 0

    @property
    def held(self) -> int:
        """Bytes of a packet that is not whole yet."""
        return len(self._buffer)

    @property
    def opening(self) -> int:
        """Type of the packet that is not whole yet; 0 between two packets."""
        return self._buffer[0] >> 4 if self._buffer else 0

    def skip(self, size: int) -> list[tuple[bytes, int]]:
        """Pass over `size` bytes that are not at hand, within a packet that is too long anyhow. Errors: WireError."""
        if size > self._skip:
            raise WireError("bytes are missing that are needed to find the next MQTT packet")
        self._skip -= size
        if self._skip:
            return []
        packet = (bytes(self._buffer), self._whole)
        self._buffer.clear()
        return [packet]

    def feed(self, data: Buffer) -> list[tuple[bytes, int]]:
        """Return the packets that `data` completed, each with its length on the wire. Errors: WireError."""
        packets: list[tuple[bytes, int]] = []
        if self._skip:
            step = min(self._skip, len(data))
            self._skip -= step
            data = data[step:]
            if self._skip:
                return packets
            packets.append((bytes(self._buffer), self._whole))
            self._buffer.clear()
        if self._buffer:
            self._buffer += data
            data = bytes(self._buffer)
            self._buffer.clear()
        pos, end = 0, len(data)
        while pos < end:
            found = packet_length(data, pos)
            if found is None or (pos + found[1] > end and found[1] <= self._limit):
                self._buffer += data[pos:]
                return packets
            whole = found[1]
            if whole > self._limit:
                kept = data[pos : min(end, pos + self._limit)]
                if pos + whole > end:
                    self._buffer += kept
                    self._skip = whole - (end - pos)
                    self._whole = whole
                    return packets
                packets.append((bytes(kept), whole))
            else:
                packets.append((bytes(data[pos : pos + whole]), whole))
            pos += whole
        return packets
