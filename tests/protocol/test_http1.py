"""HTTP/1.1 to and from origins: what goes out, and where a response ends whatever the cuts."""

from __future__ import annotations

import random
from typing import Any

import pytest

from connector.errors import OriginProtocolError
from connector.protocol.http1 import (
    MAX_HEAD,
    MAX_TRAILERS,
    OwnFields,
    ResponseParser,
    content_length_line,
    encode_chunk,
    encode_request_head,
    encode_target,
)
from connector.protocol.ports import Buffer, Headers


class Recorder:
    """Collects one response."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.trailers: list[tuple[bytes, bytes]] | None = None

    def on_head(self, status: int, headers: Headers) -> None:
        assert not self.status
        self.status, self.headers = status, list(headers)

    def on_body(self, data: Buffer) -> None:
        assert self.status
        assert self.trailers is None
        assert len(data)
        self.body += bytes(data)

    def on_complete(self, trailers: Headers) -> None:
        assert self.status
        assert self.trailers is None
        self.trailers = list(trailers)


def cuts(data: bytes) -> list[list[bytes]]:
    """Return `data` whole, byte by byte, and cut at random places."""
    dice = random.Random(len(data))
    ways = [[data], [data[i : i + 1] for i in range(len(data))]]
    for _ in range(20):
        places = sorted(dice.sample(range(1, len(data)), min(3, len(data) - 1)))
        ways.append([data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)])
    return ways


def parse(parts: list[bytes], *, eof: bool = False, **options: Any) -> tuple[Recorder, ResponseParser]:
    recorder = Recorder()
    parser = ResponseParser(recorder, options.pop("method", b"GET"), **options)
    for part in parts:
        parser.receive_data(part)
    if eof and not parser.complete:
        parser.receive_eof()
    return recorder, parser


OK = b"HTTP/1.1 200 OK\r\n"

WHOLE: dict[str, dict[str, Any]] = {
    "length": {"data": OK + b"Content-Length: 5\r\n\r\nhello", "body": b"hello", "keep": True},
    "length zero": {"data": OK + b"Content-Length: 0\r\n\r\n", "keep": True},
    "no body 204": {"data": b"HTTP/1.1 204 No Content\r\nContent-Length: 9\r\n\r\n", "status": 204, "keep": True},
    "no body 304": {"data": b"HTTP/1.1 304 N\r\nContent-Length: 9\r\n\r\n", "status": 304, "keep": True},
    "head": {"data": OK + b"Content-Length: 1234\r\n\r\n", "method": b"HEAD", "keep": True},
    "head without length": {"data": OK + b"X: y\r\n\r\n", "method": b"HEAD", "keep": True},
    "head chunked": {"data": OK + b"Transfer-Encoding: chunked\r\n\r\n", "method": b"HEAD", "keep": True},
    "chunked": {
        "data": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n",
        "body": b"hello world",
        "keep": True,
    },
    "trailers": {
        "data": OK
        + b"Transfer-Encoding: Chunked\r\nTrailer: X-Sum\r\n\r\n1\r\na\r\n0\r\nX-Sum: 42\r\nConnection: x\r\n\r\n",
        "body": b"a",
        "trailers": [(b"X-Sum", b"42")],
        "headers": [],
        "keep": True,
    },
    "upgrade header in an ordinary answer": {
        "data": OK + b"Upgrade: h2c\r\nConnection: Upgrade\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        "body": b"a",
    },
    "until close": {"data": b"HTTP/1.0 200 OK\r\n\r\nall of it", "body": b"all of it", "eof": True, "keep": False},
    "until close, nothing": {"data": OK + b"\r\n", "eof": True, "keep": False},
    "close said": {"data": OK + b"Connection: close\r\nContent-Length: 1\r\n\r\nx", "body": b"x", "keep": False},
    "old": {"data": b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx", "body": b"x", "keep": False},
    "old, kept": {
        "data": b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 1\r\n\r\nx",
        "body": b"x",
        "keep": True,
    },
    "interim": {
        "data": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: </a>\r\n\r\n" * 3
        + OK
        + b"Content-Length: 2\r\n\r\nok",
        "body": b"ok",
        "keep": True,
        "headers": [(b"Content-Length", b"2")],
    },
    "folded": {
        "data": OK + b"X-A: b\r\n  c\r\n\td\r\nContent-Length: 0\r\n\r\n",
        "headers": [(b"X-A", b"b c d"), (b"Content-Length", b"0")],
        "keep": True,
    },
    # RFC 9112 section 5.2: folds become spaces. A first line that would fold the status line is in BROKEN.
    "folded, nothing before": {
        "data": OK + b"X-A:\r\n b\r\nContent-Length: 0\r\n\r\n",
        "headers": [(b"X-A", b"b"), (b"Content-Length", b"0")],
    },
    "folded, looks like a field": {
        "data": OK + b"X-A: b\r\n Content-Length: 9\r\nContent-Length: 0\r\n\r\n",
        "headers": [(b"X-A", b"b Content-Length: 9"), (b"Content-Length", b"0")],
    },
    "folded, only space": {
        "data": OK + b"X-A: b  \r\n  \r\nContent-Length: 0\r\n \r\n\r\n",
        "headers": [(b"X-A", b"b"), (b"Content-Length", b"0")],
    },
    "folded framing": {
        "data": OK + b"Transfer-Encoding:\r\n\tchunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        "body": b"a",
        "headers": [],
    },
    # RFC 9112 section 5.1: a proxy removes it.
    "space before colon": {
        "data": OK + b"X-A : b\r\nContent-Length \t: 2\r\n\r\nok",
        "body": b"ok",
        "headers": [(b"X-A", b"b"), (b"Content-Length", b"2")],
    },
    "bare line feeds": {
        "data": b"HTTP/1.0 200 OK\nX-A: b\nContent-Length: 4\n\na\r\n\r",
        "body": b"a\r\n\r",
        "headers": [(b"X-A", b"b"), (b"Content-Length", b"4")],
    },
    "length twice": {
        "data": OK + b"Content-Length: 2\r\nX: y\r\nContent-Length: 2\r\n\r\nok",
        "body": b"ok",
        "headers": [(b"X", b"y"), (b"Content-Length", b"2")],
        "keep": True,
    },
    "no reason": {"data": b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", "keep": True},
    "empty and padded values": {
        "data": OK + b"A:\r\nB: \r\nC:  c  \r\nContent-Length: 0\r\n\r\n",
        "headers": [(b"A", b""), (b"B", b""), (b"C", b"c"), (b"Content-Length", b"0")],
    },
    "latin-1": {"data": OK + b"A: \xe9\r\nContent-Length: 0\r\n\r\n"},
    "more behind a length": {"data": OK + b"Content-Length: 2\r\n\r\nokHTTP/1.1", "body": b"ok", "keep": False},
    "more behind no body": {"data": b"HTTP/1.1 204 N\r\n\r\nx", "status": 204, "keep": False},
    "more behind chunks": {
        "data": OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n" + OK + b"X: y\r\n\r\n",
        "body": b"a",
        "keep": False,
    },
    "garbage behind chunks": {
        "data": OK + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n1\r\na\r\n0\r\n\r\n\x00\x01",
        "body": b"a",
        "keep": False,
    },
}


@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE)
def test_a_response_is_the_same_whatever_the_cuts(case: dict[str, Any]) -> None:
    for parts in cuts(case["data"]):
        recorder, parser = parse(parts, eof=case.get("eof", False), method=case.get("method", b"GET"))
        assert parser.complete
        assert recorder.status == case.get("status", 200)
        assert recorder.body == case.get("body", b"")
        assert recorder.trailers == case.get("trailers", [])
        if "headers" in case:
            assert recorder.headers == case["headers"]
        if "keep" in case:
            assert parser.keep_alive is case["keep"]


SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n"
)


def test_what_stands_behind_an_upgrade_is_handed_on() -> None:
    whole, parser = parse([SWITCH + b"\x81\x02hi"], upgrade=True)
    assert (whole.status, parser.upgraded, parser.leftover) == (101, True, b"\x81\x02hi")
    assert whole.trailers is None
    parts = [SWITCH[i : i + 1] for i in range(len(SWITCH))]
    late, parser = parse(parts, upgrade=True)
    assert (late.status, parser.upgraded, parser.leftover) == (101, True, b"")
    assert late.headers == whole.headers


BROKEN: dict[str, tuple[bytes, str]] = {
    "banana": (b"banana\r\n\r\n", r'not HTTP/1.x: it starts with "banana'),
    "ssh": (b"SSH-2.0-x\r\n", "SSH-2.0"),
    "http 2": (b"HTTP/2 200\r\n\r\n", "not HTTP/1.x"),
    "binary": (b"\x00\x00\x12\x04\x00", r"\\x00\\x00\\x12"),
    "tls": (b"\x15\x03\x01\x00\x02\x02\x16", "TLS alert"),
    "status 99": (b"HTTP/1.1 099 X\r\n\r\n", "impossible status"),
    "status 2000": (b"HTTP/1.1 2000 X\r\n\r\n", "malformed"),
    "length and chunked": (OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", "Transfer-Encoding"),
    "two lengths": (OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n", "Content-Length"),
    "length not a number": (OK + b"Content-Length: x\r\n\r\n", "malformed"),
    "length negative": (OK + b"Content-Length: -1\r\n\r\n", "malformed"),
    "length overflow": (OK + b"Content-Length: 99999999999999999999999\r\n\r\n", "malformed"),
    "gzip encoding": (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n", "unsupported Transfer-Encoding"),
    "nul in value": (OK + b"A: b\x00c\r\n\r\n", "malformed"),
    "space in a name": (OK + b"A B: c\r\n\r\n", "malformed"),
    "space before the first field": (OK + b" A: b\r\nC: d\r\n\r\n", "malformed"),
    "tab before the first field": (OK + b"\tA: b\r\n\r\n", "malformed"),
    "only space in the first line": (OK + b"  \r\nA: b\r\n\r\n", "malformed"),
    "space after a bare line feed": (b"HTTP/1.1 200 OK\n A: b\n\n", "malformed"),
    "space before an interim answer's field": (b"HTTP/1.1 100 C\r\n A: b\r\n\r\n" + OK + b"\r\n", "malformed"),
    "folded reason": (b"HTTP/1.1 200\r\n OK\r\n\r\n", "malformed"),
    "folded length": (OK + b"Content-Length: 3\r\n 4\r\n\r\n", "malformed"),
    "control character begins a line": (OK + b"A: b\r\n\x0b c\r\n\r\n", "malformed"),
    "no colon": (OK + b"Foo\r\n\r\n", "malformed"),
    "bad chunk size": (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "chunked body is malformed"),
    "length in trailers": (
        OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 9\r\n\r\n",
        "chunked body is malformed",
    ),
    "chunk too long": (OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n", "chunked body is malformed"),
    "unasked switch": (SWITCH, "without being asked"),
    "long head": (OK + b"A: " + b"x" * MAX_HEAD, "larger than 256 KiB"),
    "many interim": (b"HTTP/1.1 102 P\r\n\r\n" * (MAX_HEAD // 16), "larger than 256 KiB"),
    "long trailers": (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * MAX_TRAILERS, "exceed 64 KiB"),
    "long extension": (OK + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * MAX_TRAILERS * 2, "exceed 64 KiB"),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_broken_responses_are_refused_with_a_reason(case: tuple[bytes, str]) -> None:
    data, reason = case
    ways = cuts(data) if len(data) < 1000 else [[data], [data[i : i + 999] for i in range(0, len(data), 999)]]
    for parts in ways:
        with pytest.raises(OriginProtocolError, match=reason if len(parts) == 1 else f"{reason}|not HTTP/1.x"):
            parse(parts)


def test_long_runs_of_space_cost_no_more_than_other_bytes() -> None:
    """Each took minutes of the loop when the search for folds began anew at every space."""
    spaces = b" " * (MAX_HEAD - 100)
    recorder, _ = parse([OK + b"X-A: b" + spaces + b"c\r\n d\r\nContent-Length: 0\r\n\r\n"])
    assert recorder.headers[0] == (b"X-A", b"b" + spaces + b"c d")
    with pytest.raises(OriginProtocolError, match="malformed"):
        parse([OK + b"X" + spaces + b"Y: b\r\n\r\n"])


SHORT: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "without an answer"),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-", "in the middle of its response head"),
    "half a length": (OK + b"Content-Length: 100\r\n\r\nonly this", "91 bytes before the end"),
    "no last chunk": (OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n", "before the last chunk"),
}


@pytest.mark.parametrize("case", SHORT.values(), ids=SHORT)
def test_short_responses_are_refused_with_a_reason(case: tuple[bytes, str]) -> None:
    with pytest.raises(OriginProtocolError, match=case[1]):
        parse([case[0]] if case[0] else [], eof=True)


def test_a_switch_without_agreement_is_refused() -> None:
    with pytest.raises(OriginProtocolError, match="Connection: Upgrade"):
        parse([b"HTTP/1.1 101 X\r\nA: b\r\n\r\n"], upgrade=True)


# -- requests


def test_head_has_host_agent_framing_then_sorted_fields() -> None:
    own = OwnFields([(b"cf-warp-tag-ID", b"u"), (b"Connection", b"keep-alive")])
    head = encode_request_head(
        b"POST",
        b"/p?x=1",
        b"h.example",
        [
            (b"x-b", b"2"),
            (b"accept-encoding", b"gzip"),
            (b"accept", b"*/*"),
            (b"x-b", b"1"),
            (b"user-agent", b"ua"),
            (b"connection", b"close"),
            (b"content-length", b"99"),
            (b"transfer-encoding", b"gzip"),
            (b"host", b"other"),
        ],
        framing=content_length_line(7),
        own=own,
    )
    assert head == (
        b"POST /p?x=1 HTTP/1.1\r\nHost: h.example\r\nUser-Agent: ua\r\nContent-Length: 7\r\nAccept: */*\r\n"
        b"Accept-Encoding: gzip\r\nCf-Warp-Tag-Id: u\r\nConnection: keep-alive\r\nX-B: 2\r\nX-B: 1\r\n\r\n"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"headers": [(b"a", b"b\r\nX-Evil: 1")]},
        {"headers": [(b"a", b"b\x00")]},
        {"headers": [(b"user-agent", b"b\n")]},
        {"headers": [(b"a: b\r\nc", b"d")]},
        {"headers": [(b"", b"d")]},
        {"target": b"/a\r\nX-Evil: 1"},
        {"target": b""},
        {"target": b"/a\tb"},
        {"host": b"h\r\nX-Evil: 1"},
        {"host": b"h x"},
        {"method": b"GET /x HTTP/1.1\r\nA: b"},
        {"method": b""},
    ],
    ids=str,
)
def test_nothing_can_be_smuggled_into_a_head(change: dict[str, Any]) -> None:
    request: dict[str, Any] = {"method": b"GET", "target": b"/", "host": b"h", "headers": [], **change}
    with pytest.raises(OriginProtocolError, match=r"invalid|control characters"):
        encode_request_head(request["method"], request["target"], request["host"], request["headers"])


def test_targets_pass_unchanged_or_are_escaped() -> None:
    plain = b"/a/../b/%2e%2e/c//d;x=1?q=%2F&'()*[]"
    assert encode_target(plain) is plain
    assert encode_target(b"*") == b"*"
    assert encode_target(b"/a b\xc3\xa9#c") == b"/a%20b%C3%A9%23c"
    assert encode_target(b"/[a]{b}|\\^`\"<%2f%zz>'?q={b}|\\^`\"<>'") == (
        b"/[a]%7Bb%7D%7C%5C%5E%60%22%3C%2f%zz%3E'?q={b}|\\^`\"<>'"
    )


def test_a_chunk() -> None:
    assert encode_chunk(memoryview(b"x" * 27)) == b"1b\r\n" + b"x" * 27 + b"\r\n"
