"""The built-in test site (`hello_world`): a page that shows the request, and endpoints to try what a tunnel carries.

Owns: the answers of `/`, `/uptime`, `/_health`, `/sse` and `/ws`, in process: no listener, port or certificate.
In: calls of StreamSink. Out: answers on the StreamPort.
Never: keeps more of a body than it shows; makes a task.

Differs from cloudflared's, a TLS server on a random local port: nothing else on the machine can reach this one.
"""

from __future__ import annotations

import asyncio
import html
import json
import re
from datetime import datetime
from typing import Final
from urllib.parse import parse_qs

from connector.errors import WireError
from connector.protocol.ports import Buffer, Request, RequestKind, ResetCode, StreamPort
from connector.proxy.carrier import answer_close
from connector.proxy.exchange import Owner
from connector.proxy.ingress import Rule
from connector.proxy.tcp import switch_headers
from connector.proxy.watch import RequestTrace
from connector.wire.ws_stream import (
    CLOSE,
    CONTINUATION,
    GOING_AWAY,
    PING,
    PONG,
    PROTOCOL_FAILURE,
    ClientFrames,
    close_frame,
    encode_frame,
    frame_header,
)

SHOWN_BODY: Final = 64 * 1024
"""Bytes of a request's body that the page shows; the rest is taken and counted."""

SSE_SECONDS: Final = (0.01, 10.0, 3600.0)
"""Period of the event stream: least, usual (as cloudflared), most."""

_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d{1,9}(?:\.\d{0,9})?)(ns|us|µs|ms|s|m|h)")


