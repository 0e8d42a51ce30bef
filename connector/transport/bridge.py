"""A stream of a link as a socket: what lets pycapnp, which wants a socket, speak on an HTTP/2 stream.

Owns: a socket pair, one end registered with the loop, and what waits between it and the stream.
In: StreamSink calls; bytes from the far end. Out: StreamPort calls; bytes to the far end.
Never: makes a task, drops a byte, or understands more of a message than where it ends.

*Strategy*: both directions move by callbacks. Towards the far end messages are passed on whole, after the one repair
that pycapnp needs (wire/capnp.py); a byte is `consumed`, and so credited to the edge, only when the socket took it, so
what waits here is bounded by the stream's receive window. Towards the edge the near end is not read while the stream
is paused.
"""

from __future__ import annotations

import asyncio
import socket

from connector.errors import EdgeLostError, ProtocolError, WireError
from connector.protocol.ports import Buffer, ResetCode, StreamPort
from connector.transport.readiness import Readiness
from connector.wire.capnp import MessageCounter, MessageSplitter, repair_exception

READ_SIZE = 65_536
"""Bytes read from the far end at once. RPC messages have a few hundred."""

MAX_MESSAGE = 256 * 1024
"""Bytes of one message from the edge, a quarter of the stream window, so that a whole one always fits in. On the
control stream only answers come, of a few hundred bytes. Precedent: cloudflared 64 MiB."""


