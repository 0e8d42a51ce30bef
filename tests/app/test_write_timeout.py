"""--write-stream-timeout: a stream whose eyeball takes nothing ends, over either transport; its neighbours go on."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support.processes import tunnel


def endless(server: socket.socket) -> None:
    """Answer /small with two bytes and everything else with as much as anybody takes."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def answer(connection: socket.socket) -> None:
    with connection:
        try:
            if connection.recv(65536).startswith(b"GET /small"):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
                return
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
            while True:
                connection.sendall(bytes(65536))
        except OSError:
            return


@pytest.mark.parametrize("transport", ["http2", "quic"])
def test_an_eyeball_that_takes_nothing_is_given_up(tmp_path: Path, transport: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=endless, args=(server,), daemon=True).start()
        origin = f"http://127.0.0.1:{server.getsockname()[1]}"
        run_args = ("--protocol", transport, "--write-stream-timeout", "1s")
        with tunnel(tmp_path, origin, run_args=run_args) as it:
            context = ssl.create_default_context(cafile=str(it.ca))
            with socket.create_connection(("127.0.0.1", it.port), 20) as plain:
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
                with context.wrap_socket(plain, server_hostname="localhost") as eyeball:
                    eyeball.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    line = it.connector.message(f"Closing {transport} stream due to timeout while writing")
                    assert line["connIndex"] == 0
                    assert line["level"] == "error"
                    small = subprocess.run(
                        ["curl", "-s", "--cacert", str(it.ca), f"https://localhost:{it.port}/small"],
                        check=True, timeout=30, capture_output=True,
                    )  # fmt: skip
                    assert small.stdout == b"ok"
