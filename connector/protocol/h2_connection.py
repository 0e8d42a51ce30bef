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

from connector.errors import ProtocolError, WireError
from connector.protocol.h2_blocks import HeaderBlocks
from connector.protocol.h2_control import check_header, check_not_idle, receive_control_frame
from connector.protocol.h2_guard import FloodGuard, H2Error
from connector.protocol.h2_limits import DATA_STREAMED_FROM, DEFAULT_LIMITS, REMEMBERED_RESETS, H2Limits
from connector.protocol.h2_opening import receive_block
from connector.protocol.h2_stream import H2Stream
from connector.protocol.ports import Acceptor, Buffer
from connector.wire.h2_frames import (
    CONTINUATION,
    DATA,
    DEFAULT_HEADER_TABLE_SIZE,
    DEFAULT_MAX_FRAME_SIZE,
    DEFAULT_WINDOW,
    FLAG_END_STREAM,
    FLAG_PADDED,
    FRAME_HEADER,
    FRAME_HEADER_LENGTH,
    HEADERS,
    PREFACE,
    STREAM_ID_MASK,
    ErrorCode,
    Setting,
    encode_goaway,
    encode_rst_stream,
    encode_settings,
    encode_window_update,
    strip_padding,
)
from connector.wire.h2_hpack import HPACK_NO_TABLE

_unpack_header = FRAME_HEADER.unpack_from
_SMALL = 4_096  # payload below it is handed on as a copy, which then is cheaper than a view


