"""The QUIC engine on qh3: its compiled core, used directly once the handshake is done.

Owns: everything that knows qh3, its transport parameters, and the workarounds that its version range is pinned for.
In: QuicEngine calls. Out: EngineEvents calls, datagrams.
Never: I/O, time of its own.

*Strategy*: the library's facade drives TLS; this module subclasses it at three places (core, transport parameters,
event pump) and then talks to the core: GRO buffers go in whole, events come out one by one. Taking an event is what
gives receive credit back, so whoever stops taking holds the edge back (the whole connection: the core has no call for
one stream). `self_check` proves at start that the places are still what they were; otherwise aioquic serves.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from typing import Any

from qh3._hazmat import Buffer as QuicBuffer
from qh3._hazmat import QuicConnectionCore
from qh3.quic.configuration import QuicConfiguration
from qh3.quic.connection import QuicConnection
from qh3.quic.packet import (
    QuicTransportParameters,
    QuicVersionInformation,
    pull_quic_transport_parameters,
    push_quic_transport_parameters,
)
from qh3.quic.tls_bridge import QuicTlsBridge, QuicTlsBridgeError
from qh3.tls import Epoch, Group

from connector.protocol.ports import Buffer
from connector.transport.quic_engine import (
    ACTIVE_CONNECTION_IDS,
    DATAGRAM_OVERHEAD,
    INITIAL_SIZE,
    MAX_DATAGRAM_FRAME,
    MAX_UDP_PAYLOAD,
    TRANSMIT_LIMIT,
    EngineEvents,
    EngineSettings,
    EngineUnavailableError,
)

MAX_ACK_DELAY = 0.025

DEFAULT_UDP_PAYLOAD = 65_527
"""What a peer takes that does not say (RFC 9000 section 18.2)."""


class _Bridge(QuicTlsBridge):
    """TLS with our transport parameters instead of the library's, which imitate a browser and allow 100 streams."""

    max_streams = 0
    peer_udp_payload = 0
    """Bytes of UDP payload that the peer takes, in its own words; 0 before they came."""

    def serialize_transport_parameters(self) -> bytes:
        """Return the parameters of proto/README.md, QUIC part."""
        configuration = self.configuration
        parameters = QuicTransportParameters(
            max_idle_timeout=int(configuration.idle_timeout * 1000),
            max_udp_payload_size=MAX_UDP_PAYLOAD,
            initial_max_data=configuration.max_data,
            initial_max_stream_data_bidi_local=configuration.max_stream_data,
            initial_max_stream_data_bidi_remote=configuration.max_stream_data,
            initial_max_stream_data_uni=configuration.max_stream_data,
            initial_max_streams_bidi=self.max_streams,
            initial_max_streams_uni=0,
            active_connection_id_limit=ACTIVE_CONNECTION_IDS,
            max_ack_delay=int(MAX_ACK_DELAY * 1000),
            initial_source_connection_id=self.local_initial_source_connection_id,
            max_datagram_frame_size=MAX_DATAGRAM_FRAME,
            version_information=QuicVersionInformation(
                chosen_version=self.version, available_versions=list(configuration.supported_versions)
            ),
        )
        buffer = QuicBuffer(capacity=3 * configuration.max_datagram_size)
        push_quic_transport_parameters(buffer, parameters)
        return bytes(buffer.data)

    def parse_transport_parameters(self, data: bytes, *, from_session_ticket: bool = False) -> QuicTransportParameters:
        """Bound the peer's word on UDP payload by ours: it is the ceiling of path MTU probing."""
        parameters = super().parse_transport_parameters(data, from_session_ticket=from_session_ticket)
        self.peer_udp_payload = parameters.max_udp_payload_size or DEFAULT_UDP_PAYLOAD
        parameters.max_udp_payload_size = min(parameters.max_udp_payload_size or MAX_UDP_PAYLOAD, MAX_UDP_PAYLOAD)
        return parameters


