"""WebSocket framing (RFC 6455 section 5) while bytes pass: where frames end, what a client's frames carry.

Owns: FrameFollower (boundaries in one direction), PongFilter (takes one answer out), ClientFrames (masked frames to
payload), and the frames that a server sends.
In: bytes as they came (untrusted), in any pieces. Out: numbers, payload, frame bytes; WireError.
Never: keeps payload, joins fragments, decides when anything is sent.

*Strategy*: nothing waits for a whole frame. A header that is cut in two is the only thing kept (13 bytes at most), and
of control frames their payload (125 bytes), so that a peer cannot make this side remember anything.
"""

from __future__ import annotations

from struct import Struct

from connector.errors import WireError

Buffer = bytes | bytearray | memoryview

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA

NORMAL, GOING_AWAY, PROTOCOL_FAILURE = 1000, 1001, 1002
"""Close codes that this program sends (RFC 6455 section 7.4.1)."""

MAX_CONTROL = 125
"""Bytes of a control frame's payload (RFC 6455 section 5.5)."""

LOST = 1 << 62
"""`FrameFollower.left` when the bytes are no WebSocket. What passes afterwards may be taken off it: half of it is still
more than any stream carries."""

_FIN, _RSV, _MASKED = 0x80, 0x70, 0x80
_OPCODES = frozenset((CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG))
_SHORT = Struct(">H")
_LONG = Struct(">Q")


def encode_frame(opcode: int, payload: Buffer) -> bytes:
    """Return one whole, unmasked frame, as a server sends it."""
    size = len(payload)
    if size < 126:
        return bytes((_FIN | opcode, size)) + payload
    return frame_header(opcode, size) + payload


def frame_header(opcode: int, size: int, *, fin: bool = True) -> bytes:
    """Return the header of an unmasked frame with `size` bytes of payload."""
    first = (_FIN if fin else 0) | opcode
    if size < 126:
        return bytes((first, size))
    if size < 65_536:
        return bytes((first, 126)) + _SHORT.pack(size)
    return bytes((first, 127)) + _LONG.pack(size)


def close_frame(code: int, reason: str = "") -> bytes:
    """Return a Close frame of a server; `reason` may take 123 bytes."""
    return encode_frame(CLOSE, _SHORT.pack(code) + reason.encode()[: MAX_CONTROL - 2])


