"""What requests cost, rule by rule, in plain integers.

Owns: the meters of the rules in force (and of older ones that still serve). In: calls of the dispatcher, two a request.
Out: numbers, read at scrape time by metrics.py. Never: sees a chunk; knows Prometheus; grows with what eyeballs send.

*Strategy*: payload bytes are asked of the stream when it ends (`StreamPort.traffic`), and of those that still run when
somebody scrapes. A rule's meter is found by its index and checked by identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from connector.protocol.counts import COUNTS, Histogram
from connector.protocol.ports import Request, RequestKind
from connector.proxy.ingress import Rule

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets of request durations: Prometheus' usual ones, and 30 s for long polls."""

OnFinished = Callable[[Request, Rule | None, int, bool, tuple[int, int], float], None]
RuleLabels = tuple[str, str, str, str]
"""Index, hostname, path, service: what names a rule's series. All of them come from the configuration."""


class RuleMeter:
    """One rule's numbers. WebSockets are counted apart: their time is that of the connection."""

    __slots__ = ("active", "durations", "failures", "labels", "received", "requests", "rule", "sent", "websockets",
                 "websockets_open")  # fmt: skip

    def __init__(self, rule: Rule, labels: RuleLabels) -> None:
        self.rule = rule
        self.labels = labels
        self.requests = 0
        self.failures = 0
        self.active = 0
        self.websockets = 0
        self.websockets_open = 0
        self.received = 0
        """Payload bytes of requests that are over: from the edge, towards the origin."""
        self.sent = 0
        self.durations = Histogram(SECONDS)
        """Seconds from the request to the end of its response, without WebSockets."""


def labels_of(rule: Rule) -> RuleLabels:
    """Give the label values of a rule's series."""
    return (str(rule.index), rule.hostname, rule.path, rule.service.text)


class Meters:
    """Watches all requests of a dispatcher. `rules` gives the rules in force; `on_finished` is the access log.

    `every`: of all requests, or of rules only that ask for it (`originRequest.accessLog`).
    """

    def __init__(
        self, rules: Callable[[], Iterable[Rule]], on_finished: OnFinished | None = None, *, every: bool = True
    ) -> None:
        self.requests = 0
        self.active = 0
        self.errors = 0
        self.responses: dict[int, int] = {}
        """Responses that an origin (or `http_status`) gave and the edge got whole, by status."""
        self.on_finished = on_finished
        self._every = every
        self._rules = rules
        self._failed = False
        self._by_index: dict[int, RuleMeter] = {}
        self._by_labels: dict[RuleLabels, RuleMeter] = {}

    def __iter__(self) -> Iterator[RuleMeter]:
        return iter(self._by_labels.values())

    def started(self, request: Request, rule: Rule | None) -> None:
        """Count a request in."""
        self.requests += 1
        self.active += 1
        if rule is None and request.kind is RequestKind.TCP:
            COUNTS.add("cloudflared_tcp_total_sessions")
            COUNTS.add("cloudflared_tcp_active_sessions")
        if rule is not None:
            meter = self.meter(rule)
            meter.requests += 1
            meter.active += 1
            if request.kind is RequestKind.WEBSOCKET:
                meter.websockets += 1
                meter.websockets_open += 1

    def failed(self) -> None:
        """Count a failure; `finished` of the same request follows at once."""
        self.errors += 1
        self._failed = True

    def finished(
        self, request: Request, rule: Rule | None, status: int, whole: bool, traffic: tuple[int, int], seconds: float
    ) -> None:
        """Count a request out."""
        self.active -= 1
        if rule is None and request.kind is RequestKind.TCP:
            COUNTS.add("cloudflared_tcp_active_sessions", by=-1)
        failed, self._failed = self._failed, False
        if whole and not failed:
            self.responses[status] = self.responses.get(status, 0) + 1
        if rule is not None:
            meter = self.meter(rule)
            meter.active -= 1
            meter.failures += failed
            meter.received += traffic[0]
            meter.sent += traffic[1]
            if request.kind is RequestKind.WEBSOCKET:
                meter.websockets_open -= 1
            else:
                meter.durations.observe(seconds)
        if self.on_finished is not None and (self._every or (rule is not None and rule.settings.access_log)):
            self.on_finished(request, rule, status, whole, traffic, seconds)

    def meter(self, rule: Rule) -> RuleMeter:
        """Give the rule's meter. A rule of a new configuration that reads the same goes on with the same numbers."""
        meter = self._by_index.get(rule.index)
        if meter is None or meter.rule is not rule:
            labels = labels_of(rule)
            meter = self._by_labels.get(labels)
            if meter is None:
                self._forget()
                meter = self._by_labels[labels] = RuleMeter(rule, labels)
            meter.rule = rule
            self._by_index[rule.index] = meter
        return meter

    def _forget(self) -> None:
        """Drop the meters of rules that are gone and serve nothing any more."""
        now = {labels_of(rule) for rule in self._rules()}
        for labels, meter in list(self._by_labels.items()):
            if labels not in now and not meter.active:
                del self._by_labels[labels]
                if self._by_index.get(meter.rule.index) is meter:
                    del self._by_index[meter.rule.index]
