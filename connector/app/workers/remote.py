"""What the supervisor of the leading process works with: connections and a dialler that are in workers.

Owns: the wait for the end of a connection that runs elsewhere. In: calls of the supervisor, news from the crew.
Out: messages. Never: opens a connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from connector.app.config import RunConfig
from connector.app.connection import WaitTogetherError
from connector.app.dialler import Dialler
from connector.app.orchestrator import Orchestrator
from connector.app.token_rotation import TokenRotation
from connector.app.workers import messages as say
from connector.errors import ConnectorError, EdgeDialError
from connector.wire.token import Token

if TYPE_CHECKING:
    from collections.abc import Iterable

    from connector.protocol.edge_addresses import EdgeAddress
    from connector.protocol.ports import Acceptor


class Telling(Protocol):
    """The crew, as a connection sees it."""

    def tell(self, conn_index: int, message: say.Message) -> None:
        """Send a message to the worker that has this connection."""

    def tell_all(self, message: say.Message) -> None:
        """Send a message to every worker."""

    def begin(self, connection: RemoteConnection) -> None:
        """Have its worker run it, now and after each restart of the worker."""

    def leave(self, connection: RemoteConnection) -> None:
        """It does not run any more."""

    def drain(self) -> None:
        """Have all workers drain."""

    def registered(self, conn_index: int) -> bool:
        """Whether the connection is registered."""

    async def probe(self, address: EdgeAddress) -> say.Probed:
        """Have a worker shake hands over QUIC."""


class RemoteConnection:
    """One conn_index. Implements `supervisor.Connection`."""

    def __init__(self, conn_index: int, crew: Telling) -> None:
        self.conn_index = conn_index
        self._crew = crew
        self._ended: asyncio.Future[say.Ended] | None = None

    async def run(self) -> None:
        """See Connection."""
        self._ended = asyncio.get_running_loop().create_future()
        self._crew.begin(self)
        try:
            ended = await self._ended
        finally:
            self._ended = None
            self._crew.leave(self)
        if ended.together:
            raise WaitTogetherError
        if ended.error:
            raise ConnectorError(ended.error, advice=ended.advice)

    def end(self, message: say.Ended) -> None:
        """Take the news of its end."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(message)

    def stop(self) -> None:
        """See Connection. All end together."""
        self._crew.drain()

    def wake(self) -> bool:
        """See Connection; true of every one that is not registered now."""
        self._crew.tell(self.conn_index, say.Wake(self.conn_index))
        return self._ended is not None and not self._crew.registered(self.conn_index)

    def check(self) -> None:
        """See Connection."""
        self._crew.tell(self.conn_index, say.Check(self.conn_index))

    def move_on(self) -> None:
        """See Connection."""
        self._crew.tell(self.conn_index, say.MoveOn(self.conn_index))

    def reconnect(self, delay: float) -> None:
        """See Connection."""
        self._crew.tell(self.conn_index, say.MoveOn(self.conn_index, delay))


class CrewDialler(Dialler):
    """Dials nothing; probes are a worker's."""

    def __init__(self, config: RunConfig, accept: Acceptor, orchestrator: Orchestrator, crew: Telling) -> None:
        super().__init__(config, accept, orchestrator, quic=False, http2=False)
        self._crew = crew

    async def probe_quic(self, address: EdgeAddress) -> None:
        """See Dialler."""
        answer = await self._crew.probe(address)
        if answer.error:
            error = EdgeDialError(answer.error)
            error.forbidden = answer.forbidden
            raise error


class LeadersRotation(TokenRotation):
    """A new token goes to all workers before the first connection registers again."""

    def __init__(self, token: Token, tell: Callable[[say.Message], None]) -> None:
        super().__init__(token)
        self._tell = tell

    def begin(self, token: Token, connections: Iterable[int]) -> None:
        """See TokenRotation."""
        super().begin(token, connections)
        self._tell(use_token(token))


def use_token(token: Token) -> say.UseToken:
    """Give the message that puts a token in force."""
    return say.UseToken(token.account_tag, token.secret, str(token.tunnel_id), token.endpoint)
