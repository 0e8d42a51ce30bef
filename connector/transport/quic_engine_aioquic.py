"""The QUIC engine on aioquic: pure Python, for platforms without qh3, and a second opinion in tests.

Owns: everything that knows aioquic, and the workarounds for its limits of streams and of receive credit.
In: QuicEngine calls. Out: EngineEvents calls, datagrams.
Never: I/O, time of its own.

*Strategy*: the library doubles windows when half of them arrived; here they move only by what was credited, which holds
a single stream back without touching the others. `self_check` proves that the two methods that do this are called.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from aioquic.buffer import UINT_VAR_MAX_SIZE
from aioquic.quic import events as quic_events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicFrameType, QuicProtocolVersion

from connector.protocol.ports import Buffer
from connector.transport.quic_engine import (
    DATAGRAM_OVERHEAD,
    INITIAL_SIZE,
    MAX_DATAGRAM_FRAME,
    EngineEvents,
    EngineSettings,
    EngineUnavailableError,
)

_LIMIT_CAPACITY = 1 + 2 * UINT_VAR_MAX_SIZE


class _Connection(QuicConnection):
    """aioquic's connection with windows that move by consumption."""

    def __init__(self, configuration: QuicConfiguration, max_streams: int) -> None:
        super().__init__(configuration=configuration)
        self.window = configuration.max_data
        self.stream_window = configuration.max_stream_data
        self.consumed = 0
        self.stream_consumed: dict[int, int] = {}
        limit = self._local_max_streams_bidi
        limit.value = limit.sent = max_streams
        limit = self._local_max_streams_uni
        limit.value = limit.sent = 0

    def _write_connection_limits(self, builder: Any, space: Any) -> None:
        """MAX_DATA by what was credited; MAX_STREAMS as the library does it."""
        data = self._local_max_data
        wanted = self.consumed + self.window
        if wanted - data.value >= self.window // 4:
            data.value = wanted
        # Keeps the library's own doubling off: it compares `used` with `value`.
        used, data.used = data.used, 0
        try:
            super()._write_connection_limits(builder, space)
        finally:
            data.used = used

    def _write_stream_limits(self, builder: Any, space: Any, stream: Any) -> None:
        """MAX_STREAM_DATA by what was credited."""
        if stream.max_stream_data_local and not stream.receiver.is_finished:
            wanted = self.stream_consumed.get(stream.stream_id, 0) + self.stream_window
            if wanted - stream.max_stream_data_local >= self.stream_window // 4:
                stream.max_stream_data_local = wanted
        if stream.max_stream_data_local_sent != stream.max_stream_data_local:
            buffer = builder.start_frame(
                QuicFrameType.MAX_STREAM_DATA,
                capacity=_LIMIT_CAPACITY,
                handler=self._on_max_stream_data_delivery,
                handler_args=(stream,),
            )
            buffer.push_uint_var(stream.stream_id)
            buffer.push_uint_var(stream.max_stream_data_local)
            stream.max_stream_data_local_sent = stream.max_stream_data_local


