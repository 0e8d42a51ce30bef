"""RPC streams that the edge opens over QUIC: configuration pushes and UDP sessions (proto/README.md, RPC over QUIC).

Owns: the connector's bootstrap object, the time limit and the number of such streams.
In: the port of an RPC stream behind its signature. Out: calls on RpcHandlers; the answers as RPC.
Never: interprets a configuration, opens a socket towards an origin.

*Strategy*: these streams are rare and short, so each is one pycapnp server on a bridged socket pair and one task,
bounded by MAX_RPC_STREAMS and the time limit. Data streams never come here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import capnp

from connector.errors import ConnectorError
from connector.protocol.counts import COUNTS
from connector.protocol.ports import StreamPort, StreamSink
from connector.transport.bridge import SocketBridge
from connector.transport.rpc import ABORT_SHUTDOWN, KJ_TURNS, load_schema
from connector.wire.capnp import NESTING, TRAVERSAL_WORDS

RPC_SECONDS = 5.0
"""Life of one RPC stream at most. Precedent: cloudflared's --rpc-timeout, 5 s."""

MAX_RPC_STREAMS = 64
"""RPC streams served at once on one link; more are reset. A push takes milliseconds, and one comes at a time."""

SESSIONS_UNSUPPORTED = "this connector serves no UDP sessions"


class RpcHandlers(Protocol):
    """What the RPC methods do. Calls are synchronous; a ConnectorError becomes the RPC's error text."""

    def update_configuration(self, version: int, config: bytes) -> tuple[int, str] | Awaitable[tuple[int, str]]:
        """Put a configuration (JSON) in force; return the version in force afterwards and an error text or ``""``.

        What can be awaited gives the same later: other processes have to take the configuration too.
        """

    def register_udp_session(
        self, session_id: bytes, address: bytes, port: int, idle_nanoseconds: int, trace: str
    ) -> tuple[str, bytes]:
        """Start a UDP session; return an error text or ``""``, and spans."""

    def unregister_udp_session(self, session_id: bytes, message: str) -> None:
        """End a UDP session."""


class ConfigurationOnly:
    """RpcHandlers of a connector without UDP sessions."""

    def __init__(self, on_configuration: Callable[[int, bytes], tuple[int, str] | Awaitable[tuple[int, str]]]) -> None:
        self.update_configuration = on_configuration

    def register_udp_session(
        self, session_id: bytes, address: bytes, port: int, idle_nanoseconds: int, trace: str
    ) -> tuple[str, bytes]:
        """Refuse."""
        return SESSIONS_UNSUPPORTED, b""

    def unregister_udp_session(self, session_id: bytes, message: str) -> None:
        """Refuse."""
        raise ConnectorError(SESSIONS_UNSUPPORTED)


class RpcRefusal(Exception):
    """What the edge sees of an exception: its text. pycapnp sends a whole traceback otherwise, with paths in it."""

    __traceback__ = property(lambda self: None, lambda self, value: None)


RpcRefusal.__module__ = "builtins"  # a traceback's last line names any other module


@contextmanager
def _counted(handler: str, method: str) -> Iterator[None]:
    """Count one RPC served, its time, and whether it raised; an error goes out as RpcRefusal."""
    COUNTS.add("cloudflared_rpc_server_operations", handler, method)
    began = time.monotonic()
    try:
        yield
    except Exception as error:
        COUNTS.add("cloudflared_rpc_server_failures", handler, method)
        words = str(error) if isinstance(error, ConnectorError) else f"internal error: {type(error).__name__}"
        raise RpcRefusal(words) from None
    finally:
        COUNTS.observe("cloudflared_rpc_server_latency_secs", time.monotonic() - began, handler, method)


@cache
def _server_class() -> Any:
    base: Any = load_schema("tunnelrpc").CloudflaredServer.Server

    class CloudflaredServer(base):  # type: ignore[misc]
        """The bootstrap object."""

        def __init__(self, handlers: RpcHandlers) -> None:
            self._handlers = handlers

        async def updateConfiguration(self, version: int, config: Any, _context: Any, **_: Any) -> None:
            """Answer a push; a bad configuration is an answer too, never an exception."""
            with _counted("config", "update_configuration"):
                answer = self._handlers.update_configuration(int(version), bytes(config))
                applied, error = answer if isinstance(answer, tuple) else await answer
            result = _context.results.init("result")
            result.latestAppliedVersion = applied
            result.err = error

        async def registerUdpSession(
            self, sessionId: Any, dstIp: Any, dstPort: int, closeAfterIdleHint: int, traceContext: str, _context: Any,
            **_: Any,
        ) -> None:  # fmt: skip
            """Start a session."""
            session_id, address = bytes(sessionId), bytes(dstIp)
            with _counted("session", "register_udp_session"):
                if len(session_id) != 16 or len(address) not in {4, 16}:
                    raise ConnectorError("a session ID has 16 bytes, an address 4 or 16")
                error, spans = self._handlers.register_udp_session(
                    session_id, address, int(dstPort), int(closeAfterIdleHint), str(traceContext)
                )
            result = _context.results.init("result")
            result.err = error
            if not error:
                result.spans = spans

        async def unregisterUdpSession(self, sessionId: Any, message: str, _context: Any, **_: Any) -> None:
            """End a session."""
            with _counted("session", "unregister_udp_session"):
                self._handlers.unregister_udp_session(bytes(sessionId), str(message))

    return CloudflaredServer


class RpcServer:
    """Serves the RPC streams of one link. `close` ends them all."""

    def __init__(self, handlers: RpcHandlers, *, loop: asyncio.AbstractEventLoop, limit: float = RPC_SECONDS) -> None:
        self._handlers = handlers
        self._loop = loop
        self._limit = limit
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, port: StreamPort) -> StreamSink | None:
        """Serve one stream; None when there are too many."""
        if len(self._tasks) >= MAX_RPC_STREAMS:
            return None
        bridge = SocketBridge(port, loop=self._loop, held=True)
        task = self._loop.create_task(self._serve(bridge))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return bridge

    def close(self) -> None:
        """End what is running."""
        for task in self._tasks:
            task.cancel()

    async def wait_closed(self) -> None:
        """Wait until nothing runs any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, bridge: SocketBridge) -> None:
        server = stream = None
        try:
            async with asyncio.timeout(self._limit):
                stream = await capnp.AsyncIoStream.create_connection(sock=bridge.take_socket())
                bridge.farewell = ABORT_SHUTDOWN
                server = capnp.TwoPartyServer(
                    stream,
                    bootstrap=_server_class()(self._handlers),
                    traversal_limit_in_words=TRAVERSAL_WORDS,
                    nesting_limit=NESTING,
                )
                for _ in range(KJ_TURNS):
                    await asyncio.sleep(0)
                bridge.release()
                await server.on_disconnect()
        except Exception:  # noqa: S110  (time limit, or RPC that pycapnp does not read: the stream ends, nothing else)
            pass
        finally:
            if server is not None:
                server.close()
            if stream is not None:
                stream.close()
            bridge.close()
