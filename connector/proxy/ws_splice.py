"""A spliced WebSocket: raw bytes both ways, with an eye on where the origin's frames end.

Owns: WebSocketSplice, which can say goodbye (Close 1001) between two frames, and KeptAliveSplice, which also pings an
idle eyeball (`wsKeepAlive`) and takes the answer out. In and out: as for Splice.
Never: changes a byte of the origin's or the eyeball's, joins or delays frames.

*Strategy*: a Close or PING may only stand between two frames, and where the stream stands cannot be told later from
bytes that nobody looked at. So the origin's direction is followed from the start, which costs a call and four
comparisons a chunk: a chunk that is one whole short frame (every MQTT message) or lies inside one long frame needs no
more, only others are looked at frame by frame. Measured with `tests/benchmarks/test_counts.py`: one Python call and one
`len` per chunk. The eyeball's direction stays unread but on streams that ask for keep-alive.

An origin that speaks something else than WebSocket after its 101 is noticed by its first impossible header; it gets
no Close and no PING, and is cut as before. So is an eyeball that floods a watched stream with frames of a few bytes
(`limits.WS_WATCHED_FRAMES`): its stream is a plain byte pipe from then on, which costs nothing per frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from connector.protocol.ports import Buffer, StreamPort
from connector.proxy import limits
from connector.proxy.origins import OriginConnection
from connector.proxy.splice import DrainQueue, Splice
from connector.proxy.ws_pings import PARTS, PingClock
from connector.wire.ws_stream import CLOSE, GOING_AWAY, PING, FrameFollower, PongFilter, close_frame, encode_frame

GOODBYE: Final = close_frame(GOING_AWAY)
_CLOSE_BYTE: Final = 0x80 | CLOSE
_TOKEN: Final = b"idle"
"""Begins the payload of our PINGs; four bytes of a counter follow."""


class WebSocketSplice(Splice):
    """One upgraded connection; the origin's frames are followed."""

    __slots__ = ("_frames", "_said")

    def __init__(
        self, port: StreamPort, connection: OriginConnection, drains: DrainQueue, done: Callable[[], None]
    ) -> None:
        super().__init__(port, connection, drains, done)
        self._frames = FrameFollower(masked=False)
        self._said = False
        self.data_received = self.from_origin

    def from_origin(self, data: Buffer) -> None:
        """Pass bytes of the origin on, and keep count of its frames."""
        frames = self._frames
        size = len(data)
        left = frames.left
        if left >= size:
            frames.left = left - size
        elif left or size > 127 or size < 2 or data[1] + 2 != size or data[0] == _CLOSE_BYTE:
            frames.follow(data)
        self._port.write(data)

    def go_away(self) -> bool:
        """Send Close 1001 now or at the end of the current frame, and end; False where frames were lost track of."""
        frames = self._frames
        if self._said or self._origin_ended or frames.closed:
            return True
        if not frames.left:
            self._say_goodbye()
        elif frames.lost:
            return False
        else:
            self._receive_with(self._end_frame)
        return True

    def _end_frame(self, data: Buffer) -> None:
        """Take the place of `from_origin`: pass the rest of a frame on, then say goodbye."""
        end = self._frames.boundary(data)
        if end < 0:
            self._port.write(data)
            return
        with memoryview(data) as view:
            if end:
                self._port.write(view[:end])
        if self._frames.closed:
            self._receive_with(self.from_origin)
        else:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        """Write the Close frame and end both sides: what the origin still says has no place behind it."""
        self._said = True
        self._origin_ended = True
        self._port.write(GOODBYE)
        self._port.write_eof()
        self.flush()
        if not self._transport.is_closing():
            self._transport.close()
        self._drains.add(self)


class KeptAliveSplice(WebSocketSplice):
    """One upgraded connection whose eyeball is pinged when nothing has moved for as long as `clock` says."""

    __slots__ = ("_clock", "_edge_full", "_idle", "_pings", "_pongs")

    def __init__(
        self,
        port: StreamPort,
        connection: OriginConnection,
        drains: DrainQueue,
        done: Callable[[], None],
        clock: PingClock,
    ) -> None:
        super().__init__(port, connection, drains, done)
        self._pongs = PongFilter(self._budget(clock))
        self._pings = 0
        self._idle = 0
        self._edge_full = False
        self._clock = clock
        self.data_received = self._from_origin_moving
        clock.add(self)

    @staticmethod
    def _budget(clock: PingClock) -> int:
        return int(limits.WS_WATCHED_FRAMES * clock.interval / PARTS) + 1

    def _from_origin_moving(self, data: Buffer) -> None:
        self._idle = 0
        self.from_origin(data)

    def on_data(self, data: Buffer) -> None:
        """Pass payload on without our PONG."""
        self._idle = 0
        kept = self._pongs.filter(data)
        if kept is data:
            super().on_data(data)
            return
        # Held bytes count as taken; there are 14 at most.
        size, passed = len(data), len(kept)
        if passed > size:  # held before, acknowledged then
            super().on_data(kept[:size])
            self._enqueue(bytes(kept[size:]))
            return
        if passed:
            super().on_data(kept)
        if size - passed:
            self._consumed(size - passed)

    def on_eof(self) -> None:
        """End the edge's direction."""
        held = self._pongs.rest()
        if held:
            self._enqueue(held)
        super().on_eof()

    def _enqueue(self, data: bytes) -> None:
        """Write without giving credit."""
        if self._writes.holding:
            if self._chunk is None:
                self._chunk = data
                self._writes.add(self)
            else:
                self._more.append(data)
        else:
            self._write(data)

    def pause_reading(self) -> None:
        """The edge is slow: it is not idle, and is not pinged."""
        self._edge_full = True
        super().pause_reading()

    def resume_reading(self) -> None:
        """Read the origin again."""
        self._edge_full = False
        super().resume_reading()

    def tick(self) -> None:
        """One part of the interval has passed (PingClock)."""
        self._idle += 1
        if self._pongs.lost:
            return
        self._pongs.budget = self._budget(self._clock)
        frames = self._frames
        if self._idle <= PARTS or frames.left or frames.closed or self._said or self._edge_full or self._origin_ended:
            return
        self._idle = 0
        self._pings += 1
        token = _TOKEN + self._pings.to_bytes(4, "big")
        self._pongs.token = token
        self._port.write(encode_frame(PING, token))

    def abort(self) -> None:
        """End the connection without a word to the edge."""
        self._clock.discard(self)
        super().abort()

    def connection_lost(self, error: Exception | None) -> None:
        """End the stream."""
        self._clock.discard(self)
        super().connection_lost(error)
