"""Tracing: which contexts count, what the spans say, and that the header goes back over both transports' ports."""

from __future__ import annotations

import base64

import pytest

from connector.app.tracing import MAX_SPANS, Trace, resource_attributes, trace_request
from connector.wire.otlp import ERROR, OK, UNSET, decode_spans
from tests.proxy.rig import rig
from tests.support.aio import run
from tests.support.memory_port import MemoryPort
from tests.support.memory_port import request as make_request
from tests.support.raw_origin import RawOrigin, answering

CONTEXT = b"0123456789abcdeffedcba9876543210:0011223344556677:0:1"


def made(context: bytes, *, text: bool = False) -> Trace:
    trace = trace_request(context, text=text)
    assert trace is not None
    return trace


def test_a_sampled_context_is_the_parent() -> None:
    trace = made(CONTEXT)
    trace.matched(b"app.example.com", 3)
    value = trace.answered(204)
    match, ttfb = decode_spans(base64.b64decode(value))
    assert match.trace_id.hex() == "0123456789abcdeffedcba9876543210"
    assert match.parent_id.hex() == ttfb.parent_id.hex() == "0011223344556677"
    assert (match.name, match.attributes) == ("ingress_match", (("req-host", "app.example.com"), ("rule-num", 3)))
    assert (ttfb.name, ttfb.attributes) == ("ttfb_origin", (("upstreamStatusCode", 204),))
    assert (match.status, ttfb.status) == (UNSET, OK)
    assert match.start <= match.end == ttfb.start <= ttfb.end
    assert match.flags == ttfb.flags == 0x301
    assert match.span_id != ttfb.span_id
    assert trace.spans() == b""  # given once
    assert dict(resource_attributes())["service.name"] == "cloudflared"


@pytest.mark.parametrize("flags", [b"0", b"2"])
def test_an_unsampled_context_is_not_recorded(flags: bytes) -> None:
    assert trace_request(CONTEXT[:-1] + flags) is None


@pytest.mark.parametrize(
    "context",
    [b"x", b"1:2:3", CONTEXT.replace(b"0011", b"zzzz"), b"abc" + CONTEXT[32:], b"0" * 32 + CONTEXT[32:],
     CONTEXT + b":1", CONTEXT[:-1]],
)  # fmt: skip
def test_a_context_that_cannot_be_read_gives_a_trace_of_its_own(context: bytes) -> None:
    trace = made(context)
    trace.matched(b"h", 0)
    trace.end("again")
    one, two = decode_spans(trace.spans())
    assert one.parent_id == b""
    assert one.flags == 0x101
    assert len(one.trace_id) == 16
    assert one.trace_id != two.trace_id


def test_short_ids_are_padded() -> None:
    half = CONTEXT[16:]
    for trace in (made(half), made(half, text=True), made(b"abc" + CONTEXT[32:], text=True)):
        trace.end("x")
        (span,) = decode_spans(trace.spans())
        assert span.trace_id[:8] == bytes(8)
        assert span.parent_id.hex() == "0011223344556677"
    for nothing in (b"x", b"1:2:3", b":1:2:1"):
        assert trace_request(nothing, text=True) is None


def test_spans_and_error_texts_are_bounded() -> None:
    trace = made(CONTEXT)
    for _ in range(MAX_SPANS + 5):
        trace.end("x", error="é" * 80)
    spans = decode_spans(trace.spans())
    assert len(spans) == MAX_SPANS
    assert (spans[0].status, spans[0].message) == (ERROR, "é" * 50)


def test_a_traced_request_through_the_dispatcher() -> None:
    async def main() -> None:
        answer = b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\nok"
        async with RawOrigin(answering(answer)) as origin, rig(origin.url) as it:
            it.dispatcher.tracing = trace_request
            for context, names in ((CONTEXT, ["ingress_match", "ttfb_origin"]), (CONTEXT[:-1] + b"0", []), (b"", [])):
                asked = make_request()
                asked.trace = context
                port = MemoryPort()
                port.sink = it.dispatcher.accept(asked, port)
                await port.whole()
                assert [span.name for span in decode_spans(base64.b64decode(port.spans))] == names
        async with rig("http_status:404") as it:
            it.dispatcher.tracing = trace_request
            asked = make_request()
            asked.trace = CONTEXT
            port = MemoryPort()
            it.dispatcher.accept(asked, port)
            assert dict(decode_spans(base64.b64decode(port.spans))[1].attributes) == {"upstreamStatusCode": 404}

    run(main())
