"""Stream framing: whole vectors, every cut, every limit."""

from __future__ import annotations

import random
import struct

import pytest

from connector.errors import WireError
from connector.wire.capnp import MAX_MESSAGE, MAX_SEGMENTS, MessageCounter, frame_message, message_length, table_length
from tests.support.vectors import load

RPC = [bytes.fromhex(entry["hex"]) for entry in load("rpc.json")]


@pytest.mark.parametrize("data", RPC)
def test_length_of_every_vector(data: bytes) -> None:
    assert message_length(data) == len(data)
    assert message_length(data + b"\xff" * 9) == len(data)
    for cut in range(8):
        assert message_length(data[:cut]) is None
    for cut in range(8, len(data)):
        assert message_length(memoryview(data)[:cut]) == len(data)


def test_tables() -> None:
    assert [table_length(n) for n in (1, 2, 3, 4)] == [8, 16, 16, 24]
    data = struct.pack("<IIIII", 2, 1, 2, 3, 0)[:16]
    assert message_length(data) == 16 + 48
    assert message_length(data[:12]) is None


def test_limits() -> None:
    with pytest.raises(WireError, match="segments"):
        message_length(struct.pack("<I", MAX_SEGMENTS))
    assert message_length(struct.pack("<I", MAX_SEGMENTS - 1)) is None
    with pytest.raises(WireError, match="segments"):
        message_length(b"HTTP")
    assert message_length(struct.pack("<II", 0, MAX_MESSAGE // 8 - 1)) == MAX_MESSAGE
    with pytest.raises(WireError, match="bytes"):
        message_length(struct.pack("<II", 0, MAX_MESSAGE // 8))
    with pytest.raises(WireError, match="bytes"):
        message_length(struct.pack("<II", 0, 0xFFFFFFFF))
    with pytest.raises(WireError, match="more than 16"):
        message_length(struct.pack("<II", 0, 2), 16)


def test_frame() -> None:
    for data in RPC:
        assert frame_message(data[8:]) == data
    with pytest.raises(WireError, match="whole number"):
        frame_message(b"123")


def test_counter_by_byte_and_by_random_cuts() -> None:
    stream = b"".join(RPC)
    counter = MessageCounter()
    for at in range(len(stream)):
        counter.feed(stream[at : at + 1])
    assert counter.messages == len(RPC)
    assert counter.whole
    rng = random.Random(7)
    for _ in range(50):
        counter = MessageCounter()
        at = 0
        while at < len(stream):
            step = rng.randint(0, 300)
            counter.feed(memoryview(stream)[at : at + step])
            at += step
        assert (counter.messages, counter.whole) == (len(RPC), True)
    counter.feed(b"\0")
    assert not counter.whole


def test_counter_takes_empty_segments_and_refuses_garbage() -> None:
    counter = MessageCounter()
    counter.feed(bytes(16))
    assert (counter.messages, counter.whole) == (2, True)
    with pytest.raises(WireError):
        counter.feed(b"<html><body>")
