"""`connector tail` through the dev edge, from this connector and, given a binary, from cloudflared."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from connector.devedge.authority import StateDir
from connector.devedge.management import ManagementDesk
from connector.devedge.tunnels import Declaration, TunnelStore
from tests.support.origins import http_origin
from tests.support.processes import Child, Tunnel, connector, tunnel

CLOUDFLARED = os.environ.get("CLOUDFLARED", "")
THEIRS = (
    CLOUDFLARED, "tunnel", "--edge", "{edge}", "--cacert", "{ca}", "--no-prechecks", "--protocol", "http2",
    "--output", "json", "run", "--token-file", "{token_file}",
)  # fmt: skip


def management_token(state: Path, actor: str) -> str:
    directory = StateDir(state)
    (tunnel,) = TunnelStore(directory).resolve([Declaration("test")])
    return ManagementDesk(directory).issue(tunnel, actor)


def tailing(it: Tunnel, *args: str, actor: str = "me", token: str = "") -> Child:
    env = {"TUNNEL_MANAGEMENT_TOKEN": token or management_token(it.state, actor)}
    where = it.public.removeprefix("https://")
    return connector("tail", "--connect", where, "--cacert", it.ca, "--output", "json", *args, env=env)


def ask(it: Tunnel, path: str) -> None:
    url = f"{it.public}{path}"
    subprocess.run(["curl", "-s", "--cacert", str(it.ca), "-o", "/dev/null", url], check=True, timeout=30)


@pytest.mark.parametrize(
    "command",
    [None, pytest.param(THEIRS, marks=pytest.mark.skipif(not CLOUDFLARED, reason="CLOUDFLARED names no binary"))],
    ids=["ours", "cloudflared"],
)
def test_tail_shows_requests_while_they_happen(tmp_path: Path, command: tuple[str, ...] | None) -> None:
    with (
        http_origin() as port,
        tunnel(tmp_path, f"http://127.0.0.1:{port}", command=command) as it,
        tailing(it, "--event", "http") as tail,
    ):
        while not any("fields" in event for event in tail.events):  # what happens before the stream is not shown
            assert tail.process.poll() is None, tail.text
            ask(it, "/watched")
        event = tail.wait_for(lambda event: "fields" in event, what="an event")
        assert event["event"] == "http"
        assert event["fields"]["connIndex"] == 0
        tail.signal()
        assert tail.wait() == 0


def test_tail_says_why_there_is_nothing_to_see(tmp_path: Path) -> None:
    with tunnel(tmp_path, "http_status:204") as it:
        with tailing(it, token="e30.e30.x") as wrong:
            assert wrong.wait() == 1
            assert "the management token is not valid" in wrong.text
        with tailing(it, "--connector-id", "11111111-2222-4333-8444-555555555555") as nobody:
            assert nobody.wait() == 1
            assert "no connector of this tunnel is attached with the id" in nobody.text


def test_one_person_tails_until_the_connector_ends_which_waits_for_nobody(tmp_path: Path) -> None:
    with tunnel(tmp_path, "http_status:204", run_args=("--grace-period", "3m")) as it, tailing(it) as mine:
        mine.wait_for(lambda event: event.get("message") == "Streaming logs", what="the start of the stream")
        with tailing(it, actor="somebody else") as other:
            assert other.wait() == 1
            assert "4002 limit exceeded for streaming sessions" in other.text
        it.connector.signal()
        assert mine.wait() == 0
        assert "Initiating graceful shutdown" in mine.text
        assert "context closed" in mine.text
        assert it.connector.wait() == 0
        assert "eyJ" not in it.connector.text
