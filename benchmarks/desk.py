"""The RPC side of a link: registration, and one configuration that sends everything to the origin.

Owns: Desk (who decides), and what is between it and the streams of either transport.
In: a new link. Out: `ready` and `lost`, told to the edge.
Never: refuses a known tunnel, or knows the rows.
"""

# ruff: noqa: D102  (callbacks of one interface each, described there)
from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any, Protocol, cast

from benchmarks.fields import HOST, UPGRADE
from benchmarks.h2_client import H2LoadLink, H2LoadStream
from benchmarks.link import LoadLink
from benchmarks.quic_client import QuicLoadLink, QuicLoadStream
from connector.devedge.quicrpc import RpcCall
from connector.devedge.registrar import ControlStream, Grant, Registration


class Counter(Protocol):
    """The edge, as its desks know it."""

    tunnels: dict[str, str]
    configuration: dict[str, Any]

    def ready(self, name: str, desk: Desk, reply: str) -> None:
        """A connector has its configuration."""

    def lost(self, desk: Desk) -> None:
        """A link is gone."""


class Desk:
    """The RPC side of one link: whoever comes with a known tunnel is registered."""

    fault: str | None = None

    def __init__(self, edge: Counter, link: LoadLink) -> None:
        self.edge = edge
        self.link = link
        self.name = ""
        self.control = ControlStream(self, lambda: None)

    def register(self, registration: Registration) -> Grant:
        self.name = self.edge.tunnels[str(registration.tunnel)]
        self.link.features = registration.features
        self.link.loop.call_later(0.001, self._push)
        return Grant(uuid.uuid4(), "lis01", True)

    def unregister(self) -> None:
        """It leaves; the link ends soon."""

    def local_configuration(self, config: bytes) -> None:
        """Of no interest."""

    def control_ended(self) -> None:
        self.link.close()

    def told(self, reply: str) -> None:
        """The configuration is answered."""
        self.edge.ready(self.name, self, reply)

    def _push(self) -> None:
        body = json.dumps(self.edge.configuration).encode()
        if isinstance(self.link, QuicLoadLink):
            task = self.link.loop.create_task(self._push_by_rpc(body))
            self.link.loop.call_later(0, lambda: task)  # referred to until it runs
            return
        fields = [
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":authority", HOST),
            (b":path", b"/configuration"),
            (UPGRADE, b"update-configuration"),
        ]
        self.link.open(fields, Push(self)).send(body, end=True)

    async def _push_by_rpc(self, body: bytes) -> None:
        reply = await call(
            cast("QuicLoadLink", self.link),
            lambda server: server.updateConfiguration(
                version=json.loads(body)["version"], config=json.dumps(json.loads(body)["config"]).encode()
            ),
            lambda answer: str(answer.result.err),
        )
        self.told(str(reply))


async def call(link: QuicLoadLink, make: Callable[[Any], Any], read: Callable[[Any], Any]) -> Any:
    """One call of the connector's CloudflaredServer, on a stream of its own."""
    return await RpcCall(cast("Any", RpcLink(link))).call(make, read)


class RpcLink:
    """What the dev edge's RPC calls take for their link."""

    def __init__(self, link: QuicLoadLink) -> None:
        self.link = link

    def open_stream(self, call: RpcCall) -> QuicLoadStream:
        return self.link.open_stream(RpcUser(call))


class RpcUser:
    """A StreamUser for bytes that are RPC."""

    def __init__(self, rpc: Any) -> None:
        self.rpc = rpc

    def on_head(self, ok: bool) -> None:
        """RPC streams have none; that of HTTP/2's control stream says nothing."""

    def on_data(self, data: bytes, start: int, stop: int) -> None:
        self.rpc.on_data(data[start:stop])

    def on_end(self) -> None:
        self.rpc.on_eof(())

    def on_reset(self) -> None:
        self.rpc.on_reset(None)


class Push:
    """The one configuration; when it is answered, the connector is ready."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.reply = b""

    def on_head(self, ok: bool) -> None:
        """The body says it."""

    def on_data(self, data: bytes, start: int, stop: int) -> None:
        self.reply += data[start:stop]

    def on_end(self) -> None:
        self.desk.told(self.reply.decode())

    def on_reset(self) -> None:
        """The link's end is told elsewhere."""


def open_control(link: H2LoadLink, desk: Desk) -> H2LoadStream:
    """Open the control stream, as the edge does over HTTP/2."""
    fields = [
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":authority", HOST),
        (b":path", b"/control"),
        (UPGRADE, b"control-stream"),
    ]
    stream = link.open(fields, RpcUser(desk.control))
    desk.control.start(stream)
    return stream


def take_control(stream: QuicLoadStream, desk: Desk) -> RpcUser:
    """Take the control stream, which the connector opens over QUIC."""
    desk.control.start(stream)
    return RpcUser(desk.control)
