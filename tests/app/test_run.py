"""One run as a process: the token's secrecy, signals, /ready, both loops. The dev edge is the other end."""

from __future__ import annotations

import http.client
import json
import re
import signal
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.aio import run, until
from tests.support.origins import free_port, http_origin
from tests.support.processes import Child, connector, dev_edge, edge_token


@contextmanager
def up(
    tmp_path: Path, *args: str, ingress: str = "http_status:204", env: dict[str, str] | None = None
) -> Iterator[tuple[Child, Child]]:
    with dev_edge(tmp_path, "--ingress", ingress) as (edge, listening):
        token = edge_token(tmp_path)
        with connector(
            *("run", "--edge", listening["edge"], "--cacert", listening["ca"], "--output", "json", *args),
            env={"TUNNEL_TOKEN": token, **(env or {})},
        ) as child:
            edge.event("registered")
            child.message("Registered tunnel connection")
            yield edge, child


def ready(address: str) -> tuple[int, dict[str, object]]:
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["--token", "--token=", "-token"])
def test_a_token_on_the_command_line_leaves_the_process_list(tmp_path: Path, form: str) -> None:
    with dev_edge(tmp_path, "--ingress", "http_status:204") as (edge, listening):
        token = edge_token(tmp_path)
        words = [form + token] if form.endswith("=") else [form, token]
        command = (
            *("tunnel", "--no-autoupdate", "--edge", listening["edge"], "--cacert", listening["ca"]),
            *("--output", "json", "--loglevel", "debug", "run", *words),
        )
        with connector(*command) as child:
            warning = child.message("The token was given on the command line")
            title = Path(f"/proc/{child.pid}/cmdline").read_bytes().decode()
            assert token not in title
            assert token[:20] not in title
            assert title.startswith("connector tunnel --no-autoupdate")
            assert "*****" in title
            edge.event("registered")
            child.signal()
            assert child.wait() == 0
            assert token not in child.text
            assert "--token-file" in warning["message"]


def test_a_token_in_the_environment_warns_of_nothing(tmp_path: Path) -> None:
    with up(tmp_path) as (_, child):
        assert "command line" not in child.text


def test_the_log_tells_the_life_of_a_connection(tmp_path: Path) -> None:
    with up(tmp_path, "--loglevel", "debug") as (edge, child):
        edge.event("configuration", applied=True)
        child.signal()
        assert child.wait() == 0
    by_message = {str(event.get("message")): event for event in child.events}
    registered = by_message["Registered tunnel connection"]
    assert {"connIndex", "connection", "event", "ip", "level", "location", "message", "protocol", "time"} == {
        *registered
    }
    assert (registered["connIndex"], registered["event"]) == (0, 0)
    assert registered["protocol"] in {"quic", "http2"}
    assert registered["ip"] == "127.0.0.1"
    assert by_message["Updated to new configuration"]["version"] >= 0
    assert by_message["Unregistered tunnel connection"]["connIndex"] == 0
    order = [
        "Starting tunnel",
        "Connecting via quic or http2",
        "Registering tunnel connection",
        "Registered tunnel connection",
        "Initiating graceful shutdown due to signal terminated ...",
        "Unregistered tunnel connection",
        "Tunnel server stopped",
    ]
    messages = [str(event.get("message")) for event in child.events]
    places = [messages.index(message) for message in order]
    assert places == sorted(places)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", registered["time"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_first_signal_stops_gracefully(tmp_path: Path, number: int, loop: str) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    with up(tmp_path, env={"CONNECTOR_LOOP": loop}) as (edge, child):
        assert f"loop: {loop}" in child.text
        child.signal(number)
        edge.event("unregistered")
        assert child.wait() == 0
        assert "Traceback" not in child.text
        assert '"level":"error"' not in child.text


