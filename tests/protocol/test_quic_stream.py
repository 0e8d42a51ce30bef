"""QUIC streams without I/O: opening, bodies, ends, credit, pausing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connector.protocol.ports import (
    Buffer,
    Request,
    RequestKind,
    ResetCode,
    ResponseSource,
    StreamPort,
    StreamSink,
)
from connector.protocol.quic_limits import QuicLimits
from connector.protocol.quic_request import DATA_PREAMBLE, FLOW_LIMITED, RPC_SIGNATURE, RequestError, decode_connect
from connector.protocol.quic_streams import QuicStreams
from connector.wire.connect import ConnectRequest, decode_connect_response, encode_connect_request
from tests.support.vectors import vector

SID = 1


class Wire:
    """A QuicSender that writes down what it is told."""

    def __init__(self) -> None:
        self.sent: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.log: list[tuple[str, int]] = []
        self.credited: dict[int, int] = {}
        self.waiting: dict[int, int] = {}
        self.refusing: set[int] = set()

    def send(self, stream_id: int, data: Buffer, fin: bool) -> bool:
        if stream_id in self.refusing:
            return False
        assert stream_id not in self.ended, "data after FIN"
        self.sent.setdefault(stream_id, bytearray()).extend(data)
        self.waiting[stream_id] = self.waiting.get(stream_id, 0) + len(data)
        if fin:
            self.ended.add(stream_id)
            self.log.append(("fin", stream_id))
        return True

    def reset_stream(self, stream_id: int) -> None:
        self.log.append(("reset", stream_id))

    def stop_stream(self, stream_id: int) -> None:
        self.log.append(("stop", stream_id))

    def queued(self, stream_id: int) -> int:
        return self.waiting.get(stream_id, 0)

    def queued_total(self) -> int:
        return sum(self.waiting.values())

    def credit(self, stream_id: int, n: int) -> None:
        self.credited[stream_id] = self.credited.get(stream_id, 0) + n


class Sink:
    """Records; `eager` consumes at once."""

    def __init__(self, port: StreamPort, *, eager: bool = True) -> None:
        self.port = port
        self.eager = eager
        self.data = bytearray()
        self.calls: list[str] = []

    def on_data(self, data: Buffer) -> None:
        assert "eof" not in self.calls
        assert "reset" not in self.calls
        self.data += data
        if self.eager:
            self.port.consumed(len(data))

    def on_eof(self) -> None:
        assert "eof" not in self.calls
        self.calls.append("eof")

    def on_reset(self, error: BaseException | None) -> None:
        self.calls.append("reset")

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")


class Rig:
    def __init__(
        self,
        *,
        limits: QuicLimits | None = None,
        eager: bool = True,
        on_accept: Callable[[Request, StreamPort], StreamSink] | None = None,
        by_stream: bool = False,
        rpc: bool = False,
    ) -> None:
        self.wire = Wire()
        self.requests: list[Request] = []
        self.sinks: list[Sink] = []
        self.rpc: list[Sink] = []
        self.errors: list[str] = []
        self.wakes = 0
        self.eager = eager
        self.on_accept = on_accept
        self.streams = QuicStreams(
            self.wire,
            self.accept,
            wake=self.wake,
            limits=limits or QuicLimits(),
            accept_rpc=self.accept_rpc if rpc else None,
            on_malformed=self.errors.append,
            on_sink_error=lambda error: self.errors.append(repr(error)),
            credit_by_stream=by_stream,
        )

    def wake(self) -> None:
        self.wakes += 1

    def accept(self, request: Request, port: StreamPort) -> StreamSink:
        self.requests.append(request)
        if self.on_accept is not None:
            return self.on_accept(request, port)
        self.sinks.append(Sink(port, eager=self.eager))
        return self.sinks[-1]

    def accept_rpc(self, port: StreamPort) -> StreamSink:
        self.rpc.append(Sink(port))
        return self.rpc[-1]

    def open(
        self,
        *metadata: tuple[bytes, bytes],
        kind: int = 0,
        dest: bytes = b"/",
        body: bytes = b"",
        fin: bool = False,
        sid: int = SID,
    ) -> None:
        self.streams.receive_data(sid, DATA_PREAMBLE + encode_connect_request(kind, dest, metadata) + body, fin)

    @property
    def port(self) -> StreamPort:
        return self.sinks[-1].port

    @property
    def sink(self) -> Sink:
        return self.sinks[-1]

    def response(self, sid: int = SID) -> tuple[bytes, list[tuple[bytes, bytes]], bytes]:
        data = bytes(self.wire.sent[sid])
        assert data.startswith(DATA_PREAMBLE)
        size = 16 + 8 * int.from_bytes(data[12:16], "little")
        response = decode_connect_response(data[8:size])
        return response.error, list(response.metadata), data[size:]


def header(name: str, value: str) -> tuple[bytes, bytes]:
    return f"HttpHeader:{name}".encode(), value.encode()


def test_golden_get_and_answer() -> None:
    rig = Rig()
    rig.streams.receive_data(SID, vector("quic_connect_request_get"), False)
    request = rig.requests[0]
    assert (request.kind, request.method, request.host) == (RequestKind.HTTP, b"GET", b"example.com")
    assert (request.target, request.scheme, request.content_length) == (b"/hi?x=1", b"http", 0)
    assert request.headers == [(b"accept", b"*/*")]
    assert rig.sink.calls == ["eof"]  # without a body the request is whole, FIN or not
    rig.port.respond(200, ((b"content-type", b"text/plain"),))
    assert bytes(rig.wire.sent[SID]) == vector("quic_connect_response_200")
    rig.port.write(b"hello")
    rig.port.write_eof()
    assert rig.response()[2] == b"hello"
    assert rig.wire.log == [("stop", SID), ("fin", SID)]
    assert not rig.streams.streams


def test_traffic_and_spans() -> None:
    rig = Rig()
    rig.open((b"HttpMethod", b"POST"), header("Cf-Trace-Id", "t"), header("Transfer-Encoding", "chunked"), body=b"abc")
    assert rig.requests[0].trace == b"t"
    assert rig.requests[0].headers == []
    rig.port.spans = b"c3BhbnM="
    rig.port.respond(200, ((b"a", b"b"),))
    rig.port.write(b"hello")
    assert rig.port.traffic() == (3, 5)
    assert (b"HttpHeader:Cf-Int-Cloudflared-Tracing", b"c3BhbnM=") in rig.response()[1]


def test_spans_of_a_tcp_stream() -> None:
    rig = Rig()
    rig.open((b"cf-trace-id", b"t"), kind=2, dest=b"10.0.0.1:22")
    assert rig.requests[0].trace == b"t"
    rig.port.spans = b"c3BhbnM="
    rig.port.respond(200, ())
    assert rig.response()[1] == [(b"Cf-Int-Cloudflared-Tracing", b"c3BhbnM=")]


def test_tcp() -> None:
    rig = Rig()
    rig.open((b"FlowID", b"a"), (b"FlowID", b"b"), kind=2, dest=b"10.0.0.1:22", body=b"SSH")
    assert rig.requests[0].kind is RequestKind.TCP
    assert rig.requests[0].host == b"10.0.0.1:22"
    assert rig.requests[0].headers == [(b"flowid", b"b")]
    assert bytes(rig.sink.data) == b"SSH"
    rig.port.respond(200, ())
    assert bytes(rig.wire.sent[SID]) == vector("quic_connect_response_tcp_ack")
    rig.streams.receive_data(SID, b"", True)
    rig.port.write_eof()
    assert rig.wire.log == [("fin", SID)]


@given(st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_cuts_anywhere(rng: random.Random) -> None:
    whole, cut = Rig(), Rig()
    body = bytes(range(200))
    data = DATA_PREAMBLE + encode_connect_request(0, b"/x", (header("Content-Length", "200"),)) + body
    whole.streams.receive_data(SID, data, True)
    position = 0
    while position < len(data):
        size = rng.choice((1, 1, 2, 7, 50))
        cut.streams.receive_data(SID, data[position : position + size], position + size >= len(data))
        position += size
    for rig in (whole, cut):
        assert bytes(rig.sink.data) == body
        assert rig.sink.calls == ["eof"]
        assert rig.streams.preambles == rig.streams.lent == 0


# --- bodies (3.2) ----------------------------------------------------------------------------------------------------


def test_no_length_means_no_body() -> None:
    rig = Rig()
    rig.open(body=b"ignored")
    assert rig.sink.calls == ["eof"]
    assert not rig.sink.data
    assert rig.wire.credited[SID] >= len(b"ignored")


def test_content_length_ends_the_body_without_fin() -> None:
    rig = Rig()
    rig.open(header("Content-Length", "3"), body=b"ab")
    assert rig.sink.calls == []
    rig.streams.receive_data(SID, b"cXX", False)
    assert bytes(rig.sink.data) == b"abc"
    assert rig.sink.calls == ["eof"]
    assert rig.requests[0].headers == [(b"content-length", b"3")]


def test_short_body_is_an_error() -> None:
    rig = Rig()
    rig.open(header("Content-Length", "3"), body=b"ab", fin=True)
    assert rig.sink.calls == ["reset"]
    assert ("reset", SID) in rig.wire.log


def test_chunked_runs_to_fin_and_wins_over_a_length() -> None:
    rig = Rig()
    rig.open(header("Transfer-Encoding", "gzip, Chunked"), header("Content-Length", "1"), body=b"abc")
    assert rig.requests[0].content_length == -1
    assert rig.requests[0].headers == []
    rig.streams.receive_data(SID, b"def", True)
    assert bytes(rig.sink.data) == b"abcdef"
    assert rig.sink.calls == ["eof"]


def test_websocket_body_is_never_suppressed_and_101_stays_101() -> None:
    rig = Rig()
    rig.open(header("Sec-WebSocket-Key", "k"), header("Upgrade", "websocket"), header("Connection", "Upgrade"), kind=1)
    assert rig.requests[0].headers == [(b"sec-websocket-key", b"k")]
    assert rig.requests[0].content_length == -1
    rig.port.respond(101, ((b"upgrade", b"websocket"), (b"cf-int-x", b"y")))
    assert rig.response()[1] == [
        (b"HttpStatus", b"101"),
        (b"HttpHeader:Upgrade", b"websocket"),
        (b"HttpHeader:Cf-Int-X", b"y"),
    ]
    rig.streams.receive_data(SID, b"frame", False)
    rig.port.write(b"frame")
    assert bytes(rig.sink.data) == b"frame"


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dest", "expected"),
    [
        (b"/a?b", (b"https", b"h", b"/a?b")),
        (b"https://app.example.com/a", (b"https", b"h", b"/a")),
        (b"http://u:p@app.example.com:8080?q#f", (b"http", b"h", b"/?q")),
        (b"wss://x", (b"https", b"h", b"/")),
        (b"*", (b"https", b"h", b"*")),
        (b"/a b\tc", (b"https", b"h", b"/a%20b%09c")),
    ],
)
def test_destinations(dest: bytes, expected: tuple[bytes, bytes, bytes]) -> None:
    request = decode_connect(ConnectRequest(0, dest, [(b"HttpHost", b"h")]))
    assert (request.scheme, request.host, request.target) == expected


def test_host_falls_back_to_the_url_and_then_to_the_header() -> None:
    assert decode_connect(ConnectRequest(0, b"https://u@a.example:1/")).host == b"a.example:1"
    assert decode_connect(ConnectRequest(0, b"/", [header("Host", "b.example")])).host == b"b.example"


def test_last_values_count_and_cookies_are_joined() -> None:
    metadata = [
        (b"HttpMethod", b"PUT"), (b"HttpMethod", b"POST"), (b"HttpHost", b"x"), (b"HttpHost", b"y"),
        header("Cookie", "a=1"), header("X-A", "1"), header("Cookie", "b=2"), header("X-A", "2"),
        (b"cf-trace-id", b"t1"), (b"cf-trace-id", b"t2"),
        header("Cf-Cloudflared-Proxy-Connection-Upgrade", "websocket"), header("TE", "gzip"), header("Te", "Trailers"),
        header("Expect", "100-continue"), (b"Unknown", b"z"),
    ]  # fmt: skip
    request = decode_connect(ConnectRequest(0, b"/", metadata))
    assert (request.method, request.host) == (b"POST", b"y")
    assert request.headers == [
        (b"x-a", b"1"), (b"x-a", b"2"), (b"te", b"trailers"), (b"cookie", b"a=1; b=2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "dest", "metadata", "words"),
    [
        (0, b"/", [(b"HttpHeader:a:b", b"c")], "malformed"),
        (0, b"/", [(b"HttpHeader", b"c")], "malformed"),
        (0, b"/", [(b"HttpHeader:a b", b"c")], "token"),
        (0, b"/", [(b"HttpHeader:a", b"c\r\nX: y")], "control"),
        (0, b"/", [header("Content-Length", "-1")], "content-length"),
        (0, b"/", [header("Content-Length", "1"), header("Content-Length", "2")], "content-length"),
        (0, b"/", [(b"HttpMethod", b"G T")], "method"),
        (0, b"/", [(b"HttpHost", b"a b")], "host"),
        (0, b"example.com/", [], "URL"),
        (0, b"ftp://x/", [], "URL"),
        (0, b"http:///x", [], "no host"),
        (0, b"/a\nb", [], "control"),
        (2, b"", [], "TCP"),
        (9, b"/", [], "type 9"),
    ],
)
def test_bad_requests_are_answered_with_their_error(
    kind: int, dest: bytes, metadata: list[tuple[bytes, bytes]], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        decode_connect(ConnectRequest(kind, dest, metadata))
    rig = Rig()
    rig.open(*metadata, kind=kind, dest=dest)
    error, fields, body = rig.response()
    assert words in error.decode()
    assert (fields, body) == ([], b"")
    assert rig.wire.log == [("stop", SID), ("fin", SID)]
    assert not rig.requests
    assert len(rig.errors) == 1
    assert not rig.streams.streams


# --- responses -------------------------------------------------------------------------------------------------------


def test_failures_before_a_response() -> None:
    rig = Rig()
    rig.open()
    rig.port.respond(502, (), ResponseSource.CONNECTOR)
    rig.port.write(b"never sent")
    rig.port.write_eof()
    error, metadata, body = rig.response()
    assert error
    assert (metadata, body) == ([], b"")


@pytest.mark.parametrize("options", [{}, {"kind": 2, "dest": b"10.0.0.1:22"}])
def test_why_a_request_failed_is_told(options: dict[str, Any]) -> None:
    rig = Rig()
    rig.open(**options)
    rig.port.respond(502, (), ResponseSource.CONNECTOR, b"nobody there")
    rig.port.write_eof()
    assert rig.response() == (b"nobody there", [], b"")


def test_flow_limit_is_marked() -> None:
    rig = Rig()
    rig.open(kind=2, dest=b"10.0.0.1:22")
    rig.port.respond(502, (), ResponseSource.FLOW_LIMITED)
    rig.port.write_eof()
    assert rig.response()[:2] == (FLOW_LIMITED, [(b"FlowConnectRateLimited", b"true")])


def test_an_origins_502_is_a_response() -> None:
    rig = Rig()
    rig.open()
    rig.port.respond(103, ())
    rig.port.respond(502, ((b"x", b"y"),))
    rig.port.respond(200, ())
    rig.port.write(b"oops")
    assert rig.response() == (b"", [(b"HttpStatus", b"502"), (b"HttpHeader:X", b"y")], b"oops")


@pytest.mark.parametrize(("method", "status"), [(b"HEAD", 200), (b"GET", 204), (b"GET", 304)])
def test_responses_without_body(method: bytes, status: int) -> None:
    rig = Rig()
    rig.open((b"HttpMethod", method))
    rig.port.respond(status, ((b"content-length", b"5"),))
    rig.port.write(b"12345")
    rig.port.write_eof()
    assert rig.response()[2] == b""
    assert SID in rig.wire.ended


# --- ends ------------------------------------------------------------------------------------------------------------


def test_reset_after_the_response_began() -> None:
    rig = Rig()
    rig.open(header("Content-Length", "3"))
    rig.port.respond(200, ())
    rig.port.reset(ResetCode.FAILED)
    assert rig.wire.log == [("stop", SID), ("reset", SID)]
    rig.port.write(b"x")
    rig.port.write_eof()
    rig.port.reset(ResetCode.FAILED)
    rig.port.consumed(1)
    assert rig.wire.log == [("stop", SID), ("reset", SID)]
    assert rig.sink.calls == []


@pytest.mark.parametrize("event", ["receive_reset", "receive_stop"])
def test_the_edge_gives_up(event: str) -> None:
    rig = Rig()
    rig.open(kind=1)
    rig.port.respond(101, ())
    getattr(rig.streams, event)(SID)
    assert rig.sink.calls == ["reset"]
    assert ("reset", SID) in rig.wire.log
    rig.streams.receive_data(SID, b"late", False)
    assert not rig.sink.data
    assert not rig.streams.streams


def test_stop_sending_after_the_whole_response_leaves_the_request_alone() -> None:
    rig = Rig()
    rig.open(header("Content-Length", "3"), body=b"a")
    rig.port.respond(200, ())
    rig.port.write_eof()
    rig.streams.receive_stop(SID)
    assert rig.sink.calls == []
    rig.streams.receive_data(SID, b"bc", True)
    assert rig.sink.calls == ["eof"]
    assert not rig.streams.streams


def test_stop_reading() -> None:
    rig = Rig(eager=False)
    rig.open(header("Content-Length", "100"), body=b"a" * 10)
    assert rig.streams.lent == 10
    rig.port.stop_reading()
    assert rig.wire.log == [("stop", SID)]
    assert rig.streams.lent == 0
    rig.port.consumed(10)
    assert rig.streams.lent == 0
    rig.streams.receive_data(SID, b"b" * 10, False)
    assert len(rig.sink.data) == 10
    rig.port.respond(200, ())
    rig.port.write_eof()
    assert not rig.streams.streams


def test_half_close() -> None:
    rig = Rig()
    rig.open(kind=1)
    rig.port.respond(101, ())
    rig.port.write_eof()
    assert rig.wire.log == [("fin", SID)]
    rig.streams.receive_data(SID, b"still", True)
    assert bytes(rig.sink.data) == b"still"
    assert rig.sink.calls == ["eof"]
    assert not rig.streams.streams


def test_unknown_signature_and_short_streams() -> None:
    rig = Rig()
    rig.streams.receive_data(1, b"GET / HTTP/1.1\r\n", False)
    assert rig.wire.log == [("stop", 1), ("reset", 1)]
    rig.streams.receive_data(5, b"\x0a\x36", True)
    assert rig.wire.log[2:] == [("reset", 5)]
    rig.streams.receive_data(9, DATA_PREAMBLE, True)
    assert rig.response(9)[0]
    assert not rig.streams.streams
    assert rig.streams.preambles == 0


def test_preambles_are_bounded() -> None:
    rig = Rig(limits=QuicLimits(max_preamble=5_000))
    start = DATA_PREAMBLE + encode_connect_request(0, b"/" + b"x" * 9_000)[:4_000]
    rig.streams.receive_data(1, start, False)
    assert not rig.wire.log
    rig.streams.receive_data(5, start, False)
    assert rig.wire.log == [("stop", 5), ("reset", 5)]
    rig.streams.receive_reset(1)
    assert rig.streams.preambles == 0


def test_streams_are_new_once_and_in_any_order() -> None:
    rig = Rig()
    for sid in (9, 1, 5, 9, 1, 13):
        rig.open(sid=sid)
        for port in [sink.port for sink in rig.sinks]:
            port.reset(ResetCode.FAILED)
    assert len(rig.requests) == 4
    rig.open(sid=0)
    rig.open(sid=3)
    assert len(rig.requests) == 4
    rig.streams.receive_reset(17)
    rig.open(sid=17)
    assert len(rig.requests) == 4


def test_rpc_streams() -> None:
    rig = Rig(rpc=True)
    rig.streams.receive_data(SID, RPC_SIGNATURE[:3], False)
    rig.streams.receive_data(SID, RPC_SIGNATURE[3:] + b"rpc", False)
    sink = rig.rpc[0]
    assert bytes(sink.data) == b"rpc"
    sink.port.respond(200, ())
    sink.port.write(b"answer")
    assert bytes(rig.wire.sent[SID]) == b"answer"
    rig.streams.receive_data(SID, b"", True)
    sink.port.write_eof()
    assert not rig.streams.streams
    nobody = Rig()
    nobody.streams.receive_data(SID, RPC_SIGNATURE, False)
    assert nobody.wire.log == [("stop", SID), ("reset", SID)]


def test_the_end_of_the_connection_reaches_every_sink() -> None:
    rig = Rig(eager=False)
    rig.open(kind=1, body=b"x", sid=1)
    rig.open(kind=1, sid=5)
    rig.streams.connection_lost(None)
    assert [sink.calls for sink in rig.sinks] == [["reset"], ["reset"]]
    assert rig.streams.lent == 0
    log = list(rig.wire.log)
    for sink in rig.sinks:
        sink.port.respond(200, ())
        sink.port.write(b"x")
        sink.port.reset(ResetCode.FAILED)
    assert rig.wire.log == log
    assert not rig.wire.sent


def test_sinks_and_acceptors_that_raise_cost_one_stream() -> None:
    def bad_accept(request: Request, port: StreamPort) -> StreamSink:
        raise RuntimeError("acceptor")

    rig = Rig(on_accept=bad_accept)
    rig.open()
    assert rig.errors == ["RuntimeError('acceptor')"]
    assert ("reset", SID) in rig.wire.log
    rig = Rig()
    rig.open(kind=1)
    rig.sink.on_data = lambda data: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    rig.streams.receive_data(SID, b"x", False)
    assert rig.sink.calls == ["reset"]
    assert rig.streams.lent == 0


# --- flow ------------------------------------------------------------------------------------------------------------


def test_receiving_stops_and_goes_on() -> None:
    rig = Rig(limits=QuicLimits(receive_high_water=100, receive_low_water=60), eager=False)
    resumed: list[bool] = []
    rig.streams.on_resume(lambda: resumed.append(True))
    rig.open(kind=1, body=b"a" * 50)
    assert not rig.streams.receive_paused
    rig.streams.receive_data(SID, b"b" * 50, False)
    assert rig.streams.receive_paused
    rig.port.consumed(39)
    assert rig.streams.receive_paused
    rig.port.consumed(1)
    assert not rig.streams.receive_paused
    assert resumed == [True]
    assert SID not in rig.wire.credited or rig.wire.credited[SID] < 200  # only the preamble


def test_an_engine_with_credit_by_stream_is_never_stopped() -> None:
    rig = Rig(limits=QuicLimits(receive_high_water=100, receive_low_water=60), eager=False, by_stream=True)
    rig.open(kind=1)
    before = rig.wire.credited[SID]
    rig.streams.receive_data(SID, b"b" * 500, False)
    assert not rig.streams.receive_paused
    assert rig.wire.credited[SID] == before
    rig.port.consumed(200)
    assert rig.wire.credited[SID] == before + 200
    rig.port.reset(ResetCode.FAILED)
    assert rig.wire.credited[SID] == before + 500


def test_the_stalled_stream_is_the_one_that_holds_most() -> None:
    rig = Rig(limits=QuicLimits(receive_high_water=100), eager=False)
    rig.open(kind=1, body=b"a" * 10, sid=1)
    rig.open(kind=1, body=b"b" * 100, sid=5)
    assert rig.streams.receive_paused
    stalled = rig.streams.reset_stalled()
    assert stalled is not None
    assert stalled.stream_id == 5
    assert rig.sinks[1].calls == ["reset"]
    assert not rig.streams.receive_paused
    assert rig.streams.lent == 10


def test_slow_eyeballs_pause_their_origin() -> None:
    limits = QuicLimits(stream_high_water=1_000, stream_low_water=100)
    rig = Rig(limits=limits)
    rig.open(kind=1)
    rig.port.respond(101, ())
    rig.wire.waiting[SID] = 0
    for _ in range(12):
        rig.port.write(b"x" * 100)
    assert rig.sink.calls == ["pause"]
    rig.wire.waiting[SID] = 101
    rig.streams.flushed()
    assert rig.sink.calls == ["pause"]
    rig.wire.waiting[SID] = 100
    rig.streams.flushed()
    assert rig.sink.calls == ["pause", "resume"]
    # What was sent meanwhile does not count: measuring finds out.
    for _ in range(50):
        rig.port.write(b"x" * 100)
        rig.wire.waiting[SID] = 0
    assert rig.sink.calls == ["pause", "resume"]


def test_a_crowd_of_slow_eyeballs_gets_less_each() -> None:
    limits = QuicLimits(stream_high_water=1_000, stream_low_water=100, queue_high_water=5_000, crowded_high_water=50)
    rig = Rig(limits=limits)
    for number in range(20):
        rig.open(kind=1, sid=1 + 4 * number)
        rig.port.respond(101, ())
        rig.wire.waiting[1 + 4 * number] = 0
    for _ in range(30):
        for sink in rig.sinks:
            if "pause" not in sink.calls:
                sink.port.write(b"x" * 100)
    assert all(sink.calls == ["pause"] for sink in rig.sinks)
    assert rig.wire.queued_total() < 5_000 + 20 * 1_100


def test_a_peer_that_stopped_costs_nothing() -> None:
    rig = Rig()
    rig.open(kind=1)
    rig.port.respond(101, ())
    rig.wire.refusing.add(SID)
    for _ in range(3):
        rig.port.write(b"x" * 1_000_000)
    assert rig.sink.calls == []
    rig.streams.receive_stop(SID)
    assert rig.sink.calls == ["reset"]


def test_one_wake_per_flush() -> None:
    rig = Rig()
    rig.open(kind=1)
    rig.port.respond(101, ())
    for _ in range(5):
        rig.port.write(b"x")
    assert rig.wakes == 1
    rig.streams.flushed()
    rig.port.write(b"x")
    assert rig.wakes == 2


def test_measuring_everything_is_rare() -> None:
    """It takes time per open stream, so neither small messages nor one slow eyeball may cause it."""
    rig = Rig()
    totals: list[int] = []
    rig.wire.queued_total = lambda: totals.append(1) or 0  # type: ignore[assignment, method-assign, func-returns-value]
    rig.open(kind=1)
    rig.port.respond(101, ())
    while not rig.sink.calls:
        rig.port.write(b"x" * 10_000)
    for _ in range(100):
        rig.streams.flushed()
    for _ in range(100):
        rig.port.write(b"x" * 128)
    assert rig.sink.calls == ["pause"]
    assert not totals