class HelloSite:
    """One per process: `open` serves a request. The time of its making is the start of `/uptime`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._began = loop.time()
        self._start = datetime.now().astimezone().isoformat(timespec="microseconds")

    def open(self, owner: Owner, request: Request, port: StreamPort, rule: Rule) -> HelloExchange:
        """Return the exchange that serves a request."""
        path = request.target.partition(b"?")[0]
        if path == b"/ws" and request.kind is RequestKind.WEBSOCKET:
            return EchoExchange(self, owner, request, port, rule)
        if path == b"/sse":
            return EventExchange(self, owner, request, port, rule)
        return HelloExchange(self, owner, request, port, rule)

    def uptime(self) -> bytes:
        """Return the JSON of `/uptime`."""
        seconds = self.loop.time() - self._began
        return json.dumps({"startTime": self._start, "uptime": _go_duration(seconds)}, separators=(",", ":")).encode()


class HelloExchange:
    """One request: answered when its body has been taken."""

    __slots__ = ("_body", "_owner", "_size", "aborted", "finished", "on_data", "port", "request", "rule", "site",
                 "started", "status", "trace", "whole")  # fmt: skip

    def __init__(self, site: HelloSite, owner: Owner, request: Request, port: StreamPort, rule: Rule) -> None:
        self.site = site
        self._owner = owner
        self.request = request
        self.port = port
        self.rule: Rule | None = rule
        self.status = 0
        self.whole = False
        self.aborted = False
        self.finished = False
        self.started = 0.0
        self.trace: RequestTrace | None = None
        self._body = bytearray()
        self._size = 0
        self.on_data = self.take

    def start(self) -> None:
        """Begin; a request without body is answered at its end, which follows at once."""
        if self.request.kind is RequestKind.WEBSOCKET:
            self._send(400, b"text/plain; charset=utf-8", b"Bad Request: WebSockets are echoed at /ws\n")

    def take(self, data: Buffer) -> None:
        """Keep the beginning of the body."""
        size = len(data)
        self._size += size
        room = SHOWN_BODY - len(self._body)
        if room > 0:
            self._body += bytes(data[:room])
        self.port.consumed(size)

    def on_eof(self) -> None:
        """Answer."""
        if self.finished:
            return
        path = self.request.target.partition(b"?")[0]
        if path == b"/uptime":
            self._send(200, b"application/json", self.site.uptime())
        elif path == b"/_health":
            self._send(200, b"text/plain; charset=utf-8", b"ok")
        elif path == b"/ws":
            self._send(400, b"text/plain; charset=utf-8", b"Bad Request: this is a WebSocket\n")
        else:
            self._send(200, b"text/html; charset=utf-8", self._page())

    def on_reset(self, error: BaseException | None) -> None:
        """The eyeball went away."""
        self.aborted = True
        self._finish()

    def pause_writing(self) -> None:
        """Nothing to pause: the page is written already."""

    def resume_writing(self) -> None:
        """Nothing to resume."""

    def go_away(self) -> bool:
        """No word for it in plain HTTP."""
        return False

    def cancel(self) -> None:
        """End at once."""
        if not self.finished:
            self.port.reset(ResetCode.CANCELLED)
            self._finish()

    def _respond(self, status: int, *headers: tuple[bytes, bytes]) -> None:
        self.status = status
        if self.trace is not None:
            self.port.spans = self.trace.answered(status)
        self.port.respond(status, headers)
        self._owner.exchange_answered(self)

    def _send(self, status: int, kind: bytes, body: bytes) -> None:
        self._respond(status, (b"Content-Length", b"%d" % len(body)), (b"Content-Type", kind))
        if self.request.method != b"HEAD":
            self.port.write(body)
        self._end()

    def _end(self) -> None:
        self.port.write_eof()
        self.port.stop_reading()
        self.whole = True
        self._finish()

    def _finish(self) -> None:
        if not self.finished:
            self.finished = True
            self.on_data = _ignore
            self._body = bytearray()
            self._owner.exchange_finished(self)

    def _page(self) -> bytes:
        request = self.request
        rows = [
            ("Method", request.method),
            ("Request URL", request.target),
            ("Host", request.host),
            ("Scheme", request.scheme),
            *((f"Header {name.decode('latin-1')}", value) for name, value in sorted(request.headers)),
        ]
        shown = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in rows)
        body = _text(bytes(self._body).decode("utf-8", "replace"))
        more = f" (the first {SHOWN_BODY // 1024} KiB)" if self._size > SHOWN_BODY else ""
        return _PAGE.format(rows=shown, size=self._size, more=more, body=body).encode()


class EventExchange(HelloExchange):
    """`/sse?freq=1s`: an event stream that counts. One timer while it is read."""

    __slots__ = ("_number", "_paused", "_period", "_timer")

    def start(self) -> None:
        """Answer at once and count from then on."""
        query = parse_qs(self.request.target.partition(b"?")[2].decode("latin-1"))
        self._period = parse_period(query.get("freq", [""])[0])
        self._number = 0
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None
        self._respond(200, (b"Content-Type", b"text/event-stream; charset=utf-8"), (b"Cache-Control", b"no-store"))
        self._arm()

    def on_eof(self) -> None:
        """The request is whole; the answer has begun."""

    def pause_writing(self) -> None:
        """Count on when the edge takes more."""
        self._paused = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def resume_writing(self) -> None:
        """Count on."""
        self._paused = False
        if self._timer is None and not self.finished:
            self._arm()

    def _arm(self) -> None:
        self._timer = self.site.loop.call_later(self._period, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.port.write(b"%d\n\n" % self._number)
        self._number += 1
        if not self._paused and not self.finished:
            self._arm()

    def _finish(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super()._finish()


class EchoExchange(HelloExchange):
    """`/ws`: every message comes back, piece by piece, so that a message may be as long as it likes."""

    __slots__ = ("_first", "_frames", "_owed", "_paused")

    def start(self) -> None:
        """Answer the handshake."""
        self._frames = ClientFrames()
        self._first = True
        self._paused = False
        self._owed = 0
        self._respond(101, *switch_headers(self.request))
        self.on_data = self._echo

    def _echo(self, data: Buffer) -> None:
        try:
            pieces = self._frames.receive(data)
        except WireError:
            self._say(close_frame(PROTOCOL_FAILURE))
            return
        write = self.port.write
        for opcode, begins, ends, payload in pieces:
            if opcode == CLOSE:
                self._say(answer_close(payload))
                return
            if opcode == PING:
                write(encode_frame(PONG, payload))
            elif opcode != PONG:
                write(frame_header(opcode if begins else CONTINUATION, len(payload), fin=ends) + payload)
        if self._paused:
            self._owed += len(data)
        else:
            self.port.consumed(len(data))

    def on_eof(self) -> None:
        """The eyeball ended without a Close frame."""
        if not self.finished:
            self._end()

    def pause_writing(self) -> None:
        """Take no more than is read."""
        self._paused = True

    def resume_writing(self) -> None:
        """Take more."""
        self._paused = False
        owed, self._owed = self._owed, 0
        if owed:
            self.port.consumed(owed)

    def go_away(self) -> bool:
        """Close 1001: every write here is a whole frame."""
        if not self.finished:
            self._say(close_frame(GOING_AWAY))
        return True

    def _say(self, frame: bytes) -> None:
        self.port.write(frame)
        self._end()


def parse_period(text: str) -> float:
    """Return the seconds of a Go duration (`1s`, `1m30s`, `250ms`), within bounds; the usual for what is none."""
    least, usual, most = SSE_SECONDS
    if not text or _PART.sub("", text):
        return usual
    seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    return min(max(seconds, least), most) if seconds > 0 else usual


def _go_duration(seconds: float) -> str:
    """Print seconds as Go does: 1h2m3.5s."""
    minutes, rest = divmod(round(seconds, 6), 60)
    hours, minutes = divmod(int(minutes), 60)
    tail = f"{rest:.6f}".rstrip("0").rstrip(".") + "s"
    return f"{hours}h{minutes}m{tail}" if hours else f"{minutes}m{tail}" if minutes else tail


def _text(value: str | bytes) -> str:
    return html.escape(value.decode("latin-1") if isinstance(value, bytes) else value)


def _ignore(data: Buffer) -> None:
    """Take what comes after the end."""


_PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The tunnel works</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 48rem; margin: 3rem auto; padding: 0 1rem; color: #222; }}
dl, pre {{ background: #f4f4f4; border-left: 3px solid #f38020; padding: 1rem; font: 13px/1.5 monospace;
  overflow-wrap: anywhere; white-space: pre-wrap; }}
dt {{ font-weight: bold; float: left; clear: left; margin-right: .5rem; }}
dd {{ margin: 0; }}
</style>
</head>
<body>
<h1>The tunnel works</h1>
<p>This page is the connector's own test site (service <code>hello_world</code>). It shows what arrived. To serve your
own program, give its address in an ingress rule, such as <code>http://localhost:8080</code>.</p>
<p>To try more: <a href="/uptime">/uptime</a>, <a href="/_health">/_health</a>,
<a href="/sse?freq=1s">/sse?freq=1s</a> (event stream), <code>/ws</code> (WebSocket echo).</p>
<h2>Request</h2>
<dl>{rows}</dl>
<h2>Body: {size} bytes{more}</h2>
<pre>{body}</pre>
</body>
</html>
"""
