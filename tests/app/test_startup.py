"""What a run has loaded at its first registration: modules are counted, since time depends on who else computes.

Measured on a two-core machine, Python 3.13 without PGO: 0.12 s of CPU over HTTP/2, 0.20 s with QUIC, from the command
line to a configuration in force on loopback (`python -X importtime -m connector run ...` shows where it goes).
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

MOST = {"http2": 370, "auto": 440}
"""Modules at most. 302 and 358 on Python 3.13 when this was written; a package that comes in by accident has dozens."""

ABSENT = {
    "aiohttp", "aioquic", "h2", "h11", "hpack", "websockets", "cryptography", "dns", "yaml", "prometheus_client",
    "google", "jwt", "aiodocker", "textual",
    "playwright", "argparse", "difflib", "unittest", "paho", "connector.devedge",
    "connector.inspector", "connector.app.doctor", "connector.app.prechecks", "connector.app.library",
    "connector.proxy.asgi", "connector.transport.discovery", "connector.transport.outbound_proxy",
    "connector.transport.trust_anchors", "connector.app.management", "connector.app.log_stream",
    "connector.app.log_files",
    "connector.app.tracing", "connector.proxy.access", "connector.proxy.hello_world", "connector.proxy.tcp",
    "connector.proxy.carrier", "connector.proxy.http2_origin", "connector.proxy.http2_exchange",
    "html", "http", "email", "tempfile",
}  # fmt: skip
"""What a run with an address and a token must not load before it serves."""

ABSENT_OVER_HTTP2 = {
    "qh3", "dataclasses", "pathlib", "glob", "hashlib", "ctypes", "connector.app.private_network",
    "connector.proxy.udp",
    "connector.proxy.icmp", "connector.transport.quic", "connector.transport.udp",
}  # fmt: skip
"""What only QUIC wants; ctypes is loaded a second after the start."""


@pytest.mark.parametrize("protocol", ["http2", "auto"])
def test_a_run_loads_only_what_it_needs(tmp_path: Path, protocol: str) -> None:
    with dev_edge(tmp_path, "--ingress", "http_status:204") as (_, listening):
        args = ("run", "--edge", listening["edge"], "--cacert", listening["ca"], "--protocol", protocol)
        with Child(sys.executable, "-c", RUN, *args, env={"TUNNEL_TOKEN": edge_token(tmp_path)}) as child:
            names = child.event("modules", limit=60)["names"]
    absent = ABSENT | ABSENT_OVER_HTTP2 if protocol == "http2" else ABSENT
    loaded = {name for name in names if name in absent or name.partition(".")[0] in absent}
    assert not loaded
    assert len(names) <= MOST[protocol], sorted(names)


def test_help_and_version_load_next_to_nothing() -> None:
    code = RUN.replace("from connector.app import process", "process = type('', (), {})")
    code = code.replace("sys.exit(main(sys.argv[1:]))", "main(sys.argv[1:])\nup(None, None)")
    for words in (["--version"], ["--help"], ["run", "--help"]):
        with Child(sys.executable, "-c", code, *words) as child:
            names = child.event("modules", limit=60)["names"]
        assert not {"asyncio", "ssl", "capnp", "logging", "uvloop", "msgspec"} & set(names), words
