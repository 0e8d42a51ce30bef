"""Management at the dev edge: whose tokens count, and where a request with one goes."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import jwt
import pytest

from connector.app.management import read_token
from connector.devedge import cli
from connector.devedge.authority import StateDir
from connector.devedge.management import ALGORITHM, ISSUER, KEY_FILE, ManagementDesk, ManagementError
from connector.devedge.tunnels import Declaration, Tunnel, TunnelStore

ONE, TWO = UUID(int=1), UUID(int=2)


def setting(state: Path) -> tuple[ManagementDesk, Tunnel, Any]:
    directory = StateDir(state)
    (tunnel,) = TunnelStore(directory).resolve([Declaration("test")])
    links = [SimpleNamespace(registration=SimpleNamespace(connector=each)) for each in (ONE, TWO)]
    roster = SimpleNamespace(
        directory=SimpleNamespace(tunnels={tunnel.id: tunnel}),
        links_of=lambda asked: links if asked is tunnel else [],
    )
    return ManagementDesk(directory), tunnel, roster


def target(token: str, more: str = "") -> bytes:
    return f"/logs?access_token={token}{more}".encode()


def test_a_token_leads_to_a_connector_of_its_tunnel(tmp_path: Path) -> None:
    desk, tunnel, roster = setting(tmp_path)
    token = desk.issue(tunnel, "me")
    assert desk.route(roster, target(token)) is roster.links_of(tunnel)[0]
    assert desk.route(roster, target(token, f"&connector_id={TWO}")) is roster.links_of(tunnel)[1]
    claims = read_token(token)  # the connector's own reading of it
    assert claims is not None
    assert (claims.actor, claims.tunnel) == ("me", str(tunnel.id))
    assert ManagementDesk(StateDir(tmp_path)).route(roster, target(token))  # the key is kept
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o077 == 0
    for wanted in (str(UUID(int=3)), "nonsense"):
        with pytest.raises(ManagementError, match="is attached with the id") as caught:
            desk.route(roster, target(token, f"&connector_id={wanted}"))
        assert caught.value.status == 530


def test_tokens_that_do_not_count(tmp_path: Path) -> None:
    desk, tunnel, roster = setting(tmp_path / "a")
    stranger, _, _ = setting(tmp_path / "b")
    key = desk._signing_key()
    old = {"tun": {"id": str(tunnel.id)}, "iss": ISSUER, "exp": int(time.time()) - 10}
    for token in (
        "x", stranger.issue(tunnel), desk.issue(tunnel)[:-4] + "AAAA", jwt.encode(old, key, algorithm=ALGORITHM),
        jwt.encode({"iss": ISSUER}, key, algorithm=ALGORITHM),
    ):  # fmt: skip
        with pytest.raises(ManagementError, match="is not valid") as caught:
            desk.route(roster, target(token))
        assert caught.value.status == 403
        assert token not in str(caught.value)
    with pytest.raises(ManagementError, match="missing access_token") as missing:
        desk.route(roster, b"/logs")
    assert missing.value.status == 400
    gone = SimpleNamespace(directory=SimpleNamespace(tunnels={}), links_of=lambda _: [])
    with pytest.raises(ManagementError, match="no connector of this tunnel"):
        desk.route(gone, target(desk.issue(tunnel)))  # type: ignore[arg-type]


def test_the_command_prints_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    desk, _, roster = setting(tmp_path)
    assert cli.main(["management", "test", "--state-dir", str(tmp_path), "--actor", "you"]) == 0
    token = capsys.readouterr().out.strip()
    assert desk.route(roster, target(token))
    assert cli.main(["management", "no name", "--state-dir", str(tmp_path)]) == 1
