"""The connection: handshake, control frames, and exactly what a peer gets that breaks the rules."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest

from connector.errors import ProtocolError, Retry, Scope
from connector.protocol.h2_limits import DEFAULT_LIMITS, H2Limits
from connector.protocol.ports import Buffer, Request, ResetCode, StreamPort
from connector.wire.h2_frames import (
    CONTINUATION,
    DATA,
    FLAG_ACK,
    FLAG_END_HEADERS,
    FLAG_END_STREAM,
    FLAG_PADDED,
    FLAG_PRIORITY,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    SETTINGS_ACK,
    WINDOW_UPDATE,
    ErrorCode,
    Setting,
    encode_frame,
    encode_goaway,
    encode_rst_stream,
    encode_settings,
    encode_window_update,
)
from connector.wire.h2_hpack import hpack_literal
from tests.support.h2_doubles import GET, POST, Sink, Wire, run_session, split_frames

WINDOW_LIMIT = 2**31 - 1


def goaway_of(wire: Wire) -> tuple[int, int, bytes]:
    """The GOAWAY that must be the last frame: last stream id, code, debug text."""
    kind, _, stream_id, payload = wire.take()[-1]
    assert (kind, stream_id) == (GOAWAY, 0)
    last, code = struct.unpack_from(">II", payload)
    return last, code, payload[8:]


def assert_connection_error(wire: Wire, code: ErrorCode, *frames: bytes, last: int | None = None) -> None:
    with pytest.raises(ProtocolError, match=code.name) as caught:
        wire.feed(*frames)
    assert caught.value.scope is Scope.CONNECTION
    assert caught.value.retry is Retry.BACKOFF
    assert caught.value.advice
    got_last, got_code, text = goaway_of(wire)
    assert got_code == code
    assert text.decode() in str(caught.value)
    if last is not None:
        assert got_last == last
    # Nothing the peer sends counts any more, and every sink hears of the end.
    wire.feed(wire.headers(101), b"garbage")
    wire.engine.connection_lost(caught.value)
    assert wire.engine.next_timeout() is None
    assert all("reset" in sink.calls for sink in wire.sinks)
    assert wire.take() == []


# --- handshake -----------------------------------------------------------------------------------------------------


def test_first_bytes_need_no_preface() -> None:
    wire = Wire(handshake=False)
    assert wire.wakes == 1
    assert wire.engine.data_to_send().hex() == (
        "000024040000000000"
        "000500100000"  # MAX_FRAME_SIZE 1048576
        "000300002710"  # MAX_CONCURRENT_STREAMS 10000
        "000600100140"  # MAX_HEADER_LIST_SIZE 1048896
        "000100001000"  # HEADER_TABLE_SIZE 4096
        "000400100000"  # INITIAL_WINDOW_SIZE 1048576
        "000900000001"  # NO_RFC7540_PRIORITIES 1
        "00000408000000000000ff0001"  # connection window 16 MiB
    )


def test_settings_are_acknowledged() -> None:
    wire = Wire(handshake=False)
    wire.take()
    wire.feed(PREFACE + encode_settings([(Setting.ENABLE_PUSH, 0), (0xABCD, 7)]))
    assert wire.take() == [(SETTINGS, FLAG_ACK, 0, b"")]
    wire.feed(SETTINGS_ACK)
    assert wire.take() == []


def test_no_preface_in_time() -> None:
    wire = Wire(handshake=False)
    assert wire.engine.next_timeout() == 110.0
    wire.feed(PREFACE[:23])
    wire.engine.handle_timeout(109.9)
    with pytest.raises(ProtocolError, match="no HTTP/2 preface within 10 s"):
        wire.engine.handle_timeout(110.0)
    assert goaway_of(wire)[1] == ErrorCode.PROTOCOL_ERROR
    assert wire.engine.next_timeout() is None


def test_no_settings_in_time() -> None:
    wire = Wire(handshake=False)
    wire.now = 105.0
    wire.feed(PREFACE + encode_settings([])[:8])
    assert wire.engine.next_timeout() == 107.0
    with pytest.raises(ProtocolError, match="no SETTINGS within 2 s"):
        wire.engine.handle_timeout(107.0)
    assert goaway_of(wire)[1] == ErrorCode.SETTINGS_TIMEOUT


def test_no_timer_after_the_handshake() -> None:
    wire = Wire()
    assert wire.engine.next_timeout() is None
    wire.engine.handle_timeout(1e9)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"X", PREFACE[:20] + b"x", b"\x16\x03\x01\x02\x00"])
def test_not_a_preface(data: bytes) -> None:
    assert_connection_error(Wire(handshake=False), ErrorCode.PROTOCOL_ERROR, data)


@pytest.mark.parametrize("frame", [SETTINGS_ACK, encode_frame(PING, 0, 0, b"x" * 8), encode_frame(0xEE, 0, 0)])
def test_first_frame_is_not_settings(frame: bytes) -> None:
    assert_connection_error(Wire(handshake=False), ErrorCode.PROTOCOL_ERROR, PREFACE, frame)


# --- frames that are fine ------------------------------------------------------------------------------------------


def test_ping_is_answered_and_its_answer_is_not() -> None:
    wire = Wire()
    wire.feed(encode_frame(PING, 0, 0, b"12345678"), encode_frame(PING, FLAG_ACK, 0, b"87654321"))
    assert wire.take() == [(PING, FLAG_ACK, 0, b"12345678")]


def test_unknown_frames_are_ignored() -> None:
    wire = Wire()
    wire.feed(
        encode_frame(0x42, 0xFF, 0, b"abc"), encode_frame(0xFF, 0, 7, b""), encode_frame(0x0C, 0, 1, bytes(60_000))
    )
    assert wire.take() == []
    assert wire.open(1).calls == []


def test_unknown_frames_are_not_kept() -> None:
    wire = Wire()
    frame = encode_frame(0x42, 0, 0, bytes(500_000))
    for start in range(0, len(frame), 10_000):
        wire.feed(frame[start : start + 10_000])
        assert len(wire.engine._rest) < 10
    assert wire.open(1).calls == []


def test_goaway_lets_streams_finish() -> None:
    wire = Wire()
    sink = wire.open(1)
    wire.feed(encode_goaway(0, 0, b"bye"), wire.data(1, b"rest", end=True))
    assert wire.engine.goaway_received
    assert sink.calls == ["eof"]
    sink.port.respond(200, [])
    sink.port.write_eof()
    assert wire.engine.open_streams == 0


def test_headers_with_padding_priority_and_continuation() -> None:
    wire = Wire()
    block = wire.encoder.encode(POST)
    payload = b"\x03" + struct.pack(">IB", 0x80000000, 200) + block[:5] + bytes(3)
    wire.feed(
        encode_frame(HEADERS, FLAG_PADDED | FLAG_PRIORITY | FLAG_END_STREAM, 1, payload),
        encode_frame(CONTINUATION, 0, 1, block[5:7]),
        encode_frame(CONTINUATION, 0, 1, b""),
        encode_frame(CONTINUATION, FLAG_END_HEADERS, 1, block[7:]),
    )
    (sink,) = wire.sinks
    assert sink.request.method == b"POST"
    assert sink.calls == ["eof"]


def test_data_with_padding() -> None:
    wire = Wire()
    sink = wire.open(1)
    wire.feed(
        encode_frame(DATA, FLAG_PADDED, 1, b"\x04abc" + bytes(4)), encode_frame(DATA, FLAG_PADDED | 1, 1, b"\x00d")
    )
    assert sink.data == b"abcd"
    assert sink.calls == ["eof"]


def test_priority_is_ignored() -> None:
    wire = Wire()
    wire.feed(encode_frame(PRIORITY, 0, 9, struct.pack(">IB", 3, 1)), wire.headers(1, POST, end=False))
    wire.feed(encode_frame(PRIORITY, 0, 1, struct.pack(">IB", 3, 1)))
    assert wire.take() == []


def test_reserved_bit_of_the_stream_id_is_ignored() -> None:
    wire = Wire()
    sink = wire.open(1)
    wire.feed(encode_frame(DATA, 0, 1 | 1 << 31, b"abc"))
    assert sink.data == b"abc"


# --- connection errors ---------------------------------------------------------------------------------------------

Frames = Callable[[Wire], list[bytes]]
CONNECTION_ERRORS: dict[str, tuple[ErrorCode, Frames]] = {
    "DATA on stream 0": (ErrorCode.PROTOCOL_ERROR, lambda w: [w.data(0, b"x")]),
    "DATA on an idle stream": (ErrorCode.PROTOCOL_ERROR, lambda w: [w.data(1, b"x")]),
    "DATA on an even stream": (ErrorCode.PROTOCOL_ERROR, lambda w: [w.headers(5), w.data(2, b"x")]),
    "DATA whose padding exceeds it": (
        ErrorCode.PROTOCOL_ERROR,
        lambda w: [w.headers(1, end=False), encode_frame(DATA, FLAG_PADDED, 1, b"\x05abc")],
    ),
    "DATA padded without a length": (
        ErrorCode.PROTOCOL_ERROR,
        lambda w: [w.headers(1, end=False), encode_frame(DATA, FLAG_PADDED, 1)],
    ),
    "HEADERS on stream 0": (ErrorCode.PROTOCOL_ERROR, lambda w: [w.headers(0)]),
    "HEADERS on an even stream": (ErrorCode.PROTOCOL_ERROR, lambda w: [w.headers(2)]),
    "HEADERS on a stream below the last": (ErrorCode.STREAM_CLOSED, lambda w: [w.headers(5), w.headers(3)]),
    "HEADERS on a stream that the peer reset": (
        ErrorCode.STREAM_CLOSED,
        lambda w: [w.headers(1), encode_rst_stream(1, 8), w.headers(1)],
    ),
    "HEADERS too short for priority": (
        ErrorCode.FRAME_SIZE_ERROR,
        lambda w: [encode_frame(HEADERS, FLAG_PRIORITY | FLAG_END_HEADERS, 1, b"1234")],
    ),
    "HEADERS that do not decode": (
        ErrorCode.COMPRESSION_ERROR,
        lambda w: [encode_frame(HEADERS, FLAG_END_HEADERS, 1, b"\xbf")],
    ),
    "CONTINUATION without HEADERS": (ErrorCode.PROTOCOL_ERROR, lambda w: [encode_frame(CONTINUATION, 4, 1)]),
    "a block interrupted by DATA": (
        ErrorCode.PROTOCOL_ERROR,
        lambda w: [w.headers(1, end=False), encode_frame(HEADERS, 0, 3), w.data(1, b"x")],
    ),
    "a block interrupted by an unknown frame": (
        ErrorCode.PROTOCOL_ERROR,
        lambda w: [encode_frame(HEADERS, 0, 1), encode_frame(0x77, 0, 0)],
    ),
    "a block continued on another stream": (
        ErrorCode.PROTOCOL_ERROR,
        lambda w: [encode_frame(HEADERS, 0, 1), encode_frame(CONTINUATION, 4, 3)],
    ),
    "PRIORITY on stream 0": (ErrorCode.PROTOCOL_ERROR, lambda w: [encode_frame(PRIORITY, 0, 0, bytes(5))]),
    "PRIORITY of 4 bytes": (ErrorCode.FRAME_SIZE_ERROR, lambda w: [encode_frame(PRIORITY, 0, 1, bytes(4))]),
    "RST_STREAM on stream 0": (ErrorCode.PROTOCOL_ERROR, lambda w: [encode_rst_stream(0, 0)]),
    "RST_STREAM on an idle stream": (ErrorCode.PROTOCOL_ERROR, lambda w: [encode_rst_stream(1, 0)]),
    "RST_STREAM of 3 bytes": (
        ErrorCode.FRAME_SIZE_ERROR,
        lambda w: [w.headers(1), encode_frame(RST_STREAM, 0, 1, bytes(3))],
    ),
    "SETTINGS on a stream": (ErrorCode.PROTOCOL_ERROR, lambda w: [encode_frame(SETTINGS, 0, 1)]),
    "SETTINGS of 5 bytes": (ErrorCode.FRAME_SIZE_ERROR, lambda w: [encode_frame(SETTINGS, 0, 0, bytes(5))]),
    "SETTINGS ACK with a payload": (
        ErrorCode.FRAME_SIZE_ERROR,
        lambda w: [encode_frame(SETTINGS, FLAG_ACK, 0, bytes(6))],
    ),
    "SETTINGS too large": (ErrorCode.ENHANCE_YOUR_CALM, lambda w: [encode_frame(SETTINGS, 0, 0, bytes(16_386))]),
    "ENABLE_PUSH 2": (ErrorCode.PROTOCOL_ERROR, lambda w: [encode_settings([(Setting.ENABLE_PUSH, 2)])]),
    "MAX_FRAME_SIZE too small": (ErrorCode.PROTOCOL_ERROR, lambda w: [encode_settings([(5, 16_383)])]),
    "MAX_FRAME_SIZE too large": (ErrorCode.PROTOCOL_ERROR, lambda w: [encode_settings([(5, 1 << 24)])]),
    "INITIAL_WINDOW_SIZE too large": (ErrorCode.FLOW_CONTROL_ERROR, lambda w: [encode_settings([(4, 1 << 31)])]),
    "INITIAL_WINDOW_SIZE that overflows a stream": (
        ErrorCode.FLOW_CONTROL_ERROR,
        lambda w: [w.headers(1), encode_window_update(1, 1 << 30), encode_settings([(4, WINDOW_LIMIT)])],
    ),
    "PUSH_PROMISE": (ErrorCode.PROTOCOL_ERROR, lambda w: [w.headers(1), encode_frame(PUSH_PROMISE, 4, 1, bytes(5))]),
    "PING on a stream": (ErrorCode.PROTOCOL_ERROR, lambda w: [encode_frame(PING, 0, 1, bytes(8))]),
    "PING of 7 bytes": (ErrorCode.FRAME_SIZE_ERROR, lambda w: [encode_frame(PING, 0, 0, bytes(7))]),
    "GOAWAY on a stream": (ErrorCode.PROTOCOL_ERROR, lambda w: [encode_frame(GOAWAY, 0, 1, bytes(8))]),
    "GOAWAY of 7 bytes": (ErrorCode.FRAME_SIZE_ERROR, lambda w: [encode_frame(GOAWAY, 0, 0, bytes(7))]),
    "WINDOW_UPDATE on an idle stream": (ErrorCode.PROTOCOL_ERROR, lambda w: [encode_window_update(1, 1)]),
    "WINDOW_UPDATE of 0": (ErrorCode.PROTOCOL_ERROR, lambda w: [encode_window_update(0, 0)]),
    "WINDOW_UPDATE of 5 bytes": (ErrorCode.FRAME_SIZE_ERROR, lambda w: [encode_frame(WINDOW_UPDATE, 0, 0, bytes(5))]),
    "WINDOW_UPDATE that overflows": (ErrorCode.FLOW_CONTROL_ERROR, lambda w: [encode_window_update(0, WINDOW_LIMIT)]),
    "a frame larger than ours may be": (
        ErrorCode.FRAME_SIZE_ERROR,
        lambda w: [b"\x10\x00\x01\x42\x00\x00\x00\x00\x00"],
    ),
    "DATA larger than a frame may be": (
        ErrorCode.FRAME_SIZE_ERROR,
        lambda w: [w.headers(1, POST, end=False), w.data(1, bytes(1_048_577))],
    ),
}


@pytest.mark.parametrize("case", CONNECTION_ERRORS)
def test_connection_errors(case: str) -> None:
    code, make = CONNECTION_ERRORS[case]
    wire = Wire()
    assert_connection_error(wire, code, *make(wire))


def test_goaway_names_the_last_stream() -> None:
    wire = Wire()
    wire.open(7)
    assert_connection_error(wire, ErrorCode.PROTOCOL_ERROR, encode_window_update(0, 0), last=7)


def test_connection_window_exceeded() -> None:
    limits = H2Limits(connection_window=100_000)
    wire = Wire(lambda request, port: Sink(request, port, consume=False), limits=limits)
    wire.open(1)
    wire.feed(wire.data(1, bytes(100_000)))
    assert_connection_error(wire, ErrorCode.FLOW_CONTROL_ERROR, wire.data(1, b"x"))


# --- stream errors -------------------------------------------------------------------------------------------------

STREAM_ERRORS: dict[str, tuple[ErrorCode, Frames]] = {
    "DATA after END_STREAM": (ErrorCode.STREAM_CLOSED, lambda w: [w.data(1, b"", end=True), w.data(1, b"x")]),
    "HEADERS after END_STREAM": (ErrorCode.STREAM_CLOSED, lambda w: [w.data(1, b"", end=True), w.headers(1)]),
    "more DATA than the stream window": (
        ErrorCode.FLOW_CONTROL_ERROR,
        lambda w: [w.data(1, bytes(1_000_000)), w.data(1, bytes(48_577))],
    ),
    "trailers without END_STREAM": (ErrorCode.PROTOCOL_ERROR, lambda w: [w.headers(1, [(b"x", b"y")], end=False)]),
    "trailers with a pseudo header": (ErrorCode.PROTOCOL_ERROR, lambda w: [w.headers(1, [(b":path", b"/")])]),
    "WINDOW_UPDATE of 0": (ErrorCode.PROTOCOL_ERROR, lambda w: [encode_window_update(1, 0)]),
    "WINDOW_UPDATE that overflows": (ErrorCode.FLOW_CONTROL_ERROR, lambda w: [encode_window_update(1, WINDOW_LIMIT)]),
    "PRIORITY on itself": (ErrorCode.PROTOCOL_ERROR, lambda w: [encode_frame(PRIORITY, 0, 1, b"\0\0\0\1\0")]),
}


@pytest.mark.parametrize("case", STREAM_ERRORS)
def test_stream_errors(case: str) -> None:
    code, make = STREAM_ERRORS[case]
    wire = Wire(lambda request, port: Sink(request, port, consume=False))
    sink = wire.open(1)
    other = wire.open(3)
    wire.feed(*make(wire))
    assert wire.take() == [(RST_STREAM, 0, 1, struct.pack(">I", code))]
    assert sink.calls[-1] == "reset"
    assert isinstance(sink.error, ProtocolError)
    assert code.name in str(sink.error)
    assert other.calls == []
    # What is still in flight for the stream is dropped without an answer.
    wire.feed(
        wire.data(1, b"late"), wire.headers(1, [(b"t", b"1")]), encode_window_update(1, 5), encode_rst_stream(1, 0)
    )
    assert wire.take() == []
    wire.feed(wire.data(3, b"x", end=True))
    assert other.calls == ["eof"]


CONTENT_LENGTHS: dict[str, tuple[bytes, list[tuple[bytes, bool]]]] = {
    "more": (b"3", [(b"ab", False), (b"cd", False)]),
    "less": (b"3", [(b"ab", True)]),
    "nothing": (b"3", [(b"", True)]),
    "more than none": (b"0", [(b"a", False)]),
}


@pytest.mark.parametrize("case", CONTENT_LENGTHS)
def test_payload_that_contradicts_content_length(case: str) -> None:
    length, payload = CONTENT_LENGTHS[case]
    wire = Wire()
    sink = wire.open(1, [*POST, (b"content-length", length)])
    for data, end in payload:
        wire.feed(wire.data(1, data, end=end))
    assert wire.take() == [(RST_STREAM, 0, 1, struct.pack(">I", ErrorCode.PROTOCOL_ERROR))]
    assert sink.calls == ["reset"]


def test_trailers_that_contradict_content_length() -> None:
    wire = Wire()
    sink = wire.open(1, [*POST, (b"content-length", b"3")])
    wire.feed(wire.headers(1, [(b"x", b"y")]))
    assert wire.take() == [(RST_STREAM, 0, 1, struct.pack(">I", ErrorCode.PROTOCOL_ERROR))]
    assert sink.calls == ["reset"]


def test_data_on_a_closed_stream_gets_one_answer_and_its_credit_back() -> None:
    wire = Wire()
    sink = wire.open(1, end=True)
    sink.port.respond(204, [])
    assert wire.engine.open_streams == 0
    wire.take()
    for _ in range(10):
        wire.feed(wire.data(1, bytes(1_000_000)))
    frames = wire.take()
    assert frames[0] == (RST_STREAM, 0, 1, struct.pack(">I", ErrorCode.STREAM_CLOSED))
    assert [frame[0] for frame in frames[1:]] == [WINDOW_UPDATE]
    assert frames[1][2] == 0


# --- limits --------------------------------------------------------------------------------------------------------


def test_too_many_streams_are_refused() -> None:
    wire = Wire(limits=H2Limits(max_concurrent_streams=2))
    wire.open(1)
    wire.open(3)
    wire.feed(wire.headers(5, [*POST, (b"x-new", b"entry")], end=False), wire.data(5, b"x"))
    assert wire.take() == [(RST_STREAM, 0, 5, struct.pack(">I", ErrorCode.REFUSED_STREAM))]
    assert len(wire.sinks) == 2
    wire.sinks[0].port.reset(ResetCode.CANCELLED)
    # The refused block still went through the header table.
    assert (b"x-new", b"entry") in wire.open(7, [*POST, (b"x-new", b"entry")]).request.headers


def test_no_new_streams_after_close() -> None:
    wire = Wire()
    sink = wire.open(1)
    wire.engine.close()
    wire.feed(wire.headers(3))
    assert wire.take() == [(RST_STREAM, 0, 3, struct.pack(">I", ErrorCode.REFUSED_STREAM))]
    wire.feed(wire.data(1, b"x", end=True))
    assert sink.calls == ["eof"]


def assert_flood(limits: H2Limits, flood: Callable[[Wire, int], bytes], allowed: int) -> None:
    """`allowed` frames in a window pass, again in the next window, and one more ends the connection."""
    wire = Wire(limits=limits)
    number = 0
    for _ in range(2):
        for _ in range(allowed):
            wire.feed(flood(wire, number))
            number += 1
        wire.now += limits.window
    wire.take()
    for _ in range(allowed):
        wire.feed(flood(wire, number))
        number += 1
    assert_connection_error(wire, ErrorCode.ENHANCE_YOUR_CALM, flood(wire, number))


def test_ping_flood() -> None:
    limits = H2Limits(max_pings=5)
    assert_flood(limits, lambda w, n: encode_frame(PING, 0, 0, bytes(8)), 5)
    assert_flood(limits, lambda w, n: encode_frame(PING, FLAG_ACK, 0, bytes(8)), 5)


def test_settings_flood() -> None:
    wire = Wire(limits=H2Limits(max_settings=5))
    wire.feed(encode_settings([]) * 4)  # the first came with the handshake
    wire.now += 10
    wire.feed(encode_settings([]) * 5)
    assert len(wire.take()) == 9
    assert_connection_error(wire, ErrorCode.ENHANCE_YOUR_CALM, encode_settings([]))


def test_priority_and_unknown_frame_flood() -> None:
    limits = H2Limits(max_ignored_frames=5)
    assert_flood(limits, lambda w, n: encode_frame(PRIORITY, 0, 1, struct.pack(">IB", 3, 1)), 5)
    assert_flood(limits, lambda w, n: encode_frame(0x99, 0, 1), 5)
    assert_flood(limits, lambda w, n: encode_goaway(0, 0), 5)


def test_empty_data_flood() -> None:
    for padding in (b"", b"\x00"):

        def flood(wire: Wire, number: int, padding: bytes = padding) -> bytes:
            frame = encode_frame(DATA, FLAG_PADDED if padding else 0, 1, padding)
            return frame if number else wire.headers(1, end=False) + frame

        assert_flood(H2Limits(max_empty_frames=5), flood, 5)


def test_rapid_reset() -> None:
    def flood(wire: Wire, number: int) -> bytes:
        return wire.headers(2 * number + 1) + encode_rst_stream(2 * number + 1, ErrorCode.CANCEL)

    assert_flood(H2Limits(max_resets=5), flood, 5)


def test_making_us_reset_is_the_same_flood() -> None:
    limits = H2Limits(max_resets=5)
    assert_flood(limits, lambda w, n: w.headers(2 * n + 1) + encode_window_update(2 * n + 1, 0), 5)
    assert_flood(limits, lambda w, n: w.headers(2 * n + 1, [(b":method", b"GET")]), 5)
    assert_flood(limits, lambda w, n: w.headers(2 * n + 1, [*GET, (b"connection", b"x")]), 5)


def test_a_reset_after_the_response_is_no_flood() -> None:
    class Answer(Sink):
        def on_eof(self) -> None:
            super().on_eof()
            self.port.respond(204, [])

    wire = Wire(Answer, limits=H2Limits(max_resets=5))
    for number in range(20):
        wire.feed(wire.headers(2 * number + 1), encode_rst_stream(2 * number + 1, ErrorCode.CANCEL))
    assert [frame[0] for frame in wire.take()] == [HEADERS] * 20


def test_too_many_continuations() -> None:
    wire = Wire(limits=H2Limits(max_continuations=3))
    wire.feed(encode_frame(HEADERS, 0, 1), *[encode_frame(CONTINUATION, 0, 1)] * 3)
    assert_connection_error(wire, ErrorCode.ENHANCE_YOUR_CALM, encode_frame(CONTINUATION, 4, 1))


def test_header_block_too_large() -> None:
    wire = Wire(limits=H2Limits(max_header_block=1_000))
    wire.feed(encode_frame(HEADERS, 0, 1, bytes(600)))
    assert_connection_error(wire, ErrorCode.ENHANCE_YOUR_CALM, encode_frame(CONTINUATION, 0, 1, bytes(401)))
    wire = Wire(limits=H2Limits(max_header_block=1_000))
    assert_connection_error(wire, ErrorCode.ENHANCE_YOUR_CALM, encode_frame(HEADERS, 4, 1, bytes(1_001)))


def test_header_list_too_large_is_answered_431() -> None:
    wire = Wire(limits=H2Limits(max_header_list_size=1_000))
    large = [*POST, (b"x-large", b"v" * 900)]
    wire.feed(wire.headers(1, large, end=False))
    frames = wire.take()
    assert [frame[:3] for frame in frames] == [(HEADERS, 5, 1), (RST_STREAM, 0, 1)]
    assert frames[1][3] == struct.pack(">I", ErrorCode.NO_ERROR)
    assert dict(wire.heads(frames)[0])[b":status"] == b"431"
    assert wire.sinks == []
    assert wire.malformed
    # A list that is blown up by references to the table counts in full.
    wire.feed(encode_frame(HEADERS, 5, 3, b"\xbe" * 900))
    assert dict(wire.heads(wire.take())[0])[b":status"] == b"431"
    assert wire.engine.open_streams == 0


def test_a_large_header_list_is_accepted() -> None:
    wire = Wire()
    fields = [*GET, *((b"x-%d" % number, b"v" * 1_000) for number in range(900))]
    block = b"".join(hpack_literal(name, value) for name, value in fields)
    wire.feed(encode_frame(HEADERS, 1, 1, block[:16_384]))
    parts = [block[start : start + 16_384] for start in range(16_384, len(block), 16_384)]
    for part in parts:
        wire.feed(encode_frame(CONTINUATION, FLAG_END_HEADERS if part is parts[-1] else 0, 1, part))
    assert len(wire.sinks[0].request.headers) == 900


def test_resets_are_remembered_to_a_limit() -> None:
    wire = Wire()
    for number in range(1_500):
        wire.open(2 * number + 1).port.reset(ResetCode.CANCELLED)
    assert len(wire.engine.resets_sent) == 1_000


def test_default_limits_are_consistent() -> None:
    limits = DEFAULT_LIMITS
    assert limits.stream_low_water < limits.stream_high_water < limits.queue_high_water
    assert limits.stream_window <= limits.connection_window <= WINDOW_LIMIT
    assert limits.max_continuations * 16_384 >= limits.max_header_block


# --- the same bytes cut anywhere -----------------------------------------------------------------------------------


def session_bytes() -> bytes:
    wire = Wire()
    rng = random.Random(1)
    block = wire.encoder.encode([*POST, (b"x-a", b"b" * 300)])
    return b"".join(
        [
            PREFACE,
            encode_settings([(Setting.INITIAL_WINDOW_SIZE, 100_000), (Setting.MAX_FRAME_SIZE, 20_000)]),
            encode_frame(HEADERS, 0, 1, block[:7]),
            encode_frame(CONTINUATION, 0, 1, block[7:50]),
            encode_frame(CONTINUATION, FLAG_END_HEADERS, 1, block[50:]),
            wire.headers(3, [*POST, (b"content-length", b"40000")], end=False),
            wire.data(1, b"hello"),
            wire.data(3, rng.randbytes(30_000)),
            encode_frame(PING, 0, 0, b"pingpong"),
            encode_frame(DATA, FLAG_PADDED, 1, b"\x0a" + b"padded" + bytes(10)),
            encode_frame(0x66, 3, 1, rng.randbytes(300)),
            encode_window_update(0, 1_000_000),
            wire.headers(5),
            wire.data(3, rng.randbytes(10_000), end=True),
            encode_rst_stream(5, ErrorCode.CANCEL),
            wire.headers(7, [*GET, (b"connection", b"close")]),
            wire.headers(9, [(b":method", b"GET")]),
            wire.headers(1, [(b"trailer-field", b"x")]),
            wire.headers(11, POST, end=False),
            encode_frame(DATA, FLAG_PADDED | FLAG_END_STREAM, 11, b"\xff" + rng.randbytes(20_000) + bytes(255)),
            encode_goaway(0, 0, b"bye"),
            encode_frame(PUSH_PROMISE, 4, 11, bytes(5)),
        ]
    )


def test_same_bytes_cut_anywhere_give_the_same_calls() -> None:
    data = session_bytes()
    whole = run_session([data])
    log, frames, failure = whole
    assert "PUSH_PROMISE" in failure
    assert frames[-1][0] == GOAWAY
    assert [entry[1] for entry in log].count("open") == 4
    assert run_session([bytes((byte,)) for byte in data]) == whole
    assert run_session([memoryview(data)]) == whole
    assert run_session([bytearray(data)]) == whole
    rng = random.Random(2)
    for _ in range(60):
        cuts = sorted(rng.sample(range(1, len(data)), rng.choice([1, 5, 50, 500])))
        pieces: list[Buffer] = [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        if rng.random() < 0.5:
            pieces = [memoryview(piece) for piece in pieces]
        assert run_session(pieces) == whole


def test_small_frames_are_not_split_by_cuts() -> None:
    wire = Wire()
    sink = wire.open(1)
    data = wire.data(1, bytes(200)) * 50
    for start in range(0, len(data), 33):
        wire.feed(data[start : start + 33])
    assert sink.chunks == [200] * 50


def test_large_frames_are_passed_on_as_they_arrive() -> None:
    wire = Wire()
    sink = wire.open(1)
    data = wire.data(1, bytes(500_000), end=True)
    for start in range(0, len(data), 50_000):
        wire.feed(data[start : start + 50_000])
        assert len(wire.engine._rest) < 10
    assert len(sink.data) == 500_000
    assert max(sink.chunks) <= 50_000
    assert sink.calls == ["eof"]


def test_a_stream_that_ends_within_a_large_frame_leaves_the_rest_alone() -> None:
    wire = Wire()
    sink = wire.open(1)
    other = wire.open(3)
    frame = wire.data(1, bytes(100_000), end=True)
    wire.feed(frame[:50_000])
    sink.port.reset(ResetCode.FAILED)
    wire.feed(frame[50_000:] + wire.data(3, b"abc", end=True))
    assert len(sink.data) < 50_000
    assert sink.calls == []
    assert other.data == b"abc"
    assert other.calls == ["eof"]


def test_frames_of_one_read_are_all_handled_and_answered_in_one_buffer() -> None:
    class Echo(Sink):
        def on_data(self, data: Buffer) -> None:
            super().on_data(data)
            self.port.write(data)

    def make(request: Request, port: StreamPort) -> Sink:
        port.respond(200, [])
        return Echo(request, port)

    wire = Wire(make)
    for stream_id in range(1, 101, 2):
        wire.open(stream_id)
    wire.take()
    wakes = wire.wakes
    wire.feed(*[wire.data(stream_id, b"m%d" % stream_id) for stream_id in range(1, 101, 2)])
    assert wire.wakes == wakes + 1
    frames = split_frames(wire.engine.data_to_send())
    assert frames == [(DATA, 0, stream_id, b"m%d" % stream_id) for stream_id in range(1, 101, 2)]
    assert wire.engine.data_to_send() == b""