def unmask(data: Buffer, mask: bytes, offset: int = 0) -> bytes:
    """Return payload with the key applied; `offset` is where in the frame's payload `data` begins."""
    size = len(data)
    turn = offset & 3
    key = (mask[turn:] + mask[:turn]) * (size // 4 + 1)
    return (int.from_bytes(data, "little") ^ int.from_bytes(key[:size], "little")).to_bytes(size, "little")


def _measure(data: Buffer, at: int, end: int, masked: bool) -> int:
    """Return the size of the frame whose header is at `at`; 0: more of the header is needed; -1: this is no frame."""
    have = end - at
    if have < 2:
        return 0
    first, second = data[at], data[at + 1]
    opcode = first & 0x0F
    length = second & 0x7F
    if opcode not in _OPCODES or bool(second & _MASKED) is not masked:
        return -1
    if opcode >= CLOSE and (length > MAX_CONTROL or first & (_FIN | _RSV) != _FIN):
        return -1
    size = 6 if masked else 2
    if length < 126:
        return size + length
    if length == 126:
        return size + 2 + _SHORT.unpack_from(data, at + 2)[0] if have >= 4 else 0
    if have < 10:
        return 0
    long: int = _LONG.unpack_from(data, at + 2)[0]
    return size + 8 + long if long < LOST >> 2 else -1


class FrameFollower:
    """One direction of one WebSocket: how far the stream is from the end of its current frame.

    `left` is 0 at a frame boundary, else the bytes until the next one; -1 inside a header that is not whole; LOST once
    the bytes made no sense. `closed` is set when a Close frame went by. A caller may leave out a chunk that is one
    whole frame: at a boundary that changes nothing.
    """

    __slots__ = ("_head", "_masked", "closed", "left")

    def __init__(self, *, masked: bool) -> None:
        self.left = 0
        self.closed = False
        self._head = b""
        self._masked = masked

    @property
    def lost(self) -> bool:
        """Whether the bytes made no sense: no boundary will come."""
        return self.left > LOST >> 1

    def follow(self, data: Buffer) -> None:
        """Take a chunk that passes."""
        self._run(data, False)

    def boundary(self, data: Buffer) -> int:
        """Take a chunk up to its first frame boundary; return where in `data` that is, -1 if it has none."""
        if not self.left:
            return 0
        return self._run(data, True)

    def _run(self, data: Buffer, first: bool) -> int:
        end = len(data)
        left, head = self.left, self._head
        if left >= end:
            self.left = left - end
            return end if not self.left and first else -1
        at = max(left, 0)
        if first and left > 0:
            self.left = 0
            return at
        skipped = 0
        if head:
            self._head = b""
            skipped = len(head)
            data = head + data
            end += skipped
        while at < end:
            size = _measure(data, at, end, self._masked)
            if size <= 0:
                self._head = bytes(data[at:end]) if not size else b""
                self.left = LOST if size else -1
                return -1
            if data[at] & 0x0F == CLOSE:
                self.closed = True
            at += size
            if first and at <= end:
                self.left = 0
                return at - skipped
        self.left = at - end
        return -1


class PongFilter:
    """The eyeball's direction of a WebSocket whose eyeball is pinged: takes the answers to our PINGs out.

    `token` is the payload of the PING that awaits its PONG, empty when none does. `budget` is how many more frames may
    be looked at before the stream passes unseen, for good; the caller fills it up from time to time.
    """

    __slots__ = ("_held", "_left", "budget", "token")

    def __init__(self, budget: int = 1 << 62) -> None:
        self.token = b""
        self.budget = budget
        self._held = b""
        self._left = 0

    def filter(self, data: Buffer) -> Buffer:
        """Return what passes on: `data` itself, or bytes without our PONG. What is held back comes out later."""
        end = len(data)
        left = self._left
        if left > end:
            self._left = left - end
            return data
        if not self._held and not left and end > 6 and data[0] != 0x8A and data[1] == end + 122 and end < 132:
            return data  # one whole short frame that is no PONG
        joined = self._held + bytes(data)
        self._held = b""
        return self._cut(joined, left)

    @property
    def lost(self) -> bool:
        """Whether frames are not followed any more: the bytes made no sense, or there were too many."""
        return self._left > LOST >> 1

    def rest(self) -> bytes:
        """Return what is held back: the stream ends here."""
        held, self._held = self._held, b""
        return held

    def _cut(self, data: bytes, at: int) -> bytes:
        token = self.token
        end = len(data)
        kept: list[bytes] = []
        begin = 0
        budget = self.budget
        while at < end:
            size = _measure(data, at, end, True)
            budget -= 1
            if size < 0 or budget < 0:
                self._left = LOST
                break
            suspect = bool(token) and data[at] == (_FIN | PONG)
            if not size or (suspect and size == len(token) + 6 and at + size > end):
                # A header, or a PONG that may be ours, is not whole yet.
                self._left = 0
                self._held = data[at:]
                end = at
                break
            if suspect and size == len(token) + 6 and unmask(data[at + 6 : at + size], data[at + 2 : at + 6]) == token:
                kept.append(data[begin:at])
                begin = at + size
                self.token = token = b""
            at += size
        else:
            self._left = at - end
        self.budget = budget
        if not kept and not begin:
            return data[:end]
        kept.append(data[begin:end])
        return b"".join(kept)


Piece = tuple[int, bool, bool, bytes]
"""Opcode (of a data frame: its message's), whether it begins a message, whether it ends one, payload."""


class ClientFrames:
    """A client's direction, read by a server: pieces of payload as soon as they are there.

    Control frames come whole. No extension is spoken, so a reserved bit is an error.
    """

    __slots__ = ("_begun", "_control", "_fin", "_head", "_left", "_mask", "_message", "_offset", "_opcode")

    def __init__(self) -> None:
        self._head = b""
        self._left = 0
        self._mask = b""
        self._offset = 0
        self._opcode = 0
        self._fin = False
        self._message = 0  # opcode of the message that has begun and not ended
        self._begun = False  # the current frame's first piece is still to come, and begins a message
        self._control = b""

    def receive(self, data: Buffer) -> list[Piece]:
        """Return what a chunk brought. Errors: WireError for frames that no client may send."""
        pieces: list[Piece] = []
        if self._head:
            data = self._head + data
            self._head = b""
        end = len(data)
        at = 0
        with memoryview(data) as view:
            while at < end:
                if not self._left:
                    size = self._open(view, at, end)
                    if not size:
                        self._head = bytes(view[at:])
                        break
                    at += size
                part = min(self._left, end - at)
                payload = unmask(view[at : at + part], self._mask, self._offset) if part else b""
                at += part
                self._left -= part
                self._offset += part
                self._take(payload, pieces)
        return pieces

    def _open(self, data: memoryview, at: int, end: int) -> int:
        """Read the header at `at`; return its size, 0 when it is not whole."""
        size = _measure(data, at, end, True)
        if size < 0:
            raise WireError(f"not a frame of a WebSocket client: it begins with {data[at : at + 2].hex()}")
        if end - at < 2:
            return 0
        first, length = data[at], data[at + 1] & 0x7F
        head = 6 + (0 if length < 126 else 2 if length == 126 else 8)
        if not size or at + head > end:
            return 0
        opcode = first & 0x0F
        if first & _RSV:
            raise WireError("a WebSocket frame with reserved bits, though no extension was agreed")
        if opcode < CLOSE:
            if (opcode == CONTINUATION) is not bool(self._message):
                raise WireError("a WebSocket fragment out of order")
            self._begun = opcode != CONTINUATION
            self._message = opcode or self._message
            opcode = self._message
        self._opcode = opcode
        self._fin = bool(first & _FIN)
        self._mask = bytes(data[at + head - 4 : at + head])
        self._left = size - head
        self._offset = 0
        return head

    def _take(self, payload: bytes, pieces: list[Piece]) -> None:
        opcode, whole = self._opcode, not self._left
        if not payload and not whole:
            return
        if opcode >= CLOSE:
            payload = self._control + payload
            self._control = b"" if whole else payload
            if whole:
                pieces.append((opcode, True, True, payload))
            return
        ended = whole and self._fin
        pieces.append((opcode, self._begun, ended, payload))
        self._begun = False
        if ended:
            self._message = 0
