"""Untrusted text and bytes: a value or a WireError, nothing else, and in bounded time."""

from __future__ import annotations

import base64
import itertools
import json

from hypothesis import example, given, settings
from hypothesis import strategies as st

from connector.errors import WireError
from connector.wire.capnp import MessageCounter, message_length, repair_exception
from connector.wire.token import Token, decode_credentials, decode_token, encode_token
from tests.support.vectors import all_vectors, vector

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "s", "t", "e", "A", "TunnelID", "x"]) | st.text(max_size=3), inner)
    ),
    max_leaves=8,
)
BOUNDED = settings(max_examples=300, deadline=None)


def decodes_or_wire_error(text: str) -> None:
    for decode in (decode_token, decode_credentials):
        try:
            token = decode(text)
        except WireError:
            continue
        assert isinstance(token, Token)
        assert decode_token(encode_token(token)) == token


@BOUNDED
@given(st.text(max_size=400))
@example("\ud800")
@example("9" * 5000)
def test_any_text(text: str) -> None:
    decodes_or_wire_error(text)


@BOUNDED
@given(st.binary(max_size=300))
@example(b"[" * 5000)
@example(b'{"a":' * 3000)
@example(b"9" * 6000)
@example(b'{"x":-' + b"1" * 6000 + b"}")
@example(b'{"x":1e999999}')
@example(b"\xef\xbb\xbf{}")
def test_any_bytes_in_base64(data: bytes) -> None:
    decodes_or_wire_error(base64.b64encode(data).decode())
    decodes_or_wire_error(data.decode("latin-1"))
    decodes_or_wire_error(data.decode("utf-8", "surrogateescape"))


@BOUNDED
@given(JSON)
def test_any_json(value: object) -> None:
    text = json.dumps(value)
    decodes_or_wire_error(text)
    decodes_or_wire_error(base64.b64encode(text.encode()).decode())


@BOUNDED
@given(st.binary(max_size=600), st.lists(st.integers(0, 600), max_size=6))
def test_any_frames(data: bytes, cuts: list[int]) -> None:
    try:
        length = message_length(data)
    except WireError:
        length = -1
    assert length is None or length == -1 or length >= 8
    outcomes = []
    for at in ([0, len(data)], sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})):
        counter = MessageCounter()
        try:
            for start, end in itertools.pairwise(at):
                counter.feed(data[start:end])
        except WireError:
            outcomes.append((counter.messages, "refused"))
        else:
            outcomes.append((counter.messages, counter.whole))
    assert outcomes[0] == outcomes[-1]


@BOUNDED
@given(
    st.sampled_from(sorted(all_vectors())), st.lists(st.tuples(st.integers(8, 400), st.integers(0, 255)), max_size=8)
)
def test_repair_of_anything(name: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(vector(name) + bytes(8))
    for at, byte in changes:
        data[at % len(data)] = byte
    size = len(data)
    repair_exception(data)
    assert len(data) == size
    assert not repair_exception(data)
