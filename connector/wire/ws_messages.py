"""WebSocket messages: frames to messages and back, for either end (RFC 6455, RFC 7692).

Owns: frame parsing and encoding, fragments, masks, permessage-deflate without context, the handshake's accept value.
In: bytes of the peer. Out: Text, Ping, Pong and Close values; frames. Never: answers a ping by itself; does I/O.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from typing import Final, NamedTuple

from connector.errors import WireError

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10

NORMAL, PROTOCOL_ERROR, UNSUPPORTED_DATA, NO_STATUS, INVALID_PAYLOAD, TOO_BIG = 1000, 1002, 1003, 1005, 1007, 1009

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_TAIL = b"\x00\x00\xff\xff"
_MAX_CONTROL = 125
_CLOSE_CODES = frozenset({*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)})


class WebSocketError(WireError):
    """The peer broke the protocol; `code` is what a Close frame should say."""

    def __init__(self, message: str, code: int = PROTOCOL_ERROR) -> None:
        super().__init__(message)
        self.code = code


class Message(NamedTuple):
    """One event: `opcode` is TEXT, BINARY, PING, PONG or CLOSE; of a Close, `code` and its reason as data."""

    opcode: int
    data: bytes = b""
    code: int = 0


def accept_value(key: bytes) -> bytes:
    """Give Sec-WebSocket-Accept for a client's key."""
    return base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())


def encode_frame(opcode: int, payload: bytes, *, mask: bytes = b"", compressed: bool = False) -> bytes:
    """Give one whole frame; a client passes four random bytes as `mask`."""
    if compressed and opcode in {TEXT, BINARY}:
        packer = zlib.compressobj(wbits=-15)
        payload = (packer.compress(payload) + packer.flush(zlib.Z_SYNC_FLUSH)).removesuffix(_TAIL)
        first = 0xC0 | opcode
    else:
        first = 0x80 | opcode
    size = len(payload)
    masked = 0x80 if mask else 0
    if size < 126:
        head = bytes((first, masked | size))
    elif size < 65536:
        head = bytes((first, masked | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((first, masked | 127)) + size.to_bytes(8, "big")
    return head + mask + (_masked(payload, mask) if mask else payload)


def encode_close(code: int, reason: str = "", *, mask: bytes = b"") -> bytes:
    """Give a Close frame; a reason that is too long is cut."""
    text = reason.encode()[: _MAX_CONTROL - 2].decode("utf-8", "ignore").encode()
    return encode_frame(CLOSE, code.to_bytes(2, "big") + text, mask=mask)


def _masked(data: bytes, mask: bytes) -> bytes:
    size = len(data)
    keys = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "big") ^ int.from_bytes(keys, "big")).to_bytes(size, "big")


class MessageReader:
    """Frames of one peer. `masked`: the peer is a client. `limit` bounds a message in bytes, unpacked too."""

    def __init__(self, *, masked: bool, limit: int, deflate: bool = False) -> None:
        self._masked: Final = masked
        self._limit: Final = limit
        self._deflate: Final = deflate
        self._buffer = bytearray()
        self._opcode = 0
        self._compressed = False
        self._parts: list[bytes] = []
        self._size = 0
        self._closed = False

    def receive(self, data: bytes) -> list[Message]:
        """Take bytes; give what is complete. After a Close nothing more is read. Errors: WebSocketError."""
        if self._closed:
            return []
        self._buffer += data
        messages: list[Message] = []
        while not self._closed and (frame := self._frame()) is not None:
            message = self._take(*frame)
            if message is not None:
                messages.append(message)
        return messages

    def _frame(self) -> tuple[int, bytes] | None:
        """Cut one frame off: its first byte and its unmasked payload."""
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        first, size = buffer[0], buffer[1] & 0x7F
        if bool(buffer[1] & 0x80) is not self._masked:
            raise WebSocketError("a frame of a client must be masked, one of a server must not")
        at = 2
        if size >= 126:
            width = 2 if size == 126 else 8
            if len(buffer) < at + width:
                return None
            size = int.from_bytes(buffer[at : at + width], "big")
            at += width
        opcode = first & 0x0F
        if opcode >= CLOSE and (size > _MAX_CONTROL or not first & 0x80):
            raise WebSocketError("a control frame that is long or in fragments")
        if size + self._size > self._limit:
            raise WebSocketError(f"a message of more than {self._limit} bytes", TOO_BIG)
        mask = b""
        if self._masked:
            mask = bytes(buffer[at : at + 4])
            at += 4
        if len(buffer) < at + size:
            return None
        payload = bytes(buffer[at : at + size])
        del buffer[: at + size]
        return first, _masked(payload, mask) if mask else payload

    def _take(self, first: int, payload: bytes) -> Message | None:
        opcode, final, flags = first & 0x0F, bool(first & 0x80), first & 0x70
        if opcode in {PING, PONG, CLOSE}:
            if flags:
                raise WebSocketError("a control frame with reserved bits")
            return self._close(payload) if opcode == CLOSE else Message(opcode, payload)
        if opcode in {TEXT, BINARY}:
            if self._opcode:
                raise WebSocketError("a new message within the fragments of another")
            if flags & ~0x40 or (flags and not self._deflate):
                raise WebSocketError("reserved bits of an extension that was not agreed on")
            self._opcode, self._compressed = opcode, bool(flags)
        elif opcode != CONTINUATION or not self._opcode or flags:
            raise WebSocketError(f"an unexpected frame of type {opcode}")
        self._parts.append(payload)
        self._size += len(payload)
        if not final:
            return None
        data = b"".join(self._parts)
        opcode, self._opcode, self._parts, self._size = self._opcode, 0, [], 0
        if self._compressed:
            data = self._unpack(data)
        if opcode == TEXT:
            _check_text(data)
        return Message(opcode, data)

    def _unpack(self, data: bytes) -> bytes:
        unpacker = zlib.decompressobj(wbits=-15)
        try:
            plain = unpacker.decompress(data + _TAIL, self._limit + 1)
        except zlib.error as error:
            raise WebSocketError(f"a message that does not unpack: {error}", INVALID_PAYLOAD) from None
        if len(plain) > self._limit:
            raise WebSocketError(f"a message of more than {self._limit} bytes", TOO_BIG)
        return plain

    def _close(self, payload: bytes) -> Message:
        self._closed = True
        if not payload:
            return Message(CLOSE, b"", NO_STATUS)
        code = int.from_bytes(payload[:2], "big")
        if len(payload) < 2 or code not in _CLOSE_CODES:
            raise WebSocketError("a Close with an impossible code")
        _check_text(payload[2:])
        return Message(CLOSE, payload[2:], code)


def _check_text(data: bytes) -> None:
    try:
        data.decode()
    except UnicodeDecodeError:
        raise WebSocketError("text that is not UTF-8", INVALID_PAYLOAD) from None
