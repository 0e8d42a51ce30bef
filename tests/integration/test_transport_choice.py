"""`auto` on a network that blocks UDP, and one that lets it through again; a link that the edge wants to leave."""

from __future__ import annotations

import asyncio
import io
import json
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import websockets.sync.client

from connector.app.config import RunConfig
from connector.app.logs import Logger, LogOutput
from connector.app.process import serve
from connector.app.signals import Stop
from connector.protocol import protocol_race
from connector.wire.token import decode_token
from tests.support.aio import run, until
from tests.support.edge_path import edge_path
from tests.support.origins import http_origin
from tests.support.processes import Tunnel, connector, dev_edge, edge_token, tunnel
from tests.support.ws_client import ws_connect


def test_udp_blocked_means_http2_at_once_with_the_reason(tmp_path: Path) -> None:
    with (
        dev_edge(tmp_path, "--ingress", "http_status:204") as (edge, listening),
        edge_path(int(listening["edge"].rpartition(":")[2])) as path,
    ):
        path.block_udp(True)
        address = f"127.0.0.1:{path.port}"
        with connector(
            *("run", "--edge", address, "--edge", address, "--cacert", listening["ca"], "--output", "json"),
            *("--metrics", "127.0.0.1:0"),
            env={"TUNNEL_TOKEN": edge_token(tmp_path)},
        ) as child:
            server = child.message("Starting metrics server on ")["message"].split()[-1].removesuffix("/metrics")
            for _ in range(2):
                assert edge.event("registered")["protocol"] == "http2"
            line = child.message("Switching to fallback protocol http2")
            assert line["reason"] == f"UDP {path.port} blocked"

            def ready() -> dict[str, Any]:
                answer: dict[str, Any] = json.loads(_get(f"http://{server}/ready"))
                return answer

            # The edge says that it has registered before the connector has heard of it.
            run(until(lambda: ready()["readyConnections"] == 2, what="both connections are ready"))
            assert ready()["quic"] == {"status": "blocked", "reason": f"UDP {path.port} blocked"}
            assert 'reason="udp_blocked"' in _get(f"http://{server}/metrics")
            child.signal()
            assert child.wait() == 0


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        text: str = answer.read().decode()
        return text


class Running:
    """A connector in this process, on a loop of its own in a thread."""

    def __init__(self, config: RunConfig) -> None:
        self.stream = io.StringIO()
        self.stop = Stop()
        self._config = config
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, daemon=True)
        self.error: BaseException | None = None

    def _main(self) -> None:
        log = Logger(LogOutput(level="debug", json_lines=True, stream=self.stream))
        try:
            self._loop.run_until_complete(serve(self._config, log, self.stop, on_up=lambda _: None))
        except BaseException as error:
            self.error = error
        finally:
            self._loop.close()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    @contextmanager
    def up(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self.stop.ask)
            self._thread.join(40)
        assert not self._thread.is_alive(), self.stream.getvalue()
        assert self.error is None


def test_quic_that_works_again_is_returned_to_and_no_stream_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol_race, "PROBE_SECONDS", 0.5)
    monkeypatch.setattr(protocol_race, "SETTLE_SECONDS", 1.0)
    monkeypatch.setattr(protocol_race, "RETURN_SECONDS", 0.5)
    monkeypatch.setattr("connector.app.supervisor.RETURN_TICK", 0.2)
    with (
        http_origin() as origin,
        dev_edge(tmp_path, "--ingress", f"http://127.0.0.1:{origin}") as (edge, listening),
        edge_path(int(listening["edge"].rpartition(":")[2])) as path,
    ):
        path.block_udp(True)
        config = RunConfig(decode_token(edge_token(tmp_path)))
        config.edges = [f"127.0.0.1:{path.port}"] * 2
        config.cacert = listening["ca"]
        running = Running(config)
        with running.up():
            for _ in range(2):
                assert edge.event("registered")["protocol"] == "http2"
            edge.event("configuration", applied=True)
            context = ssl.create_default_context(cafile=listening["ca"])
            url = listening["public"].replace("https://127.0.0.1", "wss://localhost") + "/ws"
            with ws_connect(url, context) as socket:
                _echo(socket, "over http2")
                path.block_udp(False)
                moved = [edge.event("registered", limit=60) for _ in range(2)]
                assert [each["protocol"] for each in moved] == ["quic", "quic"]
                assert {each["conn_index"] for each in moved} == {0, 1}
                _echo(socket, "the link that was left still serves")
            with ws_connect(url, context) as socket:
                _echo(socket, "over quic")
        messages = [line["message"] for line in running.lines]
        assert "QUIC works again: connections return to it one by one" in messages
        assert not [line for line in running.lines if line["level"] == "error"]


def _echo(socket: websockets.sync.client.ClientConnection, text: str) -> None:
    socket.send(text)
    assert socket.recv(timeout=30) == text


def test_an_edge_that_says_goodbye_is_left_while_its_streams_go_on(tmp_path: Path) -> None:
    with (
        http_origin() as origin,
        tunnel(
            tmp_path,
            f"http://127.0.0.1:{origin}",
            edge_args=("--fault", "goaway-after:2"),
            run_args=("--protocol", "http2"),
        ) as up,
    ):
        with _socket(up) as socket:
            _echo(socket, "before")
            up.connector.message("The edge takes no new requests on this connection", limit=40)
            up.edge.event("registered", limit=40)
            _echo(socket, "after")
        up.connector.signal()
        assert up.connector.wait(40) == 0
        assert '"level":"error"' not in up.connector.text


def _socket(up: Tunnel) -> websockets.sync.client.ClientConnection:
    context = ssl.create_default_context(cafile=str(up.ca))
    return ws_connect(f"wss://localhost:{up.port}/ws", context)


def test_post_quantum_is_quic_and_says_so(tmp_path: Path) -> None:
    with tunnel(tmp_path, "http_status:204", run_args=("--post-quantum",)) as up:
        assert up.registered["protocol"] == "quic"
        assert "postquantum" in up.registered["features"]


def test_post_quantum_over_http2_is_refused(tmp_path: Path) -> None:
    token = edge_token(tmp_path)
    with connector("run", "--post-quantum", "--protocol", "http2", env={"TUNNEL_TOKEN": token}) as child:
        assert child.wait() == 1
        assert "--protocol quic" in child.text
