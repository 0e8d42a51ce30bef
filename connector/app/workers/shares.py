"""A worker's parts of what the leading process holds for all: log, addresses, transports, token, configuration.

Owns: for each of these the object that the rest of a worker uses as it would use the real one. In: calls of the rest,
messages. Out: messages. Never: decides what the leading process has to.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import Any

from connector.app.addresses import AddressBook
from connector.app.logs import LEVELS, Listener, Logger, LogOutput
from connector.app.orchestrator import Orchestrator, encode_answer
from connector.app.state import TunnelState
from connector.app.token_rotation import TokenRotation
from connector.app.transport_choice import TransportChoice
from connector.app.workers import messages as say
from connector.app.workers.pipe import Pipe
from connector.app.workers.settings import unpack_rules
from connector.errors import ConnectorError, EdgeDialError, EdgeLostError, ProtocolError
from connector.protocol.edge_addresses import EdgeAddress
from connector.protocol.protocol_choice import Transport
from connector.protocol.protocol_race import DialPlan, Reason
from connector.proxy.dispatch import Dispatcher, Prepared
from connector.wire.token import Token


class WorkerLog(LogOutput):
    """Log lines go to the leading process, which redacts, folds, formats and writes them."""

    __slots__ = ("_pipe", "actor", "quiet")

    def __init__(self) -> None:
        super().__init__()
        self._pipe: Pipe | None = None
        self.quiet = False
        """Lines that the leading process or another worker has written are left out while it is set."""
        self.actor = ""
        """Who streams from here."""

    def attach(self, pipe: Pipe, threshold: int) -> None:
        """Begin."""
        self._pipe = pipe
        self._threshold = threshold

    def set_threshold(self, threshold: int) -> None:
        """Take the level of lines that somebody wants."""
        self._threshold = threshold
        self.on_listen()

    def enabled(self, level: str) -> bool:
        """See LogOutput."""
        return LEVELS[level] >= self._threshold

    def emit(self, level: str, message: str, fields: dict[str, Any]) -> None:
        """See LogOutput."""
        if self._pipe is not None and LEVELS[level] >= self._threshold and not self.quiet:
            self._pipe.send_if_room(say.Log(level, message, fields))
            if self._pipe.dropped and not self._pipe.closed:
                dropped, self._pipe.dropped = self._pipe.dropped, 0
                self._pipe.send(say.Log("warn", "Log lines of a worker were dropped", {"lines": dropped}))

    def listen(self, listener: Listener | None) -> None:
        """See LogOutput: the leading process sends the events of all."""
        self._listener = listener
        if listener is not None:
            self.set_threshold(0)  # the leading process says so too, but the next line may be this one's
        if self._pipe is not None:
            self._pipe.send(say.Listen(self.actor if listener is not None else ""))

    def on_event(self, event: say.LogEvent) -> None:
        """Hand an event to the session that streams here."""
        if self._listener is not None:
            self._listener(event.level, event.event, event.text)

    def close(self) -> None:
        """See LogOutput."""
        if self._pipe is not None:
            self._pipe.flush()


class Silence(LogOutput):
    """Lines of what the leading process says for all."""

    __slots__ = ()

    def emit(self, level: str, message: str, fields: dict[str, Any]) -> None:
        """Drop it."""


class SharedBook(AddressBook):
    """Addresses of the connections of this worker; the leading process hands them out for all."""

    __slots__ = ("_pipe", "_waiting")

    def __init__(self, pipe: Pipe) -> None:
        super().__init__(((), ()))
        self._pipe = pipe
        self._waiting: dict[int, asyncio.Future[EdgeAddress | None]] = {}

    async def take(self, conn_index: int) -> EdgeAddress | None:
        """See AddressBook."""
        answer: asyncio.Future[EdgeAddress | None] = asyncio.get_running_loop().create_future()
        self._waiting[conn_index] = answer
        self._pipe.send(say.NeedAddress(conn_index))
        return await answer

    def given(self, message: say.Address) -> None:
        """Take the answer."""
        answer = self._waiting.pop(message.conn_index, None)
        if answer is not None and not answer.done():
            answer.set_result(EdgeAddress(message.host, message.port) if message.host else None)

    def rotate(self, conn_index: int, *, unreachable: bool, leave_region: bool) -> None:
        """See AddressBook."""
        self._pipe.send(say.Rotate(conn_index, unreachable, leave_region))

    def registered(self) -> None:
        """The leading process hears of it as such."""


class SharedChoice(TransportChoice):
    """What is known about QUIC is known to all workers: events go to the leading process, the verdict comes back.

    Until it is back, what happened here counts here.
    """

    def __init__(self, pipe: Pipe, flag: str, log: Logger, **settings: Any) -> None:
        super().__init__(flag, log, **settings)
        self._pipe = pipe

    def came_up(self, transport: Transport, *, raced: bool, quic_heard: bool, quic_error: BaseException | None) -> None:
        """See TransportChoice."""
        super().came_up(transport, raced=raced, quic_heard=quic_heard, quic_error=quic_error)
        forbidden = isinstance(quic_error, EdgeDialError) and quic_error.forbidden
        self._pipe.send(say.CameUp(transport, raced, quic_heard, quic_error is not None, forbidden))

    def dial_failed(self, plan: DialPlan, error: BaseException) -> Reason:
        """See TransportChoice."""
        self._pipe.send(say.DialFailed(plan, isinstance(error, EdgeDialError) and error.forbidden))
        return super().dial_failed(plan, error)

    def link_ended(self, transport: Transport, error: BaseException | None) -> Reason:
        """See TransportChoice."""
        by_edge = error is None or isinstance(error, ProtocolError)
        self._pipe.send(say.LinkEnded(transport, by_edge or (isinstance(error, EdgeLostError) and error.by_edge)))
        return super().link_ended(transport, error)

    def use_port(self, port: int) -> None:
        """See TransportChoice."""
        if port != self._port:
            self._pipe.send(say.UsePort(port))
        super().use_port(port)


class SharedRotation(TokenRotation):
    """Which token registrations use; the leading process says which connection registers again when."""

    def __init__(self, pipe: Pipe, token: Token) -> None:
        super().__init__(token)
        self._pipe = pipe

    def accepted(self, token: Token) -> None:
        """See TokenRotation."""
        super().accepted(token)
        self._pipe.send(say.TokenNews(token.secret, accepted=True))

    def refused(self, token: Token) -> bool:
        """See TokenRotation."""
        back = super().refused(token)
        if back:
            self._pipe.send(say.TokenNews(token.secret, accepted=False))
        return back


class SharedOrchestrator(Orchestrator):
    """Pushes go to the leading process, which has all workers get ready before any of them changes its rules."""

    __slots__ = ("_dispatcher", "_loop", "_pipe", "_pushes", "_ready", "_serial")

    def __init__(self, dispatcher: Dispatcher, log: Logger, pipe: Pipe) -> None:
        super().__init__(dispatcher, log)
        self._dispatcher = dispatcher
        self._loop = asyncio.get_running_loop()
        self._pipe = pipe
        self._serial = 0
        self._pushes: dict[int, asyncio.Future[tuple[int, str]]] = {}
        self._ready: dict[int, tuple[int, Prepared]] = {}

    def on_push(self, body: bytes) -> asyncio.Future[bytes]:
        """Answer a push over HTTP/2, as `on_configuration` does. Errors: WireError."""
        version, config = self.read_push(body)
        answer: asyncio.Future[bytes] = self._loop.create_future()

        def done(pushed: asyncio.Future[tuple[int, str]]) -> None:
            if answer.done():
                return
            if pushed.cancelled():
                answer.cancel()
            else:
                in_force, text = pushed.result()
                answer.set_result(encode_answer(in_force, text or None))

        self._push(version, json.dumps(config).encode()).add_done_callback(done)
        return answer

    def on_rpc(self, version: int, config: bytes) -> tuple[int, str] | Awaitable[tuple[int, str]]:
        """See Orchestrator."""
        return self._push(version, config)

    def pushed(self, message: say.PushDone) -> None:
        """Take the answer."""
        future = self._pushes.pop(message.serial, None)
        if future is not None and not future.done():
            future.set_result((message.version, message.error))

    def prepare(self, message: say.Rules) -> None:
        """Get a rule set ready, and say whether it can be used."""
        error = advice = ""
        try:
            self._ready[message.serial] = (message.version, self._dispatcher.prepare(unpack_rules(message.rules)))
        except ConnectorError as failed:
            error, advice = str(failed) or "invalid configuration", failed.advice
        except Exception as failed:
            self._log.bug("Failed to update configuration; the old one stays", failed)
            error = f"internal error: {type(failed).__name__}"
        self._pipe.send(say.Prepared(message.serial, error, advice))

    def enforce(self, message: say.Enforce) -> None:
        """Put what is ready in force, or forget it."""
        found = self._ready.pop(message.serial, None)
        if found is not None and message.use:
            self.version, prepared = found
            self._dispatcher.enforce(prepared)

    def shut(self) -> None:
        """See Orchestrator."""
        super().shut()
        for future in self._pushes.values():
            future.cancel()

    def _push(self, version: int, config: bytes) -> asyncio.Future[tuple[int, str]]:
        self._serial += 1
        future = self._pushes[self._serial] = self._loop.create_future()
        self._pipe.send(say.Push(self._serial, version, config))
        return future


class WorkerState(TunnelState):
    """Whatever the run counts as a whole goes to the leading process."""

    __slots__ = ("pipe",)

    pipe: Pipe

    def registered(self, conn_index: int, address: EdgeAddress, transport: Transport, location: str) -> None:
        """See TunnelState."""
        self.connected[conn_index] = address
        self.transports[conn_index] = transport
        self.registrations += 1
        self.pipe.send(say.Registered(conn_index, address.host, address.port, transport, location))

    def dial_failed(self) -> None:
        """See TunnelState."""
        self.pipe.send(say.Unreached())

    def disconnected(self, conn_index: int) -> None:
        """See TunnelState."""
        super().disconnected(conn_index)
        self.pipe.send(say.Disconnected(conn_index))
