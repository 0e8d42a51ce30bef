"""Every limit of one QUIC link, with its reason and its precedents.

Owns: QuicLimits and its defaults.
In: nothing. Out: numbers.
Never: enforces anything; quic_stream.py and the transport do.
"""

from __future__ import annotations

from typing import NamedTuple

_MIB = 1_048_576


class QuicLimits(NamedTuple):
    """Numbers that bound what the peer can make one link hold or do."""

    max_streams: int = 10_000
    """Streams that the edge may have open at once. Each costs a socket to an origin. Precedents: our HTTP/2 side the
    same, cloudflared 2^60, quic-go 100, nginx 128."""

    stream_window: int = _MIB
    """Bytes the edge may send ahead on one stream. 1 MiB carries 160 Mbit/s at 50 ms, as our HTTP/2 side has it.
    With an engine that cannot hold one stream back alone (qh3), it is also what other streams wait behind when one
    origin is slow, so it is smaller than cloudflared's ceiling of 6 MiB. Precedent: 512 KiB growing to that."""

    connection_window: int = 30 * _MIB
    """Bytes the edge may send ahead on all streams together. Precedents: cloudflared 768 KiB growing to 30 MiB."""

    receive_high_water: int = 16 * _MIB
    """Bytes given to sinks that no origin has accepted yet at which nothing more is taken from the engine. With the
    connection window behind it, this is the ceiling of what slow origins make one link hold: 46 MiB."""

    receive_low_water: int = 15 * _MIB
    """Bytes at which taking goes on. Close below the high water mark: every stream waits meanwhile."""

    paused_bytes: int = 64 * _MIB
    """UDP payload taken while receiving stands still, beyond which packets are dropped unread: datagrams know no
    windows and wait in the engine meanwhile. Streams alone cannot reach it, their windows are smaller."""

    stall_timeout: float = 30.0
    """Seconds that receiving may stand still with no origin accepting anything, before the stream that holds the most
    is reset so that the others live. Precedents: cloudflared stalls for ever, nginx 60 s, Apache 20 s."""

    max_preamble: int = 8 * _MIB
    """Bytes of unfinished ConnectRequests on all streams together; one message may have 2 MiB."""

    stream_high_water: int = 256 * 1024
    """Response bytes of one stream that wait for their first transmission at which its sink is paused. One read of
    asyncio is 256 KiB."""

    stream_low_water: int = 64 * 1024
    """Waiting bytes at which a paused sink is resumed."""

    queue_high_water: int = 16 * _MIB
    """Waiting bytes of all streams together from which any stream with more than `crowded_high_water` is paused.
    Without it, 10,000 slow eyeballs would make 2.5 GB."""

    crowded_high_water: int = 16 * 1024
    """See `queue_high_water`."""

    resume_scan: int = 64
    """Paused streams that are looked at after one flush; more than these take their turn at the next."""

    datagram_queue: int = 32
    """Datagrams that wait for the congestion window; more are refused. Precedent: quic-go 32."""


DEFAULT_LIMITS = QuicLimits()
