"""One edge connection: a link's life under one conn_index, over and over until shutdown.

Owns: dial -> control stream -> register -> serve -> drain, and the log lines of that life. In: TunnelState.
Out: nothing; raises only the error that must end the process.
Never: decides about waits or fatality (`protocol/reconnect.py` does); touches request payload.

Strategy: one task per connection. `stop` ends the current wait through the `asyncio.timeout` scope that surrounds every
wait, so that "the link ended or we are asked to stop" needs no second task; `wake` and `move_on` do the same with the
scopes of the back-off sleep and of the service. A link that is left while it still serves (the edge says goodbye, or
QUIC works again) drains in a task of its own, and the connection dials again at once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from connector.app.durations import format_duration
from connector.app.logs import Logger
from connector.app.race import run_race
from connector.app.state import TunnelState
from connector.errors import (
    ConnectorError,
    DuplicateConnectionError,
    EdgeDialError,
    EdgeLostError,
    ProtocolError,
    RegistrationError,
    UnauthorizedError,
)
from connector.protocol.counts import COUNTS
from connector.protocol.edge_addresses import EdgeAddress
from connector.protocol.protocol_choice import AddressTrials, Transport
from connector.protocol.protocol_race import DialPlan, Reason
from connector.protocol.reconnect import Action, Failure, RetryState, classify
from connector.proxy.limits import WS_CLOSE_WAIT
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

DRAIN_TICK = 1.0
"""How often a link that drains apart is looked at: the edge may leave it open when nothing is in flight any more."""

MAX_DRAINS = 4
"""Links of one connection that drain apart at once; the oldest is cut for a fifth. An edge that keeps saying goodbye
must not collect links."""

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


class _MovedOnError(Exception):
    """The service was ended by `move_on`: the link drains apart."""


class WaitTogetherError(Exception):
    """The connection gave up for now: the supervisor starts it again by the slow schedule."""


class EdgeConnection:
    """One conn_index. `await run()` until `stop()`; after WaitTogetherError it may be run again."""

    def __init__(self, conn_index: int, state: TunnelState) -> None:
        self.conn_index = conn_index
        self._state = state
        self._retry = RetryState(conn_index)
        self._trials = AddressTrials()
        self._reason: Reason | None = None
        self._stopping = False
        self._scope: asyncio.Timeout | None = None
        self._service: asyncio.Timeout | None = None
        self._nap: asyncio.Timeout | None = None
        self._link: Link | None = None
        self._drains: list[asyncio.Task[None]] = []
        self._drain_scopes: set[asyncio.Timeout] = set()
        self._port = 0
        self._pause: float | None = None
        self._log = state.log.bind(connIndex=conn_index, event=0)

    def stop(self) -> None:
        """Begin the graceful end: leave /ready, end the current wait, unregister if registered. Idempotent."""
        if self._stopping:
            return
        self._stopping = True
        self._state.disconnected(self.conn_index)
        for scope in self._drain_scopes:
            scope.reschedule(self._state.stop_deadline)
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())

    def wake(self) -> bool:
        """End the back-off sleep, if one is running."""
        if self._nap is None:
            return False
        self._nap.reschedule(asyncio.get_running_loop().time())
        return True

    def check(self) -> None:
        """Find out soon whether the link still works, if there is one."""
        if self._link is not None:
            self._link.check()

    def move_on(self) -> None:
        """Leave the link that serves now to drain apart, and dial again. Ignored while none serves."""
        if self._service is not None:
            self._service.reschedule(asyncio.get_running_loop().time())

    def reconnect(self, delay: float) -> None:
        """Leave the link that serves now to drain apart; dial again after `delay` seconds, without any back-off."""
        self._pause = delay
        self.move_on()

    async def run(self) -> None:
        """Keep the connection up. Returns after `stop`; raises WaitTogetherError, or what ends the process."""
        try:
            while True:
                await self._once()
        except _StoppedError:
            if self._drains:
                await asyncio.wait(self._drains)
        finally:
            for task in self._drains:
                task.cancel()
            await asyncio.gather(*self._drains, return_exceptions=True)

    async def _once(self) -> None:
        """Make one attempt and live through its consequence, the wait included."""
        state = self._state
        async with self._until_stopped():
            address = await state.book.take(self.conn_index)
        log = self._log if address is None else self._log.bind(ip=address.host)
        error: Exception
        self._reason = None
        try:
            if address is None:
                raise EdgeDialError(
                    "no addresses left", advice="All addresses of the edge are in use or gave no answer."
                )
            await self._attempt(address, log)
            error = EdgeLostError("connection with edge closed")
        except (_StoppedError, asyncio.CancelledError):
            raise
        except _MovedOnError:
            pause, self._pause = self._pause, None
            if pause is not None:
                log.info(f"Restarting connection due to reconnect signal in {format_duration(pause)}")
                async with self._until_stopped():
                    await asyncio.sleep(pause)
            return
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
        self._trials, effect = self._trials.failed(decision.failure, budget=state.config.address_budget)
        if effect.start_over:
            self._retry = self._retry.started_over()
        if effect.rotate:
            # Twice in a row nobody answered: the region as a whole may be gone.
            leave = self._trials.failures >= LEAVE_REGION_AFTER
            state.book.rotate(self.conn_index, unreachable=effect.unreachable, leave_region=leave)
        if decision.failure is Failure.DIAL:
            state.dial_failed()
        async with self._until_stopped():
            await self._sleep(decision.wait)
        if decision.action is Action.WAIT_TOGETHER:
            raise WaitTogetherError from error

    async def _sleep(self, seconds: float) -> None:
        """Wait, at most until `wake`."""
        try:
            async with asyncio.timeout(seconds) as self._nap:
                await asyncio.get_running_loop().create_future()
        except TimeoutError:
            pass
        finally:
            self._nap = None

    def _report(self, error: Exception, log: Logger) -> None:
        """Say what went wrong and what to do, in one line."""
        failure = classify(error)
        advice = (error.advice if isinstance(error, ConnectorError) else "") or _ADVICE.get(failure, "")
        fields = {"advice": advice} if advice else {}
        if self._reason is not None:
            fields["reason"] = self._reason.text(self._port)
        if failure is Failure.LOST:
            self._log.info("Lost connection with the edge")
        level = "warn" if self._state.connected or self._state.connected_elsewhere else "error"
        log.log(level, _MESSAGES[failure], error=str(error) or type(error).__name__, **fields)

    async def _attempt(self, address: EdgeAddress, log: Logger) -> None:
        """Dial, register, serve. Returns when the edge closed the link; raises what went wrong, or _StoppedError."""
        self._port = address.port
        link, transport = await self._dial(address, log)
        self._link = link
        self._state.links.opened(self.conn_index, link)
        moved = False
        try:
            await self._live(link, transport, address, log)
        except _MovedOnError:
            moved = True
            self._drain_apart(link, log)
            raise
        except (EdgeLostError, ProtocolError) as error:
            self._reason = self._state.choice.link_ended(transport, error)
            raise
        else:
            self._reason = self._state.choice.link_ended(transport, None)
        finally:
            self._link = None
            if not moved:
                link.close()
                await self._await_close(link, CLOSE_SECONDS)
                link.abort()
                self._state.links.closed(link)

    async def _dial(self, address: EdgeAddress, log: Logger) -> tuple[Link, Transport]:
        """Dial as `TransportChoice` plans it, and tell it the outcome."""
        state = self._state
        dialler, choice = state.dialler, state.choice
        choice.use_port(address.port)
        plan = choice.plan()
        log.debug(f"Connecting via {'quic or http2' if plan is DialPlan.RACE else plan.value}")
        try:
            async with self._until_stopped():
                if plan is DialPlan.RACE:
                    won = await run_race(
                        lambda transport, heard: dialler.dial(transport, address, self.conn_index, heard)
                    )
                    link, transport = won.link, won.transport
                    heard, quic_error = won.quic_heard, won.quic_error
                else:
                    transport = Transport(plan.value)
                    link = await dialler.dial(transport, address, self.conn_index)
                    heard, quic_error = False, None
        except EdgeDialError as error:
            self._reason = choice.dial_failed(plan, error)
            raise
        choice.came_up(transport, raced=plan is DialPlan.RACE, quic_heard=heard, quic_error=quic_error)
        return link, transport

    async def _live(self, link: Link, transport: Transport, address: EdgeAddress, log: Logger) -> None:
        async with self._until_stopped():
            control = await link.control_stream(CONTROL_SECONDS)
        if control.ended.done():  # opened and given up in one breath
            raise EdgeLostError(f"the control stream ended at once: {control.error or 'the edge closed it'}")
        try:
            async with RegistrationClient(control) as client:
                details = await self._register(client, link, transport, address, log)
                link.on_goaway = lambda: self._edge_leaves(log)
                try:
                    if self.conn_index == 0 and not details.remotely_managed:
                        await self._report_configuration(client, log)
                    async with self._until_stopped(), self._until_moved():
                        await link.wait_closed()
                except _StoppedError:
                    await self._unregister(client, self._grace_left(), log)
                    raise
                except _MovedOnError:
                    self._state.disconnected(self.conn_index)
                    await self._unregister(client, self._state.config.rpc_timeout, log)
                    raise
                finally:
                    link.on_goaway = None
        except RegistrationError as error:
            label = "dup_edge_conn" if isinstance(error, DuplicateConnectionError) else "server_error"
            COUNTS.add("cloudflared_tunnel_tunnel_register_fail", label, "registerConnection")
            self._report(error, log)
            await self._await_close(link, REFUSED_SECONDS)
            raise
        except _StoppedError:
            await self._drain(link, log)
            raise

    async def _register(
        self, client: RegistrationClient, link: Link, transport: Transport, address: EdgeAddress, log: Logger
    ) -> ConnectionDetails:
        state, config = self._state, self._state.config
        features = (*config.features, *state.dialler.features(transport, self.conn_index))
        log.debug("Tunnel connection options", features=list(features))
        log.debug("Registering tunnel connection", protocol=link.protocol)
        options = ConnectionOptions(
            client_id=state.connector_id,
            features=features,
            origin_local_ip=link.local_address[0],
            num_previous_attempts=self._retry.previous_attempts,
        )
        # Not ended by `stop`: the edge may have registered us already, and would then not be told that we leave.
        token = state.rotation.token
        try:
            details = await client.register(token, self.conn_index, options, config.rpc_timeout)
        except UnauthorizedError:
            if state.rotation.refused(token):
                log.error("The edge refuses the new token; the one before is in use again")
            raise
        state.rotation.accepted(token)
        self._retry = self._retry.registered()
        self._trials = self._trials.registered()
        if not self._stopping:
            state.registered(self.conn_index, address, transport, details.location)
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
        COUNTS.add("cloudflared_config_local_config_pushes")
        try:
            async with self._until_stopped():
                report = self._state.orchestrator.local_configuration(config)
                await client.update_local_configuration(report, config.rpc_timeout)
        except ConnectorError as error:
            COUNTS.add("cloudflared_config_local_config_pushes_errors")
            log.error("unable to send local configuration", error=str(error))

    async def _unregister(self, client: RegistrationClient, limit: float, log: Logger) -> None:
        """Tell the edge to send nothing new. With no time left it is not told."""
        if limit <= 0:
            return
        try:
            await client.unregister(limit)
        except ConnectorError as error:
            log.warn("Could not unregister the tunnel connection", error=str(error))
        else:
            log.info("Unregistered tunnel connection")

    async def _drain(self, link: Link, log: Logger) -> None:
        """Serve what is in flight and what still comes, until the edge closes the link or the grace period ends."""
        if not await self._await_close(link, self._grace_left()):
            await self._say_goodbye(link)
            active = self._state.active_streams()
            if active:
                log.warn("The grace period is over: requests in flight are cut off", requests=active)

    async def _say_goodbye(self, link: Link) -> None:
        """Close WebSockets with 1001, and leave the edge a moment to take that."""
        if self._state.go_away():
            await self._await_close(link, WS_CLOSE_WAIT)

    def _edge_leaves(self, log: Logger) -> None:
        log.info("The edge takes no new requests on this connection; a new one takes over while it drains")
        self._state.book.rotate(self.conn_index, unreachable=False, leave_region=False)
        self.move_on()

    def _drain_apart(self, link: Link, log: Logger) -> None:
        """Let `link` finish what it serves in a task of its own; at shutdown it has the grace period like all."""
        if len(self._drains) >= MAX_DRAINS:
            self._drains[0].cancel()
        task = asyncio.create_task(self._drained(link, log), name=f"drain of edge connection {self.conn_index}")
        self._drains.append(task)
        task.add_done_callback(self._drains.remove)

    async def _drained(self, link: Link, log: Logger) -> None:
        idle = False
        scope = asyncio.timeout_at(self._state.stop_deadline)
        try:
            async with scope:
                self._drain_scopes.add(scope)
                while not await self._await_close(link, DRAIN_TICK):
                    # Twice, a tick apart: what the edge had sent when it was told may still arrive.
                    if link.in_flight <= 0:
                        if idle:
                            break
                        idle = True
                    else:
                        idle = False
        except TimeoutError:
            await self._say_goodbye(link)
            if link.in_flight > 0:
                log.warn("The grace period is over: requests in flight are cut off", requests=link.in_flight)
        finally:
            self._drain_scopes.discard(scope)
            link.close()
            try:
                await self._await_close(link, CLOSE_SECONDS)
            finally:
                link.abort()
                self._state.links.closed(link)

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
    async def _until_moved(self) -> AsyncIterator[None]:
        """Surround the service that `move_on` ends with _MovedOnError."""
        try:
            async with asyncio.timeout(None) as scope:
                self._service = scope
                yield
        except TimeoutError:
            if scope.expired():
                raise _MovedOnError from None
            raise
        finally:
            self._service = None

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
