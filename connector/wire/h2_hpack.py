"""Header compression of HTTP/2 (RFC 7541): a decoder for requests, and stateless literals for responses.

Owns: the static table, the Huffman code, HpackDecoder, `hpack_literal`.
In: one whole header block. Out: header fields as (name, value); WireError for anything that does not decode.
Never: judges names or values, limits the list (its caller counts), encodes with a table.

*Strategy*: written for speed on small blocks, and for linear time on large ones. (The `hpack` package copies the rest
of the block for every literal: a block of 1 MiB keeps it busy for 20 seconds, this module for 0.1.) Huffman strings
are decoded a byte of input at a time, by steps that are worked out when first met; names, which repeat, are looked up
whole.
"""

from __future__ import annotations

from connector.errors import WireError

STATIC_TABLE: tuple[tuple[bytes, bytes], ...] = (
    (b"", b""),  # index 0 is not used
    (b":authority", b""),
    (b":method", b"GET"),
    (b":method", b"POST"),
    (b":path", b"/"),
    (b":path", b"/index.html"),
    (b":scheme", b"http"),
    (b":scheme", b"https"),
    *((b":status", status) for status in b"200 204 206 304 400 404 500".split()),
    (b"accept-charset", b""),
    (b"accept-encoding", b"gzip, deflate"),
    *(
        (name, b"")
        for name in (
            b"accept-language accept-ranges accept access-control-allow-origin age allow authorization cache-control "
            b"content-disposition content-encoding content-language content-length content-location content-range "
            b"content-type cookie date etag expect expires from host if-match if-modified-since if-none-match if-range "
            b"if-unmodified-since last-modified link location max-forwards proxy-authenticate proxy-authorization "
            b"range referer refresh retry-after server set-cookie strict-transport-security transfer-encoding "
            b"user-agent vary via www-authenticate"
        ).split()
    ),
)
"""RFC 7541 appendix A."""

ENTRY_OVERHEAD = 32
"""What a field counts beyond its bytes, in a table and in a header list (RFC 7541 section 4.1)."""

