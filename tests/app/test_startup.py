"""What a run has loaded at its first registration: modules are counted, since time depends on who else computes.

Measured on a quiet two-core machine, Python 3.13: 0.22 s of CPU over HTTP/2, 0.30 s with QUIC, from the command line to
the registration on loopback (`python -X importtime -m connector run ...` shows where it goes).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.processes import Child, dev_edge, edge_token

RUN = """
import json, sys
from connector.app import process

def up(config, log):
    print(json.dumps({"event": "modules", "names": sorted(sys.modules)}), flush=True)

process._write_pidfile = up
from connector.app.cli import main
sys.exit(main(sys.argv[1:]))
"""

MOST = {"http2": 430, "auto": 480}
"""Modules at most. 337 and 371 on Python 3.13 when this was written; a package that comes in by accident has dozens."""

ABSENT = {
    "aiohttp", "aioquic", "h2", "h11", "hpack", "websockets", "cryptography", "dns", "yaml", "prometheus_client",
    "google", "jwt", "aiodocker", "textual",
    "playwright", "argparse", "difflib", "unittest", "paho", "connector.devedge",
    "connector.inspector", "connector.app.doctor", "connector.app.prechecks", "connector.app.library",
    "connector.proxy.asgi", "connector.transport.discovery", "connector.transport.outbound_proxy",
}  # fmt: skip
"""What a run with an address and a token must not load before it serves."""


@pytest.mark.parametrize("protocol", ["http2", "auto"])
def test_a_run_loads_only_what_it_needs(tmp_path: Path, protocol: str) -> None:
    with dev_edge(tmp_path, "--ingress", "http_status:204") as (_, listening):
        args = ("run", "--edge", listening["edge"], "--cacert", listening["ca"], "--protocol", protocol)
        with Child(sys.executable, "-c", RUN, *args, env={"TUNNEL_TOKEN": edge_token(tmp_path)}) as child:
            names = child.event("modules", limit=60)["names"]
    loaded = {name for name in names if name in ABSENT or name.partition(".")[0] in ABSENT}
    assert not loaded
    assert len(names) <= MOST[protocol], sorted(names)


def test_help_and_version_load_next_to_nothing() -> None:
    code = RUN.replace("from connector.app import process", "process = type('', (), {})")
    code = code.replace("sys.exit(main(sys.argv[1:]))", "main(sys.argv[1:])\nup(None, None)")
    for words in (["--version"], ["--help"], ["run", "--help"]):
        with Child(sys.executable, "-c", code, *words) as child:
            names = child.event("modules", limit=60)["names"]
        assert not {"asyncio", "ssl", "capnp", "logging", "uvloop", "msgspec"} & set(names), words
