"""Streams: what the proxy sees of a request, what the edge sees of a response, and every way a stream ends."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.protocol.h2_limits import H2Limits
from connector.protocol.ports import Buffer, Request, RequestKind, ResetCode, ResponseSource, StreamPort
from connector.wire.h2_frames import (
    CONTINUATION,
    DATA,
    FLAG_END_HEADERS,
    FLAG_END_STREAM,
    HEADERS,
    RST_STREAM,
    ErrorCode,
    encode_frame,
    encode_rst_stream,
)
from connector.wire.h2_hpack import hpack_literal
from tests.support.h2_doubles import GET, POST, Frame, Sink, Wire

UPGRADE = b"cf-cloudflared-proxy-connection-upgrade"
SOURCE = b"cf-cloudflared-proxy-src"


def rst(stream_id: int, code: ErrorCode) -> Frame:
    return (RST_STREAM, 0, stream_id, struct.pack(">I", code))


def request_of(fields: list[tuple[bytes, bytes]], *, end: bool = True) -> Request:
    return Wire().open(1, fields, end=end).request


# --- requests ------------------------------------------------------------------------------------------------------


def test_a_request() -> None:
    request = request_of([*GET, (b"accept", b"*/*"), (b"cf-ray", b"8a1b-LIS")])
    assert request.kind is RequestKind.HTTP
    assert request.method == b"GET"
    assert request.target == b"/hi?x=1"
    assert request.host == b"app.example.com"
    assert request.scheme == b"https"
    assert request.content_length == 0
    assert list(request.headers) == [(b"accept", b"*/*"), (b"cf-ray", b"8a1b-LIS")]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ([], RequestKind.HTTP),
        ([(UPGRADE, b"websocket")], RequestKind.WEBSOCKET),
        ([(UPGRADE, b"control-stream")], RequestKind.CONTROL),
        ([(UPGRADE, b"update-configuration")], RequestKind.CONFIGURATION),
        ([(SOURCE, b"10.0.0.1")], RequestKind.TCP),
        ([(SOURCE, b"")], RequestKind.HTTP),
        ([(UPGRADE, b"WebSocket")], RequestKind.HTTP),
        ([(UPGRADE, b"control-stream"), (SOURCE, b"x")], RequestKind.TCP),
        ([(SOURCE, b"x"), (UPGRADE, b"websocket")], RequestKind.WEBSOCKET),
        ([(SOURCE, b"x"), (UPGRADE, b"update-configuration")], RequestKind.CONFIGURATION),
    ],
)
def test_kinds_of_request_in_their_order(fields: list[tuple[bytes, bytes]], kind: RequestKind) -> None:
    request = request_of([*POST, *fields, (b"cf-cloudflared-proxy-other", b"x")], end=False)
    assert request.kind is kind
    assert list(request.headers) == []


def test_normalisation() -> None:
    request = request_of(
        [
            *POST,
            (b"cookie", b"a=1"),
            (b"x-a", b"1"),
            (b"cookie", b"b=2"),
            (b"host", b"other"),
            (b"te", b"trailers"),
            (b"trailer", b"x-sum"),
            (b"expect", b"something"),
            (b"x-a", b"2"),
            (b"content-length", b"007"),
            (b"content-length", b"007"),
        ],
        end=False,
    )
    assert request.host == b"app.example.com"
    assert request.content_length == 7
    assert sorted(request.headers) == [
        (b"content-length", b"7"),
        (b"cookie", b"a=1; b=2"),
        (b"expect", b"something"),
        (b"te", b"trailers"),
        (b"x-a", b"1"),
        (b"x-a", b"2"),
    ]


def test_content_length_is_unknown_while_the_stream_is_open() -> None:
    assert request_of(POST, end=False).content_length == -1
    assert request_of(POST, end=True).content_length == 0


def test_the_trace_context_is_apart_from_the_headers() -> None:
    request = request_of([*GET, (b"cf-trace-id", b"1"), (b"accept", b"*/*"), (b"cf-trace-id", b"2")])
    assert request.trace == b"2"
    assert list(request.headers) == [(b"accept", b"*/*")]


def test_host_stands_in_for_a_missing_authority() -> None:
    fields = [field for field in GET if field[0] != b":authority"]
    assert request_of([*fields, (b"host", b"h.example")]).host == b"h.example"
    assert request_of(fields).host == b""


def test_connect_and_options() -> None:
    request = request_of([(b":method", b"CONNECT"), (b":authority", b"10.0.0.1:22"), (SOURCE, b"x")], end=False)
    assert (request.method, request.target, request.host) == (b"CONNECT", b"10.0.0.1:22", b"10.0.0.1:22")
    assert request_of([(b":method", b"OPTIONS"), *GET[1:3], (b":path", b"*")]).target == b"*"


def test_spaces_in_a_path_cannot_end_a_request_line() -> None:
    assert request_of([*GET[:3], (b":path", b"/a b\tc?d e")]).target == b"/a%20b%09c?d%20e"


def test_expect_100_continue_is_answered_and_dropped() -> None:
    wire = Wire()
    sink = wire.open(1, [*POST, (b"expect", b"100-Continue")])
    assert list(sink.request.headers) == []
    frames = wire.take()
    assert [frame[:3] for frame in frames] == [(HEADERS, FLAG_END_HEADERS, 1)]
    assert wire.heads(frames) == [[(b":status", b"100")]]
    sink.port.write_eof()
    frames = wire.take()
    assert [frame[:3] for frame in frames] == [(HEADERS, FLAG_END_HEADERS | FLAG_END_STREAM, 1)]


def test_no_100_continue_after_the_response_or_without_body() -> None:
    def make(request: Request, port: StreamPort) -> Sink:
        port.respond(413, [])
        return Sink(request, port)

    wire = Wire(make)
    wire.open(1, [*POST, (b"expect", b"100-continue")])
    assert [dict(head)[b":status"] for head in wire.heads(wire.take())] == [b"413"]
    wire = Wire()
    wire.open(1, [*POST, (b"expect", b"100-continue")], end=True)
    assert wire.take() == []


MALFORMED: dict[str, list[tuple[bytes, bytes]]] = {
    "no method": GET[1:],
    "empty method": [(b":method", b""), *GET[1:]],
    "method with a space": [(b":method", b"GET /x"), *GET[1:]],
    "no scheme": [GET[0], *GET[2:]],
    "strange scheme": [GET[0], (b":scheme", b"ftp"), *GET[2:]],
    "no path": GET[:3],
    "empty path": [*GET[:3], (b":path", b"")],
    "path without slash": [*GET[:3], (b":path", b"x")],
    "authority with a space": [*GET[:2], (b":authority", b"a b"), GET[3]],
    "authority with a path": [*GET[:2], (b":authority", b"a/b"), GET[3]],
    "host with a space": [*GET[:2], GET[3], (b"host", b"a b")],
    "method twice": [GET[0], *GET],
    "unknown pseudo header": [*GET, (b":other", b"x")],
    "extended connect": [*GET, (b":protocol", b"websocket")],
    "response pseudo header": [*GET, (b":status", b"200")],
    "pseudo header after others": [*GET[:3], (b"x", b"y"), GET[3]],
    "pseudo header after special ones": [*GET[:3], (b"cookie", b"y"), GET[3]],
    "connect with a path": [(b":method", b"CONNECT"), GET[2], GET[3]],
    "connect without authority": [(b":method", b"CONNECT")],
    "upper-case name": [*GET, (b"X-A", b"y")],
    "name with a space": [*GET, (b"x a", b"y")],
    "empty name": [*GET, (b"", b"y")],
    "name with a colon": [*GET, (b"x:", b"y")],
    "name with CR": [*GET, (b"x\r\ny", b"y")],
    "value with CR LF": [*GET, (b"x", b"y\r\nz: 1")],
    "value with NUL": [*GET, (b"x", b"y\0")],
    "value with a control character": [*GET, (b"x", b"\x1b")],
    "path with LF": [*GET[:3], (b":path", b"/x\nHost: y")],
    "authority with CR": [*GET[:2], (b":authority", b"a\rb"), GET[3]],
    "cookie with LF": [*GET, (b"cookie", b"a=1\nb")],
    "content-length twice": [*GET, (b"content-length", b"0"), (b"content-length", b"1")],
    "content-length list": [*GET, (b"content-length", b"0, 0")],
    "content-length signed": [*GET, (b"content-length", b"+1")],
    "content-length empty": [*GET, (b"content-length", b"")],
    "content-length endless": [*GET, (b"content-length", b"1" * 19)],
    "content-length without body": [*GET, (b"content-length", b"1")],
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_requests_are_reset(case: str) -> None:
    wire = Wire()
    # As hpack would refuse some of these: literals.
    block = b"".join(hpack_literal(name, value) for name, value in MALFORMED[case])
    wire.feed(encode_frame(HEADERS, FLAG_END_HEADERS | FLAG_END_STREAM, 1, block))
    assert wire.take() == [rst(1, ErrorCode.PROTOCOL_ERROR)]
    assert wire.sinks == []
    assert len(wire.malformed) == 1
    assert wire.engine.open_streams == 0
    assert wire.open(3).calls == []


@pytest.mark.parametrize(
    "field",
    [
        (b"connection", b"keep-alive"),
        (b"keep-alive", b"timeout=5"),
        (b"proxy-connection", b"x"),
        (b"transfer-encoding", b"chunked"),
        (b"upgrade", b"websocket"),
        (b"te", b"gzip"),
        (b"te", b"trailers, deflate"),
    ],
)
@pytest.mark.parametrize("end", [True, False])
def test_connection_specific_headers_get_status_400_as_in_go(field: tuple[bytes, bytes], end: bool) -> None:
    wire = Wire()
    wire.feed(wire.headers(1, [*POST, field], end=end))
    frames = wire.take()
    assert dict(wire.heads(frames)[0]) == {
        b":status": b"400",
        b"cf-cloudflared-response-meta": b'{"src":"cloudflared"}',
        b"content-length": b"0",
    }
    assert frames[0][1] == FLAG_END_HEADERS | FLAG_END_STREAM
    assert frames[1:] == ([] if end else [rst(1, ErrorCode.NO_ERROR)])
    assert wire.sinks == []
    assert wire.engine.open_streams == 0


def test_empty_te_is_dropped() -> None:
    assert list(request_of([*GET, (b"te", b"")]).headers) == []


field_names = st.sampled_from(
    [b":method", b":path", b":scheme", b":authority", b"host", b"cookie", b"content-length", b"te", b"expect", UPGRADE]
)
fields_of_any_kind = st.lists(
    st.tuples(
        field_names | st.binary(max_size=6),
        st.sampled_from([b"GET", b"/", b"https", b"a", b"0", b"1", b"trailers"]) | st.binary(max_size=6),
    ),
    max_size=8,
)


@given(fields_of_any_kind, st.booleans(), st.booleans())
def test_no_field_reaches_the_proxy_that_could_alter_a_request(fields: list, valid: bool, end: bool) -> None:
    wire = Wire()
    block = b"".join(hpack_literal(name, value) for name, value in ([*GET, *fields] if valid else fields))
    wire.feed(encode_frame(HEADERS, FLAG_END_HEADERS | (FLAG_END_STREAM if end else 0), 1, block))
    for sink in wire.sinks:
        request = sink.request
        texts = [request.method, request.target, request.host, request.scheme]
        for name, value in request.headers:
            assert name not in (b"connection", b"transfer-encoding", b"host", b"trailer", UPGRADE)
            assert name == name.lower()
            assert b":" not in name
            texts += [name, value]
        for text in texts:
            assert not set(text) & {0, 10, 13}
        assert b" " not in request.method + request.target + request.host


# --- responses -----------------------------------------------------------------------------------------------------


def response_of(
    status: int,
    headers: list[tuple[bytes, bytes]],
    source: ResponseSource = ResponseSource.ORIGIN,
    *,
    fields: list[tuple[bytes, bytes]] = POST,
) -> list[tuple[bytes, bytes]]:
    wire = Wire()
    wire.open(1, fields).port.respond(status, headers, source)
    frames = wire.take()
    assert len(frames) == 1
    return wire.heads(frames)[0]


META = b"cf-cloudflared-response-meta"
SERIALISED = b"cf-cloudflared-response-headers"


def test_response_of_an_origin() -> None:
    head = response_of(
        404, [(b"Content-Length", b"2"), (b"X-Multi", b"a"), (b"X-Multi", b"b"), (b"Cf-Int-Secret", b"no")]
    )
    assert head == [
        (b":status", b"404"),
        (SERIALISED, b"Q29udGVudC1MZW5ndGg:Mg;WC1NdWx0aQ:YQ;WC1NdWx0aQ:Yg"),
        (META, b'{"src":"origin"}'),
        (b"content-length", b"2"),
    ]


# What cloudflared 2026.8.2 sent for the same origin headers; it orders the names of a list by chance.
RECORDED = [
    (
        200,
        b"Content-Length: 2|Content-Type: text/html|Server: x|X-Multi: a|X-Multi: b",
        b"Q29udGVudC1MZW5ndGg:Mg;Q29udGVudC1UeXBl:dGV4dC9odG1s;U2VydmVy:eA;WC1NdWx0aQ:YQ;WC1NdWx0aQ:Yg",
    ),
    (201, b"Content-Length: 0|Location: /p/1", b"Q29udGVudC1MZW5ndGg:MA;TG9jYXRpb24:L3AvMQ"),
    (304, b'Etag: "z"', b"RXRhZw:Inoi"),
    (
        200,
        b"Content-Length: 1|Set-Cookie: a=1; Path=/|Set-Cookie: b=2|Connection: keep-alive|Keep-Alive: timeout=5|"
        b"Proxy-Authenticate: Basic|Cf-Int-Secret: no|Cf-Cloudflared-X: no|Cf-Proxy-Y: no",
        b"S2VlcC1BbGl2ZQ:dGltZW91dD01;Q29udGVudC1MZW5ndGg:MQ;U2V0LUNvb2tpZQ:YT0xOyBQYXRoPS8;U2V0LUNvb2tpZQ:Yj0y;"
        b"Q29ubmVjdGlvbg:a2VlcC1hbGl2ZQ;UHJveHktQXV0aGVudGljYXRl:QmFzaWM",
    ),
    (204, b"access-control-allow-origin: *", b"QWNjZXNzLUNvbnRyb2wtQWxsb3ctT3JpZ2lu:Kg"),
]


@pytest.mark.parametrize(("status", "origin", "serialised"), RECORDED)
def test_recorded_responses(status: int, origin: bytes, serialised: bytes) -> None:
    headers = [(name, value) for name, _, value in (line.partition(b": ") for line in origin.split(b"|"))]
    head = dict(response_of(status, headers))
    assert head.pop(b":status") == b"%d" % status
    assert head.pop(META) == b'{"src":"origin"}'
    assert sorted(head.pop(SERIALISED).split(b";")) == sorted(serialised.split(b";"))
    assert head == {name.lower(): value for name, value in headers if name == b"Content-Length"}


def test_response_headers_are_present_even_if_empty() -> None:
    assert response_of(200, []) == [(b":status", b"200"), (SERIALISED, b""), (META, b'{"src":"origin"}')]


def test_101_becomes_200() -> None:
    headers = [
        (b"Connection", b"Upgrade"),
        (b"Sec-Websocket-Accept", b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
        (b"Upgrade", b"websocket"),
    ]
    assert response_of(101, headers, fields=[*GET, (UPGRADE, b"websocket")]) == [
        (b":status", b"200"),
        (
            SERIALISED,
            b"Q29ubmVjdGlvbg:VXBncmFkZQ;U2VjLVdlYnNvY2tldC1BY2NlcHQ:"
            b"czNwUExNQmlUeGFROWtZR3p6aFpSYksreE9vPQ;VXBncmFkZQ:d2Vic29ja2V0",
        ),
        (META, b'{"src":"origin"}'),
    ]


def test_errors_of_the_connector() -> None:
    assert response_of(502, [(b"Content-Length", b"0"), (b"X", b"y")], ResponseSource.CONNECTOR) == [
        (b":status", b"502"),
        (META, b'{"src":"cloudflared"}'),
        (b"content-length", b"0"),
    ]
    assert response_of(502, [], ResponseSource.FLOW_LIMITED) == [
        (b":status", b"502"),
        (META, b'{"src":"cloudflared","flow_rate_limited":true}'),
        (b"content-length", b"0"),
    ]


@pytest.mark.parametrize("upgrade", [b"control-stream", b"update-configuration"])
def test_control_and_configuration_responses_are_plain(upgrade: bytes) -> None:
    fields = [*POST, (UPGRADE, upgrade)]
    assert response_of(200, [], fields=fields) == [(b":status", b"200")]
    assert response_of(200, [(b"content-length", b"35")], fields=fields) == [
        (b":status", b"200"),
        (b"content-length", b"35"),
    ]
    assert response_of(502, [], ResponseSource.CONNECTOR, fields=fields) == [
        (b":status", b"502"),
        (META, b'{"src":"cloudflared"}'),
        (b"content-length", b"0"),
    ]


def test_tcp_responses() -> None:
    assert response_of(101, [], fields=[*POST, (SOURCE, b"x")]) == [
        (b":status", b"200"),
        (SERIALISED, b""),
        (META, b'{"src":"origin"}'),
    ]


def test_informational_responses_of_an_origin_are_left_out() -> None:
    wire = Wire()
    port = wire.open(1).port
    port.respond(103, [(b"link", b"x")])
    assert wire.take() == []
    port.respond(200, [])
    assert dict(wire.heads(wire.take())[0])[b":status"] == b"200"


def test_only_the_first_head_counts() -> None:
    wire = Wire()
    port = wire.open(1).port
    port.respond(200, [])
    port.respond(404, [])
    assert len(wire.take()) == 1


def test_large_heads_are_continued() -> None:
    wire = Wire()
    value = b"v" * 50_000
    wire.open(1, end=True).port.respond(200, [(b"x", value)])
    frames = wire.take()
    assert [frame[:3] for frame in frames] == [
        (HEADERS, 0, 1),
        *[(CONTINUATION, 0, 1)] * 3,
        (CONTINUATION, FLAG_END_HEADERS, 1),
    ]
    assert max(len(frame[3]) for frame in frames) == 16_384
    assert dict(wire.heads(frames)[0])[SERIALISED].startswith(b"WA:dnZ2")


def test_large_head_without_body_ends_on_its_first_frame() -> None:
    wire = Wire()
    port = wire.open(1, end=True).port
    port.respond(200, [(b"x", b"v" * 50_000)])
    port.write_eof()
    frames = wire.take()
    assert [frame[1] for frame in frames] == [FLAG_END_STREAM, 0, 0, 0, FLAG_END_HEADERS]


@pytest.mark.parametrize(
    ("fields", "status"),
    [([(b":method", b"HEAD"), *GET[1:]], 200), (GET, 204), (GET, 304), ([*GET, (UPGRADE, b"websocket")], 304)],
)
def test_responses_that_cannot_have_a_body_end_with_the_head(fields: list[tuple[bytes, bytes]], status: int) -> None:
    wire = Wire()
    port = wire.open(1, fields, end=True).port
    port.respond(status, [(b"Content-Length", b"1234")])
    port.write(b"no")
    port.write_eof()
    frames = wire.take()
    assert [frame[:3] for frame in frames] == [(HEADERS, FLAG_END_HEADERS | FLAG_END_STREAM, 1)]
    assert dict(wire.heads(frames)[0])[b"content-length"] == b"1234"
    assert wire.engine.open_streams == 0


def test_an_empty_response_is_one_frame() -> None:
    wire = Wire()
    port = wire.open(1, end=True).port
    port.respond(200, [])
    port.write_eof()
    assert [frame[:2] for frame in wire.take()] == [(HEADERS, FLAG_END_HEADERS | FLAG_END_STREAM)]


def test_end_on_its_own_once_the_head_is_gone() -> None:
    wire = Wire()
    port = wire.open(1, end=True).port
    port.respond(200, [])
    assert len(wire.take()) == 1
    port.write_eof()
    assert wire.take() == [(DATA, FLAG_END_STREAM, 1, b"")]


def test_small_writes_of_one_tick_share_a_frame_with_the_end() -> None:
    wire = Wire()
    port = wire.open(1, end=True).port
    port.respond(200, [])
    for part in (b"a", b"", b"bc", bytearray(b"d"), memoryview(b"ef")):
        port.write(part)
    port.write_eof()
    frames = wire.take()
    assert frames[1:] == [(DATA, FLAG_END_STREAM, 1, b"abcdef")]


def test_frames_in_between_end_the_joining() -> None:
    wire = Wire()
    first = wire.open(1).port
    second = wire.open(3).port
    first.respond(200, [])
    second.respond(200, [])
    first.write(b"a")
    first.write(b"b")
    second.write(b"c")
    first.write(b"d")
    second.write_eof()
    first.write(b"e")
    frames = wire.take()[2:]
    assert frames == [
        (DATA, 0, 1, b"ab"),
        (DATA, 0, 3, b"c"),
        (DATA, 0, 1, b"d"),
        (DATA, FLAG_END_STREAM, 3, b""),
        (DATA, 0, 1, b"e"),
    ]


def test_joined_frames_stay_within_the_frame_size() -> None:
    wire = Wire()
    port = wire.open(1).port
    port.respond(200, [])
    for _ in range(5):
        port.write(bytes(7_000))
    port.write(bytes(16_384))
    sizes = [len(frame[3]) for frame in wire.take()[1:]]
    assert sum(sizes) == 51_384
    assert max(sizes) <= 16_384


def test_written_buffers_may_be_reused_at_once() -> None:
    wire = Wire()
    port = wire.open(1).port
    port.respond(200, [])
    buffer = bytearray(b"abc")
    port.write(memoryview(buffer))
    wire.engine.pause_writing()
    port.write(memoryview(buffer)[:2])
    buffer[:] = b"xxx"
    buffer.extend(b"grow")  # no view of it is kept
    wire.engine.resume_writing()
    assert b"".join(frame[3] for frame in wire.take()[1:]) == b"abcab"


def test_writing_without_a_head_answers_200() -> None:
    wire = Wire()
    port = wire.open(1, [*POST, (UPGRADE, b"update-configuration")]).port
    port.write(b"{}")
    port.write_eof()
    frames = wire.take()
    assert wire.heads(frames[:1]) == [[(b":status", b"200")]]
    assert frames[1] == (DATA, FLAG_END_STREAM, 1, b"{}")


def test_ending_without_a_head_answers_200() -> None:
    wire = Wire()
    wire.open(1, end=True).port.write_eof()
    frames = wire.take()
    assert dict(wire.heads(frames)[0])[b":status"] == b"200"
    assert frames[0][1] & FLAG_END_STREAM


def test_trailers_are_lower_cased_sorted_and_filtered() -> None:
    wire = Wire()
    port = wire.open(1, end=True).port
    port.respond(200, [])
    port.write(b"hello")
    port.write_eof(
        [
            (b"X-Sum", b"42"),
            (b"Content-Length", b"5"),
            (b"Grpc-Status", b"0"),
            (b"bad name", b"x"),
            (b"X-Bad", b"a\r\nb"),
            (b"Transfer-Encoding", b"chunked"),
            (b":status", b"200"),
            (b"X-Sum", b"43"),
        ]
    )
    frames = wire.take()
    assert frames[1] == (DATA, 0, 1, b"hello")
    assert frames[2][:3] == (HEADERS, FLAG_END_HEADERS | FLAG_END_STREAM, 1)
    assert wire.heads(frames)[1] == [(b"grpc-status", b"0"), (b"x-sum", b"42"), (b"x-sum", b"43")]
    assert wire.engine.open_streams == 0


def test_trailers_that_are_all_invalid_are_no_trailers() -> None:
    wire = Wire()
    port = wire.open(1, end=True).port
    port.respond(200, [])
    port.write(b"x")
    port.write_eof([(b"content-length", b"1")])
    assert wire.take()[1:] == [(DATA, FLAG_END_STREAM, 1, b"x")]


def test_trailers_wait_for_queued_payload() -> None:
    wire = Wire(settings=[(4, 10)])
    port = wire.open(1, end=True).port
    port.respond(200, [])
    port.write(bytes(15))
    port.write_eof([(b"x-sum", b"1")])
    assert [(frame[0], len(frame[3])) for frame in wire.take()[1:]] == [(DATA, 10)]
    wire.feed(encode_frame(8, 0, 1, struct.pack(">I", 100)))
    frames = wire.take()
    assert [frame[:2] for frame in frames] == [(DATA, 0), (HEADERS, FLAG_END_HEADERS | FLAG_END_STREAM)]


# --- ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "wire_code"),
    [
        (ResetCode.FAILED, ErrorCode.INTERNAL_ERROR),
        (ResetCode.CANCELLED, ErrorCode.CANCEL),
        (ResetCode.REFUSED, ErrorCode.REFUSED_STREAM),
        (ResetCode.PROTOCOL, ErrorCode.PROTOCOL_ERROR),
    ],
)
def test_reset_codes(code: ResetCode, wire_code: ErrorCode) -> None:
    wire = Wire()
    sink = wire.open(1)
    sink.port.respond(200, [])
    wire.take()
    sink.port.reset(code)
    sink.port.reset(code)
    assert wire.take() == [rst(1, wire_code)]
    assert sink.calls == []
    for call in (lambda: sink.port.write(b"x"), sink.port.write_eof, sink.port.stop_reading):
        call()
    sink.port.consumed(5)
    sink.port.respond(200, [])
    assert wire.take() == []
    assert wire.engine.open_streams == 0


def test_half_close_of_the_edge_first() -> None:
    wire = Wire()
    sink = wire.open(1)
    wire.feed(wire.data(1, b"x", end=True))
    assert sink.calls == ["eof"]
    sink.port.respond(200, [])
    sink.port.write(b"later")
    assert wire.engine.open_streams == 1
    sink.port.write_eof()
    assert wire.engine.open_streams == 0


def test_half_close_of_the_connector_first() -> None:
    wire = Wire()
    sink = wire.open(1)
    sink.port.respond(200, [])
    sink.port.write_eof()
    assert wire.take()[-1][1] & FLAG_END_STREAM
    wire.feed(wire.data(1, b"still"))
    assert sink.data == b"still"
    assert wire.engine.open_streams == 1
    wire.feed(wire.data(1, b"", end=True))
    assert sink.calls == ["eof"]
    assert wire.engine.open_streams == 0


def test_reset_by_the_edge_once_and_also_after_eof() -> None:
    wire = Wire()
    sink = wire.open(1, end=True)
    wire.feed(encode_rst_stream(1, ErrorCode.CANCEL), encode_rst_stream(1, ErrorCode.CANCEL))
    assert sink.calls == ["eof", "reset"]
    assert "CANCEL" in str(sink.error)
    sink.port.respond(200, [])
    sink.port.write(b"x")
    assert wire.take() == []


def test_stop_reading_before_the_response_discards_until_it_is_out() -> None:
    wire = Wire()
    sink = wire.open(1)
    wire.feed(wire.data(1, b"wanted"))
    sink.port.stop_reading()
    wire.feed(wire.data(1, b"not wanted"))
    assert sink.data == b"wanted"
    assert wire.take() == []
    sink.port.respond(413, [])
    sink.port.write_eof()
    frames = wire.take()
    assert frames[0][1] & FLAG_END_STREAM
    assert frames[1:] == [rst(1, ErrorCode.NO_ERROR)]
    wire.feed(wire.data(1, b"in flight", end=True))
    assert wire.take() == []
    assert sink.calls == []


def test_stop_reading_after_the_response_resets_at_once() -> None:
    wire = Wire()
    sink = wire.open(1)
    sink.port.respond(200, [])
    sink.port.write_eof()
    wire.take()
    sink.port.stop_reading()
    assert wire.take() == [rst(1, ErrorCode.NO_ERROR)]
    assert wire.engine.open_streams == 0


def test_stop_reading_hears_of_no_end_but_of_resets() -> None:
    wire = Wire()
    sink = wire.open(1)
    sink.port.stop_reading()
    wire.feed(wire.data(1, b"x", end=True))
    assert sink.calls == []
    wire.feed(encode_rst_stream(1, 8))
    assert sink.calls == ["reset"]


def test_connection_lost_resets_every_stream_once() -> None:
    wire = Wire()
    sinks = [wire.open(stream_id) for stream_id in (1, 3, 5)]
    sinks[0].port.respond(200, [])
    error = ConnectionResetError("gone")
    wire.engine.connection_lost(error)
    wire.engine.connection_lost(None)
    for sink in sinks:
        assert sink.calls == ["reset"]
        assert sink.error is error
        sink.port.write(b"x")
        sink.port.consumed(1)
        sink.port.reset(ResetCode.FAILED)
    assert wire.engine.open_streams == 0
    assert wire.engine.bytes_queued == len(wire.engine.out)


@pytest.mark.parametrize("where", ["accept", "on_data", "on_eof", "on_reset", "pause_writing", "resume_writing"])
def test_a_sink_that_raises_loses_only_its_own_stream(where: str) -> None:
    failing = True

    class Faulty(Sink):
        def on_data(self, data: Buffer) -> None:
            super().on_data(data)
            self.fail("on_data")

        def on_eof(self) -> None:
            super().on_eof()
            self.fail("on_eof")

        def on_reset(self, error: BaseException | None) -> None:
            super().on_reset(error)
            self.fail("on_reset")

        def pause_writing(self) -> None:
            super().pause_writing()
            self.fail("pause_writing")

        def resume_writing(self) -> None:
            super().resume_writing()
            self.fail("resume_writing")

        def fail(self, place: str) -> None:
            if place == where and failing:
                raise ValueError(place)

    def make(request: Request, port: StreamPort) -> Sink:
        if where == "accept" and failing:
            raise ValueError("accept")
        return Faulty(request, port)

    wire = Wire(make, limits=H2Limits(stream_high_water=100, stream_low_water=10), settings=[(4, 50)])
    wire.feed(wire.headers(1, POST, end=False))
    if where == "on_data":
        wire.feed(wire.data(1, b"x", end=True))
    elif where == "on_eof":
        wire.feed(wire.data(1, b"", end=True))
    elif where == "on_reset":
        wire.feed(encode_rst_stream(1, 8))
    elif where in ("pause_writing", "resume_writing"):
        wire.sinks[0].port.write(bytes(500))
        wire.feed(encode_frame(8, 0, 1, struct.pack(">I", 1_000)))
    frames = wire.take()
    assert [str(error) for error in wire.errors] == [where]
    if where != "on_reset":
        assert rst(1, ErrorCode.INTERNAL_ERROR) in frames
    if where != "accept":
        assert wire.sinks[0].calls.count("reset") == 1
    assert wire.engine.open_streams == 0
    assert wire.engine.queued == 0
    failing = False
    sink = wire.open(3)
    wire.feed(wire.data(3, b"fine", end=True))
    assert sink.data == b"fine"
    assert sink.calls == ["eof"]


def test_ports_may_be_used_from_every_call_of_a_sink() -> None:
    class Hasty(Sink):
        def on_data(self, data: Buffer) -> None:
            super().on_data(data)
            self.port.reset(ResetCode.CANCELLED)

    wire = Wire(Hasty)
    sink = wire.open(1)
    wire.feed(wire.data(1, b"a") + wire.data(1, b"b") + wire.data(1, b"c", end=True))
    assert sink.data == b"a"
    assert sink.calls == []
    assert wire.take() == [rst(1, ErrorCode.CANCEL)]


def test_a_stream_answered_and_reset_within_accept() -> None:
    def make(request: Request, port: StreamPort) -> Sink:
        port.respond(502, [], ResponseSource.CONNECTOR)
        port.write_eof()
        port.reset(ResetCode.FAILED)
        return Sink(request, port)

    wire = Wire(make)
    sink = wire.open(1)
    wire.feed(wire.data(1, b"x", end=True))
    assert sink.calls == []
    assert [frame[0] for frame in wire.take()] == [HEADERS, RST_STREAM]


def test_a_link_lost_within_accept_or_a_call() -> None:
    class Closing(Sink):
        def on_data(self, data: Buffer) -> None:
            super().on_data(data)
            wire.engine.connection_lost(None)

    def make(request: Request, port: StreamPort) -> Sink:
        if request.method == b"GET":
            wire.engine.connection_lost(None)
        return Closing(request, port)

    wire = Wire(make)
    wire.feed(wire.headers(1), wire.headers(3))
    assert [sink.calls for sink in wire.sinks] == [["reset"]]
    wire = Wire(make)
    wire.open(1)
    wire.open(3)
    wire.feed(wire.data(1, b"x"), wire.data(3, b"x"), wire.headers(5, POST))
    assert [sink.calls for sink in wire.sinks] == [["reset"], ["reset"]]
    assert [bytes(sink.data) for sink in wire.sinks] == [b"x", b""]


def test_reprs_name_the_stream() -> None:
    wire = Wire()
    port = wire.open(1).port
    assert repr(port) == "<H2Stream 1 HTTP>"
    port.reset(ResetCode.FAILED)
    assert repr(port) == "<H2Stream 1 HTTP closed>"
    assert "streams" in repr(wire.engine)
