"""TLS over TCP as Go's HTTP/2 client has it: every write is a record and a system call of its own.

Owns: the listening socket, the handshakes, the TLS of each connection.
In: bytes to send; what the kernel brings. Out: calls of an asyncio.Protocol, which takes this for its transport.
Never: joins writes. asyncio's transports do, and messages that arrive in one segment are cheaper for a connector than
those of visitors, who do not wait for each other; what it saves that way would be a present of the load.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable

READ_SIZE = 256 * 1024

HIGH_WATER = 512 * 1024
"""Bytes that wait for the kernel at which the protocol is paused; at nothing it is resumed."""


class TlsTransport(asyncio.Transport):
    """One connection; the protocol hears `connection_made` after the handshake."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._protocol = protocol
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._made = False
        self._over = False
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._paused = False
        self._loop.add_reader(sock, self._read)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send now, or as soon as the kernel takes it."""
        if not self._over:
            self._tls.write(data)
            self._send()

    def close(self) -> None:
        """End it; what waits is lost."""
        self._end(None)

    abort = close

    def is_closing(self) -> bool:
        """Whether it is over."""
        return self._over

    def _read(self) -> None:
        try:
            data = self._sock.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(error)
            return
        if not data:
            self._end(None)
            return
        self._incoming.write(data)
        try:
            if not self._made:
                self._tls.do_handshake()
                self._made = True
                self._send()
                self._protocol.connection_made(self)
            parts = []
            try:
                while part := self._tls.read(READ_SIZE):
                    parts.append(part)
            except ssl.SSLWantReadError:
                pass
            if parts:
                self._protocol.data_received(b"".join(parts))
        except ssl.SSLWantReadError:
            self._send()
        except ssl.SSLError as error:
            self._send()
            self._end(error)

    def _send(self) -> None:
        data = self._outgoing.read()
        if not data or self._over:
            return
        if not self._waiting:
            try:
                sent = self._sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._end(error)
                return
            if sent == len(data):
                return
            data = data[sent:]
            self._loop.add_writer(self._sock, self._write_on)
        self._waiting.append(data)
        self._size += len(data)
        if self._size > HIGH_WATER and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def _write_on(self) -> None:
        while self._waiting:
            data = self._waiting[0]
            try:
                sent = self._sock.send(data)
            except BlockingIOError:
                return
            except OSError as error:
                self._end(error)
                return
            self._size -= sent
            if sent < len(data):
                self._waiting[0] = data[sent:]
                return
            self._waiting.popleft()
        self._loop.remove_writer(self._sock)
        if self._paused:
            self._paused = False
            self._protocol.resume_writing()

    def _end(self, error: Exception | None) -> None:
        if self._over:
            return
        self._over = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        if self._made:
            self._loop.call_soon(self._protocol.connection_lost, error)


class TlsListener:
    """The listening socket. `listen`, then `close`; connections end by themselves."""

    def __init__(self, context: ssl.SSLContext, make: Callable[[], asyncio.Protocol]) -> None:
        self._context = context
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._socket.setblocking(False)

    def listen(self) -> int:
        """Begin; returns the port."""
        self._loop.add_reader(self._socket, self._accept)
        return int(self._socket.getsockname()[1])

    def close(self) -> None:
        """Give the port back."""
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except BlockingIOError:
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        TlsTransport(sock, self._context, self._make())
