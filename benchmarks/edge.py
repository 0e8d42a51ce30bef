"""The load edge: registers connectors and loads them, in a process of its own (`python -m benchmarks.edge`).

Owns: the listeners of both transports, and which connector's link is which.
In: JSON lines on stdin ({"op": ...}). Out: JSON lines on stdout, events and results.
Never: starts connectors, prints tables, treats one connector unlike another.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import capnp
import uvloop

from benchmarks.desk import Desk, open_control, take_control
from benchmarks.h2_client import H2LoadLink
from benchmarks.link import LoadLink, StreamUser
from benchmarks.loads import WorkError
from benchmarks.quic_client import QuicListener, QuicLoadLink, QuicLoadStream, configuration
from benchmarks.tls_server import TlsListener
from benchmarks.watched import Watched
from benchmarks.works import WORKS
from connector.devedge.authority import EDGE_LEAF_NAMES, Authority, StateDir


class Edge:
    """The process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.authority = Authority.open(StateDir(Path(settings["state"])))
        self.transport: str = settings["transport"]
        self.tunnels: dict[str, str] = settings["tunnels"]
        self.origin_pids: list[int] = settings["origins"]
        self.ports: dict[str, int] = settings["ports"]
        rules = (("mqtt.example.com", "http", "mqtt"), ("tcp.example.com", "tcp", "tcp"), ("", "http", "http"))
        ingress = [
            {**({"hostname": host} if host else {}), "service": f"{scheme}://127.0.0.1:{self.ports[name]}"}
            for host, scheme, name in rules
            if name in self.ports
        ]
        self.configuration = {"version": 1, "config": {"ingress": ingress}}
        self.desks: dict[str, Desk] = {}
        self.by_link: dict[LoadLink, Desk] = {}
        self.closing: set[asyncio.Task[None]] = set()
        self.loop = asyncio.get_running_loop()

    async def serve(self) -> None:
        """Listen, then do what stdin says until it ends."""
        if self.transport == "quic":
            settings = configuration()
            self.authority.load_leaf(settings, EDGE_LEAF_NAMES)
            listener = QuicListener(settings, self._take_control, self._on_lost)
            port, close = listener.listen(), listener.close
        else:
            server = TlsListener(self.authority.server_context(EDGE_LEAF_NAMES), self._new_link)
            port, close = server.listen(), server.close
        tell({"event": "listening", "edge": f"127.0.0.1:{port}", "ca": str(self.authority.ca_file)})
        while line := await self.loop.run_in_executor(None, sys.stdin.readline):
            tell(await self.run(json.loads(line)))
        close()
        for link in list(self.by_link):
            link.abort()
        while self.closing:
            await asyncio.wait(self.closing)

    async def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """Do one piece of work."""
        result: dict[str, Any] = {"event": "result", "name": order["name"]}
        desk = self.desks.get(order["name"])
        try:
            if desk is None:
                raise WorkError("the connector is not connected")
            load = WORKS[order["work"]](desk.link, {**self.ports, **order["options"]})
            result.update(await load.run(order["seconds"], Watched(order["pid"], self.origin_pids)))
        except (WorkError, TimeoutError) as error:
            result["error"] = str(error) or "the work did not end in time"
        return result

    # From desks.

    def ready(self, name: str, desk: Desk, reply: str) -> None:
        """Tell that a connector can be loaded."""
        self.desks[name] = desk
        tell({"event": "ready", "name": name, "at": time.monotonic(), "reply": reply})

    def lost(self, desk: Desk) -> None:
        """Forget it."""
        if self.desks.get(desk.name) is desk:
            del self.desks[desk.name]
            tell({"event": "lost", "name": desk.name})
        self.closing.add(task := self.loop.create_task(desk.control.stop()))
        task.add_done_callback(self.closing.discard)

    # From links.

    def _new_link(self) -> H2LoadLink:
        """Make the protocol of one TLS connection."""

        def opened(link: H2LoadLink) -> None:
            desk = self.by_link[link] = Desk(self, link)
            open_control(link, desk)

        return H2LoadLink(opened, self._on_lost)

    def _take_control(self, link: QuicLoadLink, stream: QuicLoadStream) -> StreamUser:
        desk = self.by_link[link] = Desk(self, link)
        return take_control(stream, desk)

    def _on_lost(self, link: LoadLink) -> None:
        desk = self.by_link.pop(link, None)
        if desk is not None:
            self.lost(desk)


def tell(event: dict[str, Any]) -> None:
    """Write one line."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


async def main() -> None:
    """Take what the runner says in the first line."""
    settings = json.loads(sys.stdin.readline())
    async with capnp.kj_loop():
        await Edge(settings).serve()


if __name__ == "__main__":
    uvloop.run(main())
