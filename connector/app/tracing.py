"""Traces of single requests, for which the edge attached a context: spans go back with the response.

Owns: the context's format, IDs and clocks of spans, the resource's attributes. In: a context, moments of a request.
Out: encoded spans, base64 for headers. Never: sends anything by itself; costs a request without a context anything.
"""

from __future__ import annotations

import base64
import os
import platform
import socket
import sys
import time
from functools import cache

from connector import __version__
from connector.wire.otlp import (
    ERROR,
    HAS_IS_REMOTE,
    IS_REMOTE,
    OK,
    SAMPLED,
    UNSET,
    Attribute,
    Span,
    encode_spans,
)

MAX_SPANS = 20
"""Spans kept per request; later ones are dropped, as in cloudflared."""

MAX_DESCRIPTION = 100
"""Bytes of an error's text in a span, as in cloudflared."""

_HEX = frozenset("0123456789abcdefABCDEF")
_TRACE_DIGITS = 32
_SPAN_DIGITS = 16


def trace_request(context: bytes, *, text: bool = False) -> Trace | None:
    """Give the trace of a request, or None when it is not sampled (or, as text, no context at all).

    `text`: the context came as a string (TCP, UDP, ICMP), not as an HTTP header: shorter IDs are padded then. A context
    that cannot be read is traced without a parent.
    """
    parts = context.decode("latin-1").split(":")
    if text:
        if len(parts) != 4 or not parts[0]:
            return None
        parts[0] = parts[0].rjust(_TRACE_DIGITS, "0")
    parent = _parent(parts)
    if parent is None:
        return Trace(b"", b"")
    trace_id, span_id, sampled = parent
    return Trace(trace_id, span_id) if sampled else None


def _parent(parts: list[str]) -> tuple[bytes, bytes, bool] | None:
    """Give trace ID, span ID and whether it is sampled; None for what is no context."""
    if len(parts) != 4:
        return None
    trace, span, _, flags = parts
    if len(trace) == _SPAN_DIGITS:
        trace = trace.rjust(_TRACE_DIGITS, "0")
    if len(trace) != _TRACE_DIGITS or len(span) != _SPAN_DIGITS or not _HEX.issuperset(trace + span + flags):
        return None
    trace_id, span_id = bytes.fromhex(trace), bytes.fromhex(span)
    if not any(trace_id) or not any(span_id) or not flags:
        return None
    return trace_id, span_id, bool(int(flags[-1], 16) & SAMPLED)


class Trace:
    """The spans of one request; implements RequestTrace. `spans` empties it."""

    __slots__ = ("_began", "_ended", "_parent", "_trace_id")

    def __init__(self, trace_id: bytes, parent: bytes) -> None:
        self._trace_id = trace_id
        self._parent = parent
        self._began = time.time_ns()
        self._ended: list[Span] = []

    def matched(self, host: bytes, rule: int) -> None:
        """End the look-up of the rule; what follows is the origin's time."""
        self.end("ingress_match", (("req-host", host.decode("latin-1")), ("rule-num", rule)))

    def answered(self, status: int) -> bytes:
        """End the wait for the origin; give the header's value."""
        self.end("ttfb_origin", (("upstreamStatusCode", status),), status=OK)
        return self.base64()

    def connected(self) -> bytes:
        """End the connecting of a TCP-like service; give the header's value."""
        self.end("stream-connect")
        return self.base64()

    def end(self, name: str, attributes: tuple[Attribute, ...] = (), *, status: int = UNSET, error: str = "") -> None:
        """End a span that began where the last one ended. An `error` makes its status one."""
        now = time.time_ns()
        began, self._began = self._began, now
        if len(self._ended) >= MAX_SPANS:
            return
        flags = SAMPLED | HAS_IS_REMOTE | (IS_REMOTE if self._parent else 0)
        message = error.encode()[:MAX_DESCRIPTION].decode("utf-8", "ignore")
        self._ended.append(
            Span(
                trace_id=self._trace_id or os.urandom(16),
                span_id=os.urandom(8),
                parent_id=self._parent,
                name=name,
                start=began,
                end=now,
                attributes=attributes,
                status=ERROR if error else status,
                message=message,
                flags=flags,
            )
        )

    def spans(self) -> bytes:
        """Give the ended spans as OTLP, empty when there are none; they are given once."""
        ended, self._ended = self._ended, []
        return encode_spans(ended, resource_attributes()) if ended else b""

    def base64(self) -> bytes:
        """Give `spans` for a header."""
        return base64.b64encode(self.spans())


@cache
def resource_attributes() -> tuple[Attribute, ...]:
    """Give what every span says of this process; names are cloudflared's, so that the edge's tools find them."""
    return (
        ("service.name", "cloudflared"),
        ("jaeger.version", f"python-{platform.python_version()}"),
        ("hostname", socket.gethostname()),
        ("process.runtime.version", __version__),
        ("host.type", sys.platform),
        ("host.arch", {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())),
    )
