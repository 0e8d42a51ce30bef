"""WebSocket messages: both ends agree with each other, with the websockets library, and survive anything."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from connector.wire.ws_messages import (
    BINARY,
    CLOSE,
    INVALID_PAYLOAD,
    NO_STATUS,
    PING,
    PROTOCOL_ERROR,
    TEXT,
    TOO_BIG,
    Message,
    MessageReader,
    WebSocketError,
    accept_value,
    encode_close,
    encode_frame,
)

MASK = b"\x01\x02\x03\x04"


def reader(*, masked: bool = True, limit: int = 1000, deflate: bool = False) -> MessageReader:
    return MessageReader(masked=masked, limit=limit, deflate=deflate)


def test_the_accept_value_of_the_rfc() -> None:
    assert accept_value(b"dGhlIHNhbXBsZSBub25jZQ==") == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


@given(
    st.lists(st.tuples(st.sampled_from([TEXT, BINARY, PING]), st.text(max_size=30)), max_size=5),
    st.booleans(), st.booleans(), st.integers(1, 9),
)  # fmt: skip
def test_what_one_end_sends_the_other_reads(sent: list[tuple[int, str]], client: bool, deflate: bool, cut: int) -> None:
    data = b"".join(
        encode_frame(opcode, text.encode(), mask=MASK if client else b"", compressed=deflate) for opcode, text in sent
    )
    other = reader(masked=client, deflate=deflate)
    got = [message for at in range(0, len(data), cut) for message in other.receive(data[at : at + cut])]
    assert got == [Message(opcode, text.encode()) for opcode, text in sent]


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536])
def test_frames_are_what_another_implementation_writes(size: int) -> None:
    data = bytes(size)
    assert encode_frame(BINARY, data) == Frame(Opcode.BINARY, data).serialize(mask=False)
    assert reader(masked=True, limit=100_000).receive(Frame(Opcode.BINARY, data).serialize(mask=True)) == [
        Message(BINARY, data)
    ]


def test_compressed_messages_of_another_implementation() -> None:
    theirs = PerMessageDeflate(True, True, 15, 15)
    data = b"hello hello hello hello"
    frame = Frame(Opcode.TEXT, data).serialize(mask=True, extensions=[theirs])
    assert reader(deflate=True).receive(frame) == [Message(TEXT, data)]
    stream = StreamReader()
    stream.feed_data(encode_frame(TEXT, data, compressed=True))
    parsing = Frame.parse(stream.read_exact, mask=False, extensions=[theirs])
    with pytest.raises(StopIteration) as done:
        next(parsing)
    assert done.value.value.data == data


def test_fragments_with_a_ping_between() -> None:
    first = bytes((TEXT, 0x80 | 2)) + MASK + bytes((0x01 ^ ord("h"), 0x02 ^ ord("e")))
    ping = encode_frame(PING, b"x", mask=MASK)
    last = bytes((0x80, 0x80 | 1)) + MASK + bytes((0x01 ^ ord("y"),))
    assert reader().receive(first + ping + last) == [Message(PING, b"x"), Message(TEXT, b"hey")]


def test_closes() -> None:
    assert reader().receive(encode_close(4001, "why", mask=MASK)) == [Message(CLOSE, b"why", 4001)]
    assert reader().receive(encode_frame(CLOSE, b"", mask=MASK)) == [Message(CLOSE, b"", NO_STATUS)]
    it = reader()
    assert len(it.receive(encode_close(1000, mask=MASK) + encode_frame(TEXT, b"late", mask=MASK))) == 1
    assert len(encode_close(1000, "é" * 200)) <= 127


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (encode_frame(TEXT, b"x"), PROTOCOL_ERROR),  # not masked
        (encode_frame(TEXT, b"\xff", mask=MASK), INVALID_PAYLOAD),
        (encode_frame(TEXT, bytes(1001), mask=MASK), TOO_BIG),
        (encode_frame(0, b"x", mask=MASK), PROTOCOL_ERROR),
        (encode_frame(3, b"x", mask=MASK), PROTOCOL_ERROR),
        (encode_frame(TEXT, b"x", mask=MASK, compressed=True), PROTOCOL_ERROR),
        (bytes((TEXT, 0x80)) + MASK + encode_frame(TEXT, b"x", mask=MASK), PROTOCOL_ERROR),
        (bytes((PING, 0x80)) + MASK, PROTOCOL_ERROR),
        (bytes((0x80 | PING, 0xFE, 0, 200)) + MASK + bytes(200), PROTOCOL_ERROR),
        (bytes((0xC0 | PING, 0x80)) + MASK, PROTOCOL_ERROR),
        (encode_close(1005, mask=MASK), PROTOCOL_ERROR),
        (encode_frame(CLOSE, b"x", mask=MASK), PROTOCOL_ERROR),
    ],
)  # fmt: skip
def test_what_breaks_the_protocol(data: bytes, code: int) -> None:
    with pytest.raises(WebSocketError) as caught:
        reader().receive(data)
    assert caught.value.code == code


def test_a_bomb_is_refused() -> None:
    packer = zlib.compressobj(wbits=-15)
    bomb = packer.compress(bytes(10_000_000)) + packer.flush(zlib.Z_SYNC_FLUSH)
    frame = bytearray(encode_frame(BINARY, bomb[:-4], mask=MASK))
    frame[0] |= 0x40
    with pytest.raises(WebSocketError) as caught:
        reader(limit=100_000, deflate=True).receive(bytes(frame))
    assert caught.value.code == TOO_BIG


@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_any_bytes_are_messages_or_a_websocket_error(data: bytes, masked: bool, deflate: bool) -> None:
    try:
        reader(masked=masked, deflate=deflate).receive(data)
    except WebSocketError:
        pass