# RFC 7541 appendix B. The code is canonical, so the lengths say all: symbols by length, in ascending order.
_END_OF_STRING = 256
_SYMBOLS_BY_LENGTH: dict[int, tuple[int, ...]] = {
    5: tuple(b"012aceiost"),
    6: tuple(b" %-./3456789=A_bdfghlmnpru"),
    7: tuple(b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz"),
    8: tuple(b"&*,;XZ"),
    10: tuple(b'!"()?'),
    11: tuple(b"'+|"),
    12: tuple(b"#>"),
    13: tuple(b"\0$@[]~"),
    14: tuple(b"^}"),
    15: tuple(b"<`{"),
    19: (92, 195, 208),
    20: (128, 130, 131, 162, 184, 194, 224, 226),
    21: (153, 161, 167, 172, 176, 177, 179, 209, 216, 217, 227, 229, 230),
    22: (
        *(129, 132, 133, 134, 136, 146, 154, 156, 160, 163, 164, 169, 170, 173, 178, 181, 185, 186, 187, 189, 190, 196),
        *(198, 228, 232, 233),
    ),
    23: (
        *(1, 135, 137, 138, 139, 140, 141, 143, 147, 149, 150, 151, 152, 155, 157, 158, 165, 166, 168, 174, 175, 180),
        *(182, 183, 188, 191, 197, 231, 239),
    ),
    24: (9, 142, 144, 145, 148, 159, 171, 206, 215, 225, 236, 237),
    25: (199, 207, 234, 235),
    26: (192, 193, 200, 201, 202, 205, 210, 213, 218, 219, 238, 240, 242, 243, 255),
    27: (203, 204, 211, 212, 214, 221, 222, 223, 241, 244, 245, 246, 247, 248, 250, 251, 252, 253, 254),
    28: (*range(2, 9), 11, 12, *range(14, 22), *range(23, 32), 127, 220, 249),
    30: (10, 13, 22, _END_OF_STRING),
}


def _huffman_tree() -> tuple[list[list[int]], set[int]]:
    """Return the code as nodes of two branches each (a node's number, or ~symbol), and where a string may end."""
    nodes = [[0, 0]]
    code = length = 0
    for next_length, symbols in _SYMBOLS_BY_LENGTH.items():
        code <<= next_length - length
        length = next_length
        for symbol in symbols:
            node = 0
            for shift in range(length - 1, 0, -1):
                bit = code >> shift & 1
                if not nodes[node][bit]:
                    nodes.append([0, 0])
                    nodes[node][bit] = len(nodes) - 1
                node = nodes[node][bit]
            nodes[node][code & 1] = ~symbol
            code += 1
    ends = {0}
    node = 0
    for _ in range(7):  # padding: up to seven bits, all ones
        node = nodes[node][1]
        ends.add(node << 8)
    return nodes, ends


_tree, _string_ends = _huffman_tree()
_steps: dict[int, tuple[int, bytes]] = {}
"""From (node << 8 | byte of input) to (node << 8 afterwards, symbols that the byte completed): at most 65,536."""

_names: dict[bytes, bytes] = {}
_NAME_CACHE_LIMIT = 1_024
"""Huffman-coded names remembered by one process; the real ones are a few hundred."""


def _step(key: int) -> tuple[int, bytes]:
    node, byte = key >> 8, key & 0xFF
    symbols = bytearray()
    for shift in range(7, -1, -1):
        node = _tree[node][byte >> shift & 1]
        if node < 0:
            if ~node == _END_OF_STRING:
                raise WireError("a Huffman string holds its end mark")
            symbols.append(~node)
            node = 0
    step = _steps[key] = (node << 8, bytes(symbols))
    return step


def decode_huffman(data: bytes) -> bytes:
    """Return the string that `data` codes. Errors: WireError."""
    steps = _steps
    state = 0
    out = []
    for byte in data:
        step = steps.get(state | byte)
        if step is None:
            step = _step(state | byte)
        state, symbols = step
        out.append(symbols)
    if state not in _string_ends:
        raise WireError("a Huffman string ends within a symbol")
    return b"".join(out)


def _decode_integer(block: bytes, pos: int, prefix: int) -> tuple[int, int]:
    """Return the integer that starts with a full prefix, and where it ends (RFC 7541 section 5.1)."""
    shift = 0
    while True:
        byte = block[pos]
        pos += 1
        prefix += (byte & 0x7F) << shift
        if byte < 0x80:
            return prefix, pos
        shift += 7
        if shift > 21:  # 2^28 is far beyond any block we take
            raise WireError("an integer of a header block is too large")


class HpackDecoder:
    """The decoding side of one connection; blocks must be given in their order, every one of them.

    After a WireError the table no longer follows the peer's: the connection must end.
    """

    __slots__ = ("_limit", "_size", "_table", "max_table_size")

    def __init__(self, max_table_size: int) -> None:
        self.max_table_size = max_table_size  # what our SETTINGS allow
        self._limit = max_table_size  # what the peer set it to within that
        self._size = 0
        self._table: list[tuple[bytes, bytes]] = []  # the newest last

    def decode(self, block: bytes) -> list[tuple[bytes, bytes]]:
        """Return the fields of one whole header block, in their order. Errors: WireError."""
        try:
            return self._decode(block)
        except IndexError:
            raise WireError("a header block is cut short, or refers to no entry of the table") from None

    def _decode(self, block: bytes) -> list[tuple[bytes, bytes]]:
        fields: list[tuple[bytes, bytes]] = []
        table = self._table
        pos = 0
        end = len(block)
        while pos < end:
            first = block[pos]
            pos += 1
            if first >= 0x80:
                index = first & 0x7F
                if index == 0x7F:
                    index, pos = _decode_integer(block, pos, index)
                if index > 61:
                    fields.append(table[61 - index])
                elif index:
                    fields.append(STATIC_TABLE[index])
                else:
                    raise WireError("a header block refers to entry 0")
                continue
            if first >= 0x40:
                full = 0x3F
            elif first >= 0x20:
                size = first & 0x1F
                if size == 0x1F:
                    size, pos = _decode_integer(block, pos, size)
                if fields or size > self.max_table_size:
                    raise WireError(f"a header table of {size} bytes, or resized within a block")
                self._limit = size
                self._evict(0)
                continue
            else:
                full = 0x0F
            index = first & full
            if index == full:
                index, pos = _decode_integer(block, pos, index)
            if index > 61:
                name = table[61 - index][0]
            elif index:
                name = STATIC_TABLE[index][0]
            else:
                name, pos = self._decode_name(block, pos)
            length = block[pos]
            pos += 1
            coded = length >= 0x80
            length &= 0x7F
            if length == 0x7F:
                length, pos = _decode_integer(block, pos, length)
            start = pos
            pos += length
            if pos > end:
                raise WireError("a header block is cut short")
            value = decode_huffman(block[start:pos]) if coded else block[start:pos]
            field = (name, value)
            fields.append(field)
            if first >= 0x40:
                size = len(name) + len(value) + ENTRY_OVERHEAD
                if self._size + size > self._limit:
                    self._evict(size)
                    if size > self._limit:
                        continue
                table.append(field)
                self._size += size
        return fields

    def _decode_name(self, block: bytes, pos: int) -> tuple[bytes, int]:
        length = block[pos]
        pos += 1
        coded = length >= 0x80
        length &= 0x7F
        if length == 0x7F:
            length, pos = _decode_integer(block, pos, length)
        stop = pos + length
        if stop > len(block):
            raise WireError("a header block is cut short")
        name = block[pos:stop]
        if coded:
            decoded = _names.get(name)
            if decoded is None:
                decoded = decode_huffman(name)
                if len(_names) < _NAME_CACHE_LIMIT and length < 128:
                    _names[name] = decoded
            name = decoded
        return name, stop

    def _evict(self, size: int) -> None:
        """Drop the oldest entries until `size` more bytes fit (all of them if they never will)."""
        table = self._table
        dropped = 0
        for name, value in table:
            if self._size + size <= self._limit:
                break
            self._size -= len(name) + len(value) + ENTRY_OVERHEAD
            dropped += 1
        del table[:dropped]


# Literals without Huffman coding and without indexing (RFC 7541 section 6.2.2). They leave no trace in the decoder's
# table, so they may be made once and sent on any connection. A response costs about 100 bytes more on the wire than
# with a table and some 40 us less here, which is the better bargain for many small responses.

HPACK_NO_TABLE = b"\x20"
"""Dynamic table size update to 0 (RFC 7541 section 6.3): first on a connection, and no later setting matters."""


def hpack_string(data: bytes) -> bytes:
    """Return `data` as a string literal."""
    length = len(data)
    if length < 127:
        return bytes((length,)) + data
    prefix = bytearray(b"\x7f")
    length -= 127
    while length > 127:
        prefix.append(length & 127 | 128)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + data


def hpack_literal(name: bytes, value: bytes) -> bytes:
    """Return one header field as a literal without indexing, with a new name."""
    return b"\x00" + hpack_string(name) + hpack_string(value)
