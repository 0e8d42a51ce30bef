"""The synchronous WebSocket client of `websockets` over TLS that two threads may use.

That client reads in a thread of its own while the test writes, and a TLS object of Python's is not made for that: about
one in 500 handshakes lost what was written (on 3.11 and 3.13 alike; never with the asyncio client). So here TLS runs in
memory, under a lock, beside a plain socket.
"""

from __future__ import annotations

import socket
import ssl
import threading
from typing import Any
from urllib.parse import urlsplit

from websockets.sync.client import ClientConnection, connect

MAX_READ = 65_536


class LockedTls:
    """As much of a socket as `websockets.sync` uses."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, name: str) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._feed()
        self._flush()

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self._sock.sendall(data)

    def _feed(self) -> None:
        data = self._sock.recv(MAX_READ)
        with self._lock:
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()

    def recv(self, size: int) -> bytes:
        while True:
            with self._lock:
                try:
                    return self._tls.read(size)
                except ssl.SSLWantReadError:
                    pass
                except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                    return b""
            self._feed()

    def sendall(self, data: bytes) -> None:
        with self._lock:
            self._tls.write(data)
            self._flush()

    def __getattr__(self, name: str) -> Any:  # settimeout, shutdown, close, getpeername, ...
        return getattr(self._sock, name)


def ws_connect(url: str, context: ssl.SSLContext, **options: Any) -> ClientConnection:
    """Connect to a wss:// URL; `options` go to `websockets.sync.client.connect`."""
    parts = urlsplit(url)
    assert parts.scheme == "wss"
    assert parts.hostname
    limit = options.get("open_timeout", 30)
    sock = socket.create_connection((parts.hostname, parts.port or 443), timeout=limit)
    try:
        tls = LockedTls(sock, context, parts.hostname)
        sock.settimeout(None)
        return connect(url.replace("wss:", "ws:", 1), sock=tls, **options)  # type: ignore[arg-type]
    except BaseException:
        sock.close()
        raise
