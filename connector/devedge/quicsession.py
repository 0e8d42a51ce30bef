"""QUIC in either role (the client's for tests), by the general-purpose `aioquic` library.

Owns: everything that knows aioquic, its private attributes included: one `QuicConnection` per connector, the credit of
every stream, the marks of every send queue.
In: datagrams of quiclisten.py; `QuicStream.write` and friends. Out: calls of each stream's `StreamHandler`; datagrams.
Never: knows what a stream means (quiclink.py), or uses the connector's own QUIC code. Imported by the first datagram
only, so that an edge which nobody reaches over QUIC starts as fast as one without it.

Strategy: callbacks only, one flush per loop turn. What the library lacks is added in one place each: stream credit by
consumption (`_Connection`), marks on send queues (`QuicStream.relax`), streams beyond the peer's limit wait here,
because the library would send the reset of one that was never allowed (`open_stream`). The library's own limit of 128
streams counts those that the *connector* opens, which are a handful, so it stays.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from aioquic._buffer import Buffer as QuicBuffer
from aioquic._buffer import BufferReadError
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import MAX_STREAM_DATA_FRAME_CAPACITY, QuicConnection
from aioquic.quic.packet import (
    QuicFrameType,
    QuicPacketType,
    QuicProtocolVersion,
    encode_quic_version_negotiation,
    pull_quic_header,
)

from connector.devedge.quictls import ServerContext
from connector.devedge.streams import RawHeaders, StreamHandler, StreamLostError
from connector.protocol.ports import LinkTap

ALPN = "argotunnel"

STREAM_WINDOW = 512 * 1024
"""Bytes that one stream may hold unread (quic-go starts with 512 KiB): 200 stalled ones hold 100 MB at most."""

CONNECTION_WINDOW = 16 * 1024 * 1024
"""Bytes in flight on one connection at first; the library doubles it on arrival, so it never holds a stream up."""

QUEUE_HIGH = 256 * 1024
QUEUE_LOW = 64 * 1024
"""Marks of a stream's unsent bytes: above HIGH its producer is paused, below LOW resumed."""

IDLE_LIMIT = 30.0
"""Seconds without a packet until a connection is given up; connectors ask for 5, and the smaller value counts."""

DATAGRAM_FRAME = 16_383
"""Largest DATAGRAM frame that is taken; what cloudflared names."""

DATAGRAM_OVERHEAD = 42
"""Bytes of a packet around a datagram's payload, with the longest connection ID. A larger datagram would hold up
every later one inside the library."""

DATAGRAM_QUEUE = 1024
"""Datagrams that wait for the congestion window; more are dropped, as UDP does."""

STREAMS_AT_ONCE = 32
"""Streams that share packets; the cost of a packet grows with them."""

TIMER_MINIMUM = 0.001
"""uvloop's clock has milliseconds: a shorter timer fires early, and again, and again."""

LATE_SECONDS = 1.0
"""A timer this late found a process that stood still: what came meanwhile is read before anybody is given up."""

CID_LENGTH = 8


class Owner(Protocol):
    """The socket that a session belongs to."""

    def send(self, data: bytes, address: Any) -> None:
        """Send a datagram."""

    def add_id(self, connection_id: bytes, session: QuicSession) -> None:
        """Route datagrams with that destination to the session."""

    def drop_id(self, connection_id: bytes) -> None:
        """Route them no more."""


