"""Who may look on while requests are served: meters, access log, tracing, management.

Owns: the interfaces. In: nothing. Out: Watch, RequestTrace. Never: behaviour.

Whoever serves a stream tells it with one `is None` test a request (never a chunk): `Dispatcher.watch` at the start and
at the end, `Dispatcher.tracing` for requests to which the edge attached a context.
"""

from __future__ import annotations

from typing import Protocol

from connector.protocol.ports import Request
from connector.proxy.ingress import Rule


class Watch(Protocol):
    """Sees every request begin and end. Both calls come exactly once per request and must not raise."""

    def started(self, request: Request, rule: Rule | None) -> None:
        """A request was matched; `rule` is None for streams that no rule serves (private networks)."""

    def failed(self) -> None:
        """A request failed; `finished` of the same request follows at once."""

    def finished(
        self, request: Request, rule: Rule | None, status: int, whole: bool, traffic: tuple[int, int], seconds: float
    ) -> None:
        """A request is over. `status` 0: no head went out; `whole`: the edge got everything.

        `traffic` is `StreamPort.traffic()`: payload bytes from and to the edge.
        """


class RequestTrace(Protocol):
    """The spans of one traced request. What `answered` and `connected` return belongs into `StreamPort.spans`."""

    def matched(self, host: bytes, rule: int) -> None:
        """The rule was found (-1: management); what follows is the origin's time."""

    def answered(self, status: int) -> bytes:
        """The origin's response head came."""

    def connected(self) -> bytes:
        """A TCP-like service or a private address was reached."""


class Tracing(Protocol):
    """Gives the trace of a request from the edge's context."""

    def __call__(self, context: bytes, *, text: bool = False) -> RequestTrace | None:
        """Return None when nothing is to be recorded.

        `context` is `Request.trace`, not empty; `text` for TCP streams, whose contexts are read a little differently.
        """
