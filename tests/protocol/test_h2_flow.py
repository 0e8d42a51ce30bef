"""Flow control: credit comes from consumption alone, and what cannot be sent waits within limits and in turn."""

from __future__ import annotations

import struct

import pytest

from connector.protocol.h2_limits import DEFAULT_LIMITS, H2Limits
from connector.protocol.ports import Request, ResetCode, StreamPort
from connector.wire.h2_frames import (
    DATA,
    FLAG_END_STREAM,
    FLAG_PADDED,
    RST_STREAM,
    SETTINGS_ACK,
    WINDOW_UPDATE,
    Setting,
    encode_frame,
    encode_rst_stream,
    encode_settings,
    encode_window_update,
)
from tests.support.h2_doubles import POST, Frame, Sink, Wire

STREAM_WINDOW = DEFAULT_LIMITS.stream_window
CONNECTION_WINDOW = DEFAULT_LIMITS.connection_window


def slow(request: Request, port: StreamPort) -> Sink:
    """Make a sink that consumes nothing by itself."""
    return Sink(request, port, consume=False)


def answering(request: Request, port: StreamPort) -> Sink:
    port.respond(200, [])
    return Sink(request, port)


def updates(frames: list[Frame]) -> list[tuple[int, int]]:
    """(stream id, increment) of the WINDOW_UPDATEs, which must be all there is."""
    assert all(frame[0] == WINDOW_UPDATE for frame in frames), frames
    return [(frame[2], struct.unpack(">I", frame[3])[0]) for frame in frames]


def payload(frames: list[Frame]) -> list[tuple[int, int]]:
    return [(stream_id, len(data)) for kind, _, stream_id, data in frames if kind == DATA and data]


# --- receiving -----------------------------------------------------------------------------------------------------


def test_a_slow_origin_gets_no_credit_until_it_consumes() -> None:
    wire = Wire(slow)
    sink = wire.open(1)
    wire.feed(wire.data(1, bytes(STREAM_WINDOW)))
    assert len(sink.data) == STREAM_WINDOW
    assert wire.take() == []
    half = STREAM_WINDOW // 2
    sink.port.consumed(half - 1)
    assert wire.take() == []
    sink.port.consumed(1)
    assert updates(wire.take()) == [(1, half)]
    # The credit is worth exactly that much.
    wire.feed(wire.data(1, bytes(half)))
    assert wire.take() == []
    wire.feed(wire.data(1, b"x"))
    assert [frame[0] for frame in wire.take()] == [RST_STREAM]


def test_one_slow_origin_does_not_stall_the_others() -> None:
    wire = Wire(slow)
    stuck = wire.open(1)
    wire.feed(wire.data(1, bytes(STREAM_WINDOW)))
    busy = wire.open(3)
    for _ in range(100):
        wire.feed(wire.data(3, bytes(500_000)))
        busy.port.consumed(500_000)
    assert len(busy.data) == 50_000_000
    given = updates(wire.take())
    assert {stream_id for stream_id, _ in given} == {0, 3}
    assert len(stuck.data) == STREAM_WINDOW


