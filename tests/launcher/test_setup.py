"""The files that compose.yaml and the init container make."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from launcher import setup
from launcher.accounts import Accounts
from launcher.brokerconf import read
from launcher.credentials import verify_password
from tests.launcher.test_tokens import token


def test_made_once_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--directory", str(tmp_path / "c")]
    assert setup.main([*folder, "show"]) == 1
    assert "no users yet" in capsys.readouterr().err
    assert setup.main([*folder, "make"]) == 0
    said = capsys.readouterr().out
    passwords = (tmp_path / "c" / "passwords").read_text()
    assert not read((tmp_path / "c" / "mosquitto.conf").read_text()).findings
    assert setup.main([*folder]) == 0  # a restart of the stack
    assert "are kept" in capsys.readouterr().out
    assert (tmp_path / "c" / "passwords").read_text() == passwords
    assert setup.main([*folder, "show"]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert set(shown) == {"admin", "device"}
    assert not any(password in said for password in shown.values())
    book = Accounts.parse(passwords, (tmp_path / "c" / "acl").read_text())
    assert all(verify_password(password, book.hashes[name]) for name, password in shown.items())
    assert setup.main([*folder, "show"]) == 1
    assert "shown already" in capsys.readouterr().err
    for path in (tmp_path / "c").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) in {0o600, 0o700}


def test_more_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--directory", str(tmp_path)]
    setup.main([*folder, "make"])
    capsys.readouterr()
    assert setup.main([*folder, "add", "bob"]) == 0
    name, password = capsys.readouterr().out.splitlines()[0].split()
    book = Accounts.parse((tmp_path / "passwords").read_text(), (tmp_path / "acl").read_text())
    assert name == "bob"
    assert verify_password(password, book.hashes["bob"])
    assert setup.main([*folder, "add", "a/b"]) == 1
    assert "user name" in capsys.readouterr().err


def test_the_token_becomes_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TUNNEL_TOKEN", raising=False)
    monkeypatch.setenv("CLOUDFLARE_TUNNEL_TOKEN", token())
    file = tmp_path / "token"
    for _ in range(2):
        assert setup.main(["token", "--token-file", str(file)]) == 0
        assert file.read_text().strip() == token()
        assert stat.S_IMODE(file.stat().st_mode) == 0o400
        assert token() not in capsys.readouterr().out
    monkeypatch.setenv("CLOUDFLARE_TUNNEL_TOKEN", "your_token")
    assert setup.main(["token", "--token-file", str(file)]) == 1
    assert "placeholder" in capsys.readouterr().err
