"""What private-network TCP and UDP share: the flow limit, the settings of `warp-routing`, the virtual DNS address.

Owns: the number of open flows, the settings in force, where a flow's destination really leads.
In: `warp-routing` of a configuration, flags. Out: slots; destinations.
Never: opens a socket, ends a flow (a lower limit only keeps new ones out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Protocol

from connector.errors import ConnectorError, Scope
from connector.protocol.counts import COUNTS
from connector.proxy.dns_service import VirtualDns

_REFUSED: Final = "flow_client_registrations_rate_limited_total"

TOO_MANY_FLOWS: Final = "too many active flows"


class FlowLimitError(ConnectorError):
    """The limit of flows is reached: this one does not start. Becomes `FlowConnectRateLimited` on the wire."""

    scope = Scope.FLOW


class FlowCount(Protocol):
    """Counts flows of several processes. See `app/workers/flow_count.py`."""

    def take(self, limit: int) -> bool:
        """Count one more, unless `limit` (0: none) is reached."""

    def release(self) -> None:
        """Count one less."""


class FlowLimiter:
    """Counts flows of the whole process, TCP and UDP together. A limit of 0 is none.

    `fixed` is `--max-active-flows`; where it is given, configurations change nothing. `count` counts for all workers;
    `active` stays this process's number.
    """

    __slots__ = ("_count", "_fixed", "active", "limit")

    def __init__(self, fixed: int | None = None, count: FlowCount | None = None) -> None:
        self.limit = fixed or 0
        self.active = 0
        self._fixed = fixed is not None
        self._count = count

    def configure(self, limit: int) -> None:
        """Take the limit of a configuration; flows that are open stay open."""
        if not self._fixed:
            self.limit = limit

    def take_tcp(self) -> None:
        """Take a slot for a TCP flow. Errors: FlowLimitError."""
        if not self._take():
            COUNTS.add(_REFUSED, "tcp")
            raise FlowLimitError(
                f"failed to start tcp flow due to rate limiting: {TOO_MANY_FLOWS}",
                advice="The limit is maxActiveFlows of warp-routing, or --max-active-flows.",
            )

    def take_udp(self) -> bool:
        """Take a slot for a UDP flow; False when there is none."""
        if not self._take():
            COUNTS.add(_REFUSED, "udp")
            return False
        return True

    def release(self) -> None:
        """Give a slot back; exactly once for each that was taken."""
        assert self.active > 0
        self.active -= 1
        if self._count is not None:
            self._count.release()

    def _take(self) -> bool:
        if self._count is not None:
            if not self._count.take(self.limit):
                return False
        elif self.limit and self.active >= self.limit:
            return False
        self.active += 1
        return True


class WarpRouting(NamedTuple):
    """`warp-routing` with everything filled in. Times in seconds; 0 means no limit, and no keep-alive."""

    connect_timeout: float = 5
    tcp_keep_alive: float = 30
    max_active_flows: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> WarpRouting:
        """Fill in the defaults; keys as in the configuration, checked before."""
        return cls(**{_NAMES[key]: value for key, value in values.items()})


_NAMES: Final = {
    "connectTimeout": "connect_timeout",
    "tcpKeepAlive": "tcp_keep_alive",
    "maxActiveFlows": "max_active_flows",
}


class Flows:
    """One per process. `limiter`, `warp` and `dns` are read by whoever starts a flow."""

    __slots__ = ("dns", "limiter", "warp")

    def __init__(
        self, *, max_active_flows: int | None = None, dns: VirtualDns | None = None, count: FlowCount | None = None
    ) -> None:
        self.limiter = FlowLimiter(max_active_flows, count)
        self.warp = WarpRouting()
        self.dns = dns or VirtualDns()

    def configure(self, values: Mapping[str, Any]) -> None:
        """Put the `warp-routing` of a configuration in force for new flows."""
        self.warp = WarpRouting.of(values)
        self.limiter.configure(self.warp.max_active_flows)
