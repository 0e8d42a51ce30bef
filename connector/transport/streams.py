"""Byte streams on plain sockets, without asyncio's transports: what links and origin connections stand on.

Owns: SocketStream (one connected TCP or Unix socket) and the read buffer that all streams of a thread share.
In: a connected non-blocking socket, a StreamUser. Out: calls of the user; `write` and friends for it.
Never: dials, speaks TLS (tls_stream.py does), makes a task or a future.

*Strategy*: a socket that is readable is read once into one shared buffer and handed on as it lies there; a write is
tried at once, and what the kernel does not take waits in one bytearray until it does. Both are one call to the kernel
and one to the user, on any loop that has `add_reader`; a connection costs no task, no future and no second protocol
object, which is most of what opening one costs otherwise. uvloop stops watching a socket by itself once that has an
error, after one more call of the reader, which may still find bytes: then nobody would ever hear of the error. That it
let go shows in the reader's reference count, so nothing has to be asked per read. Measured on one core with uvloop,
CPU per echoed message of 128 B: 22-23 us this way, 23-26 us with its transports, 43 us with those of asyncio (26 us
with these).
"""

from __future__ import annotations

import asyncio
import socket
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Final, Protocol

from connector.protocol.ports import Buffer

READ_SIZE: Final = 256 * 1024
"""Bytes of one read at most, as uvloop has it: one buffer per thread."""

JOINED: Final = 16 * 1024
"""Bytes up to which buffers are joined rather than gathered by the kernel: a small copy is cheaper than an iovec."""

GATHERED: Final = 512
"""Buffers that one call may gather (Linux and macOS: 1,024)."""

RESTS: Final = 64
"""Reads at most of what had come when a write failed: 16 MiB, more than a kernel's receive buffer holds."""

SMALL: Final = 4_096
"""Reads below it are handed on as bytes: the copy is cheaper than what every look at a view costs more."""


class StreamUser(Protocol):
    """Whoever uses a stream; the part of asyncio.Protocol that matters after the connection was made."""

    def data_received(self, data: Any) -> None:
        """Take what came. Borrowed: valid only during the call."""

    def eof_received(self) -> bool | None:
        """The peer sends no more; True keeps the other direction open. Once at most."""

    def connection_lost(self, error: Exception | None) -> None:
        """The stream is over. Last call."""

    def pause_writing(self) -> None:
        """More than the high water mark waits to be written."""

    def resume_writing(self) -> None:
        """What waits is down at the low water mark."""


class ByteStream(Protocol):
    """What a user does with a stream: the part of asyncio.Transport that is used here, as it is there."""

    def write(self, data: Any) -> None:
        """Send bytes. They are taken before the call returns, whatever they lie in."""

    def write_eof(self) -> None:
        """End this direction after what waits."""

    def can_write_eof(self) -> bool:
        """Whether one direction can end alone."""

    def close(self) -> None:
        """Send what waits, then close."""

    def abort(self) -> None:
        """Close now."""

    def is_closing(self) -> bool:
        """Whether it is closed, or about to be."""

    def pause_reading(self) -> None:
        """Let bytes wait in the kernel."""

    def resume_reading(self) -> None:
        """Read again."""

    def set_protocol(self, protocol: Any) -> None:
        """Change the user."""

    def get_protocol(self) -> Any:
        """Return the user."""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the water marks."""

    def get_write_buffer_size(self) -> int:
        """Return how many bytes wait."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return `socket`, `sockname`, `peername`, `ssl_object`."""


class _ThreadBuffer(threading.local):
    def __init__(self) -> None:
        self.view = memoryview(bytearray(READ_SIZE))


_RAW = _ThreadBuffer()


