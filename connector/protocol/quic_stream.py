"""One QUIC stream: what it is for, and the port that the proxy writes to (proto/README.md, QUIC part).

Owns: QuicStream: signature, ConnectRequest, the ends of payload, and how a response becomes bytes.
In: StreamPort calls of the proxy; from the table: payload and ends. Out: calls on a QuicSender and on the StreamSink.
Never: packets, other streams, time, sockets; never decides what a request means.

*Strategy*: a stream that has been opened is one flag (`receiving`) away from its sink, and one call away from the
engine. What waits for transmission is only measured when the bytes written since the last measurement could exceed the
high water mark, so a small message costs one addition. Every wire code is 0, as the edge protocol has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from connector.errors import ProtocolError, WireError
from connector.protocol.ports import (
    Buffer,
    Headers,
    RequestKind,
    ResetCode,
    ResponseSource,
    StreamSink,
)
from connector.protocol.quic_request import (
    DATA_SIGNATURE,
    FLOW_LIMITED,
    ORIGIN_FAILED,
    REFUSED,
    RPC_SIGNATURE,
    SIGNATURE_LENGTH,
    VERSION,
    RequestError,
    decode_connect,
    encode_accepted,
    encode_error,
    encode_head,
)
from connector.wire.connect import connect_length, decode_connect_request

if TYPE_CHECKING:
    from connector.protocol.quic_streams import QuicStreams

_BODY_AT = SIGNATURE_LENGTH + len(VERSION)
_BODILESS_STATUS = (204, 304)
_EVERYTHING = 1 << 62  # a body without a length of its own: more than any stream can carry


class _NoSink:
    """The sink of a stream that was not accepted yet, or was answered without the proxy."""

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


NO_SINK = _NoSink()


class QuicStream:
    """One bidirectional stream. A StreamPort for the proxy; QuicStreams drives the receiving side.

    Data streams start with `head` (what arrived of signature and ConnectRequest); control and RPC streams are `raw`:
    they have no response head.
    """

    __slots__ = (
        "bodiless",
        "body_left",
        "closed",
        "discarding",
        "fin_received",
        "head",
        "kind",
        "lent",
        "paused",
        "raw",
        "receive_ended",
        "received",
        "receiving",
        "responded",
        "send_ended",
        "sent",
        "sink",
        "spans",
        "stopped",
        "stream_id",
        "streaming",
        "streams",
        "unsent",
    )

    def __init__(self, streams: QuicStreams, stream_id: int, *, raw: bool) -> None:
        self.streams = streams
        self.stream_id = stream_id
        self.sink: StreamSink = NO_SINK
        self.kind = RequestKind.CONTROL if raw else RequestKind.HTTP
        self.raw = raw
        self.head: bytearray | None = None if raw else bytearray()
        self.receiving = raw  # payload goes straight to the sink, until FIN
        self.body_left = _EVERYTHING
        self.receive_ended = False  # the sink got on_eof, or wants nothing more
        self.fin_received = False  # FIN or RESET_STREAM arrived
        self.stopped = False  # STOP_SENDING went out
        self.lent = 0  # given to the sink, not consumed
        self.discarding = False  # stop_reading was called: what the sink still consumes was credited then
        self.responded = raw
        self.streaming = raw  # = responded, not ended, and the status allows a body
        self.bodiless = False
        self.send_ended = False
        self.received = 0  # payload bytes that the sink got
        self.sent = 0  # payload bytes that the engine got
        self.spans = b""
        self.unsent = 0  # at least what waits for transmission
        self.paused = False  # the sink was told pause_writing
        self.closed = False

    def __repr__(self) -> str:
        return f"<QuicStream {self.stream_id} {self.kind.name}{' closed' if self.closed else ''}>"

    # --- StreamPort ------------------------------------------------------------------------------------------------

    def respond(
        self, status: int, headers: Headers, source: ResponseSource = ResponseSource.ORIGIN, reason: bytes = b""
    ) -> None:
        """Send the ConnectResponse; informational statuses but 101 are left out, failures become its error text."""
        if self.responded or self.closed or (status < 200 and status != 101):
            return
        self.responded = True
        if source is ResponseSource.FLOW_LIMITED:
            head = encode_error(reason or FLOW_LIMITED, source)
            self.bodiless = True
        elif self.kind is RequestKind.TCP:
            refused = status not in {101, 200}
            usual = REFUSED if status < 500 else ORIGIN_FAILED
            head = encode_error(reason or usual) if refused else encode_accepted(self.spans)
            self.bodiless = refused
        elif source is ResponseSource.CONNECTOR and status == 502:
            head = encode_error(reason or ORIGIN_FAILED)
            self.bodiless = True
        else:
            head = encode_head(status, headers, self.spans)
            self.bodiless = self.bodiless or status in _BODILESS_STATUS
        self.streaming = not self.bodiless
        self._send(head)
        self.sent = 0

    def write(self, data: Buffer) -> None:
        """Hand payload to the engine; pause the sink when too much waits there."""
        if self.streaming:
            self._send(data)
        elif not self.responded and not self.closed:
            self.respond(200, (), ResponseSource.CONNECTOR)
            self.write(data)

    def write_eof(self, trailers: Headers = ()) -> None:
        """End the sending side with FIN; QUIC has no trailers. Without use for more payload, STOP_SENDING first."""
        if self.closed or self.send_ended:
            return
        if not self.responded:
            self.respond(200, ((b"content-length", b"0"),), ResponseSource.CONNECTOR)
        self.streaming = False
        self.send_ended = True
        if self.receive_ended:
            self._stop()
        streams = self.streams
        streams.sender.send(self.stream_id, b"", True)
        streams.touch()
        self._maybe_forget()

    def reset(self, code: ResetCode) -> None:
        """Give the stream up both ways; whatever the reason, the code on the wire is 0."""
        if self.closed:
            return
        self._stop()
        if not self.send_ended:
            self.streams.sender.reset_stream(self.stream_id)
        self.streams.forget(self)
        self.streams.touch()

    def stop_reading(self) -> None:
        """Want no more payload: STOP_SENDING, and what still arrives is dropped."""
        if self.closed or self.receive_ended:
            return
        self.receiving = False
        self.receive_ended = True
        self.discarding = True
        lent, self.lent = self.lent, 0
        self._stop()
        self.streams.touch()
        if lent:
            self.streams.consumed(self.stream_id, lent)
        self._maybe_forget()

    def consumed(self, n: int) -> None:
        """Give back the credit of `n` bytes that the origin accepted."""
        if not self.closed and not self.discarding:
            self.lent -= n
            self.streams.consumed(self.stream_id, n)

    def traffic(self) -> tuple[int, int]:
        """Payload bytes received and sent."""
        return self.received, self.sent

    # --- for QuicStreams -------------------------------------------------------------------------------------------

    def receive(self, data: Buffer, fin: bool) -> None:
        """Take what arrived, in order. May raise what the sink raises."""
        if fin:
            self.fin_received = True  # first: a sink that ends the stream at the last byte needs no STOP_SENDING
        if self.receiving:
            if data:
                self._deliver(data)
            if fin:
                self._finish_receiving()
            return
        if self.head is not None:
            self._receive_head(data, fin)
            return
        size = len(data)
        if size and self.receive_ended:
            self.streams.sender.credit(self.stream_id, size)
        elif size:
            part = min(size, self.body_left)
            self.body_left -= part
            if part < size:
                self.streams.sender.credit(self.stream_id, size - part)
            self._deliver(data if part == size else memoryview(data)[:part])
            if not self.body_left and not self.receive_ended and not self.closed:
                self._end_payload()
        if fin:
            self._finish_receiving()

    def _deliver(self, data: Buffer) -> None:
        size = len(data)
        self.lent += size
        self.received += size
        self.streams.lent += size
        self.sink.on_data(data)
        if self.streams.lent >= self.streams.limits.receive_high_water:
            self.streams.pause_receiving()

    def _receive_head(self, data: Buffer, fin: bool) -> None:
        """Collect signature, version and ConnectRequest; then open towards the proxy."""
        head = self.head
        assert head is not None
        streams = self.streams
        head += data
        if data:
            streams.sender.credit(self.stream_id, len(data))
        streams.preambles += len(data)
        if len(head) >= SIGNATURE_LENGTH:
            signature = bytes(head[:SIGNATURE_LENGTH])
            if signature == RPC_SIGNATURE:
                self._open_rpc(fin)
                return
            if signature != DATA_SIGNATURE:
                streams.malformed(f"a stream that begins with {signature.hex()}, which is no signature")
                self.leave_head()
                self.reset(ResetCode.PROTOCOL)
                return
        if streams.preambles > streams.limits.max_preamble:
            streams.malformed("too many bytes in unfinished ConnectRequests")
            self.leave_head()
            self.reset(ResetCode.REFUSED)
            return
        try:
            length = connect_length(memoryview(head)[_BODY_AT:]) if len(head) > _BODY_AT else None
            if length is None or len(head) < _BODY_AT + length:
                if fin and len(head) < SIGNATURE_LENGTH:
                    self.leave_head()
                    self.reset(ResetCode.PROTOCOL)
                    return
                if fin:
                    raise WireError("the stream ended within the ConnectRequest")
                return
            request = decode_connect(decode_connect_request(bytes(head[_BODY_AT : _BODY_AT + length])))
        except (WireError, RequestError) as error:
            streams.malformed(str(error))
            self.leave_head()
            self.responded = self.bodiless = True
            self._send(encode_error(str(error).encode()))
            self.receive_ended = True
            self.write_eof()
            return
        rest = bytes(head[_BODY_AT + length :])
        self.leave_head()
        self.kind = request.kind
        self.bodiless = request.method == b"HEAD" and request.kind is RequestKind.HTTP
        self.body_left = request.content_length if request.content_length >= 0 else _EVERYTHING
        self.sink = streams.accept(request, self)
        if self.closed:
            return
        if not self.body_left:
            self._end_payload()
        elif not self.receive_ended:
            self.receiving = request.content_length < 0
        if (rest or fin) and not self.closed:
            self.receive(rest, fin)

    def _open_rpc(self, fin: bool) -> None:
        head, streams = self.head, self.streams
        assert head is not None
        rest = bytes(head[SIGNATURE_LENGTH:])
        self.leave_head()
        self.raw = self.responded = self.streaming = True
        self.kind = RequestKind.CONTROL
        sink = streams.accept_rpc(self) if streams.accept_rpc is not None else None
        if sink is None:
            self.reset(ResetCode.REFUSED)
            return
        self.sink = sink
        if not self.closed and not self.receive_ended:
            self.receiving = True
            self.receive(rest, fin)

    def leave_head(self) -> None:
        """Let go of what was collected before the stream was opened towards the proxy."""
        if self.head is not None:
            self.streams.preambles -= len(self.head)
            self.head = None

    def _end_payload(self) -> None:
        """The request payload is whole: tell the sink, and read on only for the stream's own end."""
        self.receive_ended = True
        self.receiving = False
        self.sink.on_eof()

    def _finish_receiving(self) -> None:
        """Take FIN."""
        if not self.receive_ended and not self.closed:
            if 0 < self.body_left < _EVERYTHING:
                self.streams.abort(self, ProtocolError(f"the request body ended {self.body_left} bytes too early"))
                return
            self._end_payload()
        self._maybe_forget()

    # --- inside ----------------------------------------------------------------------------------------------------

    def _send(self, data: Buffer) -> None:
        streams = self.streams
        if not streams.sender.send(self.stream_id, data, False):
            self.streaming = False  # the peer's STOP_SENDING is on its way to us as an event
            return
        size = len(data)
        unsent = self.unsent + size
        self.unsent = unsent
        self.sent += size
        streams.unsent += size
        if not streams.touched:
            streams.touch()
        if streams.unsent > streams.unsent_limit:
            streams.measure_all()
        if unsent > streams.high_water and not self.paused:
            streams.measure(self)

    def _stop(self) -> None:
        """Send STOP_SENDING unless the peer's side has ended."""
        if not self.fin_received and not self.stopped:
            self.stopped = True
            self.streams.sender.stop_stream(self.stream_id)

    def _maybe_forget(self) -> None:
        if self.send_ended and (self.fin_received or self.stopped):
            self.streams.forget(self)