class _Connection(QuicConnection):
    """aioquic's connection whose stream windows move by what was consumed, not by what arrived."""

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        if not self._is_client:
            ServerContext.adopt(self.tls)

    def _write_application(self, builder: Any, network_path: Any, now: float) -> None:
        """Give the library few streams at a time: it looks at every one that it has for every packet."""
        queue = self._streams_queue
        if len(queue) <= STREAMS_AT_ONCE:
            super()._write_application(builder, network_path, now)
            return
        busy = [stream for stream in queue if _busy(stream)]
        done = [stream for stream in queue if not _busy(stream)]
        at = 0
        try:
            while True:
                self._streams_queue = busy[at : at + STREAMS_AT_ONCE]
                at += STREAMS_AT_ONCE
                super()._write_application(builder, network_path, now)
                done += self._streams_queue  # without those that it forgot
                self._streams_queue = []
                if at >= len(busy) or self._pacing_at is not None:
                    break
        finally:  # the library ends this by an exception when the packets are full; who had no turn is first next time
            self._streams_queue = busy[at:] + self._streams_queue + done

    def _write_stream_limits(self, builder: Any, space: Any, stream: Any) -> None:
        wanted = stream.max_stream_data_local
        if stream.max_stream_data_local_sent == wanted or stream.receiver.is_finished:
            return
        frame = builder.start_frame(
            QuicFrameType.MAX_STREAM_DATA,
            capacity=MAX_STREAM_DATA_FRAME_CAPACITY,
            handler=self._on_max_stream_data_delivery,
            handler_args=(stream,),
        )
        frame.push_uint_var(stream.stream_id)
        frame.push_uint_var(wanted)
        stream.max_stream_data_local_sent = wanted


assert hasattr(QuicConnection, "_write_stream_limits"), "this aioquic grants credit elsewhere: adapt _Connection"


def _busy(stream: Any) -> bool:
    """Whether the library has something to do for a stream."""
    sender = stream.sender
    if stream.receiver.stop_pending or sender.reset_pending or stream.is_finished:
        return True
    return not sender.buffer_is_empty and not stream.is_blocked


class QuicStream:
    """One bidirectional stream. Calls after its end are no-ops. Not in `session.streams` before it is allowed."""

    __slots__ = ("_early", "_eof", "_owed", "_paused", "_stopped", "handler", "id", "peer_done", "session")

    def __init__(self, session: QuicSession, stream_id: int, handler: StreamHandler | None) -> None:
        self.session = session
        self.id = stream_id  # -1 while it waits for the peer's limit
        self.handler = handler
        self.peer_done = False
        self._eof = False
        self._stopped = False  # the peer reads no more
        self._early = bytearray()
        self._paused = False
        self._owed = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue payload (copied)."""
        handler = self.handler
        if handler is None or self._eof or self._stopped:
            return
        if self.id < 0:
            self._early += data
            waiting = len(self._early)
        else:
            waiting = self.session.send_data(self, bytes(data), end=False)
        if waiting > QUEUE_HIGH and not self._paused:
            self._paused = True
            self.session.paused.add(self)
            handler.pause_writing()

    def write_eof(self, trailers: RawHeaders = ()) -> None:
        """End this side behind everything queued; QUIC streams carry no trailers."""
        if self.handler is None or self._eof:
            return
        self._eof = True
        if self.id >= 0 and not self._stopped:
            self.session.send_data(self, b"", end=True)
        self._maybe_forget()

    def consumed(self, size: int) -> None:
        """Give receive credit back; sent when half the window has gathered."""
        if self.handler is None or self.peer_done:
            return
        self._owed += size
        if self._owed >= STREAM_WINDOW // 2:
            owed, self._owed = self._owed, 0
            self.session.credit(self, owed)

    def reset(self) -> None:
        """Give the stream up, both ways; the handler hears nothing more."""
        if self.handler is not None:
            self.session.reset_stream(self)

    # For the session only.

    def allowed(self, stream_id: int) -> None:
        """The peer's limit lets it out: send what waited."""
        self.id = stream_id
        early, self._early = bytes(self._early), bytearray()
        self.session.send_data(self, early, end=self._eof)

    def stopped(self) -> None:
        """The peer wants no more of what we send: whatever comes is swallowed, so that its producer goes on."""
        self._stopped = True
        self.relax(0)
        self._maybe_forget()

    def relax(self, waiting: int) -> None:
        """Resume the producer when there is room."""
        if self._paused and waiting < QUEUE_LOW:
            self._paused = False
            self.session.paused.discard(self)
            if self.handler is not None:
                self.handler.resume_writing()

    def ended(self) -> None:
        """The peer's side is over."""
        self.peer_done = True
        if self.handler is not None:
            self.handler.on_eof(())
        self._maybe_forget()

    def _maybe_forget(self) -> None:
        if self.peer_done and (self._eof or self._stopped) and self.id >= 0:
            self.session.forget(self)