class AioquicEngine:
    """A QuicEngine. Implements the interface; see there."""

    name = "aioquic"
    credit_by_stream = True
    post_quantum = False

    def __init__(self, settings: EngineSettings) -> None:
        limits = settings.limits
        self._size = INITIAL_SIZE[settings.ip_version]
        self._limits = limits
        configuration = QuicConfiguration(
            alpn_protocols=[settings.alpn],
            is_client=True,
            server_name=settings.server_name,
            cadata=settings.cadata,
            idle_timeout=settings.idle_timeout,
            max_data=limits.connection_window,
            max_stream_data=limits.stream_window,
            max_datagram_size=self._size,
            max_datagram_frame_size=MAX_DATAGRAM_FRAME,
            secrets_log_file=settings.keylog,
            supported_versions=[QuicProtocolVersion.VERSION_1],
        )
        self._connection = _Connection(configuration, limits.max_streams)
        self._address: tuple[str, int] = ("", 0)
        self._delivered: dict[int, int] = {}
        self._reported_end = False
        self._pings = 0

    @property
    def alive(self) -> bool:
        """False once closing."""
        return self._connection._close_event is None

    @property
    def congested(self) -> bool:
        """Whether nothing more may be in flight."""
        loss = self._connection._loss
        return bool(loss.bytes_in_flight + self._size > loss.congestion_window)

    @property
    def mtu(self) -> int:
        """The library does not probe."""
        return self._size

    def figures(self) -> dict[str, float]:
        """Return what loss recovery knows."""
        loss = self._connection._loss
        found = {"congestion_window": float(loss.congestion_window)}
        if loss._rtt_initialized:
            found["min_rtt"] = loss._rtt_min * 1000
            found["latest_rtt"] = loss._rtt_latest * 1000
            found["smoothed_rtt"] = loss._rtt_smoothed * 1000
        return found

    def connect(self, address: tuple[str, int], now: float) -> None:
        """Start the handshake."""
        self._address = address
        self._connection.connect(address, now)

    def receive(self, data: bytes, segment: int, now: float) -> None:
        """Feed datagrams one by one."""
        feed = self._connection.receive_datagram
        if len(data) <= segment:
            feed(data, self._address, now)
            return
        for start in range(0, len(data), segment):
            feed(data[start : start + segment], self._address, now)

    def dispatch(self, events: EngineEvents) -> None:
        """Hand out events."""
        connection = self._connection
        delivered = self._delivered
        while not events.receive_paused:
            event = connection.next_event()
            if event is None:
                break
            if isinstance(event, quic_events.StreamDataReceived):
                stream_id = event.stream_id
                size = len(event.data)
                if size and not event.end_stream:
                    delivered[stream_id] = delivered.get(stream_id, 0) + size
                elif event.end_stream:
                    delivered.pop(stream_id, None)
                events.on_stream_data(stream_id, event.data, event.end_stream)
            elif isinstance(event, quic_events.StreamReset):
                self._credit_lost(event.stream_id)
                events.on_stream_reset(event.stream_id)
            elif isinstance(event, quic_events.StopSendingReceived):
                events.on_stop_sending(event.stream_id)
            elif isinstance(event, quic_events.DatagramFrameReceived):
                events.on_datagram_frame(event.data)
            elif isinstance(event, quic_events.HandshakeCompleted):
                events.on_handshake_done()
        close = connection._close_event
        if close is not None and not self._reported_end:
            self._reported_end = True
            by_peer = not connection._close_pending and connection._state.name in {"DRAINING", "TERMINATED"}
            events.on_terminated(
                close.error_code, close.reason_phrase, by_peer and close.reason_phrase != "Idle timeout"
            )

    def _credit_lost(self, stream_id: int) -> None:
        """Credit what a reset stream sent and we never saw."""
        stream = self._connection._streams.get(stream_id)
        delivered = self._delivered.pop(stream_id, 0)
        if stream is not None:
            self._connection.consumed += max(0, stream.receiver.highest_offset - delivered)
        self._connection.stream_consumed.pop(stream_id, None)

    def transmit(self, now: float) -> list[bytes]:
        """Collect datagrams."""
        return [datagram for datagram, _ in self._connection.datagrams_to_send(now)]

    def next_timeout(self) -> float | None:
        """Return the library's next deadline."""
        return self._connection.get_timer()

    def handle_timeout(self, now: float) -> None:
        """Let timers run."""
        self._connection.handle_timer(now)

    def open_stream(self) -> int:
        """Return the next stream ID; the stream begins with its first byte."""
        stream_id = self._connection.get_next_available_stream_id()
        self._connection.send_stream_data(stream_id, b"")
        return stream_id

    def send(self, stream_id: int, data: Buffer, fin: bool) -> bool:
        """Queue bytes."""
        try:
            self._connection.send_stream_data(stream_id, bytes(data), fin)
        except Exception:
            return False
        return True

    def reset_stream(self, stream_id: int) -> None:
        """Send RESET_STREAM."""
        try:
            self._connection.reset_stream(stream_id, 0)
        except Exception:  # noqa: S110  (the stream is over already)
            pass

    def stop_stream(self, stream_id: int) -> None:
        """Send STOP_SENDING."""
        try:
            self._connection.stop_stream(stream_id, 0)
        except Exception:  # noqa: S110  (the stream is over already)
            pass

    def queued(self, stream_id: int) -> int:
        """Bytes not sent yet of one stream."""
        stream = self._connection._streams.get(stream_id)
        return 0 if stream is None else _waiting(stream)

    def queued_total(self) -> int:
        """Bytes not sent yet."""
        return sum(map(_waiting, self._connection._streams.values()))

    def credit(self, stream_id: int, n: int) -> None:
        """Move the windows on."""
        connection = self._connection
        connection.consumed += n
        stream = connection._streams.get(stream_id)
        if stream is None or stream.receiver.is_finished:
            connection.stream_consumed.pop(stream_id, None)
        else:
            connection.stream_consumed[stream_id] = connection.stream_consumed.get(stream_id, 0) + n

    def send_datagram(self, data: bytes) -> bool:
        """Queue a DATAGRAM; one that does not fit would block all later ones."""
        connection = self._connection
        accepted = connection._remote_max_datagram_frame_size or 0
        if len(data) > self._size - DATAGRAM_OVERHEAD or len(data) + 3 > accepted:
            return False
        if len(connection._datagrams_pending) >= self._limits.datagram_queue:
            return False
        connection.send_datagram_frame(data)
        return True

    def ping(self) -> None:
        """Queue a PING."""
        self._pings += 1
        self._connection.send_ping(self._pings)

    def close(self, code: int, reason: str) -> None:
        """Close; not to be reported."""
        self._reported_end = True
        self._connection.close(error_code=code, reason_phrase=reason)


def _waiting(stream: Any) -> int:
    sender = stream.sender
    return 0 if sender.buffer_is_empty else sum(piece.stop - piece.start for piece in sender._pending)


@cache
def self_check() -> None:
    """Prove that the methods replaced here exist and are used. Errors: EngineUnavailableError."""
    try:
        source = inspect.getsource(QuicConnection._write_application)
        probe = _Connection(QuicConfiguration(), 4_321)
        good = (
            "_write_connection_limits" in source
            and "_write_stream_limits" in source
            and probe._local_max_streams_bidi.value == 4_321
            and probe._local_max_data.used == 0
        )
    except Exception as error:
        raise EngineUnavailableError(f"this version of aioquic is not the one it was adapted to: {error!r}") from None
    if not good:
        raise EngineUnavailableError("this version of aioquic grants receive credit elsewhere")
