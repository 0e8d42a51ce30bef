"""OTLP bytes: the hand-kept table is the .proto's, and the bytes are what the public numbers make of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.errors import WireError
from connector.wire.otlp import ERROR, KIND_INTERNAL, MESSAGES, OK, ONE_OF, Span, decode_spans, encode_spans

PROTO = Path(__file__).resolve().parents[2] / "proto" / "otlp_trace.proto"
FIELD = re.compile(r"^\s*(repeated )?(\w+) (\w+) = (\d+);", re.M)
MESSAGE = re.compile(r"^message (\w+) \{\n(.*?)^\}", re.M | re.S)
SPAN = Span(
    trace_id=bytes(range(16)), span_id=b"12345678", parent_id=b"abcdefgh", name="ttfb_origin", start=1, end=2**60,
    attributes=(("upstreamStatusCode", 200), ("req-host", "é"), ("socket-bind-success", True)), status=OK,
)  # fmt: skip


def test_the_table_is_the_protos() -> None:
    text = PROTO.read_text()
    found = {
        name: tuple((field, int(number), kind, bool(repeated)) for repeated, kind, field, number in FIELD.findall(body))
        for name, body in MESSAGE.findall(text)
    }
    assert found == MESSAGES
    assert [name for name, body in MESSAGE.findall(text) if "oneof" in body] == sorted(ONE_OF)


def raw_fields(data: bytes) -> list[tuple[int, int, bytes]]:
    """Cut a protobuf message by hand: number, wire type, payload."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        match key & 7:
            case 0:
                start = at
                varint()
                payload = data[start:at]
            case 1:
                payload, at = data[at : at + 8], at + 8
            case 2:
                size = varint()
                payload, at = data[at : at + size], at + size
            case 5:
                payload, at = data[at : at + 4], at + 4
            case other:
                raise AssertionError(f"wire type {other}")
        found.append((key >> 3, key & 7, payload))
    return found


def test_the_bytes_have_the_public_numbers() -> None:
    data = encode_spans([SPAN, SPAN], [("service.name", "cloudflared")])
    entries = raw_fields(data)
    assert [(number, kind) for number, kind, _ in entries] == [(1, 2), (1, 2)]
    resource, scope, schema = raw_fields(entries[0][2])
    assert (resource[0], scope[0], schema) == (1, 2, (3, 2, b"https://opentelemetry.io/schemas/1.7.0"))
    ((number, _, attribute),) = raw_fields(resource[2])
    assert (number, raw_fields(attribute)[0]) == (1, (1, 2, b"service.name"))
    name, span = raw_fields(scope[2])
    assert (name[0], span[0], raw_fields(name[2])) == (1, 2, [(1, 2, b"origin")])
    fields = raw_fields(span[2])
    assert [(number, kind) for number, kind, _ in fields] == [
        (1, 2), (2, 2), (4, 2), (5, 2), (6, 0), (7, 1), (8, 1), (9, 2), (9, 2), (9, 2), (15, 2), (16, 5),
    ]  # fmt: skip
    payloads = {number: payload for number, _, payload in fields}
    assert payloads[6] == bytes([KIND_INTERNAL])
    assert payloads[8] == (2**60).to_bytes(8, "little")
    assert payloads[16] == (0x301).to_bytes(4, "little")
    assert raw_fields(payloads[15]) == [(3, 0, b"\x01")]


texts = st.text(max_size=20)
spans = st.builds(
    Span,
    trace_id=st.binary(min_size=16, max_size=16),
    span_id=st.binary(min_size=8, max_size=8),
    parent_id=st.one_of(st.just(b""), st.binary(min_size=8, max_size=8)),
    name=texts,
    start=st.integers(0, 2**64 - 1),
    end=st.integers(0, 2**64 - 1),
    attributes=st.lists(
        st.tuples(texts, st.one_of(texts, st.booleans(), st.integers(-(2**63), 2**63 - 1))), max_size=4
    ).map(tuple),
    status=st.just(ERROR),
    message=texts,
    flags=st.integers(0, 2**32 - 1),
)


@given(st.lists(spans, max_size=3))
def test_what_goes_in_comes_out(values: list[Span]) -> None:
    assert decode_spans(encode_spans(values, ())) == values


@given(st.binary(max_size=60))
def test_any_bytes_decode_or_are_a_wire_error(data: bytes) -> None:
    try:
        decode_spans(data)
    except WireError:
        pass


def test_garbage_is_named() -> None:
    with pytest.raises(WireError, match="do not decode"):
        decode_spans(b"\xff\xff")
