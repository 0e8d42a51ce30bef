"""Every limit of the proxy layer, in one place, each with its reason.

Owns: numbers. In: nothing. Out: constants. Never: behaviour.

Buffers without a number here are bounded by the edge's receive window (1 MiB a stream): what arrives before the origin
is connected stays unacknowledged, so the edge stops by itself.
"""

from __future__ import annotations

from typing import Final

MAX_CONFIGURATION: Final = 1024 * 1024
"""Bytes of a configuration push. A rule takes about 200 bytes, the dashboard allows 1,000 hostnames a tunnel."""

MAX_BUFFERED_BODY: Final = 1024 * 1024
"""Bytes of a request body held back to learn its length (`disableChunkedEncoding`); longer ones are answered 411.
nginx buffers 1 MiB by default (`client_max_body_size`)."""

BODY_PROBE: Final = 0.2
"""Seconds that a GET of unknown length waits for a first byte before it is sent as chunked (Go's client: 200 ms)."""

HAPPY_EYEBALLS_DELAY: Final = 0.3
"""Seconds before the next address is tried beside a slow one (RFC 8305 section 5: 250 ms; Go: 300 ms)."""

RESOLVED_FOR: Final = 1.0
"""Seconds for which the addresses of an origin's name are used again, while they answer at once. Go and cloudflared ask
each time, through a resolver that may remember; container names move when a container is made anew."""

UNIX_QUEUE_FULL: Final = 0.01
"""Seconds between two tries to connect to a Unix socket whose queue is full; `connectTimeout` ends them."""

ORIGIN_HIGH_WATER: Final = 64 * 1024
"""Bytes queued towards an origin before the edge's credit is held back (asyncio's and Node's default: 64, 16 KiB)."""

SPLICE_DRAIN: Final = 5.0
"""Seconds that the other direction of a spliced stream may go on after one has ended. cloudflared: 0; HAProxy and
nginx keep half-closed tunnels for their idle time-out. A WebSocket's closing frames need one round trip."""

TCP_HALF_CLOSED: Final = 60.0
"""Seconds of silence after which a TCP flow ends of which one direction has ended. cloudflared: 0, it cuts both at
once. Linux gives a half-closed socket without an owner 60 s (tcp_fin_timeout), HAProxy's `timeout tunnel` is longer."""

WS_WATCHED_FRAMES: Final = 100_000
"""Frames a second of an eyeball that a stream with wsKeepAlive looks at; beyond it the stream passes unseen and is not
pinged any more. A frame costs 0.3 to 1 us, so one eyeball takes a tenth of a core at most; no broker takes so many
messages of one client."""

WS_CLOSE_WAIT: Final = 0.5
"""Seconds that a WebSocket in the middle of a frame may take to end it when the connector leaves, and that the edge has
to take the Close frames; then the link closes."""

SOCKS_WAIT: Final = 30.0
"""Seconds that a SOCKS client may take to say where it wants to go. Dante and 3proxy give 30 s, cloudflared more."""

MATCH_CACHE: Final = 1_024
"""Hosts whose candidate rules are remembered; eyeballs choose hosts under a wildcard, so there must be an end."""

MAX_MATCHED_PATH: Final = 8_192
"""Characters of a path that path expressions see. Servers refuse longer request lines (nginx 8 KiB, Apache 8,190)."""

DEFAULT_IDLE_PER_HOST: Final = 2
"""Idle connections when `keepAliveConnections` is 0 (Go's client: "0 means 2")."""

CLOSE_WAIT: Final = 2.0
"""Seconds that `close()` waits for aborted origin connections to report their end; normally one loop turn."""

HTTP2_STREAM_WINDOW: Final = 256 * 1024
"""Bytes of a response that an HTTP/2 origin may send ahead of the edge (Go's client: 4 MiB; nghttp2: 64 KiB)."""

HTTP2_CONNECTION_WINDOW: Final = 16 * 1024 * 1024
"""The same for all streams of a connection, which is given back at once: 64 paused streams do not stop the others."""

HTTP2_HEADER_LIST: Final = 256 * 1024
"""Bytes of a response's fields, as over HTTP/1.1."""

HTTP2_STREAMS: Final = 250
"""Streams on one connection to an origin, if it allows so many (nginx 128, Go 250)."""

CARRIER_PING: Final = 54.0
"""Seconds between the pings of a WebSocket that carries TCP, whatever else passes. Precedent: cloudflared, 0.9 times a
pong wait of 60 s."""
