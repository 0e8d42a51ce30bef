"""Both kinds of stream transports carry the same link; which one serves is decided by what is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from connector.transport.h2 import dial_h2
from connector.transport.tls import edge_context
from tests.support.aio import run, until
from tests.support.mini_edge import MiniEdge
from tests.transport.quic_rig import Acceptor


@pytest.mark.parametrize("installed", [True, False])
def test_a_link_works_with_and_without_aiofastnet(
    tmp_path: Path, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed:
        pytest.importorskip("aiofastnet")
    else:
        monkeypatch.setitem(sys.modules, "aiofastnet", None)

    async def main() -> None:
        accept = Acceptor()
        async with MiniEdge(tmp_path) as edge:
            link = await dial_h2("127.0.0.1", edge.port, context=edge_context(edge.cacert), accept=accept)
            assert type(link._transport).__module__.startswith("aiofastnet") is installed
            peer = await edge.accepted()
            stream = peer.open([])
            await until(lambda: accept.sinks)
            stream.send(b"x" * 300_000, end=True)
            assert await stream.read(300_000) == b"x" * 300_000
            link.close()
            await link.wait_closed()

    run(main())


def test_with_a_key_log_the_loops_own_transport_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython's key log crashes the process on a TLS connection that its `ssl` did not make."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))

    async def main() -> None:
        async with MiniEdge(tmp_path) as edge:
            link = await dial_h2("127.0.0.1", edge.port, context=edge_context(edge.cacert), accept=Acceptor())
            await edge.accepted()
            link.abort()
        assert "CLIENT_TRAFFIC_SECRET_0" in (tmp_path / "keys").read_text()

    run(main())
