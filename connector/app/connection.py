"""One edge connection: a link's life under one conn_index, over and over until shutdown.

Owns: dial -> control stream -> register -> serve -> drain, and the log lines of that life. In: TunnelState.
Out: nothing; raises only the error that must end the process.
Never: decides about waits or fatality (`protocol/reconnect.py` does); touches request payload.

Strategy: one task per connection and none beside it. `stop` ends the current wait through the `asyncio.timeout` scope
that surrounds every wait, so that "the link ended or we are asked to stop" needs no second task.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from connector.app.durations import format_duration
from connector.app.logs import Logger
from connector.app.orchestrator import local_configuration
from connector.app.state import TunnelState
from connector.errors import ConnectorError, EdgeDialError, EdgeLostError, RegistrationError
from connector.protocol.edge_addresses import EdgeAddress
from connector.protocol.protocol_choice import ProtocolState, Transport
from connector.protocol.reconnect import Action, Failure, RetryState, classify
from connector.transport.link import Link
from connector.transport.rpc import ConnectionDetails, ConnectionOptions, RegistrationClient

CONTROL_SECONDS = 10.0
"""How long the edge may take to open the control stream on a fresh link; as long as the HTTP/2 preface may take."""

REFUSED_SECONDS = 2.0
"""After a refused registration the edge closes the link; how long we leave it the chance."""

CLOSE_SECONDS = 1.5
"""How long a link that we close may take to say goodbye in TLS before it is cut."""

LEAVE_REGION_AFTER = 2
"""Unanswered dials in a row after which the other region is preferred."""

_MESSAGES = {
    Failure.DIAL: "Unable to establish connection with Cloudflare edge",
    Failure.DUPLICATE: "Unable to establish connection.",
    Failure.UNAUTHORIZED: "Register tunnel error from server side",
    Failure.REFUSED_FOR_NOW: "Register tunnel error from server side",
    Failure.REFUSED: "Register tunnel error from server side",
    Failure.LOST: "Serve tunnel error",
    Failure.INTERNAL: "Serve tunnel error",
}

_ADVICE = {
    Failure.DIAL: "Check that the edge address can be reached from here: firewall, network, --edge.",
    Failure.UNAUTHORIZED: "Check that the token is the tunnel's current one; a new tunnel may take a moment.",
    Failure.REFUSED: "The edge refused this tunnel for good; its reason stands in error.",
    Failure.LOST: "Nothing to do here unless it goes on: the connection is made again.",
    Failure.INTERNAL: "This is a bug in the connector; please report it with this line.",
}


class _StoppedError(Exception):
    """The wait was ended by `stop`."""


class EdgeConnection:
    """One conn_index. `await run()` until `stop()`; a second `run` is not possible."""

    def __init__(self, conn_index: int, state: TunnelState) -> None:
        self.conn_index = conn_index
        self._state = state
        self._retry = RetryState(conn_index)
        self._proto = ProtocolState(Transport.HTTP2)
        self._stopping = False
        self._scope: asyncio.Timeout | None = None
        self._log = state.log.bind(connIndex=conn_index, event=0)

    def stop(self) -> None:
        """Begin the graceful end: leave /ready, end the current wait, unregister if registered. Idempotent."""
        if self._stopping:
            return
        self._stopping = True
        self._state.disconnected(self.conn_index)
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Keep the connection up. Returns after `stop`; raises the error that ends the process."""
        try:
            while True:
                await self._once()
        except _StoppedError:
            return

    async def _once(self) -> None:
        """Make one attempt and live through its consequence, the wait included."""
        state = self._state
        address = state.book.get(self.conn_index)
        log = self._log if address is None else self._log.bind(ip=address.host)
        error: Exception
        try:
            if address is None:
                raise EdgeDialError(
                    "no addresses left", advice="All addresses of the edge are in use or gave no answer."
                )
            await self._attempt(address, log)
            error = EdgeLostError("connection with edge closed")
        except (_StoppedError, asyncio.CancelledError):
            raise
        except ConnectorError as failed:
            error = failed
        except Exception as failed:
            log.bug("Unexpected error in an edge connection", failed)
            error = failed
        finally:
            state.disconnected(self.conn_index)
        if self._stopping:
            raise _StoppedError
        if not isinstance(error, RegistrationError):  # a refusal was reported as soon as it came
            self._report(error, log)
        decision = state.policy.decide(
            self._retry,
            error,
            now=asyncio.get_running_loop().time(),
            random=random.random(),  # noqa: S311  (jitter, no secret)
            ever_registered=state.registrations > 0,
        )
        self._retry = decision.state
        if decision.action is Action.RETRY:
            log.info(f"Retrying connection in up to {format_duration(decision.wait_limit)}")
        if decision.action is Action.END_PROCESS:
            raise error
        self._proto, effect = self._proto.failed(decision.failure)
        if effect.rotate:
            # Twice in a row nobody answered: the region as a whole may be gone.
            leave = self._proto.address_failures >= LEAVE_REGION_AFTER
            state.book.rotate(self.conn_index, unreachable=effect.unreachable, leave_region=leave)
        if decision.failure is Failure.DIAL:
            state.dial_failed()
        async with self._until_stopped():
            await asyncio.sleep(decision.wait)

    def _report(self, error: Exception, log: Logger) -> None:
        """Say what went wrong and what to do, in one line."""
        failure = classify(error)
        advice = (error.advice if isinstance(error, ConnectorError) else "") or _ADVICE.get(failure, "")
        fields = {"advice": advice} if advice else {}
        if failure is Failure.LOST:
            self._log.info("Lost connection with the edge")
        level = "warn" if self._state.connected else "error"
        log.log(level, _MESSAGES[failure], error=str(error) or type(error).__name__, **fields)

    async def _attempt(self, address: EdgeAddress, log: Logger) -> None:
        """Dial, register, serve. Returns when the edge closed the link; raises what went wrong, or _StoppedError."""
        dialler = self._state.dialler
        log.debug(f"Connecting via {dialler.protocol}")
        async with self._until_stopped():
            link = await dialler.dial(address, self.conn_index)
        try:
            await self._live(link, address, log)
        finally:
            link.close()
            await self._await_close(link, CLOSE_SECONDS)
            link.abort()

    async def _live(self, link: Link, address: EdgeAddress, log: Logger) -> None:
        async with self._until_stopped():
            control = await link.control_stream(CONTROL_SECONDS)
        if control.ended.done():  # opened and given up in one breath
            raise EdgeLostError(f"the control stream ended at once: {control.error or 'the edge closed it'}")
        try:
            async with RegistrationClient(control) as client:
                details = await self._register(client, link, address, log)
                try:
                    if self.conn_index == 0 and not details.remotely_managed:
                        await self._report_configuration(client, log)
                    async with self._until_stopped():
                        await link.wait_closed()
                except _StoppedError:
                    await self._unregister(client, log)
                    raise
        except RegistrationError as error:
            self._report(error, log)
            await self._await_close(link, REFUSED_SECONDS)
            raise
        except _StoppedError:
            await self._drain(link, log)
            raise

    async def _register(
        self, client: RegistrationClient, link: Link, address: EdgeAddress, log: Logger
    ) -> ConnectionDetails:
        state, config = self._state, self._state.config
        log.debug("Tunnel connection options", features=config.features)
        log.debug("Registering tunnel connection", protocol=link.protocol)
        options = ConnectionOptions(
            client_id=state.connector_id,
            features=(*config.features, *state.dialler.features),
            origin_local_ip=link.local_address[0],
            num_previous_attempts=self._retry.previous_attempts,
        )
        # Not ended by `stop`: the edge may have registered us already, and would then not be told that we leave.
        details = await client.register(config.token, self.conn_index, options, config.rpc_timeout)
        self._retry = self._retry.registered()
        self._proto = self._proto.registered()
        if not self._stopping:
            state.registered(self.conn_index, address)
        log.info(
            "Registered tunnel connection",
            connection=str(details.uuid),
            location=details.location,
            protocol=link.protocol,
        )
        return details

    async def _report_configuration(self, client: RegistrationClient, log: Logger) -> None:
        """Tell the edge the rules of a locally managed tunnel. A failure is only logged."""
        config = self._state.config
        try:
            async with self._until_stopped():
                await client.update_local_configuration(local_configuration(config), config.rpc_timeout)
        except ConnectorError as error:
            log.error("unable to send local configuration", error=str(error))

    async def _unregister(self, client: RegistrationClient, log: Logger) -> None:
        """Tell the edge to send nothing new. With no grace period left it is not told."""
        left = self._grace_left()
        if left <= 0:
            return
        try:
            await client.unregister(left)
        except ConnectorError as error:
            log.warn("Could not unregister the tunnel connection", error=str(error))
        else:
            log.info("Unregistered tunnel connection")

    async def _drain(self, link: Link, log: Logger) -> None:
        """Serve what is in flight and what still comes, until the edge closes the link or the grace period ends."""
        if not await self._await_close(link, self._grace_left()):
            active = self._state.active_streams()
            if active:
                log.warn("The grace period is over: requests in flight are cut off", requests=active)

    def _grace_left(self) -> float:
        deadline = self._state.stop_deadline
        return 0.0 if deadline is None else deadline - asyncio.get_running_loop().time()

    async def _await_close(self, link: Link, limit: float) -> bool:
        """Wait until the edge closed the link; False when it did not within `limit` seconds."""
        if limit <= 0:
            return False
        try:
            async with asyncio.timeout(limit):
                await link.wait_closed()
        except TimeoutError:
            return False
        except ConnectorError:
            pass
        return True

    @asynccontextmanager
    async def _until_stopped(self) -> AsyncIterator[None]:
        """Surround a wait that `stop` ends with _StoppedError."""
        if self._stopping:
            raise _StoppedError
        try:
            async with asyncio.timeout(None) as scope:
                self._scope = scope
                yield
        except TimeoutError:
            if scope.expired():
                raise _StoppedError from None
            raise
        finally:
            self._scope = None
