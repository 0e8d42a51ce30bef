"""One HTTP/2 link as a sans-I/O engine: the connector is the server, the edge the client (RFC 9113).

Owns: H2Connection: frame parsing, connection state, both connection windows, flood budgets, the out-buffer.
In: received bytes, `now`, and what H2Stream asks for. Out: one out-buffer a tick; calls to the acceptor and the sinks.
Never: does I/O, reads a clock, logs, interprets request or response headers (h2_request.py, h2_stream.py).

*Strategy*: DATA of a stream in good order is handled inline in `_parse`; every other frame goes to a method of its own,
where speed does not matter. Input is parsed where it lies; only a frame that a read cut in two is copied. Output is
appended to one bytearray that the link takes once per loop tick.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from hpack import Decoder, OversizedHeaderListError

from connector.errors import ProtocolError, WireError
from connector.protocol.h2_limits import DATA_STREAMED_FROM, DEFAULT_LIMITS, REMEMBERED_RESETS, H2Limits
from connector.protocol.h2_request import MalformedRequestError, decode_request
from connector.protocol.h2_stream import H2Stream
from connector.protocol.ports import Acceptor, Buffer, ResponseSource
from connector.wire.h2_frames import (
    CONTINUATION,
    DATA,
    DEFAULT_HEADER_TABLE_SIZE,
    DEFAULT_MAX_FRAME_SIZE,
    DEFAULT_WINDOW,
    FLAG_ACK,
    FLAG_END_HEADERS,
    FLAG_END_STREAM,
    FLAG_PADDED,
    FLAG_PRIORITY,
    FRAME_HEADER,
    FRAME_HEADER_LENGTH,
    GOAWAY,
    HEADERS,
    LARGEST_MAX_FRAME_SIZE,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    SETTINGS_ACK,
    STREAM_ID_MASK,
    WINDOW_LIMIT,
    WINDOW_UPDATE,
    ErrorCode,
    Setting,
    decode_goaway,
    decode_settings,
    decode_word,
    encode_goaway,
    encode_ping_ack,
    encode_rst_stream,
    encode_settings,
    encode_window_update,
    error_name,
    strip_padding,
)
from connector.wire.h2_headers import HPACK_NO_TABLE

_unpack_header = FRAME_HEADER.unpack_from
_SMALL = 4_096  # below it a copy is cheaper than a view
_LARGEST_STREAM_CALL = 0x7FFFFFFF

# Payload lengths of the control frames: checked on the header, before the payload is waited for.
_FIXED_LENGTHS = {PRIORITY: 5, RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}
_LARGEST_CONTROL_FRAME = 16_384  # SETTINGS and GOAWAY: 2,730 settings, or as much debug text


class _Budget:
    """Counters of what a peer may do in one stretch of time; all start again when it is over."""

    __slots__ = ("empty", "ignored", "pings", "resets", "settings", "started")

    def __init__(self, now: float) -> None:
        self.restart(now)

    def restart(self, now: float) -> None:
        self.started = now
        self.empty = self.ignored = self.pings = self.resets = self.settings = 0


class H2Connection:
    """One connection to the edge.

    Call `start` once, then `receive_data` for every read, and take `data_to_send` whenever `wake` was called. Drive
    `handle_timeout` by `next_timeout`. When `receive_data` or `handle_timeout` raises ProtocolError, a GOAWAY is in the
    out-buffer: send it, close the socket. Call `connection_lost` exactly once, whatever the end was.
    """

    __slots__ = (
        "_accept",
        "_block",
        "_block_count",
        "_block_flags",
        "_block_stream",
        "_budget",
        "_deadline",
        "_decoder",
        "_last_stream_id",
        "_left",
        "_left_ends",
        "_left_stream",
        "_lost",
        "_max_data_word",
        "_need",
        "_now",
        "_on_malformed",
        "_on_sink_error",
        "_peer_window",
        "_preface",
        "_refusing",
        "_resets_sent",
        "_rest",
        "_settings_seen",
        "_socket_paused",
        "_streams",
        "_waiting",
        "credit_due",
        "goaway_received",
        "header_block_prefix",
        "limits",
        "out",
        "out_high_water",
        "owed",
        "peer_frame_size",
        "queued",
        "receive_window",
        "send_frame_size",
        "send_window",
        "stalled",
        "stream_credit_due",
        "tail",
        "tail_at",
        "tail_size",
        "wake",
    )

    def __init__(
        self,
        accept: Acceptor,
        *,
        wake: Callable[[], None],
        limits: H2Limits = DEFAULT_LIMITS,
        on_sink_error: Callable[[Exception], None] | None = None,
        on_malformed: Callable[[str], None] | None = None,
    ) -> None:
        self.limits = limits
        self.wake = wake
        self._accept = accept
        self._on_sink_error = on_sink_error
        self._on_malformed = on_malformed
        # Receiving.
        self._now = 0.0
        self._deadline: float | None = None
        self._preface = bytearray()  # what came of it; None is not needed: full length means done
        self._settings_seen = False
        self._rest = bytearray()  # a frame that is not whole yet, and
        self._need = FRAME_HEADER_LENGTH  # the length it needs
        self._left = 0  # payload still to come of a frame that is passed on or skipped as it arrives
        self._left_stream: H2Stream | None = None
        self._left_ends = False
        self._block: bytearray | None = None  # a header block that waits for CONTINUATION
        self._block_stream = 0
        self._block_flags = 0
        self._block_count = 0
        self._decoder = Decoder(max_header_list_size=2 * limits.max_header_list_size)
        self._decoder.max_allowed_table_size = DEFAULT_HEADER_TABLE_SIZE
        self._max_data_word = limits.max_frame_size << 8
        self._budget = _Budget(0.0)
        self.receive_window = limits.connection_window
        self.owed = 0
        self.credit_due = limits.connection_window // 2
        self.stream_credit_due = limits.stream_window // 2
        # Streams.
        self._streams: dict[int, H2Stream] = {}
        self._last_stream_id = 0
        self._resets_sent: dict[int, None] = {}
        self._refusing = False
        self._lost = False
        self.goaway_received = False
        # Sending.
        self.out = bytearray()
        self.out_high_water = limits.out_high_water
        self.tail: H2Stream | None = None  # whose frame is last in the out-buffer and may be amended,
        self.tail_at = 0  # where its header is,
        self.tail_size = 0  # and how much payload it holds
        self.header_block_prefix = HPACK_NO_TABLE
        self.send_window = DEFAULT_WINDOW
        self.peer_frame_size = DEFAULT_MAX_FRAME_SIZE
        self.send_frame_size = min(DEFAULT_MAX_FRAME_SIZE, limits.send_frame_size)
        self._peer_window = DEFAULT_WINDOW
        self._socket_paused = False
        self.stalled = False  # payload must queue: the socket is paused, or others wait for their turn
        self._waiting: deque[H2Stream] = deque()  # have payload and stream window, lack connection window or room
        self.queued = 0  # bytes in all streams' queues

    def __repr__(self) -> str:
        return f"<H2Connection {len(self._streams)} streams, {len(self.out)} bytes out{', lost' if self._lost else ''}>"

    # --- for the link ----------------------------------------------------------------------------------------------

    @property
    def open_streams(self) -> int:
        """How many streams are open, half-closed ones included."""
        return len(self._streams)

    @property
    def bytes_queued(self) -> int:
        """How many bytes wait here, in the out-buffer and in the streams' queues."""
        return len(self.out) + self.queued

    def start(self, now: float) -> None:
        """Queue our SETTINGS and connection window, without waiting for the peer's preface."""
        limits = self.limits
        self._now = now
        self._deadline = now + limits.preface_timeout
        self._budget.restart(now)
        self.append(
            encode_settings(
                [
                    (Setting.MAX_FRAME_SIZE, limits.max_frame_size),
                    (Setting.MAX_CONCURRENT_STREAMS, limits.max_concurrent_streams),
                    (Setting.MAX_HEADER_LIST_SIZE, limits.max_header_list_size),
                    (Setting.HEADER_TABLE_SIZE, DEFAULT_HEADER_TABLE_SIZE),
                    (Setting.INITIAL_WINDOW_SIZE, limits.stream_window),
                    (Setting.NO_RFC7540_PRIORITIES, 1),
                ]
            )
        )
        if limits.connection_window > DEFAULT_WINDOW:
            self.append(encode_window_update(0, limits.connection_window - DEFAULT_WINDOW))

    def next_timeout(self) -> float | None:
        """Return when `handle_timeout` is due; None once the handshake is done."""
        return None if self._lost else self._deadline

    def handle_timeout(self, now: float) -> None:
        """Give up on a peer that did not open in time. Errors: ProtocolError."""
        if self._lost or self._deadline is None or now < self._deadline:
            return
        if len(self._preface) < len(PREFACE):
            raise self._fail(
                ErrorCode.PROTOCOL_ERROR, f"no HTTP/2 preface within {self.limits.preface_timeout:g} seconds"
            )
        raise self._fail(ErrorCode.SETTINGS_TIMEOUT, f"no SETTINGS within {self.limits.settings_timeout:g} seconds")

    def receive_data(self, data: Buffer, now: float) -> None:
        """Take everything that one read brought. Errors: ProtocolError, with the GOAWAY for it already queued."""
        if self._lost:
            return
        self._now = now
        start = 0
        size = len(data)
        if self._deadline is not None and len(self._preface) < len(PREFACE):
            start = self._receive_preface(data)
        rest = self._rest
        while rest and start < size:
            # Complete the one frame that the last read cut; what follows it is parsed in place.
            stop = start + self._need - len(rest)
            rest += data[start:stop]
            start = min(stop, size)
            if len(rest) < self._need:
                return
            frame = bytes(rest)
            rest.clear()
            self._parse(frame, 0)
        if start < size:
            self._parse(data, start)

    def data_to_send(self) -> bytearray:
        """Take the out-buffer, after filling it up from the streams' queues."""
        if self._waiting and not self._socket_paused:
            self._send_waiting()
        out = self.out
        self.out = bytearray()
        self.tail = None
        self.stalled = self._socket_paused or bool(self._waiting)
        if self._waiting and self.send_window > 0 and not self._socket_paused:
            self.wake()
        return out

    def pause_writing(self) -> None:
        """The socket takes no more: payload queues per stream, control frames in the out-buffer."""
        self._socket_paused = True
        self.stalled = True

    def resume_writing(self) -> None:
        """The socket takes more again."""
        self._socket_paused = False
        self.stalled = bool(self._waiting)
        if self._waiting and not self.out:
            self.wake()

    def close(self) -> None:
        """Refuse new streams from now on; the open ones finish. Nothing is sent: the connector sends no GOAWAY."""
        self._refusing = True

    def connection_lost(self, error: BaseException | None) -> None:
        """Reset every stream towards its sink and stop. Later calls do nothing."""
        self._lost = True
        self._left_stream = None
        self._waiting.clear()
        streams = list(self._streams.values())
        for stream in streams:
            self._detach(stream)
        self._streams.clear()
        for stream in streams:
            stream.abort(error)

    # --- for H2Stream ----------------------------------------------------------------------------------------------

    def append(self, frame: bytes) -> None:
        """Append whole frames to the out-buffer; the tail is no longer the last frame then."""
        if not self.out:
            self.wake()
        self.out += frame
        self.tail = None

    def wait_turn(self, stream: H2Stream) -> None:
        """Let `stream` send what it has pending when there is room again."""
        if not stream.waiting:
            stream.waiting = True
            self._waiting.append(stream)
            if not self._socket_paused and not self.out and self.send_window > 0:
                self.wake()
            self.stalled = True

    def credit(self, n: int) -> None:
        """Owe the peer `n` bytes of connection window."""
        self.owed += n
        if self.owed >= self.credit_due:
            self.send_credit()

    def send_credit(self) -> None:
        """Give all owed connection window back."""
        owed = min(self.owed, self.limits.connection_window - self.receive_window)
        self.owed = 0
        if owed > 0:
            self.receive_window += owed
            self.append(encode_window_update(0, owed))

    def forget(self, stream: H2Stream) -> None:
        """Drop a stream that is closed both ways; payload that it never consumed is credited to the connection."""
        if self._streams.pop(stream.stream_id, None) is not None:
            self._detach(stream)

    def reset_stream(self, stream: H2Stream, code: int) -> None:
        """Send RST_STREAM and drop the stream. The sink is not told."""
        if stream.closed:
            return
        self.forget(stream)
        self._send_reset(stream.stream_id, code)

    def sink_failed(self, stream: H2Stream, error: Exception) -> None:
        """Reset a stream whose sink raised; the connection goes on."""
        self.report(error)
        self.reset_stream(stream, ErrorCode.INTERNAL_ERROR)

    def report(self, error: Exception) -> None:
        """Hand an error of a sink to whoever asked for them."""
        if self._on_sink_error is not None:
            self._on_sink_error(error)

    # --- sending ---------------------------------------------------------------------------------------------------

    def _detach(self, stream: H2Stream) -> None:
        stream.closed = True
        stream.streaming = False
        stream.receiving = False
        if stream.pending is not None:
            self.queued -= len(stream.pending)
            stream.pending = None
        stream.trailers = ()
        unconsumed = self.limits.stream_window - stream.receive_window - stream.owed
        stream.owed = 0
        if unconsumed > 0 and not self._lost:
            self.credit(unconsumed)

    def _send_reset(self, stream_id: int, code: int) -> None:
        sent = self._resets_sent
        if len(sent) >= REMEMBERED_RESETS:
            del sent[next(iter(sent))]
        sent[stream_id] = None
        self.append(encode_rst_stream(stream_id, code))

    def _send_waiting(self) -> None:
        """Let the waiting streams send in turn until the window, the room or the payload is used up."""
        self.stalled = True  # what resumed sinks write meanwhile goes to the end of the line
        waiting = self._waiting
        share = self.limits.fair_share
        while waiting and self.send_window > 0 and len(self.out) < self.out_high_water:
            stream = waiting.popleft()
            stream.waiting = False
            if not stream.closed and stream.send_pending(share):
                if stream.pending is not None and stream.send_window > 0 and not stream.waiting:
                    stream.waiting = True
                    waiting.append(stream)
                stream.maybe_resume()

    def _fail(self, code: ErrorCode, message: str) -> ProtocolError:
        """Queue the GOAWAY of a connection error and return the exception to raise."""
        text = f"HTTP/2 {code.name}: {message}"
        self.append(encode_goaway(self._last_stream_id, code, message.encode("ascii", "replace")[:256]))
        self._lost = True
        return ProtocolError(
            f"the edge broke HTTP/2, connection closed: {text}",
            advice="If this repeats, something between here and the edge alters the connection, or the address is not "
            "an edge server.",
        )

    def _spend(self, spent: int, limit: int, what: str) -> None:
        """Check a flood counter; the caller has just counted."""
        if spent > limit:
            budget = self._budget
            if self._now - budget.started < self.limits.window:
                raise self._fail(ErrorCode.ENHANCE_YOUR_CALM, f"more than {limit} {what} in {self.limits.window:g} s")
            budget.restart(self._now)

    def _peer_fault(self, stream: H2Stream, code: ErrorCode, message: str) -> None:
        """Reset a stream on which the peer made an error, and tell the sink."""
        if stream.closed:
            return
        self.reset_stream(stream, code)
        stream.abort(ProtocolError(f"the edge broke HTTP/2 on one stream: {code.name}: {message}"))
        self._count_reset()

    def _count_reset(self) -> None:
        self._budget.resets += 1
        self._spend(self._budget.resets, self.limits.max_resets, "stream resets")

    def _ignore(self) -> None:
        self._budget.ignored += 1
        self._spend(self._budget.ignored, self.limits.max_ignored_frames, "frames without use")

    # --- receiving -------------------------------------------------------------------------------------------------

    def _receive_preface(self, data: Buffer) -> int:
        """Take the preface or a part of it; return where frames start."""
        preface = self._preface
        start = len(PREFACE) - len(preface)
        preface += data[:start]
        if not PREFACE.startswith(preface):
            raise self._fail(ErrorCode.PROTOCOL_ERROR, "the peer does not open with an HTTP/2 preface")
        if len(preface) == len(PREFACE):
            self._deadline = self._now + self.limits.settings_timeout
        return min(start, len(data))

    def _parse(self, data: Buffer, pos: int) -> None:
        """Handle every whole frame in `data` from `pos` on; keep what is left of the last one."""
        end = len(data)
        if self._left:
            pos = self._receive_left(data, pos)
        streams = self._streams
        largest = self._max_data_word
        view: memoryview | None = None
        copying = type(data) is bytes
        while end - pos >= FRAME_HEADER_LENGTH:
            word, flags, stream_id = _unpack_header(data, pos)
            start = pos + FRAME_HEADER_LENGTH
            length = word >> 8
            stop = start + length
            if not word & 0xFF and flags <= 1 and stop <= end and self._block is None:
                stream = streams.get(stream_id)
                if (
                    stream is not None
                    and stream.receiving
                    and 0 < length <= stream.receive_window
                    and length <= self.receive_window
                    and word <= largest
                ):
                    stream.receive_window -= length
                    self.receive_window -= length
                    pos = stop
                    try:
                        if copying and length < _SMALL:
                            stream.sink.on_data(data[start:stop])
                        else:
                            if view is None:
                                view = memoryview(data)
                            stream.sink.on_data(view[start:stop])
                    except Exception as error:
                        self.sink_failed(stream, error)
                    if flags and not stream.closed:
                        stream.end_receiving()
                    continue
            kind = word & 0xFF
            stream_id &= STREAM_ID_MASK
            self._check_header(kind, length, stream_id)
            if stop <= end:
                self._receive_frame(kind, flags, stream_id, data[start:stop])
                if self._lost:
                    return
                pos = stop
            elif kind == DATA and length > DATA_STREAMED_FROM and not flags & FLAG_PADDED:
                self._start_data(stream_id, length, flags)
                pos = self._receive_left(data, start)
            elif kind > CONTINUATION:
                self._ignore()
                self._left = length
                pos = self._receive_left(data, start)
            else:
                self._need = FRAME_HEADER_LENGTH + length
                break
        else:
            self._need = FRAME_HEADER_LENGTH
        if pos < end:
            self._rest += data[pos:end]

    def _receive_left(self, data: Buffer, pos: int) -> int:
        """Pass on, or skip, the next part of a large frame; return where it ends."""
        stop = min(len(data), pos + self._left)
        self._left -= stop - pos
        stream = self._left_stream
        if stream is not None:
            if stop > pos:
                self._deliver(stream, memoryview(data)[pos:stop])
            if not self._left:
                self._left_stream = None
                if self._left_ends:
                    self._end_data(stream)
        return stop

    def _check_header(self, kind: int, length: int, stream_id: int) -> None:
        """Refuse by its header a frame that must not come, before its payload is waited for."""
        if length > self.limits.max_frame_size:
            raise self._fail(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
        if not self._settings_seen and kind != SETTINGS:
            raise self._fail(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if self._block is not None:
            if kind != CONTINUATION or stream_id != self._block_stream:
                raise self._fail(ErrorCode.PROTOCOL_ERROR, "a header block is interrupted by another frame")
        elif kind == CONTINUATION:
            raise self._fail(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        expected = _FIXED_LENGTHS.get(kind)
        if expected is not None and length != expected:
            if kind == PRIORITY and stream_id:
                return  # a stream error only; _receive_priority sees to it
            raise self._fail(ErrorCode.FRAME_SIZE_ERROR, f"frame type {kind} of {length} bytes")
        if kind in (SETTINGS, GOAWAY) and length > _LARGEST_CONTROL_FRAME:
            raise self._fail(ErrorCode.ENHANCE_YOUR_CALM, f"frame type {kind} of {length} bytes")
        if kind in (SETTINGS, PING, GOAWAY):
            if stream_id:
                raise self._fail(ErrorCode.PROTOCOL_ERROR, f"frame type {kind} on stream {stream_id}")
        elif not stream_id and kind <= CONTINUATION and kind != WINDOW_UPDATE:
            raise self._fail(ErrorCode.PROTOCOL_ERROR, f"frame type {kind} on stream 0")

    def _receive_frame(self, kind: int, flags: int, stream_id: int, payload: Buffer) -> None:
        """Handle one whole frame that is not DATA in good order."""
        try:
            if kind == DATA:
                self._receive_data_frame(flags, stream_id, payload)
            elif kind == HEADERS:
                self._receive_headers(flags, stream_id, bytes(payload))
            elif kind == CONTINUATION:
                self._receive_continuation(flags, bytes(payload))
            elif kind == WINDOW_UPDATE:
                self._receive_window_update(stream_id, decode_word(bytes(payload)))
            elif kind == RST_STREAM:
                self._receive_rst_stream(stream_id, decode_word(bytes(payload)))
            elif kind == SETTINGS:
                self._receive_settings(flags, bytes(payload))
            elif kind == PING:
                self._receive_ping(flags, bytes(payload))
            elif kind == GOAWAY:
                decode_goaway(bytes(payload))
                self.goaway_received = True
            elif kind == PRIORITY:
                self._receive_priority(stream_id, bytes(payload))
            elif kind == PUSH_PROMISE:
                raise self._fail(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE from a client")
            else:
                self._ignore()
        except WireError as error:
            raise self._fail(
                ErrorCode.FRAME_SIZE_ERROR if kind in (SETTINGS, GOAWAY) else ErrorCode.PROTOCOL_ERROR, str(error)
            ) from None

    # DATA that is padded, empty, in pieces, limited by content-length, or for a stream that does not take it.

    def _receive_data_frame(self, flags: int, stream_id: int, payload: Buffer) -> None:
        length = len(payload)
        self._start_data(stream_id, length, flags)
        stream = self._left_stream
        self._left = 0
        self._left_stream = None
        data = bytes(payload)
        if flags & FLAG_PADDED:
            data = strip_padding(data)
        if stream is None:
            return
        if length > len(data):
            stream.credit(length - len(data))
        if data:
            self._deliver(stream, data)
        elif not flags & FLAG_END_STREAM:
            self._budget.empty += 1
            self._spend(self._budget.empty, self.limits.max_empty_frames, "DATA frames without payload")
        if flags & FLAG_END_STREAM:
            self._end_data(stream)

    def _start_data(self, stream_id: int, length: int, flags: int) -> None:
        """Account for a DATA frame, and set `_left_stream` to the stream that takes its payload, if any does."""
        self._left = length
        self._left_stream = None
        self._left_ends = bool(flags & FLAG_END_STREAM)
        if length > self.receive_window:
            raise self._fail(ErrorCode.FLOW_CONTROL_ERROR, "more DATA than the connection window allows")
        stream = self._streams.get(stream_id)
        if stream is None and (stream_id > self._last_stream_id or not stream_id & 1):
            raise self._fail(ErrorCode.PROTOCOL_ERROR, f"DATA on idle stream {stream_id}")
        self.receive_window -= length
        if stream is None:
            self.credit(length)
            self._ignore()
            if stream_id not in self._resets_sent:
                self._send_reset(stream_id, ErrorCode.STREAM_CLOSED)
        elif stream.receive_ended:
            self.credit(length)
            self._peer_fault(stream, ErrorCode.STREAM_CLOSED, "DATA after END_STREAM")
        elif length > stream.receive_window:
            self.credit(length)
            self._peer_fault(stream, ErrorCode.FLOW_CONTROL_ERROR, "more DATA than the stream window allows")
        else:
            stream.receive_window -= length
            self._left_stream = stream

    def _deliver(self, stream: H2Stream, data: Buffer) -> None:
        size = len(data)
        if stream.closed:
            return  # its unconsumed window, this part included, was credited when it closed
        if stream.body_left >= 0:
            stream.body_left -= size
            if stream.body_left < 0:
                self._peer_fault(stream, ErrorCode.PROTOCOL_ERROR, "more payload than content-length")
                return
        if stream.discarding:
            stream.credit(size)
            return
        try:
            stream.sink.on_data(data)
        except Exception as error:
            self.sink_failed(stream, error)

    def _end_data(self, stream: H2Stream) -> None:
        if stream.closed:
            return
        if stream.body_left > 0:
            self._peer_fault(stream, ErrorCode.PROTOCOL_ERROR, "less payload than content-length")
            return
        stream.end_receiving()

    # HEADERS and CONTINUATION.

    def _receive_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not stream_id & 1:
            raise self._fail(ErrorCode.PROTOCOL_ERROR, f"HEADERS on stream {stream_id}, which is even")
        if flags & FLAG_PADDED:
            payload = strip_padding(payload)
        if flags & FLAG_PRIORITY:
            if len(payload) < 5:
                raise self._fail(ErrorCode.FRAME_SIZE_ERROR, "HEADERS too short for its priority")
            payload = payload[5:]
        if flags & FLAG_END_HEADERS:
            self._receive_block(stream_id, payload, bool(flags & FLAG_END_STREAM))
            return
        self._block = bytearray(payload)
        self._block_stream = stream_id
        self._block_flags = flags
        self._block_count = 0
        self._check_block(len(payload))

    def _receive_continuation(self, flags: int, payload: bytes) -> None:
        block = self._block
        assert block is not None
        self._block_count += 1
        if self._block_count > self.limits.max_continuations:
            raise self._fail(ErrorCode.ENHANCE_YOUR_CALM, f"more than {self.limits.max_continuations} CONTINUATION")
        self._check_block(len(block) + len(payload))
        block += payload
        if flags & FLAG_END_HEADERS:
            self._block = None
            self._receive_block(self._block_stream, bytes(block), bool(self._block_flags & FLAG_END_STREAM))

    def _check_block(self, size: int) -> None:
        if size > self.limits.max_header_block:
            raise self._fail(ErrorCode.ENHANCE_YOUR_CALM, f"a header block of more than {size} bytes")

    def _receive_block(self, stream_id: int, block: bytes, ended: bool) -> None:
        """Decode a whole header block, whatever becomes of it: the table must follow the peer's."""
        try:
            fields: list[tuple[bytes, bytes]] = list(self._decoder.decode(block, raw=True))
        except OversizedHeaderListError:
            raise self._fail(ErrorCode.ENHANCE_YOUR_CALM, "a header list of more than twice the limit") from None
        except Exception as error:
            raise self._fail(ErrorCode.COMPRESSION_ERROR, f"a header block does not decode: {error}") from None
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._receive_trailers(stream, fields, ended)
        elif stream_id > self._last_stream_id:
            self._last_stream_id = stream_id
            self._open_stream(stream_id, fields, ended)
        elif stream_id in self._resets_sent:
            self._ignore()
        else:
            raise self._fail(ErrorCode.STREAM_CLOSED, f"HEADERS on stream {stream_id}, which is closed")

    def _receive_trailers(self, stream: H2Stream, fields: list[tuple[bytes, bytes]], ended: bool) -> None:
        """Take a second header block as trailers: they mean the end, what they say is dropped."""
        if stream.receive_ended:
            self._peer_fault(stream, ErrorCode.STREAM_CLOSED, "HEADERS after END_STREAM")
        elif not ended or any(name[:1] == b":" for name, _ in fields):
            self._peer_fault(stream, ErrorCode.PROTOCOL_ERROR, "a second header block that is not trailers")
        else:
            self._end_data(stream)

    def _open_stream(self, stream_id: int, fields: list[tuple[bytes, bytes]], ended: bool) -> None:
        limits = self.limits
        if len(self._streams) >= limits.max_concurrent_streams or self._refusing:
            self._send_reset(stream_id, ErrorCode.REFUSED_STREAM)
            self._count_reset()
            return
        status = 0
        try:
            if sum(len(name) + len(value) + 32 for name, value in fields) > limits.max_header_list_size:
                raise MalformedRequestError("the header list is too large", status=431)
            request, expects_continue = decode_request(fields, ended)
        except MalformedRequestError as error:
            if self._on_malformed is not None:
                self._on_malformed(str(error))
            status = error.status
            if not status:
                self._send_reset(stream_id, ErrorCode.PROTOCOL_ERROR)
                self._count_reset()
                return
        stream = H2Stream(self, stream_id, _NO_SINK, self._peer_window)
        self._streams[stream_id] = stream
        if status:
            stream.receive_ended = ended
            stream.stop_reading()
            stream.respond(status, ((b"content-length", b"0"),), ResponseSource.CONNECTOR)
            stream.write_eof()
            return
        stream.kind = request.kind
        stream.head_only = request.method == b"HEAD"
        if request.content_length > 0 or (request.content_length == 0 and not ended):
            stream.body_left = request.content_length
            stream.receiving = False
        try:
            stream.sink = self._accept(request, stream)
        except Exception as error:
            self.sink_failed(stream, error)
            return
        if stream.closed:
            return
        if ended:
            stream.end_receiving()
        elif expects_continue:
            stream.send_informational(100)

    # The other frames.

    def _receive_window_update(self, stream_id: int, increment: int) -> None:
        increment &= WINDOW_LIMIT
        if not stream_id:
            if not increment:
                raise self._fail(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0 on the connection")
            if self.send_window + increment > WINDOW_LIMIT:
                raise self._fail(ErrorCode.FLOW_CONTROL_ERROR, "WINDOW_UPDATE past the largest connection window")
            self.send_window += increment
            if self._waiting and not self.out and not self._socket_paused:
                self.wake()
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            self._check_not_idle(stream_id, "WINDOW_UPDATE")
            self._ignore()
        elif not increment:
            self._peer_fault(stream, ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
        elif stream.send_window + increment > WINDOW_LIMIT:
            self._peer_fault(stream, ErrorCode.FLOW_CONTROL_ERROR, "WINDOW_UPDATE past the largest window")
        else:
            stream.send_window += increment
            if stream.pending is not None and stream.send_window > 0:
                self.wait_turn(stream)

    def _receive_rst_stream(self, stream_id: int, code: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            self._check_not_idle(stream_id, "RST_STREAM")
            self._ignore()
            return
        unanswered = not stream.send_ended
        self.forget(stream)
        stream.abort(ProtocolError(f"the edge reset the stream: {error_name(code)}"))
        if unanswered:
            self._count_reset()

    def _check_not_idle(self, stream_id: int, what: str) -> None:
        if stream_id > self._last_stream_id or not stream_id & 1:
            raise self._fail(ErrorCode.PROTOCOL_ERROR, f"{what} on idle stream {stream_id}")

    def _receive_ping(self, flags: int, payload: bytes) -> None:
        if flags & FLAG_ACK:
            return
        self._budget.pings += 1
        self._spend(self._budget.pings, self.limits.max_pings, "PING")
        self.append(encode_ping_ack(payload))

    def _receive_priority(self, stream_id: int, payload: bytes) -> None:
        """Ignore priorities (we sent NO_RFC7540_PRIORITIES), once their form is right."""
        self._ignore()
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if len(payload) != 5:
            self._peer_fault(stream, ErrorCode.FRAME_SIZE_ERROR, "PRIORITY of a wrong length")
        elif int.from_bytes(payload[:4], "big") & STREAM_ID_MASK == stream_id:
            self._peer_fault(stream, ErrorCode.PROTOCOL_ERROR, "a stream that depends on itself")

    def _receive_settings(self, flags: int, payload: bytes) -> None:
        if flags & FLAG_ACK:
            if payload:
                raise self._fail(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS ACK with a payload")
            if not self._settings_seen:
                raise self._fail(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            return
        self._settings_seen = True
        self._deadline = None
        self._budget.settings += 1
        self._spend(self._budget.settings, self.limits.max_settings, "SETTINGS")
        for key, value in decode_settings(payload):
            if key == Setting.INITIAL_WINDOW_SIZE:
                self._change_peer_window(value)
            elif key == Setting.MAX_FRAME_SIZE:
                if not DEFAULT_MAX_FRAME_SIZE <= value <= LARGEST_MAX_FRAME_SIZE:
                    raise self._fail(ErrorCode.PROTOCOL_ERROR, f"MAX_FRAME_SIZE {value}")
                self.peer_frame_size = value
                self.send_frame_size = min(value, self.limits.send_frame_size)
            elif key == Setting.ENABLE_PUSH and value > 1:
                raise self._fail(ErrorCode.PROTOCOL_ERROR, f"ENABLE_PUSH {value}")
        self.append(SETTINGS_ACK)

    def _change_peer_window(self, value: int) -> None:
        """Apply INITIAL_WINDOW_SIZE, and its difference to every open stream: windows may become negative by it."""
        if value > WINDOW_LIMIT:
            raise self._fail(ErrorCode.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE {value}")
        change = value - self._peer_window
        self._peer_window = value
        for stream in self._streams.values():
            stream.send_window += change
            if stream.send_window > WINDOW_LIMIT:
                raise self._fail(ErrorCode.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE past the largest window")
            if stream.pending is not None and stream.send_window > 0:
                self.wait_turn(stream)


class _NoSink:
    """The sink of a stream that was answered before any proxy saw it, or that is still being accepted."""

    __slots__ = ()

    def on_data(self, data: Buffer) -> None:
        """Ignore."""

    def on_eof(self) -> None:
        """Ignore."""

    def on_reset(self, error: BaseException | None) -> None:
        """Ignore."""

    def pause_writing(self) -> None:
        """Ignore."""

    def resume_writing(self) -> None:
        """Ignore."""


_NO_SINK = _NoSink()
