"""WebSocket frames: RFC 6455's examples, any pieces, and the limits."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.errors import WireError
from connector.wire.websocket import (
    BINARY,
    CLOSE,
    PING,
    TEXT,
    Frame,
    FrameSplitter,
    apply_mask,
    decode_close,
    decode_frames,
    encode_frame,
)


def test_the_examples_of_the_rfc() -> None:
    [plain] = decode_frames(bytes.fromhex("810548656c6c6f"))
    assert (plain.opcode, plain.payload, plain.fin, plain.mask) == (TEXT, b"Hello", True, b"")
    [masked] = decode_frames(bytes.fromhex("818537fa213d7f9f4d5158"))
    assert (masked.payload, masked.mask) == (b"Hello", bytes.fromhex("37fa213d"))
    first, second = decode_frames(bytes.fromhex("010348656c80026c6f"))
    assert (first.fin, first.payload, second.opcode, second.payload) == (False, b"Hel", 0, b"lo")
    [ping] = decode_frames(bytes.fromhex("890548656c6c6f"))
    assert ping.opcode == PING
    assert encode_frame(masked) == bytes.fromhex("818537fa213d7f9f4d5158")


frames = st.builds(
    Frame,
    st.sampled_from((0, TEXT, BINARY)),
    st.one_of(st.binary(max_size=40), st.integers(120, 130).map(bytes), st.integers(65_530, 65_540).map(bytes)),
    fin=st.booleans(),
    rsv=st.integers(0, 7),
    mask=st.one_of(st.just(b""), st.binary(min_size=4, max_size=4)),
)


@given(st.lists(frames, max_size=4), st.integers(0, 2**32))
def test_cut_anywhere_the_frames_are_the_same(given_frames: list[Frame], seed: int) -> None:
    stream = b"".join(encode_frame(frame) for frame in given_frames)
    splitter = FrameSplitter(100_000)
    rng = random.Random(seed)
    found: list[Frame] = []
    at = 0
    while at < len(stream):
        step = rng.choice((1, 2, 3, 9, 1_000, 70_000))
        found += splitter.feed(memoryview(stream)[at : at + step])
        at += step
    assert [(f.opcode, f.payload, f.fin, f.rsv, f.mask) for f in found] == [
        (f.opcode, f.payload, f.fin, f.rsv, f.mask) for f in given_frames
    ]
    offset = 0
    for frame in found:
        assert frame.offset == offset
        offset += frame.size
    assert splitter.held == 0


def test_a_long_frame_is_counted_and_its_start_kept() -> None:
    data = encode_frame(Frame(BINARY, b"a" * 5_000, mask=b"\1\2\3\4")) + encode_frame(Frame(PING, b"p"))
    for step in (1, 50, 100_000):
        splitter = FrameSplitter(100)
        found: list[Frame] = []
        for at in range(0, len(data), step):
            found += splitter.feed(data[at : at + step])
        long, ping = found
        assert (long.length, long.payload, ping.payload) == (5_000, b"a" * 100, b"p")


@pytest.mark.parametrize("data", ["8300", "8b00", "097e0100", "897e0100", "827fffffffffffffffff"])
def test_what_no_peer_may_send_is_refused(data: str) -> None:
    with pytest.raises(WireError):
        FrameSplitter().feed(bytes.fromhex(data))


def test_close_payloads() -> None:
    assert decode_close(b"") == (1005, "")
    assert decode_close(b"\x03\xe8bye") == (1000, "bye")
    with pytest.raises(WireError):
        decode_close(b"\x03")
    with pytest.raises(WireError):
        encode_frame(Frame(CLOSE, b"x" * 126))


def test_masks_undo_themselves() -> None:
    for size in range(20):
        data = bytes(range(size))
        assert apply_mask(apply_mask(data, b"\1\2\3\4"), b"\1\2\3\4") == data
        assert apply_mask(data, b"\1\2\3\4") == bytes(byte ^ (1, 2, 3, 4)[at % 4] for at, byte in enumerate(data))


def test_garbage_raises_wire_errors_only() -> None:
    rng = random.Random(1)
    for _ in range(3_000):
        splitter = FrameSplitter(64)
        try:
            for _ in range(4):
                splitter.feed(rng.randbytes(rng.randrange(40)))
        except WireError:
            pass
