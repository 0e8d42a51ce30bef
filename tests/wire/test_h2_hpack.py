"""Header compression: against RFC 7541's own examples and the `hpack` package."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.errors import WireError
from connector.wire.h2_hpack import STATIC_TABLE, HpackDecoder, decode_huffman, hpack_literal, hpack_string

names = st.sampled_from([name for name, _ in STATIC_TABLE[1:]] + [b"x-a", b"cf-ray", b"x-" + b"long" * 50]) | st.binary(
    min_size=1, max_size=20
)
values = (
    st.sampled_from([b"", b"GET", b"https", b"gzip, br"])
    | st.binary(max_size=200)
    | st.text(max_size=40).map(str.encode)
)
lists = st.lists(st.lists(st.tuples(names, values), max_size=20), max_size=8)


def test_static_table_is_the_packages() -> None:
    assert STATIC_TABLE[1:] == tuple(hpack.table.HeaderTable.STATIC_TABLE)


def test_examples_of_the_rfc() -> None:
    # RFC 7541 appendix C.4: three requests with Huffman coding on one connection.
    decoder = HpackDecoder(4096)
    first = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"www.example.com")]
    assert decoder.decode(bytes.fromhex("828684418cf1e3c2e5f23a6ba0ab90f4ff")) == first
    assert decoder.decode(bytes.fromhex("828684be5886a8eb10649cbf")) == [*first, (b"cache-control", b"no-cache")]
    assert decoder.decode(bytes.fromhex("828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf")) == [
        (b":method", b"GET"),
        (b":scheme", b"https"),
        (b":path", b"/index.html"),
        (b":authority", b"www.example.com"),
        (b"custom-key", b"custom-value"),
    ]


@given(lists, st.booleans(), st.sampled_from([None, 0, 64, 300, 4096]))
def test_decodes_what_the_package_encodes(
    blocks: list[list[tuple[bytes, bytes]]], huffman: bool, size: int | None
) -> None:
    encoder = hpack.Encoder()
    decoder = HpackDecoder(4096)
    for number, fields in enumerate(blocks):
        if number == 1 and size is not None:
            encoder.header_table_size = size
        assert decoder.decode(encoder.encode(fields, huffman=huffman)) == fields


@given(st.lists(st.binary(max_size=60), max_size=6), st.data())
def test_agrees_with_the_package_on_anything(blocks: list[bytes], data: st.DataObject) -> None:
    ours = HpackDecoder(4096)
    theirs = hpack.Decoder(max_header_list_size=1 << 30)
    encoder = hpack.Encoder()
    for block in blocks:
        if data.draw(st.booleans()):
            fields = data.draw(st.lists(st.tuples(names, values), max_size=4))
            block = encoder.encode(fields) + block[:5]  # noqa: PLW2901
        try:
            expected = [tuple(field) for field in theirs.decode(block, raw=True)]
        except hpack.HPACKError:
            with pytest.raises(WireError):
                ours.decode(block)
            return
        assert ours.decode(block) == expected


@given(st.binary(max_size=300))
def test_huffman_agrees_with_the_package(data: bytes) -> None:
    coded = hpack.hpack.Encoder().huffman_coder.encode(data)
    assert decode_huffman(coded) == data


@given(st.binary(max_size=3000), st.binary(max_size=3000))
def test_literals_are_read_by_the_package(name: bytes, value: bytes) -> None:
    decoded = hpack.Decoder().decode(hpack_literal(name or b"x", value), raw=True)
    assert [tuple(field) for field in decoded] == [(name or b"x", value)]


@pytest.mark.parametrize("length", [0, 126, 127, 128, 254, 255, 16_383, 16_510, 16_511, 100_000])
def test_lengths_of_string_literals(length: int) -> None:
    assert HpackDecoder(0).decode(b"\x00\x01a" + hpack_string(b"v" * length)) == [(b"a", b"v" * length)]


@pytest.mark.parametrize(
    "block",
    [
        b"\x80",  # entry 0
        b"\xbe",  # an empty table's first entry
        b"\x7e\x00",  # its name
        b"\x40",  # nothing behind
        b"\x40\x05ab",  # a name cut short
        b"\x40\x01a\x05ab",  # a value cut short
        b"\x40\x01a",  # no value
        b"\xff\xff\xff\xff\xff\xff\x01",  # an integer without end
        b"\xff\x80",  # an integer cut short
        b"\x82\x20",  # a resize within a block
        b"\x3f\xe2\x1f",  # a table of 4097 bytes
        b"\x40\x81\x00\x00",  # bad padding: zeros
        b"\x40\x84\xff\xff\xff\xff\x00",  # the end mark
        b"\x40\x82\x1f\xff\x00",  # more than seven bits of padding
    ],
)
def test_bad_blocks(block: bytes) -> None:
    with pytest.raises(WireError):
        HpackDecoder(4096).decode(block)


def test_a_block_of_a_megabyte_takes_linear_time() -> None:
    block = b"\x10\x02xy\x7f\x00" + b"v" * 127
    fields = HpackDecoder(4096).decode(block * 8_000)
    assert len(fields) == 8_000
