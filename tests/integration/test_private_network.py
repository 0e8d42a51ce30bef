"""UDP of private networks between the connector and the dev edge as programs: both versions, and the forwarders."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import Tunnel, tunnel


@contextmanager
def udp_origin(family: socket.AddressFamily = socket.AF_INET, port: int = 0) -> Iterator[str]:
    """An origin that answers in capitals; its address."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1" if family == socket.AF_INET else "::1", port))

        def serve() -> None:
            while True:
                data, address = sock.recvfrom(65536)
                if data == b"stop":
                    return
                sock.sendto(data.upper(), address)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        host, port = sock.getsockname()[:2]
        try:
            yield f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        finally:
            with socket.socket(family, socket.SOCK_DGRAM) as stop:
                stop.sendto(b"stop", (host, port))
            thread.join(20)


def listen_address(path: Tunnel, kind: str) -> tuple[str, int]:
    event = next(e for e in path.edge.events if e.get("event") == "forward" and e["kind"] == kind)
    host, _, port = event["listen"].rpartition(":")
    return host, int(port)


def ask(sock: socket.socket, question: bytes) -> bytes:
    """Ask until an answer comes: datagrams may be lost."""
    sock.settimeout(1)
    for _ in range(30):
        sock.send(question)
        try:
            while True:
                data = sock.recv(65536)
                if data == question.upper():
                    return data
        except TimeoutError:
            continue
    raise AssertionError("no answer")


def features(version: int) -> tuple[str, ...]:
    return ("--features", "support_datagram_v3_2") if version == 3 else ()


def test_udp_through_a_forwarded_port(tmp_path: Path) -> None:
    version = 3
    with (
        udp_origin() as origin,
        tunnel(
            tmp_path, "http_status:204", edge_args=("--udp", f"127.0.0.1:0={origin}"),
            run_args=("--protocol", "quic", *features(version)),
        ) as path,
    ):  # fmt: skip
        announced = path.registered["features"]
        assert ("support_datagram_v2" in announced, "support_datagram_v3_2" in announced) == (True, version == 3)
        assert path.connector.message("ICMP proxy")["level"] == "info"
        address = listen_address(path, "udp")
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as two,
        ):
            one.connect(address)
            two.connect(address)
            for size in (1, 500, 1100):
                assert ask(one, b"a" * size)
                assert ask(two, b"b" * size)
        for _ in range(2):
            path.edge.event("udp_flow", version=version)


def test_a_dead_origin_is_told_to_the_edge(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{taken.getsockname()[1]}"
    with tunnel(
        tmp_path, "http_status:204", edge_args=("--udp", f"127.0.0.1:0={dead}"), run_args=("--protocol", "quic")
    ) as path:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect(listen_address(path, "udp"))
            client.send(b"hello")
            event = path.edge.event("udp_session_ended")
        assert event["message"] == "Connection refused"
