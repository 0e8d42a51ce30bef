"""What the container tests share: the launcher as its users run it, a dev edge that containers can reach, MQTT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import selfcheck
from launcher.credentials import User
from launcher.errors import HopError
from tests.support.processes import ROOT, Child, dev_edge, edge_token

ENGINE = Path(os.environ.get("CONTAINER_ENGINE", "."))
SOCKET = f"unix://{ENGINE}/docker.sock"
LIMIT = 90.0


def environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TUNNEL_", "CLOUDFLARE_"))}
    return {**kept, "DOCKER_HOST": SOCKET, "PYTHONPATH": str(ROOT), **extra}


@dataclass
class Result:
    status: int
    out: str
    err: str
    events: list[dict[str, Any]] = field(default_factory=list)

    def event(self, name: str) -> dict[str, Any]:
        for event in self.events:
            if event.get("event") == name:
                return event
        raise AssertionError(f"no event {name}: {self.out}\n{self.err}")

    def good(self) -> Result:
        assert self.status == 0, f"status {self.status}: {self.out}\n{self.err}"
        return self

    def one_line(self) -> str:
        """The failure in words; anything that looks like a traceback fails the test."""
        assert self.status == 1, f"status {self.status}: {self.out}\n{self.err}"
        assert "Traceback" not in self.out + self.err
        failed = [event for event in self.events if event.get("event") == "failed"]
        assert len(failed) == 1, self.out + self.err
        assert failed[0]["advice"], failed
        assert "\n" not in failed[0]["message"]
        return f"{failed[0]['message']} // {failed[0]['advice']}"


def launcher(*args: str | Path, cwd: Path | None = None, limit: float = LIMIT, **extra: str) -> Result:
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
        cwd=cwd or ROOT,
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
    )
    events = []
    for line in done.stdout.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return Result(done.returncode, done.stdout, done.stderr, events)


def docker(*args: str, check: bool = True, limit: float = LIMIT, cwd: Path | None = None) -> str:
    done = subprocess.run(
        ["docker", *args], capture_output=True, text=True, timeout=limit, check=False, env=environment(), cwd=cwd
    )
    assert not check or done.returncode == 0, f"docker {args}: {done.stdout}\n{done.stderr}"
    return (done.stdout + done.stderr).strip()


def inspect(name: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(docker("inspect", name))[0]
    return facts


def exists(name: str) -> bool:
    return docker("ps", "-aq", "--filter", f"name=^{name}$") != ""


def gateway() -> str:
    """The address of this namespace that every container can reach."""
    shown = subprocess.run(["ip", "-4", "-o", "addr", "show", "docker0"], capture_output=True, text=True, check=True)
    return shown.stdout.split()[3].partition("/")[0]


def kill_inside(name: str, signal: str) -> None:
    """Signal the first process of a container; its number is the engine's pid namespace's."""
    pid = inspect(name)["State"]["Pid"]
    assert pid > 1, name
    init = (ENGINE / "init.pid").read_text().strip()
    subprocess.run(["nsenter", "-t", init, "-p", "-m", "kill", f"-{signal}", str(pid)], check=True)


def wait_until(what: str, condition: Any, limit: float = 60.0) -> Any:
    deadline = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {limit} s: {what}"
        time.sleep(0.2)


@dataclass
class Edge:
    """A dev edge whose tunnel leads to a broker in containers."""

    process: Child
    address: str
    ca: Path
    public_port: int
    token: Path

    def target(self, *, mqtt5: bool = True) -> selfcheck.Target:
        return selfcheck.Target("localhost", self.public_port, "/mqtt", self.ca, mqtt5)

    @property
    def options(self) -> list[str]:
        return ["--edge", self.address, "--cacert", str(self.ca), "--token-file", str(self.token)]


@contextmanager
def edge(directory: Path, *args: str) -> Iterator[Edge]:
    state = directory / "edge"
    state.mkdir()
    with dev_edge(state, "--listen", "0.0.0.0:0", "--ingress", "http://mosquitto:9001", *args) as (child, listening):
        token = directory / "token"
        token.write_text(edge_token(state))
        token.chmod(0o600)
        port = listening["edge"].rpartition(":")[2]
        public = int(listening["public"].rpartition(":")[2])
        yield Edge(child, f"{gateway()}:{port}", Path(listening["ca"]), public, token)


class Stack:
    """One stack by `launcher up`, removed with its data at the end."""

    def __init__(self, name: str, directory: Path, edge: Edge) -> None:
        self.name = name
        self.state = directory / "stack"
        self.edge = edge
        self.passwords: dict[str, str] = {}

    @property
    def broker(self) -> str:
        return f"{self.name}-broker"

    @property
    def connector(self) -> str:
        return f"{self.name}-connector"

    def run(self, command: str, *args: str | Path, **extra: Any) -> Result:
        return launcher(*command.split(), *args, "--name", self.name, "--state-dir", self.state, "--json", **extra)

    def up(self, *args: str | Path, **extra: Any) -> Result:
        result = self.run("up", "--engine", "docker", *self.edge.options, *args, **extra)
        for event in result.events:
            if event.get("event") == "users":
                self.passwords.update({one["name"]: one["password"] for one in event["users"]})
        return result

    def user(self, name: str = "device") -> User:
        return User(name, self.passwords[name], ())

    def public(self) -> float:
        """A QoS 1 round trip through the tunnel, as the first user."""
        user = self.user()
        return selfcheck.round_trip(self.edge.target(), user, f"{user.name}/check")


@contextmanager
def stack(name: str, directory: Path, *edge_args: str) -> Iterator[Stack]:
    with edge(directory, *edge_args) as one:
        made = Stack(name, directory, one)
        try:
            yield made
        finally:
            remove(name)


def remove(name: str) -> None:
    """Everything with the stack's name, whoever made it."""
    for found in docker("ps", "-aq", "--filter", f"name=^{name}-").split():
        docker("rm", "-f", "-v", found, check=False)
    for kind in ("network", "volume"):
        for found in docker(kind, "ls", "-q", "--filter", f"name={name}-").split():
            docker(kind, "rm", found, check=False)


def leave_message(target: selfcheck.Target, user: User, client: str) -> None:
    """A retained message, and a QoS 1 message for a client with a session that is away."""
    with selfcheck.Session(target, user.name, user.password, durable=client) as session:
        session.connect()
        session.subscribe(f"{user.name}/queue")
    with selfcheck.Session(target, user.name, user.password) as session:
        session.connect()
        assert session.publish(f"{user.name}/queue", b"waiting") == 0
        assert session.publish(f"{user.name}/kept", b"retained", retain=True) == 0
        session.publish(f"{user.name}/fence", b"")  # the broker saves a change before it reads on: both are on its disk


def find_message(target: selfcheck.Target, user: User, client: str) -> None:
    """Both are still there; retries while the path comes back."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with selfcheck.Session(target, user.name, user.password, durable=client) as session:
                session.connect()
                assert session.session_present, "the session is gone"
                session.receive(f"{user.name}/queue", b"waiting")
            break
        except HopError as error:
            if error.hop not in {selfcheck.WEBSOCKET, selfcheck.CONNECT} or time.monotonic() > deadline:
                raise
            time.sleep(0.3)
    with selfcheck.Session(target, user.name, user.password) as session:
        session.connect()
        session.subscribe(f"{user.name}/kept")
        session.receive(f"{user.name}/kept", b"retained")