class _Connection(QuicConnection):
    """The facade with our core settings and an event pump that keeps native events."""

    def __init__(self, configuration: QuicConfiguration, max_streams: int) -> None:
        super().__init__(configuration=configuration)
        self.max_streams = max_streams
        self.post_quantum_only = False
        self.native: deque[tuple[Any, ...]] = deque()

    def _create_core(self, remote_addr: Any, initial_dcid: bytes, now: float) -> None:
        configuration = self._configuration
        version = self._version
        assert version is not None
        self._core = QuicConnectionCore(
            True,  # client
            version,
            ("0.0.0.0", 0),
            remote_addr,
            self.host_cid,
            initial_dcid,
            True,  # peer address validated
            ACTIVE_CONNECTION_IDS,
            configuration.max_datagram_size,
            configuration.probe_datagram_size,
            configuration.idle_timeout,
            3,  # ACK delay exponent
            MAX_DATAGRAM_FRAME,
            None,  # the peer's, known later
            configuration.max_data,
            0,
            configuration.max_stream_data,
            0,
            0,
            0,
            configuration.max_stream_data,  # reassembly
            self.max_streams,
            0,  # unidirectional
            0,
            0,
            configuration.initial_rtt,
            MAX_ACK_DELAY,
            now,
        )
        self._applied_transport_parameters = None
        self._pre_handshake_state_replayed = False

    def _create_tls(self, remote_source_cid: bytes | None) -> QuicTlsBridge:
        version = self._version
        assert version is not None
        bridge: QuicTlsBridge = type("_BoundBridge", (_Bridge,), {"max_streams": self.max_streams})(
            self._configuration,
            version=version,
            local_initial_source_connection_id=self.host_cid,
            remote_initial_source_connection_id=remote_source_cid,
            original_destination_connection_id=self._original_destination_connection_id,
            retry_source_connection_id=self._retry_source_connection_id,
            version_change_handler=self._set_version,
        )
        if self.post_quantum_only:
            bridge.tls._supported_groups = [Group.X25519ML768]
        self._tls = bridge
        return bridge

    def _drain_core(self) -> None:
        """Called by the facade after whatever it fed; streams wait for `dispatch`."""
        core = self._core
        assert core is not None
        while (native := core.next_event()) is not None:
            if native[0] == "crypto_data":
                self.take_crypto(native)
            else:
                self.native.append(native)

    def take_crypto(self, native: tuple[Any, ...]) -> None:
        """Pass TLS bytes on; an alert closes the connection."""
        core, tls = self._core, self._tls
        assert core is not None
        assert tls is not None
        try:
            tls.receive_crypto(Epoch(native[1]), native[3], native[2], version=core.version)
            self._drain_tls()
        except QuicTlsBridgeError as error:
            self.close(error.error_code, int(error.frame_type), error.reason_phrase)

    def _log_datagram(self, event: str, data: bytes) -> None:
        """Nothing: the library's own parses every header even without a logger."""

    def _log_packets(self, event: str, data: bytes) -> None:
        """Nothing."""


