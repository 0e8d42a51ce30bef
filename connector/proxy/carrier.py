"""TCP inside a WebSocket that ends here: binary messages to the origin's bytes and back (`cloudflared access`).

Owns: CarriedSplice, the server's end of that WebSocket coupled to an origin connection.
In: masked frames of the edge, bytes of the origin. Out: bytes to the origin, unmasked frames to the edge.
Never: joins fragments or keeps a message: payload passes as it comes.

Text messages are dropped, pings answered, a close is answered and ends both sides; every 54 s the eyeball is pinged. An
origin that ends is a Close 1000, and no half-close: WebSocket has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from connector.errors import WireError
from connector.protocol.ports import Buffer, StreamPort
from connector.proxy.origins import OriginConnection
from connector.proxy.splice import DrainQueue, Splice
from connector.proxy.ws_pings import PARTS, PingClock
from connector.wire.ws_stream import (
    BINARY,
    CLOSE,
    GOING_AWAY,
    NORMAL,
    PING,
    PONG,
    PROTOCOL_FAILURE,
    ClientFrames,
    close_frame,
    encode_frame,
)

MESSAGE_SIZE: Final = 16 * 1024
"""Bytes of a message at most. Precedent: cloudflared reads that much at once, and its own reader cuts off more."""

BROKEN: Final = 1011
"""Close code of an origin connection that broke."""


def answer_close(payload: bytes) -> bytes:
    """Return the answer to a Close frame: the same code, if it had one."""
    return encode_frame(CLOSE, payload[:2] if len(payload) >= 2 else b"")


class CarriedSplice(Splice):
    """One WebSocket and one TCP connection. `frames` may have been used before (SOCKS)."""

    __slots__ = ("_clock", "_edge_full", "_edge_owed", "_frames", "_over", "_ticks")

    def __init__(
        self,
        port: StreamPort,
        connection: OriginConnection,
        drains: DrainQueue,
        done: Callable[[], None],
        frames: ClientFrames,
        clock: PingClock,
    ) -> None:
        super().__init__(port, connection, drains, done)
        self._frames = frames
        self._clock = clock
        self._ticks = 0
        self._over = False  # a Close frame went out: nothing may follow
        self._edge_full = False
        self._edge_owed = 0
        self.data_received = self._wrap
        clock.add(self)

    # -- from the edge

    def on_data(self, data: Buffer) -> None:
        """Unpack frames and pass their payload on."""
        size = len(data)
        if self._over:
            self._consumed(size)
            return
        try:
            pieces = self._frames.receive(data)
        except WireError:
            self._consumed(size)
            self._end(close_frame(PROTOCOL_FAILURE))
            return
        answered = False
        for opcode, _, _, payload in pieces:
            if opcode == BINARY:
                if payload:
                    size -= len(payload)
                    super().on_data(payload)
            elif opcode == PING:
                self._port.write(encode_frame(PONG, payload))
                answered = True
            elif opcode == CLOSE:
                self._end(answer_close(payload))
                break
        if answered and self._edge_full:
            # Answers that nobody takes must not pile up: the eyeball gets credit for more when it reads them.
            self._edge_owed += size
        elif size:
            self._consumed(size)

    def push(self, payload: bytes) -> None:
        """Pass payload on that was unpacked before; its credit is given now."""
        super().on_data(payload)

    def pause_reading(self) -> None:
        """Stop reading the origin: the edge is slow."""
        self._edge_full = True
        super().pause_reading()

    def resume_reading(self) -> None:
        """Read the origin again."""
        self._edge_full = False
        owed, self._edge_owed = self._edge_owed, 0
        if owed:
            self._consumed(owed)
        super().resume_reading()

    # -- from the origin

    def _wrap(self, data: Buffer) -> None:
        if len(data) <= MESSAGE_SIZE:
            self._port.write(encode_frame(BINARY, data))
            return
        write = self._port.write
        with memoryview(data) as view:
            for at in range(0, len(view), MESSAGE_SIZE):
                write(encode_frame(BINARY, view[at : at + MESSAGE_SIZE]))

    def eof_received(self) -> bool:
        """Take the origin's end as the end of the conversation."""
        self._say(close_frame(NORMAL))
        super().eof_received()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """End the stream, in words."""
        self._clock.discard(self)
        self._say(close_frame(BROKEN if error is not None else NORMAL))
        super().connection_lost(error)

    # -- ends

    def go_away(self) -> bool:
        """Close 1001: every write here is a whole frame."""
        self._end(close_frame(GOING_AWAY))
        return True

    def abort(self) -> None:
        """End the connection without a word to the edge."""
        self._clock.discard(self)
        super().abort()

    def tick(self) -> None:
        """One part of the interval has passed (PingClock)."""
        self._ticks += 1
        if self._ticks >= PARTS:
            self._ticks = 0
            if not self._edge_full and not self._over:
                self._port.write(encode_frame(PING, b""))

    def _say(self, frame: bytes) -> None:
        if not self._over and not self._origin_ended:
            self._over = True
            self._port.write(frame)

    def _end(self, frame: bytes) -> None:
        """Write a last frame; let the origin have what came before, and end."""
        if self._over:
            return
        self._say(frame)
        if not self._origin_ended:
            self._origin_ended = True
            self._port.write_eof()
        self.flush()
        if not self._transport.is_closing():
            self._transport.close()
        self._drains.add(self)
