"""What one served stream is to the dispatcher, whatever serves it.

Owns: the interfaces. In: nothing. Out: Exchange, Owner. Never: behaviour.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from connector.protocol.ports import Request, StreamPort, StreamSink, Tap
from connector.proxy.ingress import Rule
from connector.proxy.watch import RequestTrace
from connector.proxy.write_queue import WriteQueue


class Exchange(StreamSink, Protocol):
    """One stream that takes time: from `start` until it calls `exchange_finished`, once."""

    request: Request
    port: StreamPort
    rule: Rule | None
    """None for private-network flows, which no rule serves."""
    status: int
    """Status that went to the edge; 0 before."""
    whole: bool
    """Whether the edge got a whole response (or, after an upgrade, the stream ended by itself)."""
    aborted: bool
    """Whether the eyeball went away (or its link)."""
    started: float
    trace: RequestTrace | None

    def start(self) -> None:
        """Begin; calls on the port may follow at once."""

    def go_away(self) -> bool:
        """Tell the eyeball that this side leaves, where the protocol has a word for it; return whether it has."""

    def cancel(self) -> None:
        """End both sides at once: the dispatcher closes."""


class Owner(Protocol):
    """Who counts exchanges: the dispatcher."""

    loop: asyncio.AbstractEventLoop
    tap: Tap | None
    """Looks on, when somebody does."""
    writes: WriteQueue
    """Writes towards origins that wait for the end of a read."""

    def exchange_failed(self, exchange: Exchange, error: BaseException) -> None:
        """Count and report an error that is not the client's going away."""

    def exchange_answered(self, exchange: Exchange) -> None:
        """Report a response head."""

    def exchange_finished(self, exchange: Exchange) -> None:
        """Forget an exchange: both sides are done with. Called once."""
