"""The image, compose.yaml with the seed's .env, the demo in containers, the import of a seed's folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import selfcheck
from launcher.credentials import User
from launcher.stackdir import CONNECTOR_IMAGE
from tests.containers.stacks import (
    ROOT,
    docker,
    edge,
    environment,
    find_message,
    inspect,
    launcher,
    leave_message,
    remove,
    stack,
    wait_until,
)

SEED_COMPOSE = """\
version: '3.8'
services:
  mosquitto:
    image: eclipse-mosquitto:latest
    container_name: seed-mosquitto
    volumes:
      - ./mosquitto.conf:/mosquitto/config/mosquitto.conf
      - data:/mosquitto/data
    restart: unless-stopped
  cloudflared:
    image: cloudflare/cloudflared:latest
    container_name: seed-cloudflared
    command: tunnel --no-autoupdate run --token ${CLOUDFLARE_TUNNEL_TOKEN}
    restart: unless-stopped
    environment:
      - CLOUDFLARE_TUNNEL_TOKEN
      - TUNNEL_EDGE
      - TUNNEL_CACERT=/ca.pem
volumes:
  data: {}
"""
SEED_CONF = "listener 1883\nallow_anonymous true\n\nlistener 9001\nprotocol websockets\npersistence true\n"
SEED_CONF += "persistence_location /mosquitto/data/\n"

needs_compose = pytest.mark.skipif(
    subprocess.run(["docker", "compose", "version"], capture_output=True, check=False, env=environment()).returncode
    != 0,
    reason="NO DOCKER COMPOSE HERE",
)


def test_image_is_a_drop_in() -> None:
    facts = inspect(CONNECTOR_IMAGE)
    config = facts["Config"]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["cloudflared", "--no-autoupdate"]
    assert config["Cmd"] == ["version"]
    assert config["Healthcheck"]["Test"] == ["CMD", "cloudflared", "tunnel", "ready"]
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert "version" in docker("run", "--rm", "--read-only", CONNECTOR_IMAGE)
    inside = ["--rm", "--entrypoint", "python3", CONNECTOR_IMAGE, "-c"]
    assert docker("run", *inside, "import os; print(os.getuid(), os.getgid())") == "65532 65532"
    # Nothing of the build is left: no pip, no package index, no source of the build.
    assert "No module named" in docker("run", *inside, "import pip", check=False)
    wrong = docker("run", "--rm", CONNECTOR_IMAGE, "tunnel", "--no-autoupdate", "run", "--token", "abc", check=False)
    assert "token is not valid" in wrong


def compose(folder: Path, *args: str, **extra: str) -> str:
    done = subprocess.run(
        ["docker", "compose", *args], capture_output=True, text=True, timeout=120, check=False, cwd=folder,
        env=environment(**extra),
    )  # fmt: skip
    assert done.returncode == 0, f"compose {args}: {done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@needs_compose
def test_compose_up_with_the_seeds_env(tmp_path: Path) -> None:
    with edge(tmp_path) as one:
        folder = tmp_path / "tcompose"
        folder.mkdir()
        (folder / "compose.yaml").write_text((ROOT / "compose.yaml").read_text())
        (folder / ".env").write_text(f"CLOUDFLARE_TUNNEL_TOKEN={one.token.read_text().strip()}\n")
        # The dev edge in place of Cloudflare's, and nothing pulled; all else is as users have it.
        (folder / "compose.override.yaml").write_text(
            "services:\n  setup: {pull_policy: never}\n  token: {pull_policy: never}\n"
            "  mosquitto: {pull_policy: never}\n"
            f"  cloudflared:\n    pull_policy: never\n    environment: {{TUNNEL_EDGE: '{one.address}', "
            f"TUNNEL_CACERT: /ca.pem}}\n    volumes: ['{one.ca}:/ca.pem:ro']\n"
        )
        one.ca.chmod(0o644)
        for parent in one.ca.parents:
            if parent == tmp_path.parent.parent:
                break
            parent.chmod(0o755)
        try:
            compose(folder, "down", "-v")
            compose(folder, "up", "-d", "--no-build")
            shown = compose(folder, "run", "--rm", "setup", "show")
            passwords = dict(line.split() for line in shown.splitlines() if line.startswith(("admin ", "device ")))
            one.process.event("registered")
            user = User("device", passwords["device"], ())
            selfcheck.round_trip(one.target(), user, "device/compose")
            old = one.target(mqtt5=False)
            leave_message(old, user, "reader")
            assert one.token.read_text().strip() not in docker("inspect", "tcompose-cloudflared-1")
            compose(folder, "down")
            compose(folder, "up", "-d", "--no-build")
            find_message(old, user, "reader")
            wait_until(
                "healthy connector",
                lambda: inspect("tcompose-cloudflared-1")["State"]["Health"]["Status"] == "healthy",
            )
        finally:
            compose(folder, "down", "-v")
        bare = folder / "bare"
        bare.mkdir()
        (bare / "compose.yaml").write_text((ROOT / "compose.yaml").read_text())
        with pytest.raises(AssertionError, match="put the token of your tunnel into"):
            compose(bare, "up", "-d", "--no-build")


@needs_compose
def test_the_seeds_own_compose_file_runs_with_this_image_and_is_imported_with_its_data(tmp_path: Path) -> None:
    with stack("tseed", tmp_path) as made:
        one, folder = made.edge, tmp_path / "seedfolder"
        folder.mkdir()
        (folder / "docker-compose.yml").write_text(SEED_COMPOSE)
        (folder / "mosquitto.conf").write_text(SEED_CONF)
        (folder / ".env").write_text(f"CLOUDFLARE_TUNNEL_TOKEN={one.token.read_text().strip()}\n")
        (folder / "docker-compose.override.yml").write_text(
            f"services:\n  cloudflared:\n    image: {CONNECTOR_IMAGE}\n    pull_policy: never\n"
            f"    volumes: ['{folder}/ca.pem:/ca.pem:ro']\n  mosquitto: {{pull_policy: never}}\n"
        )
        (folder / "ca.pem").write_text(one.ca.read_text())
        old = one.target(mqtt5=False)
        try:
            compose(folder, "up", "-d", TUNNEL_EDGE=one.address)
            one.process.event("registered")
            with selfcheck.Session(one.target(), None, None) as session:
                session.connect()
                session.publish("device/kept", b"retained", retain=True)
        finally:
            compose(folder, "down")
        dry = launcher("import", folder, "--name", "tseed", "--state-dir", made.state, "--json", "--dry-run").good()
        unsafe = "\n".join(dry.event("import")["unsafe"])
        for words in (
            "token is on the command line",
            "not pinned",
            "everybody who knows the host name",
            "health check",
        ):
            assert words in unsafe
        result = made.run("import", folder, "--engine", "docker").good()
        made.passwords = {one["name"]: one["password"] for one in result.event("users")["users"]}
        assert "seedfolder_data" in result.event("import")["data"]
        try:
            made.run("up", "--edge", one.address, "--cacert", one.ca).good()
            with selfcheck.Session(old, None, None) as session, pytest.raises(selfcheck.RefusedError):
                session.connect()
            user = made.user()
            with selfcheck.Session(one.target(), user.name, user.password) as session:
                session.connect()
                session.subscribe("device/kept")
                session.receive("device/kept", b"retained")
        finally:
            remove("tseed")
            docker("volume", "rm", "seedfolder_data", check=False)


def demos() -> str:
    return docker("ps", "-aq", "--filter", "name=tunnel-demo-")


def test_demo_in_containers() -> None:
    result = launcher("demo", "--engine", "docker", "--once", "--json", limit=120).good()
    assert result.event("restart")["survived"] == ["session", "qos1", "retained"]
    assert demos() == ""
    assert "tunnel-demo-" not in docker("network", "ls") + docker("volume", "ls")


def test_a_killed_demo_leaves_nothing() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "demo", "--engine", "docker", "--json"],
        stdout=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
    )
    assert process.stdout is not None
    for raw in process.stdout:
        if json.loads(raw).get("event") == "ready":
            break
    assert len(demos().split()) == 3
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    wait_until("containers removed", lambda: demos() == "")
    wait_until(
        "network and volumes removed", lambda: "tunnel-demo-" not in docker("network", "ls") + docker("volume", "ls")
    )
