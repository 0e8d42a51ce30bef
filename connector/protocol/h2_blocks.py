"""Header blocks of HTTP/2: from HEADERS and CONTINUATION frames to header fields (RFC 9113 section 4.3).

Owns: HeaderBlocks: the block that is being received, and the decompression state of the connection.
In: payloads of HEADERS and CONTINUATION. Out: stream id, fields and END_STREAM of a whole block; H2Error.
Never: judges what a block means.
"""

from __future__ import annotations

from connector.errors import WireError
from connector.protocol.h2_guard import H2Error
from connector.protocol.h2_limits import H2Limits
from connector.wire.h2_frames import (
    DEFAULT_HEADER_TABLE_SIZE,
    FLAG_END_HEADERS,
    FLAG_END_STREAM,
    FLAG_PADDED,
    FLAG_PRIORITY,
    ErrorCode,
    strip_padding,
)
from connector.wire.h2_hpack import ENTRY_OVERHEAD, HpackDecoder

Fields = list[tuple[bytes, bytes]]
Block = tuple[int, Fields, bool]
"""Stream id, header fields, and whether the block ends its stream."""


class HeaderBlocks:
    """The header blocks of one connection, in their order. While `stream_id` is not 0, only CONTINUATION may come."""

    __slots__ = ("_block", "_count", "_decoder", "_ends", "_limits", "_size", "stream_id")

    def __init__(self, limits: H2Limits) -> None:
        self._limits = limits
        self._decoder = HpackDecoder(DEFAULT_HEADER_TABLE_SIZE)
        self._block = bytearray()
        self._count = 0
        self._ends = False
        self._size = 0  # of the last whole block
        self.stream_id = 0

    def receive_headers(self, flags: int, stream_id: int, payload: bytes) -> Block | None:
        """Take a HEADERS payload; return the block if that is all of it."""
        if flags & FLAG_PADDED:
            payload = strip_padding(payload)
        if flags & FLAG_PRIORITY:
            if len(payload) < 5:
                raise H2Error(ErrorCode.FRAME_SIZE_ERROR, "HEADERS too short for its priority")
            payload = payload[5:]
        ends = bool(flags & FLAG_END_STREAM)
        self._check_size(len(payload))
        if flags & FLAG_END_HEADERS:
            return stream_id, self._decode(payload), ends
        self._block = bytearray(payload)
        self._count = 0
        self._ends = ends
        self.stream_id = stream_id
        return None

    def receive_continuation(self, flags: int, payload: bytes) -> Block | None:
        """Take a CONTINUATION payload; return the block if that was the last of it."""
        self._count += 1
        if self._count > self._limits.max_continuations:
            raise H2Error(ErrorCode.ENHANCE_YOUR_CALM, f"more than {self._limits.max_continuations} CONTINUATION")
        self._check_size(len(self._block) + len(payload))
        self._block += payload
        if not flags & FLAG_END_HEADERS:
            return None
        block = bytes(self._block)
        self._block = bytearray()
        stream_id = self.stream_id
        self.stream_id = 0
        return stream_id, self._decode(block), self._ends

    def is_too_large(self, fields: Fields) -> bool:
        """Return whether the fields of the last block exceed the header list size that our SETTINGS announced."""
        limit = self._limits.max_header_list_size
        count = len(fields)
        # A field is a table entry or in the block, where no code is shorter than 5 bits: mostly no sum is due.
        if count * (ENTRY_OVERHEAD + DEFAULT_HEADER_TABLE_SIZE) + 2 * self._size <= limit:
            return False
        return count * ENTRY_OVERHEAD + sum([len(name) + len(value) for name, value in fields]) > limit

    def _check_size(self, size: int) -> None:
        limit = self._limits.max_header_block
        if size > limit:
            raise H2Error(ErrorCode.ENHANCE_YOUR_CALM, f"a header block of more than {limit} bytes")

    def _decode(self, block: bytes) -> Fields:
        self._size = len(block)
        try:
            return self._decoder.decode(block)
        except WireError as error:
            raise H2Error(ErrorCode.COMPRESSION_ERROR, str(error)) from None