class Qh3Engine:
    """A QuicEngine. Implements the interface; see there."""

    name = "qh3"
    credit_by_stream = False
    post_quantum = True

    def __init__(self, settings: EngineSettings) -> None:
        limits = settings.limits
        self._settings = settings
        configuration = QuicConfiguration(
            alpn_protocols=[settings.alpn],
            is_client=True,
            server_name=settings.server_name,
            cadata=settings.cadata,
            idle_timeout=settings.idle_timeout,
            max_data=limits.connection_window,
            max_stream_data=limits.stream_window,
            max_datagram_size=INITIAL_SIZE[settings.ip_version],
            max_datagram_frame_size=MAX_DATAGRAM_FRAME,
            probe_datagram_size=settings.path_mtu_discovery,
            active_connection_id_limit=ACTIVE_CONNECTION_IDS,
            secrets_log_file=settings.keylog,  # type: ignore[arg-type]
        )
        self._connection = _Connection(configuration, limits.max_streams)
        self._connection.post_quantum_only = settings.post_quantum_only
        self._core: Any = None
        self._address: tuple[str, int] = ("", 0)
        self._established = False  # the handshake is done and the core is used directly
        self._reported_end = False
        self._pings = 0
        self._min_rtt = 0.0  # seconds, of what was seen at timers and scrapes: the core keeps none

    # --- state -----------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """False once closing."""
        core = self._core
        return core is not None and core.state not in {"closing", "draining", "terminated"}

    @property
    def congested(self) -> bool:
        """Whether nothing more may be in flight."""
        core = self._core
        return core is None or core.bytes_in_flight + INITIAL_SIZE[4] > core.congestion_window

    @property
    def mtu(self) -> int:
        """Largest UDP payload now."""
        return int(self._core.active_path[5]) if self._core is not None else INITIAL_SIZE[self._settings.ip_version]

    def figures(self) -> dict[str, float]:
        """Return what the core tells, and the least round trip that was seen."""
        core = self._core
        if core is None:
            return {}
        found = {"congestion_window": float(core.congestion_window), "lost_packets": float(core.loss_total)}
        tls = self._connection._tls
        if isinstance(tls, _Bridge) and tls.peer_udp_payload:
            found["max_udp_payload"] = float(tls.peer_udp_payload)
        self._note_round_trip()
        times = (("min_rtt", self._min_rtt), ("latest_rtt", core.latest_rtt), ("smoothed_rtt", core.smoothed_rtt))
        for name, seconds in times:
            if seconds:
                found[name] = seconds * 1000
        return found

    def _note_round_trip(self) -> None:
        latest = self._core.latest_rtt
        if latest and (not self._min_rtt or latest < self._min_rtt):
            self._min_rtt = latest

    # --- packets ---------------------------------------------------------------------------------------------------

    def connect(self, address: tuple[str, int], now: float) -> None:
        """Start the handshake."""
        self._address = address
        self._connection.connect(address, now)
        self._core = self._connection._core

    def receive(self, data: bytes, segment: int, now: float) -> None:
        """Feed datagrams; before the handshake is done one by one, for TLS has its say between packets."""
        if self._established:
            self._core.receive_gro_buffer(data, segment, self._address, now)
            return
        connection = self._connection
        for start in range(0, len(data), segment):
            connection.receive_datagram(data[start : start + segment], self._address, now)
        self._core = connection._core  # a Retry makes a new one

    def dispatch(self, events: EngineEvents) -> None:
        """Hand out events; taking one is what gives its credit back."""
        connection = self._connection
        core = self._core
        if not self._established and connection._handshake_complete:
            self._established = True
            events.on_handshake_done()
        native_events = connection.native
        next_event = core.next_event
        on_stream_data = events.on_stream_data
        while not events.receive_paused:
            native = native_events.popleft() if native_events else next_event()
            if native is None:
                break
            kind = native[0]
            if kind == "stream_data":
                on_stream_data(native[1], native[2], native[3])
            elif kind == "stream_reset":
                events.on_stream_reset(native[1])
            elif kind == "stop_sending":
                events.on_stop_sending(native[1])
            elif kind == "datagram":
                events.on_datagram_frame(native[1])
            elif kind == "crypto_data":
                connection.take_crypto(native)
            elif kind == "handshake_done":
                connection._handshake_confirmed = True
                core.handshake_confirmed()
            elif kind == "peer_closed":
                self._end(events, native[2], _text(native[4]), True)
            elif kind in {"protocol_error", "connection_terminated"}:
                self._end(events, native[1], _text(native[3]), False)
        close = connection._close_event
        if close is not None and not self._reported_end:  # an alert of our TLS
            self._end(events, close.error_code, close.reason_phrase, False)

    def _end(self, events: EngineEvents, code: int, reason: str, by_peer: bool) -> None:
        if not self._reported_end:
            self._reported_end = True
            events.on_terminated(code, reason, by_peer)

    def transmit(self, now: float) -> list[bytes]:
        """Collect datagrams."""
        poll = self._core.poll_transmit
        datagrams: list[bytes] = []
        while len(datagrams) < TRANSMIT_LIMIT and (transmit := poll(now)) is not None:
            datagrams.append(transmit[0])
        return datagrams

    def next_timeout(self) -> float | None:
        """Return the core's next deadline."""
        timer = self._core.get_timer()
        return None if timer is None else timer[1]

    def handle_timeout(self, now: float) -> None:
        """Let the core's timers run."""
        if self._established:
            self._note_round_trip()
            self._core.handle_timer(now)
        else:
            self._connection.handle_timer(now)

    # --- streams ---------------------------------------------------------------------------------------------------

    def open_stream(self) -> int:
        """Open a bidirectional stream."""
        return int(self._core.open_stream(False))

    def send(self, stream_id: int, data: Buffer, fin: bool) -> bool:
        """Queue bytes. The core refuses them when STOP_SENDING arrived, also before its event was handed out."""
        try:
            self._core.send_stream(stream_id, data, fin)
        except Exception:
            return False
        return True

    def reset_stream(self, stream_id: int) -> None:
        """Send RESET_STREAM."""
        try:
            self._core.reset_stream(stream_id, 0)
        except Exception:  # noqa: S110  (the stream is over already)
            pass

    def stop_stream(self, stream_id: int) -> None:
        """Send STOP_SENDING."""
        try:
            self._core.stop_sending(stream_id, 0)
        except Exception:  # noqa: S110  (the stream is over already)
            pass

    def queued(self, stream_id: int) -> int:
        """Bytes not sent yet of one stream."""
        return int(self._core.get_send_buffer_size(stream_id))

    def queued_total(self) -> int:
        """Bytes not sent yet."""
        return int(self._core.get_send_buffer_size())

    def credit(self, stream_id: int, n: int) -> None:
        """Nothing: credit came back when the event was taken."""

    def send_datagram(self, data: bytes) -> bool:
        """Queue a DATAGRAM; one that does not fit a packet would block every later packet of the connection."""
        if len(data) > self.mtu - DATAGRAM_OVERHEAD:
            return False
        try:
            self._core.send_datagram(data)
        except Exception:
            return False
        return True

    def ping(self) -> None:
        """Queue a PING."""
        self._pings += 1
        try:
            self._core.send_ping(self._pings)
        except Exception:  # noqa: S110  (closing)
            pass

    def close(self, code: int, reason: str) -> None:
        """Close; not to be reported."""
        self._reported_end = True
        try:
            self._core.close(code, None, reason.encode())
        except Exception:  # noqa: S110  (closed already)
            pass


