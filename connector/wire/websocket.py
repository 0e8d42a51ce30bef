"""WebSocket frames (RFC 6455 section 5): bytes <-> frames, in either direction.

Owns: the frame layout, masking, and cutting a byte stream into frames.
In: bytes as they came (untrusted), in any pieces. Out: Frame values, or frame bytes; WireError.
Never: answers a frame, joins fragments, inflates (the inspector does), or is used to carry traffic: the proxy passes
WebSocket bytes on unread.
"""

from __future__ import annotations

import struct

from connector.errors import WireError

Buffer = bytes | bytearray | memoryview

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
OPCODES = {CONTINUATION: "continuation", TEXT: "text", BINARY: "binary", CLOSE: "close", PING: "ping", PONG: "pong"}

LARGEST_HEADER = 14
"""Bytes of a header at most: 2, 8 of extended length, 4 of masking key."""

KEPT_PAYLOAD = 65_536
"""Bytes of one frame's payload that a splitter keeps; what is longer is counted but not kept. Frames of MQTT and of
chats are far smaller; a browser's largest is 128 KiB."""

_SHORT = struct.Struct(">H")
_LONG = struct.Struct(">Q")


class Frame:
    """One frame. `payload` is unmasked and may be shorter than `length` when the rest was not kept."""

    __slots__ = ("fin", "length", "mask", "offset", "opcode", "payload", "rsv", "size")

    def __init__(
        self,
        opcode: int,
        payload: bytes,
        *,
        fin: bool = True,
        rsv: int = 0,
        mask: bytes = b"",
        length: int = -1,
        offset: int = 0,
        size: int = 0,
    ) -> None:
        self.opcode = opcode
        self.payload = payload
        self.fin = fin
        self.rsv = rsv
        """The three reserved bits as a number; 4 (RSV1) marks a compressed message."""
        self.mask = mask
        """Empty, or four bytes."""
        self.length = len(payload) if length < 0 else length
        """Bytes of payload on the wire."""
        self.offset = offset
        """Where the frame begins in its direction's byte stream."""
        self.size = size
        """Bytes of the whole frame on the wire."""

    def __repr__(self) -> str:
        return f"<Frame {opcode_name(self.opcode)} {self.length} bytes{'' if self.fin else ' more'}>"


def opcode_name(opcode: int) -> str:
    """Return the name of an opcode, or `reserved-N`."""
    return OPCODES.get(opcode, f"reserved-{opcode}")


def apply_mask(data: bytes, mask: bytes) -> bytes:
    """Return `data` with the masking key applied; masking and unmasking are the same."""
    size = len(data)
    if not size or not mask:
        return data
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")


def encode_frame(frame: Frame) -> bytes:
    """Return the bytes of a frame; its payload must be whole. Errors: WireError."""
    size = len(frame.payload)
    if frame.opcode & 8 and (size > 125 or not frame.fin):
        raise WireError("a control frame has at most 125 bytes and is never cut in pieces")
    if len(frame.mask) not in {0, 4} or not 0 <= frame.opcode <= 15 or not 0 <= frame.rsv <= 7:
        raise WireError("a mask has four bytes, an opcode four bits, and there are three reserved bits")
    first = (0x80 if frame.fin else 0) | frame.rsv << 4 | frame.opcode
    masked = 0x80 if frame.mask else 0
    if size < 126:
        head = bytes((first, masked | size))
    elif size < 65_536:
        head = bytes((first, masked | 126)) + _SHORT.pack(size)
    else:
        head = bytes((first, masked | 127)) + _LONG.pack(size)
    return head + frame.mask + apply_mask(frame.payload, frame.mask)


def header_length(data: Buffer, at: int = 0) -> int | None:
    """Return the bytes of the header that starts at `at`; None while its second byte is missing."""
    if len(data) - at < 2:
        return None
    second = data[at + 1]
    short = second & 0x7F
    return 2 + (2 if short == 126 else 8 if short == 127 else 0) + (4 if second & 0x80 else 0)


