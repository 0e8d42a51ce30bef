"""What the link asks of a QUIC library, so that no other module knows which one it is.

Owns: the QuicEngine interface, the settings of a connection, the choice between the two adapters.
In: nothing. Out: `make_engine(settings)`.
Never: does I/O, keeps time.

Two libraries stand behind it: qh3 (compiled core) where it is installed and passes its self-check, aioquic elsewhere.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol, TextIO

from connector.errors import ConfigError
from connector.protocol.ports import Buffer
from connector.protocol.quic_limits import DEFAULT_LIMITS, QuicLimits

# Both libraries log to "quic" (connection closes as warnings); what matters comes out of wait_closed.
logging.getLogger("quic").addHandler(logging.NullHandler())
logging.getLogger("quic").propagate = False

ALPN = "argotunnel"

IDLE_SECONDS = 5.0
"""Precedent: cloudflared 5 s; the smaller of both sides counts."""

KEEPALIVE_SECONDS = 1.0
"""Without a received packet for this long a PING goes out. Precedent: cloudflared 1 s."""

INITIAL_SIZE = {4: 1232, 6: 1252}
"""UDP payload of the first packets, by IP version of the edge address; such packets pass a path of MTU 1280. Precedent:
cloudflared, which has it this way round."""

MAX_UDP_PAYLOAD = 1452
"""Largest UDP payload accepted, and the ceiling of path MTU probing. Precedent: cloudflared 1452."""

MAX_DATAGRAM_FRAME = 16_383
ACTIVE_CONNECTION_IDS = 4

DATAGRAM_OVERHEAD = 44
"""Bytes of a packet beside the payload of its one DATAGRAM frame: header and connection ID, packet number, frame
header, AEAD tag. More would not fit, and a frame that does not fit wedges the connection."""


@dataclass(slots=True)
class EngineSettings:
    """One connection's settings. `cadata` holds the trusted certificates as PEM."""

    server_name: str
    cadata: bytes
    ip_version: int = 4
    path_mtu_discovery: bool = True
    keylog: TextIO | None = None
    alpn: str = ALPN
    idle_timeout: float = IDLE_SECONDS
    post_quantum_only: bool = False
    limits: QuicLimits = field(default_factory=lambda: DEFAULT_LIMITS)


class EngineEvents(Protocol):
    """What the link takes from `QuicEngine.dispatch`. No call raises."""

    @property
    def receive_paused(self) -> bool:
        """Whether to take nothing more for now."""

    def on_handshake_done(self) -> None:
        """TLS is up and verified."""

    def on_stream_data(self, stream_id: int, data: Buffer, fin: bool) -> None:
        """Payload, in order."""

    def on_stream_reset(self, stream_id: int) -> None:
        """RESET_STREAM arrived."""

    def on_stop_sending(self, stream_id: int) -> None:
        """STOP_SENDING arrived."""

    def on_datagram_frame(self, data: bytes) -> None:
        """A DATAGRAM frame arrived."""

    def on_terminated(self, code: int, reason: str, by_peer: bool) -> None:
        """The connection is over, or will be as soon as what `transmit` gives was sent."""


class QuicEngine(Protocol):
    """One client connection without I/O. Times are seconds of one clock.

    `post_quantum`: X25519MLKEM768 is offered first.
    `send`, `reset_stream`, `stop_stream`, `credit`, `ping` and `send_datagram` never raise. `credit_by_stream`: credit
    comes back by `credit`, stream by stream; otherwise whatever `dispatch` hands out is credited at once.
    """

    name: str
    credit_by_stream: bool
    post_quantum: bool

    def __init__(self, settings: EngineSettings) -> None: ...

    @property
    def alive(self) -> bool:
        """False once the connection is closing or closed."""

    @property
    def congested(self) -> bool:
        """Whether the congestion window has no room for another packet."""

    @property
    def mtu(self) -> int:
        """Largest UDP payload sent now."""

    def figures(self) -> dict[str, float]:
        """What the library knows of the way: `min_rtt`, `latest_rtt`, `smoothed_rtt` (ms), `congestion_window`."""

    def connect(self, address: tuple[str, int], now: float) -> None:
        """Start the handshake."""

    def receive(self, data: bytes, segment: int, now: float) -> None:
        """Take UDP payload: datagrams of `segment` bytes each, the last one perhaps shorter."""

    def dispatch(self, events: EngineEvents) -> None:
        """Hand out what happened, until nothing is left or `events.receive_paused`."""

    def transmit(self, now: float) -> list[bytes]:
        """Return datagrams to send now; if there may be more, as many as TRANSMIT_LIMIT."""

    def next_timeout(self) -> float | None:
        """Return when `handle_timeout` wants to be called."""

    def handle_timeout(self, now: float) -> None:
        """Let time pass."""

    def open_stream(self) -> int:
        """Open a bidirectional stream and return its ID."""

    def send(self, stream_id: int, data: Buffer, fin: bool) -> bool:
        """Queue bytes and perhaps FIN; False when the peer stopped the stream."""

    def reset_stream(self, stream_id: int) -> None:
        """RESET_STREAM 0."""

    def stop_stream(self, stream_id: int) -> None:
        """STOP_SENDING 0."""

    def queued(self, stream_id: int) -> int:
        """Bytes of one stream that wait for their first transmission."""

    def queued_total(self) -> int:
        """Bytes of all streams that wait for their first transmission."""

    def credit(self, stream_id: int, n: int) -> None:
        """Give receive credit back."""

    def send_datagram(self, data: bytes) -> bool:
        """Queue a DATAGRAM frame; False when it is too large or the peer takes none."""

    def ping(self) -> None:
        """Queue a PING frame."""

    def close(self, code: int, reason: str) -> None:
        """Queue CONNECTION_CLOSE."""


def has_post_quantum(engine: str = "auto") -> bool:
    """Whether the QUIC library used here offers post-quantum key exchange; False also when there is none."""
    try:
        return find_engine(engine)[1].post_quantum
    except ConfigError:
        return False


TRANSMIT_LIMIT = 88
"""Datagrams of one `transmit`: two GSO sends of 44 full packets (64 KiB)."""


class EngineUnavailableError(Exception):
    """An adapter cannot work here; the text says why."""


def _load_qh3() -> type[QuicEngine]:
    try:
        from connector.transport.quic_engine_qh3 import Qh3Engine, self_check  # noqa: PLC0415  (may be missing)
    except ImportError as error:
        raise EngineUnavailableError(f"qh3 is not installed: {error}") from None
    self_check()
    return Qh3Engine


def _load_aioquic() -> type[QuicEngine]:
    try:
        from connector.transport.quic_engine_aioquic import AioquicEngine, self_check  # noqa: PLC0415
    except ImportError as error:
        raise EngineUnavailableError(f"aioquic is not installed: {error}") from None
    self_check()
    return AioquicEngine


_LOADERS = {"qh3": _load_qh3, "aioquic": _load_aioquic}


@cache
def find_engine(name: str = "auto") -> tuple[str, type[QuicEngine]]:
    """Return name and class of the engine to use; `auto` takes the first that works. Errors: ConfigError."""
    reasons = []
    for candidate in _LOADERS if name == "auto" else (name,):
        try:
            return candidate, _LOADERS[candidate]()
        except EngineUnavailableError as error:
            reasons.append(str(error))
    raise ConfigError(
        "no QUIC library is usable here: " + "; ".join(reasons),
        advice="Install qh3 2.1 (or aioquic), or use --protocol http2.",
    )