def test_ready_follows_the_connection_and_drops_at_the_signal(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with (
        http_origin() as origin,
        up(tmp_path, "--metrics", address, ingress=f"http://127.0.0.1:{origin}") as (edge, child),
    ):
        status, body = ready(address)
        assert (status, body["status"], body["readyConnections"]) == (200, 200, 1)
        assert body["connectorId"] == next(
            str(event["message"]).rpartition(" ")[2]
            for event in child.events
            if str(event.get("message")).startswith("Generated Connector ID")
        )
        edge.process.kill()
        child.message("Lost connection with the edge")

        async def drops() -> None:
            await until(lambda: ready(address)[0] == 503, what="/ready says 503")

        run(drops())
        child.signal()
        assert child.wait() == 0


def test_a_taken_metrics_address_ends_the_start(tmp_path: Path) -> None:
    with up(tmp_path, "--metrics", (address := f"127.0.0.1:{free_port()}")) as (_, child):
        token_env = {"TUNNEL_TOKEN": edge_token(tmp_path)}
        with connector("run", "--edge", "127.0.0.1:9", "--metrics", address, env=token_env) as second:
            assert second.wait() == 1
            assert "failed to bind to address" in second.text
            assert address in second.text
        child.signal()
        assert child.wait() == 0


def test_waiting_for_an_unreachable_edge_ends_at_once(tmp_path: Path) -> None:
    with dev_edge(tmp_path, "--ingress", "http_status:204"):
        token = edge_token(tmp_path)
    with connector(
        "run", "--edge", f"127.0.0.1:{free_port()}", "--output", "json", env={"TUNNEL_TOKEN": token}
    ) as child:
        child.message("Retrying connection in up to 8s")
        child.signal()
        assert child.wait(30) == 0


def test_flags_without_effect_are_mentioned_once(tmp_path: Path) -> None:
    with up(tmp_path, "--no-prechecks", "--heartbeat-count=3", "--loglevel", "debug") as (
        _,
        child,
    ):
        (line,) = [event for event in child.events if event.get("message") == "Flags without effect"]
        assert (line["level"], line["flags"]) == ("debug", ["heartbeat-count"])


def test_the_pidfile_is_written_after_registration(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with up(tmp_path, "--pidfile", str(path)) as (_, child):
        assert path.read_text() == str(child.pid)


def test_one_connection_per_edge_address(tmp_path: Path) -> None:
    with up(tmp_path, "--ha-connections", "4") as (_, child):
        assert "You requested 4 HA connections but I can give you at most 1." in child.text


def test_the_console_format_is_for_people(tmp_path: Path) -> None:
    with dev_edge(tmp_path, "--ingress", "http_status:204") as (edge, listening):
        env = {"TUNNEL_TOKEN": edge_token(tmp_path)}
        with connector("run", "--edge", listening["edge"], "--cacert", listening["ca"], env=env) as child:
            edge.event("registered")
            edge.event("configuration", applied=True)
            child.signal()
            assert child.wait() == 0
    (line,) = [line for line in child.lines if "Registered tunnel connection" in line]
    assert re.fullmatch(
        r"\S+Z INF Registered tunnel connection connIndex=0 connection=\S{36} event=0 ip=127\.0\.0\.1 "
        r"location=\S+ protocol=(quic|http2)",
        line,
    )
    assert "\x1b" not in child.text


@contextmanager
def in_flight(tmp_path: Path, *args: str) -> Iterator[tuple[Child, Child, http.client.HTTPSConnection, str]]:
    """A connector with a request that its origin does not answer until told."""
    address = f"127.0.0.1:{free_port()}"
    with http_origin() as origin, dev_edge(tmp_path, "--ingress", f"http://127.0.0.1:{origin}") as (edge, listening):
        env = {"TUNNEL_TOKEN": edge_token(tmp_path)}
        command = ("run", "--edge", listening["edge"], "--cacert", listening["ca"], "--output", "json", *args)
        with connector(*command, "--metrics", address, env=env) as child:
            edge.event("configuration", applied=True)
            context = ssl.create_default_context(cafile=listening["ca"])
            eyeball = http.client.HTTPSConnection(
                "localhost", int(listening["public"].rpartition(":")[2]), context=context, timeout=30
            )
            eyeball.request("GET", "/stall")
            edge.event("request", path="/stall")
            try:
                yield edge, child, eyeball, address
            finally:
                eyeball.close()


def test_the_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    with in_flight(tmp_path) as (edge, child, _, address):
        child.signal()
        edge.event("unregistered")
        assert ready(address)[0] == 503
        assert child.process.poll() is None
        child.signal()
        assert child.wait(30) == -signal.SIGTERM


def test_the_grace_period_cuts_off_what_does_not_end(tmp_path: Path) -> None:
    with in_flight(tmp_path, "--grace-period", "500ms") as (edge, child, _, _address):
        child.signal()
        edge.event("unregistered")
        child.message("The grace period is over")
        assert child.wait(30) == 0


def test_no_grace_period_means_no_drain(tmp_path: Path) -> None:
    with in_flight(tmp_path, "--grace-period", "0s") as (edge, child, _, _address):
        child.signal()
        edge.event("disconnected")
        assert child.wait(30) == 0
        assert "Unregistered tunnel connection" not in child.text
