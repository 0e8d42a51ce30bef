"""QUIC datagrams of version 3: the first byte says what follows (proto/README.md, "Datagrams, version 3").

Owns: layout and limits; every length is checked. In: whole datagrams (untrusted). Out: values; bytes.
Never: looks into a payload. The two kinds of the hot path, payload and ICMP, are cut where they are used:
`PAYLOAD, request ID, payload` and `ICMP, packet`.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from connector.errors import WireError

REGISTRATION: Final = 0x00
PAYLOAD: Final = 0x01
ICMP: Final = 0x02
RESPONSE: Final = 0x03

ID_SIZE: Final = 16
PAYLOAD_HEAD: Final = 1 + ID_SIZE
"""Bytes before the payload."""

MAX_PAYLOAD: Final = 1280
"""Bytes of one UDP payload, or of one IP packet. Precedent: cloudflared."""

MAX_RESPONSE_TEXT: Final = 1260
"""Bytes of the text in a response."""

OK: Final = 0x00
UNREACHABLE: Final = 0x01
UNABLE_TO_BIND: Final = 0x02
TOO_MANY_FLOWS: Final = 0x03
ERROR: Final = 0xFF
"""Response codes; cloudflared sends the first, the third and the fourth."""

_IPV6, _TRACED, _BUNDLED = 1, 2, 4
_HEAD = struct.Struct("!BBHH16s")
_RESPONSE_HEAD = struct.Struct("!BB16sH")


class Registration(NamedTuple):
    """The edge wants a flow to `address` (4 or 16 bytes), `port`. `idle_seconds` 0 means the default."""

    request_id: bytes
    address: bytes
    port: int
    idle_seconds: int = 0
    payload: bytes | None = None
    """The first payload, where it came along; empty is not the same as None."""
    traced: bool = False


class Response(NamedTuple):
    """The connector's answer to a registration."""

    request_id: bytes
    code: int
    text: str = ""


def encode_registration(flow: Registration) -> bytes:
    """Return the datagram of a registration."""
    flags = (_IPV6 if len(flow.address) == 16 else 0) | (_TRACED if flow.traced else 0)
    flags |= _BUNDLED if flow.payload is not None else 0
    head = _HEAD.pack(REGISTRATION, flags, flow.port, flow.idle_seconds, flow.request_id)
    return head + flow.address + (flow.payload or b"")


def decode_registration(data: bytes) -> Registration:
    """Read a registration. Errors: WireError."""
    if len(data) < _HEAD.size or data[0] != REGISTRATION:
        raise WireError(f"a flow registration of {len(data)} bytes; it needs at least {_HEAD.size + 4}")
    _, flags, port, idle, request_id = _HEAD.unpack_from(data)
    end = _HEAD.size + (16 if flags & _IPV6 else 4)
    if len(data) < end:
        raise WireError(f"a flow registration that ends within the address, after {len(data)} bytes")
    payload = None
    if flags & _BUNDLED:
        payload = data[end:]
        if len(payload) > MAX_PAYLOAD:
            raise WireError(f"a flow registration with a payload of {len(payload)} bytes, more than {MAX_PAYLOAD}")
    return Registration(request_id, data[_HEAD.size : end], port, idle, payload, bool(flags & _TRACED))


def encode_payload(request_id: bytes, payload: bytes) -> bytes:
    """Return the datagram of one UDP payload."""
    return b"%c%b%b" % (PAYLOAD, request_id, payload)


def encode_icmp(packet: bytes) -> bytes:
    """Return the datagram of one IP packet."""
    return b"%c%b" % (ICMP, packet)


def encode_response(answer: Response) -> bytes:
    """Return the datagram of a response; a text that is too long is cut at a character."""
    text = answer.text.encode()[:MAX_RESPONSE_TEXT].decode(errors="ignore").encode()
    return _RESPONSE_HEAD.pack(RESPONSE, answer.code, answer.request_id, len(text)) + text


def decode_response(data: bytes) -> Response:
    """Read a response. Errors: WireError."""
    if len(data) < _RESPONSE_HEAD.size or data[0] != RESPONSE:
        raise WireError(f"a registration response of {len(data)} bytes; it needs at least {_RESPONSE_HEAD.size}")
    _, code, request_id, size = _RESPONSE_HEAD.unpack_from(data)
    text = data[_RESPONSE_HEAD.size :]
    if size > MAX_RESPONSE_TEXT or len(text) != size:
        raise WireError(f"a registration response that announces {size} bytes of text and holds {len(text)}")
    return Response(request_id, code, text.decode(errors="replace"))
