"""Private networks in a run: the datagrams of every QUIC link, and what the flags say about them.

Owns: the one PrivateNetwork of the process, and which datagram version each connection was dialled with.
In: RunConfig, the dispatcher's Flows. Out: sinks and RPC handlers for links; feature strings; log lines.
Never: touches a datagram.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from connector.app.config import RunConfig
from connector.app.logs import Logger
from connector.errors import ConfigError
from connector.protocol.datagrams import UdpFlow
from connector.protocol.protocol_choice import DATAGRAM_V2, DATAGRAM_V3
from connector.proxy.flows import Flows
from connector.proxy.icmp import IcmpProxy, make_icmp_proxy
from connector.proxy.udp import LinkDatagrams, PrivateNetwork

if TYPE_CHECKING:
    from connector.app.tracing import Trace

EVENT_UDP = 3
"""The field `event` of lines about UDP flows."""

OnConfiguration = Callable[[int, bytes], tuple[int, str] | Awaitable[tuple[int, str]]]


class LinkHandlers:
    """The RPC of one link: configuration for the process, sessions for the link's own table. See RpcHandlers."""

    __slots__ = ("register_udp_session", "unregister_udp_session", "update_configuration")

    def __init__(self, sink: LinkDatagrams, on_configuration: OnConfiguration) -> None:
        self.update_configuration = on_configuration
        self.register_udp_session = sink.register_udp_session
        self.unregister_udp_session = sink.unregister_udp_session


class PrivateLinks:
    """One per run. `open` for every dial over QUIC; `version` gives the datagram version of the moment, 2 or 3."""

    def __init__(
        self,
        config: RunConfig,
        flows: Flows,
        log: Logger,
        *,
        loop: asyncio.AbstractEventLoop,
        version: Callable[[], int],
        icmp: bool = True,
        on_started: Callable[[UdpFlow], None] | None = None,
    ) -> None:
        self.icmp_sources: list[str] = []
        """Addresses from which ICMP is sent, for diagnostics; none where there is no ICMP."""
        self._version = version
        self._versions: dict[int, int] = {}
        log = log.bind(event=EVENT_UDP)

        def on_event(level: str, message: str, fields: dict[str, object]) -> None:
            log.log(level, message, **fields)

        proxy = self._make_icmp(config, loop, log) if icmp else None
        self.network = PrivateNetwork(flows, loop, icmp=proxy, on_event=on_event, tracing=_trace, on_started=on_started)

    def open(self, conn_index: int) -> LinkDatagrams:
        """Make the sink of a link that is about to be dialled."""
        version = self._versions[conn_index] = self._version()
        return self.network.open_sink(conn_index, version)

    def features(self, conn_index: int) -> tuple[str, ...]:
        """What the registration of that connection announces."""
        return (DATAGRAM_V2, DATAGRAM_V3) if self._versions.get(conn_index) == 3 else (DATAGRAM_V2,)

    async def close(self) -> None:
        """Let everything go; the links are closed."""
        await self.network.close()

    def _make_icmp(self, config: RunConfig, loop: asyncio.AbstractEventLoop, log: Logger) -> IcmpProxy | None:
        try:
            proxy = make_icmp_proxy(loop, config.icmp_source4, config.icmp_source6)
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            log.info(
                "ICMP proxy feature is disabled",
                error=str(error.strerror or error) if isinstance(error, OSError) else str(error),
                advice="Nothing to do unless devices shall ping through this tunnel; then let the process's group open"
                " ping sockets: sysctl net.ipv4.ping_group_range.",
            )
            return None
        self.icmp_sources = [str(proxy.source4)]
        log.info(f"ICMP proxy will use {proxy.source4} as source for IPv4")
        if proxy.source6 is not None:
            zone = f" in zone {proxy.zone}" if proxy.zone else ""
            self.icmp_sources.append(str(proxy.source6))
            log.info(f"ICMP proxy will use {proxy.source6}{zone} as source for IPv6")
        return proxy


def _trace(context: bytes) -> Trace | None:
    from connector.app.tracing import trace_request  # noqa: PLC0415  (few flows are traced)

    return trace_request(context, text=True)
