"""`--workers` between real programs: two processes, four connections, one connector."""

from __future__ import annotations

import http.client
import json
import os
import signal
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_tail import tailing
from tests.support.aio import run as run_loop
from tests.support.aio import until
from tests.support.origins import http_origin
from tests.support.processes import Child, Event, Tunnel, connector, edge_token

RULE = 'hostname="",path="",rule="0",service="http_status:204"'
LONG = bool(os.environ.get("WORKERS_LONG"))
"""`make workers` sets it."""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Rig:
    """A dev edge whose configuration is a file, and a connector of two workers with four connections."""

    def __init__(self, path: Path, edge: Child, listening: Event, run: Child) -> None:
        self.path = path
        self.edge = edge
        self.listening = listening
        self.run = run
        self.context = ssl.create_default_context(cafile=listening["ca"])
        self.port = int(listening["public"].rpartition(":")[2])

    def push(self, service: str, more: str = "") -> None:
        declare(self.path, service, more)

    def ask(self, path: str = "/") -> int:
        eyeball = self.eyeball()
        try:
            eyeball.request("GET", path)
            return eyeball.getresponse().status
        finally:
            eyeball.close()

    def eyeball(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("localhost", self.port, context=self.context, timeout=60)

    def page(self, path: str) -> str:
        address = self.run_address
        connection = http.client.HTTPConnection(*address, timeout=30)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    @property
    def run_address(self) -> tuple[str, int]:
        text = next(event["message"] for event in self.run.events if "metrics server on" in event["message"])
        host, _, port = text.split()[-1].removesuffix("/metrics").rpartition(":")
        return host, int(port)

    def number(self, series: str) -> float:
        for line in self.page("/metrics").splitlines():
            if line.startswith(f"{series} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    @property
    def workers(self) -> list[int]:
        """Process ids, by their number in the title where there is one, in any order."""
        return children(self.run.pid)

    def registered(self, count: int) -> list[Event]:
        return [self.edge.event("registered") for _ in range(count)]

    def wait_for_ready(self, count: int) -> None:
        async def ready() -> None:
            await until(lambda: json.loads(self.page("/ready"))["readyConnections"] == count, what="/ready", limit=40)

        run_loop(ready())


def children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in {"Z", "X"}
    except OSError:
        return True


def declare(path: Path, service: str, more: str = "") -> None:
    new = path / "edge.toml.new"
    new.write_text(f'[tunnels.test]\n[[tunnels.test.ingress]]\nservice = "{service}"\n{more}\n')
    new.rename(path / "edge.toml")


@contextmanager
def crew(path: Path, protocol: str, service: str, *args: str) -> Iterator[Rig]:
    declare(path, service)
    options = ("edge", "--state-dir", path, "--output", "json", "--config", path / "edge.toml")
    with connector(*options) as edge:
        listening = edge.event("listening")
        token = path / "token"
        token.write_text(edge_token(path))
        command = (
            *("run", *("--edge", listening["edge"]) * 4, "--cacert", listening["ca"], "--output", "json"),
            *("--token-file", str(token), "--protocol", protocol, "--workers", "2", "--metrics", "127.0.0.1:0"),
        )
        with connector(*command, *args) as run:
            yield Rig(path, edge, listening, run)


def conn_indices(run: Child) -> set[int]:
    return {event["connIndex"] for event in run.events if str(event["message"]).startswith("access ")}


def test_two_workers_are_one_connector(tmp_path: Path) -> None:
    with crew(tmp_path, "quic", "http_status:204", "--access-log") as it:
        registered = it.registered(4)
        assert {event["conn_index"] for event in registered} == {0, 1, 2, 3}
        assert len({event["connector"] for event in registered}) == 1
        it.wait_for_ready(4)
        it.edge.event("configuration", applied=True, version=1, conn_index=3)
        pids = it.workers
        assert len(pids) == 2
        assert [it.ask() for _ in range(8)] == [204] * 8
        assert conn_indices(it.run) == {0, 1, 2, 3}
        assert it.number("cloudflared_tunnel_total_requests") == 8
        assert it.number("cloudflared_tunnel_ha_connections") == 4
        assert it.number('cloudflared_tunnel_response_by_code{status_code="204"}') == 8
        assert it.number("connector_rule_request_seconds_count{" + RULE + "}") == 8
        assert it.page("/debug/pprof/goroutine").count("== worker ") == 2
        assert it.page("/debug/pprof/heap").count("== worker ") == 2
        assert len(json.loads(it.page("/diag/tunnel"))["connections"]) == 4

        # A push reaches every worker before the edge has its answer, whichever connection it came over.
        it.push("http_status:418")
        it.edge.event("configuration", applied=True, version=2)
        assert [it.ask() for _ in range(4)] == [418] * 4
        assert json.loads(it.page("/config"))["version"] == 2
        it.push("https://localhost:1", 'originRequest = { caPool = "/there/is/none" }')  # refused as a whole
        assert it.edge.event("configuration", version=3)["applied"] is False
        assert [it.ask() for _ in range(4)] == [418] * 4
        assert it.run.text.count("Updated to new configuration") == 2

        assert "Traceback" not in it.run.text

        # However the leading process ends, nothing is left; here one of the workers cannot do anything about it.
        pids = it.workers
        os.kill(pids[1], signal.SIGSTOP)
        it.run.process.kill()
        it.run.wait()

        async def all_gone() -> None:
            await until(lambda: all(map(gone, pids)), what="the end of the workers", limit=30)

        run_loop(all_gone())


def test_all_lines_through_one_a_death_alone_and_a_drain_together(tmp_path: Path) -> None:
    with http_origin() as origin, crew(tmp_path, "http2", f"http://127.0.0.1:{origin}") as it:
        registered = it.registered(4)
        it.edge.event("configuration", applied=True, conn_index=3)
        pids = it.workers
        tunnel = Tunnel(it.edge, it.run, it.listening, registered[0], tmp_path)
        with tailing(tunnel, "--event", "http") as tail:
            seen: set[Any] = set()
            while seen != {0, 1, 2, 3}:
                assert tail.process.poll() is None, tail.text
                it.ask()
                seen = {event["fields"].get("connIndex") for event in tail.events if "fields" in event}
            if LONG:
                with tailing(tunnel, actor="somebody else") as other:  # through another connection, one after another
                    assert other.wait() == 1
                    assert "4002 limit exceeded for streaming sessions" in other.text
            tail.signal()
            assert tail.wait() == 0

        # The end of one worker is nothing to the other: it serves on, and the first is back with its indices.
        counted = it.number("cloudflared_tunnel_total_requests")
        busy = it.number("process_cpu_seconds_total")
        os.kill(pids[0], signal.SIGKILL)
        lost = it.run.message("Worker ")
        assert (lost["process"], lost["error"]) == (pids[0], "killed by SIGKILL")
        assert {event["conn_index"] for event in it.registered(2)} in ({0, 2}, {1, 3})
        it.wait_for_ready(4)
        assert pids[1] in it.workers
        assert [it.ask() for _ in range(4)] == [200] * 4
        assert it.number("cloudflared_tunnel_total_requests") >= counted + 4  # a counter never goes down
        assert it.number("process_cpu_seconds_total") >= busy
        assert "Traceback" not in it.run.text
        pids = it.workers

        size = 8 << 20
        eyeballs = [it.eyeball() for _ in range(4)]
        for eyeball in eyeballs:  # one per connection: begun, and not read to its end
            eyeball.request("GET", f"/download?size={size}")
        answers = [eyeball.getresponse() for eyeball in eyeballs]
        it.run.signal()
        for _ in range(4):
            it.edge.event("unregistered")
        assert json.loads(it.page("/ready"))["readyConnections"] == 0
        assert [len(answer.read()) for answer in answers] == [size] * 4
        for eyeball in eyeballs:
            eyeball.close()
        assert it.run.wait() == 0
        assert "cut off" not in it.run.text
        assert all(map(gone, pids))


@pytest.mark.skipif(not LONG, reason="make workers runs it: 8 s")
def test_a_worker_that_ends_again_and_again_ends_the_run(tmp_path: Path) -> None:
    with crew(tmp_path, "http2", "http_status:204") as it:
        it.registered(2)
        for _ in range(4):
            victim = max(it.workers)
            os.kill(victim, signal.SIGKILL)
            it.run.message("Worker ")

            async def new(victim: int = victim) -> None:
                await until(lambda: max(it.workers, default=0) > victim, what="another process", limit=30)

            run_loop(new())
        os.kill(max(it.workers), signal.SIGKILL)
        assert it.run.wait() == 1
        assert "The tunnel cannot be kept up" in it.run.text
        assert "5 times in a row: killed by SIGKILL" in it.run.text
