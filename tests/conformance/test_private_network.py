"""One set of demands, made of this connector always and of cloudflared when a binary is given.

What a private network needs: TCP over both transports, UDP over datagrams of both versions, a configuration push that
changes the limit of flows while they run.
"""

from __future__ import annotations

import os
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.test_private_network import ask, features, listen_address, udp_origin
from tests.support.origins import free_port
from tests.support.processes import Tunnel, tunnel

CLOUDFLARED = os.environ.get("CLOUDFLARED", "")

REFERENCE = (
    *(CLOUDFLARED, "tunnel", "--no-autoupdate", "--edge", "{edge}", "--cacert", "{ca}", "--no-prechecks"),
    *("--grace-period", "10s", "--metrics", "127.0.0.1:0", "run", "--token-file", "{token_file}"),
)
OURS = (
    *(sys.executable, "-m", "connector", "run", "--edge", "{edge}", "--cacert", "{ca}"),
    *("--grace-period", "10s", "--token-file", "{token_file}"),
)


@pytest.fixture(
    params=[
        "connector",
        pytest.param(
            "cloudflared",
            marks=pytest.mark.skipif(
                not CLOUDFLARED, reason="NO CLOUDFLARED BINARY: the same is not asked of the real thing"
            ),
        ),
    ]
)
def program(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def command(program: str, protocol: str, version: int = 2, *flags: str) -> tuple[str, ...]:
    base = OURS if program == "connector" else REFERENCE
    at = base.index("--grace-period")
    return (*base[:at], "--protocol", protocol, *base[at:-2], *features(version), *flags, *base[-2:])


class Upper(socketserver.StreamRequestHandler):
    """Answers lines in capitals; a line `N` that is a number with so many bytes."""

    def handle(self) -> None:
        for line in self.rfile:
            word = line.strip()
            self.wfile.write(b"z" * int(word) if word.isdigit() else line.upper())


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


@contextmanager
def tcp_origin() -> Iterator[str]:
    with Server(("127.0.0.1", 0), Upper) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join(20)


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(65536)
        assert more, f"the stream ended after {len(data)} of {size} bytes"
        data += more
    return data


@pytest.mark.parametrize("protocol", ["http2", "quic"])
def test_private_tcp(tmp_path: Path, program: str, protocol: str) -> None:
    dead = "127.0.0.1:1"
    with (
        tcp_origin() as origin,
        tunnel(
            tmp_path, "http_status:418", edge_args=("--tcp", f"127.0.0.1:0={origin}", "--tcp", f"127.0.0.1:0={dead}"),
            command=command(program, protocol),
        ) as path,
    ):  # fmt: skip
        assert path.registered["protocol"] == protocol
        forwards = {e["dest"]: e["listen"].rpartition(":") for e in path.edge.events if e.get("event") == "forward"}
        with socket.create_connection((forwards[origin][0], int(forwards[origin][2])), timeout=30) as client:
            client.sendall(b"hello\n")
            assert read_exactly(client, 6) == b"HELLO\n"
            client.sendall(b"3000000\n")
            assert read_exactly(client, 3_000_000) == b"z" * 3_000_000
            client.sendall(b"a" * 500_000 + b"\n")
            assert read_exactly(client, 500_001) == b"A" * 500_000 + b"\n"
        assert path.edge.event("tcp_flow", dest=origin)["protocol"] == protocol
        with socket.create_connection((forwards[dead][0], int(forwards[dead][2])), timeout=30) as client:
            client.sendall(b"hello\n")
            path.edge.event("tcp_flow_refused", dest=dead)
            try:
                assert client.recv(100) == b""
            except ConnectionError:
                pass


@pytest.mark.parametrize("version", [2, 3])
def test_udp(tmp_path: Path, program: str, version: int) -> None:
    with (
        udp_origin() as origin4,
        udp_origin(socket.AF_INET6) as origin6,
        tunnel(
            tmp_path, "http_status:418", edge_args=("--udp", f"127.0.0.1:0={origin4}", "--udp", f"[::1]:0={origin6}"),
            command=command(program, "quic", version),
        ) as path,
    ):  # fmt: skip
        announced = path.registered["features"]
        assert ("support_datagram_v2" in announced, "support_datagram_v3_2" in announced) == (True, version == 3)
        for forward in [e for e in path.edge.events if e.get("event") == "forward"]:
            host, _, port = forward["listen"].rpartition(":")
            family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as client:
                client.connect((host.strip("[]"), int(port)))
                for size in (1, 500, 1000):
                    assert ask(client, b"q" * size)
            assert path.edge.event("udp_flow")["version"] == version


VIRTUAL_DNS = "[2606:4700:cf1:2000::1]:53"


def test_the_virtual_dns_address(tmp_path: Path, program: str) -> None:
    """Its TCP and UDP go to the resolver that the flag names, which is no address of the private network."""
    port = free_port()  # for both; a port that the system gave out for one may be in use for the other
    with (
        udp_origin(port=port) as resolver,
        Server(("127.0.0.1", port), Upper) as tcp,
        tunnel(
            tmp_path, "http_status:418",
            edge_args=("--udp", f"127.0.0.1:0={VIRTUAL_DNS}", "--tcp", f"127.0.0.1:0={VIRTUAL_DNS}"),
            command=command(program, "quic", 3, "--dns-resolver-addrs", resolver),
        ) as path,
    ):  # fmt: skip
        thread = threading.Thread(target=tcp.serve_forever, daemon=True)
        thread.start()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect(listen_address(path, "udp"))
            assert ask(client, b"question")
        with socket.create_connection(listen_address(path, "tcp"), timeout=30) as client:
            client.sendall(b"question\n")
            assert read_exactly(client, 9) == b"QUESTION\n"
        tcp.shutdown()
        thread.join(20)


@pytest.mark.parametrize("version", [2, 3])
def test_a_pushed_limit_of_flows(tmp_path: Path, program: str, version: int) -> None:
    config = tmp_path / "edge.toml"

    def write(limit: int) -> None:
        fresh = tmp_path / "new.toml"
        fresh.write_text(
            "[tunnels.test]\ningress = [{ service = 'http_status:418' }]\n"
            f"[tunnels.test.warp-routing]\nmaxActiveFlows = {limit}\n"
        )
        fresh.replace(config)

    write(1)
    with (
        udp_origin() as origin,
        limited(tmp_path, config, origin, command(program, "quic", version)) as path,
    ):
        address = listen_address(path, "udp")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.connect(address)
            assert ask(one, b"hello")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as two:
                two.connect(address)
                two.send(b"hello")
                assert "too many active flows" in path.edge.event("udp_flow_refused")["error"]
            write(2)
            path.edge.event("configuration", applied=True)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as three:
                three.connect(address)
                assert ask(three, b"welcome")
            assert ask(one, b"still here")


@contextmanager
def limited(state: Path, config: Path, origin: str, program: tuple[str, ...]) -> Iterator[Tunnel]:
    """As `tunnel`, with the tunnel's configuration in a file."""
    from tests.support.processes import Child, connector, edge_token

    with connector(
        "edge", "--state-dir", state, "--output", "json", "--config", config, "--udp", f"127.0.0.1:0={origin}"
    ) as edge:
        listening = edge.event("listening")
        token_file = state / "token"
        token_file.write_text(edge_token(state))
        known = {"edge": listening["edge"], "ca": listening["ca"], "token_file": token_file}
        with Child(*(part.format(**known) for part in program)) as run:
            try:
                registered = edge.event("registered")
                edge.event("configuration", applied=True)
            except AssertionError as error:
                raise AssertionError(f"{error}\n--- connector:\n{run.text}") from None
            yield Tunnel(edge, run, listening, registered, state)
