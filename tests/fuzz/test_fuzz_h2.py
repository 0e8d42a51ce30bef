"""The HTTP/2 engine under random and mutated input: nothing but ProtocolError, and every invariant holds."""

from __future__ import annotations

import contextlib
import os
import random
import struct

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from connector.errors import ProtocolError, WireError
from connector.protocol.h2_connection import H2Connection
from connector.protocol.h2_limits import H2Limits
from connector.protocol.h2_stream import H2Stream
from connector.protocol.ports import Buffer, Request, ResetCode, ResponseSource, StreamPort
from connector.wire.h2_frames import (
    DATA,
    FLAG_END_HEADERS,
    HEADERS,
    PREFACE,
    WINDOW_LIMIT,
    encode_frame,
    encode_settings,
    encode_window_update,
)
from connector.wire.h2_headers import decode_serialised_headers
from connector.wire.h2_hpack import HpackDecoder
from tests.support.h2_doubles import GET, POST, Sink, Wire, run_session, split_frames

# Small limits, so that a short input meets all of them.
LIMITS = H2Limits(
    max_concurrent_streams=4,
    stream_window=20_000,
    connection_window=70_000,
    max_frame_size=40_000,
    max_header_list_size=2_000,
    max_header_block=3_000,
    max_continuations=3,
    max_resets=8,
    max_pings=8,
    max_settings=8,
    max_empty_frames=8,
    max_ignored_frames=16,
    stream_high_water=2_000,
    stream_low_water=500,
    queue_high_water=8_000,
    out_high_water=4_000,
    fair_share=700,
)
WIDE_LIMITS = LIMITS._replace(stream_window=1 << 20, connection_window=1 << 24)
"""With windows that a session cannot exceed: where reads are cut decides when credit is given back."""
LARGEST_WRITE = 3_000


class ActingSink(Sink):
    """Does something random to its port on every call, and checks the order of calls (Sink does)."""

    rng: random.Random
    gone = False

    def act(self) -> None:
        port = self.port
        assert isinstance(port, H2Stream)
        choice = self.rng.randrange(14)
        if choice == 0:
            port.respond(
                self.rng.choice([101, 103, 200, 204, 304, 404, 502]), [(b"content-length", b"3"), (b"X", b"y")]
            )
        elif choice in (1, 2, 3):
            if not self.paused:
                port.write(bytes(self.rng.choice([0, 1, 100, LARGEST_WRITE])))
        elif choice == 4:
            port.write_eof([(b"x-t", b"1")] if self.rng.random() < 0.3 else ())
        elif choice == 5 and self.rng.random() < 0.3:
            self.gone = self.gone or not port.closed
            port.reset(self.rng.choice(list(ResetCode)))
        elif choice == 6 and self.rng.random() < 0.3:
            port.stop_reading()
        elif choice in (7, 8):
            port.consumed(self.rng.choice([1, 500, 5_000, 50_000]))
        elif choice == 9 and self.rng.random() < 0.1:
            raise ValueError("a sink's own error")

    def on_data(self, data: Buffer) -> None:
        assert not self.gone, "payload after reset"
        assert len(data)
        super().on_data(bytes(data))
        self.act()

    def on_eof(self) -> None:
        assert not self.gone, "eof after reset"
        super().on_eof()
        self.act()

    def on_reset(self, error: BaseException | None) -> None:
        assert not self.gone, "reset after reset"
        super().on_reset(error)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.act()


def check_invariants(engine: H2Connection) -> None:
    limits = engine.limits
    assert 0 <= engine.receive_window <= limits.connection_window
    assert engine.receive_window + engine.owed <= limits.connection_window + 100_000_000  # sinks here consume too much
    assert 0 <= engine.send_window <= WINDOW_LIMIT
    assert len(engine.streams) <= limits.max_concurrent_streams
    assert engine.queued == sum(len(stream.pending or b"") for stream in engine.streams.values())
    assert engine.queued < limits.queue_high_water + limits.max_concurrent_streams * (LARGEST_WRITE * 8)
    assert len(engine._rest) <= limits.max_frame_size + 9
    assert len(engine.blocks._block) <= limits.max_header_block
    for stream in engine.streams.values():
        assert 0 <= stream.receive_window <= limits.stream_window
        assert stream.send_window <= WINDOW_LIMIT
        assert not stream.closed
        assert not (stream.receive_ended and stream.send_ended)
        assert stream.pending is None or len(stream.pending)
        if stream.streaming:
            assert stream.responded
            assert stream.pending is None
            assert not stream.send_ended
        if stream.pending is not None and stream.send_window > 0:
            assert stream.waiting, "payload that nobody will send"
        assert stream.receiving == (not stream.receive_ended and not stream.discarding)
        assert stream.body_left >= -1, "more was received than the content-length allows"


