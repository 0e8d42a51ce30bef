"""The command line as users type it: real processes, exit statuses, texts on the right stream."""

from __future__ import annotations

import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.support.processes import ROOT

TOKEN = (
    "eyJhIjoiMDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWYiLCJzIjoiQUFFQ0F3UUZCZ2NJQ1FvTERBME9EeEFSRWhNVUZSWVhHQmthR3h3"
    "ZEhoOD0iLCJ0IjoiZjFlMmQzYzQtYjVhNi00OTc4LThhOWItMGMxZDJlM2Y0YTViIn0="
)


def connector(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "connector", *argv],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "PYTHONWARNINGS": "error", **(env or {})},
    )


@pytest.mark.parametrize(
    ("argv", "start"),
    [
        ((), "connector - serve"),
        (("--help",), "connector - serve"),
        (("-h",), "connector - serve"),
        (("help",), "connector - serve"),
        (("run", "--help"), "connector run - "),
        (("tunnel", "--help"), "connector tunnel - "),
        (("tunnel", "run", "-h"), "connector run - "),
        (("help", "run"), "connector run - "),
        (("help", "flags"), "Accepted, and"),
        (("--version",), "connector version 0."),
        (("-v",), "connector version 0."),
        (("version",), "connector version 0."),
        (("version", "--short"), "0."),
    ],
)
def test_help_and_version_go_to_stdout_with_status_0(argv: tuple[str, ...], start: str) -> None:
    result = connector(*argv)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(start)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("run", "--tokn", "x"), ["-tokn", "Did you mean --token?"]),
        (("tunnel", "--no-autoupdat", "run"), ["-no-autoupdat", "--no-autoupdate?"]),
        (("rum",), ["unknown command: rum", "Did you mean run?"]),
        (("tunnel", "rn"), ["unknown command: tunnel rn", "tunnel run?"]),
        (("tunnel", "create", "x"), ["no command tunnel create"]),
        (("run",), ["requires the token", "--token-file", "TUNNEL_TOKEN"]),
        (("run", "a", "b"), ["accepts only one argument"]),
        (("run", "a", "--token", "b"), ["accepts only one argument", "move --token to the left"]),
        (("run", TOKEN), ["looks like a token", "--token-file"]),
        (("run", "--token", "abc"), ["Provided Tunnel token is not valid."]),
        (("run", "--token-file", "/does/not/exist"), ["Failed to read token file: No such file", "/does/not/exist"]),
        (("run", "--grace-period", "soon", "--token", TOKEN), ["soon", "-grace-period: parse error", "30s"]),
        (("completion", "csh"), ["bash, zsh, fish"]),
        (("version", "--loglevel", "debug"), ["flag provided but not defined: -loglevel"]),
        (("help", "rum"), ["no help about rum"]),
    ],
)
def test_usage_errors_say_what_and_how_with_status_255(argv: tuple[str, ...], parts: list[str]) -> None:
    result = connector(*argv)
    assert result.returncode == 255
    assert result.stdout == ""
    for part in parts:
        assert part in result.stderr
    assert "See 'connector" in result.stderr.splitlines()[-1]
    assert TOKEN not in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("--protocol", "h3"), ["unknown protocol h3", "http2, quic"]),
        (("--protocol", "h3"), ["unknown protocol h3", "Allowed: auto, http2"]),
        (("--grace-period", "4m"), ["grace-period must be equal or less than 3m0s", "4m0s"]),
        (("--ha-connections", "0"), ["--ha-connections 0", "1 to 32"]),
        (("--rpc-timeout", "0"), ["--rpc-timeout"]),
        (("--retries=-1",), ["--retries"]),
        (("--edge", "nowhere"), ["--edge", "nowhere", "HOST:PORT"]),
        (("--edge", "::1:7844"), ["::1:7844", "[::1]:7844"]),
        (("--cacert", "/does/not/exist.pem"), ["--cacert", "/does/not/exist.pem"]),
        (("--edge-bind-address", "eth0"), ["--edge-bind-address", "eth0"]),
        (("--tag", "no-value"), ["Cannot parse tag value no-value", "NAME=VALUE"]),
        (("--metrics", "20241"), ["--metrics", "20241"]),
        (("--edge", "does-not-exist.invalid:1"), ["failed to resolve any edge address"]),
        (("--url", "ftp://x"), ["ftp"]),
    ],
)
def test_what_cannot_start_says_so_with_status_1(argv: tuple[str, ...], parts: list[str]) -> None:
    result = connector("run", *argv, env={"TUNNEL_TOKEN": TOKEN})
    assert result.returncode == 1
    for part in parts:
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert TOKEN not in result.stderr


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("tunnel",), ["connector tunnel run"]),
        (("--loglevel", "debug"), ["connector tunnel run"]),
        (("tunnel", "ready"), ["--metrics has to be provided"]),
    ],
)
def test_what_lacks_something_ends_with_1_as_in_cloudflared(argv: tuple[str, ...], parts: list[str]) -> None:
    result = connector(*argv)
    assert (result.returncode, result.stdout) == (1, "")
    for part in parts:
        assert part in result.stderr


def test_the_program_is_called_by_either_name(tmp_path: Path) -> None:
    script = tmp_path / "cloudflared"
    script.write_text("import sys\nfrom connector.app.cli import main\nsys.exit(main())\n")

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, script, *argv], check=False, capture_output=True, text=True, timeout=60, env=env
        )

    assert call("--no-autoupdate", "version").stdout.startswith("cloudflared version ")
    assert call("tunnel", "--help").stdout.startswith("cloudflared tunnel - ")
    assert call("rum").stderr.endswith("See 'cloudflared --help'.\n")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["cloudflared"] == scripts["connector"]


def test_a_bad_variable_is_named() -> None:
    result = connector("run", env={"TUNNEL_TOKEN": TOKEN, "TUNNEL_RETRIES": "many"})
    assert result.returncode == 255
    assert "TUNNEL_RETRIES" in result.stderr
    assert "many" in result.stderr


def test_a_cacert_without_certificates_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "ca.pem"
    empty.write_text("nothing here\n")
    result = connector("run", "--cacert", str(empty), "--edge", "127.0.0.1:9", env={"TUNNEL_TOKEN": TOKEN})
    assert result.returncode == 1
    assert str(empty) in result.stderr


@contextmanager
def http(status: int) -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"the body")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_ready_asks_a_running_connector() -> None:
    with http(200) as address:
        result = connector("tunnel", "--metrics", address, "ready")
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        assert connector("tunnel", "ready", env={"TUNNEL_METRICS": address}).returncode == 0
    with http(503) as address:
        result = connector("tunnel", "ready", "--metrics", address)
        assert result.returncode == 1
        assert result.stderr == f"http://{address}/ready endpoint returned status code 503\nthe body\n"
    result = connector("tunnel", "ready", "--metrics", address)  # nobody there any more
    assert result.returncode == 1
    assert address in result.stderr
    assert "Traceback" not in result.stderr
