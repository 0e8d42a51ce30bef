"""The registration RPC, the edge's half: pycapnp's server on the control stream of one connection.

Owns: the RegistrationServer capability, and its life on one control stream.
In: bytes of the control stream; a `Desk` that decides. Out: Registration and Refusal values, RPC answers.
Never: knows the set of tunnels or connections (connectors.py decides), or logs a secret.

The one task of a connection lives for the set-up; afterwards all is callbacks. Must run inside `capnp.kj_loop()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from typing import Any, Protocol

import capnp

from connector.devedge.rpcbridge import RpcBridge
from connector.devedge.streams import Stream
from connector.transport.rpc import load_schema

GARBAGE = bytes(range(255, 0, -1)) * 4
"""No Cap'n Proto message: its first word announces four billion segments."""


class Registration:
    """What a connector asks for. `secret` is compared and forgotten; it is not part of the repr."""

    __slots__ = ("account", "arch", "conn_index", "connector", "features", "local_ip", "secret", "tunnel", "version")

    def __init__(self, account: str, secret: bytes, tunnel: bytes, conn_index: int, options: Any) -> None:
        self.account = account
        self.secret = secret
        self.tunnel = _uuid(tunnel)
        self.conn_index = conn_index
        client = options.client
        self.connector = _uuid(bytes(client.clientId))
        self.features = [str(feature) for feature in client.features]
        self.version = str(client.version)
        self.arch = str(client.arch)
        self.local_ip = bytes(options.originLocalIp)

    def __repr__(self) -> str:
        return f"<Registration {self.connector}/{self.conn_index} for {self.tunnel}>"


class Grant:
    """Registration accepted."""

    __slots__ = ("connection", "location", "remotely_managed")

    def __init__(self, connection: uuid.UUID, location: str, remotely_managed: bool) -> None:
        self.connection = connection
        self.location = location
        self.remotely_managed = remotely_managed


class Refusal(Exception):
    """Registration refused; becomes the `error` member of the answer, not an RPC exception."""

    def __init__(self, cause: str, *, retry_after: float = 0.0, should_retry: bool = False) -> None:
        super().__init__(cause)
        self.cause = cause
        self.retry_after = retry_after
        self.should_retry = should_retry


class Desk(Protocol):
    """Who decides about one connection."""

    @property
    def fault(self) -> str | None:
        """The fault of this registration; the first look counts it, so that a probe that never speaks uses none up."""

    def register(self, registration: Registration) -> Grant:
        """Accept, or raise Refusal."""

    def unregister(self) -> None:
        """The connector wants no new requests."""

    def local_configuration(self, config: bytes) -> None:
        """A locally managed connector shows its configuration."""

    def control_ended(self) -> None:
        """The control stream is over."""


class FaultInjected(Exception):
    """The fault's exception. It has no traceback: pycapnp would send that to the connector with the text."""

    @property
    def __traceback__(self) -> None:  # type: ignore[override]
        return None


_server_class: Any = None


def _server(desk: Desk, gone: asyncio.Event) -> Any:
    """Make the capability object; its class can only be made after the schema is loaded."""
    global _server_class  # noqa: PLW0603
    if _server_class is None:
        schema = load_schema("tunnelrpc")

        class RegistrationServer(schema.RegistrationServer.Server):  # type: ignore[misc,name-defined]
            """The edge's capability for one connection."""

            def __init__(self, desk: Desk, gone: asyncio.Event) -> None:
                self.desk = desk
                self.gone = gone

            async def registerConnection(
                self, auth: Any, tunnelId: Any, connIndex: int, options: Any, _context: Any, **_: Any
            ) -> None:
                registration = Registration(
                    str(auth.accountTag), bytes(auth.tunnelSecret), bytes(tunnelId), int(connIndex), options
                )
                if self.desk.fault == "stall":
                    await self.gone.wait()
                if self.desk.fault == "exception":
                    raise FaultInjected("dev edge fault: registration=exception")
                answer = _context.results.init("result").result
                try:
                    grant = self.desk.register(registration)
                except Refusal as refusal:
                    error = answer.init("error")
                    error.cause = refusal.cause
                    error.retryAfter = int(refusal.retry_after * 1e9)
                    error.shouldRetry = refusal.should_retry
                    return
                details = answer.init("connectionDetails")
                details.uuid = grant.connection.bytes
                details.locationName = grant.location
                details.tunnelIsRemotelyManaged = grant.remotely_managed

            async def unregisterConnection(self, _context: Any, **_: Any) -> None:
                self.desk.unregister()

            async def updateLocalConfiguration(self, config: Any, _context: Any, **_: Any) -> None:
                self.desk.local_configuration(bytes(config))

        _server_class = RegistrationServer
    return _server_class(desk, gone)


class RpcServer(RpcBridge):
    """A stream of the connector, served by pycapnp. `stop` must be awaited before the loop ends."""

    def __init__(self, capability: Callable[[], Any]) -> None:
        super().__init__()
        self._capability = capability
        self._server: Any = None
        self._opening: asyncio.Task[None] | None = None

    def start(self, stream: Stream) -> None:
        """Take the opened stream and begin to serve."""
        self.attach(stream)
        self._opening = asyncio.get_running_loop().create_task(self._open(), name="devedge rpc")

    async def _open(self) -> None:
        rpc_stream = await self.open()
        self._server = capnp.TwoPartyServer(rpc_stream, bootstrap=self._capability())
        await self.serve()

    async def stop(self) -> None:
        """End the RPC session and wait until nothing of it is left."""
        self._ended = True
        if self._opening is not None:
            self._opening.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._opening
            self._opening = None
        if self._server is not None:
            self._server.close()
            self._server = None
        self.close()


class ControlStream(RpcServer):
    """The control stream of one connection."""

    def __init__(self, desk: Desk, on_close_fault: Callable[[], None]) -> None:
        super().__init__(lambda: _server(desk, self._gone))
        self._desk = desk
        self._on_close_fault = on_close_fault
        self._gone = asyncio.Event()

    async def stop(self) -> None:
        """End the RPC session and wait until nothing of it is left."""
        self._gone.set()
        await super().stop()

    def on_data(self, data: bytes) -> None:
        """RPC bytes of the connector."""
        if self._desk.fault == "close":
            self._on_close_fault()
        elif self._desk.fault == "garbage" and self._stream is not None:
            self._stream.consumed(len(data))
            self._stream.write(GARBAGE)
        else:
            super().on_data(data)

    def on_ended(self) -> None:
        """The connector closed its RPC client, or is gone."""
        self._desk.control_ended()


def _uuid(data: bytes) -> uuid.UUID:
    if len(data) != 16:
        raise ValueError(f"an id of {len(data)} bytes instead of 16")
    return uuid.UUID(bytes=data)
