"""What cloudflared's own component tests ask for, against the dev edge: configuration by flags and environment, token,
reconnect, termination with requests in flight. (Quick tunnels and pre-checks have files of their own.)
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conformance.commands import COMMANDS, some
from tests.support.origins import free_port
from tests.support.processes import Child, Event, dev_edge, edge_token

pytestmark = pytest.mark.parametrize("command", COMMANDS)
PROTOCOLS = some("quic", "http2")


class Run:
    """A connector that has registered, and what it takes to visit it."""

    def __init__(self, child: Child, edge: Child, listening: Event, metrics: str) -> None:
        self.child = child
        self.edge = edge
        self.metrics = metrics
        self.port = int(listening["public"].rpartition(":")[2])
        self.context = ssl.create_default_context(cafile=listening["ca"])

    def eyeball(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("localhost", self.port, context=self.context, timeout=60)

    def ready(self) -> tuple[int, int]:
        host, _, port = self.metrics.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        try:
            connection.request("GET", "/ready")
            answer = connection.getresponse()
            return answer.status, int(json.loads(answer.read())["readyConnections"])
        finally:
            connection.close()


@contextmanager
def running(
    tmp_path: Path,
    command: tuple[str, ...],
    *flags: str,
    run_flags: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    ingress: str = "http_status:204",
    stdin: int = subprocess.DEVNULL,
) -> Iterator[Run]:
    metrics = f"127.0.0.1:{free_port()}"
    with dev_edge(tmp_path, "--ingress", ingress) as (edge, listening):
        args = (
            "tunnel",
            "--edge",
            listening["edge"],
            "--cacert",
            listening["ca"],
            "--no-autoupdate",
            "--metrics",
            metrics,
        )
        environ = {"HOME": str(tmp_path), **({"TUNNEL_TOKEN": edge_token(tmp_path)} if env is None else env)}
        words = (*args, "--no-autoupdate", "--output", "json", *flags, "run", *run_flags)
        with Child(*command, *words, env=environ, stdin=stdin) as child:
            edge.event("registered", limit=60)
            edge.event("configuration", limit=60, applied=True)
            child.message("Registered tunnel connection")
            yield Run(child, edge, listening, metrics)


def call(command: tuple[str, ...], *words: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    result = subprocess.run(
        [*command, *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("TUNNEL_")}, **(env or {})},
    )
    return result.returncode, result.stdout + result.stderr


# -- configuration


def test_flags_and_environment_configure_a_run(tmp_path: Path, command: tuple[str, ...]) -> None:
    pidfile = tmp_path / "pid"
    env = {"TUNNEL_TOKEN": "", "TUNNEL_LOGLEVEL": "debug", "TUNNEL_GRACE_PERIOD": "2s", "TUNNEL_PIDFILE": str(pidfile)}
    with dev_edge(tmp_path, "--ingress", "http_status:204") as (_, _listening):
        env["TUNNEL_TOKEN"] = edge_token(tmp_path)
    with running(tmp_path, command, "--label", "here", "-retries=3", env=env) as run:
        assert run.ready() == (200, 1)
        assert int(pidfile.read_text()) == run.child.pid
        levels = {event.get("level") for event in run.child.events}
        assert {"debug", "info"} <= levels
        settings = next(
            str(e["message"]) for e in run.child.events if str(e.get("message")).startswith("Settings: map[")
        )
        assert "retries:3" in settings
        assert "label:here" in settings
        run.child.signal()
        assert run.child.wait(40) == 0


def test_ready_is_asked_by_the_command(tmp_path: Path, command: tuple[str, ...]) -> None:
    with running(tmp_path, command) as run:
        assert call(command, "tunnel", "--metrics", run.metrics, "ready")[0] == 0
        assert call(command, "tunnel", "ready", env={"TUNNEL_METRICS": run.metrics})[0] == 0
        nowhere = f"127.0.0.1:{free_port()}"
        assert call(command, "tunnel", "--metrics", nowhere, "ready")[0] == 1
    status, text = call(command, "tunnel", "ready")
    assert status == 1
    assert "--metrics has to be provided" in text


def test_version(command: tuple[str, ...]) -> None:
    for words in (["version"], ["--version"], ["-v"], ["--no-autoupdate", "version"]):
        status, text = call(command, *words)
        assert status == 0
        assert re.match(r"(connector|cloudflared) version \S+ \(.*\)\n$", text)
    status, text = call(command, "version", "--short")
    assert status == 0
    assert re.fullmatch(r"[0-9.]+\n", text)
    assert call(command, "version", "-s")[1] == text


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["run", "a", "b"], 255, 'tunnel run" accepts only one argument, the ID or name of the tunnel to run.'),
        (["run"], 255, 'tunnel run" requires '),
        (["run", "--token", "nonsense"], 255, "Provided Tunnel token is not valid."),
        (["run", "--token-file", "/does/not/exist"], 255, "Failed to read token file: "),
        (["--retries", "many", "run"], None, 'invalid value "many" for flag -retries: parse error'),
        (["--grace-period", "3", "run"], None, 'invalid value "3" for flag -grace-period: parse error'),
        (["--nonsense", "run"], None, "flag provided but not defined: -nonsense"),
        (["run", "--pq=x"], None, 'invalid boolean value "x" for -pq: parse error'),
        (["run", "--max-active-flows=-1"], None, 'invalid value "-1" for flag -max-active-flows: parse error'),
        (["run", "-p", "quic", "--protocol", "quic"], None, "Cannot use two forms of the same flag: p protocol"),
        (["--edge", "127.0.0.1:9", "--grace-period", "4m", "run", "--token", "{token}"], 1,
         "grace-period must be equal or less than 3m0s"),
        (["--edge", "127.0.0.1:9", "--protocol", "h3", "run", "--token", "{token}"], 1, "unknown protocol h3, "),
        (["--edge", "127.0.0.1:9", "--metrics", "127.0.0.1:1", "run", "--token", "{token}"], 1,
         "Error opening metrics server listener: failed to bind to address (127.0.0.1:1)"),
        ([], 1, "tunnel command"),
        (["--hostname", "a.test"], 1, "Classic tunnels have been deprecated"),
    ],
)  # fmt: skip
def test_what_cannot_run_says_why(
    tmp_path: Path, command: tuple[str, ...], words: list[str], status: int | None, says: str
) -> None:
    """Without a status: cloudflared answers flags that it does not understand with 0 and we with 255."""
    if "127.0.0.1:1" in words and os.geteuid() == 0:
        pytest.skip("root may listen on port 1")
    token = edge_token(tmp_path) if "{token}" in words else ""
    words = [word.format(token=token) if "{token}" in word else word for word in words]
    got, text = call(command, "tunnel", "--no-autoupdate", *words, env={"HOME": str(tmp_path)})
    assert says in text
    assert got in ({0, 255} if status is None else {status})
    if status == 255:
        assert "See '" in text.strip().splitlines()[-1]
    assert not token or token not in text


# -- token


@pytest.mark.parametrize("how", some("file variable", "flag", "variable", "file flag", "flag before file"))
def test_a_token_comes_in_every_way(tmp_path: Path, command: tuple[str, ...], how: str) -> None:
    with dev_edge(tmp_path, "--ingress", "http_status:204") as (_, _listening):
        token = edge_token(tmp_path)
    file = tmp_path / "token-file"
    file.write_text(f"\n {token}\n")
    env: dict[str, str] = {}
    flags: tuple[str, ...] = ()
    match how:
        case "flag":
            flags = ("--token", token)
        case "variable":
            env = {"TUNNEL_TOKEN": token}
        case "file flag":
            flags = ("--token-file", str(file))
        case "file variable":
            env = {"TUNNEL_TOKEN_FILE": str(file)}
        case _:
            flags = ("--token", token, "--token-file", "/does/not/exist")
    with running(tmp_path, command, run_flags=flags, env=env) as run:
        eyeball = run.eyeball()
        eyeball.request("GET", "/")
        assert eyeball.getresponse().status == 204
        eyeball.close()
        run.child.signal()
        assert run.child.wait(40) == 0
        shown = [line for line in run.child.lines if token in line]
        assert not shown


# -- reconnect


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reconnects_on_command_again_and_again(tmp_path: Path, command: tuple[str, ...], protocol: str) -> None:
    reading, writing = os.pipe()
    with running(tmp_path, command, "--stdin-control", "--protocol", protocol, stdin=reading) as run:
        for _ in range(3):
            os.write(writing, b"reconnect 1s\n")
            run.child.message("Sending reconnect signal")
            run.child.message("Restarting connection due to reconnect signal in 1s")
            run.edge.event("disconnected", limit=40)
            run.edge.event("registered", limit=40)
            run.child.message("Registered tunnel connection", limit=40)
        assert run.ready() == (200, 1)
        eyeball = run.eyeball()
        eyeball.request("GET", "/")
        assert eyeball.getresponse().status == 204
        eyeball.close()
        run.child.signal()
        assert run.child.wait(40) == 0
    os.close(reading)
    os.close(writing)


# -- termination

GRACE = 6


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("number", some(signal.SIGTERM, signal.SIGINT))
def test_a_request_in_flight_has_the_grace_period(
    tmp_path: Path, command: tuple[str, ...], protocol: str, number: int
) -> None:
    flags = ("--protocol", protocol, "--grace-period", f"{GRACE}s")
    with running(tmp_path, command, *flags, ingress="hello_world") as run:
        eyeball = run.eyeball()
        eyeball.request("GET", "/sse?freq=100ms")
        answer = eyeball.getresponse()
        assert answer.status == 200
        answer.readline()
        run.child.signal(number)
        begin = time.monotonic()
        run.edge.event("unregistered", limit=40)
        assert run.ready()[0] == 503
        events = 0
        try:
            while line := answer.readline():
                events += line.startswith(b"data") or bool(line.strip())
        except (http.client.IncompleteRead, OSError):
            pass  # cut at the end of the grace period
        assert run.child.wait(60) == 0
        assert time.monotonic() - begin > GRACE - 2
        assert events > 5
        eyeball.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_end_of_the_last_request_ends_the_wait(tmp_path: Path, command: tuple[str, ...], protocol: str) -> None:
    with running(tmp_path, command, "--protocol", protocol, "--grace-period", "100s", ingress="hello_world") as run:
        eyeball = run.eyeball()
        eyeball.request("GET", "/sse?freq=100ms")
        answer = eyeball.getresponse()
        answer.readline()
        run.child.signal()
        run.edge.event("unregistered", limit=40)
        assert run.child.process.poll() is None
        answer.close()
        eyeball.close()
        assert run.child.wait(60) == 0  # long before the grace period is over


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_without_requests_it_ends_at_once(tmp_path: Path, command: tuple[str, ...], protocol: str) -> None:
    with running(tmp_path, command, "--protocol", protocol, "--grace-period", "100s") as run:
        run.child.signal()
        run.edge.event("unregistered", limit=40)
        assert run.child.wait(60) == 0
        assert "Initiating graceful shutdown due to signal terminated" in run.child.text
