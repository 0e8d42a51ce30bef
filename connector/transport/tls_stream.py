"""TLS on a SocketStream: what HTTP/2 links to the edge stand on.

Owns: TlsStream (handshake, records both ways, close_notify).
In: a connected socket, an `ssl.SSLContext`, a server name. Out: a ByteStream; calls of its StreamUser with plain bytes.
Never: decides whom to trust, dials, speaks a protocol.

*Strategy*: OpenSSL works on two memory BIOs, as in asyncio and uvloop, but nothing lies between it and the socket: what
one read of the socket brought is decrypted record by record into one buffer and handed on once, and OpenSSL is asked
for more only while it has some (asking until it refuses costs an exception per read). What is written is encrypted and
sent in parts that stay in the processor's cache.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from typing import Any, Final

from connector.protocol.ports import Buffer
from connector.transport.streams import READ_SIZE, SocketStream, StreamUser

RECORD: Final = 16 * 1024
"""Bytes of plain text in a record at most (RFC 8446 section 5.1)."""

SENT_AT_ONCE: Final = 128 * 1024
"""Bytes encrypted between two writes to the socket; the second-level cache of small servers has 256 KiB or more."""

CLOSE_SECONDS: Final = 1.0
"""How long a close waits for the peer's end, or for the next bit of what waits to be sent to be taken. asyncio waits
30 s by default; nobody needs the answer."""

FLUSH_SECONDS: Final = 30.0
"""How long a close may take where the peer goes on taking what waits, but slowly."""


class _ThreadBuffer(threading.local):
    def __init__(self) -> None:
        self.view = memoryview(bytearray(READ_SIZE))


_PLAIN = _ThreadBuffer()


class TlsStream:
    """One TLS client connection on a connected socket, from now on this object's own. Implements ByteStream.

    Await `handshake`, then `start` with whoever uses it. Before `start` nothing is read beyond the handshake. The user
    hears of the end by `connection_lost` alone: TLS has no half-close here, so its `eof_received` is never called. A
    peer that ends without close_notify ends like any other: what is cut off, the protocol on top of it knows. What
    was read before `pause_reading` may still be handed on.
    """

    __slots__ = ("_closing", "_deadline", "_error", "_incoming", "_loop", "_lost", "_outgoing", "_plain", "_raw",
                 "_read", "_receive", "_stream", "_timer", "_tls", "_unsent", "_user", "_waiter", "_write")  # fmt: skip

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, context: ssl.SSLContext, server_name: str
    ) -> None:
        self._loop = loop
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        try:
            self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        except BaseException:  # a name that cannot be one
            sock.close()
            raise
        # Below its Python class, where there is one: a call less per record.
        raw: Any = getattr(self._tls, "_sslobj", self._tls)
        self._raw = raw
        self._read: Any = raw.read
        self._write: Any = raw.write
        self._plain: memoryview = _PLAIN.view
        self._waiter: asyncio.Future[None] = loop.create_future()
        self._user: StreamUser | None = None
        self._receive: Any = None
        self._closing = False
        self._lost = False
        self._error: Exception | None = None  # why it was lost, if it was before there was a user
        self._timer: asyncio.TimerHandle | None = None
        self._unsent = 0
        self._deadline = 0.0
        self._stream = SocketStream(loop, sock, self)

    # -- the handshake

    def handshake(self) -> asyncio.Future[None]:
        """Shake hands: await it. Errors: ssl.SSLError, OSError; the socket is closed then, and when it is cancelled."""
        self._shake()
        self._waiter.add_done_callback(self._shaken)
        return self._waiter

    def _shaken(self, waiter: asyncio.Future[None]) -> None:
        if waiter.cancelled() or waiter.exception() is not None:
            self._stream.abort()

    def _shake(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLError, ValueError) as error:
            self._flush()  # the alert
            self._fail(error)
            return
        else:
            # What comes from now on is for a user, who is not here yet.
            self._stream.pause_reading()
            if not self._waiter.done():
                self._waiter.set_result(None)
        self._flush()

    def _fail(self, error: Exception) -> None:
        if not self._waiter.done():
            self._waiter.set_exception(error)

    def start(self, user: StreamUser) -> None:
        """Hand on what comes from now on, and what is here already: that too from the loop, not from inside this."""
        self._user = user
        self._receive = user.data_received
        self._stream.resume_reading()
        self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        user = self._user
        if self._lost:
            if user is not None:
                self._user = self._receive = None
                user.connection_lost(self._error)
        elif not self.is_closing() and (self._incoming.pending or self._raw.pending()):
            try:
                self._decrypt()
            except Exception as error:
                self._loop.call_exception_handler({"message": "the user of a stream raised", "exception": error})
                self._stream.break_off(error)

    # -- from the socket (StreamUser)

    def data_received(self, data: Buffer) -> None:
        """Decrypt what one read brought."""
        self._incoming.write(data)
        if self._closing:
            self._incoming.read()
        elif self._user is not None:
            self._decrypt()
        elif not self._waiter.done():
            self._shake()

    def _decrypt(self) -> None:
        incoming = self._incoming
        plain = self._plain
        read = self._read
        pending = self._raw.pending
        size = 0
        ended = False
        problem: ssl.SSLError | None = None
        while True:
            try:
                got = read(READ_SIZE - size, plain[size:] if size else plain)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLError as error:  # an alert, or a record that nobody could read
                problem = error
                break
            if not got:
                ended = True
                break
            size += got
            if not incoming.pending and not pending():
                break
            if size > READ_SIZE - RECORD:
                self._receive(plain[:size])
                size = 0
                if self._closing or self._stream.is_closing():
                    return
        if size:
            self._receive(plain[:size])
        if self._outgoing.pending:
            self._flush()
        if ended:
            self.close()
        elif problem is not None:
            self._closing = True
            self._stream.break_off(problem)

    def eof_received(self) -> bool | None:
        """The peer has closed its side: TLS has no half-close."""
        self._fail(ConnectionResetError("the peer closed the connection during the TLS handshake"))
        self._closing = True
        if self._timer is None and self._stream.get_write_buffer_size():
            self._wait()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """Pass the end on."""
        self._closing = self._lost = True
        self._error = error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fail(error or ConnectionResetError("the connection ended during the TLS handshake"))
        user, self._user = self._user, None
        self._receive = None
        if user is not None:
            user.connection_lost(error)

    def pause_writing(self) -> None:
        """Tell the user that the socket takes no more."""
        if self._user is not None:
            self._user.pause_writing()

    def resume_writing(self) -> None:
        """Tell the user that the socket takes more again."""
        if self._user is not None:
            self._user.resume_writing()

    # -- for the user (ByteStream)

    def write(self, data: Buffer) -> None:
        """Encrypt and send."""
        size = len(data)
        if self._closing or not size:
            return
        write = self._write
        try:
            sent = write(data)
            if sent < size:  # a record a call
                due = SENT_AT_ONCE
                with memoryview(data) as view:
                    while sent < size:
                        if sent >= due:
                            self._stream.write(self._outgoing.read())
                            due = sent + SENT_AT_ONCE
                        sent += write(view[sent : sent + RECORD])
        except ssl.SSLError as error:  # OpenSSL has given up, or a peer wants to negotiate anew (TLS 1.2)
            self._closing = True
            self._stream.break_off(error)
            return
        self._stream.write(self._outgoing.read())

    def _flush(self) -> None:
        data = self._outgoing.read()
        if data:
            self._stream.write(data)

    def close(self) -> None:
        """Say close_notify after what waits, and wait a moment for the peer's end; what still comes is dropped."""
        if self._closing:
            return
        self._closing = True
        if self._stream.is_closing():
            return
        try:
            self._tls.unwrap()
        except (ssl.SSLError, ValueError):  # the peer has not said it yet
            pass
        self._flush()
        self._stream.write_eof()
        self._stream.resume_reading()
        self._wait()

    def _wait(self) -> None:
        """Give the peer time to take what waits, and to end."""
        self._unsent = self._stream.get_write_buffer_size()
        self._deadline = self._loop.time() + FLUSH_SECONDS
        self._timer = self._loop.call_later(CLOSE_SECONDS, self._waited)

    def _waited(self) -> None:
        self._timer = None
        unsent = self._stream.get_write_buffer_size()
        if unsent < self._unsent and self._loop.time() < self._deadline:
            self._unsent = unsent
            self._timer = self._loop.call_later(CLOSE_SECONDS, self._waited)
        else:
            self._stream.abort()

    def abort(self) -> None:
        """Close now."""
        self._closing = True
        self._stream.abort()

    def is_closing(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._closing or self._stream.is_closing()

    def write_eof(self) -> None:
        """Not in TLS."""
        raise NotImplementedError("TLS has no half-close")

    def can_write_eof(self) -> bool:
        """TLS has no half-close."""
        return False

    def pause_reading(self) -> None:
        """Let bytes wait in the kernel."""
        self._stream.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        self._stream.resume_reading()

    def set_protocol(self, protocol: StreamUser) -> None:
        """Change the user."""
        self._user = protocol
        self._receive = protocol.data_received

    def get_protocol(self) -> StreamUser | None:
        """Return the user."""
        return self._user

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the water marks of encrypted bytes."""
        self._stream.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        """Return how many encrypted bytes wait."""
        return self._stream.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return `ssl_object`, or what the socket knows."""
        return self._tls if name == "ssl_object" else self._stream.get_extra_info(name, default)
