"""One HTTP/2 stream: the port that the proxy writes to, and the edge protocol's responses (proto/README.md, HTTP/2).

Owns: H2Stream: a stream's windows, its queue of unsent payload, and how a response becomes HEADERS and DATA.
In: StreamPort calls of the proxy; from the connection: credit, payload, ends. Out: frames in the connection's
out-buffer; calls on the StreamSink.
Never: parses frames, knows other streams, copies payload more than once on the open path.

*Strategy*: a stream that may send writes straight into the connection's out-buffer; only what windows or the socket
hold back goes to a queue of its own. The last frame in the out-buffer stays open for one more write of the same
stream (its length is patched) and for END_STREAM (its flag is set), so that small writes of one tick share a frame
header and a response without body is one HEADERS frame.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from connector.protocol.ports import Buffer, Headers, Request, RequestKind, ResetCode, ResponseSource, StreamSink
from connector.wire.h2_frames import (
    CONTINUATION,
    DATA,
    FLAG_END_HEADERS,
    FLAG_END_STREAM,
    FRAME_HEADER,
    HEADERS,
    WINDOW_LIMIT,
    ErrorCode,
    encode_window_update,
)
from connector.wire.h2_headers import (
    META_CONNECTOR_FIELD,
    META_FLOW_LIMITED_FIELD,
    META_ORIGIN_FIELD,
    STATUS_FIELDS,
    TRACING_HEADER,
    content_length_field,
    encode_serialised_headers,
    is_field_name,
    is_field_value,
    response_headers_field,
)
from connector.wire.h2_hpack import hpack_literal

if TYPE_CHECKING:
    from connector.protocol.h2_connection import H2Connection

_pack_header = FRAME_HEADER.pack
_patch_length = Struct(">I").pack_into

_META_FIELDS = {
    ResponseSource.ORIGIN: META_ORIGIN_FIELD,
    ResponseSource.CONNECTOR: META_CONNECTOR_FIELD,
    ResponseSource.FLOW_LIMITED: META_FLOW_LIMITED_FIELD,
}
_RESET_CODES = {
    ResetCode.FAILED: ErrorCode.INTERNAL_ERROR,
    ResetCode.CANCELLED: ErrorCode.CANCEL,
    ResetCode.REFUSED: ErrorCode.REFUSED_STREAM,
    ResetCode.PROTOCOL: ErrorCode.PROTOCOL_ERROR,
}
# Fields that end or frame a message and so mean nothing in trailers (RFC 9110 section 6.5.1; Go drops the same).
_NOT_IN_TRAILERS = frozenset(
    b"authorization cache-control connection content-encoding content-length content-range content-type expect host "
    b"keep-alive max-forwards pragma proxy-authenticate proxy-authorization proxy-connection range realm te trailer "
    b"transfer-encoding upgrade www-authenticate".split()
)
_NO_BODY_STATUS = (204, 304)
_EMPTY_ANSWER = ((b"content-length", b"0"),)  # an error of ours has no body, and the original says so


class _NoSink:
    """The sink of a stream that is still being accepted, or that was answered without the proxy."""

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


class H2Stream:
    """One stream that the edge opened. A StreamPort for the proxy; the connection drives the receiving side.

    `streaming` and `receiving` are the one-flag answers of the hot paths: payload written now goes straight out, and
    payload that arrives now goes straight to the sink.
    """

    __slots__ = (
        "body_left",
        "closed",
        "connection",
        "credited",
        "discarding",
        "eof_queued",
        "granted",
        "head_only",
        "kind",
        "owed",
        "paused",
        "pending",
        "receive_ended",
        "receive_window",
        "receiving",
        "responded",
        "send_ended",
        "send_window",
        "sink",
        "spans",
        "stream_id",
        "streaming",
        "trailers",
        "waiting",
    )

    def __init__(self, connection: H2Connection, stream_id: int, request: Request, send_window: int) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.sink: StreamSink = _NO_SINK
        self.kind = request.kind
        self.head_only = request.method == b"HEAD"  # the response ends with its head
        self.receive_window = connection.limits.stream_window
        self.send_window = send_window
        self.granted = send_window  # all credit that the peer gave: what is gone of it was sent
        self.credited = self.receive_window  # all credit that the peer got
        self.spans = b""
        self.owed = 0  # consumed, but not yet given back as credit
        self.body_left = request.content_length  # what it still allows; -1: no content-length
        self.receiving = True  # = not receive_ended and not discarding
        self.receive_ended = False
        self.discarding = False
        self.streaming = False  # = responded, nothing pending, no end queued or sent
        self.responded = False
        self.eof_queued = False
        self.send_ended = False
        self.closed = False
        self.paused = False  # the sink was told pause_writing
        self.pending: bytearray | None = None
        self.trailers: Headers = ()
        self.waiting = False  # in the connection's queue of streams that wait for their turn

    def __repr__(self) -> str:
        return f"<H2Stream {self.stream_id} {self.kind.name}{' closed' if self.closed else ''}>"

    # --- StreamPort ------------------------------------------------------------------------------------------------

    def respond(
        self, status: int, headers: Headers, source: ResponseSource = ResponseSource.ORIGIN, reason: bytes = b""
    ) -> None:
        """Send the response head in the edge protocol's form; informational ones but 101 are left out."""
        if self.responded or self.closed:
            return
        if status < 200:
            if status != 101:
                return
            status = 200
        self.responded = True
        self.streaming = True
        head = STATUS_FIELDS[status] if status < 1000 else STATUS_FIELDS[502]
        if self.kind < RequestKind.CONTROL or status != 200:
            if source == ResponseSource.ORIGIN:
                head += response_headers_field(encode_serialised_headers(headers))
            head += _META_FIELDS[source]
            if source != ResponseSource.ORIGIN and status >= 400 and not headers:
                headers = _EMPTY_ANSWER
        head += content_length_field(headers)
        if self.spans:
            head += hpack_literal(TRACING_HEADER, self.spans)
        bodiless = self.head_only or (status in _NO_BODY_STATUS and self.kind <= RequestKind.WEBSOCKET)
        self._send_headers(head, bodiless)
        if bodiless:
            self._end_sending()

    def write(self, data: Buffer) -> None:
        """Queue payload: straight into the out-buffer when windows and socket allow."""
        size = len(data)
        connection = self.connection
        if self.streaming and not connection.stalled and size <= self.send_window and size <= connection.send_window:
            out = connection.out
            if connection.tail is self and connection.tail_size + size <= connection.send_frame_size:
                size_now = connection.tail_size + size
                connection.tail_size = size_now
                out += data
                _patch_length(out, connection.tail_at, size_now << 8)
                self.send_window -= size
                connection.send_window -= size
                return
            if 0 < size <= connection.send_frame_size:
                at = len(out)
                if at < connection.out_high_water:
                    if not at:
                        connection.wake()
                    out += _pack_header(size << 8, 0, self.stream_id)
                    out += data
                    connection.tail = self
                    connection.tail_at = at
                    connection.tail_size = size
                    self.send_window -= size
                    connection.send_window -= size
                    return
        if size:
            self._write_slowly(data)

    def write_eof(self, trailers: Headers = ()) -> None:
        """End the response, with a trailer block if `trailers` has any that may be sent."""
        if self.closed or self.send_ended or self.eof_queued:
            return
        if not self.responded:
            self.respond(200, ((b"content-length", b"0"),), ResponseSource.CONNECTOR)
            if not self.streaming:
                return
        self.streaming = False
        self.trailers = trailers
        if self.pending:
            self.eof_queued = True
        else:
            self._send_end()

    def reset(self, code: ResetCode) -> None:
        """Give the stream up: RST_STREAM, and nothing more is sent or delivered."""
        if not self.closed:
            self.connection.reset_stream(self, _RESET_CODES[code])

    def stop_reading(self) -> None:
        """Drop the rest of the request payload; its credit is given back at once."""
        if self.closed or self.receive_ended or self.discarding:
            return
        self.discarding = True
        self.receiving = False
        self.credit(self.connection.limits.stream_window - self.receive_window - self.owed)
        if self.send_ended:
            # Nothing of it matters to anyone now: RFC 9113 section 8.1 lets a server say so.
            self.connection.reset_stream(self, ErrorCode.NO_ERROR)

    def consumed(self, n: int) -> None:
        """Give back the credit of `n` bytes that the origin accepted."""
        if not self.closed and not self.discarding:
            connection = self.connection
            owed = self.owed + n
            self.owed = owed
            if owed >= connection.stream_credit_due:
                self._send_credit()
            owed = connection.owed + n
            connection.owed = owed
            if owed >= connection.credit_due:
                connection.send_credit()

    def traffic(self) -> tuple[int, int]:
        """Payload bytes (padding included) received and sent: what is gone of the windows."""
        return self.credited - self.receive_window, self.granted - self.send_window

    # --- for the connection ----------------------------------------------------------------------------------------

    def credit(self, n: int) -> None:
        """Take `n` bytes as consumed that the sink never owed (padding, discarded payload)."""
        self.owed += n
        if self.owed >= self.connection.stream_credit_due:
            self._send_credit()
        self.connection.credit(n)

    def end_receiving(self) -> None:
        """Take END_STREAM of the peer."""
        self.receive_ended = True
        self.receiving = False
        if not self.discarding:
            try:
                self.sink.on_eof()
            except Exception as error:
                self.connection.sink_failed(self, error)
                return
        if self.send_ended and not self.closed:
            self.connection.forget(self)

    def abort(self, error: BaseException | None) -> None:
        """Tell the sink that the stream is over, after the connection forgot it."""
        try:
            self.sink.on_reset(error)
        except Exception as failure:
            self.connection.report(failure)

    def send_pending(self, limit: int) -> int:
        """Send up to `limit` queued bytes in one frame, as windows allow; return how many bytes went out."""
        pending = self.pending
        connection = self.connection
        if not pending:
            return 0
        size = min(limit, len(pending), self.send_window, connection.send_window, connection.send_frame_size)
        if size <= 0:
            return 0
        out = connection.out
        at = len(out)
        out += _pack_header(size << 8, 0, self.stream_id)
        if size == len(pending):
            out += pending
            self.pending = None
        else:
            with memoryview(pending) as view:
                out += view[:size]
            del pending[:size]
        connection.tail = self
        connection.tail_at = at
        connection.tail_size = size
        connection.queued -= size
        self.send_window -= size
        connection.send_window -= size
        if self.pending is None:
            if self.eof_queued:
                self.eof_queued = False
                self._send_end()
                return size
            self.streaming = True
        return size

    def maybe_resume(self) -> None:
        """Resume a paused sink once its queue is down at the low water mark."""
        if not self.paused or self.closed or self.eof_queued or self.send_ended:
            return
        pending = self.pending
        if pending is None or len(pending) <= self.connection.limits.stream_low_water:
            self.paused = False
            try:
                self.sink.resume_writing()
            except Exception as error:
                self.connection.sink_failed(self, error)

    def send_informational(self, status: int) -> None:
        """Send a 1xx head in front of the response."""
        if not self.responded and not self.closed:
            self._send_headers(STATUS_FIELDS[status], False)
            self.connection.tail = None  # the end goes on no other head than the last

    # --- inside ----------------------------------------------------------------------------------------------------

    def _write_slowly(self, data: Buffer) -> None:
        """Send what fits in frames and queue the rest; pause the sink at the high water mark."""
        if self.closed or self.send_ended or self.eof_queued:
            return
        if not self.responded:
            self.respond(200, (), ResponseSource.CONNECTOR)
            if not self.streaming:
                return
        connection = self.connection
        pending = self.pending
        if pending is None:
            size = len(data)
            sent = 0
            if not connection.stalled:
                with memoryview(data) as view:
                    while sent < size:
                        part = min(size - sent, self.send_window, connection.send_window, connection.send_frame_size)
                        at = len(connection.out)
                        if part <= 0 or at >= connection.out_high_water:
                            break
                        connection.append(_pack_header(part << 8, 0, self.stream_id))
                        connection.out += view[sent : sent + part]
                        self.send_window -= part
                        connection.send_window -= part
                        connection.tail = self
                        connection.tail_at = at
                        connection.tail_size = part
                        sent += part
                    if sent == size:
                        return
                    pending = bytearray(view[sent:])
            else:
                pending = bytearray(data)
            self.pending = pending
            self.streaming = False
            connection.queued += size - sent
            if self.send_window > 0:
                connection.wait_turn(self)
        else:
            pending += data
            connection.queued += len(data)
        limits = connection.limits
        if not self.paused and (
            len(pending) >= limits.stream_high_water or connection.queued >= limits.queue_high_water
        ):
            self.paused = True
            try:
                self.sink.pause_writing()
            except Exception as error:
                connection.sink_failed(self, error)

    def _send_credit(self) -> None:
        """Turn owed credit into a WINDOW_UPDATE; none is needed once the peer has ended its side."""
        connection = self.connection
        owed = min(self.owed, connection.limits.stream_window - self.receive_window)
        self.owed = 0
        if owed > 0:
            self.receive_window += owed
            self.credited += owed
            if not self.receive_ended:
                connection.append(encode_window_update(self.stream_id, owed))

    def _send_headers(self, block: bytes, ended: bool) -> None:
        """Append HEADERS, and CONTINUATION where the peer's frame size demands it."""
        connection = self.connection
        flags = FLAG_END_STREAM if ended else 0
        at = len(connection.out)
        limit = connection.peer_frame_size
        if connection.header_block_prefix:
            block = connection.header_block_prefix + block
            connection.header_block_prefix = b""
        if len(block) <= limit:
            connection.append(_pack_header(len(block) << 8 | HEADERS, flags | FLAG_END_HEADERS, self.stream_id) + block)
        else:
            connection.append(_pack_header(limit << 8 | HEADERS, flags, self.stream_id) + block[:limit])
            for start in range(limit, len(block), limit):
                part = block[start : start + limit]
                flags = FLAG_END_HEADERS if start + limit >= len(block) else 0
                connection.append(_pack_header(len(part) << 8 | CONTINUATION, flags, self.stream_id) + part)
        if not ended:
            # Open for END_STREAM, but never for payload: as full as a frame can be.
            connection.tail = self
            connection.tail_at = at
            connection.tail_size = WINDOW_LIMIT

    def _send_end(self) -> None:
        """Send END_STREAM: on the trailers, on the last frame if it is still in the out-buffer, or on its own."""
        connection = self.connection
        block = _trailer_block(self.trailers) if self.trailers else b""
        self.trailers = ()
        if block:
            self._send_headers(block, True)
        elif connection.tail is self:
            connection.out[connection.tail_at + 4] |= FLAG_END_STREAM
            connection.tail = None
        else:
            connection.append(_pack_header(DATA, FLAG_END_STREAM, self.stream_id))
        self._end_sending()

    def _end_sending(self) -> None:
        self.send_ended = True
        self.streaming = False
        if self.receive_ended:
            self.connection.forget(self)
        elif self.discarding:
            self.connection.reset_stream(self, ErrorCode.NO_ERROR)


def _trailer_block(trailers: Headers) -> bytes:
    """Return the HPACK literals of the trailers that may be sent: lower-cased, sorted by name."""
    fields = []
    for name, value in trailers:
        lower = name.lower()
        if is_field_name(lower) and is_field_value(value) and lower not in _NOT_IN_TRAILERS:
            fields.append((lower, value))
    fields.sort(key=_name_of)
    return b"".join([hpack_literal(name, value) for name, value in fields])


def _name_of(field: tuple[bytes, bytes]) -> bytes:
    return field[0]
