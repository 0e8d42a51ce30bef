"""What is known of the links to the edge, for metrics and diagnosis.

Owns: the links that are open, by conn_index, and what closed ones have added up to. In: links as they open and close.
Out: labelled numbers at scrape time. Never: touches a link beyond reading its figures.
"""

from __future__ import annotations

from connector.protocol.counts import COUNTS
from connector.transport.link import Link

_SUMS = ("sent_bytes", "receive_bytes", "lost_packets")

_FROM_THE_START = ("quic_client_closed_connections", "quic_client_packet_too_big_dropped")
"""Counters that are there with the first QUIC connection, at zero: a rate needs its beginning."""

ANY_REASON = "any"
"""Label of `quic_client_lost_packets`: the library counts what was lost, not by which rule it was noticed."""


class LinkMeters:
    """One per run."""

    __slots__ = ("_open",)

    def __init__(self) -> None:
        self._open: dict[Link, int] = {}

    def opened(self, conn_index: int, link: Link) -> None:
        """Take a link that was just dialled. An index may have an older one beside it, which drains."""
        self._open[link] = conn_index
        if link.protocol == "quic":
            COUNTS.add("quic_client_total_connections")
            for name in _FROM_THE_START:
                COUNTS.add(name, by=0)

    def local_address(self) -> str:
        """Give this machine's address as a link has it, or nothing."""
        return next((link.local_address[0] for link in self._open), "")

    def closed(self, link: Link) -> None:
        """Add a closed link's sums up."""
        conn_index = self._open.pop(link, None)
        if conn_index is None or link.protocol != "quic":
            return
        COUNTS.add("quic_client_closed_connections")
        figures = link.figures()
        for name in _SUMS:
            if name in figures:
                COUNTS.add(f"quic_client_{name}", *_labels(name, str(conn_index)), by=figures[name])

    def numbers(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """Give every figure by family and labels; the sums are without those of closed links."""
        found: dict[tuple[str, tuple[str, ...]], float] = {}
        for link, conn_index in self._open.items():
            if link.protocol == "quic":
                index = str(conn_index)
                for name, value in link.figures().items():
                    key = (f"quic_client_{name}", _labels(name, index))
                    found[key] = value + (found.get(key, 0) if name in _SUMS else 0)
                found["quic_client_congestion_state", (index,)] = -1
        return found


def _labels(name: str, conn_index: str) -> tuple[str, ...]:
    return (conn_index, ANY_REASON) if name == "lost_packets" else (conn_index,)