class FrameSplitter:
    """Cuts one direction's bytes into frames. Call `feed` with every chunk, in order; holds one frame at most.

    After WireError the direction is not understandable any more: feed no further.
    """

    __slots__ = ("_buffer", "_frame", "_left", "_limit", "_payload", "position")

    def __init__(self, limit: int = KEPT_PAYLOAD) -> None:
        self._buffer = bytearray()  # a header that is not whole
        self._limit = limit
        self._frame: Frame | None = None  # the one whose payload is coming
        self._payload = bytearray()
        self._left = 0
        self.position = 0
        """Bytes taken so far."""

    @property
    def held(self) -> int:
        """Bytes that wait here."""
        return len(self._buffer) + len(self._payload)

    def feed(self, data: Buffer) -> list[Frame]:
        """Return the frames that `data` completed. Errors: WireError."""
        frames: list[Frame] = []
        start = self.position
        self.position += len(data)
        if self._buffer:
            start -= len(self._buffer)
            data = bytes(self._buffer) + bytes(data)
            self._buffer.clear()
        pos, end = 0, len(data)
        while True:
            frame = self._frame
            if frame is None:
                length = header_length(data, pos)
                if length is None or end - pos < length:
                    self._buffer += data[pos:]
                    return frames
                frame, self._left = _decode_header(data, pos, length, start + pos)
                pos += length
                if self._left <= end - pos and self._left <= self._limit:  # whole: the usual case
                    payload = bytes(data[pos : pos + self._left])
                    pos += self._left
                    frame.payload = apply_mask(payload, frame.mask) if frame.mask else payload
                    frames.append(frame)
                    continue
                self._frame = frame
            step = min(self._left, end - pos)
            if len(self._payload) < self._limit:
                self._payload += data[pos : pos + min(step, self._limit - len(self._payload))]
            pos += step
            self._left -= step
            if self._left:
                return frames
            frame.payload = apply_mask(bytes(self._payload), frame.mask)
            self._payload.clear()
            self._frame = None
            frames.append(frame)


def _decode_header(data: Buffer, at: int, length: int, offset: int) -> tuple[Frame, int]:
    first, second = data[at], data[at + 1]
    size = second & 0x7F
    if size == 126:
        size = _SHORT.unpack_from(data, at + 2)[0]
    elif size == 127:
        size = _LONG.unpack_from(data, at + 2)[0]
        if size >> 63:
            raise WireError("a WebSocket frame of more than 2^63 bytes")
    opcode = first & 0xF
    if opcode & 8 and (size > 125 or not first & 0x80):
        raise WireError(f"a WebSocket {opcode_name(opcode)} frame of {size} bytes, or in pieces")
    if 3 <= opcode <= 7 or opcode > PONG:
        raise WireError(f"a WebSocket frame with the unused opcode {opcode}")
    mask = bytes(data[at + length - 4 : at + length]) if second & 0x80 else b""
    frame = Frame(
        opcode, b"", fin=bool(first & 0x80), rsv=first >> 4 & 7, mask=mask, length=size, offset=offset,
        size=length + size,
    )  # fmt: skip
    return frame, size


def decode_frames(data: Buffer) -> list[Frame]:
    """Return all frames of `data`, which must end with one. Errors: WireError."""
    splitter = FrameSplitter(max(len(data), 1))
    frames = splitter.feed(data)
    if splitter.held or splitter._frame is not None:
        raise WireError("the bytes end within a WebSocket frame")
    return frames


def decode_close(payload: bytes) -> tuple[int, str]:
    """Return code and reason of a close frame's payload; 1005 when it has none. Errors: WireError."""
    if not payload:
        return 1005, ""
    if len(payload) == 1:
        raise WireError("a WebSocket close frame with one byte")
    return _SHORT.unpack_from(payload)[0], payload[2:].decode("utf-8", "replace")
