"""The way between one stream and pycapnp, which speaks to sockets only.

Owns: a socket pair, the transport at our end of it, the bytes that wait until pycapnp reads.
In: bytes of a stream; `open` and `close`. Out: bytes on the stream; pycapnp's `AsyncIoStream`.
Never: knows which side is the RPC server, or what is said.

Must run inside `capnp.kj_loop()`. No task lives longer than `open`.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import capnp

from connector.devedge.streams import RawHeaders, Stream
from connector.errors import WireError
from connector.wire.capnp import MessageSplitter, repair_exception

KJ_TURNS = 3
"""Loop turns until KJ's own callback, which asks for the first read, has run for certain (it takes one)."""

EARLY_LIMIT = 1024 * 1024
"""Bytes that may come before pycapnp reads; a whole exchange has a few hundred."""

MAX_MESSAGE = 1024 * 1024
"""Bytes of one message; the largest that a connector sends is its local configuration."""


class RpcBridge:
    """The handler of an RPC stream. `attach`, `await open`, make the RPC object, `await serve`; `close` in the end."""

    def __init__(self) -> None:
        self.rpc_stream: Any = None
        self._stream: Stream | None = None
        self._ours: asyncio.Transport | None = None
        self._early = bytearray()
        self._messages = MessageSplitter(MAX_MESSAGE)
        self._serving = False
        self._ended = False

    def attach(self, stream: Stream) -> None:
        """Take the stream."""
        self._stream = stream

    async def open(self) -> Any:
        """Make the socket pair; returns what pycapnp's client and server take."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            self._ours, _ = await loop.create_connection(lambda: _Pump(self), sock=ours)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        try:
            self.rpc_stream = await capnp.AsyncIoStream.create_connection(sock=theirs)
        except BaseException:
            theirs.close()
            raise
        return self.rpc_stream

    async def serve(self) -> None:
        """Let bytes of the stream through, now that there is an RPC object on `rpc_stream`."""
        # pycapnp must have asked for its first read before a byte is there: it pauses its transport from inside
        # `get_buffer` otherwise, which crashes libuv (uvloop). KJ asks in its next turn, so give it some.
        for _ in range(KJ_TURNS):
            await asyncio.sleep(0)
        self._serving = True
        if self._ours is None or self._ours.is_closing():
            return
        if self._early:
            self._ours.write(bytes(self._early))
            self._early.clear()
        if self._ended:
            self._ours.write_eof()

    def close(self) -> None:
        """Take the socket pair down; the RPC object is closed already."""
        self._ended = True
        if self.rpc_stream is not None:
            self.rpc_stream.close()
            self.rpc_stream = None
        if self._ours is not None:
            self._ours.abort()
            self._ours = None

    # From the stream.

    def on_headers(self, headers: RawHeaders) -> None:
        """The connector answered; nothing depends on it."""

    def on_data(self, data: bytes) -> None:
        """RPC bytes of the connector."""
        stream = self._stream
        if stream is None:
            return
        stream.consumed(len(data))
        try:
            messages = self._messages.feed(data)
        except WireError:
            stream.reset()  # no RPC; the handler hears nothing more
            self._end()
            return
        for message in messages:
            repair_exception(message)  # of some texts pycapnp dies
            if not self._serving:
                self._early += message
                if len(self._early) > EARLY_LIMIT:
                    stream.reset()
                    self._end()
                    return
            elif self._ours is not None:
                self._ours.write(bytes(message))

    def on_eof(self, trailers: RawHeaders) -> None:
        """The connector closed its half."""
        self._end()

    def on_reset(self, error: BaseException | None) -> None:
        """The stream or the connection is gone."""
        self._end()

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        if self._serving and self._ours is not None and not self._ours.is_closing():
            self._ours.write_eof()
        self.on_ended()

    def on_ended(self) -> None:
        """The connector's half is over; for subclasses."""

    def pause_writing(self) -> None:
        """RPC messages are small: the socket pair's buffer holds what is on its way."""
        if self._ours is not None:
            self._ours.pause_reading()

    def resume_writing(self) -> None:
        """Go on."""
        if self._ours is not None:
            self._ours.resume_reading()

    # From pycapnp, through the socket pair.

    def rpc_bytes(self, data: bytes) -> None:
        """Bytes for the connector."""
        if self._stream is not None:
            self._stream.write(data)

    def rpc_ended(self) -> None:
        """Pycapnp closed its end."""
        if self._stream is not None:
            self._stream.write_eof()


class _Pump(asyncio.Protocol):
    """Our end of the socket pair."""

    def __init__(self, bridge: RpcBridge) -> None:
        self._bridge = bridge

    def data_received(self, data: bytes) -> None:
        self._bridge.rpc_bytes(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._bridge.rpc_ended()
