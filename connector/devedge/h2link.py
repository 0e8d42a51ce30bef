"""A connector's connection over HTTP/2: the edge is the HTTP/2 client.

Owns: the request headers that open the control stream, a configuration push and a proxied request.
In: a TLS socket; calls of `Link`. Out: HTTP/2 streams.
Never: decides about a connection (connectors.py).
"""

from __future__ import annotations

import asyncio
import json

from connector.devedge.connectors import PUSH_LIMIT, Link, Roster
from connector.devedge.h2session import H2Session, H2Stream
from connector.devedge.headers import UPGRADE, Head
from connector.devedge.streams import RawHeaders, StreamHandler, StreamLostError

TCP_SOURCE = b"cf-cloudflared-proxy-src"

REPLY_LIMIT = 64 * 1024
"""Bytes of a configuration reply that are read."""


class H2Link(H2Session, Link):
    """Made by the listener for each TLS connection."""

    protocol = "http2"

    def __init__(self, roster: Roster) -> None:
        H2Session.__init__(self, client=True)
        Link.__init__(self, roster)

    # H2Session.

    def on_connected(self) -> None:
        """TLS stands: open the control stream."""
        assert self.transport is not None
        peer = self.transport.get_extra_info("peername") or ("?", 0)
        self.begin((peer[0], peer[1]))
        control = self.begin_control()
        headers = [
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":authority", b"dev-edge.invalid"),
            (b":path", b"/control"),
            (UPGRADE, b"control-stream"),
        ]
        control.start(self.open_stream(headers, control))

    def on_goaway(self) -> None:
        """The connector takes no new streams."""
        self.drain()

    def on_lost(self, error: BaseException | None) -> None:
        """Tell the roster."""
        self.finish(error)

    # Link.

    @property
    def attached(self) -> bool:
        """Whether the socket is there."""
        return self.transport is not None

    def new_stream(self, headers: RawHeaders, handler: StreamHandler, *, end_stream: bool) -> H2Stream:
        """Open the stream of a request."""
        return self.open_stream(headers, handler, end_stream=end_stream)

    def open_tcp(self, dest: str, handler: StreamHandler) -> H2Stream:
        """Open a stream to `ip:port` in the connector's network."""
        headers = [
            (b":method", b"GET"),
            (b":scheme", b"https"),
            (b":authority", dest.encode()),
            (b":path", b"/"),
            (TCP_SOURCE, b"dev-edge"),
        ]
        return self.open_stream(headers, handler)

    def read_head(self, headers: RawHeaders) -> Head:
        """Read a response with serialised headers."""
        return Head.of_http2(headers)

    def abort(self, reason: str | None = None) -> None:
        """Drop the socket."""
        self.failure = reason or self.failure
        H2Session.abort(self)

    def push(self, version: int, config: object) -> None:
        """Send a configuration as a request of its own."""
        headers = [
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":authority", b"dev-edge.invalid"),
            (b":path", b"/configuration"),
            (b"content-type", b"application/json"),
            (UPGRADE, b"update-configuration"),
        ]
        push = _Push(self, version)
        try:
            stream = self.open_stream(headers, push)
        except StreamLostError:
            return
        push.start(stream, json.dumps({"version": version, "config": config}, separators=(",", ":")).encode())


class _Push:
    """One configuration push."""

    def __init__(self, link: H2Link, version: int) -> None:
        self._link = link
        self._version = version
        self._reply = bytearray()
        self._status = b""
        self._stream: H2Stream | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, stream: H2Stream, body: bytes) -> None:
        """Send the body; the whole exchange has PUSH_LIMIT seconds."""
        self._stream = stream
        stream.write(body)
        stream.write_eof()
        self._timer = self._link.loop.call_later(PUSH_LIMIT, self._late)

    def on_headers(self, headers: RawHeaders) -> None:
        self._status = dict(headers).get(b":status", b"")

    def on_data(self, data: bytes) -> None:
        if self._stream is not None:
            self._stream.consumed(len(data))
        if len(self._reply) < REPLY_LIMIT:
            self._reply += data

    def on_eof(self, trailers: RawHeaders) -> None:
        if self._status != b"200":
            self._tell(f"the connector answered status {self._status.decode()}")
            return
        try:
            reply = json.loads(self._reply)
            applied, error = reply["lastAppliedVersion"], reply["err"]
        except (ValueError, KeyError, TypeError):
            self._tell("the connector's reply is not the JSON it should be")
            return
        if error is None:
            self._tell(None)
        else:
            text = error if isinstance(error, str) else json.dumps(error)
            self._tell(f"{text} (version {applied} stays in force)")

    def on_reset(self, error: BaseException | None) -> None:
        self._tell(str(error))

    def pause_writing(self) -> None:
        """The body is written already."""

    def resume_writing(self) -> None:
        """The body is written already."""

    def _late(self) -> None:
        if self._stream is not None:
            self._stream.reset()
        self._tell(f"no reply within {PUSH_LIMIT:g} s")

    def _tell(self, error: str | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._link.configuration_told(self._version, error)
