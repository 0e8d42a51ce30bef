"""Bounded fuzzing of the ConnectRequest decoder and of the opening of data streams: WireError and RequestError only."""

from __future__ import annotations

import random
import struct

from connector.errors import WireError
from connector.protocol.quic_request import RequestError, decode_connect
from connector.wire.connect import decode_connect_request, decode_connect_response, encode_connect_request
from tests.support.vectors import vector

ROUNDS = 4_000
INTERESTING = (0, 1, 2, 3, 4, 7, 8, 0x7F, 0x80, 0xFC, 0xFF)


def mutate(rng: random.Random, message: bytes) -> bytes:
    data = bytearray(message)
    for _ in range(rng.randint(1, 8)):
        choice = rng.randrange(4)
        if choice == 0 and data:
            data[rng.randrange(len(data))] = rng.choice(INTERESTING)
        elif choice == 1 and len(data) >= 16:
            at = rng.randrange(len(data) // 8) * 8
            struct.pack_into("<Q", data, at, rng.getrandbits(64))
        elif choice == 2 and len(data) >= 16:
            at = rng.randrange(len(data) // 8) * 8
            value = struct.unpack_from("<Q", data, at)[0] ^ (1 << rng.randrange(64))
            struct.pack_into("<Q", data, at, value)
        elif choice == 3 and data:
            start = rng.randrange(len(data))
            data[start : start + rng.randrange(1, 24)] = rng.randbytes(rng.randrange(24))
    return bytes(data)


def fix_table(data: bytes) -> bytes:
    """Make the segment table true, so that the rest is looked at."""
    body = data[8:]
    body += b"\0" * (-len(body) % 8)
    return struct.pack("<II", 0, len(body) // 8) + body


def seeds() -> list[bytes]:
    return [
        vector("quic_connect_request_get")[8:],
        vector("quic_connect_response_200")[8:],
        vector("quic_connect_response_error")[8:],
        encode_connect_request(1, b"https://h:1/p?q#f", [(b"HttpHeader:A", b"b")] * 20),
        encode_connect_request(2, b"10.0.0.1:22", [(b"FlowID", b"x")]),
    ]


def test_decoder_raises_wire_errors_only() -> None:
    rng = random.Random(20_261_124)
    corpus = seeds()
    read = 0
    for round_number in range(ROUNDS):
        message = mutate(rng, rng.choice(corpus))
        if round_number % 2:
            message = fix_table(message)
        for decode in (decode_connect_request, decode_connect_response):
            try:
                decode(message)
                read += 1
            except WireError:
                pass
    assert read > ROUNDS // 20, "the mutations never survive the first check"


def test_requests_raise_request_errors_only() -> None:
    rng = random.Random(42)
    alphabet = [
        b"HttpHeader:",
        b"HttpMethod",
        b"HttpHost",
        b"Content-Length",
        b"chunked",
        b"http://",
        b"/",
        b"\n",
        b"\0",
    ]
    alphabet += [
        b":",
        b"7",
        b"-1",
        b"Transfer-Encoding",
        b" ",
        b"\xff",
        b"@",
        b"?",
        b"#",
        b"a",
        b"99999999999999999999",
    ]

    def text() -> bytes:
        return b"".join(rng.choice(alphabet) for _ in range(rng.randrange(5)))

    good = 0
    for _ in range(ROUNDS):
        pairs = [(text(), text()) for _ in range(rng.randrange(6))]
        message = encode_connect_request(rng.randrange(4), text(), pairs)
        try:
            request = decode_connect(decode_connect_request(message))
        except (WireError, RequestError):
            continue
        good += 1
        for value in (
            request.method,
            request.target,
            request.host,
            *(part for pair in request.headers for part in pair),
        ):
            assert not {0, 10, 13} & set(value)
        assert b" " not in request.target
        assert request.content_length >= -1
    assert good > 50
