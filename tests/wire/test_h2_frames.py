"""Frame layouts: golden bytes, round trips through `hyperframe`, and nothing but WireError for bad ones."""

from __future__ import annotations

from collections.abc import Callable

import hyperframe.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.errors import WireError
from connector.wire import h2_frames
from connector.wire.h2_frames import ErrorCode, Setting

words = st.integers(0, 2**31 - 1)
codes = st.integers(0, 2**32 - 1)


def parse(data: bytes) -> hyperframe.frame.Frame:
    frame, length = hyperframe.frame.Frame.parse_frame_header(memoryview(data[:9]))
    assert len(data) == 9 + length
    frame.parse_body(memoryview(data[9:]))
    return frame


def test_golden_bytes() -> None:
    assert h2_frames.SETTINGS_ACK.hex() == "000000040100000000"
    assert (
        h2_frames.encode_settings([(Setting.INITIAL_WINDOW_SIZE, 1_048_576)]).hex() == "000006040000000000000400100000"
    )
    assert h2_frames.encode_window_update(0, 983_041).hex() == "000004080000000000000f0001"
    assert h2_frames.encode_rst_stream(5, ErrorCode.INTERNAL_ERROR).hex() == "00000403000000000500000002"
    assert h2_frames.encode_goaway(7, 1, b"x").hex() == "0000090700000000000000000700000001" + "78"
    assert h2_frames.encode_ping_ack(b"12345678").hex() == "00000806010000000031323334353637" + "38"


@given(words, st.integers(1, 2**31 - 1), codes, st.binary(max_size=50))
def test_frames_are_read_by_hyperframe(stream_id: int, increment: int, code: int, debug: bytes) -> None:
    update = parse(h2_frames.encode_window_update(stream_id, increment))
    assert (update.stream_id, update.window_increment) == (stream_id, increment)
    goaway = parse(h2_frames.encode_goaway(stream_id, code, debug))
    assert (goaway.last_stream_id, goaway.error_code, goaway.additional_data) == (stream_id, code, debug)
    reset = parse(h2_frames.encode_rst_stream(stream_id or 1, code))
    assert (reset.stream_id, reset.error_code) == (stream_id or 1, code)


@given(st.dictionaries(st.integers(0, 0xFFFF), codes, max_size=20))
def test_settings_round_trip(settings: dict[int, int]) -> None:
    frame = h2_frames.encode_settings(list(settings.items()))
    assert parse(frame).settings == settings
    assert h2_frames.decode_settings(frame[9:]) == list(settings.items())


@given(words, codes, st.binary(max_size=50))
def test_goaway_round_trip(last: int, code: int, debug: bytes) -> None:
    assert h2_frames.decode_goaway(h2_frames.encode_goaway(last, code, debug)[9:]) == (last, code, debug)


@pytest.mark.parametrize(
    ("payload", "content"), [(b"\x00abc", b"abc"), (b"\x03abc\0\0\0", b"abc"), (b"\x03\0\0\0", b""), (b"\x00", b"")]
)
def test_padding_is_stripped(payload: bytes, content: bytes) -> None:
    assert h2_frames.strip_padding(payload) == content


@pytest.mark.parametrize("payload", [b"", b"\x01", b"\x04abc"])
def test_padding_that_is_longer_than_its_frame(payload: bytes) -> None:
    with pytest.raises(WireError):
        h2_frames.strip_padding(payload)


@pytest.mark.parametrize("decode", [h2_frames.decode_word, h2_frames.decode_settings, h2_frames.decode_goaway])
@given(data=st.binary(max_size=20))
def test_bad_payloads_are_wire_errors(decode: Callable[[bytes], object], data: bytes) -> None:
    try:
        decode(data)
    except WireError:
        pass


def test_error_names() -> None:
    assert h2_frames.error_name(11) == "ENHANCE_YOUR_CALM"
    assert h2_frames.error_name(0x1234) == "0x1234"
