"""Captures for Wireshark: pcapng with the TLS secrets inside, made from what the capture holds.

Owns: the pcapng blocks, IP, TCP and UDP headers, and how streams become HTTP/2 or QUIC payload again.
In: a CaptureModel. Out: bytes of a pcapng file. Never: unmasks; writes packets that really were on the wire (their
secrets could not be masked): times and contents are the capture's, addresses, windows and packet cuts are made up.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from connector.inspector.capnp_values import encode_capnp
from connector.inspector.capture import CapturedStream, CaptureModel, Item
from connector.inspector.decode import DATA_PREAMBLE, RPC_PREAMBLE
from connector.inspector.synthetic_tls import QuicConnection, RecordLayer, Secrets, tls_handshake
from connector.wire import websocket
from connector.wire.h2_frames import (
    DATA,
    FLAG_END_HEADERS,
    FLAG_END_STREAM,
    HEADERS,
    PREFACE,
    SETTINGS_ACK,
    encode_frame,
    encode_settings,
)
from connector.wire.h2_headers import (
    META_CONNECTOR,
    META_ORIGIN,
    RESPONSE_HEADERS,
    RESPONSE_META,
    encode_serialised_headers,
)
from connector.wire.h2_hpack import hpack_literal

CONNECTOR, EDGE = 0, 1
"""Directions: from the connector (which dials: the TLS client), from the edge."""

CONNECTOR_ADDRESS = ipaddress.IPv4Address("192.0.2.1")
EDGE_ADDRESS = ipaddress.IPv4Address("192.0.2.2")
"""From the documentation range, where the capture's own addresses are not IPv4."""

LARGEST_SEGMENT = 32_768
LARGEST_DATA = 16_384

Piece = tuple[float, int, int, bytes, bool]
"""Time, direction, stream, payload, end of stream."""


def to_pcapng(model: CaptureModel) -> bytes:
    """Return the file: one section, the secrets of every link, then its packets in the order of time."""
    packets: list[tuple[float, bytes]] = []
    keylog: list[str] = []
    for number, (key, link) in enumerate(_links(model)):
        secrets = Secrets(f"{key} {link.get('remote')} {number}".encode())
        keylog.append(secrets.keylog())
        started = model.wall(key[0], link.get("at", 0.0))
        make = _quic_packets if link.get("protocol") == "quic" else _tls_packets
        packets += make(secrets, number, link, started, _pieces(model, key, link.get("protocol") == "quic"))
    packets.sort(key=lambda packet: packet[0])
    out = bytearray(_section())
    if keylog:
        out += _secrets("".join(keylog).encode())
    for seconds, packet in packets:
        out += _packet(seconds, packet)
    return bytes(out)


def _links(model: CaptureModel) -> list[tuple[tuple[int, Any], dict[str, Any]]]:
    """Every link of the file, and one for streams whose link it does not name."""
    found = dict(model.links)
    for stream in model.streams.values():
        key = (stream.session, stream.open.get("link"))
        if key not in found:
            found[key] = {"protocol": stream.open.get("transport"), "at": stream.open.get("at", 0.0), "remote": ""}
    return sorted(found.items(), key=lambda item: (item[0][0], item[1].get("at", 0.0)))


# --- what the streams carried ----------------------------------------------------------------------------------------


def _pieces(model: CaptureModel, key: tuple[int, Any], quic: bool) -> list[Piece]:
    session, link = key
    found: list[Piece] = []
    used = {
        stream.open["stream"]
        for stream in model.streams.values()
        if (stream.session, stream.open.get("link")) == key and isinstance(stream.open.get("stream"), int)
    }
    control_stream = 0 if quic else 1
    spare = max(used, default=control_stream) + 4
    for stream in model.streams.values():
        if (stream.session, stream.open.get("link")) != key or stream.open.get("replay"):
            continue
        number = stream.open.get("stream")
        if not isinstance(number, int):
            number, spare = spare, spare + 4
        found += _quic_stream(model, stream, number) if quic else _h2_stream(model, stream, number)
    found += _control(model, session, link, control_stream, quic)
    found.sort(key=lambda piece: piece[0])
    return found