class SocketBridge:
    """One bridged stream; a StreamSink. Hand `take_socket()` to whoever wants a socket; `close` when that is done.

    `held` keeps what the edge sends here until `release`, the end included: pycapnp crashes under uvloop when its
    socket is readable before it reads for the first time.

    The far end closing (or shutting down its writing side) ends the response after `farewell`; the edge ending its side
    shows there as end of file. `error` tells why the stream was given up, None while it was not.
    """

    def __init__(self, port: StreamPort, *, loop: asyncio.AbstractEventLoop, held: bool = False) -> None:
        self.error: BaseException | None = None
        self.farewell = b""
        self.ended: asyncio.Future[None] = loop.create_future()
        self._port = port
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        self._near: socket.socket | None = near
        self._far: socket.socket | None = far
        self._backlog = bytearray()
        self._held = held
        self._eof_received = False
        self._responded = False
        self._sent_eof = False
        self._received = MessageSplitter(MAX_MESSAGE)
        self._sent = MessageCounter()
        self._ready = Readiness(near, loop, on_readable=self._on_readable, on_writable=self._on_writable)
        self._ready.read(True)

    def __repr__(self) -> str:
        state = "closed" if self._near is None else f"{len(self._backlog)} bytes waiting"
        return f"<SocketBridge {state}>"

    def take_socket(self) -> socket.socket:
        """Return the far end, once; it belongs to the caller then."""
        far, self._far = self._far, None
        if far is None:
            raise RuntimeError("the far end was taken before, or the bridge is closed")
        return far

    def release(self) -> None:
        """Pass on what was held, and from now on everything at once: whoever has the far end reads it."""
        self._held = False
        if self._near is None:
            return
        if self._backlog:
            self._ready.write(True)
        elif self._eof_received or self.error is not None:
            self._shut_near()

    # --- StreamSink: from the edge ---------------------------------------------------------------------------------

    def on_data(self, data: Buffer) -> None:
        """Pass payload on; what the socket does not take waits, uncredited."""
        near = self._near
        if near is None or self.error is not None:
            self._port.consumed(len(data))
            return
        try:
            messages = self._received.feed(data)
        except WireError as error:
            self._give_up(ProtocolError(f"the edge's bytes on the control stream are no RPC: {error}"))
            return
        if not messages:
            return
        for message in messages:
            repair_exception(message)
        whole = messages[0] if len(messages) == 1 else bytearray().join(messages)
        sent = 0
        if not self._backlog and not self._held:
            try:
                sent = near.send(whole)
            except BlockingIOError:
                pass
            except OSError:  # the far end is gone: nobody will read this
                sent = len(whole)
        if sent < len(whole):
            if not self._backlog and not self._held:
                self._ready.write(True)
            self._backlog += whole[sent:]
        if sent:
            self._port.consumed(sent)

    def on_eof(self) -> None:
        """Show the end to the far end, after everything that waits."""
        self._eof_received = True
        if not self._backlog and not self._held:
            self._shut_near()

    def on_reset(self, error: BaseException | None) -> None:
        """The stream is gone. What came before still reaches the far end, then it sees the end of file.

        The near end stays open for writes of the far end, which go nowhere: one that fails would make pycapnp forget
        the answer that it has not read yet.
        """
        if self.error is None:
            self.error = error if error is not None else EdgeLostError("the edge ended the control stream")
        near = self._near
        if near is None:
            return
        if self._far is not None:  # nobody took it, nobody will read
            self._sent_eof = True
            self.close()
            return
        if not self._sent_eof:
            self._sent_eof = True
            self._ready.read(True)  # it may have been paused
        self._eof_received = True
        if not self._backlog and not self._held:
            self._shut_near()

    def pause_writing(self) -> None:
        """Leave what the far end writes in the socket."""
        if self._near is not None and not self._sent_eof:
            self._ready.read(False)

    def resume_writing(self) -> None:
        """Read the far end again."""
        if self._near is not None and not self._sent_eof:
            self._ready.read(True)

    # --- from the far end ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the stream in order, without waiting for the far end. Idempotent."""
        near, self._near = self._near, None
        if near is None:
            return
        self._ready.close()
        waiting = len(self._backlog) + self._received.held
        self._backlog.clear()
        if not self._sent_eof:
            while data := self._read(near):
                self._send(data)
            self._send_eof()
        near.close()
        if self._far is not None:
            self._far.close()
            self._far = None
        if waiting:
            self._port.consumed(waiting)
        self._port.stop_reading()
        if not self.ended.done():
            self.ended.set_result(None)

    def _on_readable(self) -> None:
        near = self._near
        if near is None:
            return
        data = self._read(near)
        if data is None:
            return
        if data:
            self._send(data)
        else:
            self._ready.read(False)
            self._send_eof()
            self.close()

    @staticmethod
    def _read(near: socket.socket) -> bytes | None:
        """Return bytes; empty at the end of file, None when there is nothing now."""
        try:
            return near.recv(READ_SIZE)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _send(self, data: bytes) -> None:
        if self._sent_eof:
            return
        if not self._responded:
            self._responded = True
            self._port.respond(200, ())
        try:
            self._sent.feed(data)
        except WireError:
            self.farewell = b""
        self._port.write(data)

    def _send_eof(self) -> None:
        if self._sent_eof:
            return
        self._sent_eof = True
        if not self._responded:
            self._responded = True
            self._port.respond(200, ())
        if self.farewell and self._sent.whole and self._sent.messages:
            self._port.write(self.farewell)
        self._port.write_eof()

    # --- inside ----------------------------------------------------------------------------------------------------

    def _on_writable(self) -> None:
        near = self._near
        if near is None:
            return
        try:
            sent = near.send(self._backlog)
        except BlockingIOError:
            return
        except OSError:
            sent = len(self._backlog)  # the far end is gone: nobody will read this
        del self._backlog[:sent]
        if not self._backlog:
            self._ready.write(False)
            if self._eof_received:
                self._shut_near()
        self._port.consumed(sent)

    def _shut_near(self) -> None:
        if self._near is not None:
            try:
                self._near.shutdown(socket.SHUT_WR)
            except OSError:
                pass

    def _give_up(self, error: ProtocolError) -> None:
        self.error = error
        self._sent_eof = True
        self._port.reset(ResetCode.PROTOCOL)
        near = self._near
        if self._held and self._far is None and near is not None:
            # Whoever took the far end does not read it yet: an end of file now would crash pycapnp as a byte would.
            # `release` shows it; the far end closing ends the rest.
            self._eof_received = True
            self._ready.read(True)  # it may have been paused
            return
        self.close()
