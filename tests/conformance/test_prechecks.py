"""Pre-checks at the start, as cloudflared prints them: ours, and its own when a binary is given (CLOUDFLARED).

Nothing leaves the machine but the look at api.cloudflare.com, whose outcome does not matter here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conformance.commands import COMMANDS
from tests.support.origins import free_port
from tests.support.processes import Child, dev_edge, edge_token

ENV = {"TUNNEL_NO_PRECHECKS": "false"}


def table(child: Child) -> list[list[str]]:
    rows = []
    for event in child.events:
        message = str(event.get("message", ""))
        if message.startswith("|  "):
            rows.append(re.split(r" {2,}", message.strip("| ")))
    return rows


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reachable_edge_passes(tmp_path: Path, command: tuple[str, ...]) -> None:
    with dev_edge(tmp_path, "--ingress", "http_status:204") as (edge, listening):
        args = ("tunnel", "--edge", listening["edge"], "--cacert", listening["ca"], "--output", "json")
        env = {**ENV, "TUNNEL_TOKEN": edge_token(tmp_path), "HOME": str(tmp_path)}
        with Child(*command, *args, "--no-autoupdate", "run", env=env) as run:
            edge.event("registered", limit=40)
            whole = run.message("precheck complete", limit=40)
            run.signal()
            assert run.wait(40) == 0
        title, *rows = table(run)
        assert title == ["CONNECTIVITY PRE-CHECKS"]
        assert rows[0] == ["COMPONENT", "TARGET", "STATUS", "DETAILS"]
        assert rows[1] == ["DNS Resolution", listening["edge"], "PASS", "DNS Resolved successfully"]
        assert rows[2] == ["UDP Connectivity", listening["edge"], "PASS", "QUIC connection successful"]
        assert rows[3] == ["TCP Connectivity", listening["edge"], "PASS", "HTTP/2 connection successful"]
        assert rows[4][:2] == ["Cloudflare API", "api.cloudflare.com:443"]
        assert (whole["hard_fail"], whole["suggested_protocol"]) == (False, "quic")
        lines = [event for event in run.events if event.get("message") == "precheck"]
        assert [line["component"] for line in lines] == [row[0] for row in rows[1:5]]
        assert {line["run_id"] for line in lines} == {whole["run_id"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_edge_that_is_not_there_fails_hard(tmp_path: Path, command: tuple[str, ...]) -> None:
    with dev_edge(tmp_path, "--ingress", "http_status:204") as (_, listening):
        token, ca = edge_token(tmp_path), listening["ca"]
    edge = f"127.0.0.1:{free_port()}"
    env = {**ENV, "TUNNEL_TOKEN": token, "HOME": str(tmp_path)}
    args = ("tunnel", "--edge", edge, "--cacert", ca, "--output", "json", "--no-autoupdate", "run")
    with Child(*command, *args, env=env) as run:
        whole = run.message("precheck complete", limit=60)
        assert whole["hard_fail"] is True
        assert "suggested_protocol" not in whole
        rows = table(run)
        assert ["UDP Connectivity", edge, "FAIL", "QUIC connection failed"] in rows
        assert ["TCP Connectivity", edge, "FAIL", "HTTP/2 connection is blocked or unreachable"] in rows
        for text in (
            "ERROR: Allow outbound QUIC traffic on port 7844 or use HTTP2.",
            "ERROR: Allow outbound TCP on port 7844.",
            "SUMMARY: Environment has critical failures. cloudflared may not be able to establish a tunnel.",
        ):
            assert f"|  {text}" in run.text
        run.signal()
        assert run.wait(40) == 0