class H2Connection:
    """One connection to the edge.

    Call `start` once, then `receive_data` for every read. `wake` is called when there is something to send, from inside
    any other call: it may only schedule the taking of `data_to_send`. Drive `handle_timeout` by `next_timeout`. When
    `receive_data` or `handle_timeout` raises ProtocolError, a GOAWAY is in the out-buffer: send it, close the socket.
    Call `connection_lost` exactly once, whatever the end was.
    """

    __slots__ = (
        "_deadline",
        "_largest_data_word",
        "_left",
        "_left_ends",
        "_left_stream",
        "_need",
        "_on_sink_error",
        "_preface",
        "_rest",
        "_socket_paused",
        "_waiting",
        "accept",
        "blocks",
        "credit_due",
        "goaway_received",
        "guard",
        "header_block_prefix",
        "last_stream_id",
        "limits",
        "lost",
        "on_malformed",
        "out",
        "out_high_water",
        "owed",
        "peer_frame_size",
        "peer_window",
        "queued",
        "receive_window",
        "refusing",
        "resets_sent",
        "send_frame_size",
        "send_window",
        "settings_seen",
        "stalled",
        "stream_credit_due",
        "streams",
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
        self.accept = accept
        self._on_sink_error = on_sink_error
        self.on_malformed = on_malformed
        self.lost = False
        self.guard = FloodGuard(limits)
        # Receiving.
        self._deadline: float | None = None
        self._preface = bytearray()  # as much of it as is here
        self.settings_seen = False
        self._rest = bytearray()  # the start of a frame that is not whole yet,
        self._need = FRAME_HEADER_LENGTH  # and the length at which it can be looked at again
        self._left = 0  # payload still to come of a frame that is passed on, or skipped, as it arrives,
        self._left_stream: H2Stream | None = None  # the stream that takes it,
        self._left_ends = False  # and whether it is the last of that stream
        self._largest_data_word = limits.max_frame_size << 8
        self.blocks = HeaderBlocks(limits)
        self.receive_window = limits.connection_window
        self.owed = 0  # consumed, but not yet given back as credit
        # Half a window: the peer always has the other half to go on with, and one update serves many frames.
        self.credit_due = limits.connection_window // 2
        self.stream_credit_due = limits.stream_window // 2
        # Streams.
        self.streams: dict[int, H2Stream] = {}
        self.last_stream_id = 0
        self.resets_sent: dict[int, None] = {}  # the latest of them, oldest first
        self.refusing = False
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
        self.peer_window = DEFAULT_WINDOW
        self._socket_paused = False
        self.stalled = False  # payload must queue: the socket is paused, or others wait for their turn
        self._waiting: deque[H2Stream] = deque()  # have payload and stream window, lack connection window or room
        self.queued = 0  # bytes in all streams' queues

    def __repr__(self) -> str:
        return f"<H2Connection {len(self.streams)} streams, {len(self.out)} bytes out{', lost' if self.lost else ''}>"

    # --- for the link ----------------------------------------------------------------------------------------------

    @property
    def open_streams(self) -> int:
        """How many streams are open, half-closed ones included."""
        return len(self.streams)

    @property
    def bytes_queued(self) -> int:
        """How many bytes wait here, in the out-buffer and in the streams' queues."""
        return len(self.out) + self.queued

    def start(self, now: float) -> None:
        """Queue our SETTINGS and connection window, without waiting for the peer's preface."""
        limits = self.limits
        self._deadline = now + limits.preface_timeout
        self.guard.start(now)
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
        return None if self.lost else self._deadline

    def handle_timeout(self, now: float) -> None:
        """Give up on a peer that did not open in time. Errors: ProtocolError."""
        if self.lost or self._deadline is None or now < self._deadline:
            return
        limits = self.limits
        if len(self._preface) < len(PREFACE):
            error = H2Error(ErrorCode.PROTOCOL_ERROR, f"no HTTP/2 preface within {limits.preface_timeout:g} s")
        else:
            error = H2Error(ErrorCode.SETTINGS_TIMEOUT, f"no SETTINGS within {limits.settings_timeout:g} s")
        raise self._fail(error)

    def receive_data(self, data: Buffer, now: float) -> None:
        """Take everything that one read brought. Errors: ProtocolError, with the GOAWAY for it already queued."""
        if self.lost:
            return
        self.guard.now = now
        try:
            start = 0 if self.settings_seen else self._receive_preface(data)
            size = len(data)
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
        except H2Error as error:
            raise self._fail(error) from None
        except WireError as malformed:
            raise self._fail(H2Error(ErrorCode.PROTOCOL_ERROR, str(malformed))) from None

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
        if self._waiting or self.out:
            self.wake()

    def close(self) -> None:
        """Refuse new streams from now on; the open ones finish. Nothing is sent: the connector sends no GOAWAY."""
        self.refusing = True

    def connection_lost(self, error: BaseException | None) -> None:
        """Reset every stream towards its sink and stop. Later calls do nothing."""
        self.lost = True
        self._left_stream = None
        self._waiting.clear()
        streams = list(self.streams.values())
        for stream in streams:
            self._detach(stream)
        self.streams.clear()
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
            self.stalled = True
            self.wake_waiting()

    def wake_waiting(self) -> None:
        """Ask to be flushed if a stream that waits could send now."""
        if self._waiting and self.send_window > 0 and not self.out and not self._socket_paused:
            self.wake()

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
        if self.streams.pop(stream.stream_id, None) is not None:
            self._detach(stream)

    def reset_stream(self, stream: H2Stream, code: int) -> None:
        """Send RST_STREAM and drop the stream. The sink is not told."""
        if stream.closed:
            return
        self.forget(stream)
        self.send_reset(stream.stream_id, code)

    def waiting(self) -> list[tuple[int, int]]:
        """Return the streams with payload that waits for the edge, and how much of each has left so far."""
        return [(number, stream.traffic()[1]) for number, stream in self.streams.items() if stream.pending]

    def give_up(self, stream_id: int, error: Exception) -> None:
        """End a stream both ways and tell its sink."""
        stream = self.streams.get(stream_id)
        if stream is not None:
            self.reset_stream(stream, ErrorCode.CANCEL)
            stream.abort(error)

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
        if unconsumed > 0 and not self.lost:
            self.credit(unconsumed)

    def send_reset(self, stream_id: int, code: int) -> None:
        """Send RST_STREAM for a stream that is not, or no longer, among the open ones."""
        sent = self.resets_sent
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

    # --- errors ----------------------------------------------------------------------------------------------------

    def _fail(self, error: H2Error) -> ProtocolError:
        """Queue the GOAWAY of a connection error, stop, and return the exception to raise."""
        message = str(error)
        self.append(encode_goaway(self.last_stream_id, error.code, message.encode("ascii", "replace")[:256]))
        self.lost = True
        return ProtocolError(
            f"the edge broke HTTP/2, connection closed: {error.code.name}: {message}",
            advice="If this repeats, something between here and the edge alters the connection, or the address is not "
            "an edge server.",
        )

    def peer_fault(self, stream: H2Stream, code: ErrorCode, message: str) -> None:
        """Reset a stream on which the peer made an error, and tell the sink."""
        if not stream.closed:
            self.reset_stream(stream, code)
            stream.abort(ProtocolError(f"the edge broke HTTP/2 on one stream: {code.name}: {message}"))
            self.guard.count_reset()

    def sink_failed(self, stream: H2Stream, error: Exception) -> None:
        """Reset a stream whose sink raised, and tell the sink; the connection goes on."""
        self.report(error)
        if not stream.closed:
            self.reset_stream(stream, ErrorCode.INTERNAL_ERROR)
            stream.abort(error)

    def report(self, error: Exception) -> None:
        """Hand an error of a sink to whoever asked for them."""
        if self._on_sink_error is not None:
            self._on_sink_error(error)

    # --- receiving -------------------------------------------------------------------------------------------------

    def _receive_preface(self, data: Buffer) -> int:
        """Take the preface or a part of it; return where frames start."""
        preface = self._preface
        missing = len(PREFACE) - len(preface)
        if missing:
            preface += data[:missing]
            if not PREFACE.startswith(preface):
                raise H2Error(ErrorCode.PROTOCOL_ERROR, "the peer does not open with an HTTP/2 preface")
            if len(preface) == len(PREFACE):
                self._deadline = self.guard.now + self.limits.settings_timeout
        return min(missing, len(data))

    def _parse(self, data: Buffer, pos: int) -> None:
        """Handle every whole frame in `data` from `pos` on; keep what is left of the last one."""
        end = len(data)
        if self._left:
            pos = self._receive_left(data, pos)
        streams = self.streams
        blocks = self.blocks
        largest = self._largest_data_word
        need = FRAME_HEADER_LENGTH
        copying = type(data) is bytes
        if not copying and end - pos >= need and _unpack_header(data, pos)[0] >> 8 < _SMALL:
            # Small frames: one copy of all is cheaper than a view of each. Large ones are worth their views.
            data = bytes(data)
            copying = True
        view: memoryview | None = None
        while end - pos >= FRAME_HEADER_LENGTH:
            word, flags, stream_id = _unpack_header(data, pos)
            start = pos + FRAME_HEADER_LENGTH
            length = word >> 8
            stop = start + length
            if not word & 0xFF and flags <= 1 and stop <= end and not blocks.stream_id:
                stream = streams.get(stream_id)
                if (
                    stream is not None
                    and stream.receiving
                    and 0 < length <= stream.receive_window
                    and length <= self.receive_window
                    and word <= largest
                    and (stream.body_left < 0 or length <= stream.body_left)
                ):
                    stream.receive_window -= length
                    self.receive_window -= length
                    if stream.body_left >= 0:
                        stream.body_left -= length
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
                    if flags:
                        self.end_payload(stream)
                    continue
            kind = word & 0xFF
            stream_id &= STREAM_ID_MASK
            if self.lost:
                return  # a sink closed the link
            check_header(self, kind, length, stream_id)
            if stop <= end:
                if copying and length < _SMALL:
                    self._receive_frame(kind, flags, stream_id, data[start:stop])
                else:
                    self._receive_frame(kind, flags, stream_id, memoryview(data)[start:stop])
                pos = stop
            elif kind == DATA and length > DATA_STREAMED_FROM and not flags & FLAG_PADDED:
                self._start_data(stream_id, length, flags)
                pos = self._receive_left(data, start)
            elif kind > CONTINUATION:
                self.guard.count_ignored()
                self._left = length
                pos = self._receive_left(data, start)
            else:
                need += length
                break
        self._need = need
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
                    self.end_payload(stream)
        return stop

    def _receive_frame(self, kind: int, flags: int, stream_id: int, payload: Buffer) -> None:
        """Handle one whole frame that is not DATA in good order."""
        if kind == DATA:
            self._receive_data_frame(flags, stream_id, payload)
        elif kind == HEADERS:
            if not stream_id & 1:
                raise H2Error(ErrorCode.PROTOCOL_ERROR, f"HEADERS on stream {stream_id}, which is even")
            receive_block(self, self.blocks.receive_headers(flags, stream_id, bytes(payload)))
        elif kind == CONTINUATION:
            receive_block(self, self.blocks.receive_continuation(flags, bytes(payload)))
        else:
            receive_control_frame(self, kind, flags, stream_id, bytes(payload))
            if self.settings_seen:
                self._deadline = None

    # DATA that is padded, empty, in pieces, limited by content-length, or for a stream that does not take it.

    def _receive_data_frame(self, flags: int, stream_id: int, payload: Buffer) -> None:
        length = len(payload)
        data: Buffer = payload
        if flags & FLAG_PADDED:
            data = strip_padding(bytes(payload))
        if not len(data) and not flags & FLAG_END_STREAM:
            self.guard.count_empty()
        self._start_data(stream_id, length, flags)
        stream = self._left_stream
        self._left = 0
        self._left_stream = None
        if stream is None:
            return
        if length > len(data):
            stream.credit(length - len(data))
        if len(data):
            self._deliver(stream, data)
        if flags & FLAG_END_STREAM:
            self.end_payload(stream)

    def _start_data(self, stream_id: int, length: int, flags: int) -> None:
        """Account for a DATA frame, and set `_left_stream` to the stream that takes its payload, if any does."""
        self._left = length
        self._left_stream = None
        self._left_ends = bool(flags & FLAG_END_STREAM)
        if length > self.receive_window:
            raise H2Error(ErrorCode.FLOW_CONTROL_ERROR, "more DATA than the connection window allows")
        stream = self.streams.get(stream_id)
        if stream is None:
            check_not_idle(self, stream_id, DATA)
            self.receive_window -= length
            self.credit(length)
            if stream_id not in self.resets_sent:
                self.send_reset(stream_id, ErrorCode.STREAM_CLOSED)
                self.guard.count_reset()
            return
        self.receive_window -= length
        if stream.receive_ended:
            self.credit(length)
            self.peer_fault(stream, ErrorCode.STREAM_CLOSED, "DATA after END_STREAM")
        elif length > stream.receive_window:
            self.credit(length)
            self.peer_fault(stream, ErrorCode.FLOW_CONTROL_ERROR, "more DATA than the stream window allows")
        else:
            stream.receive_window -= length
            self._left_stream = stream

    def _deliver(self, stream: H2Stream, data: Buffer) -> None:
        """Give payload to the sink, or back as credit. A closed stream's window was credited when it closed."""
        size = len(data)
        if stream.closed:
            return
        if stream.body_left >= 0:
            stream.body_left -= size
            if stream.body_left < 0:
                self.peer_fault(stream, ErrorCode.PROTOCOL_ERROR, "more payload than content-length")
                return
        if stream.discarding:
            stream.credit(size)
            return
        try:
            stream.sink.on_data(data)
        except Exception as error:
            self.sink_failed(stream, error)

    def end_payload(self, stream: H2Stream) -> None:
        """Take END_STREAM, unless content-length says that it comes too early."""
        if stream.body_left > 0:
            self.peer_fault(stream, ErrorCode.PROTOCOL_ERROR, "less payload than content-length")
        elif not stream.closed:
            stream.end_receiving()
