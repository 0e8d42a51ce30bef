"""A connector in a network namespace of its own, whose address or route goes and comes back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.processes import Child, dev_edge, edge_token

HERE, THERE = "10.231.77.1", "10.231.77.2"
"""Ends of the wire between the test (where the edge listens) and the namespace."""


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


@contextmanager
def namespace() -> Iterator[str]:
    """A namespace that reaches the test's own over one wire; skips where that is not possible."""
    name = f"tc{os.getpid()}"
    if not shutil.which("ip"):
        pytest.skip("NO NETWORK NAMESPACES: lost addresses and routes are not tried (needs Linux, root, ip)")
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=20, check=False)
    if made.returncode:
        pytest.skip(f"NO NETWORK NAMESPACES: lost addresses and routes are not tried: {made.stderr.strip()}")
    try:
        ip("link", "add", name, "type", "veth", "peer", "name", "wire", "netns", name)
        ip("addr", "add", f"{HERE}/24", "dev", name)
        ip("link", "set", name, "up")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "addr", "add", f"{THERE}/24", "dev", "wire")
        ip("-n", name, "link", "set", "wire", "up")
        yield name
    finally:
        subprocess.run(["ip", "link", "del", name], capture_output=True, timeout=20, check=False)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20, check=False)


# Without a route TCP waits (its keep-alive takes 75 s), and goes on when the route is there again: nothing to see.
@pytest.mark.parametrize(("loss", "protocol"), [("address", "http2"), ("address", "quic"), ("route", "quic")])
def test_what_goes_ends_the_link_and_what_comes_back_is_noticed(tmp_path: Path, loss: str, protocol: str) -> None:
    with (
        namespace() as name,
        dev_edge(tmp_path, "--ingress", "http_status:204", "--listen", f"{HERE}:0") as (edge, listening),
    ):
        if loss == "address":
            gone = ["addr", "del", f"{THERE}/24", "dev", "wire"]
            back = ["addr", "add", f"{THERE}/24", "dev", "wire"]
        else:
            gone = ["link", "set", "wire", "down"]
            back = ["link", "set", "wire", "up"]
        command = ["connector", "run", "--edge", listening["edge"], "--cacert", listening["ca"], "--output", "json"]
        with Child(
            *("ip", "netns", "exec", name, sys.executable, "-m", *command, "--protocol", protocol),
            env={"TUNNEL_TOKEN": edge_token(tmp_path)},
        ) as run:
            edge.event("registered")
            run.message("Registered tunnel connection")
            ip("-n", name, *gone)
            run.message("Lost connection with the edge", limit=60)  # found by the check: TCP alone would take minutes
            run.message("Retrying connection in up to 8s", limit=60)
            ip("-n", name, *back)
            run.message("The network changed: connections that waited retry now", limit=60)
            assert run.message("Registered tunnel connection", limit=60)["protocol"] == protocol
            run.signal()
            assert run.wait(40) == 0
