"""Stream framing of Cap'n Proto messages: where one message ends.

Owns: the segment table of the unpacked stream format (proto/README.md paragraph 2) and its limits.
In: the bytes received so far (untrusted). Out: the length of the first message, or None for "not all of the table yet".
Never: looks inside a segment: that is pycapnp's work with the schemas of proto/ (`transport/rpc.py` loads them).
"""

from __future__ import annotations

import struct

from connector.errors import WireError

Buffer = bytes | bytearray | memoryview

MAX_SEGMENTS = 513
"""Segments of one message. Precedents: cloudflared and the C++ library refuse a count field above 512."""

MAX_MESSAGE = 64 * 1024 * 1024
"""Bytes of one message, table included. Precedent: cloudflared 64 MiB. Real ones have a few hundred bytes; a pushed
configuration is the largest and counts in kilobytes."""

TRAVERSAL_WORDS = MAX_MESSAGE // 8
"""What a reader may follow in one message, in words of 8 bytes; for pycapnp's reader options. Precedent: the same."""

NESTING = 64
"""Levels of pointers a reader may follow. Precedents: cloudflared and the C++ library 64."""

_U32 = struct.Struct("<I")


def table_length(segments: int) -> int:
    """Bytes of the segment table for `segments` segments: count, sizes, padding to a whole word."""
    return (4 + 4 * segments + 7) & ~7


def message_length(buffer: Buffer, limit: int = MAX_MESSAGE) -> int | None:
    """Return how many bytes the message at the start of `buffer` has, None while that cannot be told yet.

    The result may be larger than the buffer: that many bytes are to be collected. Errors: WireError beyond a limit,
    as early as the bytes show it.
    """
    have = len(buffer)
    if have < 4:
        return None
    segments: int = _U32.unpack_from(buffer, 0)[0] + 1
    if segments > MAX_SEGMENTS:
        raise WireError(
            f"a Cap'n Proto message with {segments} segments, more than {MAX_SEGMENTS}",
            advice="The peer does not speak Cap'n Proto here, or the stream is out of step.",
        )
    total = table_length(segments)
    if have < total:
        return None
    sizes: tuple[int, ...] = struct.unpack_from(f"<{segments}I", buffer, 4)
    total += 8 * sum(sizes)
    if total > limit:
        raise WireError(
            f"a Cap'n Proto message of {total} bytes, more than {limit}",
            advice="The peer does not speak Cap'n Proto here, or the stream is out of step.",
        )
    return total


def frame_message(segment: Buffer) -> bytes:
    """Put the stream framing around a message of one segment; its size is a multiple of 8 bytes."""
    words, rest = divmod(len(segment), 8)
    if rest:
        raise WireError(f"a segment of {len(segment)} bytes, which is not a whole number of words")
    return struct.pack("<II", 0, words) + bytes(segment)


class MessageCounter:
    """Follows the framing of a stream of messages without keeping them. Call `feed` with every chunk, in order.

    `whole` is true between two messages: a stream that ends when it is false was cut.
    """

    __slots__ = ("_head", "_left", "_limit", "messages")

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self.messages = 0
        self._limit = limit
        self._left = 0  # bytes of the current message still to come
        self._head = bytearray()  # the segment table of the next message, while it is not whole

    @property
    def whole(self) -> bool:
        """Whether the stream stands between two messages."""
        return not self._left and not self._head

    def feed(self, data: Buffer) -> None:
        """Take the next chunk. Errors: WireError at the first message that breaks a limit."""
        pos = 0
        size = len(data)
        head = self._head
        while pos < size:
            if self._left:
                step = min(self._left, size - pos)
                self._left -= step
                pos += step
                if self._left:
                    return
                self.messages += 1
                continue
            # Four bytes tell how long the table is, the table how long the message is.
            wanted = 4 if len(head) < 4 else table_length(_U32.unpack_from(head, 0)[0] + 1)
            step = min(wanted - len(head), size - pos)
            head += data[pos : pos + step]
            pos += step
            length = message_length(head, self._limit)
            if length is not None:
                self._left = length - len(head)
                head.clear()
                if not self._left:
                    self.messages += 1
