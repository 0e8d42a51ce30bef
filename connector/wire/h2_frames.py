"""HTTP/2 frames: constants, and packing and unpacking of the small control frames (RFC 9113 sections 4 and 6).

Owns: every number of the frame layer, and the layout of each frame but DATA and HEADERS payloads.
In: field values or received bytes. Out: frame bytes, or field values; WireError for bytes of a wrong shape.
Never: keeps state, decides whether a frame is allowed now, touches header compression.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

from connector.errors import WireError

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client sends first (RFC 9113 section 3.4). The edge is the client."""

FRAME_HEADER = Struct(">IBI")
"""Length (24 bit) and type (8) in one word, then flags and stream id: 9 bytes."""
FRAME_HEADER_LENGTH = 9

DATA = 0x0
HEADERS = 0x1
PRIORITY = 0x2
RST_STREAM = 0x3
SETTINGS = 0x4
PUSH_PROMISE = 0x5
PING = 0x6
GOAWAY = 0x7
WINDOW_UPDATE = 0x8
CONTINUATION = 0x9

FLAG_END_STREAM = 0x1
FLAG_ACK = 0x1
FLAG_END_HEADERS = 0x4
FLAG_PADDED = 0x8
FLAG_PRIORITY = 0x20

STREAM_ID_MASK = 0x7FFFFFFF
WINDOW_LIMIT = 0x7FFFFFFF
"""Largest legal flow-control window and window increment."""

DEFAULT_WINDOW = 65_535
DEFAULT_MAX_FRAME_SIZE = 16_384
LARGEST_MAX_FRAME_SIZE = 0xFFFFFF
DEFAULT_HEADER_TABLE_SIZE = 4_096

_WORD = Struct(">I")
_SETTING = Struct(">HI")
_GOAWAY = Struct(">II")


class ErrorCode(IntEnum):
    """Why a stream or a connection ended (RFC 9113 section 7)."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class Setting(IntEnum):
    """Names of SETTINGS parameters (RFC 9113 section 6.5.2; RFC 9218 for the last)."""

    HEADER_TABLE_SIZE = 0x1
    ENABLE_PUSH = 0x2
    MAX_CONCURRENT_STREAMS = 0x3
    INITIAL_WINDOW_SIZE = 0x4
    MAX_FRAME_SIZE = 0x5
    MAX_HEADER_LIST_SIZE = 0x6
    ENABLE_CONNECT_PROTOCOL = 0x8
    NO_RFC7540_PRIORITIES = 0x9


def error_name(code: int) -> str:
    """Return the name of an error code, or its number when it has none."""
    try:
        return ErrorCode(code).name
    except ValueError:
        return f"0x{code:x}"


def encode_frame(kind: int, flags: int, stream_id: int, payload: bytes | bytearray | memoryview = b"") -> bytes:
    """Pack one whole frame."""
    return FRAME_HEADER.pack(len(payload) << 8 | kind, flags, stream_id) + payload


def encode_settings(settings: list[tuple[int, int]]) -> bytes:
    """Pack a SETTINGS frame with the given (id, value) pairs in their order."""
    return encode_frame(SETTINGS, 0, 0, b"".join([_SETTING.pack(key, value) for key, value in settings]))


SETTINGS_ACK = encode_frame(SETTINGS, FLAG_ACK, 0)


def encode_window_update(stream_id: int, increment: int) -> bytes:
    """Pack a WINDOW_UPDATE frame; stream 0 is the connection."""
    return encode_frame(WINDOW_UPDATE, 0, stream_id, _WORD.pack(increment))


def encode_rst_stream(stream_id: int, code: int) -> bytes:
    """Pack a RST_STREAM frame."""
    return encode_frame(RST_STREAM, 0, stream_id, _WORD.pack(code))


def encode_goaway(last_stream_id: int, code: int, debug: bytes = b"") -> bytes:
    """Pack a GOAWAY frame."""
    return encode_frame(GOAWAY, 0, 0, _GOAWAY.pack(last_stream_id, code) + debug)


def encode_ping(payload: bytes) -> bytes:
    """Pack a PING; the peer returns the eight bytes."""
    return encode_frame(PING, 0, 0, payload)


def encode_ping_ack(payload: bytes) -> bytes:
    """Pack the answer to a PING with these eight bytes."""
    return encode_frame(PING, FLAG_ACK, 0, payload)


def decode_word(payload: bytes) -> int:
    """Return the 32-bit number that a RST_STREAM or WINDOW_UPDATE payload is."""
    if len(payload) != 4:
        raise WireError(f"a payload of {len(payload)} bytes where 4 are due")
    value: int = _WORD.unpack(payload)[0]
    return value


def decode_settings(payload: bytes) -> list[tuple[int, int]]:
    """Return the (id, value) pairs of a SETTINGS payload, unknown ids included, in their order."""
    if len(payload) % 6:
        raise WireError(f"a SETTINGS payload of {len(payload)} bytes is not a multiple of 6")
    return list(_SETTING.iter_unpack(payload))


def decode_goaway(payload: bytes) -> tuple[int, int, bytes]:
    """Return (last stream id, error code, debug data) of a GOAWAY payload."""
    if len(payload) < 8:
        raise WireError(f"a GOAWAY payload of {len(payload)} bytes is shorter than 8")
    last, code = _GOAWAY.unpack_from(payload)
    return last & STREAM_ID_MASK, code, payload[8:]


def strip_padding(payload: bytes) -> bytes:
    """Return what a PADDED payload holds between its pad length and its padding (RFC 9113 section 6.1)."""
    if not payload:
        raise WireError("a padded frame without a pad length")
    end = len(payload) - payload[0]
    if end < 1:
        raise WireError(f"{payload[0]} bytes of padding in a frame of {len(payload)}")
    return payload[1:end]
