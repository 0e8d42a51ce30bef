"""The codec of ConnectRequest and ConnectResponse, against pycapnp and the golden vectors."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connector.errors import WireError
from connector.transport.rpc import load_schema
from connector.wire.connect import (
    MAX_CONNECT,
    MAX_METADATA,
    connect_length,
    decode_connect_request,
    decode_connect_response,
    encode_connect_request,
    encode_connect_response,
)
from tests.support.vectors import vector

PREAMBLE = 8
GET = [(b"HttpMethod", b"GET"), (b"HttpHost", b"example.com"), (b"HttpHeader:Accept", b"*/*")]
OK = [(b"HttpStatus", b"200"), (b"HttpHeader:Content-Type", b"text/plain")]

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
lists = st.lists(st.tuples(texts, texts), max_size=12)


def encoded(pairs: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(key.encode(), value.encode()) for key, value in pairs]


def by_pycapnp(name: str, **fields: Any) -> Any:
    return getattr(load_schema("quic_metadata"), name).new_message(**fields)


def fill(message: Any, pairs: list[tuple[str, str]]) -> None:
    for entry, (key, value) in zip(message.init("metadata", len(pairs)), pairs, strict=True):
        entry.key, entry.val = key, value


def test_golden_request() -> None:
    golden = vector("quic_connect_request_get")[PREAMBLE:]
    assert encode_connect_request(0, b"http://example.com/hi?x=1", GET) == golden
    request = decode_connect_request(golden)
    assert (request.kind, request.dest, list(request.metadata)) == (0, b"http://example.com/hi?x=1", GET)


@pytest.mark.parametrize(
    ("name", "error", "metadata"),
    [
        ("quic_connect_response_200", b"", OK),
        ("quic_connect_response_error", b"boom", []),
        ("quic_connect_response_tcp_ack", b"", []),
    ],
)
def test_golden_responses(name: str, error: bytes, metadata: list[tuple[bytes, bytes]]) -> None:
    golden = vector(name)[PREAMBLE:]
    assert encode_connect_response(error, metadata) == golden
    response = decode_connect_response(golden)
    assert (response.error, list(response.metadata)) == (error, metadata)


@given(st.integers(0, 2), texts, lists)
def test_pycapnp_reads_what_we_write(kind: int, dest: str, pairs: list[tuple[str, str]]) -> None:
    data = encode_connect_request(kind, dest.encode(), encoded(pairs))
    with load_schema("quic_metadata").ConnectRequest.from_bytes(data) as message:
        assert message.type.raw == kind
        assert str(message.dest) == dest
        assert [(str(entry.key), str(entry.val)) for entry in message.metadata] == pairs
    data = encode_connect_response(dest.encode(), encoded(pairs))
    with load_schema("quic_metadata").ConnectResponse.from_bytes(data) as message:
        assert str(message.error) == dest
        assert [(str(entry.key), str(entry.val)) for entry in message.metadata] == pairs


@given(st.sampled_from(["http", "websocket", "tcp"]), texts, lists)
def test_we_read_what_pycapnp_writes(kind: str, dest: str, pairs: list[tuple[str, str]]) -> None:
    message = by_pycapnp("ConnectRequest", dest=dest, type=kind)
    fill(message, pairs)
    request = decode_connect_request(message.to_bytes())
    assert request.kind == ["http", "websocket", "tcp"].index(kind)
    assert request.dest == dest.encode()
    assert list(request.metadata) == encoded(pairs)
    message = by_pycapnp("ConnectResponse", error=dest)
    fill(message, pairs)
    response = decode_connect_response(message.to_bytes())
    assert (response.error, list(response.metadata)) == (dest.encode(), encoded(pairs))


def test_several_segments_and_far_pointers() -> None:
    # pycapnp's first segment is 1024 words: what does not fit goes to another, behind far pointers.
    pairs = [(f"HttpHeader:X-{n}", "v" * 700) for n in range(300)]
    message = by_pycapnp("ConnectRequest", dest="/" + "d" * 9000)
    fill(message, pairs)
    data = message.to_bytes()
    assert struct.unpack_from("<I", data)[0] > 0
    request = decode_connect_request(data)
    assert request.dest == b"/" + b"d" * 9000
    assert list(request.metadata) == encoded(pairs)


def framed(*segments: bytes) -> bytes:
    table = struct.pack(f"<{len(segments) + 1}I", len(segments) - 1, *[len(segment) // 8 for segment in segments])
    return table + b"\0" * (-len(table) % 8) + b"".join(segments)


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def test_double_far_pointer() -> None:
    root = 1 << 32 << 16  # struct with 1 pointer, right behind
    pad = words((0 << 3) | 2 | (2 << 32), 1 | (2 << 32) | (5 << 35))
    message = framed(words(root, (0 << 3) | 4 | 2 | (1 << 32)), pad, b"boom\0\0\0\0")
    assert decode_connect_response(message).error == b"boom"


def test_fields_of_later_versions_are_ignored() -> None:
    # Root with 2 data words and 3 pointers; metadata elements with 1 data word and 3 pointers.
    root = words((2 << 32) | (3 << 48))
    body = words(1, 99, (7 << 2) | 1 | (2 << 32) | (2 << 35), (1 << 2) | 1 | (7 << 32) | (4 << 35), 0)
    body += words((1 << 2) | (1 << 32) | (3 << 48), 77, 0, 0, 0) + b"/\0\0\0\0\0\0\0"
    # dest is the last word: pointer at word 3, text at word 11.
    request = decode_connect_request(framed(root + body))
    assert (request.kind, request.dest, list(request.metadata)) == (1, b"/", [(b"", b"")])


def test_null_root_is_all_defaults() -> None:
    request = decode_connect_request(framed(words(0)))
    assert (request.kind, request.dest, list(request.metadata)) == (0, b"", [])


@pytest.mark.parametrize(
    ("message", "words_of_error"),
    [
        (b"", "not as long"),
        (framed(b""), "empty"),
        (framed(words(1)), "root"),
        (framed(words(2 << 48)), "outside"),
        (framed(words(0xFFFFFFFC | 2 << 48, 0, 0)), "outside|NUL|list|root"),
        (framed(words(2 << 48, 1 | 2 << 32 | 99 << 35, 0)), "outside"),
        (framed(words(2 << 48, 1 | 2 << 32, 0)), "NUL"),
        (framed(words(1 << 48, 1 | 2 << 32 | 3 << 35) + b"abcdefgh"), "NUL"),
        (framed(words(1 << 48, 1 | 3 << 32 | 3 << 35) + b"abcdefgh"), "bytes"),
        (framed(words(1 << 48, 2 | 7 << 32)), "outside"),
        (framed(words(1 << 48, 2 | 1 << 32), words(2 | 1 << 32)), "far"),
        (framed(words(1 << 48, 6 | 1 << 32), words(0, 0)), "far"),
        (framed(words(2 << 48, 0, 1 | 2 << 32)), "structs"),
        (framed(words(2 << 48, 0, 1 | 7 << 32 | 4 << 35)), "outside"),
        (framed(words(2 << 48, 0, 1 | 7 << 32, 9 << 2 | 2 << 48)), "damaged"),
        (framed(words(2 << 48, 0, 1 | 7 << 32, (MAX_METADATA + 1) << 2)), "more than"),
    ],
)
def test_broken_messages(message: bytes, words_of_error: str) -> None:
    with pytest.raises(WireError, match=words_of_error):
        decode_connect_response(message)


def test_shared_texts_do_not_multiply() -> None:
    size = 1024 * 1024
    count = 8
    # Every pointer leads to the same text behind the elements.
    pointers = [(2 * count - at - 1) << 2 | 1 | 2 << 32 | size << 35 for at in range(2 * count)]
    head = words(2 << 48, 0, 1 | 7 << 32 | 2 * count << 35, count << 2 | 2 << 48, *pointers)
    message = framed(head + b"x" * (size - 1) + b"\0")
    with pytest.raises(WireError, match="more than"):
        decode_connect_response(message)


def test_length_as_early_as_known() -> None:
    message = encode_connect_request(0, b"/", GET)
    assert connect_length(message[:3]) is None
    assert connect_length(message[:8]) == len(message)
    with pytest.raises(WireError):
        connect_length(struct.pack("<II", 0, MAX_CONNECT // 8))


@settings(max_examples=50)
@given(st.randoms(use_true_random=False))
def test_damaged_bytes_give_wire_errors_only(rng: random.Random) -> None:
    message = bytearray(vector("quic_connect_request_get")[PREAMBLE:])
    for _ in range(rng.randint(1, 6)):
        message[rng.randrange(len(message))] = rng.randrange(256)
    try:
        decode_connect_request(bytes(message))
    except WireError:
        pass
