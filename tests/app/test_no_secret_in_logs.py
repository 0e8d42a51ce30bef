"""The whole suite is searched for secrets: every line of every program that a test starts (tests/support/processes.py).

Here: that the search finds what it looks for, and that the connector keeps its secrets in its noisiest moments.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from connector.wire.token import decode_token
from tests.support.processes import SECRETS, Child, connector, dev_edge, edge_token


def test_a_leak_anywhere_fails_the_test_that_made_it(tmp_path: Path) -> None:
    token = edge_token(tmp_path)
    for leak in (token, decode_token(token).secret.hex()):
        with (
            pytest.raises(AssertionError, match="shows a secret"),
            Child(sys.executable, "-c", f"print('x {leak} y')") as it,
        ):
            it.wait()


def test_the_connector_at_its_noisiest(tmp_path: Path) -> None:
    files = tmp_path / "logs"
    with dev_edge(tmp_path, "--ingress", "http_status:204", "--fault", "registration=unauthorized") as (_, listening):
        token = edge_token(tmp_path)
        assert {token.rstrip("=")} <= SECRETS
        where = ("--edge", listening["edge"], "--cacert", listening["ca"], "--loglevel", "debug")
        ways = (
            (("--token", token), {}), ((), {"TUNNEL_TOKEN": token}), (("--token", token[:-9]), {}),
            (("--token-file", token), {}), ((token,), {}), (("--metrics", token), {}),
        )  # fmt: skip
        for number, (words, env) in enumerate(ways):
            more = ("--log-directory", str(files / str(number)), "--access-log")
            with connector("run", *where, *more, *words, env=env) as it:
                try:
                    it.wait(6)
                except AssertionError:
                    it.signal()
                    it.wait()
    for path in files.rglob("*.log"):
        text = path.read_text()
        assert not any(secret in text for secret in SECRETS), path
