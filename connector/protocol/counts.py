"""Counts of rare events, for the metrics address: sessions, RPC calls, drops, refusals.

Owns: one table of plain numbers per process (metrics are the process's, as Prometheus has it).
In: `COUNTS.add(family, *labels)` wherever something happened. Out: the table, read at scrape time by app/metrics.py.
Never: per chunk or message of a stream; formats, locks or knows Prometheus.

Families and their label names are in app/metric_families.py, which names every one of cloudflared's.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

HISTOGRAMS: Final[dict[str, tuple[float, ...]]] = {
    "cloudflared_proxy_connect_latency": (1, 10, 25, 50, 100, 500, 1000, 5000),
    "cloudflared_rpc_server_latency_secs": (0.05, 0.15, 0.45, 1.35, 4.05),
    "cloudflared_rpc_client_latency_secs": (0.05, 0.15, 0.45, 1.35, 4.05),
}
"""Upper bounds of the buckets: milliseconds for the first, seconds for the others, as cloudflared has them."""


class Histogram:
    """Counts per bucket, the last one for what exceeds all bounds; and the sum of all values."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def copy(self) -> Histogram:
        """Return the same numbers, apart from what is counted later."""
        other = Histogram(self.bounds)
        other.counts = self.counts.copy()
        other.sum = self.sum
        return other

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Counts:
    """Numbers by family and label values, in the order of the family's label names."""

    __slots__ = ("histograms", "numbers")

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, tuple[str, ...]], float] = {}
        self.histograms: dict[tuple[str, tuple[str, ...]], Histogram] = {}

    def add(self, family: str, *labels: str, by: float = 1) -> None:
        """Add to a counter or gauge (`by` may be negative for a gauge)."""
        key = (family, labels)
        self.numbers[key] = self.numbers.get(key, 0) + by

    def set(self, family: str, *labels: str, to: float) -> None:
        """Set a gauge."""
        self.numbers[family, labels] = to

    def observe(self, family: str, value: float, *labels: str) -> None:
        """Count a value in a histogram of HISTOGRAMS."""
        key = (family, labels)
        histogram = self.histograms.get(key)
        if histogram is None:
            histogram = self.histograms[key] = Histogram(HISTOGRAMS[family])
        histogram.observe(value)


COUNTS: Final = Counts()
