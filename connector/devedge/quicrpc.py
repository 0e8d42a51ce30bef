"""RPC streams beside the control stream, which only QUIC has: calls of the edge, and those of the connector.

Owns: one RPC connection per stream, on pycapnp: the client of the connector's CloudflaredServer, and the edge's
SessionManager.
In: streams of a QuicLink. Out: answers; events.
Never: keeps a table of sessions: it says what it is told to, so that tests can say anything.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import capnp

from connector.devedge.connectors import PUSH_LIMIT
from connector.devedge.quicmessages import RPC_SIGNATURE
from connector.devedge.registrar import RpcServer
from connector.devedge.rpcbridge import RpcBridge
from connector.transport.rpc import load_schema

if TYPE_CHECKING:
    from connector.devedge.quiclink import QuicLink


class RpcCall(RpcBridge):
    """An RPC stream that the edge opens: one call on the connector's CloudflaredServer."""

    def __init__(self, link: QuicLink) -> None:
        super().__init__()
        self._link = link
        self._lost = False

    def on_reset(self, error: BaseException | None) -> None:
        """The stream or the connection is gone."""
        self._lost = True
        super().on_reset(error)

    async def call(self, make: Callable[[Any], Any], read: Callable[[Any], Any]) -> Any:
        """Open the stream, call what `make` makes of the capability, return what `read` finds in the answer."""
        stream = self._link.open_stream(self)
        self.attach(stream)
        stream.write(RPC_SIGNATURE)
        client: Any = None
        server: Any = None
        try:
            client = capnp.TwoPartyClient(await self.open())
            server = client.bootstrap().cast_as(load_schema("tunnelrpc").CloudflaredServer)
            await self.serve()
            async with asyncio.timeout(PUSH_LIMIT):
                return read(await make(server))
        finally:
            server = None  # the last reference: sends the release
            if client is not None:
                client.close()
            self.close()
            stream.write_eof()


class Push(RpcCall):
    """One configuration push."""

    def __init__(self, link: QuicLink, version: int, config: bytes) -> None:
        super().__init__(link)
        self._version = version
        self._config = config

    async def run(self) -> None:
        """Push, and tell how it went."""
        try:
            applied, refusal = await self.call(
                lambda server: server.updateConfiguration(version=self._version, config=self._config),
                lambda answer: (int(answer.result.latestAppliedVersion), str(answer.result.err)),
            )
        except TimeoutError:
            self._link.configuration_told(self._version, f"no reply within {PUSH_LIMIT:g} s")
        except Exception as error:  # what pycapnp makes of a KjException
            if not self._lost:
                text = str(getattr(error, "description", None) or error)
                self._link.configuration_told(self._version, f"the connector's RPC failed: {text}")
        else:
            told = f"{refusal} (version {applied} stays in force)" if refusal else None
            self._link.configuration_told(self._version, told)


async def register_udp_session(
    link: QuicLink, session: uuid.UUID, address: bytes, port: int, idle_nanoseconds: int = 0
) -> str:
    """Ask the connector for a session of datagram version 2; returns its error text, empty when there is none."""
    answer = await RpcCall(link).call(
        lambda server: server.registerUdpSession(
            sessionId=session.bytes, dstIp=address, dstPort=port, closeAfterIdleHint=idle_nanoseconds
        ),
        lambda answer: str(answer.result.err),
    )
    return str(answer)


async def unregister_udp_session(link: QuicLink, session: uuid.UUID, message: str) -> None:
    """End a session."""
    await RpcCall(link).call(
        lambda server: server.unregisterUdpSession(sessionId=session.bytes, message=message), lambda _: None
    )


class PeerRpc(RpcServer):
    """A stream that the connector opens beside its control stream: the end of a UDP session."""

    def __init__(self, link: QuicLink) -> None:
        super().__init__(lambda: _session_manager(link))
        self._link = link
        self._signature = bytearray()
        self._signed = False

    def on_data(self, data: bytes) -> None:
        """The signature, then RPC."""
        if self._signed:
            super().on_data(data)
            return
        self._signature += data
        size = len(RPC_SIGNATURE)
        if not RPC_SIGNATURE.startswith(self._signature[:size]):
            if self._stream is not None:
                self._stream.reset()
            self._link.rpc_over(self)
        elif len(self._signature) >= size:
            self._signed = True
            if rest := bytes(self._signature[size:]):
                super().on_data(rest)

    def on_ended(self) -> None:
        """The connector closed its RPC client, or is gone."""
        self._link.rpc_over(self)


_manager_class: Any = None


def _session_manager(link: QuicLink) -> Any:
    """Make the capability; its class can only be made after the schema is loaded."""
    global _manager_class  # noqa: PLW0603
    if _manager_class is None:
        schema = load_schema("tunnelrpc")

        class SessionManager(schema.SessionManager.Server):  # type: ignore[misc,name-defined]
            """The edge's half: it hears of sessions that end."""

            def __init__(self, link: QuicLink) -> None:
                self.link = link

            async def unregisterUdpSession(self, sessionId: Any, message: Any, _context: Any, **_: Any) -> None:
                self.link.session_ended(bytes(sessionId), str(message))

        _manager_class = SessionManager
    return _manager_class(link)
