"""QUIC datagrams of version 2: what follows the payload says what it is (proto/README.md, "Datagrams, version 2").

Owns: layout and limits. In: whole datagrams (untrusted). Out: kind, tail, payload; bytes.
Never: looks into a payload.
"""

from __future__ import annotations

from typing import Final

from connector.errors import WireError

UDP: Final = 0x00
"""payload, session ID, 00: one UDP payload of a session; both directions."""
IP: Final = 0x01
"""packet, 01: one IP packet; both directions."""
TRACED_IP: Final = 0x02
"""packet, identity, 02: one IP packet whose way is traced; from the edge."""
SPANS: Final = 0x03
"""spans, identity, 03: what tracing recorded; to the edge."""

ID_SIZE: Final = 16
IDENTITY_SIZE: Final = 25
"""Trace ID, span ID, flags."""

MAX_PAYLOAD: Final = 1280
"""Bytes of one UDP payload towards the edge. Precedent: cloudflared."""

MAX_DATAGRAM: Final = 1350
"""Bytes of a whole datagram towards the edge. Precedent: cloudflared."""

_TAILS: Final = {UDP: ID_SIZE, IP: 0, TRACED_IP: IDENTITY_SIZE, SPANS: IDENTITY_SIZE}


def decode(data: bytes) -> tuple[int, bytes, bytes]:
    """Return kind, tail (session ID, identity, or nothing) and payload. Errors: WireError."""
    if not data:
        raise WireError("an empty datagram")
    kind = data[-1]
    size = _TAILS.get(kind)
    if size is None:
        raise WireError(f"a datagram of unknown type {kind:#04x}")
    end = len(data) - 1 - size
    if end < 0:
        raise WireError(f"a datagram of type {kind:#04x} with {len(data)} bytes; it needs at least {size + 1}")
    return kind, data[end:-1], data[:end]


def encode(kind: int, tail: bytes, payload: bytes) -> bytes:
    """Return a datagram; `tail` has the length that `kind` asks for."""
    return b"%b%b%c" % (payload, tail, kind)


def decode_identity(identity: bytes) -> str:
    """Return a traced packet's context as text: `<trace id>:<span id>:0:<flags>`. Errors: WireError."""
    if len(identity) != IDENTITY_SIZE:
        raise WireError(f"a trace identity of {len(identity)} bytes instead of {IDENTITY_SIZE}")
    span = int.from_bytes(identity[16:24])
    return f"{identity[:16].hex()}:{span:x}:0:{identity[24]:x}"


def encode_identity(text: str) -> bytes:
    """Return the 25 bytes of a context. Errors: WireError."""
    parts = text.split(":")
    try:
        if len(parts) != 4:
            raise ValueError
        return int(parts[0], 16).to_bytes(16) + int(parts[1], 16).to_bytes(8) + (int(parts[3], 16) & 0xFF).to_bytes(1)
    except (ValueError, OverflowError):
        raise WireError("a trace context that is not TRACE:SPAN:PARENT:FLAGS in hexadecimal") from None
