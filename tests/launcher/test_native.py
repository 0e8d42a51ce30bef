"""A stack of native processes, as its user runs it: up, use, kill -9 of every part, down; and what can go wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import mosquitto, selfcheck
from launcher.credentials import User
from launcher.errors import HopError
from launcher.identity import Identity
from tests.launcher.support import linux, marked, needs_mosquitto, wait_none_marked
from tests.support.processes import ROOT, dev_edge, edge_token

pytestmark = [needs_mosquitto, linux]
LIMIT = 120.0


class Result:
    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.status = done.returncode
        self.text = done.stdout + done.stderr
        self.events: list[dict[str, Any]] = [
            json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")
        ]

    def event(self, name: str) -> dict[str, Any]:
        found = [event for event in self.events if event.get("event") == name]
        assert found, self.text
        return found[0]

    def good(self) -> Result:
        assert self.status == 0, self.text
        return self

    def failure(self) -> str:
        assert self.status == 1, self.text
        assert "Traceback" not in self.text
        failed = self.event("failed")
        assert "\n" not in failed["message"]
        return f"{failed['message']} // {failed['advice']}"


class Stack:
    """One native stack with a dev edge for its Cloudflare."""

    def __init__(self, directory: Path, edge: str, ca: str, public: str, token: Path, ports: tuple[int, int]) -> None:
        self.directory = directory
        self.state = directory / "stack"
        self.edge, self.ca, self.token = edge, ca, token
        self.public_port = int(public.rpartition(":")[2])
        self.mqtt_port, self.ws_port = ports
        self.mark = f"NATIVE_STACK={directory.name}-{os.getpid()}"
        self.password = ""

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("TUNNEL_", "CLOUDFLARE_"))}
        name, _, value = self.mark.partition("=")
        return {**kept, "PYTHONPATH": str(ROOT), name: value}

    def command(self, words: str, *args: str | Path) -> list[str]:
        command = [sys.executable, "-m", "launcher", *words.split(), *map(str, args)]
        return [*command, "--state-dir", str(self.state), "--json"]

    def run(self, words: str, *args: str | Path) -> Result:
        return Result(
            subprocess.run(
                self.command(words, *args),
                capture_output=True,
                text=True,
                timeout=LIMIT,
                check=False,
                cwd=self.directory,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
            )
        )

    @property
    def options(self) -> list[str]:
        options = ["--engine", "native", "--edge", self.edge, "--cacert", self.ca, "--token-file", str(self.token)]
        return [*options, "--mqtt-port", str(self.mqtt_port), "--ws-port", str(self.ws_port)]

    def up(self, *args: str | Path) -> Result:
        result = self.run("up", *self.options, *args)
        for event in result.events:
            if event.get("event") == "users":
                self.password = next(one["password"] for one in event["users"] if one["name"] == "device")
        return result

    def target(self, *, mqtt5: bool = True) -> selfcheck.Target:
        return selfcheck.Target("localhost", self.public_port, "/mqtt", Path(self.ca), mqtt5)

    def user(self) -> User:
        return User("device", self.password, ())

    def native(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.state / "native.json").read_text())
        return facts

    def process(self, service: str, key: str = "process") -> Identity:
        pid, start = self.native()["services"][service][key]
        return Identity(int(pid), str(start))


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Stack]:
    mqtt_port, ws_port = mosquitto.free_ports(2)
    state = tmp_path / "edge"
    state.mkdir()
    with dev_edge(state, "--ingress", f"http://localhost:{ws_port}") as (_, listening):
        token = tmp_path / "token"
        token.write_text(edge_token(state))
        token.chmod(0o600)
        stack = Stack(tmp_path, listening["edge"], listening["ca"], listening["public"], token, (mqtt_port, ws_port))
        try:
            yield stack
        finally:
            if stack.state.exists():
                stack.run("down")
            wait_none_marked(stack.mark, 90)


def test_up_use_change_kill_and_down(made: Stack) -> None:
    """One long life instead of many short ones: each start costs seconds on a slow machine."""
    assert made.up("--durability", "each").good().event("status")["up"] is True
    selfcheck.round_trip(made.target(), made.user(), "device/x")
    token = made.token.read_text().strip()
    commands = marked(made.mark)
    assert len(commands) == 5, commands  # supervisor, two guards, broker, connector
    assert not any(token in command for command in commands.values())
    assert not mosquitto.open_to_others(made.mqtt_port)
    assert not mosquitto.open_to_others(made.ws_port)

    same = [event["text"] for event in made.run("up").good().events if event["event"] == "progress"]
    assert "runs as wanted already" in same
    bob = made.run("user add", "bob").good().event("users")["users"][0]
    selfcheck.round_trip(made.target(), User("bob", bob["password"], ()), "bob/x")
    made.run("acl deny", "bob", "bob/secret").good()
    assert made.run("acl check", "bob", "write", "bob/secret").status == 1
    with selfcheck.Session(made.target(), "bob", bob["password"]) as session:
        session.connect()
        assert session.publish("bob/secret", b"x") == 135
    doctor = made.run("doctor", "--hostname", f"localhost:{made.public_port}", "--cafile", made.ca).good()
    assert not [event for event in doctor.events if event["event"] == "check" and event["good"] is False]

    leave(made)
    supervisor = Identity(int(made.native()["pid"]), str(made.native()["start"]))
    for service, key in (("broker", "process"), ("broker", "guard"), ("connector", "process"), ("connector", "guard")):
        victim, old = made.process(service, key), made.process(service)
        assert victim.send(signal.SIGKILL)
        assert old.wait_gone(30), f"{service} outlived its {key}"
        wait_for(lambda service=service, old=old: made.process(service) != old and made.process(service).alive)
        assert supervisor.alive
    wait_for(lambda: made.run("status").status == 0)
    find(made)

    leave(made)
    assert supervisor.send(signal.SIGKILL)
    assert "killed" in made.run("status").text
    made.run("up").good()
    assert len(marked(made.mark)) == 5
    find(made)

    leave(made)
    made.run("restart").good()
    find(made)
    lines = [event for event in made.run("logs", "broker", "--tail", "20").good().events if "line" in event]
    assert lines
    assert {event["service"] for event in lines} == {"broker"}
    order = [event["service"] for event in made.run("down").good().events if event["event"] == "progress"]
    assert order == ["connector", "broker"]
    assert not marked(made.mark)
    assert made.run("status").status == 1
    assert made.run("down").good().event("down")["changed"] is False


def leave(made: Stack) -> None:
    """A retained message, and a QoS 1 message that waits for a client."""
    with selfcheck.Session(made.target(mqtt5=False), "device", made.password, durable="reader") as session:
        session.connect()
        session.subscribe("device/queue")
    with selfcheck.Session(made.target(), "device", made.password) as session:
        session.connect()
        assert session.publish("device/queue", b"waiting") < 128
        assert session.publish("device/kept", b"retained", retain=True) < 128
        session.publish("device/fence", b"")  # a change is saved before the broker reads on: both are on its disk


def find(made: Stack) -> None:
    """Both are there. The path may need a moment: the edge can still try the link of a connector that was killed."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with selfcheck.Session(made.target(), "device", made.password) as session:
                session.connect()
            break
        except HopError:
            assert time.monotonic() < deadline
            time.sleep(0.3)
    with selfcheck.Session(made.target(mqtt5=False), "device", made.password, durable="reader") as session:
        session.connect()
        assert session.session_present
        session.receive("device/queue", b"waiting")
    with selfcheck.Session(made.target(), "device", made.password) as session:
        session.connect()
        session.subscribe("device/kept")
        session.receive("device/kept", b"retained")


