"""Stream framing of Cap'n Proto messages: where one ends, and the one repair they need before pycapnp may see them.

Owns: the segment table of the unpacked stream format (proto/README.md paragraph 2) and its limits.
In: bytes as received (untrusted). Out: lengths, whole messages.
Never: decodes a message: that is pycapnp's work with the schemas of proto/ (`transport/rpc.py` loads them).

*Strategy*: pycapnp (2.2.4) takes the process down when an RPC exception or abort has a text that is not UTF-8, or a
type it does not know. So `repair_exception` finds these, and only these, by a small reader that gives up on anything
malformed; what is malformed pycapnp refuses in order.
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


class MessageSplitter:
    """Cuts a stream into whole messages. `held` bytes of the next one wait here; at most `limit` of them."""

    __slots__ = ("_buffer", "_limit")

    def __init__(self, limit: int) -> None:
        self._buffer = bytearray()
        self._limit = limit

    @property
    def held(self) -> int:
        """Bytes of a message that is not whole yet."""
        return len(self._buffer)

    def feed(self, data: Buffer) -> list[bytearray]:
        """Return the messages that `data` completed. Errors: WireError at the first message that breaks a limit."""
        buffer = self._buffer
        buffer += data
        messages = []
        while (length := message_length(buffer, self._limit)) is not None and length <= len(buffer):
            messages.append(buffer[:length])
            del buffer[:length]
        return messages


def repair_exception(message: bytearray) -> bool:
    """Make the exception in an abort or return message one that pycapnp survives; tell if anything was changed.

    In texts that are not UTF-8 what is not ASCII becomes `?`; an unknown type becomes `failed`. `message` is one whole
    message, framing included; its length stays the same.
    """
    repaired = False
    try:
        reader = _Reader(message)
        body = reader.exception()
        if body is None:
            return False
        if body[1] and _U16.unpack_from(message, body[0] + 4)[0] > _LAST_TYPE:
            _U16.pack_into(message, body[0] + 4, 0)
            repaired = True
        for start, size in reader.texts(body):
            text = bytes(message[start : start + size])
            try:
                text.decode()
            except UnicodeDecodeError:
                message[start : start + size] = bytes(byte if byte < 128 else 63 for byte in text)
                repaired = True
    except (struct.error, IndexError):
        pass
    return repaired


_U64 = struct.Struct("<Q")
_U16 = struct.Struct("<H")
_TAG_ABORT, _TAG_RETURN, _RETURN_EXCEPTION = 1, 3, 1
_LAST_TYPE = 3  # unimplemented
_Place = tuple[int, int, int]  # byte offset in the message, data words or (list) element size, pointers or elements


class _Reader:
    """Follows pointers in one message. Errors of every method: struct.error or IndexError when it is malformed."""

    def __init__(self, message: bytearray) -> None:
        self._message = message
        segments = _U32.unpack_from(message, 0)[0] + 1
        at = table_length(segments)
        self._segments = []
        for words in struct.unpack_from(f"<{segments}I", message, 4):
            self._segments.append((at, at + 8 * words))
            at += 8 * words

    def exception(self) -> _Place | None:
        """Return where the exception of an abort or return message is."""
        root = self._struct(self._segments[0][0])
        if root is None:
            return None
        tag = _U16.unpack_from(self._message, root[0])[0] if root[1] else 0
        if tag not in (_TAG_ABORT, _TAG_RETURN):
            return None
        body = self._child(root, 0)
        if tag == _TAG_RETURN and body is not None:
            kind = _U16.unpack_from(self._message, body[0] + 6)[0] if body[1] else 0
            body = self._child(body, 0) if kind == _RETURN_EXCEPTION else None
        return body

    def texts(self, body: _Place) -> list[tuple[int, int]]:
        """Return start and size in bytes of the exception's texts: reason and, from newer peers, trace."""
        places = [self._follow(body[0] + 8 * (body[1] + number)) for number in range(min(body[2], 2))]
        return [(place[0], place[2]) for place in places if place is not None and place[1] == -1]

    def _child(self, parent: _Place, number: int) -> _Place | None:
        start, words, pointers = parent
        return self._struct(start + 8 * (words + number)) if number < pointers else None

    def _struct(self, at: int) -> _Place | None:
        place = self._follow(at)
        return place if place is not None and place[1] >= 0 else None

    def _follow(self, at: int) -> _Place | None:
        """Return what the pointer at byte `at` leads to: a struct, or a byte list as (start, -1, size); else None."""
        value: int = _U64.unpack_from(self._message, at)[0]
        base = at + 8
        if value & 3 == 2:  # far: through a landing pad of one word, or of two
            pad = self._segments[value >> 32][0] + 8 * (value >> 3 & 0x1FFFFFFF)
            if value & 4:
                far: int = _U64.unpack_from(self._message, pad)[0]
                base = self._segments[far >> 32][0] + 8 * (far >> 3 & 0x1FFFFFFF)
                value = _U64.unpack_from(self._message, pad + 8)[0]
            else:
                base = pad + 8
                value = _U64.unpack_from(self._message, pad)[0]
        if not value:
            return None
        offset = value >> 2 & 0x3FFFFFFF
        start = base + 8 * (offset - 0x40000000 if offset & 0x20000000 else offset)
        if start < 0:
            return None
        if value & 3 == 0:
            return start, value >> 32 & 0xFFFF, value >> 48
        if value & 3 == 1 and value >> 32 & 7 == 2:
            return start, -1, value >> 35
        return None
