"""IP packets that carry ICMP: read what the edge sends, make what goes back (RFC 791, 792, 4443, 8200).

Owns: the two IP headers, checksums, echo messages, Time Exceeded. In: whole packets (untrusted). Out: values; bytes.
Never: handles fragments or IPv6 extension headers: the edge sends none; such packets are refused by name.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from connector.errors import WireError

ICMP4: Final = 1
ICMP6: Final = 58
"""Protocol numbers."""

ECHO4: Final = 8
ECHO4_REPLY: Final = 0
ECHO6: Final = 128
ECHO6_REPLY: Final = 129
EXCEEDED4: Final = 11
EXCEEDED6: Final = 3
"""Message types."""

DEFAULT_TTL: Final = 255
QUOTE4: Final = 576 - 20 - 8
QUOTE6: Final = 1280 - 40 - 8
"""Bytes of the original packet that a Time Exceeded quotes (RFC 1812 section 4.3.2.3, RFC 4443 section 2.4)."""

ECHO_HEAD: Final = 8

_IP4 = struct.Struct("!BBHHHBBH4s4s")
_IP6 = struct.Struct("!IHBB16s16s")
_ICMP = struct.Struct("!BBHHH")


class EchoRequest(NamedTuple):
    """An echo request with its addresses (packed). `message` is the ICMP message from its type on."""

    source: bytes
    destination: bytes
    ttl: int
    identifier: int
    sequence: int
    message: bytes


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071)."""
    if len(data) & 1:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def decode_echo_request(packet: bytes) -> EchoRequest:
    """Read an IPv4 or IPv6 packet with an echo request. Errors: WireError, for everything else that a packet may be."""
    version = packet[0] >> 4 if packet else 0
    if version == 4:
        source, destination, ttl, message = _decode_ip4(packet)
        wanted = ECHO4
    elif version == 6:
        source, destination, ttl, message = _decode_ip6(packet)
        wanted = ECHO6
    else:
        raise WireError(f"a packet of IP version {version}" if packet else "an empty packet")
    if len(message) < ECHO_HEAD:
        raise WireError(f"an ICMP message of {len(message)} bytes; an echo request has at least {ECHO_HEAD}")
    kind, code, _, identifier, sequence = _ICMP.unpack_from(message)
    if kind != wanted or code:
        raise WireError(f"an ICMP message of type {kind}, code {code}; only echo requests are served")
    return EchoRequest(source, destination, ttl, identifier, sequence, message)


def _decode_ip4(packet: bytes) -> tuple[bytes, bytes, int, bytes]:
    if len(packet) < _IP4.size:
        raise WireError(f"an IPv4 packet of {len(packet)} bytes")
    first, _, total, _, fragment, ttl, protocol, _, source, destination = _IP4.unpack_from(packet)
    head = (first & 15) * 4
    if head < _IP4.size or not head <= total <= len(packet):
        raise WireError(f"an IPv4 packet of {len(packet)} bytes whose header says {head} and {total}")
    if fragment & 0x3FFF:
        raise WireError("a fragment of an IPv4 packet")
    if protocol != ICMP4:
        raise WireError(f"an IPv4 packet of protocol {protocol}; only ICMP is served")
    return source, destination, ttl, packet[head:total]


def _decode_ip6(packet: bytes) -> tuple[bytes, bytes, int, bytes]:
    if len(packet) < _IP6.size:
        raise WireError(f"an IPv6 packet of {len(packet)} bytes")
    _, length, protocol, ttl, source, destination = _IP6.unpack_from(packet)
    if _IP6.size + length > len(packet):
        raise WireError(f"an IPv6 packet of {len(packet)} bytes whose header says {_IP6.size + length}")
    if protocol != ICMP6:
        raise WireError(f"an IPv6 packet whose header is followed by {protocol}; only ICMPv6 is served")
    return source, destination, ttl, packet[_IP6.size : _IP6.size + length]


def encode_message(kind: int, identifier: int, sequence: int, data: bytes, code: int = 0) -> bytes:
    """Return an ICMP message with a checksum of 0."""
    return _ICMP.pack(kind, code, 0, identifier, sequence) + data


def with_identifier(message: bytes, identifier: int, kind: int) -> bytes:
    """Return an echo message with another identifier and type, the checksum 0."""
    return _ICMP.pack(kind, 0, 0, identifier, int.from_bytes(message[6:8])) + message[ECHO_HEAD:]


def encode_packet(source: bytes, destination: bytes, message: bytes, ttl: int = DEFAULT_TTL) -> bytes:
    """Return an IP packet around an ICMP message whose checksum field is 0; both checksums are made here."""
    if len(source) == 4:
        message = message[:2] + checksum(message).to_bytes(2) + message[4:]
        head = _IP4.pack(0x45, 0, _IP4.size + len(message), 0, 0, ttl, ICMP4, 0, source, destination)
        return head[:10] + checksum(head).to_bytes(2) + head[12:] + message
    pseudo = source + destination + struct.pack("!II", len(message), ICMP6)
    message = message[:2] + checksum(pseudo + message).to_bytes(2) + message[4:]
    return _IP6.pack(6 << 28, len(message), ICMP6, ttl, source, destination) + message


def encode_time_exceeded(packet: bytes, echo: EchoRequest, source: bytes) -> bytes:
    """Return the packet that tells `echo`'s sender that its TTL ran out at `source`; `packet` is what it had sent."""
    if len(source) == 4:
        message = encode_message(EXCEEDED4, 0, 0, packet[:QUOTE4])
    else:
        message = encode_message(EXCEEDED6, 0, 0, packet[:QUOTE6])
    return encode_packet(source, echo.source, message)
