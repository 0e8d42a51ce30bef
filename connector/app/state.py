"""What all edge connections of a process share: identity, settings, services, and who is connected.

Owns: the set of connected indices and the stop deadline. In: calls from connections and supervisor. Out: facts.
Never: decides anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from uuid import UUID

from connector.app.addresses import AddressBook
from connector.app.config import RunConfig
from connector.app.link_meters import LinkMeters
from connector.app.logs import Logger
from connector.app.token_rotation import TokenRotation
from connector.app.transport_choice import TransportChoice
from connector.protocol.counts import COUNTS
from connector.protocol.edge_addresses import EdgeAddress
from connector.protocol.protocol_choice import Transport
from connector.protocol.reconnect import RetryPolicy

if TYPE_CHECKING:
    from connector.app.dialler import Dialler
    from connector.app.orchestrator import Orchestrator


class TunnelState:
    """One per run. Connections report to it; health and supervisor read it."""

    __slots__ = (
        "active_streams", "book", "choice", "config", "connected", "connected_elsewhere", "connection_tasks",
        "connector_id", "dialler", "go_away", "links", "locations", "log", "on_change", "on_first_registration",
        "orchestrator", "policy", "registrations", "rotation", "stop_deadline", "transports",
    )  # fmt: skip

    def __init__(
        self,
        *,
        config: RunConfig,
        connector_id: UUID,
        log: Logger,
        dialler: Dialler,
        choice: TransportChoice,
        book: AddressBook,
        active_streams: Callable[[], int],
        go_away: Callable[[], int] = lambda: 0,
        orchestrator: Orchestrator,
    ) -> None:
        self.config = config
        self.connector_id = connector_id
        self.log = log
        self.dialler = dialler
        self.choice = choice
        self.book = book
        self.active_streams = active_streams
        self.go_away = go_away
        """Says Close 1001 on every WebSocket; returns on how many it was said so far."""
        self.orchestrator = orchestrator
        self.rotation = TokenRotation(config.token)
        self.policy = RetryPolicy(config.retries)
        self.connected: dict[int, EdgeAddress] = {}
        self.connected_elsewhere = 0
        """In a worker: how many connections of the tunnel are registered, here and in other workers."""
        self.transports: dict[int, Transport] = {}
        """What each connected index speaks."""
        self.links = LinkMeters()
        self.locations: dict[int, str] = {}
        """The colo that each connection was last registered at."""
        self.connection_tasks = 0
        self.registrations = 0
        self.stop_deadline: float | None = None
        """Loop time at which the grace period ends; None until a shutdown was asked for."""
        self.on_change: Callable[[], None] = lambda: None
        """Called after a registration, and after a failure that may ask for another look-up of the edge."""
        self.on_first_registration: Callable[[], None] = lambda: None

    @property
    def stopping(self) -> bool:
        """True once a shutdown was asked for."""
        return self.stop_deadline is not None

    def registered(self, conn_index: int, address: EdgeAddress, transport: Transport, location: str) -> None:
        """Note that `conn_index` is connected, at which colo."""
        self.connected[conn_index] = address
        COUNTS.add("cloudflared_tunnel_tunnel_register_success", "registerConnection")
        before = self.locations.get(conn_index)
        if before is not None:
            COUNTS.set("cloudflared_tunnel_server_locations", str(conn_index), before, to=0)
        COUNTS.set("cloudflared_tunnel_server_locations", str(conn_index), location, to=1)
        self.locations[conn_index] = location
        self.transports[conn_index] = transport
        self.registrations += 1
        self.book.registered()
        if self.registrations == 1:
            self.on_first_registration()
        self.on_change()

    def dial_failed(self) -> None:
        """Note that nobody answered at an address."""
        self.book.failed()
        self.on_change()

    def disconnected(self, conn_index: int) -> None:
        """Note that `conn_index` is not connected, or about to leave."""
        self.connected.pop(conn_index, None)
        self.transports.pop(conn_index, None)
