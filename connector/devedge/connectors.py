"""The connectors that are attached: one link per connection, and the roster that spreads requests over them.

Owns: the life of a connection (registration, when to push, drain, loss) and the choice of a connection for a request.
In: what the RPC asks; `Roster.pick`, `Link.open_request`. Out: streams; events.
Never: looks into proxied requests or payload, or knows how a protocol carries them (h2link.py, quiclink.py).
"""

from __future__ import annotations

import abc
import asyncio
import hmac
import json
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from connector.devedge.events import EventLog
from connector.devedge.faults import Faults
from connector.devedge.headers import Head
from connector.devedge.management import ManagementDesk
from connector.devedge.registrar import GARBAGE, ControlStream, Grant, Refusal, Registration
from connector.devedge.streams import RawHeaders, Stream, StreamHandler, StreamLostError
from connector.devedge.tunnels import Directory, Tunnel
from connector.protocol.ports import LinkTap, Tap

if TYPE_CHECKING:
    from connector.devedge.datagrams import DatagramDesk

LOCATION = "dev01"
"""Colo name of the dev edge."""

REGISTER_LIMIT = 15.0
"""Seconds from TLS to a registration before the link is dropped (the connector's own limit is 5 s)."""

CONTROL_LINGER = 2.0
"""Seconds that a drained link waits for the connector to end its control stream."""

PUSH_LIMIT = 15.0
"""Seconds that a configuration push may take."""


class Roster:
    """All links, and per tunnel the registered ones in the order of their turns."""

    def __init__(
        self, events: EventLog, faults: Faults, directory: Directory, management: ManagementDesk | None = None
    ) -> None:
        self.events = events
        self.management = management
        self.faults = faults
        faults.on_added = self._fault_added
        self.tap: Tap | None = None
        """Looks on at links and requests made from now on."""
        self.directory = directory
        self.links: set[Link] = set()
        self.closing: set[asyncio.Task[None]] = set()
        self._turns: dict[uuid.UUID, list[Link]] = {}

    def pick(self, tunnel: Tunnel) -> Link | None:
        """The link whose turn it is."""
        turns = self._turns.get(tunnel.id)
        if not turns:
            return None
        link = turns.pop(0)
        turns.append(link)
        return link

    def links_of(self, tunnel: Tunnel) -> list[Link]:
        """Registered links that take requests."""
        return list(self._turns.get(tunnel.id, ()))

    def register(self, link: Link, registration: Registration) -> tuple[Tunnel, Grant]:
        """Check a registration and enter the link; raises Refusal."""
        tunnel = self.directory.tunnels.get(registration.tunnel)
        # The comparison takes the same time whether or not the tunnel exists.
        secret = tunnel.secret if tunnel else b"\0" * 32
        account = tunnel.account if tunnel else ""
        same_secret = hmac.compare_digest(secret, registration.secret)
        same_account = hmac.compare_digest(account.encode(), registration.account.encode())
        if tunnel is None:
            raise Refusal("Unauthorized: Tunnel not found")
        if not (same_secret and same_account):
            raise Refusal("Unauthorized: Invalid tunnel secret")
        for other in self.links:
            known = other.registration
            if (
                other is not link
                and known is not None
                and not other.draining
                and known.connector == registration.connector
                and known.conn_index == registration.conn_index
                and known.tunnel == registration.tunnel
            ):
                raise Refusal("EDUPCONN", should_retry=True)
        self._turns.setdefault(tunnel.id, []).append(link)
        return tunnel, Grant(uuid.uuid4(), LOCATION, tunnel.config is not None)

    def _fault_added(self, name: str) -> None:
        if name in self.faults.after:
            for link in self.links:
                if link.registration is not None:
                    link.commit_later(name)

    def watch(self, task: asyncio.Task[None]) -> None:
        """Let `close` wait for a task."""
        self.closing.add(task)
        task.add_done_callback(self.closing.discard)

    def withdraw(self, link: Link) -> None:
        """Give a link no more requests."""
        for turns in self._turns.values():
            if link in turns:
                turns.remove(link)

    def push_all(self) -> None:
        """Push the configuration of every tunnel to every link that takes requests."""
        for turns in self._turns.values():
            for link in turns:
                link.push_configuration()

    async def close(self) -> None:
        """Wait until every link that is going is gone."""
        while self.closing:
            await asyncio.wait(self.closing)


