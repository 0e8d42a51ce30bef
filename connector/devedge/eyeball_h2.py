"""A visitor's HTTP/2 connection: many exchanges, WebSockets by extended CONNECT (RFC 8441).

Owns: one HTTP/2 session in the server role and a visitor object per stream.
In: streams of the visitor. Out: calls on exchanges; response heads and payload.
Never: routes or changes headers other than the pseudo ones.
"""

from __future__ import annotations

from collections.abc import MutableSet
from typing import Any

import h2.errors
import h2.exceptions

from connector.devedge.connectors import Roster
from connector.devedge.exchange import Exchange
from connector.devedge.h2session import H2Session, H2Stream
from connector.devedge.streams import RawHeaders


class H2Visitors(H2Session):
    """One connection of a visitor."""

    def __init__(self, roster: Roster, connections: MutableSet[Any]) -> None:
        super().__init__(client=False)
        self._roster = roster
        self._connections = connections
        self._client = ""
        self._finishing = False

    def on_connected(self) -> None:
        """Settings are on their way."""
        assert self.transport is not None
        self._client = self.transport.get_extra_info("peername")[0]
        self._connections.add(self)

    def on_lost(self, error: BaseException | None) -> None:
        """The streams heard already."""
        self._connections.discard(self)

    def on_idle(self) -> None:
        """Nothing is open."""
        if self._finishing:
            self.close()

    def finish(self) -> None:
        """Take no new streams; close after the open ones."""
        self._finishing = True
        self.send_goaway()
        if not self.streams:
            self.close()

    def on_request(self, stream: H2Stream, headers: RawHeaders) -> None:
        """Begin an exchange."""
        if self._finishing:
            self.reset_stream(stream, h2.errors.ErrorCodes.REFUSED_STREAM)
            return
        _H2Visitor(stream, headers, self._roster, self._client)


class _H2Visitor:
    """One stream: the handler of the stream and the visitor of the exchange."""

    def __init__(self, stream: H2Stream, headers: RawHeaders, roster: Roster, client: str) -> None:
        self._stream = stream
        self._reading_paused = False
        self._unread = 0  # credit held back while the connector takes no more
        self._writing_paused = False
        self._unwritten = 0  # credit held back while the visitor takes no more
        stream.handler = self
        pseudo = {name: value for name, value in headers if name.startswith(b":")}
        fields = [(name, value) for name, value in headers if not name.startswith(b":")]
        method = pseudo.get(b":method", b"GET")
        protocol = pseudo.get(b":protocol")
        host = pseudo.get(b":authority") or next((value for name, value in fields if name == b"host"), b"")
        if method == b"CONNECT" and protocol != b"websocket":
            stream.send_headers([(b":status", b"501")], end_stream=True)
            stream.reset(h2.errors.ErrorCodes.CANCEL)
            return
        cookies = [value for name, value in fields if name == b"cookie"]
        if len(cookies) > 1:  # split for compression (RFC 9113 8.2.3)
            fields = [(name, value) for name, value in fields if name != b"cookie"]
            fields.append((b"cookie", b"; ".join(cookies)))
        self._exchange = Exchange(
            roster,
            self,
            method=b"GET" if protocol else method,
            host=host,
            target=pseudo.get(b":path", b"/"),
            headers=fields,
            client=client,
            websocket=protocol is not None,
            make_key=protocol is not None,
        )
        self._exchange.start(end_stream=False)

    # Visitor.

    def respond(self, status: int, headers: RawHeaders) -> None:
        """Send the head; names go out in lower case."""
        head = [(b":status", str(status).encode()), *((name.lower(), value) for name, value in headers)]
        try:
            self._stream.send_headers(head)
        except h2.exceptions.ProtocolError:
            self._stream.reset(h2.errors.ErrorCodes.INTERNAL_ERROR)
            self._exchange.left(clean=False)

    def switch(self, headers: RawHeaders) -> None:
        """A WebSocket over HTTP/2 is an ordinary 200."""
        self.respond(200, headers)

    def write(self, data: bytes) -> None:
        """Queue payload; its credit waits while the queue is full."""
        self._stream.write(data)
        if self._writing_paused:
            self._unwritten += len(data)
        else:
            self._exchange.accepted(len(data))

    def write_eof(self, trailers: RawHeaders) -> None:
        """End the response."""
        self._stream.write_eof(trailers)

    def abort(self) -> None:
        """Cut the response off."""
        self._stream.reset(h2.errors.ErrorCodes.INTERNAL_ERROR)

    def pause_reading(self) -> None:
        """Hold the visitor's credit back."""
        self._reading_paused = True

    def resume_reading(self) -> None:
        """Give the visitor its credit."""
        self._reading_paused = False
        unread, self._unread = self._unread, 0
        self._stream.consumed(unread)

    # StreamHandler.

    def on_headers(self, headers: RawHeaders) -> None:
        """Unused: requests arrive in `H2Visitors.on_request`."""

    def on_data(self, data: bytes) -> None:
        """Payload of the request."""
        self._exchange.body(data)
        if self._reading_paused:
            self._unread += len(data)
        else:
            self._stream.consumed(len(data))

    def on_eof(self, trailers: RawHeaders) -> None:
        """End of the request; its trailers are not passed on (http2-transport 4.1)."""
        self._exchange.body_end()

    def on_reset(self, error: BaseException | None) -> None:
        """The visitor gave up."""
        self._exchange.left(clean=False)

    def pause_writing(self) -> None:
        """The visitor takes no more for now."""
        self._writing_paused = True

    def resume_writing(self) -> None:
        """The visitor takes more."""
        self._writing_paused = False
        unwritten, self._unwritten = self._unwritten, 0
        self._exchange.accepted(unwritten)