def _text(reason: bytes | str) -> str:
    return reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)


def core_accepts_streams(core: Any, host_cid: bytes, count: int) -> bool:
    """Whether `core` takes data on the stream number `count` of its peer; a second core plays the peer.

    Both get the same made-up key, so no handshake is needed. Takes 0.3 ms.
    """
    address = ("127.0.0.1", 9)
    peer = QuicConnectionCore(
        False, 1, address, address, b"\1" * 8, host_cid, True, 4, 1232, False, 5.0, 3, None, None,
        1024, 1024, 1024, 1024, 1024, 1024, 1024, 0, 0, count, 0, 0.333, 0.025, 0.0,
    )  # fmt: skip
    key = (int(Epoch.ONE_RTT), ("aes-128-gcm", "aes-128-ecb"), b"k" * 16, b"i" * 12, b"h" * 16, 0)
    peer.install_packet_key("send", *key)
    core.install_packet_key("receive", *key)
    peer.handshake_complete()
    stream_id = 0
    for _ in range(count):
        stream_id = peer.open_stream(False)
    peer.send_stream(stream_id, b"?", False)
    transmit = peer.poll_transmit(0.0)
    if transmit is None:
        return False
    core.receive_datagram(transmit[0], address, 0.0)
    while (native := core.next_event()) is not None:
        if tuple(native) == ("stream_data", stream_id, b"?", False):
            return True
    return False


@cache
def self_check() -> None:
    """Prove that our stream limit reaches the core and the wire. Errors: EngineUnavailableError."""
    wanted = 321
    try:
        configuration = QuicConfiguration(alpn_protocols=["check"], is_client=True, server_name="check.invalid")
        connection = _Connection(configuration, wanted)
        connection.connect(("127.0.0.1", 9), 0.0)
        core, tls = connection._core, connection._tls
        assert core is not None
        assert tls is not None
        sent = pull_quic_transport_parameters(QuicBuffer(data=tls.tls.handshake_extensions[0][1]))
        missing = [name for name in _NEEDED if not hasattr(core, name)]
        flight = core.poll_transmit(0.0)
        lifted = core_accepts_streams(core, connection.host_cid, wanted)
    except Exception as error:
        raise EngineUnavailableError(f"this version of qh3 is not the one it was adapted to: {error!r}") from None
    if missing:
        raise EngineUnavailableError(f"this version of qh3 has no {', '.join(missing)}")
    if sent.initial_max_streams_bidi != wanted or not lifted:
        raise EngineUnavailableError("this version of qh3 does not take a limit of streams")
    if flight is None:
        raise EngineUnavailableError("this version of qh3 makes no first flight")


_NEEDED = (
    "active_path",
    "bytes_in_flight",
    "congestion_window",
    "get_send_buffer_size",
    "receive_gro_buffer",
    "send_datagram",
    "state",
)