class QuicSession:
    """One connection. Subclasses fill in `on_connected`, `on_peer_stream`, `on_datagram`, `on_lost`."""

    def __init__(self, owner: Owner, configuration: QuicConfiguration, first_id: bytes | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.quic = _Connection(configuration=configuration, original_destination_connection_id=first_id)
        self._peer_kind = 1 if configuration.is_client else 0  # bidirectional streams that the peer opens, modulo 4
        self.streams: dict[int, QuicStream] = {}
        self.paused: set[QuicStream] = set()
        self.connected = False
        self._owner = owner
        self._ids = {self.quic.host_cid} | ({first_id} if first_id else set())
        for connection_id in self._ids:
            owner.add_id(connection_id, self)
        self._seen: set[int] = set()  # streams of the peer
        self._waiting: deque[QuicStream] = deque()
        self._over = False
        self._flush_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._dispatch: dict[type, Callable[[Any], None]] = {
            events.StreamDataReceived: self._on_data,
            events.StreamReset: self._on_reset,
            events.StopSendingReceived: self._on_stop,
            events.DatagramFrameReceived: self._on_datagram,
            events.HandshakeCompleted: self._on_handshake,
            events.ConnectionIdIssued: self._on_id,
            events.ConnectionIdRetired: self._on_id_retired,
        }

    # What subclasses fill in.

    def on_connected(self) -> None:
        """The handshake is done."""

    def on_peer_stream(self, stream: QuicStream) -> None:
        """Take a new stream of the connector and set its handler."""

    def on_datagram(self, data: bytes) -> None:
        """Take an unreliable datagram."""

    def on_lost(self, error: BaseException | None) -> None:
        """The connection is gone; every stream heard `on_reset` already."""

    # Calls from outside.

    def open_stream(self, handler: StreamHandler) -> QuicStream:
        """Open a stream; it goes out with its first bytes. Raises StreamLostError when the connection is gone."""
        if self._over:
            raise StreamLostError("the connection takes no new streams")
        stream = QuicStream(self, -1, handler)
        self._waiting.append(stream)
        self._let_out()
        return stream

    def send_datagram(self, data: bytes) -> bool:
        """Send an unreliable datagram; False when it is too large, not wanted, or the queue is full."""
        accepted = self.quic._remote_max_datagram_frame_size or 0
        size = self.quic.configuration.max_datagram_size
        if self._over or len(data) + 3 > accepted or len(data) > size - DATAGRAM_OVERHEAD:
            return False
        if len(self.quic._datagrams_pending) >= DATAGRAM_QUEUE:
            return False
        if self.tap is not None:
            self.tap.on_datagram(True, data)
        self.quic.send_datagram_frame(data)
        self.wake()
        return True

    def close_connection(self, code: int, reason: str, error: BaseException | None) -> None:
        """Send CONNECTION_CLOSE; `on_lost(error)` follows at once. What was not delivered yet is lost."""
        if self._over:
            return
        self.quic.close(error_code=code, reason_phrase=reason)
        self._flush()
        self._end(error)

    def wake(self) -> None:
        """Flush in this loop turn."""
        if not self._flush_due and not self._over:
            self._flush_due = True
            self.loop.call_soon(self._flush)

    # From the socket.

    def receive(self, data: bytes, address: Any) -> None:
        """Take a datagram; `settle` follows when the socket is empty."""
        if not self._over:
            self.quic.receive_datagram(data, address, self.loop.time())

    def settle(self) -> None:
        """Hand out what the datagrams brought."""
        if self._over:
            return
        while (event := self.quic.next_event()) is not None:
            take = self._dispatch.get(type(event))
            if take is not None:
                take(event)
            if self._gone():
                return
        close = self.quic._close_event  # the library's own event comes three probe timeouts later
        if close is None:
            self.wake()
            return
        if self.quic._close_pending:
            self._flush()
        if close.frame_type is None and close.error_code == 0:
            self._end(None)
        else:
            kind = "application" if close.frame_type is None else "transport"
            words = close.reason_phrase or "no reason given"
            text = words if words == "Idle timeout" else f"QUIC {kind} error {close.error_code:#x}: {words}"
            self._end(StreamLostError(text))

    def fail(self, error: BaseException) -> None:
        """The library raised: nothing more can be expected of this connection."""
        if not self._over:
            self._end(error)

    tap: LinkTap | None = None

    # Calls of streams.

    def send_data(self, stream: QuicStream, data: bytes, *, end: bool) -> int:
        """Queue bytes of a stream; returns how many of it are not sent yet."""
        if self.tap is not None:
            self.tap.on_stream_bytes(stream.id, True, data, end)
        try:
            self.quic.send_stream_data(stream.id, data, end)
        except (RuntimeError, ValueError):
            return 0  # the peer stopped it, and the event is still on its way here
        self.wake()
        return self._unsent(stream)

    def credit(self, stream: QuicStream, size: int) -> None:
        """Move a stream's window on."""
        inner = self.quic._streams.get(stream.id)
        if inner is not None and not inner.receiver.is_finished:
            inner.max_stream_data_local += size
            self.wake()

    def reset_stream(self, stream: QuicStream) -> None:
        """Send RESET_STREAM and STOP_SENDING, code 0, and forget the stream."""
        if stream.id < 0:
            self._waiting.remove(stream)
        else:
            try:
                self.quic.reset_stream(stream.id, 0)
                if not stream.peer_done:
                    self.quic.stop_stream(stream.id, 0)
            except (RuntimeError, ValueError):
                pass  # it is over inside the library
        self.forget(stream)
        self.wake()

    def forget(self, stream: QuicStream) -> None:
        """Drop a stream whose both sides ended."""
        stream.handler = None
        self.paused.discard(stream)
        self.streams.pop(stream.id, None)

    def _unsent(self, stream: QuicStream) -> int:
        inner = self.quic._streams.get(stream.id)
        return inner.sender._buffer_stop - inner.sender.highest_offset if inner is not None else 0

    # Events of aioquic.

    def _stream(self, stream_id: int) -> QuicStream | None:
        stream = self.streams.get(stream_id)
        if stream is None and stream_id % 4 == self._peer_kind and stream_id not in self._seen:
            self._seen.add(stream_id)
            stream = self.streams[stream_id] = QuicStream(self, stream_id, None)
            self.on_peer_stream(stream)
        return stream

    def _on_data(self, event: events.StreamDataReceived) -> None:
        if self.tap is not None:
            self.tap.on_stream_bytes(event.stream_id, False, event.data, event.end_stream)
        stream = self._stream(event.stream_id)
        if stream is None:
            return
        if event.data and stream.handler is not None:
            stream.handler.on_data(event.data)
        if event.end_stream:
            stream.ended()

    def _on_reset(self, event: events.StreamReset) -> None:
        stream = self._stream(event.stream_id)
        if stream is None or stream.handler is None:
            return
        handler = stream.handler
        stream.peer_done = True
        self.reset_stream(stream)
        handler.on_reset(StreamLostError(f"reset by the peer, code {event.error_code}", event.error_code))

    def _on_stop(self, event: events.StopSendingReceived) -> None:
        stream = self._stream(event.stream_id)
        if stream is not None:
            stream.stopped()

    def _on_datagram(self, event: events.DatagramFrameReceived) -> None:
        if self.tap is not None:
            self.tap.on_datagram(False, event.data)
        self.on_datagram(event.data)

    def _on_handshake(self, event: events.HandshakeCompleted) -> None:
        self.connected = True
        self.on_connected()

    def _on_id(self, event: events.ConnectionIdIssued) -> None:
        self._ids.add(event.connection_id)
        self._owner.add_id(event.connection_id, self)

    def _on_id_retired(self, event: events.ConnectionIdRetired) -> None:
        self._ids.discard(event.connection_id)
        self._owner.drop_id(event.connection_id)

    # Sending.

    def _let_out(self) -> None:
        while self._waiting:
            stream_id = self.quic.get_next_available_stream_id()
            if stream_id // 4 >= self.quic._remote_max_streams_bidi:
                return
            stream = self._waiting.popleft()
            self.streams[stream_id] = stream
            stream.allowed(stream_id)

    def _flush(self) -> None:
        self._flush_due = False
        if self._over or not self.quic._network_paths:
            return
        self._let_out()
        for data, address in self.quic.datagrams_to_send(self.loop.time()):
            self._owner.send(data, address)
        for stream in list(self.paused):
            stream.relax(self._unsent(stream) if stream.id >= 0 else QUEUE_HIGH)
        self._arm()

    def _arm(self) -> None:
        deadline = self.quic.get_timer()
        if deadline is None:
            return
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return  # it looks again when it fires
            self._timer.cancel()
        when = max(deadline, self.loop.time() + TIMER_MINIMUM)
        self._timer = self.loop.call_at(when, self._on_timer, when)

    def _on_timer(self, due: float, second: bool = False) -> None:
        self._timer = None
        if self._over:
            return
        now = self.loop.time()
        if not second and now - due > LATE_SECONDS:
            self._timer = self.loop.call_at(now + TIMER_MINIMUM, self._on_timer, now, True)
            return
        self.quic.handle_timer(now)
        self.settle()

    def _end(self, error: BaseException | None) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for connection_id in self._ids:
            self._owner.drop_id(connection_id)
        lost = StreamLostError(f"connection lost: {error}" if error else "connection closed")
        for stream in [*self.streams.values(), *self._waiting]:
            handler = stream.handler
            self.forget(stream)
            if handler is not None:
                handler.on_reset(lost)
        self._waiting.clear()
        if self.connected:
            self.on_lost(error)

    def _gone(self) -> bool:
        return self._over  # asked anew: what was called in between may have ended it

    @property
    def over(self) -> bool:
        """Whether the connection is gone."""
        return self._over


def configuration(datagram_size: int) -> QuicConfiguration:
    """What every connection offers; a leaf is still to be loaded."""
    return QuicConfiguration(
        is_client=False,
        alpn_protocols=[ALPN],
        connection_id_length=CID_LENGTH,
        idle_timeout=IDLE_LIMIT,
        max_data=CONNECTION_WINDOW,
        max_stream_data=STREAM_WINDOW,
        max_datagram_size=datagram_size,
        max_datagram_frame_size=DATAGRAM_FRAME,
        supported_versions=[QuicProtocolVersion.VERSION_1],
    )


def destination(data: bytes) -> tuple[bytes, bool, bytes | None] | None:
    """Read the start of a datagram: its connection ID, whether it may open a connection, or the answer to it.

    None: it is no QUIC.
    """
    try:
        header = pull_quic_header(QuicBuffer(data=data), host_cid_length=CID_LENGTH)
    except (ValueError, BufferReadError):
        return None
    answer = None
    if header.version not in (None, 0, QuicProtocolVersion.VERSION_1):
        answer = encode_quic_version_negotiation(
            source_cid=header.destination_cid,
            destination_cid=header.source_cid,
            supported_versions=[QuicProtocolVersion.VERSION_1],
        )
    return header.destination_cid, header.packet_type == QuicPacketType.INITIAL and len(data) >= 1200, answer
