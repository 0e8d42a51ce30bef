"""Raw bytes both ways between a stream of the edge and an origin connection.

Owns: Splice (the streaming state of one connection) and DrainQueue (deadlines of half-closed ones).
In: payload of the edge (`on_data`), bytes of the origin (StreamUser). Out: writes on the other side.
Never: looks into the bytes (`ws_splice.py` follows frames); no task, timer or future per stream.

*Strategy*: once upgraded, the transport's protocol is replaced by the Splice, whose `data_received` *is* the port's
`write`: bytes of the origin pass no code of this package. The other way, what one read of the link brings for an
origin is written at once (`write_queue.py`). When one direction ends, its end is carried over and the other may go on
for a while: SPLICE_DRAIN seconds for WebSockets, and as long as bytes move for TCP. One timer serves all splices of a
queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from connector.protocol.ports import Buffer, StreamPort
from connector.proxy import limits
from connector.proxy.origins import OriginConnection
from connector.proxy.write_queue import WriteQueue


class Splice:
    """One stream and one connection, coupled. `done()` is called once, when the connection is gone."""

    __slots__ = ("_chunk", "_connection", "_consumed", "_done", "_drains", "_edge_ended", "_more", "_moved",
                 "_origin_ended", "_origin_full", "_owed", "_port", "_transport", "_write", "_writes",
                 "data_received")  # fmt: skip

    data_received: Callable[[Buffer], None]

    def __init__(
        self, port: StreamPort, connection: OriginConnection, drains: DrainQueue, done: Callable[[], None]
    ) -> None:
        transport = connection.transport
        self.data_received = port.write
        self._port = port
        self._consumed = port.consumed
        self._connection = connection
        self._transport = transport
        self._write: Callable[[Buffer], None] = connection.write
        self._writes = drains.writes
        self._drains = drains
        self._done = done
        self._owed = 0
        self._chunk: Buffer | None = None  # the first one that waits for the end of a read,
        self._more: list[Buffer] = []  # and what came behind it
        self._origin_full = False
        self._edge_ended = False
        self._origin_ended = False
        self._moved = False

    # -- from the edge

    def on_data(self, data: Buffer) -> None:
        """Write to the origin, at the end of this read: it often brings several messages."""
        writes = self._writes
        if writes.holding:
            if self._chunk is None:
                self._chunk = data
                writes.add(self)
            else:
                self._more.append(data)
        else:
            self._moved = True
            self._write(data)
        if self._origin_full:
            self._owed += len(data)
        else:
            self._consumed(len(data))

    def flush(self) -> None:
        """Write what this read brought. Credit for it is given back already: it is one read of the link at most."""
        chunk = self._chunk
        if chunk is not None:
            self._chunk = None
            self._moved = True
            more = self._more
            if more:
                self._more = []
                self._connection.write_all([chunk, *more])
            else:
                self._write(chunk)

    def on_eof(self) -> None:
        """Carry the edge's end over, or end the rest."""
        self.flush()
        self._edge_ended = True
        transport = self._transport
        if not self._origin_ended and transport.can_write_eof() and not transport.is_closing():
            transport.write_eof()
            if self._drains.while_moving:
                self._receive_with(self._count)
        elif not transport.is_closing():
            transport.close()
        self._drains.add(self)

    def pause_reading(self) -> None:
        """Stop reading the origin: the edge is slow."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read the origin again."""
        self._transport.resume_reading()

    def abort(self) -> None:
        """End the connection without a word to the edge."""
        self._drains.discard(self)
        self._edge_ended = self._origin_ended = True
        self._chunk = None
        self._more = []
        self._transport.abort()

    def go_away(self) -> bool:
        """Tell the eyeball that this side is leaving, where there is a way to; return whether there is."""
        return False

    # -- for DrainQueue

    def maybe_expire(self) -> bool:
        """End what did not end by itself; return False for one that may go on because bytes still move."""
        if self._drains.while_moving and self._moved:
            self._moved = False
            return False
        self._transport.abort()
        return True

    def _count(self, data: Buffer) -> None:
        """Take the place of `data_received` once only the origin speaks and its silence counts."""
        self._moved = True
        self._port.write(data)

    def _receive_with(self, call: Callable[[Buffer], None]) -> None:
        """Change `data_received`; uvloop looks it up only when a protocol is set."""
        self.data_received = call
        self._transport.set_protocol(self)

    # -- from the origin (asyncio.Protocol)

    def eof_received(self) -> bool:
        """Carry the origin's end over; keep writing to it for a while if the transport can."""
        if not self._origin_ended:
            self._origin_ended = True
            self._port.write_eof()
        if self._edge_ended or not self._transport.can_write_eof():
            return False
        self._drains.add(self)
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """End the stream. A pipe that breaks is not an error here: the stream just ends."""
        self._drains.discard(self)
        self._write = _discard
        self._chunk = None
        self._more = []
        self.data_received = _discard  # a bound method of this very object would keep it alive
        if not self._origin_ended:
            self._origin_ended = True
            self._port.write_eof()
        if not self._edge_ended:
            self._edge_ended = True
            self._port.stop_reading()
        self._connection.connection_lost(error)
        self._done()

    def pause_writing(self) -> None:
        """Hold the edge's credit back: the origin is slow."""
        self._origin_full = True

    def resume_writing(self) -> None:
        """Give back the credit that was held."""
        self._origin_full = False
        owed, self._owed = self._owed, 0
        if owed:
            self._consumed(owed)


def _discard(data: Buffer) -> None:
    """Stand in for a side that is gone."""


class DrainQueue:
    """What splices of a dispatcher share: one timer, and the queue of their writes.

    Splices that ended in one direction have the same limit, so they expire in order of arrival. With `while_moving`
    it is a limit of silence: it begins anew as long as bytes went by.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        writes: WriteQueue,
        limit: float = limits.SPLICE_DRAIN,
        *,
        while_moving: bool = False,
    ) -> None:
        self.writes = writes
        self.while_moving = while_moving
        self._loop = loop
        self._limit = limit
        self._deadlines: dict[Splice, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._deadlines)

    def add(self, splice: Splice) -> None:
        """Give `splice` the limit from now on, or from when it was added first."""
        if splice not in self._deadlines:
            self._deadlines[splice] = self._loop.time() + self._limit
            if self._timer is None:
                self._timer = self._loop.call_later(self._limit, self._expire)

    def discard(self, splice: Splice) -> None:
        """Forget a splice that ended."""
        self._deadlines.pop(splice, None)
        if not self._deadlines and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        now = self._loop.time()
        for splice, deadline in list(self._deadlines.items()):
            if deadline > now:
                self._timer = self._loop.call_at(deadline, self._expire)
                return
            del self._deadlines[splice]
            if not splice.maybe_expire():
                self.add(splice)
