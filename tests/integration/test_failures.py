"""What users get when something is wrong: one clear line, the right status or retry, nothing hung."""

from __future__ import annotations

import http.client
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.origins import free_port, http_origin, raw_origin
from tests.support.processes import ROOT, Tunnel, connector, dev_edge, edge_token, tunnel


def get(up: Tunnel, path: str = "/") -> tuple[int, bytes]:
    connection = http.client.HTTPSConnection(
        "localhost", up.port, context=ssl.create_default_context(cafile=str(up.ca)), timeout=30
    )
    try:
        connection.request("GET", path)
        with connection.getresponse() as response:
            return response.status, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("token", ["", "rubbish!", "eyJhIjoi", '{"a":"x"}'])
def test_an_undecodable_token_is_said_and_ends_with_255(token: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "connector", "run", f"--token={token}"],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=30,
    )
    assert result.returncode == 255
    if token:
        assert "Provided Tunnel token is not valid." in result.stderr
        assert token not in result.stderr


def test_a_wrong_secret_is_named_and_retried(tmp_path: Path) -> None:
    with dev_edge(tmp_path, "--ingress", "http_status:204") as (edge, listening):
        edge_token(tmp_path)
        other = tmp_path / "other"
        wrong = edge_token(other)  # same account and name in another state directory: another tunnel
        with connector(
            *("run", "--edge", listening["edge"], "--cacert", listening["ca"], "--output", "json"),
            env={"TUNNEL_TOKEN": wrong},
        ) as run:
            edge.event("register_refused")
            retry = run.message("Retrying connection in up to")
            assert retry["connIndex"] == 0
            assert "Unauthorized" in run.text
            assert wrong not in run.text


def test_an_unreachable_edge_is_named_and_retried(tmp_path: Path) -> None:
    port = free_port()
    with dev_edge(tmp_path, "--ingress", "http_status:204"):
        token = edge_token(tmp_path)
    with connector("run", "--edge", f"127.0.0.1:{port}", "--output", "json", env={"TUNNEL_TOKEN": token}) as run:
        run.message("Retrying connection in up to")
        assert str(port) in run.text
        assert "refuses connections" in run.text


def test_an_untrusted_edge_certificate_is_explained(tmp_path: Path) -> None:
    with dev_edge(tmp_path, "--ingress", "http_status:204") as (_edge, listening):
        token = edge_token(tmp_path)
        with connector("run", "--edge", listening["edge"], "--output", "json", env={"TUNNEL_TOKEN": token}) as run:
            run.message("Retrying connection in up to")
            assert "--cacert" in run.text


def test_an_edge_that_dies_is_found_again(tmp_path: Path) -> None:
    port = free_port()
    with dev_edge(tmp_path, "--ingress", "http_status:204", "--listen", f"127.0.0.1:{port}") as (edge, listening):
        token = edge_token(tmp_path)
        with connector(
            *("run", "--edge", listening["edge"], "--cacert", listening["ca"], "--output", "json"),
            env={"TUNNEL_TOKEN": token},
        ) as run:
            edge.event("registered")
            run.message("Registered tunnel connection")
            edge.process.kill()
            edge.wait()
            run.message("Retrying connection in up to")
            with dev_edge(tmp_path, "--ingress", "http_status:204", "--listen", f"127.0.0.1:{port}") as (again, _):
                again.event("registered", limit=30)


def test_an_origin_that_is_down_is_a_502_with_the_reason_in_the_log(tmp_path: Path) -> None:
    port = free_port()
    with tunnel(tmp_path, f"http://127.0.0.1:{port}") as up:
        status, _ = get(up)
        assert status == 502
        line = up.connector.wait_for(lambda e: e.get("level") == "error", what="error line")
        assert str(port) in str(line)
        assert "refused" in str(line)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(b"banana\r\n\r\n", "HTTP"), (None, "without"), (b"HTTP/1.1 200 OK\r\nContent-Length: zz\r\n\r\n", "ontent")],
    ids=["garbage", "nothing", "bad length"],
)
def test_an_origin_that_answers_garbage_is_a_502_with_the_reason(
    tmp_path: Path, answer: bytes | None, reason: str
) -> None:
    with raw_origin(answer) as port, tunnel(tmp_path, f"http://127.0.0.1:{port}") as up:
        status, _ = get(up)
        assert status == 502
        line = up.connector.wait_for(lambda e: e.get("level") == "error", what="error line")
        assert reason in str(line), line


@pytest.mark.parametrize("protocol", ["http2", "quic"])
def test_an_origin_that_cuts_its_body_truncates_instead_of_pretending(tmp_path: Path, protocol: str) -> None:
    with (
        raw_origin(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this") as port,
        tunnel(tmp_path, f"http://127.0.0.1:{port}", run_args=("--protocol", protocol)) as up,
    ):
        try:
            status, _ = get(up)
        except (http.client.IncompleteRead, ConnectionError, ssl.SSLError):
            return
        assert (protocol, status) == ("quic", 502)  # a reset there may overtake the head that was queued before it


def test_an_edge_that_dies_mid_request_ends_the_origins_request(tmp_path: Path) -> None:
    with http_origin() as port, tunnel(tmp_path, f"http://127.0.0.1:{port}") as up:
        connection = http.client.HTTPSConnection(
            "localhost", up.port, context=ssl.create_default_context(cafile=str(up.ca)), timeout=30
        )
        connection.request("GET", "/stall")
        up.edge.event("request", path="/stall")
        up.edge.process.kill()
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError, ssl.SSLError)):
            connection.getresponse()
        connection.close()
        up.connector.message("Retrying connection in up to")
        up.connector.signal()
        assert up.connector.wait() == 0
