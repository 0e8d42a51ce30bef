"""All streams of one QUIC link: which are open, how much they hold, who must wait (proto/README.md, QUIC part).

Owns: QuicStreams: the table of open streams, receive credit, the pausing of origins and of receiving.
In: stream events of the engine. Out: calls on a QuicSender; streams and, through them, calls on StreamSinks.
Never: packets, datagrams, time, sockets.

How much is held for slow origins: `lent` bytes were given to sinks and are not yet `consumed`. Where the engine gives
credit back stream by stream (`credit`), windows bound them. Where it gives credit back as soon as data is taken from
it, `receive_paused` tells the link to take nothing more until enough was consumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from connector.errors import ProtocolError
from connector.protocol.ports import Acceptor, Buffer, ResetCode, StreamPort, StreamSink
from connector.protocol.quic_limits import DEFAULT_LIMITS, QuicLimits
from connector.protocol.quic_stream import NO_SINK, QuicStream

MEASURE_STEP = 1_048_576
CROWDED_FLUSHES = 16
"""While too much waits: bytes written, and flushes done, until it is measured again."""


class QuicSender(Protocol):
    """What streams need of the engine. No call raises."""

    def send(self, stream_id: int, data: Buffer, fin: bool) -> bool:
        """Queue bytes (copied before it returns) and perhaps FIN; False when the peer does not take any more."""

    def reset_stream(self, stream_id: int) -> None:
        """RESET_STREAM 0: drop what is queued."""

    def stop_stream(self, stream_id: int) -> None:
        """STOP_SENDING 0."""

    def queued(self, stream_id: int) -> int:
        """Bytes of the stream that wait for their first transmission."""

    def queued_total(self) -> int:
        """The same of all streams."""

    def credit(self, stream_id: int, n: int) -> None:
        """Give receive credit for `n` bytes of the stream."""


class QuicStreams:
    """All open streams of one link. The link passes the engine's stream events and asks `receive_paused`.

    `wake` is called when there is something to flush, once until `flushed` is called. `accept_rpc` gets the port of
    an RPC stream that the edge opened (None: such streams are reset). `on_malformed` gets a text for each stream that
    broke the edge protocol, `on_sink_error` what a sink raised.
    """

    def __init__(
        self,
        sender: QuicSender,
        accept: Acceptor,
        *,
        wake: Callable[[], None],
        limits: QuicLimits = DEFAULT_LIMITS,
        accept_rpc: Callable[[StreamPort], StreamSink | None] | None = None,
        on_malformed: Callable[[str], None] | None = None,
        on_sink_error: Callable[[Exception], None] | None = None,
        credit_by_stream: bool = False,
    ) -> None:
        self.sender = sender
        self.accept = accept
        self.accept_rpc = accept_rpc
        self.limits = limits
        self.streams: dict[int, QuicStream] = {}
        self.lent = 0
        self.preambles = 0
        self.high_water = limits.stream_high_water
        self.receive_paused = False
        self.unsent = 0  # at least what waits for transmission on all streams
        self.unsent_limit = limits.queue_high_water  # measure when `unsent` exceeds it: that takes time per open stream
        self.touched = False
        self.ended = False
        self.progress = 0  # bytes consumed since the link began, for the stall watch
        self._credit_by_stream = credit_by_stream
        self._wake = wake
        self._on_malformed = on_malformed
        self._on_sink_error = on_sink_error
        self._highest = -3  # ID of the newest stream of the edge: 1, 5, 9, ...
        self._skipped: set[int] = set()  # opened by a higher ID, but not seen yet
        self._paused: deque[QuicStream] = deque()
        self._resume_receiving: Callable[[], None] | None = None
        self._crowded_flushes = 0

    def __len__(self) -> int:
        return len(self.streams)

    def on_resume(self, call: Callable[[], None]) -> None:
        """Call `call` whenever receiving may go on."""
        self._resume_receiving = call

    def open_raw(self, stream_id: int) -> QuicStream:
        """Register a stream that this side opened; set its `sink` before anything arrives."""
        stream = QuicStream(self, stream_id, raw=True)
        self.streams[stream_id] = stream
        return stream

    # --- events of the engine --------------------------------------------------------------------------------------

    def receive_data(self, stream_id: int, data: Buffer, fin: bool) -> None:
        """Take payload of a stream, in order."""
        stream = self.streams.get(stream_id)
        if stream is None:
            stream = self._maybe_open(stream_id)
            if stream is None:
                self.sender.credit(stream_id, len(data))
                return
        try:
            stream.receive(data, fin)
        except Exception as error:
            self.sink_failed(stream, error)

    def receive_reset(self, stream_id: int) -> None:
        """Take RESET_STREAM: the edge gave the request up."""
        stream = self.streams.get(stream_id)
        if stream is None:
            self._maybe_open(stream_id, at_once_over=True)
            return
        stream.fin_received = True
        self.abort(stream, None)

    def receive_stop(self, stream_id: int) -> None:
        """Take STOP_SENDING: nobody wants the response any more."""
        stream = self.streams.get(stream_id)
        if stream is None:
            return
        if stream.send_ended and not stream.receive_ended:
            return  # the response is whole; the request may go on
        self.abort(stream, None)

    def connection_lost(self, error: BaseException | None) -> None:
        """Tell every sink; nothing is sent any more."""
        self.ended = True
        while self.streams:
            _, stream = self.streams.popitem()
            stream.closed = True
            self._tell_reset(stream, error)
        self.lent = self.preambles = 0
        self.receive_paused = False
        self._paused.clear()

    # --- flow ------------------------------------------------------------------------------------------------------

    def touch(self) -> None:
        """There is something to flush."""
        if not self.touched and not self.ended:
            self.touched = True
            self._wake()

    def flushed(self) -> None:
        """The link sent what it could: resume sinks whose queues have drained."""
        self.touched = False
        paused = self._paused
        if not paused:
            return
        if self.high_water != self.limits.stream_high_water:
            self._crowded_flushes += 1
            if self._crowded_flushes % CROWDED_FLUSHES == 0:
                self.measure_all()
        low = min(self.limits.stream_low_water, self.high_water)
        for _ in range(min(len(paused), self.limits.resume_scan)):
            stream = paused.popleft()
            if stream.closed or not stream.paused:
                continue
            stream.unsent = self.sender.queued(stream.stream_id)
            if stream.unsent > low:
                paused.append(stream)
                continue
            stream.paused = False
            if not stream.send_ended:
                try:
                    stream.sink.resume_writing()
                except Exception as error:
                    self.sink_failed(stream, error)

    def measure(self, stream: QuicStream) -> None:
        """Find out how much of `stream` really waits; pause its sink if that is too much."""
        stream.unsent = self.sender.queued(stream.stream_id)
        if stream.unsent > self.high_water:
            stream.paused = True
            self._paused.append(stream)
            try:
                stream.sink.pause_writing()
            except Exception as error:
                self.sink_failed(stream, error)

    def measure_all(self) -> None:
        """Find out how much waits on all streams, and so how much one may have."""
        limits = self.limits
        self.unsent = self.sender.queued_total()
        self.unsent_limit = max(limits.queue_high_water, self.unsent + MEASURE_STEP)
        crowded = self.unsent > limits.queue_high_water
        self.high_water = limits.crowded_high_water if crowded else limits.stream_high_water

    def consumed(self, stream_id: int, n: int) -> None:
        """Take `n` bytes as accepted by an origin."""
        self.lent -= n
        self.progress += n
        if self._credit_by_stream:
            self.sender.credit(stream_id, n)
        if self.receive_paused and self.lent <= self.limits.receive_low_water:
            self._go_on()

    def pause_receiving(self) -> None:
        """Too much is lent. An engine that gives credit stream by stream is bounded by its windows already."""
        if not self._credit_by_stream:
            self.receive_paused = True

    def _go_on(self) -> None:
        self.receive_paused = False
        if self._resume_receiving is not None:
            self._resume_receiving()

    def reset_stalled(self) -> QuicStream | None:
        """Reset the stream that holds the most, because nothing moved for too long; None when there is none."""
        stream = max(self.streams.values(), key=_lent_of, default=None)
        if stream is None or not stream.lent:
            return None
        self.abort(stream, ProtocolError(f"an origin accepted nothing while {stream.lent} bytes waited for it"))
        return stream

    def waiting(self) -> list[tuple[int, int]]:
        """Return the streams with payload that waits for the edge, and how much of each has left so far."""
        found = []
        for number, stream in self.streams.items():
            queued = self.sender.queued(number) if stream.unsent else 0
            if queued:
                found.append((number, stream.sent - queued))
        return found

    def give_up(self, stream_id: int, error: Exception) -> None:
        """End a stream both ways and tell its sink."""
        stream = self.streams.get(stream_id)
        if stream is not None:
            self.abort(stream, error)

    # --- ends ------------------------------------------------------------------------------------------------------

    def abort(self, stream: QuicStream, error: BaseException | None) -> None:
        """End a stream both ways and tell its sink."""
        if stream.closed:
            return
        stream.leave_head()
        stream.reset(ResetCode.FAILED)
        self._tell_reset(stream, error)

    def sink_failed(self, stream: QuicStream, error: Exception) -> None:
        """A sink or the acceptor raised: that stream ends, the link goes on."""
        if self._on_sink_error is not None:
            self._on_sink_error(error)
        self.abort(stream, error)

    def malformed(self, text: str) -> None:
        """Report a stream that broke the edge protocol."""
        if self._on_malformed is not None:
            self._on_malformed(text)

    def forget(self, stream: QuicStream) -> None:
        """The stream is over both ways: let go, with what its sink still owes."""
        if stream.closed:
            return
        stream.closed = True
        stream.streaming = stream.receiving = False
        self.streams.pop(stream.stream_id, None)
        if stream.lent:
            lent, stream.lent = stream.lent, 0
            self.consumed(stream.stream_id, lent)

    def _tell_reset(self, stream: QuicStream, error: BaseException | None) -> None:
        sink, stream.sink = stream.sink, NO_SINK
        try:
            sink.on_reset(error)
        except Exception as failure:
            if self._on_sink_error is not None:
                self._on_sink_error(failure)

    def _maybe_open(self, stream_id: int, *, at_once_over: bool = False) -> QuicStream | None:
        """Return a new stream of the edge; None for one that is over, or that the edge may not use."""
        if stream_id & 3 != 1 or self.ended:
            return None
        if stream_id > self._highest:
            # The engine enforces the stream limit, so this is bounded by it.
            self._skipped.update(range(self._highest + 4, stream_id, 4))
            self._highest = stream_id
        elif stream_id in self._skipped:
            self._skipped.discard(stream_id)
        else:
            return None
        stream = QuicStream(self, stream_id, raw=False)
        if at_once_over:
            stream.fin_received = True
            stream.reset(ResetCode.CANCELLED)
            return None
        self.streams[stream_id] = stream
        return stream


def _lent_of(stream: QuicStream) -> int:
    return stream.lent