def _control(model: CaptureModel, session: int, link: Any, stream: int, quic: bool) -> Iterator[Piece]:
    opened: set[str] = set()
    for number, item in model.control:
        fields = item.fields
        if number != session or fields.get("link") != link or not item.payload:
            continue
        where = str(fields.get("where", ""))
        at = model.wall(session, fields.get("at", 0.0))
        direction = _direction(model, session, bool(fields.get("out")))
        target = stream
        if where.startswith("rpc ") and where[4:].isdigit():
            target = int(where[4:])
            if where not in opened:
                yield at, direction, target, RPC_PREAMBLE, False
        elif not quic and where not in opened:
            block = [
                (b":method", b"POST"), (b":scheme", b"https"), (b":authority", b"edge.invalid"), (b":path", b"/"),
                (b"cf-cloudflared-proxy-connection-upgrade", b"control-stream"),
            ]  # fmt: skip
            yield at - 1e-6, EDGE, target, _head(block, target), False
            yield at - 1e-6, CONNECTOR, target, _head([(b":status", b"200")], target), False
        opened.add(where)
        if quic:
            yield at, direction, target, item.payload, False
        else:
            for frame in _data(target, item.payload, end=False):
                yield at, direction, target, frame, False


def _direction(model: CaptureModel, session: int, outgoing: bool) -> int:
    role = model.sessions[session - 1].get("role") if 0 < session <= len(model.sessions) else "connector"
    return (CONNECTOR if outgoing else EDGE) if role != "edge" else (EDGE if outgoing else CONNECTOR)


def _times(model: CaptureModel, stream: CapturedStream) -> tuple[float, float, float]:
    """Wall clock of the opening, the head and the end."""
    start = stream.open.get("wall") or model.wall(stream.session, stream.open.get("at", 0.0))
    head = model.wall(stream.session, stream.head["at"]) if stream.head else start
    end = model.wall(stream.session, stream.end["at"]) if stream.end else head
    return float(start), max(head, start), max(end, head, start)


def _frames(model: CaptureModel, stream: CapturedStream) -> Iterator[tuple[float, int, bytes]]:
    """The WebSocket frames, or bare MQTT, of a stream: time, direction, bytes."""
    for item in stream.frames:
        fields = item.fields
        payload = item.payload
        if stream.open.get("kind") == "websocket":
            mask = b"\0\0\0\0" if not fields.get("way") else b""
            payload = websocket.encode_frame(
                websocket.Frame(
                    int(fields.get("opcode", 2)) & 15, payload, fin=bool(fields.get("fin", True)), mask=mask
                )
            )
        yield model.wall(stream.session, fields.get("at", 0.0)), CONNECTOR if fields.get("way") else EDGE, payload


def _h2_stream(model: CaptureModel, stream: CapturedStream, number: int) -> Iterator[Piece]:
    opened, answered, ended = _times(model, stream)
    websockets = stream.open.get("kind") == "websocket"
    fields = [
        (b":method", _raw(stream.open.get("method"))), (b":scheme", _raw(stream.open.get("scheme") or "https")),
        (b":authority", _raw(stream.open.get("host"))), (b":path", _raw(stream.open.get("target") or "/")),
        *_pairs(stream.open.get("headers", [])),
    ]  # fmt: skip
    if websockets:
        fields.append((b"cf-cloudflared-proxy-connection-upgrade", b"websocket"))
    up, down = stream.bodies
    yield opened, EDGE, number, _head(fields, number, end=not up and not websockets), False
    for frame in _data(number, up, end=not websockets):
        yield opened, EDGE, number, frame, False
    if not stream.head:
        return
    status = int(stream.head.get("status", 0)) or 502
    meta = META_ORIGIN if stream.head.get("source") == "origin" else META_CONNECTOR
    response = [
        (b":status", b"200" if status == 101 else str(status).encode()),
        (RESPONSE_HEADERS, encode_serialised_headers(_pairs(stream.head.get("headers", []), lower=False))),
        (RESPONSE_META, meta),
    ]  # fmt: skip
    yield (
        answered,
        CONNECTOR,
        number,
        _head(response, number, end=not down and not stream.frames and bool(stream.end)),
        False,
    )
    for at, direction, payload in _frames(model, stream):
        for frame in _data(number, payload, end=False):
            yield max(at, answered), direction, number, frame, False
    for frame in _data(number, down, end=bool(stream.end)):
        yield ended, CONNECTOR, number, frame, False


