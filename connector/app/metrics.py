"""The text that Prometheus scrapes, made from plain numbers when somebody asks.

Owns: the collector. In: dispatcher, meters, tunnel state, COUNTS. Out: exposition text (version 0.0.4).
Never: costs anything between scrapes; imports prometheus_client before the first one.

Most of cloudflared's counters have no `_total` suffix, which prometheus_client insists on. They are handed to it as
gauges, and the type line is put right in the text.
"""

from __future__ import annotations

import asyncio
import platform
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from connector import __version__
from connector.app.answers import Answer, Query
from connector.app.metric_families import COUNTER, FAMILIES, GAUGE, HISTOGRAM, SERVED
from connector.protocol.counts import COUNTS, HISTOGRAMS, Histogram

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

    from connector.app.meters import Meters
    from connector.app.state import TunnelState
    from connector.proxy.dispatch import Dispatcher

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Rows = list[tuple[str, tuple[str, ...], "float | Histogram"]]
"""Family, label values in the family's order, value."""

_BARE = frozenset(
    name.encode() for name, family in FAMILIES.items() if family.kind == COUNTER and not name.endswith("_total")
)
_TYPE_LINE = re.compile(rb"^# TYPE (\S+) gauge$", re.MULTILINE)


class Metrics:
    """One per run: `answer` is the page. `state` is set once the tunnel has one."""

    def __init__(self, dispatcher: Dispatcher, meters: Meters) -> None:
        self._dispatcher = dispatcher
        self._meters = meters
        self._process: CollectorRegistry | None = None
        self._scrapes = 0
        self._in_flight = 0
        self.state: TunnelState | None = None
        self.hostname = ""
        """Of a quick tunnel."""

    async def answer(self, _: Query) -> Answer:
        """Make the page. Numbers are taken here; import and text are a thread's work, so that requests go on."""
        self._in_flight += 1
        try:
            rows = await self._all_rows()
            text = await asyncio.get_running_loop().run_in_executor(None, self._text, rows)
            return Answer(200, text, CONTENT_TYPE)
        finally:
            self._in_flight -= 1
            self._scrapes += 1

    def render(self) -> bytes:
        """Give the text at once."""
        return self._text(self.rows())

    async def _all_rows(self) -> Rows:
        """Take every number; with workers, theirs too."""
        return self.rows()

    def rows(self) -> Rows:
        """Take every number of this process as it is now."""
        return [
            (name, labels, value.copy() if isinstance(value, Histogram) else value)
            for name, labels, value in self.numbers()
        ]

    def _text(self, rows: Rows) -> bytes:
        from prometheus_client.exposition import generate_latest  # noqa: PLC0415  (slow, and rarely needed)

        if self._process is None:
            self._process = self._registry()
        text = generate_latest(_Collector(rows, self._process))
        return _TYPE_LINE.sub(lambda line: line[0][:-5] + b"counter" if line[1] in _BARE else line[0], text)

    def _registry(self) -> CollectorRegistry:
        """Give what prometheus_client knows of the process. In a thread."""
        return _process_registry()

    def numbers(self) -> Iterator[tuple[str, tuple[str, ...], float | Histogram]]:
        """Give family, label values and value of every series."""
        dispatcher, meters, state = self._dispatcher, self._meters, self.state
        python = platform.python_version()
        yield "build_info", (python, "", "", __version__), 1
        yield "cloudflared_tunnel_total_requests", (), meters.requests
        yield "cloudflared_tunnel_concurrent_requests_per_tunnel", (), meters.active
        yield "cloudflared_tunnel_request_errors", (), meters.errors
        for status, count in meters.responses.items():
            yield "cloudflared_tunnel_response_by_code", (str(status),), count
        for cause, count in dispatcher.failures.items():
            yield "connector_failures_total", (cause,), count
        yield "connector_origin_connections", (), dispatcher.open_connections
        yield "promhttp_metric_handler_requests_total", ("200",), self._scrapes
        yield "promhttp_metric_handler_requests_in_flight", (), self._in_flight
        if self.hostname:
            yield "cloudflared_tunnel_user_hostnames_counts", (f"https://{self.hostname}",), 1
        closed = dict(COUNTS.numbers)
        if state is not None:
            yield "cloudflared_tunnel_ha_connections", (), state.connection_tasks
            yield "connector_ready_connections", (), len(state.connected)
            yield "cloudflared_orchestration_config_version", (), state.orchestrator.version
            facts = state.choice.facts
            yield "connector_quic_path", (facts.status.value, facts.reason.value if facts.reason else ""), 1
            for (transport, reason), count in state.choice.link_ends.items():
                yield "connector_edge_link_ends_total", (transport.value, reason.value), count
            for (family, labels), value in state.links.numbers().items():
                yield family, labels, value + closed.pop((family, labels), 0)
        for (family, labels), value in closed.items():
            yield family, labels, value
        for (family, labels), histogram in COUNTS.histograms.items():
            yield family, labels, histogram
        yield from self._rules()

    def _rules(self) -> Iterator[tuple[str, tuple[str, ...], float | Histogram]]:
        live: dict[tuple[str, ...], list[int]] = {}
        for rule, (received, sent) in self._dispatcher.live():
            sums = live.setdefault(self._meters.meter(rule).labels, [0, 0])
            sums[0] += received
            sums[1] += sent
        for meter in self._meters:
            labels = meter.labels
            received, sent = live.get(labels, (0, 0))
            yield "connector_rule_requests_total", labels, meter.requests
            yield "connector_rule_failures_total", labels, meter.failures
            yield "connector_rule_active_requests", labels, meter.active
            yield "connector_rule_received_bytes_total", labels, meter.received + received
            yield "connector_rule_sent_bytes_total", labels, meter.sent + sent
            yield "connector_rule_request_seconds", labels, meter.durations
            yield "connector_rule_websockets_total", labels, meter.websockets
            yield "connector_rule_websockets", labels, meter.websockets_open