class SocketStream:
    """One connected socket, from now on this object's own. Implements ByteStream; reads at once.

    What the peer sends comes from the loop, and so does `connection_lost`: never from inside a call of this object;
    `pause_writing` comes from inside `write`. An exception in `data_received` or `eof_received` ends the stream and
    goes to the loop's exception handler, as in asyncio. When a write fails, what had come before is still handed on
    (an origin that answers early and closes resets the connection behind its answer); while reading is paused it is
    lost. A reset is noticed by a read or a write: not while reading is paused and nothing waits.
    """

    __slots__ = (
        "_backlog",
        "_buffer",
        "_closing",
        "_eof_came",
        "_eof_sent",
        "_fd",
        "_high",
        "_loop",
        "_lost",
        "_low",
        "_paused",
        "_reading",
        "_receive",
        "_recv_into",
        "_send",
        "_sock",
        "_user",
        "_watched",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, user: StreamUser) -> None:
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._user = user
        self._receive = user.data_received
        self._recv_into = sock.recv_into
        self._send = sock.send
        self._buffer: memoryview = _RAW.view
        self._backlog: bytearray | None = None
        self._high = 64 * 1024
        self._low = 16 * 1024
        self._paused = False  # the user was told pause_writing
        self._reading = True
        self._closing = False
        self._lost = False  # connection_lost is on its way, or was called
        self._eof_came = False
        self._eof_sent = False  # or a write failed: nothing more is sent
        self._watched: weakref.ref[Any] | None = None
        self._watch()

    def __repr__(self) -> str:
        return f"<SocketStream {self._fd}{' closing' if self._closing else ''}>"

    # -- reading

    def _on_readable(self) -> None:
        if not self._reading:  # paused or closed by what ran before in the same tick
            return
        try:
            size = self._recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.break_off(error)
            return
        try:
            if size >= SMALL:
                self._receive(self._buffer[:size])
            elif size:
                self._receive(bytes(self._buffer[:size]))
            else:
                self._eof_came = True
                self._stop_reading()
                if not self._user.eof_received():
                    self.close()
        except Exception as error:
            self._loop.call_exception_handler({"message": "the user of a stream raised", "exception": error})
            self.break_off(error)

    def _watch(self) -> None:
        """Have the loop call `_on_readable`; `_unwatched` follows when it lets go of that by itself."""
        call = self._on_readable
        self._watched = weakref.ref(call, self._unwatched)
        self._loop.add_reader(self._fd, call)

    def _unwatched(self, _: object) -> None:
        if self._reading and not self._loop.is_closed():
            self._loop.call_soon(self._look_again)

    def _look_again(self) -> None:
        if self._reading:
            self._stop_reading()
            self.resume_reading()

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._watched = None
            self._loop.remove_reader(self._fd)

    def pause_reading(self) -> None:
        """Let bytes wait in the kernel."""
        self._stop_reading()

    def resume_reading(self) -> None:
        """Read again."""
        if not self._reading and not self._closing and not self._eof_came:
            self._reading = True
            self._watch()

    # -- writing

    def write(self, data: Buffer) -> None:
        """Send now what the kernel takes, and keep a copy of the rest."""
        if self._closing or self._eof_sent:
            return
        backlog = self._backlog
        if backlog is not None:
            backlog += data
        else:
            size = len(data)
            sent = 0
            try:
                if size:
                    sent = self._send(data)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                self._write_failed(error)
                return
            if sent == size:
                return
            backlog = self._backlog = bytearray(memoryview(data)[sent:])
            self._loop.add_writer(self._fd, self._on_writable)
        if not self._paused and len(backlog) > self._high:
            self._paused = True
            self._user.pause_writing()

    def write_all(self, chunks: Sequence[Buffer]) -> None:
        """Send several buffers in one call to the kernel: small ones joined, large ones from where they lie."""
        size = sum(map(len, chunks))
        if self._closing or self._eof_sent:
            return
        if size <= JOINED or self._backlog is not None or len(chunks) > GATHERED:
            self.write(b"".join(chunks))
            return
        try:
            sent = self._sock.sendmsg(chunks)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._write_failed(error)
            return
        if sent < size:
            self.write(memoryview(b"".join(chunks))[sent:])

    def _on_writable(self) -> None:
        backlog = self._backlog
        if backlog is None:
            return
        try:
            sent = self._send(backlog)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._write_failed(error)
            return
        if sent < len(backlog):
            del backlog[:sent]
        else:
            self._backlog = None
            self._loop.remove_writer(self._fd)
            if self._closing:
                self._lose(None)
                return
            if self._eof_sent:
                self._shut()
        if self._paused and (self._backlog is None or len(backlog) <= self._low) and not self._closing:
            self._paused = False
            self._user.resume_writing()

    def write_eof(self) -> None:
        """End this direction after what waits."""
        if not self._eof_sent and not self._closing:
            self._eof_sent = True
            if self._backlog is None:
                self._shut()

    def _shut(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._write_failed(error)

    def _write_failed(self, error: OSError) -> None:
        """Send nothing more, read what had come, then end."""
        if not self._reading:
            self.break_off(error)
            return
        self._eof_sent = True
        self._drop_backlog()
        self._loop.call_soon(self._read_rest, error)

    def _read_rest(self, error: OSError) -> None:
        for _ in range(RESTS):
            if not self._reading:
                break
            self._on_readable()
        self.break_off(error)

    def _drop_backlog(self) -> None:
        if self._backlog is not None:
            self._backlog = None
            self._loop.remove_writer(self._fd)

    def can_write_eof(self) -> bool:
        """TCP and Unix sockets can end one direction."""
        return True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the water marks; `low` is a quarter of `high` unless given."""
        self._high = 64 * 1024 if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        """Return how many bytes wait."""
        return 0 if self._backlog is None else len(self._backlog)

    # -- ends

    def is_closing(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._closing

    def close(self) -> None:
        """Send what waits, then close. Nothing more is read; what came and is unread makes TCP reset the connection."""
        if not self._closing:
            self._closing = True
            self._stop_reading()
            if self._backlog is None:
                self._lose(None)

    def abort(self) -> None:
        """Close now."""
        self.break_off(None)

    def break_off(self, error: Exception | None) -> None:
        """Drop what waits and close now; the user learns why."""
        if not self._lost:
            self._closing = True
            self._stop_reading()
            self._drop_backlog()
            self._lose(error)

    def _lose(self, error: Exception | None) -> None:
        self._lost = True
        self._loop.call_soon(self._tell, error)

    def _tell(self, error: Exception | None) -> None:
        """Close the socket and tell the user; let go of both."""
        user = self._user
        self._user = _NOBODY
        self._receive = _NOBODY.data_received
        try:
            user.connection_lost(error)
        finally:
            self._sock.close()

    # -- what users ask

    def set_protocol(self, protocol: StreamUser) -> None:
        """Change the user."""
        self._user = protocol
        self._receive = protocol.data_received

    def get_protocol(self) -> StreamUser:
        """Return the user."""
        return self._user

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return `socket`, `sockname` or `peername`; None for an address that the system no longer knows."""
        if name == "socket":
            return self._sock
        try:
            if name == "sockname":
                return self._sock.getsockname()
            if name == "peername":
                return self._sock.getpeername()
        except OSError:
            return None
        return default


class _Nobody:
    """The user of a stream that is over."""

    __slots__ = ()

    def data_received(self, data: Any) -> None:
        """Ignore."""

    def eof_received(self) -> bool | None:
        """Ignore."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """Ignore."""

    def pause_writing(self) -> None:
        """Ignore."""

    def resume_writing(self) -> None:
        """Ignore."""


_NOBODY: Final = _Nobody()