def _quic_stream(model: CaptureModel, stream: CapturedStream, number: int) -> Iterator[Piece]:
    opened, answered, ended = _times(model, stream)
    kind = {"http": 0, "websocket": 1, "tcp": 2}.get(str(stream.open.get("kind")), 0)
    metadata = [
        {"key": "HttpMethod", "val": stream.open.get("method", "")},
        {"key": "HttpHost", "val": stream.open.get("host", "")},
        *({"key": f"HttpHeader:{name}", "val": value} for name, value in stream.open.get("headers", [])),
    ]  # fmt: skip
    request = encode_capnp({"type": kind, "dest": stream.url, "metadata": metadata}, "ConnectRequest")
    up, down = stream.bodies
    whole = kind == 0 and bool(stream.end)
    yield opened, EDGE, number, DATA_PREAMBLE + b"01" + request + up, whole
    if not stream.head:
        return
    metadata = [
        {"key": "HttpStatus", "val": str(stream.head.get("status", ""))},
        *({"key": f"HttpHeader:{name}", "val": value} for name, value in stream.head.get("headers", [])),
    ]
    response = encode_capnp({"metadata": metadata}, "ConnectResponse")
    yield answered, CONNECTOR, number, DATA_PREAMBLE + b"01" + response, False
    for at, direction, payload in _frames(model, stream):
        yield max(at, answered), direction, number, payload, False
    if stream.end:
        yield ended, CONNECTOR, number, down, True
    elif down:
        yield ended, CONNECTOR, number, down, False


def _head(fields: Iterable[tuple[bytes, bytes]], stream: int, *, end: bool = False) -> bytes:
    block = b"".join(hpack_literal(name, value) for name, value in fields)
    return encode_frame(HEADERS, FLAG_END_HEADERS | (FLAG_END_STREAM if end else 0), stream, block)


def _data(stream: int, payload: bytes, *, end: bool) -> Iterator[bytes]:
    for start in range(0, len(payload), LARGEST_DATA):
        part = payload[start : start + LARGEST_DATA]
        last = end and start + LARGEST_DATA >= len(payload)
        yield encode_frame(DATA, FLAG_END_STREAM if last else 0, stream, part)


def _raw(text: Any) -> bytes:
    return str(text or "").encode()


def _pairs(headers: list[list[str]], *, lower: bool = True) -> list[tuple[bytes, bytes]]:
    return [(_raw(name).lower() if lower else _raw(name), _raw(value)) for name, value in headers]


# --- packets ---------------------------------------------------------------------------------------------------------


