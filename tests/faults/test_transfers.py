"""Large transfers with one slow end: the connector's memory stays small, and the other end is stopped, not cut off.

A reader of RATE takes SIZE; `make transfers` is 1 GB at 1 MB/s (TRANSFER_RATE speeds it up), the smoke here is small.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.processes import Tunnel, tunnel

MB = 1_000_000
SIZE = int(float(os.environ.get("TRANSFER_MB", "32")) * MB)
RATE = float(os.environ.get("TRANSFER_RATE", "16")) * MB
"""Bytes a second of the slow end."""

CHUNK = bytes(range(256)) * 256
GROWTH = 32 * MB
"""What the connector may grow by: over QUIC it takes 16 MiB for slow origins before it stops taking (QuicLimits), over
HTTP/2 a stream's window of 1 MiB; and what the allocator keeps."""

AHEAD = 48 * MB
"""What may be under way: the same, and three TCP connections' buffers in the kernel."""

pytestmark = pytest.mark.timeout(120 + 3 * SIZE / RATE)


class Count:
    """What the two ends have done so far."""

    def __init__(self) -> None:
        self.sent = 0
        self.read = 0
        self.most_ahead = 0

    def add_sent(self, n: int) -> None:
        self.sent += n
        self.most_ahead = max(self.most_ahead, self.sent - self.read)


def read_slowly(sock: socket.socket, left: int, count: Count) -> None:
    """Read `left` bytes at RATE; every one is checked by its place."""
    began = time.monotonic()
    done = 0
    while done < left:
        data = sock.recv(min(65_536, left - done))
        assert data, f"cut off after {done} bytes"
        at = done % 256
        assert data == (CHUNK + CHUNK)[at : at + len(data)], f"other bytes than were sent, after {done}"
        done += len(data)
        count.read = done
        ahead = done / RATE - (time.monotonic() - began)
        if ahead > 0:
            time.sleep(ahead)  # the slowness that is tested


def write_all(sock: socket.socket, size: int, count: Count) -> None:
    for _ in range(0, size, len(CHUNK)):
        part = CHUNK[: min(len(CHUNK), size - count.sent)]
        sock.sendall(part)
        count.add_sent(len(part))


def head_of(sock: socket.socket) -> bytes:
    """Read up to the empty line and nothing more."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        assert byte, head
        head += byte
    return head


@contextmanager
def origin(count: Count) -> Iterator[int]:
    """Takes one POST slowly, or answers one GET as fast as it is let."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            sock, _ = listener.accept()
            with sock:
                if head_of(sock).startswith(b"POST"):
                    read_slowly(sock, SIZE, count)
                    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                else:
                    sock.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n".encode())
                    write_all(sock, SIZE, count)
                sock.recv(1)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.close()
        thread.join(30)
    assert not errors, errors


def visit(up: Tunnel) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(up.ca))
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    sock.connect(("127.0.0.1", up.port))
    return context.wrap_socket(sock, server_hostname="localhost")


@pytest.mark.parametrize("protocol", ["http2", "quic"])
@pytest.mark.parametrize("way", ["slow origin", "slow eyeball"])
def test_a_slow_end_bounds_the_connectors_memory(tmp_path: Path, protocol: str, way: str) -> None:
    count = Count()
    with (
        origin(count) as port,
        tunnel(tmp_path, f"http://127.0.0.1:{port}", run_args=("--protocol", protocol)) as up,
        visit(up) as visitor,
    ):
        before = up.connector.memory()
        if way == "slow origin":
            visitor.sendall(f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {SIZE}\r\n\r\n".encode())
            write_all(visitor, SIZE, count)
            assert head_of(visitor).startswith(b"HTTP/1.1 200")
            assert count.read == SIZE
        else:
            visitor.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert head_of(visitor).startswith(b"HTTP/1.1 200")
            read_slowly(visitor, SIZE, count)
            assert count.sent == SIZE
        peak = up.connector.memory("VmHWM")
        print(f"{protocol}, {way}: {SIZE // MB} MB at {RATE / MB:g} MB/s; connector {before / MB:.1f} MB before,"
              f" {peak / MB:.1f} MB at most; {count.most_ahead / MB:.1f} MB under way at most")  # fmt: skip
        assert peak - before < GROWTH
        assert count.most_ahead < AHEAD
        assert not [e for e in up.edge.events if e["event"] in {"disconnected", "stream_reset"}]
