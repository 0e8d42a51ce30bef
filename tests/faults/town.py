"""A connector with one connection to each of two dev edges, and a path with weather between it and either of them.

The programs are those that users start; each edge has its own public side, so a visitor chooses the connection.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import websockets.sync.client

from tests.support.edge_path import EdgePath, edge_path
from tests.support.origins import free_port, http_origin
from tests.support.processes import Child, Event, dev_edge, edge_token
from tests.support.ws_client import ws_connect

full = pytest.mark.skipif(not os.environ.get("FAULTS"), reason="the whole fault matrix takes minutes: make faults")


class Side:
    """One edge and the way to it."""

    def __init__(self, state: Path, port: int, args: tuple[str, ...], path: EdgePath) -> None:
        self.path = path
        self._state, self._port, self._args = state, port, args
        self._stack = ExitStack()
        self.edge: Child
        self.listening: Event

    def start(self) -> None:
        """Start the edge, at the port where it was before."""
        self.edge, self.listening = self._stack.enter_context(
            dev_edge(self._state, "--listen", f"127.0.0.1:{self._port}", *self._args)
        )

    def kill(self) -> None:
        """End the edge as a crash would."""
        self.edge.process.kill()
        self.edge.wait()

    def close(self) -> None:
        self._stack.close()

    @property
    def attempts(self) -> int:
        """How often the connector began to dial this edge."""
        return self.path.connects + len(self.path.udp.starts)

    def lost(self) -> list[Event]:
        """Registered connections that this edge has lost; those of a race that was not won do not count."""
        return [event for event in self.edge.events if event["event"] == "disconnected" and event["connection"]]

    @property
    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.listening["ca"])

    @property
    def public(self) -> int:
        return int(self.listening["public"].rpartition(":")[2])

    def request(self, size: int = 20_000) -> None:
        """Post `size` bytes to the origin by way of this edge, and see that they arrived there. Raises if not."""
        body = b"%08d" % size * (size // 8)
        connection = http.client.HTTPSConnection("localhost", self.public, context=self.tls, timeout=60)
        try:
            connection.request("POST", "/echo", body)
            with connection.getresponse() as response:
                answer = json.loads(response.read())
        finally:
            connection.close()
        assert answer["sha256"] == hashlib.sha256(body).hexdigest(), answer

    @contextmanager
    def chat(self) -> Iterator[Chat]:
        """A WebSocket to the origin by way of this edge."""
        url = f"wss://localhost:{self.public}/ws"
        with ws_connect(url, self.tls, open_timeout=60, ping_interval=None) as socket:
            yield Chat(socket)

    @contextmanager
    def traffic(self) -> Iterator[Traffic]:
        """Requests one after another, and a conversation, by way of this edge; none of them may fail."""
        with self.chat() as chat:
            traffic = Traffic(self, chat)
            try:
                yield traffic
            finally:
                traffic.end()
        assert not traffic.failures, traffic.failures


class Chat:
    """A WebSocket whose origin echoes."""

    def __init__(self, socket: websockets.sync.client.ClientConnection) -> None:
        self._socket = socket
        self._count = 0

    def say(self) -> None:
        """One message there and back."""
        self._count += 1
        self._socket.send(f"message {self._count}")
        assert self._socket.recv(timeout=60) == f"message {self._count}"


class Traffic:
    """Made by `Side.traffic`."""

    def __init__(self, side: Side, chat: Chat) -> None:
        self.failures: list[str] = []
        self.done = 0
        self._side, self._chat = side, chat
        self._over = threading.Event()
        self._more = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self._side.request()
                self._chat.say()
            except Exception as error:
                self.failures.append(f"exchange {self.done + 1}: {error!r}")
                self._over.set()
            with self._more:
                self.done += 1
                self._more.notify_all()

    def wait_for(self, more: int) -> None:
        """Wait until `more` exchanges have come to their end."""
        with self._more:
            goal = self.done + more
            assert self._more.wait_for(lambda: self.done >= goal or self.failures, 60), "nothing moves"
        assert not self.failures, self.failures

    def end(self) -> None:
        self._over.set()
        self._thread.join(60)


class Town:
    """Two sides and the connector between."""

    def __init__(self, sides: list[Side], connector: Child, protocol: str) -> None:
        self.sides = sides
        self.connector = connector
        self.protocol = protocol

    def lines(self, start: str, **fields: Any) -> list[Event]:
        """The connector's log lines whose message starts so, up to now."""
        return [
            line
            for line in self.connector.events
            if str(line.get("message", "")).startswith(start) and all(line.get(k) == v for k, v in fields.items())
        ]

    def retries(self) -> list[Event]:
        return self.lines("Retrying connection in up to")

    def end(self) -> None:
        """Stop the connector as an operator would."""
        self.connector.signal()
        assert self.connector.wait() == 0, self.connector.text
        assert "Traceback" not in self.connector.text, self.connector.text


@contextmanager
def town(
    directory: Path,
    protocol: str,
    *,
    weather: dict[str, Any] | None = None,
    edge_args: tuple[str, ...] = (),
    run_args: tuple[str, ...] = (),
) -> Iterator[Town]:
    """Start everything; both connections are registered and configured when this yields."""
    with ExitStack() as stack:
        origin = stack.enter_context(http_origin())
        sides = []
        for _ in range(2):
            port = free_port()
            path = stack.enter_context(edge_path(port, **(weather or {})))
            side = Side(directory, port, ("--ingress", f"http://127.0.0.1:{origin}", *edge_args), path)
            side.start()
            stack.callback(side.close)
            sides.append(side)
        edges = [word for side in sides for word in ("--edge", f"127.0.0.1:{side.path.port}")]
        command = (sys.executable, "-m", "connector", "run", *edges, "--cacert", sides[0].listening["ca"])
        connector = stack.enter_context(
            Child(
                *(*command, "--protocol", protocol, "--output", "json", *run_args),
                env={"TUNNEL_TOKEN": edge_token(directory)},
            )
        )
        for side in sides:
            side.edge.event("registered")
            side.edge.event("configuration", applied=True)
        for _ in sides:
            connector.message("Registered tunnel connection")
        try:
            yield Town(sides, connector, protocol)
        except BaseException as error:
            for child in (connector, *(side.edge for side in sides)):
                error.add_note("\n".join([f"--- {' '.join(child.command)}", *child.lines[-40:]]))
            raise
