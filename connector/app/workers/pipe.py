"""One end of the socket between the leading process and a worker.

Owns: the socket, what waits to be written. In: messages to send, bytes. Out: messages to `on_message`, one `on_end`.
Never: blocks; knows what a message means.

*Strategy*: what is sent in one turn of the loop leaves in one write, so that a burst of log lines is one system call.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Final, cast

import msgspec

from connector.app.workers.messages import FrameReader, Message, MessageTooLargeError, encode

MAX_BACKLOG: Final = 4 * 1024 * 1024
"""Bytes that may wait for a peer that does not read before log lines are dropped. Everything else is always sent: it is
little, and a peer that does not read for long is ended."""


class Pipe(asyncio.Protocol):
    """One end. `on_end(why)` comes once, when the other end is gone or says nonsense; not after `close`."""

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[Any],
        on_message: Callable[[Any], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._decoder = decoder
        self._on_message = on_message
        self._on_end = on_end
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._why = ""
        self._done = False
        self.dropped = 0
        """Messages that did not fit; the owner says so and sets it back."""

    @classmethod
    async def open(
        cls,
        sock: socket.socket,
        decoder: msgspec.msgpack.Decoder[Any],
        on_message: Callable[[Any], None],
        on_end: Callable[[str], None],
    ) -> Pipe:
        """Take over one end of a socket pair."""
        sock.setblocking(False)
        pipe = cls(decoder, on_message, on_end)
        await asyncio.get_running_loop().create_unix_connection(lambda: pipe, sock=sock)
        return pipe

    def hand_to(self, on_message: Callable[[Any], None]) -> None:
        """Give messages to somebody else from now on."""
        self._on_message = on_message

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._transport is None or self._transport.is_closing()

    def send(self, message: Message) -> None:
        """Send a message; nothing happens when the other end is gone."""
        if self.closed:
            return
        if not self._out:
            self._loop.call_soon(self.flush)
        self._out.append(encode(message))

    def send_if_room(self, message: Message) -> None:
        """Send a message that may get lost: dropped, and counted, when the other end does not read."""
        if self._transport is None or self._transport.get_write_buffer_size() > MAX_BACKLOG:
            self.dropped += 1
            return
        try:
            self.send(message)
        except MessageTooLargeError:
            self.dropped += 1

    def flush(self) -> None:
        """Write what was sent in this turn of the loop."""
        out, self._out = self._out, []
        if out and self._transport is not None:
            self._transport.write(b"".join(out))

    def close(self) -> None:
        """Write what waits, then close."""
        self._done = True
        self.flush()
        if self._transport is not None:
            self._transport.close()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Hand whole messages on."""
        try:
            bodies = self._reader.receive(data)
            for body in bodies:
                self._on_message(self._decoder.decode(body))
        except (msgspec.MsgspecError, MessageTooLargeError) as error:
            self._why = f"a message that is none: {error}"
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The other end is gone."""
        self._transport = None
        if self._done:
            return
        self._done = True
        self._on_end(self._why or (str(exc) if exc is not None else ""))
