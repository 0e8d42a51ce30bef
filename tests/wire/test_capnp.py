"""Stream framing: whole vectors, every cut, every limit."""

from __future__ import annotations

import random
import struct

import pytest

from connector.errors import WireError
from connector.wire.capnp import (
    MAX_MESSAGE,
    MAX_SEGMENTS,
    MessageCounter,
    MessageSplitter,
    frame_message,
    message_length,
    repair_exception,
    table_length,
)
from tests.support.vectors import load, vector

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


def test_splitter_gives_whole_messages_at_every_cut() -> None:
    stream = b"".join(RPC)
    for size in (1, 7, 8, 100, len(stream)):
        splitter = MessageSplitter(1_000)
        found = [m for at in range(0, len(stream), size) for m in splitter.feed(memoryview(stream)[at : at + size])]
        assert found == RPC
        assert splitter.held == 0
    splitter = MessageSplitter(1_000)
    assert splitter.feed(RPC[0][:20]) == []
    assert splitter.held == 20
    with pytest.raises(WireError, match="more than 40"):
        MessageSplitter(40).feed(RPC[0])


def changed(name: str, **bytes_at: int) -> bytearray:
    data = bytearray(vector(name))
    for at, byte in bytes_at.items():
        data[int(at[1:], 16)] = byte
    return data


def test_repair_of_texts_and_types() -> None:
    data = changed("rpc_return_exception", x50=0xFF, x52=0xC3)
    assert repair_exception(data)
    assert data == changed("rpc_return_exception", x50=0x3F, x52=0x3F)
    data = changed("rpc_abort_shutdown", x40=0x80)
    assert repair_exception(data)
    assert data == changed("rpc_abort_shutdown", x40=0x3F)
    data = changed("rpc_return_exception", x3d=1)
    assert repair_exception(data)
    assert data == vector("rpc_return_exception")
    data = changed("rpc_return_exception", x50=0xC3, x51=0xA9)  # is UTF-8
    assert not repair_exception(data)


def test_repair_follows_far_pointers() -> None:
    """The same exception with its text in a second segment, behind a landing pad of one word and of two."""
    text = b"bo\xffm\0\0\0\0"
    message = struct.pack("<QHHHHHHHHQQQ", 0x0001000100000000, 1, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0)
    # Root pointer; Message {tag abort}; pointer to Exception; Exception {type; reason far; trace null}.
    far = struct.pack("<II", 0 << 3 | 2, 1)
    single = message[:32] + far + bytes(8)
    pad = struct.pack("<II", 0 << 2 | 1, 5 << 3 | 2)
    data = bytearray(struct.pack("<IIII", 1, len(single) // 8, 2, 0) + single + pad + text)
    assert message_length(data) == len(data)
    assert repair_exception(data)
    assert b"bo?m" in data
    double = single[:32] + struct.pack("<II", 0 << 3 | 6, 1) + bytes(8)
    pads = struct.pack("<IIII", 2 << 3 | 2, 1, 0 << 2 | 1, 5 << 3 | 2)
    data = bytearray(struct.pack("<IIII", 1, len(double) // 8, 3, 0) + double + pads + text)
    assert repair_exception(data)
    assert b"bo?m" in data


def test_repair_leaves_everything_else_alone() -> None:
    for data in RPC:
        copy = bytearray(data)
        assert not repair_exception(copy)
        assert copy == data
    for message in (bytes(8), bytes(16), b"\0\0\0\0\1\0\0\0" + b"\xff" * 8):
        assert not repair_exception(bytearray(message))