def drive(pieces: list[bytes], seed: int) -> None:
    rng = random.Random(seed)
    sinks: list[ActingSink] = []
    failures: list[Exception] = []

    def accept(request: Request, port: StreamPort) -> Sink:
        for text in (request.target, request.host, *[part for field in request.headers for part in field]):
            assert not set(text) & {0, 10, 13}
        sink = ActingSink(request, port, consume=rng.random() < 0.5)
        sink.rng = rng
        sinks.append(sink)
        if rng.random() < 0.3:
            port.respond(200, [], ResponseSource.ORIGIN)
        return sink

    engine = H2Connection(accept, wake=lambda: None, limits=LIMITS, on_sink_error=failures.append)
    engine.start(0.0)
    failed = False
    sent = bytearray()
    for piece in pieces:
        try:
            engine.receive_data(piece, rng.random())
        except ProtocolError:
            assert not failed
            failed = True
        check_invariants(engine)
        if rng.random() < 0.2:
            engine.pause_writing()
        for sink in sinks:
            if rng.random() < 0.3 and not sink.gone:
                with contextlib.suppress(ValueError):
                    sink.act()
        check_invariants(engine)
        if rng.random() < 0.5:
            engine.resume_writing()
        data = engine.data_to_send()
        assert len(data) < LIMITS.out_high_water + 64_000
        sent += data
        check_invariants(engine)
    split_frames(sent)  # whole frames only
    engine.connection_lost(None)
    assert engine.open_streams == 0
    assert engine.queued == 0
    for failure in failures:
        assert isinstance(failure, ValueError), failure
    for sink in sinks:
        # Exactly one end: it was told, it gave up itself, or both sides came to theirs.
        told = sink.calls.count("reset")
        assert told + sink.gone <= 1
        stream = sink.port
        assert isinstance(stream, H2Stream)
        assert stream.closed
        if not told and not sink.gone:
            assert stream.send_ended
            assert stream.receive_ended or stream.discarding
            assert ("eof" in sink.calls) != stream.discarding or sink.calls.count("eof") == 1
        sink.port.write(b"x")
        sink.port.consumed(1)
        sink.port.reset(ResetCode.FAILED)
    assert engine.data_to_send() is not None


HANDSHAKE = PREFACE + encode_settings([(4, 3_000), (5, 16_384)])


def check_stream(data: bytes) -> None:
    """Raw bytes behind a good handshake, cut by what they say themselves."""
    seed = sum(data)
    cut = 1 + seed % 97
    drive([HANDSHAKE, *[data[start : start + cut] for start in range(0, len(data), cut)]], seed)


def check_header_block(data: bytes) -> None:
    """A header block of a new stream, and what the decoder says of it."""
    drive([HANDSHAKE, encode_frame(HEADERS, FLAG_END_HEADERS, 1, data)], len(data))
    with contextlib.suppress(WireError):
        HpackDecoder(4_096).decode(data)


def check_serialised(data: bytes) -> None:
    """A serialised header list."""
    with contextlib.suppress(WireError):
        decode_serialised_headers(data)


stream_ids = st.sampled_from([0, 1, 1, 1, 2, 3, 3, 5, 7, 9, 11, 13, 2**31 - 1])
words = st.sampled_from([0, 1, 100, 3_000, 16_384, 65_535, 2**31 - 1, 2**32 - 1])
frames = st.one_of(
    st.builds(encode_frame, st.integers(0, 12), st.sampled_from([0, 1, 4, 5, 8, 9, 0x20, 0x2D, 0xFF]), stream_ids)
    | st.builds(
        encode_frame,
        st.integers(0, 12),
        st.sampled_from([0, 1, 4, 5, 8, 9, 0x20, 0x2D, 0xFF]),
        stream_ids,
        st.binary(max_size=60),
    ),
    st.builds(
        lambda stream_id, end, size: encode_frame(DATA, end, stream_id, bytes(size)),
        stream_ids,
        st.integers(0, 1),
        st.sampled_from([0, 1, 10, 5_000, 17_000, 30_000]),
    ),
    st.builds(encode_window_update, stream_ids, words),
    st.builds(lambda key, value: encode_settings([(key, value)]), st.integers(0, 9), words),
    st.builds(
        lambda kind, sid, word: encode_frame(kind, 0, sid, struct.pack(">I", word)),
        st.sampled_from([3, 8]),
        stream_ids,
        words,
    ),
)


