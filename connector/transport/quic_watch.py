"""What stands between the streams of a QUIC link and its engine while somebody looks on.

Owns: WatchedSender. In: calls of QuicStreams. Out: the same calls on the engine, told to a LinkTap first.
Never: exists on a link that nobody watches.
"""

from __future__ import annotations

from collections.abc import Callable

from connector.protocol.ports import Buffer, LinkTap
from connector.protocol.quic_streams import QuicSender


class WatchedSender:
    """A QuicSender in front of another."""

    def __init__(self, sender: QuicSender, tap: LinkTap) -> None:
        self._sender = sender
        self._tap = tap
        self.queued: Callable[[int], int] = sender.queued
        self.queued_total: Callable[[], int] = sender.queued_total
        self.credit: Callable[[int, int], None] = sender.credit

    def send(self, stream_id: int, data: Buffer, fin: bool) -> bool:
        """Queue bytes and perhaps FIN."""
        self._tap.on_stream_bytes(stream_id, True, data, fin)
        return self._sender.send(stream_id, data, fin)

    def reset_stream(self, stream_id: int) -> None:
        """RESET_STREAM 0."""
        self._tap.on_stream_ended(stream_id, True, "RESET_STREAM")
        self._sender.reset_stream(stream_id)

    def stop_stream(self, stream_id: int) -> None:
        """STOP_SENDING 0."""
        self._tap.on_stream_ended(stream_id, True, "STOP_SENDING")
        self._sender.stop_stream(stream_id)
