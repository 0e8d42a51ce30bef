"""Any bytes from an origin give a response, a need for more, or OriginProtocolError; and the cuts never matter."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from connector.errors import OriginProtocolError
from connector.protocol.http1 import ResponseParser, encode_request_head
from connector.protocol.ports import Buffer, Headers

PIECES = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 204 N\r\n", b"HTTP/1.1 100 C\r\n\r\n",
        b"HTTP/1.1 101 S\r\n", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n", b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b"X: y\r\n", b" fold\r\n", b"\r\n",
        b"\n", b"\r", b"hello", b"5\r\nhello\r\n", b"0\r\n\r\n", b"0\r\n", b"ffffffffffffffffff\r\n", b"\x00", b":",
    ]
)  # fmt: skip
STREAMS = st.lists(st.one_of(PIECES, st.binary(max_size=6)), max_size=14).map(b"".join)
HEADED = st.builds(lambda head, rest: head + rest, PIECES, STREAMS)


class Collector:
    def __init__(self) -> None:
        self.calls: list[object] = []
        self.body = b""

    def on_head(self, status: int, headers: Headers) -> None:
        assert 101 <= status <= 999
        for name, value in headers:
            assert not {0, 10, 13} & set(name + value)
        self.calls.append((status, tuple(headers)))

    def on_body(self, data: Buffer) -> None:
        self.body += bytes(data)

    def on_complete(self, trailers: Headers) -> None:
        for name, value in trailers:
            assert not {0, 10, 13} & set(name + value)
        self.calls.append(tuple(trailers))


def feed(data: bytes, step: int, method: bytes) -> tuple[object, ...]:
    collector = Collector()
    parser = ResponseParser(collector, method, upgrade=True)
    failed = False
    text = ""
    rest = b""
    try:
        for at in range(0, len(data), step):
            if parser.upgraded:
                rest += data[at : at + step]
            else:
                parser.receive_data(data[at : at + step])
        if not parser.upgraded and not parser.complete:
            parser.receive_eof()
    except OriginProtocolError as error:
        failed = True
        text = str(error)
    assert text.isprintable()
    return collector.calls, collector.body, failed, parser.leftover + rest, parser.complete


@settings(max_examples=400, deadline=None)
@given(HEADED, st.integers(1, 7), st.sampled_from([b"GET", b"HEAD"]))
def test_any_response_bytes(data: bytes, step: int, method: bytes) -> None:
    whole, cut = feed(data, max(1, len(data)), method), feed(data, step, method)
    assert whole == cut


NAMES = st.one_of(st.binary(max_size=8), st.sampled_from([b"accept", b"user-agent", b"host", b"x-a", b"connection"]))


@settings(max_examples=200, deadline=None)
@given(
    st.binary(min_size=1, max_size=5),
    st.binary(max_size=12),
    st.binary(max_size=8),
    st.lists(st.tuples(NAMES, st.binary(max_size=8)), max_size=6),
)
def test_a_request_head_is_one_head_or_refused(
    method: bytes, target: bytes, host: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    try:
        head = encode_request_head(method, target, host, headers)
    except OriginProtocolError:
        return
    assert head.endswith(b"\r\n\r\n")
    assert head.count(b"\r\n\r\n") == 1
    lines = head[:-4].split(b"\r\n")
    assert lines[0].count(b" ") == 2
    assert all(b": " in line and not {0, 10, 13} & set(line) for line in lines[1:])
    assert len(lines) <= len(headers) + 2
