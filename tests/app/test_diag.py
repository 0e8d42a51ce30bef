"""`tunnel diag`: the zip of a running connector, and how an instance is found."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from connector.app import diag as diag_module
from connector.app.diag import DiagError, Instance, parse_route
from connector.app.logs import Logger, LogOutput
from tests.support.processes import ROOT, SECRETS, tunnel

TRACE = """\
traceroute to region1.v2.argotunnel.com (198.41.192.57), 5 hops max, 60 byte packets
 1  gateway (192.0.2.1)  0.512 ms  0.611 ms  0.702 ms
 2  * * *
 3  10.0.0.1 (10.0.0.1)  5.5 ms * 6 ms
"""


def test_hops_of_a_traced_route() -> None:
    assert parse_route(TRACE) == [
        {"hop": 1, "domain": "gateway (192.0.2.1)", "rtts": [512, 611, 702]},
        {"hop": 2, "domain": "*"},
        {"hop": 3, "domain": "10.0.0.1 (10.0.0.1)", "rtts": [5500, 6000]},
    ]


def diagnose(where: Path, *words: str) -> tuple[int, str, dict[str, bytes]]:
    done = subprocess.run(
        [sys.executable, "-m", "connector", "tunnel", *words],
        cwd=where, capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    files = {}
    for path in where.glob("cloudflared-diag-*.zip"):
        assert path.stat().st_mode & 0o077 == 0
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        path.unlink()
    return done.returncode, done.stderr, files


def test_the_zip_of_a_running_connector(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    args = ("--metrics", "127.0.0.1:0", "--log-directory", str(logs), "--loglevel", "debug")
    with tunnel(tmp_path, "http_status:204", run_args=args) as it:
        address = it.connector.message("Starting metrics server on ")["message"].split()[-1].removesuffix("/metrics")
        status, said, files = diagnose(tmp_path, "--metrics", address, "diag", "--no-diag-network")
        assert status == 0, said
        assert "Diagnostic completed" in said
        assert set(files) == {
            "tunnelstate.json", "systeminformation.json", "goroutine.pprof", "heap.pprof", "metrics.txt",
            "cloudflared.log", "cli-configuration.json", "configuration.json", "task-result.json",
        }  # fmt: skip
        report = json.loads(files["task-result.json"])
        assert {entry["result"] for entry in report.values()} == {"success"}
        assert json.loads(files["tunnelstate.json"])["connections"][0]["isConnected"] is True
        assert json.loads(files["configuration.json"])["version"] == 1
        assert json.loads(files["cli-configuration.json"])["log-directory"] == str(logs)
        assert b"cloudflared_tunnel_ha_connections 1.0" in files["metrics.txt"]
        assert b"Registered tunnel connection" in files["cloudflared.log"]
        for name, data in files.items():
            assert not any(secret.encode() in data for secret in SECRETS), name
        few = ("--no-diag-logs", "--no-diag-metrics", "--no-diag-system", "--no-diag-runtime", "--no-diag-network")
        status, said, files = diagnose(tmp_path, "--metrics", address, "diag", *few)
        assert status == 0
        assert set(files) == {"tunnelstate.json", "cli-configuration.json", "configuration.json", "task-result.json"}
        wrong = ("--no-diag-network", "--diag-container-id", "no-such-container-here")
        status, said, files = diagnose(tmp_path, "--metrics", address, "diag", *wrong)
        assert status == 0
        assert "with one or more errors" in said
        assert json.loads(files["task-result.json"])["log information"]["result"] == "failure"
    status, said, files = diagnose(tmp_path, "--metrics", address, "diag")
    assert (status, files) == (1, {})
    assert "no connector answers at" in said


@contextmanager
def instances(count: int) -> Iterator[list[str]]:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"tunnelID": "t", "connectorID": f"c{self.server.server_port}"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Page) for _ in range(count)]
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield [f"127.0.0.1:{server.server_port}" for server in servers]
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str], str], tuple[Instance | None, str]]:
    def look(known: list[str], address: str = "") -> tuple[Instance | None, str]:
        monkeypatch.setattr(diag_module, "known_addresses", lambda: ["127.0.0.1:1", *known])
        stream = io.StringIO()
        return diag_module._find(address, Logger(LogOutput(stream=stream))), stream.getvalue()

    return look


def test_how_an_instance_is_found(find: Callable[[list[str], str], tuple[Instance | None, str]]) -> None:
    with instances(2) as known:
        found, said = find(known[:1], "")
        assert found is not None
        assert found.address == known[0]
        found, said = find(known, "")
        assert found is None
        assert all(f"metrics-address=http://{address}" in said for address in known)
        assert "use the option --metrics" in said
        found, _ = find([], f"http://{known[1]}")
        assert found is not None
    found, said = find([], "")
    assert (found, "No instances found" in said) == (None, True)
    with pytest.raises(DiagError, match="no connector answers"):
        find([], "127.0.0.1:1")
