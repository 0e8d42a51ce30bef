"""A run as its operator handles it: token rotation, commands on standard input, systemd."""

from __future__ import annotations

import base64
import http.client
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.office_proxy import OfficeProxy, office_proxy
from tests.support.origins import http_origin
from tests.support.processes import ROOT, Child, Event, connector, dev_edge, edge_token
from tests.support.ws_client import ws_connect

SECRETS = [base64.b64encode(bytes([number]) * 32).decode() for number in (1, 2, 3)]


def replace(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


class RotatingEdge:
    """A dev edge whose tunnel gets other secrets."""

    def __init__(self, tmp_path: Path, origin: int) -> None:
        self.path = tmp_path
        self.config = tmp_path / "edge.toml"
        self.origin = origin
        self.declare(SECRETS[0])

    def declare(self, secret: str, path: Path | None = None) -> None:
        replace(
            path or self.config,
            f'[tunnels.test]\nsecret = "{secret}"\n[[tunnels.test.ingress]]\n'
            f'service = "http://127.0.0.1:{self.origin}"\n',
        )

    def token(self, secret: str) -> str:
        other = self.path / "other.toml"
        self.declare(secret, other)
        command = (*(sys.executable, "-m", "connector", "edge", "token", "test"), "--config", str(other))
        return subprocess.run(
            [*command, "--state-dir", str(self.path)], check=True, capture_output=True, text=True, cwd=ROOT
        ).stdout.strip()

    @contextmanager
    def up(self) -> Iterator[tuple[Child, Event]]:
        args = ("edge", "--state-dir", self.path, "--output", "json", "--config", self.config)
        with connector(*args) as edge:
            yield edge, edge.event("listening")


@pytest.mark.parametrize("protocol", ["http2", "quic"])
def test_a_rotated_token_registers_again_and_cuts_nothing(tmp_path: Path, protocol: str) -> None:
    with http_origin() as origin:
        rotating = RotatingEdge(tmp_path, origin)
        with rotating.up() as (edge, listening):
            file = tmp_path / "token"
            file.write_text(rotating.token(SECRETS[0]))
            args = ("--edge", listening["edge"], "--cacert", listening["ca"], "--output", "json")
            with connector("run", *args, "--protocol", protocol, "--token-file", file) as run:
                edge.event("configuration", applied=True)
                run.message("Registered tunnel connection")
                context = ssl.create_default_context(cafile=listening["ca"])
                port = int(listening["public"].rpartition(":")[2])

                def ask() -> int:
                    eyeball = http.client.HTTPSConnection("localhost", port, context=context, timeout=30)
                    eyeball.request("GET", "/")
                    status = eyeball.getresponse().status
                    eyeball.close()
                    return status

                with ws_connect(f"wss://localhost:{port}/ws", context, open_timeout=80, close_timeout=1) as websocket:
                    websocket.send("before")
                    assert websocket.recv(30) == "before"
                    rotating.declare(SECRETS[1])
                    edge.event("reloaded")
                    replace(file, rotating.token(SECRETS[1]))
                    run.message("The token file has a new token", limit=30)
                    run.message("Registered tunnel connection", limit=30)
                    websocket.send("after")
                    assert websocket.recv(30) == "after"
                    assert ask() == 200
                    # A file that is wrong costs a moment of one connection, not the tunnel.
                    replace(file, rotating.token(SECRETS[2]))
                    run.message("The edge refuses the new token", limit=30)
                    run.message("Registered tunnel connection", limit=30)
                    assert ask() == 200
                    websocket.send("last")
                    assert websocket.recv(30) == "last"
                run.signal()
                assert run.wait(40) == 0
                for secret in SECRETS:
                    assert rotating.token(secret)[60:] not in run.text
                assert "Traceback" not in run.text


def test_a_command_on_standard_input_restarts_a_connection(tmp_path: Path) -> None:
    with dev_edge(tmp_path, "--ingress", "http_status:204") as (edge, listening):
        reading, writing = os.pipe()
        args = ("--edge", listening["edge"], "--cacert", listening["ca"], "--output", "json", "--stdin-control")
        env = {"TUNNEL_TOKEN": edge_token(tmp_path)}
        with Child(sys.executable, "-m", "connector", "run", *args, env=env, stdin=reading) as run:
            os.close(reading)
            first = run.message("Registered tunnel connection")
            os.write(writing, b"help\nreconnect 100ms\n")
            run.message("Supported command")
            run.message("Sending reconnect signal")
            edge.event("unregistered")
            second = run.message("Registered tunnel connection")
            assert first["connection"] != second["connection"]
            assert "Retrying connection" not in run.text
            run.signal()  # standard input stays open
            assert run.wait() == 0
            os.close(writing)


def test_systemd_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        with dev_edge(tmp_path, "--ingress", "http_status:204") as (_, listening):
            env = {
                "TUNNEL_TOKEN": edge_token(tmp_path),
                "NOTIFY_SOCKET": str(tmp_path / "notify"),
                "WATCHDOG_USEC": "100000",
            }
            args = ("run", "--edge", listening["edge"], "--cacert", listening["ca"], "--output", "json")
            with connector(*args, env=env) as run:
                heard = []
                while not any(text.startswith("READY=1") for text in heard):
                    heard.append(systemd.recv(1000).decode())
                assert heard[0] == "WATCHDOG=1"
                assert "is connected" in heard[-1]
                run.signal()
                while heard[-1] != "STOPPING=1":
                    heard.append(systemd.recv(1000).decode())
                assert run.wait() == 0


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_an_offices_proxy_carries_the_tunnel(tmp_path: Path, scheme: str) -> None:
    with (
        http_origin() as origin,
        dev_edge(tmp_path, "--ingress", f"http://127.0.0.1:{origin}") as (edge, listening),
        office_proxy(OfficeProxy(user="me", password="geheim", goes_to="127.0.0.1")) as office,
    ):
        port = listening["edge"].rpartition(":")[2]
        env = {"TUNNEL_TOKEN": edge_token(tmp_path), "HTTPS_PROXY": f"{scheme}://me:geheim@127.0.0.1:{office.port}"}
        # The name is the proxy's to resolve: nobody here knows it.
        args = (
            "--edge",
            f"edge.invalid:{port}",
            "--cacert",
            listening["ca"],
            "--output",
            "json",
            "--loglevel",
            "debug",
        )
        with connector("run", *args, env=env) as run:
            run.message("The edge is reached through the proxy")
            line = run.message("Registered tunnel connection")
            assert line["protocol"] == "http2"
            edge.event("configuration", applied=True)
            context = ssl.create_default_context(cafile=listening["ca"])
            public = int(listening["public"].rpartition(":")[2])
            eyeball = http.client.HTTPSConnection("localhost", public, context=context, timeout=30)
            eyeball.request("GET", "/")
            assert eyeball.getresponse().status == 200
            eyeball.close()
            run.signal()
            assert run.wait() == 0
            assert "geheim" not in run.text
        assert office.asked == [(scheme, "edge.invalid", int(port))]


def test_a_dev_edge_on_this_machine_needs_no_proxy(tmp_path: Path) -> None:
    with dev_edge(tmp_path, "--ingress", "http_status:204") as (_, listening):
        env = {"TUNNEL_TOKEN": edge_token(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
        args = ("run", "--edge", listening["edge"], "--cacert", listening["ca"], "--output", "json")
        with connector(*args, env=env) as run:
            run.message("Registered tunnel connection")
            assert "through the proxy" not in run.text


def test_a_proxys_password_is_seen_nowhere(tmp_path: Path) -> None:
    with (
        dev_edge(tmp_path, "--ingress", "http_status:204") as (_, listening),
        office_proxy(OfficeProxy(user="me", password="geheim", goes_to="127.0.0.1")) as office,
    ):
        url = f"http://me:geheim@127.0.0.1:{office.port}"
        args = ("--edge", listening["edge"], "--cacert", listening["ca"], "--output", "json", "--loglevel", "debug")
        for words, more in (
            (["--edge-proxy", url], {}),
            ([f"--edge-proxy={url}"], {}),
            ([], {"TUNNEL_EDGE_PROXY": url}),
        ):
            env = {"TUNNEL_TOKEN": edge_token(tmp_path), **more}
            with connector("tunnel", *words, "run", *args, env=env) as run:
                run.message("Registered tunnel connection")
                title = Path(f"/proc/{run.pid}/cmdline").read_bytes() if sys.platform == "linux" else b""
                assert b"geheim" not in title
                run.signal()
                assert run.wait() == 0
                assert "geheim" not in run.text
                assert "given on the command line" not in run.text
        assert len(office.asked) == 3