def test_connection_credit_comes_from_consumption_too() -> None:
    wire = Wire(slow)
    sinks = [wire.open(2 * number + 1) for number in range(16)]
    for sink, stream_id in zip(sinks, range(1, 33, 2), strict=True):
        wire.feed(wire.data(stream_id, bytes(STREAM_WINDOW)))
        assert len(sink.data) == STREAM_WINDOW
    assert wire.take() == []
    assert wire.engine.receive_window == 0
    for sink in sinks[:8]:
        sink.port.consumed(STREAM_WINDOW)
    given = updates(wire.take())
    assert (0, CONNECTION_WINDOW // 2) in given
    assert len(given) == 9


def test_credit_is_batched() -> None:
    wire = Wire()
    wire.open(1)
    for _ in range(20_000):
        wire.feed(wire.data(1, bytes(128)))
    frames = updates(wire.take())
    assert len(frames) == 20_000 * 128 // (STREAM_WINDOW // 2)


@pytest.mark.parametrize(
    "how", ["reset by us", "reset by the edge", "both ends", "stop_reading", "sink fails", "fault"]
)
def test_what_a_closed_stream_never_consumed_is_credited_to_the_connection(how: str) -> None:
    wire = Wire(slow)
    for number in range(40):
        stream_id = 2 * number + 1
        sink = wire.open(stream_id)
        wire.feed(wire.data(stream_id, bytes(1_000_000)))
        sink.port.consumed(1_000)
        if how == "reset by us":
            sink.port.reset(ResetCode.FAILED)
        elif how == "reset by the edge":
            wire.feed(encode_rst_stream(stream_id, 8))
        elif how == "both ends":
            wire.feed(wire.data(stream_id, b"", end=True))
            sink.port.respond(204, [])
        elif how == "stop_reading":
            sink.port.stop_reading()
            sink.port.respond(204, [])
        elif how == "sink fails":
            wire.engine.sink_failed(wire.engine.streams[stream_id], ValueError())
        else:
            wire.feed(encode_window_update(stream_id, 0))
        sink.port.consumed(999_000)  # too late to count twice
    assert wire.engine.open_streams == 0
    assert wire.engine.receive_window + wire.engine.owed == CONNECTION_WINDOW


def test_discarded_payload_is_credited_at_once() -> None:
    wire = Wire(slow)
    sink = wire.open(1)
    wire.feed(wire.data(1, bytes(1_000_000)))
    sink.port.stop_reading()
    assert updates(wire.take()) == [(1, 1_000_000)]
    for _ in range(100):
        wire.feed(wire.data(1, bytes(600_000)))
    assert len(sink.data) == 1_000_000
    given = updates(wire.take())
    assert sum(increment for stream_id, increment in given if stream_id == 1) == 60_000_000


def test_padding_is_credited_at_once() -> None:
    wire = Wire(slow)
    wire.open(1)
    frame = encode_frame(DATA, FLAG_PADDED, 1, b"\xff" + b"x" + bytes(255))
    wire.feed(frame * 3_000)
    given = updates(wire.take())
    assert sum(increment for _, increment in given) == 256 * (524_288 // 256)
    stream = wire.engine.streams[1]
    assert STREAM_WINDOW - stream.receive_window - stream.owed == 3_000


def test_no_stream_credit_after_the_edge_has_ended_its_side() -> None:
    wire = Wire(slow)
    sink = wire.open(1)
    wire.feed(wire.data(1, bytes(STREAM_WINDOW), end=True))
    sink.port.consumed(STREAM_WINDOW)
    assert wire.take() == []


def test_consuming_too_much_widens_no_window() -> None:
    wire = Wire(slow)
    sink = wire.open(1)
    wire.feed(wire.data(1, bytes(10)))
    sink.port.consumed(1 << 40)
    assert updates(wire.take()) == [(1, 10), (0, 10)]
    assert wire.engine.receive_window == CONNECTION_WINDOW
    assert wire.engine.streams[1].receive_window == STREAM_WINDOW


# --- sending -------------------------------------------------------------------------------------------------------


def test_the_streams_window_holds_payload_back() -> None:
    wire = Wire(answering, settings=[(Setting.INITIAL_WINDOW_SIZE, 10)])
    sink = wire.open(1)
    wire.take()
    sink.port.write(b"0123456789abcdef")
    sink.port.write(b"ghi")
    sink.port.write_eof()
    assert wire.take() == [(DATA, 0, 1, b"0123456789")]
    assert wire.engine.bytes_queued == 9
    wire.feed(encode_window_update(1, 4))
    assert wire.take() == [(DATA, 0, 1, b"abcd")]
    wire.feed(encode_window_update(1, 100))
    assert wire.take() == [(DATA, FLAG_END_STREAM, 1, b"efghi")]
    assert wire.engine.bytes_queued == 0


def test_a_change_of_initial_window_size_moves_open_windows_even_below_zero() -> None:
    wire = Wire(answering, settings=[(Setting.INITIAL_WINDOW_SIZE, 100)])
    sink = wire.open(1)
    sink.port.write(bytes(90))
    wire.take()
    wire.feed(encode_settings([(Setting.INITIAL_WINDOW_SIZE, 20)]))
    assert wire.engine.streams[1].send_window == -70
    sink.port.write(b"x")
    wire.feed(encode_window_update(1, 70))
    assert payload(wire.take()) == []
    wire.feed(encode_settings([(Setting.INITIAL_WINDOW_SIZE, 21)]))
    assert payload(wire.take()) == [(1, 1)]
    wire.feed(encode_settings([(Setting.INITIAL_WINDOW_SIZE, 21 + 50)]))
    sink.port.write(bytes(60))
    assert payload(wire.take()) == [(1, 50)]


def test_the_peers_frame_size_bounds_ours() -> None:
    wire = Wire(answering, settings=[(Setting.INITIAL_WINDOW_SIZE, 1 << 30)])
    sink = wire.open(1)
    sink.port.write(bytes(40_000))
    assert payload(wire.take()) == [(1, 16_384), (1, 16_384), (1, 7_232)]
    wire.feed(encode_settings([(Setting.MAX_FRAME_SIZE, 20_000)]))
    sink.port.write(bytes(20_001))
    assert payload(wire.take()) == [(1, 20_000), (1, 1)]
    wire.feed(encode_settings([(Setting.MAX_FRAME_SIZE, 1 << 20)]), encode_window_update(0, 1 << 20))
    sink.port.write(bytes(100_000))
    assert payload(wire.take()) == [(1, 65_536), (1, 34_464)]


def test_sinks_pause_at_the_high_and_resume_at_the_low_water_mark() -> None:
    wire = Wire(answering, settings=[(Setting.INITIAL_WINDOW_SIZE, 0)])
    sink = wire.open(1)
    sink.port.write(bytes(65_535))
    assert sink.calls == []
    sink.port.write(b"x")
    assert sink.calls == ["pause"]
    sink.port.write(bytes(1_000))
    wire.feed(encode_window_update(1, 65_536 + 1_000 - 16_385))
    wire.take()
    assert sink.calls == ["pause"]
    wire.feed(encode_window_update(1, 1))
    wire.take()
    assert sink.calls == ["pause", "resume"]


def test_no_resume_after_the_end_was_written() -> None:
    wire = Wire(answering, settings=[(Setting.INITIAL_WINDOW_SIZE, 0)])
    sink = wire.open(1)
    sink.port.write(bytes(100_000))
    sink.port.write_eof()
    wire.feed(encode_window_update(1, 100_000), encode_window_update(0, 100_000))
    frames = wire.take()
    assert frames[-1][1] == FLAG_END_STREAM
    assert sink.calls == ["pause"]


def test_streams_take_turns_when_the_connection_window_opens() -> None:
    wire = Wire(answering, settings=[(Setting.INITIAL_WINDOW_SIZE, 1 << 20)])
    sinks = [wire.open(stream_id) for stream_id in (1, 3, 5)]
    sinks[0].port.write(bytes(65_535))
    wire.take()
    for sink in sinks:
        sink.port.write(bytes(40_000))
    wire.open(7).port.write(b"small")
    assert payload(wire.take()) == []
    wire.feed(encode_window_update(0, 100_000))
    share = 16_384
    turns = [(1, share), (3, share), (5, share), (7, 5), (1, share), (3, share), (5, share)]
    assert payload(wire.take()) == [*turns, (1, 100_000 - 6 * share - 5)]
    wire.feed(encode_window_update(0, 1_000_000))
    sent = payload(wire.take())
    assert sum(size for _, size in sent) == 3 * 40_000 + 5 - 100_000
    assert wire.engine.queued == 0


def test_nobody_jumps_the_queue() -> None:
    wire = Wire(answering, settings=[(Setting.INITIAL_WINDOW_SIZE, 1 << 20)])
    first, second = wire.open(1), wire.open(3)
    first.port.write(bytes(65_535 + 10))
    wire.take()
    wire.feed(encode_window_update(0, 15))
    second.port.write(b"later")
    assert payload(wire.take()) == [(1, 10), (3, 5)]


def test_a_paused_socket_queues_payload_but_not_control_frames() -> None:
    wire = Wire(answering)
    sink = wire.open(1)
    wire.take()
    wire.engine.pause_writing()
    sink.port.write(b"hello")
    sink.port.write_eof()
    wire.feed(encode_settings([]))
    assert wire.take() == [(4, 1, 0, b"")]
    assert wire.engine.bytes_queued == 5
    wakes = wire.wakes
    wire.engine.resume_writing()
    assert wire.wakes == wakes + 1
    assert wire.take() == [(DATA, FLAG_END_STREAM, 1, b"hello")]


def test_all_queues_together_are_bounded() -> None:
    limits = H2Limits(queue_high_water=10_000)
    wire = Wire(answering, limits=limits)
    sinks = [wire.open(2 * number + 1) for number in range(100)]
    wire.take()
    wire.engine.pause_writing()
    for _ in range(1_000):
        for sink in sinks:
            if not sink.paused:
                sink.port.write(bytes(100))
    assert all(sink.paused for sink in sinks)
    assert wire.engine.queued < limits.queue_high_water + 100 * 100
    wire.engine.resume_writing()
    wire.take()
    assert not any(sink.paused for sink in sinks)
    assert wire.engine.queued == 0


def test_the_out_buffer_is_bounded_and_wakes_until_empty() -> None:
    wire = Wire(answering, settings=[(Setting.INITIAL_WINDOW_SIZE, 1 << 30)])
    wire.feed(encode_window_update(0, 1 << 30))
    sinks = [wire.open(2 * number + 1) for number in range(20)]
    for sink in sinks:
        sink.port.write(bytes(300_000))
    assert len(wire.engine.out) <= 1_048_576 + 16_384 + 9
    assert wire.engine.queued
    sizes = []
    while wire.engine.bytes_queued:
        wakes = wire.wakes
        data = wire.engine.data_to_send()
        sizes.append(len(data))
        assert wire.wakes > wakes or not wire.engine.bytes_queued
    assert max(sizes) <= 1_048_576 + 16_384 + 9
    assert len(sizes) > 4


def test_nothing_is_sent_of_a_stream_that_was_reset_while_it_waited() -> None:
    wire = Wire(answering, settings=[(Setting.INITIAL_WINDOW_SIZE, 1 << 20)])
    first, second = wire.open(1), wire.open(3)
    first.port.write(bytes(65_535 + 100))
    second.port.write(b"second")
    wire.take()
    first.port.reset(ResetCode.FAILED)
    wire.feed(encode_rst_stream(3, 8), encode_window_update(0, 1_000))
    assert payload(wire.take()) == []
    assert wire.engine.queued == 0
    assert second.calls == ["reset"]


def test_a_resumed_sink_that_writes_at_once_waits_for_its_turn() -> None:
    class Eager(Sink):
        left = 5

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.left:
                self.left -= 1
                self.port.write(bytes(70_000))

    def make(request: Request, port: StreamPort) -> Sink:
        port.respond(200, [])
        return Eager(request, port)

    wire = Wire(make, settings=[(Setting.INITIAL_WINDOW_SIZE, 1 << 30)])
    sinks = [wire.open(1), wire.open(3)]
    for sink in sinks:
        sink.port.write(bytes(200_000))
    wire.take()
    wire.feed(encode_window_update(0, 1 << 30))
    sent = payload(wire.take())
    assert sum(size for _, size in sent) == 2 * (200_000 + 5 * 70_000) - 65_535
    assert not any(sink.paused for sink in sinks)
    # Both got on together: neither was done before the other had half.
    order = [stream_id for stream_id, _ in sent]
    assert order.index(3) < len(order) // 2


def test_no_wake_without_something_to_send() -> None:
    wire = Wire(answering)
    sink = wire.open(1)
    wire.take()
    wakes = wire.wakes
    wire.feed(SETTINGS_ACK, encode_window_update(0, 5), wire.data(1, b"x"), encode_frame(0x55, 0, 0))
    sink.port.write(b"")
    assert wire.wakes == wakes
    assert wire.engine.data_to_send() == b""
    wire.feed(wire.headers(3, POST, end=False))
    assert wire.wakes == wakes + 1
