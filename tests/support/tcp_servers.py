"""Plain TCP servers in a thread: one function per accepted connection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def tcp_server(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Call `serve` with each accepted socket in a thread of its own; yields the port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def one(peer: socket.socket) -> None:
        with peer:
            try:
                serve(peer)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(peer,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def echo(peer: socket.socket) -> None:
    """Send everything back, then the end."""
    while data := peer.recv(65_536):
        peer.sendall(data)


def count_then_answer(peer: socket.socket) -> None:
    """Take everything up to the peer's end; only then answer how much that was."""
    total = 0
    while data := peer.recv(65_536):
        total += len(data)
    peer.sendall(b"%d bytes" % total)


def answer_with_what_comes_first(peer: socket.socket) -> None:
    """Answer an HTTP request with the hex of the bytes in front of it (a PROXY header)."""
    received = b""
    while b"\r\n\r\n" not in received[28:]:
        received += peer.recv(65_536)
    at = received.index(b"GET ")
    body = received[:at].hex().encode()
    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    peer.recv(1)
