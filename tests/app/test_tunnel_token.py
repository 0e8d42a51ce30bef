"""`tunnel token`: the account's certificate, the two questions to the API, what is printed or written."""

from __future__ import annotations

import base64
import json
import os
import stat
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from connector.app.cli import main
from connector.wire.token import Token, decode_credentials, encode_token

ID = uuid.UUID("f1e2d3c4-b5a6-4978-8a9b-0c1d2e3f4a5b")
TOKEN = Token("account1", bytes(range(32)), ID)
KEY = "the-api-key"


class Api:
    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.answers: dict[str, tuple[int, Any]] = {
            f"/v4/accounts/account1/cfd_tunnel/{ID}/token": (200, encode_token(TOKEN)),
            "/v4/accounts/account1/cfd_tunnel?is_deleted=false&name=my+tunnel": (200, [{"id": str(ID)}]),
            "/v4/accounts/account1/cfd_tunnel?is_deleted=false&name=none": (200, []),
        }


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Api]:
    it = Api()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            it.asked.append((self.path, dict(self.headers)))
            status, result = it.answers.get(self.path, (404, None))
            errors = [] if status == 200 else [{"code": 1002, "message": "no such thing"}]
            body = json.dumps({"success": status == 200, "errors": errors, "result": result}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("TUNNEL_API_URL", f"http://127.0.0.1:{server.server_port}/v4")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("TUNNEL_ORIGIN_CERT", str(certificate(tmp_path, {"accountID": "account1", "apiToken": KEY})))
        yield it
        server.shutdown()


def certificate(directory: Path, fields: object, blocks: int = 1) -> Path:
    text = base64.b64encode(json.dumps(fields).encode()).decode()
    other = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    path = directory / "cert.pem"
    path.write_text(other + f"-----BEGIN ARGO TUNNEL TOKEN-----\n{text}\n-----END ARGO TUNNEL TOKEN-----\n" * blocks)
    return path


@pytest.mark.parametrize("wanted", [str(ID), "my tunnel"])
def test_the_token_is_printed(api: Api, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tunnel", "token", wanted]) == 0
    assert capsys.readouterr().out == encode_token(TOKEN) + "\n"
    for _, headers in api.asked:
        assert headers["Authorization"] == f"Bearer {KEY}"
        assert headers["Accept"] == "application/json;version=1"
        assert headers["User-Agent"].startswith("cloudflared/")


def test_or_written_as_a_credentials_file_that_nobody_overwrites(
    api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "credentials.json"
    assert main(["tunnel", "token", "--cred-file", str(path), str(ID)]) == 0
    assert decode_credentials(path.read_text()) == TOKEN
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o400
    assert main(["tunnel", "token", "--cred-file", str(path), str(ID)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "File exists" in captured.err


def test_management_tokens(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.answers[f"/v4/accounts/account1/cfd_tunnel/{ID}/management/logs"] = (200, "a.b.c")
    assert main(["management", "token", "--resource", "logs", str(ID)]) == 0
    assert json.loads(capsys.readouterr().out) == {"token": "a.b.c"}
    assert main(["management", "token", str(ID)]) == 255
    assert "must be one of: logs, admin, host_details" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["none"], "none is neither the ID nor the name of any of your tunnels"),
        ([str(uuid.UUID(int=1))], "Failed to get tunnel token: code: 1002, reason: no such thing"),
        ([], "requires exactly 1 argument"),
        (["a", "b"], "requires exactly 1 argument"),
        (["--origincert", "/nowhere", str(ID)], "Cannot find a valid certificate"),
        (["--api-url", "http://127.0.0.1:1", str(ID)], "REST request failed"),
        (["--api-url", "file:///etc/passwd", str(ID)], "not an HTTP URL"),
    ],
)
def test_what_goes_wrong_is_said(api: Api, words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tunnel", "token", *words]) in {1, 255}
    captured = capsys.readouterr()
    assert text in captured.err
    assert KEY not in captured.err


@pytest.mark.parametrize(("fields", "blocks"), [({}, 1), ([], 1), ({"accountID": "a", "apiToken": "x\ny"}, 1), ({}, 2)])
def test_certificates_that_are_none(
    api: Api, tmp_path: Path, fields: object, blocks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate(tmp_path, fields, blocks)
    assert main(["tunnel", "token", str(ID)]) == 1
    assert "Error decoding origin cert" in capsys.readouterr().err
    assert not api.asked
