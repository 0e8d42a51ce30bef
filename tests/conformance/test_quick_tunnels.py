"""Quick tunnels against the dev edge's API: ours, and cloudflared's when a binary is given (CLOUDFLARED)."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.conformance.commands import COMMANDS
from tests.support.origins import free_port, http_origin
from tests.support.processes import Child, connector


@contextmanager
def answering(body: bytes) -> Iterator[str]:
    """A service that says `body` to everything."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_quick_tunnel_serves_without_an_account(tmp_path: Path, command: tuple[str, ...]) -> None:
    with (
        http_origin() as origin,
        connector("edge", "--state-dir", tmp_path, "--quick", "127.0.0.1:0", "--output", "json") as edge,
    ):
        listening = edge.event("listening")
        metrics = f"127.0.0.1:{free_port()}"
        args = (
            *(
                "tunnel",
                "--edge",
                listening["edge"],
                "--cacert",
                listening["ca"],
                "--quick-service",
                listening["quick"],
            ),
            *("--no-prechecks", "--no-autoupdate", "--metrics", metrics, "--output", "json"),
            *("--url", f"http://127.0.0.1:{origin}"),
        )
        with Child(*command, *args, env={"HOME": str(tmp_path)}) as run:
            made = edge.event("quick tunnel")
            hostname = str(made["hostname"])
            run.message("|  Your quick Tunnel has been created! Visit it at")
            run.message(f"|  https://{hostname} ")
            edge.event("registered", limit=40)
            run.message("Registered tunnel connection")
            port = int(listening["public"].rpartition(":")[2])
            context = ssl.create_default_context(cafile=listening["ca"])
            raw = socket.create_connection(("127.0.0.1", port), timeout=30)
            eyeball = http.client.HTTPConnection(hostname, port)
            eyeball.sock = context.wrap_socket(raw, server_hostname=hostname)
            eyeball.request("GET", "/hello")
            answer = eyeball.getresponse()
            assert (answer.status, json.loads(answer.read())["target"]) == (200, "/hello")
            eyeball.close()
            run.signal()
            assert run.wait(40) == 0
            assert "Traceback" not in run.text


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"not json", "failed to unmarshal quick Tunnel"),
        (b'{"success":true,"result":{"id":"no uuid"}}', "failed to parse quick Tunnel ID"),
    ],
)
def test_an_answer_that_is_none_ends_with_1(command: tuple[str, ...], body: bytes, says: str) -> None:
    with answering(body) as service:
        args = ("tunnel", "--quick-service", service, "--no-autoupdate", "--url", "http://127.0.0.1:9")
        with Child(*command, *args) as run:
            assert run.wait(40) == 1
            assert says in run.text
            assert "Traceback" not in run.text


@pytest.mark.parametrize("command", COMMANDS)
def test_a_service_that_is_not_there_ends_with_1(command: tuple[str, ...]) -> None:
    service = f"http://127.0.0.1:{free_port()}"
    with Child(*command, "tunnel", "--quick-service", service, "--no-autoupdate", "--url", "http://127.0.0.1:9") as run:
        assert run.wait(40) == 1
        assert "failed to request quick Tunnel" in run.text


def test_a_refusal_is_told_in_the_words_of_the_service() -> None:
    body = b'{"success":false,"result":null,"errors":[{"code":1015,"message":"too many"}]}'
    good = {"id": "f1e2d3c4-b5a6-4978-8a9b-0c1d2e3f4a5b", "hostname": "a.test", "account_tag": "a", "secret": "!"}
    for answer, says in ((body, "too many (code 1015)"), (json.dumps({"result": good}).encode(), "without host name")):
        with answering(answer) as service, connector("tunnel", "--quick-service", service, "--url", "x") as run:
            assert run.wait(40) == 1
            assert says in run.text