class Pieces(list[bytes]):
    """Frames that show as their headers: whole payloads would be megabytes of report."""

    def __repr__(self) -> str:
        return f"<{[piece[:24].hex() for piece in self]}>"


@st.composite
def sessions(draw: st.DrawFn) -> list[bytes]:
    """Frames in an order that mostly makes sense: streams are opened, used and ended."""
    wire = Wire()
    pieces = [PREFACE, encode_settings([(4, draw(st.sampled_from([0, 10, 3_000, 65_535])))])]
    next_id = 1
    for _ in range(draw(st.integers(1, 25))):
        choice = draw(st.integers(0, 9))
        if choice <= 2:
            fields = draw(
                st.sampled_from(
                    [
                        GET,
                        POST,
                        [*POST, (b"content-length", b"10")],
                        [*POST, (b"expect", b"100-continue")],
                        [(b":method", b"HEAD"), *GET[1:]],
                        [*GET, (b"connection", b"x")],
                        [*GET, (b"x-large", b"v" * 1_980)],
                        GET[1:],
                    ]
                )
            )
            pieces.append(wire.headers(next_id, fields, end=draw(st.booleans())))
            next_id += 2
        elif choice <= 5:
            size = draw(st.sampled_from([0, 1, 10, 500, 18_000]))
            stream_id = max(1, next_id - 2 * draw(st.integers(1, 3)))
            pieces.append(wire.data(stream_id, bytes(size), end=draw(st.booleans())))
        elif choice == 6:
            stream_id = draw(st.sampled_from([0, max(1, next_id - 2), 1]))
            pieces.append(encode_window_update(stream_id, draw(st.integers(1, 10_000))))
        else:
            pieces.append(draw(frames))
    return Pieces(pieces)


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    count = rng.choice([0, 1, 10, 40])
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(count))
    return [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True)]


thorough = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@thorough
@given(st.lists(frames, max_size=25), st.integers(0, 2**32))
def test_random_frames(random_frames: list[bytes], seed: int) -> None:
    drive(cut(HANDSHAKE + b"".join(random_frames), random.Random(seed)), seed)


@thorough
@given(sessions(), st.integers(0, 2**32))
def test_sessions_that_mostly_make_sense(pieces: list[bytes], seed: int) -> None:
    drive(pieces if seed & 1 else cut(b"".join(pieces), random.Random(seed)), seed)


@thorough
@given(sessions(), st.integers(0, 2**32), st.integers(1, 6))
def test_mutated_sessions(pieces: list[bytes], seed: int, count: int) -> None:
    rng = random.Random(seed)
    data = bytearray(b"".join(pieces))
    for _ in range(count):
        at = rng.randrange(len(PREFACE), len(data))
        how = rng.randrange(4)
        if how == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[at : at + rng.randrange(1, 20)]
        elif how == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 20))
        else:
            data[at:at] = data[at : at + rng.randrange(1, 60)]
        if len(data) <= len(PREFACE):
            break
    drive(cut(bytes(data), rng), seed)


@thorough
@given(sessions(), st.integers(0, 2**32))
def test_sessions_cut_anywhere_give_the_same_calls(pieces: list[bytes], seed: int) -> None:
    data = b"".join(pieces)
    whole = run_session([data], WIDE_LIMITS)
    assert run_session(cut(data, random.Random(seed)), WIDE_LIMITS) == whole
    if len(data) < 3_000:
        assert run_session([data[at : at + 1] for at in range(len(data))], WIDE_LIMITS) == whole


@thorough
@given(st.binary(max_size=400))
def test_raw_bytes(data: bytes) -> None:
    check_stream(data)
    check_header_block(data)
    check_serialised(data)
    drive([data], 0)
