"""ConnectRequest and ConnectResponse: what a QUIC data stream opens with (proto/README.md, QUIC part).

Owns: the Cap'n Proto codec of these two structs, with its limits.
In: one framed message (untrusted), or the fields of one. Out: the fields, or one framed message; WireError.
Never: interprets metadata; reads any other struct (pycapnp does, in `transport/rpc.py`).

*Strategy*: written by hand because one of each passes per request: a message of one segment is read with two unpack
calls a field, and written with one join. Every pointer is checked against its segment before it is followed, and all
text that is copied out counts against one budget, so that pointers that share a text cannot multiply it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct, pack, unpack_from

from connector.errors import WireError
from connector.wire.capnp import message_length, table_length

Buffer = bytes | bytearray | memoryview
Metadata = Sequence[tuple[bytes, bytes]]

MAX_CONNECT = 2 * 1024 * 1024
"""Bytes of one ConnectRequest or ConnectResponse, and of the text copied out of it. Header lists may have 1 MiB (as
over HTTP/2); keys, padding and pointers come on top. Precedent: cloudflared 64 MiB."""

MAX_METADATA = 16_384
"""Entries of one metadata list; an entry has 16 bytes of pointers at least, unless it is empty on purpose."""

_HEAD_REQUEST = pack("<Q", 1 << 32 | 2 << 48)  # root pointer: 1 data word, 2 pointers, right behind
_HEAD_RESPONSE = pack("<Q", 2 << 48)
_LIST_TAG = 2 << 48  # elements without data, 2 pointers each
_PADDING = tuple(b"\0" * (8 - length) for length in range(8))  # the NUL and the rest of the word

_u64 = Struct("<Q").unpack_from
_u32 = Struct("<I").unpack_from
_u16 = Struct("<H").unpack_from
_two = Struct("<QQ").unpack_from

_OUTSIDE = "a pointer of the Cap'n Proto message leads outside of it"


class ConnectRequest:
    """What the edge wants of a data stream. `kind` (the field `type`): 0 HTTP, 1 WebSocket, 2 TCP; others pass."""

    __slots__ = ("dest", "kind", "metadata")

    def __init__(self, kind: int, dest: bytes, metadata: Metadata = ()) -> None:
        self.kind = kind
        self.dest = dest
        self.metadata = metadata

    def __repr__(self) -> str:
        return f"<ConnectRequest type={self.kind} {self.dest!r} {len(self.metadata)} metadata>"


class ConnectResponse:
    """What the connector answers: `error` (empty: none) and metadata."""

    __slots__ = ("error", "metadata")

    def __init__(self, error: bytes = b"", metadata: Metadata = ()) -> None:
        self.error = error
        self.metadata = metadata

    def __repr__(self) -> str:
        return f"<ConnectResponse {self.error!r} {len(self.metadata)} metadata>"


def connect_length(buffer: Buffer) -> int | None:
    """Return the length of the message at the start of `buffer`, None while unknown. Errors: WireError."""
    return message_length(buffer, MAX_CONNECT)


# --- writing ---------------------------------------------------------------------------------------------------------


def encode_connect_request(kind: int, dest: bytes, metadata: Metadata = ()) -> bytes:
    """Return the framed ConnectRequest. No text may hold a NUL: the caller checked."""
    return _encode(_HEAD_REQUEST + pack("<Q", kind), dest, metadata)


def encode_connect_response(error: bytes = b"", metadata: Metadata = ()) -> bytes:
    """Return the framed ConnectResponse."""
    return _encode(_HEAD_RESPONSE, error, metadata)


def _encode(head: bytes, text: bytes, metadata: Metadata) -> bytes:
    """Write `head`, the two pointers (text, list), the text, the list and its texts, in this order."""
    texts: list[bytes] = []
    pointers: list[int] = []
    place = 2 * len(metadata)  # of the next text, in words from the first element
    at = 0  # of the next pointer, likewise
    padding = _PADDING
    for pair in metadata:
        for value in pair:
            size = len(value)
            pointers.append(place - at - 1 << 2 | 1 | size + 1 << 35 | 2 << 32)
            texts.append(value)
            texts.append(padding[size & 7])
            place += (size >> 3) + 1
            at += 1
    text_words = 0
    text_pointer = 0
    if text:
        text_words = (len(text) >> 3) + 1
        text_pointer = 1 << 2 | 1 | len(text) + 1 << 35 | 2 << 32
        text += padding[len(text) & 7]
    list_pointer = text_words << 2 | 1 | at << 35 | 7 << 32
    words = (len(head) >> 3) + 3 + text_words + place
    return b"".join(
        (
            pack("<II", 0, words),
            head,
            pack("<QQ", text_pointer, list_pointer),
            text,
            pack(f"<{at + 1}Q", len(metadata) << 2 | _LIST_TAG, *pointers),
            *texts,
        )
    )


# --- reading ---------------------------------------------------------------------------------------------------------


def decode_connect_request(message: Buffer) -> ConnectRequest:
    """Read one whole framed message. Errors: WireError."""
    reader = _Reader(message)
    segment, at, data, pointers = reader.root()
    kind = _u16(segment, at)[0] if data else 0
    dest, metadata = reader.text_and_list(at + 8 * data, pointers)
    return ConnectRequest(kind, dest, metadata)


def decode_connect_response(message: Buffer) -> ConnectResponse:
    """Read one whole framed message. Errors: WireError."""
    reader = _Reader(message)
    _, at, data, pointers = reader.root()
    return ConnectResponse(*reader.text_and_list(at + 8 * data, pointers))


class _Reader:
    """One message while it is read. `index` is the segment that offsets refer to; far pointers change it."""

    __slots__ = ("budget", "index", "segments")

    def __init__(self, message: Buffer) -> None:
        data = message if isinstance(message, bytes) else bytes(message)
        if message_length(data, MAX_CONNECT) != len(data):
            raise WireError("the Cap'n Proto message is not as long as its segment table says")
        count = _u32(data, 0)[0] + 1
        start = table_length(count)
        if count == 1:
            self.segments = [data[start:]]
        else:
            self.segments = []
            for position in range(count):
                end = start + 8 * _u32(data, 4 + 4 * position)[0]
                self.segments.append(data[start:end])
                start = end
        self.index = 0
        self.budget = MAX_CONNECT

    def root(self) -> tuple[bytes, int, int, int]:
        """Return segment, offset, data words and pointers of the root struct (an empty one for a null pointer)."""
        if not self.segments[0]:
            raise WireError("the Cap'n Proto message is empty")
        word, base = self._follow(0)
        if not word:
            return b"", 0, 0, 0
        if word & 3:
            raise WireError("the root of the Cap'n Proto message is not a struct")
        data, pointers = word >> 32 & 0xFFFF, word >> 48
        at = self._target(word, base, data + pointers)
        return self.segments[self.index], at, data, pointers

    def text_and_list(self, at: int, pointers: int) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """Return the text of pointer 0 and the metadata of pointer 1 of the struct with its pointers at `at`."""
        index = self.index
        text = self.text(at) if pointers else b""
        self.index = index
        return text, self.metadata(at + 8) if pointers > 1 else []

    def text(self, at: int) -> bytes:
        """Return the text that the pointer at `at` leads to. May change `index`."""
        word = _u64(self.segments[self.index], at)[0]
        base = at + 8
        if not word:
            return b""
        if word & 3 != 1:
            word, base = self._follow(at)
        if word & 3 != 1 or word >> 32 & 7 != 2:
            raise WireError("a text of the Cap'n Proto message is no list of bytes")
        size: int = word >> 35
        start = base + 8 * _offset(word)
        segment = self.segments[self.index]
        if not size or start < 0 or start + size > len(segment):
            raise WireError(_OUTSIDE if size else "a text of the Cap'n Proto message has no NUL at its end")
        if segment[start + size - 1]:
            raise WireError("a text of the Cap'n Proto message has no NUL at its end")
        self.budget -= size
        if self.budget < 0:
            raise WireError(f"the Cap'n Proto message holds more than {MAX_CONNECT} bytes of text")
        return segment[start : start + size - 1]

    def metadata(self, at: int) -> list[tuple[bytes, bytes]]:
        """Return the metadata list that the pointer at `at` leads to."""
        word, base = self._follow(at)
        if not word:
            return []
        if word & 3 != 1 or word >> 32 & 7 != 7:
            raise WireError("the metadata of the Cap'n Proto message is no list of structs")
        words: int = word >> 35
        tag_at = self._target(word, base, words + 1)
        index = self.index
        tag = _u64(self.segments[index], tag_at)[0]
        count, data, pointers = tag >> 2 & 0x3FFFFFFF, tag >> 32 & 0xFFFF, tag >> 48
        if tag & 3 or count > MAX_METADATA or count * (data + pointers) > words:
            raise WireError(f"the metadata list of the Cap'n Proto message is damaged or has more than {MAX_METADATA}")
        step = 8 * (data + pointers)
        start = tag_at + 8 + 8 * data
        if pointers == 2 and not data:
            return self._pairs(index, start, count)
        found = []
        text = self.text
        for place in range(start, start + count * step, step) if step else [start] * count:
            key = value = b""
            if pointers:
                key = text(place)
                self.index = index
                if pointers > 1:
                    value = text(place + 8)
                    self.index = index
            found.append((key, value))
        return found

    def _pairs(self, index: int, start: int, count: int) -> list[tuple[bytes, bytes]]:
        """Return `count` pairs of texts whose pointers begin at `start`; as everybody writes them: all read at once."""
        segment = self.segments[index]
        size = len(segment)
        budget = self.budget
        texts: list[bytes] = []
        at = start
        for word in unpack_from(f"<{2 * count}Q", segment, start):
            at += 8
            if word & 0x7_8000_0003 == 0x2_0000_0001:  # bytes, behind this pointer, in this segment
                first = at + ((word & 0x7FFFFFFC) << 1)
                last = first + (word >> 35) - 1
                if first <= last < size and not segment[last]:
                    budget -= last - first + 1
                    if budget < 0:
                        raise WireError(f"the Cap'n Proto message holds more than {MAX_CONNECT} bytes of text")
                    texts.append(segment[first:last])
                    continue
            self.budget = budget
            texts.append(self.text(at - 8))
            budget = self.budget
            self.index = index
        self.budget = budget
        return list(zip(texts[::2], texts[1::2], strict=True))

    def _follow(self, at: int) -> tuple[int, int]:
        """Return the pointer at `at` and the offset that it counts from, past any far pointer. Sets `index`."""
        word = _u64(self.segments[self.index], at)[0]
        if word & 3 != 2:
            return word, at + 8
        pad = self._far(word, 2 if word & 4 else 1)
        if not word & 4:
            word = _u64(self.segments[self.index], pad)[0]
            if word & 3 == 2:
                raise WireError("a far pointer of the Cap'n Proto message leads to another")
            return word, pad + 8
        far, word = _two(self.segments[self.index], pad)
        if far & 7 != 2:
            raise WireError("a double-far pointer of the Cap'n Proto message has no single one in its pad")
        base = self._far(far, 0)
        return word & ~0xFFFFFFFC, base

    def _far(self, word: int, words: int) -> int:
        """Go to the segment of a far pointer; return the offset there, with `words` words inside of it."""
        index = word >> 32
        if index >= len(self.segments):
            raise WireError(_OUTSIDE)
        at: int = (word >> 3 & 0x1FFFFFFF) * 8
        if at + 8 * words > len(self.segments[index]):
            raise WireError(_OUTSIDE)
        self.index = index
        return at

    def _target(self, word: int, base: int, words: int) -> int:
        """Return the offset that a struct or list pointer leads to, with `words` words inside the segment."""
        at = base + 8 * _offset(word)
        if at < 0 or at + 8 * words > len(self.segments[self.index]):
            raise WireError(_OUTSIDE)
        return at


def _offset(word: int) -> int:
    """Return the signed 30-bit word offset of a struct or list pointer."""
    return ((word & 0xFFFFFFFF) >> 2) - ((word & 0x80000000) >> 1)


def last_values(metadata: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return the metadata as a dict; of keys that occur more than once the last value stands."""
    return dict(metadata)
