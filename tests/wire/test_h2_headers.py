"""The edge protocol's header conventions."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.errors import WireError
from connector.wire import h2_headers
from connector.wire.h2_headers import (
    canonical_name,
    content_length_field,
    decode_serialised_headers,
    encode_serialised_headers,
    is_control_response_header,
    is_field_name,
    is_field_value,
)

EXAMPLE = [(b"Content-Type", b"text/html"), (b"Set-Cookie", b"a=1"), (b"Set-Cookie", b"b=2"), (b"X-Empty", b"")]
EXAMPLE_SERIALISED = b"Q29udGVudC1UeXBl:dGV4dC9odG1s;U2V0LUNvb2tpZQ:YT0x;U2V0LUNvb2tpZQ:Yj0y;WC1FbXB0eQ:"


@pytest.mark.parametrize(
    ("name", "spelled"),
    [
        (b"x-forwarded-for", b"X-Forwarded-For"),
        (b"SEC-WEBSOCKET-KEY", b"Sec-Websocket-Key"),
        (b"etag", b"Etag"),
        (b"X-lower-Case", b"X-Lower-Case"),
        (b"-x--y-", b"-X--Y-"),
        (b"1a-2b", b"1a-2b"),
        (b"", b""),
        (b"not a token", b"not a token"),
        (b"caf\xc3\xa9", b"caf\xc3\xa9"),
    ],
)
def test_canonical_names(name: bytes, spelled: bytes) -> None:
    assert canonical_name(name) == spelled
    assert canonical_name(name) == spelled  # from the cache


def test_example_of_serialised_headers() -> None:
    assert encode_serialised_headers(EXAMPLE) == EXAMPLE_SERIALISED
    assert decode_serialised_headers(EXAMPLE_SERIALISED) == EXAMPLE


def test_names_are_spelled_canonically_in_a_serialised_list() -> None:
    assert encode_serialised_headers([(b"content-type", b"text/html")]) == b"Q29udGVudC1UeXBl:dGV4dC9odG1s"


def test_control_headers_are_left_out_of_a_serialised_list() -> None:
    withheld = [b":status", b"CF-Int-Secret", b"Cf-Cloudflared-X", b"cf-proxy-y", b""]
    assert encode_serialised_headers([(name, b"no") for name in withheld] + EXAMPLE) == EXAMPLE_SERIALISED
    for name in withheld[:-1]:
        assert is_control_response_header(name.lower())
    for kept in (b"sec-websocket-accept", b"connection", b"upgrade", b"cf-ray", b"keep-alive"):
        assert not is_control_response_header(kept)


def test_empty_parts_of_a_serialised_list_are_skipped() -> None:
    assert decode_serialised_headers(b"") == []
    assert decode_serialised_headers(b";;" + EXAMPLE_SERIALISED + b";") == EXAMPLE


@pytest.mark.parametrize("data", [b"YQ", b"YQ:YQ:YQ", b"Y:YQ", b"YQ:!!", b"YQ:Y", b"Y Q:YQ", b"YQ:\xff"])
def test_bad_serialised_lists(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_serialised_headers(data)


def test_padding_in_a_serialised_list_does_no_harm() -> None:
    assert decode_serialised_headers(b"YQ==:YQ") == [(b"a", b"a")]


tokens = st.text(h2_headers.TOKEN_BYTES.decode(), min_size=1, max_size=20).map(str.encode)


@given(st.lists(st.tuples(tokens, st.binary(max_size=40)), max_size=12))
def test_serialised_headers_round_trip(headers: list[tuple[bytes, bytes]]) -> None:
    kept = [(canonical_name(name), value) for name, value in headers if not is_control_response_header(name.lower())]
    assert decode_serialised_headers(encode_serialised_headers(headers)) == kept


@given(st.binary(max_size=100) | st.text("QYaz09+/=:;", max_size=40).map(str.encode))
def test_anything_else_is_a_wire_error(data: bytes) -> None:
    try:
        decoded = decode_serialised_headers(data)
    except WireError:
        return
    for name, value in decoded:
        assert isinstance(name, bytes)
        assert isinstance(value, bytes)


def test_name_caches_do_not_grow_without_end() -> None:
    for number in range(2 * h2_headers.NAME_CACHE_LIMIT):
        encode_serialised_headers([(b"x-invented-%d" % number, b"")])
        canonical_name(b"x-invented-%d" % number)
    assert len(h2_headers._canonical) <= h2_headers.NAME_CACHE_LIMIT
    assert len(h2_headers._serialised_names) <= h2_headers.NAME_CACHE_LIMIT


def test_statuses_are_read_by_the_hpack_package() -> None:
    for status in range(100, 1000):
        decoded = hpack.Decoder().decode(h2_headers.STATUS_FIELDS[status], raw=True)
        assert [tuple(field) for field in decoded] == [(b":status", b"%d" % status)]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], []),
        ([(b"Content-Length", b"12")], [(b"content-length", b"12")]),
        ([(b"x", b"1"), (b"content-length", b"0")], [(b"content-length", b"0")]),
        ([(b"content-length", b"-1")], []),
        ([(b"content-length", b"1, 1")], []),
        ([(b"content-length", b"")], []),
        ([(b"content-length", b"1\r\nx: y")], []),
    ],
)
def test_native_content_length(headers: list, expected: list) -> None:
    decoded = hpack.Decoder().decode(content_length_field(headers), raw=True)
    assert [tuple(field) for field in decoded] == expected


def test_field_names_and_values() -> None:
    assert is_field_name(b"x-a_b")
    for name in (b"", b"X-A", b"x a", b"x:", b"x\0", b"caf\xe9"):
        assert not is_field_name(name)
    assert is_field_value(b"a\tb caf\xe9\xff")
    for byte in [*range(9), *range(10, 32), 127]:
        assert not is_field_value(b"a%cb" % byte)
