"""Pings and UDP into a LAN of its own: the connector in a network namespace, its origins in another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT

CLOUDFLARED = os.environ.get("CLOUDFLARED", "")

EXPECTED = {
    "echo 10.9.0.2", "exceeded 10.9.0.1", "echo fd09::2", "exceeded fd09::1", "silence 10.9.0.77", "udp 10.9.0.2",
    "udp fd09::2",
}  # fmt: skip


def namespace() -> list[str]:
    """What makes a network namespace here; skips where that is not possible."""
    if shutil.which("unshare") and shutil.which("ip"):
        for flags in (["-n"], ["-r", "-n"]):
            probe = ["unshare", *flags, "sh", "-c", "echo 0 0 >/proc/sys/net/ipv4/ping_group_range"]
            if subprocess.run(probe, capture_output=True, timeout=20, check=False).returncode == 0:
                return ["unshare", *flags]
    pytest.skip("NO NETWORK NAMESPACES: pings and UDP are not tried against a real LAN (needs Linux, ip, unshare)")


def in_a_lan(tmp_path: Path, version: int, *command: str) -> set[str]:
    done = subprocess.run(
        [*namespace(), sys.executable, "-m", "tests.support.private_lan", str(tmp_path), str(version), *command],
        capture_output=True, text=True, timeout=110, cwd=ROOT, check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith(("TUNNEL_", "NO_"))},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return set(done.stdout.splitlines())


def features(version: int) -> list[str]:
    return ["--features", "support_datagram_v3_2"] if version == 3 else []


@pytest.mark.parametrize("version", [2, 3])
def test_pings_and_udp_reach_a_lan(tmp_path: Path, version: int) -> None:
    held = in_a_lan(
        tmp_path, version, sys.executable, "-m", "connector", "run", "--edge", "{edge}", "--cacert", "{ca}",
        "--protocol", "quic", "--token-file", "{token_file}", *features(version),
    )  # fmt: skip
    assert held == EXPECTED | ({"traced"} if version == 2 else set())


@pytest.mark.skipif(not CLOUDFLARED, reason="NO CLOUDFLARED BINARY: the same is not asked of the real thing")
@pytest.mark.parametrize("version", [2, 3])
def test_cloudflared_does_the_same(tmp_path: Path, version: int) -> None:
    held = in_a_lan(
        tmp_path, version, CLOUDFLARED, "tunnel", "--no-autoupdate", "--edge", "{edge}", "--cacert", "{ca}",
        "--protocol", "quic", "--no-prechecks", "--metrics", "127.0.0.1:0", "run", *features(version), "--token-file",
        "{token_file}",
    )  # fmt: skip
    assert held - {line for line in held if line.startswith("exceeded fe80")} >= EXPECTED - {"exceeded fd09::1"} | (
        {"traced"} if version == 2 else set()
    )