class _Collector:
    """What prometheus_client asks for one page: our rows, then what it knows of the process."""

    def __init__(self, rows: Rows, process: CollectorRegistry) -> None:
        self._rows = rows
        self._process = process

    def collect(self) -> Iterator[Metric]:
        """Give the families that have a value, and those that are always there."""
        yield from self._families()
        yield from self._process.collect()

    def _families(self) -> Iterator[Metric]:
        from prometheus_client.metrics_core import Metric as Made  # noqa: PLC0415

        found: dict[str, list[tuple[tuple[str, ...], Any]]] = {}
        for name, labels, value in self._rows:
            found.setdefault(name, []).append((labels, value))
        for family in FAMILIES.values():
            name = family.name
            rows = found.get(name, [])
            if not rows:
                if family.state != SERVED or family.labels:
                    continue
                rows = [((), Histogram(HISTOGRAMS[name]) if family.kind == HISTOGRAM else 0)]
            kind = GAUGE if family.kind == COUNTER and not name.endswith("_total") else family.kind
            metric = Made(name.removesuffix("_total") if kind == COUNTER else name, family.help, kind)
            for values, value in rows:
                labelled = dict(zip(family.labels, values, strict=True))
                if isinstance(value, Histogram):
                    _add_histogram(metric, name, labelled, value)
                else:
                    metric.add_sample(name, labelled, float(value))
            yield metric


def _add_histogram(metric: Metric, name: str, labels: dict[str, str], value: Histogram) -> None:
    count = 0
    for bound, number in zip((*value.bounds, float("inf")), value.counts, strict=True):
        count += number
        text = "+Inf" if bound == float("inf") else f"{bound:g}"
        metric.add_sample(f"{name}_bucket", {**labels, "le": text}, float(count))
    metric.add_sample(f"{name}_sum", labels, value.sum)
    metric.add_sample(f"{name}_count", labels, float(count))


def _process_registry() -> CollectorRegistry:
    import prometheus_client  # noqa: PLC0415  (slow, and rarely needed)

    registry = prometheus_client.CollectorRegistry()
    prometheus_client.ProcessCollector(registry=registry)
    prometheus_client.PlatformCollector(registry=registry)
    prometheus_client.GCCollector(registry=registry)
    registry.register(ProcessExtras())
    return registry


class ProcessExtras:
    """What Go's client tells of a process and Python's does not; left out where the system does not say."""

    def collect(self) -> Iterator[Metric]:
        """Give the address space that is allowed, and bytes over the network (of the whole network namespace)."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415

        try:
            import resource  # noqa: PLC0415  (not on Windows)

            limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        except (ImportError, OSError, ValueError):
            return
        most = float(limit if limit >= 0 else 2**64 - 1)
        yield GaugeMetricFamily(
            "process_virtual_memory_max_bytes", "Maximum amount of virtual memory available in bytes.", value=most
        )
        try:
            with open("/proc/self/net/netstat", encoding="ascii") as file:
                lines = [line.split() for line in file if line.startswith("IpExt:")]
            octets = dict(zip(lines[0], lines[1], strict=True))
            received, sent = float(octets["InOctets"]), float(octets["OutOctets"])
        except (OSError, ValueError, KeyError, IndexError):
            return
        text = "Number of bytes {} by the process over the network."
        yield CounterMetricFamily("process_network_receive_bytes", text.format("received"), value=received)
        yield CounterMetricFamily("process_network_transmit_bytes", text.format("sent"), value=sent)