class Link(abc.ABC):
    """One connection of a connector; a subclass per protocol is also the session that carries it."""

    protocol = ""
    loop: asyncio.AbstractEventLoop
    desk: DatagramDesk | None = None
    """UDP flows and pings, where the protocol has datagrams."""

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self.registration: Registration | None = None
        self.connection: uuid.UUID | None = None
        self.tunnel_id: uuid.UUID | None = None
        self.draining = False
        self.address = ""
        self.requests = 0
        self._open_requests = 0
        self._control_over = False
        self._control: ControlStream | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._fault: str | None = None
        self._committed = ""  # the last fault that this link suffered
        self._fault_taken = False

    # What a protocol does its own way.

    @property
    @abc.abstractmethod
    def attached(self) -> bool:
        """Whether the connection is there."""

    @abc.abstractmethod
    def new_stream(self, headers: RawHeaders, handler: StreamHandler, *, end_stream: bool) -> Stream:
        """Open the stream of a request; raises StreamLostError."""

    @abc.abstractmethod
    def open_tcp(self, dest: str, handler: StreamHandler) -> Stream:
        """Open a stream to `ip:port` in the connector's network; raises StreamLostError. See forward.tcp_trouble."""

    @abc.abstractmethod
    def read_head(self, headers: RawHeaders) -> Head:
        """Understand what `on_headers` of such a stream brought; raises WireError."""

    @abc.abstractmethod
    def push(self, version: int, config: object) -> None:
        """Send any configuration value as `version`; `configuration_told` follows."""

    @abc.abstractmethod
    def send_goaway(self) -> None:
        """Tell that no new streams come, where the protocol has words for that."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the connection properly; nothing happens when it is gone."""

    @abc.abstractmethod
    def abort(self, reason: str | None = None) -> None:
        """Drop the connection at once; `reason` goes into the event."""

    # For subclasses.

    tap: LinkTap | None = None

    def begin(self, address: tuple[str, int]) -> None:
        """The handshake is done."""
        if self.roster.tap is not None and self.tap is None:
            self.tap = self.roster.tap.open_link(self.protocol, f"{address[0]}:{address[1]}", -1)
        self.address = f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
        self.roster.links.add(self)
        self._after(REGISTER_LIMIT, self._registration_late)

    def begin_control(self) -> ControlStream:
        """Make the handler of the control stream."""
        self._control = ControlStream(self, self.abort)
        return self._control

    def finish(self, error: BaseException | None) -> None:
        """The connection is gone: leave the roster and take the RPC session down."""
        for timer in self._timers:
            timer.cancel()
        if self._committed:
            error = StreamLostError(f"after the fault {self._committed}{f': {error}' if error is not None else ''}")
        if self.tap is not None:
            self.tap.on_closed(error)
        self.roster.links.discard(self)
        self.roster.withdraw(self)
        text = str(error) if error is not None else None
        self.roster.events.emit("disconnected", **self._identity(), error=text)
        if self._control is not None:
            self.roster.watch(self.loop.create_task(self._control.stop(), name="devedge rpc close"))

    def configuration_told(self, version: int, error: str | None) -> None:
        """The end of a push."""
        self.roster.events.emit(
            "configuration",
            tunnel=str(self.tunnel_id),
            connector=str(self.registration.connector) if self.registration else None,
            conn_index=self.registration.conn_index if self.registration else None,
            version=version,
            applied=error is None,
            error=error,
        )

    # Desk: what the RPC asks.

    def register(self, registration: Registration) -> Grant:
        """Decide about a registration; raises Refusal."""
        try:
            if self.registration is not None:
                raise Refusal("this connection is registered already")
            self._refuse_by_fault()
            tunnel, grant = self.roster.register(self, registration)
        except Refusal as refusal:
            self.roster.events.emit(
                "register_refused",
                cause=refusal.cause,
                tunnel=str(registration.tunnel),
                connector=str(registration.connector),
                conn_index=registration.conn_index,
                address=self.address,
            )
            raise
        registration.secret = b""
        self.registration = registration
        self.connection = grant.connection
        self.tunnel_id = tunnel.id
        self.roster.events.emit(
            "registered",
            **self._identity(),
            version=registration.version,
            arch=registration.arch,
            features=sorted(registration.features),
            protocol=self.protocol,
        )
        self._after(0, self.push_configuration)  # behind the RPC answer
        for name in self.roster.faults.after:
            self.commit_later(name)
        return grant

    @property
    def fault(self) -> str | None:
        """The fault of this registration."""
        if not self._fault_taken:
            self._fault_taken = True
            self._fault = self.roster.faults.take_registration()
            if self._fault is not None:
                self._tell_fault("registration")
        return self._fault

    def _tell_fault(self, name: str) -> None:
        """Say that a fault is committed on this link: what follows is no riddle then."""
        self._committed = self.roster.faults.text(name)
        self.roster.events.emit("fault", committed=self._committed, address=self.address)

    def _refuse_by_fault(self) -> None:
        if self.fault == "EDUPCONN":
            raise Refusal("EDUPCONN", should_retry=True)
        if self.fault == "unauthorized":
            raise Refusal("Unauthorized: Invalid tunnel secret")
        if self.fault == "permanent":
            raise Refusal("dev edge fault: registration=permanent")
        if self.fault == "retry-after":
            raise Refusal("try later", retry_after=self.roster.faults.retry_after, should_retry=True)

    def unregister(self) -> None:
        """The connector wants to leave."""
        self.roster.events.emit("unregistered", **self._identity())
        self.drain()

    def local_configuration(self, config: bytes) -> None:
        """Show what a locally managed connector reports."""
        try:
            value: Any = json.loads(config)
        except ValueError:
            value = None
        self.roster.events.emit("local_configuration", **self._identity(), config=value)

    def control_ended(self) -> None:
        """The connector ended its control stream: it leaves, or it never registered."""
        self._control_over = True
        self.roster.withdraw(self)
        if self.registration is None:
            self.close()
        else:
            self.drain()

    # Requests.

    def open_request(self, headers: RawHeaders, handler: StreamHandler, *, end_stream: bool) -> Stream:
        """Open the stream of one proxied request; `request_done` must follow once. Raises StreamLostError."""
        stream = self.new_stream(headers, handler, end_stream=end_stream)
        self._open_requests += 1
        self.requests += 1
        if self.requests == self.roster.faults.close_after:
            self._tell_fault("close-after")
            self._after(0, self.abort)
        return stream

    def commit_later(self, name: str) -> None:
        """Commit the fault `name` its time from now, if it is still in force then."""
        calls: dict[str, Callable[[], object]] = {
            "goaway-after": self._go_away, "cut-after": self.abort, "malformed-after": self._send_garbage,
        }  # fmt: skip
        faults = self.roster.faults

        def commit() -> None:
            if name in faults.after and self.attached:
                self._tell_fault(name)
                calls[name]()

        self._after(faults.after[name], commit)

    def _send_garbage(self) -> None:
        if self._control is not None:
            self._control.rpc_bytes(GARBAGE)

    def request_done(self) -> None:
        """A proxied request is over."""
        self._open_requests -= 1
        self._close_when_idle()

    def push_configuration(self) -> None:
        """Send the tunnel's configuration; the reply becomes an event."""
        tunnel = self.roster.directory.tunnels.get(self.tunnel_id) if self.tunnel_id else None
        if tunnel is None or tunnel.config is None or self.draining:
            return
        self.push(tunnel.version, tunnel.config)

    # Leaving.

    def drain(self) -> None:
        """Send no new requests; close when the open ones are done."""
        if self.draining:
            self._close_when_idle()
            return
        self.draining = True
        self.roster.withdraw(self)
        self._close_when_idle()

    def _close_when_idle(self) -> None:
        if not self.draining or self._open_requests or not self.attached:
            return
        if self._control_over:
            self.close()
        else:
            self._after(CONTROL_LINGER, self._linger_over)

    def _linger_over(self) -> None:
        if not self._open_requests:
            self.close()

    def _go_away(self) -> None:
        self.send_goaway()
        self.draining = True
        self.roster.withdraw(self)
        if self._open_requests == 0:
            self.close()
        else:
            self._control_over = True

    def _registration_late(self) -> None:
        if self.registration is None:
            self.abort(f"no registration within {REGISTER_LIMIT:g} s")

    def _after(self, delay: float, call: Callable[[], object]) -> None:
        self._timers.append(self.loop.call_later(delay, call))

    def _identity(self) -> dict[str, Any]:
        known = self.registration
        return {
            "tunnel": str(known.tunnel) if known else None,
            "connector": str(known.connector) if known else None,
            "connection": str(self.connection) if self.connection else None,
            "conn_index": known.conn_index if known else None,
            "address": self.address,
        }
