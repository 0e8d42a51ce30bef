"""Frame boundaries, the answer taken out, and a client's frames: whatever the cuts."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.errors import WireError
from connector.wire.ws_stream import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    ClientFrames,
    FrameFollower,
    PongFilter,
    close_frame,
    encode_frame,
    frame_header,
    unmask,
)


def client(opcode: int, payload: bytes, *, fin: bool = True, key: bytes = b"\x11\x22\x33\x44") -> bytes:
    """A masked frame, made without the code under test."""
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 65_536:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    masked = bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))
    return bytes([0x80 * fin | opcode]) + length + key + masked


def cuts(data: bytes, seed: int) -> Iterator[bytes]:
    random_ = random.Random(seed)
    at = 0
    while at < len(data):
        step = random_.choice([1, 1, 2, 3, 5, 8, 130, 5000])
        yield data[at : at + step]
        at += step


FRAMES = st.lists(
    st.tuples(st.sampled_from([TEXT, BINARY, PING, PONG]), st.integers(0, 300)).map(
        lambda pair: (pair[0], min(pair[1], 125) if pair[0] >= CLOSE else pair[1])
    ),
    max_size=12,
)


@given(FRAMES, st.integers(0, 9))
def test_boundaries_are_where_frames_end(frames: list[tuple[int, int]], seed: int) -> None:
    whole = b"".join(encode_frame(opcode, bytes(size)) for opcode, size in frames)
    ends = {0}
    for opcode, size in frames:
        ends.add(max(ends) + len(encode_frame(opcode, bytes(size))))
    follower = FrameFollower(masked=False)
    at = 0
    for piece in cuts(whole, seed):
        follower.follow(piece)
        at += len(piece)
        assert (follower.left == 0) == (at in ends)
        if follower.left > 0:
            assert at + follower.left in ends
    assert follower.left == 0
    assert not follower.closed


@given(FRAMES, st.integers(0, 9))
def test_the_next_boundary_is_found_wherever_the_stream_stands(frames: list[tuple[int, int]], seed: int) -> None:
    whole = b"".join(encode_frame(opcode, bytes(size)) for opcode, size in frames)
    ends = {0}
    for opcode, size in frames:
        ends.add(max(ends) + len(encode_frame(opcode, bytes(size))))
    for stop in range(0, len(whole), 7):
        follower = FrameFollower(masked=False)
        follower.follow(whole[:stop])
        at = stop
        found = -1
        if stop in ends:
            assert follower.boundary(whole[stop:]) == 0
            continue
        for piece in cuts(whole[stop:], seed):
            found = follower.boundary(piece)
            if found >= 0:
                break
            at += len(piece)
        assert at + found == min(end for end in ends if end > stop)
        assert follower.left == 0


def test_a_close_frame_is_noticed_and_nonsense_is_lost_for_ever() -> None:
    follower = FrameFollower(masked=False)
    follower.follow(close_frame(1001, "bye"))
    assert follower.closed
    for nonsense in (
        b"GET / HTTP/1.1\r\n",
        b"\x81\x85masked",
        b"\x83\x00",
        b"\x89\x7e\x00\x80",
        b"\x82\xff" + b"\xff" * 8,
    ):
        follower = FrameFollower(masked=False)
        follower.follow(nonsense)
        assert follower.lost
        follower.follow(encode_frame(BINARY, b"x"))
        assert follower.lost
        assert follower.boundary(encode_frame(BINARY, b"x")) == -1


@pytest.mark.parametrize("seed", range(20))
def test_only_our_own_pong_is_taken_out(seed: int) -> None:
    random_ = random.Random(seed)
    ours = client(PONG, b"token123", key=os.urandom(4))
    others = [
        client(BINARY, random_.randbytes(random_.choice([0, 1, 125, 126, 70_000])), key=random_.randbytes(4))
        for _ in range(4)
    ] + [client(PONG, b"token124"), client(PONG, b""), client(PING, b"token123"), client(TEXT, b"token123")]
    random_.shuffle(others)
    place = random_.randrange(len(others))
    stream = b"".join([*others[:place], ours, *others[place:], ours])
    filter_ = PongFilter()
    filter_.token = b"token123"
    got = b"".join(bytes(filter_.filter(piece)) for piece in cuts(stream, seed)) + filter_.rest()
    assert got == b"".join([*others, ours]), "the first answer goes, a second one is not ours any more"
    assert filter_.token == b""


def test_a_filter_that_waits_for_nothing_passes_everything_untouched() -> None:
    filter_ = PongFilter()
    data = client(PONG, b"token123")
    assert filter_.filter(data) == data
    message = memoryview(client(BINARY, b"hello"))
    assert filter_.filter(message) is message
    assert bytes(filter_.filter(b"no websocket at all")) == b"no websocket at all"
    assert bytes(filter_.filter(data)) == data


def test_a_half_frame_at_the_end_comes_out() -> None:
    filter_ = PongFilter()
    filter_.token = b"token123"
    half = client(PONG, b"token123")[:9]
    assert bytes(filter_.filter(half)) == b""
    assert filter_.rest() == half


@pytest.mark.parametrize("seed", range(10))
def test_a_clients_messages_come_out_piece_by_piece(seed: int) -> None:
    messages = [(BINARY, b""), (TEXT, b"abc"), (BINARY, os.urandom(126)), (BINARY, os.urandom(66_000)), (BINARY, b"z")]
    stream = b""
    for opcode, payload in messages:
        third = len(payload) // 3
        stream += client(opcode, payload[:third], fin=False) + client(PING, b"now")
        stream += client(CONTINUATION, payload[third:], fin=False) + client(CONTINUATION, b"", key=b"\0\0\0\0")
    frames = ClientFrames()
    found: list[tuple[int, bytes]] = []
    pings = 0
    for piece in cuts(stream, seed):
        for opcode, begins, ends, payload in frames.receive(memoryview(piece)):
            if opcode == PING:
                assert (begins, ends, payload) == (True, True, b"now")
                pings += 1
                continue
            if begins:
                current = bytearray()
            current += payload
            if ends:
                found.append((opcode, bytes(current)))
    assert found == messages
    assert pings == len(messages)


@pytest.mark.parametrize(
    "frames",
    [
        b"\x82\x01x",  # not masked
        b"\xc2\x80\0\0\0\0",  # a reserved bit
        b"\x83\x80\0\0\0\0",  # a reserved opcode
        b"\x09\x80\0\0\0\0",  # a fragmented control frame
        b"\x89\xfe\x00\x80",  # a long control frame
        b"\x80\x80\0\0\0\0",  # a continuation of nothing
        b"\x02\x80\0\0\0\0\x82\x80\0\0\0\0",  # a message inside a message
        b"\x82\xff" + b"\xff" * 8 + b"\0\0\0\0",  # longer than anything
    ],
)
def test_what_no_client_may_send_is_an_error(frames: bytes) -> None:
    with pytest.raises(WireError):
        ClientFrames().receive(frames)


@given(st.binary(max_size=400), st.integers(0, 9))
def test_any_bytes_either_read_or_fail_in_words(data: bytes, seed: int) -> None:
    frames, follower, filter_ = ClientFrames(), FrameFollower(masked=True), PongFilter()
    filter_.token = b"token"
    passed = b""
    for piece in cuts(data, seed):
        follower.follow(piece)
        passed += bytes(filter_.filter(piece))
    assert passed + filter_.rest() == data or b"\x8a\x85" in data
    try:
        for piece in cuts(data, seed):
            frames.receive(piece)
    except WireError:
        pass


def test_frames_of_a_server() -> None:
    assert encode_frame(BINARY, b"hi") == b"\x82\x02hi"
    assert encode_frame(BINARY, bytes(126))[:4] == b"\x82\x7e\x00\x7e"
    assert frame_header(BINARY, 65_536) == b"\x82\x7f" + (65_536).to_bytes(8, "big")
    assert frame_header(TEXT, 3, fin=False) == b"\x01\x03"
    assert close_frame(1001, "x") == b"\x88\x03\x03\xe9x"
    assert len(close_frame(1002, "r" * 500)) == 127
    assert unmask(client(BINARY, b"payload")[6:], b"\x11\x22\x33\x44") == b"payload"
    assert unmask(b"", b"abcd") == b""