def wait_for(condition: Any, limit: float = 60.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.1)


def test_two_ups_at_once(made: Stack) -> None:
    both = [
        subprocess.Popen(
            made.command("up", *made.options),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=made.environment(),
            cwd=made.directory,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=LIMIT)[0].decode() for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], outputs
    assert any("is at work on this stack" in output for output in outputs)
    assert len(marked(made.mark)) == 5


def test_failures_of_the_start_leave_nothing(made: Stack, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", made.mqtt_port))
        taken.listen()
        assert f"port {made.mqtt_port} of 127.0.0.1 is taken" in made.up().failure()
    own = tmp_path / "own.conf"
    own.write_text("listener 1883 127.0.0.1\nallow_anonymous true\n")
    assert "lets everybody in" in made.up("--config", own).failure()
    assert "say it twice" in made.up("--allow-anonymous").failure()
    own.write_text(f"listener {made.mqtt_port} 127.0.0.1\nno_such_option 1\npassword_file passwords\n")
    assert "no_such_option" in made.up("--config", own).failure()
    assert not marked(made.mark)
    made.token.write_text("your_token")
    refused = made.run("up", *made.options, "--config", "")
    assert refused.status == 2
    assert "placeholder" in refused.event("failed")["message"]


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT ROOT: a full disk and a read-only one were not tried")
def test_a_full_disk_and_a_read_only_one(made: Stack) -> None:
    script = """
mount -t tmpfs -o size=$1,mode=0700 tmpfs "$2" || exit 77
[ "$3" = rw ] || { mount -o remount,ro "$2" || exit 77; }
shift 3
exec "$@"
"""
    made.state.mkdir()
    for size, mode, words in (("32k", "rw", "the disk is full"), ("1m", "ro", "read-only file system")):
        command = ["unshare", "--mount", "sh", "-c", script, "sh", size, str(made.state), mode]
        done = subprocess.run(
            [*command, *made.command("up", *made.options)],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
            env=made.environment(),
            cwd=made.directory,
        )
        if done.returncode == 77 or "unshare failed" in done.stderr:
            pytest.skip("NO MOUNT NAMESPACES HERE")
        assert words in Result(done).failure()
        assert not marked(made.mark)
    made.up().good()