class _Wire:
    """Addresses of one link; makes IP packets."""

    def __init__(self, number: int, remote: str) -> None:
        host, _, port = remote.rpartition(":")
        try:
            address = ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            address = EDGE_ADDRESS
        edge = address if isinstance(address, ipaddress.IPv4Address) else EDGE_ADDRESS
        local = edge if edge.is_loopback else CONNECTOR_ADDRESS
        self.ports = (40_000 + number % 20_000, int(port) if port.isdigit() and 0 < int(port) < 65_536 else 7844)
        self.addresses = (local.packed, edge.packed)
        self.sequence = [1_000, 2_000]

    def ip(self, direction: int, protocol: int, payload: bytes) -> bytes:
        source, target = self.addresses[direction], self.addresses[1 - direction]
        head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 0, 0x4000, 64, protocol, 0, source, target)
        checksum = _checksum(head)
        return head[:10] + checksum.to_bytes(2, "big") + head[12:] + payload

    def tcp(self, direction: int, flags: int, data: bytes = b"") -> bytes:
        ports = (self.ports[direction], self.ports[1 - direction])
        own, other = self.sequence[direction], self.sequence[1 - direction]
        head = struct.pack(">HHIIBBHHH", *ports, own, other if flags & 0x10 else 0, 0x50, flags, 65_535, 0, 0)
        self.sequence[direction] += len(data) + (1 if flags & 3 else 0)
        pseudo = self.addresses[direction] + self.addresses[1 - direction] + struct.pack(">BBH", 0, 6, 20 + len(data))
        checksum = _checksum(pseudo + head + data)
        return self.ip(direction, 6, head[:16] + checksum.to_bytes(2, "big") + head[18:] + data)

    def udp(self, direction: int, data: bytes) -> bytes:
        head = struct.pack(">HHHH", self.ports[direction], self.ports[1 - direction], 8 + len(data), 0)
        return self.ip(direction, 17, head + data)


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _tls_packets(
    secrets: Secrets, number: int, link: dict[str, Any], started: float, pieces: list[Piece]
) -> Iterator[tuple[float, bytes]]:
    wire = _Wire(number, str(link.get("remote", "")))
    yield started, wire.tcp(CONNECTOR, 0x02)
    yield started, wire.tcp(EDGE, 0x12)
    yield started, wire.tcp(CONNECTOR, 0x10)
    for direction, data in tls_handshake(secrets, "h2.cftunnel.com", b"h2"):
        yield started, wire.tcp(direction, 0x18, data)
    layers = (RecordLayer(secrets.traffic[0]), RecordLayer(secrets.traffic[1]))
    yield started, wire.tcp(EDGE, 0x18, layers[EDGE].seal(PREFACE + encode_settings([(4, 1 << 20)])))
    yield started, wire.tcp(CONNECTOR, 0x18, layers[CONNECTOR].seal(encode_settings([(4, 1 << 20)]) + SETTINGS_ACK))
    for at, direction, _, payload, _ in pieces:
        sealed = layers[direction].seal(payload)
        for start in range(0, len(sealed), LARGEST_SEGMENT):
            yield max(at, started), wire.tcp(direction, 0x18, sealed[start : start + LARGEST_SEGMENT])


def _quic_packets(
    secrets: Secrets, number: int, link: dict[str, Any], started: float, pieces: list[Piece]
) -> Iterator[tuple[float, bytes]]:
    wire = _Wire(number, str(link.get("remote", "")))
    connection = QuicConnection(secrets)
    for direction, data in connection.handshake("quic.cftunnel.com", b"argotunnel"):
        yield started, wire.udp(direction, data)
    for at, direction, stream, payload, fin in pieces:
        for packet in connection.stream(direction, stream, payload, fin=fin):
            yield max(at, started), wire.udp(direction, packet)


# --- blocks (draft-ietf-opsawg-pcapng) -------------------------------------------------------------------------------


def _block(kind: int, body: bytes) -> bytes:
    body += b"\0" * (-len(body) % 4)
    size = 12 + len(body)
    return struct.pack("<II", kind, size) + body + struct.pack("<I", size)


def _section() -> bytes:
    """Section header and one interface of raw IP (link type 101)."""
    section = _block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    return section + _block(1, struct.pack("<HHI", 101, 0, 0))


def _secrets(keylog: bytes) -> bytes:
    """Decryption secrets: TLS key log."""
    return _block(0x0000000A, struct.pack("<II", 0x544C534B, len(keylog)) + keylog)


def _packet(seconds: float, data: bytes) -> bytes:
    stamp = int(seconds * 1_000_000)
    return _block(6, struct.pack("<IIIII", 0, stamp >> 32, stamp & 0xFFFFFFFF, len(data), len(data)) + data)


__all__ = ["Item", "to_pcapng"]
