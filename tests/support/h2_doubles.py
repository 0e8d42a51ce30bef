"""Doubles for the HTTP/2 engine: a recording sink, and the `h2` library as the edge on the other end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import h2.config
import h2.connection
import h2.events
import h2.settings
import hpack

from connector.errors import ProtocolError
from connector.protocol.h2_connection import H2Connection
from connector.protocol.h2_limits import DEFAULT_LIMITS, H2Limits
from connector.protocol.ports import Buffer, Request, StreamPort
from connector.wire.h2_frames import (
    CONTINUATION,
    DATA,
    FLAG_END_HEADERS,
    FLAG_END_STREAM,
    FRAME_HEADER,
    HEADERS,
    PREFACE,
    STREAM_ID_MASK,
    WINDOW_UPDATE,
    encode_frame,
    encode_settings,
)

GET = [
    (b":method", b"GET"),
    (b":scheme", b"https"),
    (b":authority", b"app.example.com"),
    (b":path", b"/hi?x=1"),
]
POST = [(b":method", b"POST"), *GET[1:]]


class Sink:
    """Records the calls on it; consumes at once unless told otherwise; never answers."""

    def __init__(self, request: Request, port: StreamPort, *, consume: bool = True) -> None:
        self.request = request
        self.port = port
        self.consume = consume
        self.data = bytearray()
        self.calls: list[str] = []
        self.error: BaseException | None = None
        self.chunks: list[int] = []

    def on_data(self, data: Buffer) -> None:
        assert not self.ended, "payload after the end"
        self.data += data
        self.chunks.append(len(data))
        if self.consume:
            self.port.consumed(len(data))

    def on_eof(self) -> None:
        assert not self.ended, "two ends"
        self.calls.append("eof")

    def on_reset(self, error: BaseException | None) -> None:
        assert "reset" not in self.calls, "two resets"
        self.calls.append("reset")
        self.error = error

    def pause_writing(self) -> None:
        assert not self.paused, "paused twice"
        self.calls.append("pause")

    def resume_writing(self) -> None:
        assert self.paused, "resumed without a pause"
        self.calls.append("resume")

    @property
    def ended(self) -> bool:
        return "eof" in self.calls or "reset" in self.calls

    @property
    def paused(self) -> bool:
        return self.calls.count("pause") > self.calls.count("resume")


SinkMaker = Callable[[Request, StreamPort], Sink]


class Pair:
    """The engine and an `h2` client, joined without sockets. `now` is moved by hand."""

    def __init__(
        self,
        make: SinkMaker = Sink,
        *,
        limits: H2Limits = DEFAULT_LIMITS,
        settings: dict[int, int] | None = None,
        handshake: bool = True,
    ) -> None:
        self.sinks: list[Sink] = []
        self.wakes = 0
        self.now = 0.0
        self.errors: list[Exception] = []
        self.malformed: list[str] = []

        def accept(request: Request, port: StreamPort) -> Sink:
            sink = make(request, port)
            self.sinks.append(sink)
            return sink

        self.engine = H2Connection(
            accept, wake=self._wake, limits=limits, on_sink_error=self.errors.append, on_malformed=self.malformed.append
        )
        self.edge = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=True,
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        if settings:
            self.edge.local_settings = h2.settings.Settings(client=True, initial_values=settings)
        self.events: list[h2.events.Event] = []
        self.engine.start(self.now)
        if handshake:
            self.edge.initiate_connection()
            self.exchange()
            self.events.clear()

    def _wake(self) -> None:
        self.wakes += 1

    def to_engine(self) -> None:
        data = self.edge.data_to_send()
        if data:
            self.engine.receive_data(data, self.now)

    def to_edge(self) -> list[h2.events.Event]:
        data = bytes(self.engine.data_to_send())
        events = self.edge.receive_data(data) if data else []
        self.events += events
        return events

    def exchange(self, *, credit: bool = True, rounds: int = 10_000) -> None:
        """Carry bytes both ways until nobody has any; the edge consumes DATA at once if `credit`."""
        for _ in range(rounds):
            self.to_engine()
            events = self.to_edge()
            if credit:
                for event in events:
                    if isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
                        self.edge.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            if not events and not self.engine.out and not self.edge._data_to_send:
                return
        raise AssertionError("the exchange does not come to rest")

    def request(self, headers: list[tuple[bytes, bytes]] = GET, *, end: bool = True) -> int:
        stream_id = self.edge.get_next_available_stream_id()
        self.edge.send_headers(stream_id, headers, end_stream=end)
        return stream_id

    def body(self, stream_id: int) -> bytes:
        return b"".join(
            event.data
            for event in self.events
            if isinstance(event, h2.events.DataReceived) and event.stream_id == stream_id
        )

    def response(self, stream_id: int) -> list[tuple[bytes, bytes]]:
        for event in self.events:
            if isinstance(event, h2.events.ResponseReceived) and event.stream_id == stream_id:
                return [(bytes(name), bytes(value)) for name, value in event.headers]
        raise AssertionError(f"no response on stream {stream_id}: {self.events}")

    def saw(self, kind: type[h2.events.Event], stream_id: int | None = None) -> list[h2.events.Event]:
        return [
            event
            for event in self.events
            if isinstance(event, kind) and (stream_id is None or getattr(event, "stream_id", None) == stream_id)
        ]


Frame = tuple[int, int, int, bytes]
"""Type, flags, stream id, payload."""


def split_frames(data: bytes | bytearray) -> list[Frame]:
    """Cut whole frames apart."""
    frames = []
    data = bytes(data)
    pos = 0
    while pos < len(data):
        word, flags, stream_id = FRAME_HEADER.unpack_from(data, pos)
        stop = pos + 9 + (word >> 8)
        assert stop <= len(data), "half a frame"
        frames.append((word & 0xFF, flags, stream_id & STREAM_ID_MASK, data[pos + 9 : stop]))
        pos = stop
    return frames


class Wire:
    """The engine with nothing but frames on the other side, for what no library would send."""

    def __init__(
        self,
        make: SinkMaker = Sink,
        *,
        limits: H2Limits = DEFAULT_LIMITS,
        settings: list[tuple[int, int]] | None = None,
        handshake: bool = True,
    ) -> None:
        self.sinks: list[Sink] = []
        self.wakes = 0
        self.now = 100.0
        self.errors: list[Exception] = []
        self.malformed: list[str] = []
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder(max_header_list_size=1 << 24)

        def accept(request: Request, port: StreamPort) -> Sink:
            sink = make(request, port)
            self.sinks.append(sink)
            return sink

        self.engine = H2Connection(
            accept, wake=self._wake, limits=limits, on_sink_error=self.errors.append, on_malformed=self.malformed.append
        )
        self.engine.start(self.now)
        if handshake:
            self.feed(PREFACE + encode_settings(settings or []))
            self.take()

    def _wake(self) -> None:
        self.wakes += 1

    def feed(self, *frames: bytes) -> None:
        self.engine.receive_data(b"".join(frames), self.now)

    def take(self) -> list[Frame]:
        """Take everything that the engine has to send, over as many ticks as it wants."""
        frames: list[Frame] = []
        for _ in range(100_000):
            data = self.engine.data_to_send()
            if not data:
                return frames
            frames += split_frames(data)
        raise AssertionError("the engine does not come to rest")

    def headers(
        self, stream_id: int, fields: list[tuple[bytes, bytes]] = GET, *, end: bool = True, flags: int = 0
    ) -> bytes:
        flags |= FLAG_END_HEADERS | (FLAG_END_STREAM if end else 0)
        return encode_frame(HEADERS, flags, stream_id, self.encoder.encode(fields))

    def data(self, stream_id: int, payload: bytes, *, end: bool = False) -> bytes:
        return encode_frame(DATA, FLAG_END_STREAM if end else 0, stream_id, payload)

    def open(self, stream_id: int = 1, fields: list[tuple[bytes, bytes]] = POST, *, end: bool = False) -> Sink:
        """Open a stream and return its sink."""
        self.feed(self.headers(stream_id, fields, end=end))
        return self.sinks[-1]

    def heads(self, frames: list[Frame]) -> list[list[tuple[bytes, bytes]]]:
        """Decode the header blocks among `frames`."""
        heads = []
        block = b""
        for kind, flags, _, payload in frames:
            if kind in (HEADERS, CONTINUATION):
                block += payload
                if flags & FLAG_END_HEADERS:
                    heads.append([(bytes(name), bytes(value)) for name, value in self.decoder.decode(block, raw=True)])
                    block = b""
        return heads


class Tracer(Sink):
    """Answers and records in one list for all streams; payload joined, as its portions may differ."""

    log: list[tuple[object, ...]]

    def on_data(self, data: Buffer) -> None:
        super().on_data(data)
        if self.log[-1][:2] == (id(self.port), "data"):
            self.log[-1] = (id(self.port), "data", self.log[-1][2] + bytes(data))  # type: ignore[operator]
        else:
            self.log.append((id(self.port), "data", bytes(data)))

    def on_eof(self) -> None:
        super().on_eof()
        self.log.append((id(self.port), "eof"))

    def on_reset(self, error: BaseException | None) -> None:
        super().on_reset(error)
        self.log.append((id(self.port), "reset", str(error)))


def run_session(
    pieces: Sequence[Buffer], limits: H2Limits = DEFAULT_LIMITS
) -> tuple[list[tuple[object, ...]], list[Frame], str]:
    """Feed pieces to a fresh engine; return the calls on its sinks, what it sent but credit, and its error."""
    log: list[tuple[object, ...]] = []
    numbers: dict[int, int] = {}

    def make(request: Request, port: StreamPort) -> Sink:
        sink = Tracer(request, port)
        sink.log = log
        numbers[id(port)] = len(numbers)
        log.append((id(port), "open", request.method, request.target, tuple(request.headers), request.content_length))
        return sink

    wire = Wire(make, handshake=False, limits=limits)
    failure = ""
    for piece in pieces:
        try:
            wire.engine.receive_data(piece, 1.0)
        except ProtocolError as error:
            failure = str(error)
    frames = [frame for frame in wire.take() if frame[0] != WINDOW_UPDATE]
    wire.engine.connection_lost(None)
    return [(numbers[entry[0]], *entry[1:]) for entry in log], frames, failure  # type: ignore[index]
