"""Every limit of one HTTP/2 link, with its reason and its precedents.

Owns: H2Limits and its defaults.
In: nothing. Out: numbers.
Never: enforces anything; h2_connection.py and h2_stream.py do.
"""

from __future__ import annotations

from typing import NamedTuple


class H2Limits(NamedTuple):
    """Numbers that bound what the peer can make one connection hold or do.

    The peer is the edge: it multiplexes thousands of eyeballs onto one connection, so the budgets against floods are
    far above those of a server that faces single browsers; they exist so that nothing is without end.
    """

    max_concurrent_streams: int = 10_000
    """Streams open at once; more are refused with REFUSED_STREAM, which the edge may retry elsewhere.
    Each costs a socket to an origin, and 4 links share one process's descriptors (often 65,536). Precedents:
    cloudflared no limit, Go 250, nginx 128, h2o 100, nghttp2 100."""

    stream_window: int = 1_048_576
    """Bytes in flight towards one origin, and so what one slow origin can make us hold. 1 MiB carries 160 Mbit/s at
    50 ms. Precedents: Go and cloudflared 1 MiB, nginx 64 KiB, curl 10 MiB."""

    connection_window: int = 16 * 1_048_576
    """Bytes in flight on the connection. Credit comes back only when origins accept bytes, so with a connection window
    of one stream window (cloudflared: 1 MiB each) a single slow origin would stall every other upload; with 16 it
    takes sixteen. Precedents: hyper 1 MiB, Chromium 15 MiB, Firefox 12 MiB."""

    max_frame_size: int = 1_048_576
    """Largest frame accepted. DATA from `DATA_STREAMED_FROM` on is passed on as it arrives, so a large frame costs no
    memory. Precedents: Go and cloudflared 1 MiB, most others 16 KiB."""

    max_header_list_size: int = 1_048_896
    """Decoded size of one request's header fields, as RFC 9113 counts (32 bytes a field more); beyond it the request
    gets status 431. Precedents: Go and cloudflared 1 MiB and 320 bytes, nginx 32 KiB, hyper 16 KiB."""

    max_header_block: int = 1_048_896
    """Encoded size of one header block over HEADERS and all CONTINUATION; beyond it the connection ends. A block that
    decodes to an allowed list need not be longer than the list."""

    max_continuations: int = 128
    """CONTINUATION frames of one block; enough for `max_header_block` in frames of the smallest maximum, 16 KiB.
    Precedents: nghttp2 8, Apache 100, h2 (Rust) 5 to the header list size, Envoy none after its 2024 fix by count."""

    window: float = 10.0
    """Seconds over which the flood budgets below are counted; each counter starts again at zero then."""

    max_resets: int = 10_000
    """Streams in `window` that end by a reset because of the peer: its own RST_STREAM before the response ended
    (CVE-2023-44487), or ours after its error (CVE-2025-8671). More than 1,000 eyeballs a second that all hang up
    is not a use, and each costs about a dial. Precedents: nghttp2 1,000 and then 33/s, Envoy 500, Go none."""

    max_pings: int = 1_000
    """PINGs in `window` (CVE-2019-9512). Estimating bandwidth takes about 10 a second. Precedents: Envoy and Go bound
    10,000 queued answers, grpc 2 strikes, nghttp2 1,000 queued."""

    max_settings: int = 100
    """SETTINGS without ACK in `window` (CVE-2019-9515). A peer sends 1 and perhaps changes it now and then.
    Precedents: nghttp2 1,000 queued ACKs, h2o and Envoy share one budget with PING."""

    max_empty_frames: int = 10_000
    """DATA without payload and without END_STREAM in `window` (CVE-2019-9518). Precedents: Envoy 1 in a row,
    Go none, nginx 1,000 frames without progress."""

    max_ignored_frames: int = 10_000
    """PRIORITY, unknown frames and frames for streams that are gone, in `window` (CVE-2019-9513): they cost time
    and bring nothing. Precedents: Envoy 100 PRIORITY per stream, nginx as above."""

    stream_high_water: int = 65_536
    """Queued response bytes of one stream at which its sink is paused. Precedents: asyncio and Node 64 KiB."""

    stream_low_water: int = 16_384
    """Queued bytes at which a paused sink is resumed: one frame, so that the pipe does not run dry."""

    queue_high_water: int = 4 * 1_048_576
    """Queued response bytes of all streams together from which any stream that queues is paused at once. With it the
    ceiling is this plus one read of each origin, not 64 KiB times every stream."""

    out_high_water: int = 1_048_576
    """Bytes in the out-buffer, which one loop tick takes, from which payload is queued per stream instead. It must be
    well above one read of an origin (256 KiB): with 128 KiB a single download cost 1.7 times the CPU."""

    send_frame_size: int = 65_536
    """Largest DATA frame sent, if the peer allows as much: header cost is nothing at that size, and a small message of
    another stream never waits behind more."""

    fair_share: int = 16_384
    """Bytes one waiting stream sends in its turn before the next waiting one."""

    preface_timeout: float = 10.0
    """Seconds from the start until the peer's preface is here. Precedent: Go and cloudflared 10 s."""

    settings_timeout: float = 2.0
    """Seconds more for the peer's SETTINGS. Precedent: Go and cloudflared 2 s."""


DEFAULT_LIMITS = H2Limits()

DATA_STREAMED_FROM = 16_384
"""DATA frames longer than this are passed on in pieces as they arrive; shorter ones wait until they are whole, so that
a small message stays one call."""

REMEMBERED_RESETS = 1_000
"""Streams reset here of which frames may still be in flight; those are dropped without an answer. At one round trip of
100 ms this lasts for 10,000 resets a second."""
