"""QUIC links: one UDP socket to the edge, driven by a sans-I/O engine.

Owns: the socket, the one timer, keep-alive, the control stream and the datagram queue of one QUIC link.
In: an edge address, an Acceptor. Out: QuicLink; calls of the stream table, which calls the acceptor and the sinks.
Never: names a QUIC library, makes a task for a stream, looks at requests.

*Strategy*: read until the socket is empty, then hand out what happened, then send once per loop tick: whatever writes
asks for one `call_soon(flush)`. The timer is moved only when it would fire too late, and never armed closer than 1 ms:
uvloop's timers have that resolution and fire early, which made pacing deadlines spin.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import TextIO

from connector.errors import ConfigError, EdgeDialError, EdgeLostError, EdgeTlsError, ProtocolError
from connector.protocol.ports import Acceptor, Batch, Buffer, DatagramSink, LinkTap, StreamPort, StreamSink
from connector.protocol.quic_limits import DEFAULT_LIMITS, QuicLimits
from connector.protocol.quic_request import RPC_SIGNATURE
from connector.protocol.quic_streams import QuicStreams
from connector.transport.bridge import SocketBridge
from connector.transport.link import explain_loss, format_address
from connector.transport.lookup import look_up
from connector.transport.quic_ends import explain_end, explain_handshake
from connector.transport.quic_engine import (
    DATAGRAM_OVERHEAD,
    IDLE_SECONDS,
    KEEPALIVE_SECONDS,
    TRANSMIT_LIMIT,
    EngineSettings,
    QuicEngine,
    find_engine,
)
from connector.transport.quic_trust import QuicContext
from connector.transport.quic_watch import WatchedSender
from connector.transport.rpc_server import RPC_SECONDS, ConfigurationOnly, RpcHandlers, RpcServer
from connector.transport.tls import EDGE_NAMES
from connector.transport.udp import UDP_ADVICE, UdpSocket, explain_udp_error, open_udp
from connector.transport.write_timeout import WriteTimeout

TIMER_RESOLUTION = 0.001

LATE_SECONDS = 1.0
"""A timer that fires later than this finds a process that stood still: stopped, starved, its machine paused. What came
meanwhile is still in the socket, and libuv runs timers before it polls sockets: it is read first, or the idle time-out
would end a link whose edge never fell silent."""

FLUSH_ROUNDS = 16
"""Batches of TRANSMIT_LIMIT datagrams in one loop tick (1.2 MB), so that sending does not starve the rest."""

REFUSED_LIMIT = 3
REFUSED_SECONDS = 1.0
"""So many ICMP "port unreachable" answers, with nothing received for so long, mean that the edge's process is gone. It
finds a restarted edge in a second instead of the idle time-out's five; one forged ICMP message does nothing."""

HANDSHAKE_SECONDS = 10.0
"""Precedent: cloudflared 10 s for the whole handshake, 5 s without any packet."""

_DATAGRAM_BATCH = 16


async def dial_quic(
    host: str,
    port: int,
    *,
    context: QuicContext,
    accept: Acceptor,
    on_configuration: Callable[[int, bytes], tuple[int, str] | Awaitable[tuple[int, str]]] | None = None,
    rpc_handlers: RpcHandlers | None = None,
    on_datagram: Callable[[bytes], None] | None = None,
    datagrams: DatagramSink | None = None,
    on_malformed: Callable[[str], None] | None = None,
    on_heard: Callable[[], None] | None = None,
    server_name: str = EDGE_NAMES["quic"],
    local_host: str | None = None,
    local_port: int = 0,
    handshake_timeout: float = HANDSHAKE_SECONDS,
    idle_timeout: float = IDLE_SECONDS,
    rpc_timeout: float = RPC_SECONDS,
    path_mtu_discovery: bool = True,
    post_quantum_only: bool = False,
    limits: QuicLimits = DEFAULT_LIMITS,
    engine: str = "auto",
    tap: LinkTap | None = None,
    batch: Batch | None = None,
) -> QuicLink:
    """Return an established link with its control stream open. Errors: EdgeDialError, EdgeTlsError, ConfigError.

    `local_port` is tried first and given up for a new one when it is taken; `link.local_address` tells which it became.
    `on_heard` is called once, at the first packet from the edge: until then nothing tells a slow edge from a blocked
    path. `on_configuration(version, JSON)` returns the version in force and an error text; `rpc_handlers` replaces it
    where UDP sessions are served too, by `datagrams`. The addresses of a name are tried in order within
    `handshake_timeout`.
    """
    peer = format_address(host, port)
    loop = asyncio.get_running_loop()
    _, make = find_engine(engine)
    if post_quantum_only and not make.post_quantum:
        raise ConfigError(
            "the QUIC library in use has no post-quantum key exchange",
            advice="Install qh3 2.1, or do without --post-quantum.",
        )
    handlers = rpc_handlers
    if handlers is None and on_configuration is not None:
        handlers = ConfigurationOnly(on_configuration)
    failure: EdgeDialError | None = None
    try:
        async with asyncio.timeout(handshake_timeout):
            try:
                found = await look_up(host, port, kind=socket.SOCK_DGRAM)
            except (socket.gaierror, UnicodeError) as error:
                raise EdgeDialError(
                    f"the edge address {peer} does not resolve: {getattr(error, 'strerror', None) or error}",
                    advice="Check the name given with --edge, and this machine's DNS.",
                ) from None
            for family, _, _, _, address in found:
                any_host = "::" if family == socket.AF_INET6 else "0.0.0.0"
                local = (local_host or any_host, local_port) if local_host or local_port else None
                try:
                    sock = open_udp((str(address[0]), int(address[1])), family, local)
                except OSError as error:
                    failure = explain_udp_error(error, host, port, local if local_host else None)
                    continue
                keylog = _open_keylog(context, sock)
                settings = EngineSettings(
                    server_name=server_name,
                    cadata=context.cadata,
                    ip_version=6 if family == socket.AF_INET6 else 4,
                    path_mtu_discovery=path_mtu_discovery,
                    idle_timeout=idle_timeout,
                    post_quantum_only=post_quantum_only,
                    keylog=keylog,
                    limits=limits,
                )
                link = QuicLink(
                    make(settings), sock, accept, loop=loop, peer=peer, server_name=server_name, limits=limits,
                    handlers=handlers, rpc_timeout=rpc_timeout, keylog=keylog, on_malformed=on_malformed,
                    tap=tap, batch=batch,
                )  # fmt: skip
                link.on_datagram = on_datagram
                link.on_heard = on_heard
                try:
                    await link.handshake(datagrams)
                except EdgeTlsError:
                    raise
                except EdgeDialError as error:
                    failure = error
                    continue
                return link
    except TimeoutError:
        raise EdgeDialError(
            f"QUIC handshake with {peer} not done within {handshake_timeout:g} seconds", advice=UDP_ADVICE
        ) from None
    raise failure or EdgeDialError(f"the edge address {peer} does not resolve", advice=UDP_ADVICE)


def _open_keylog(context: QuicContext, sock: socket.socket) -> TextIO | None:
    if context.keylog is None:
        return None
    try:
        return open(context.keylog, "a", encoding="ascii")
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"SSLKEYLOGFILE names {context.keylog}, which cannot be written: {error.strerror or error}",
            advice="Unset SSLKEYLOGFILE, or name a file in a directory that exists and can be written.",
        ) from None


class QuicLink:
    """One QUIC link; made by `dial_quic` alone. Implements Link, and EngineEvents for its engine.

    End it with `close` or `abort`; `wait_closed` may be awaited by several, before and after. Set `on_datagram` to take
    DATAGRAM frames; without it they are dropped.
    """

    protocol = "quic"

    def __init__(
        self,
        engine: QuicEngine,
        sock: socket.socket,
        accept: Acceptor,
        *,
        loop: asyncio.AbstractEventLoop,
        peer: str = "",
        server_name: str = "",
        limits: QuicLimits = DEFAULT_LIMITS,
        handlers: RpcHandlers | None = None,
        rpc_timeout: float = RPC_SECONDS,
        keylog: TextIO | None = None,
        on_malformed: Callable[[str], None] | None = None,
        tap: LinkTap | None = None,
        batch: Batch | None = None,
    ) -> None:
        self._batch = batch
        self.local_address: tuple[str, int] = sock.getsockname()[:2]
        self.remote_address: tuple[str, int] = sock.getpeername()[:2]
        self.on_datagram: Callable[[bytes], None] | None = None
        self.on_heard: Callable[[], None] | None = None
        self.on_goaway: Callable[[], None] | None = None  # never called: QUIC version 1 has no such frame
        self.datagrams_dropped = 0
        self._datagram_sink: DatagramSink | None = None
        self._datagrams_full = False
        self._peer = peer or format_address(*self.remote_address)
        self._server_name = server_name
        self._loop = loop
        self._engine = engine
        self._limits = limits
        self._keylog = keylog
        self._tap = tap
        self._streams = QuicStreams(
            engine if tap is None else WatchedSender(engine, tap),
            accept if tap is None else tap.acceptor(accept),
            wake=self._wake,
            limits=limits,
            accept_rpc=self._accept_rpc if handlers is not None else None,
            on_malformed=on_malformed,
            on_sink_error=self._report,
            credit_by_stream=engine.credit_by_stream,
        )
        self._streams.on_resume(self._resume_receiving)
        self._rpc = RpcServer(handlers, loop=loop, limit=rpc_timeout) if handlers is not None else None
        self._datagrams: deque[bytes] = deque()
        self._flush_due = False
        self._resume_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._write_timeout: WriteTimeout | None = None
        self._last_figures: dict[str, float] = {}
        self._last_received = self._last_ping = monotonic()
        self._stall: tuple[int, float] | None = None  # progress and time when receiving was seen standing still
        self._paused_bytes = 0
        self._refused = 0
        self._established = False
        self._ended = False
        self._termination: tuple[int, str, bool] | None = None
        self._error: Exception | None = None
        self._handshake: asyncio.Future[None] = loop.create_future()
        self._closed: asyncio.Future[None] = loop.create_future()
        self._bridge: SocketBridge | None = None
        self._udp = UdpSocket(sock, loop, on_readable=self._on_readable, on_writable=self._flush)

    def __repr__(self) -> str:
        state = "ended" if self._ended else f"{len(self._streams)} streams"
        return f"<QuicLink {self._peer} {self._engine.name} {state}>"

    # --- Link ------------------------------------------------------------------------------------------------------

    @property
    def open_streams(self) -> int:
        """How many streams are open, the control stream included."""
        return len(self._streams)

    @property
    def in_flight(self) -> int:
        """How many streams are open, the control stream not counted."""
        return self._busy()

    @property
    def engine_name(self) -> str:
        """Which library serves."""
        return self._engine.name

    @property
    def mtu(self) -> int:
        """Largest UDP payload sent now."""
        return self._engine.mtu

    def figures(self) -> dict[str, float]:
        """What is known of the way to the edge: the engine's figures, `mtu`, `sent_bytes` and `receive_bytes`."""
        udp = self._udp
        found = {"mtu": float(self.mtu), "sent_bytes": udp.bytes_sent, "receive_bytes": udp.bytes_received}
        return {**found, **self._last_figures} if self._ended else {**found, **self._engine.figures()}

    async def handshake(self, datagrams: DatagramSink | None = None) -> None:
        """Run the handshake; afterwards the control stream is open, and `datagrams` serves DATAGRAM frames.

        Errors: EdgeDialError, EdgeTlsError.
        """
        self._datagram_sink = datagrams
        try:
            self._engine.connect(self.remote_address, monotonic())
            self._wake()
            await asyncio.shield(self._handshake)
        except BaseException:
            self._finish(None)
            raise

    async def control_stream(self, timeout: float) -> SocketBridge:
        """Return the control stream; this side opens it, so it is there at once. Errors: EdgeLostError."""
        if self._bridge is None:
            raise self._error or EdgeLostError(f"the edge {self._peer} closed the connection")
        return self._bridge

    async def wait_closed(self) -> None:
        """Wait for the end. Errors: EdgeLostError, ProtocolError when it was not a clean one."""
        await asyncio.shield(self._closed)
        if self._rpc is not None:
            await self._rpc.wait_closed()
        if self._error is not None:
            raise self._error

    def check(self) -> None:
        """See `Link.check`; the idle time-out does the rest."""
        if self._established and not self._ended:
            self._last_ping = monotonic()
            self._engine.ping()
            self._wake()

    def limit_writes(self, seconds: float, on_timeout: Callable[[], None]) -> None:
        """Give streams up from which the edge takes nothing for so long; `on_timeout` hears of each."""
        if not self._ended:
            self._write_timeout = WriteTimeout(self._streams, seconds, self._wake, on_timeout)

    def close(self) -> None:
        """Send what is queued, then CONNECTION_CLOSE 0. Streams that are still open are reset towards their sinks."""
        if self._ended:
            return
        self._flush()
        self.abort()

    def abort(self) -> None:
        """Close now; what is queued is lost. The edge is told, in one packet."""
        if self._ended:
            return
        self._engine.close(0, "")
        try:
            self._udp.send(self._engine.transmit(monotonic()))
        except Exception as error:
            self._report(error)
        self._finish(None)

    # --- datagrams and streams of this side ------------------------------------------------------------------------

    @property
    def datagram_limit(self) -> int:
        """Bytes of the largest datagram that fits now."""
        return self._engine.mtu - DATAGRAM_OVERHEAD

    @property
    def datagram_room(self) -> int:
        """How many datagrams `send_datagram` takes now."""
        return 0 if self._ended else self._limits.datagram_queue - len(self._datagrams)

    def send_datagram(self, data: bytes) -> bool:
        """Queue a DATAGRAM frame; False when it is too large, too many wait, or the link is over."""
        if self._ended or len(self._datagrams) >= self._limits.datagram_queue or len(data) > self.datagram_limit:
            self.datagrams_dropped += 1
            return False
        if self._tap is not None:
            self._tap.on_datagram(True, data)
        self._datagrams.append(data)
        if len(self._datagrams) == self._limits.datagram_queue:
            self._datagrams_full = True
        self._wake()
        return True

    def open_rpc(self, data: bytes, sink: StreamSink) -> StreamPort | None:
        """Open an RPC stream for a sink that speaks RPC itself, `data` behind the signature; None: the link is over."""
        if self._ended:
            return None
        stream = self._streams.open_raw(self._engine.open_stream())
        stream.sink = sink
        stream.write(RPC_SIGNATURE + data)
        return stream

    def open_rpc_stream(self) -> SocketBridge:
        """Open an RPC stream towards the edge. Errors: EdgeLostError.

        Call `release` on the bridge when its socket is read, and `close` when done.
        """
        if self._ended:
            raise EdgeLostError(f"the connection with the edge {self._peer} is closed")
        stream = self._streams.open_raw(self._engine.open_stream())
        bridge = SocketBridge(stream, loop=self._loop, held=True)
        stream.sink = bridge
        stream.write(RPC_SIGNATURE)
        return bridge

    # --- EngineEvents ----------------------------------------------------------------------------------------------

    @property
    def receive_paused(self) -> bool:
        """Whether origins hold so much that nothing more is taken from the engine."""
        return self._streams.receive_paused

    def on_handshake_done(self) -> None:
        """Open the control stream: it must be the first stream of this side."""
        self._established = True
        stream = self._streams.open_raw(self._engine.open_stream())
        self._bridge = SocketBridge(stream, loop=self._loop, held=True)
        stream.sink = self._bridge
        if self._datagram_sink is not None:
            self._datagram_sink.attach(self)
            self.on_datagram = self._datagram_sink.on_datagram
        if not self._handshake.done():
            self._handshake.set_result(None)

    def on_stream_data(self, stream_id: int, data: Buffer, fin: bool) -> None:
        """Pass payload on."""
        if self._tap is not None:
            self._tap.on_stream_bytes(stream_id, False, data, fin)
        self._streams.receive_data(stream_id, data, fin)

    def on_stream_reset(self, stream_id: int) -> None:
        """Pass RESET_STREAM on."""
        if self._tap is not None:
            self._tap.on_stream_ended(stream_id, False, "RESET_STREAM")
        self._streams.receive_reset(stream_id)

    def on_stop_sending(self, stream_id: int) -> None:
        """Pass STOP_SENDING on."""
        if self._tap is not None:
            self._tap.on_stream_ended(stream_id, False, "STOP_SENDING")
        self._streams.receive_stop(stream_id)

    def on_datagram_frame(self, data: bytes) -> None:
        """Pass a datagram on."""
        if self._tap is not None:
            self._tap.on_datagram(False, data)
        if self.on_datagram is None:
            self.datagrams_dropped += 1
            return
        try:
            self.on_datagram(data)
        except Exception as error:
            self._report(error)

    def on_terminated(self, code: int, reason: str, by_peer: bool) -> None:
        """Remember why; the end follows after what is left to send."""
        if self._termination is None:
            self._termination = (code, reason, by_peer)

    # --- socket and timer ------------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        """Read everything, hand it out, and let one flush follow."""
        now = monotonic()
        engine = self._engine

        def take(data: bytes, segment: int) -> None:
            if self._streams.receive_paused:
                self._paused_bytes += len(data)
                if self._paused_bytes > self._limits.paused_bytes:
                    return
            engine.receive(data, segment, now)
            self._last_received = now
            if self.on_heard is not None:
                heard, self.on_heard = self.on_heard, None
                heard()
            self._refused = 0

        try:
            self._udp.receive(take)
        except Exception as error:
            self._fail(ProtocolError(f"the QUIC engine gave up: {error}"))
            return
        if self._udp.error is not None:
            self._on_network_error(self._udp.error, now)
        self._dispatch()
        if not self._ended:
            self._wake()

    def _dispatch(self) -> None:
        """Hand out what the engine has; settle the end if it came to one."""
        if self._ended:
            return
        batch = self._batch
        try:
            if batch is None:
                self._engine.dispatch(self)
            else:
                batch.begin()
                try:
                    self._engine.dispatch(self)
                finally:
                    batch.end()
        except Exception as error:
            self._fail(ProtocolError(f"the QUIC engine gave up: {error}"))
            return
        if self._termination is not None:
            self._end()

    def _resume_receiving(self) -> None:
        if not self._resume_due:
            self._resume_due = True
            self._loop.call_soon(self._on_resume)

    def _on_resume(self) -> None:
        self._resume_due = False
        self._stall = None
        self._paused_bytes = 0
        self._dispatch()
        if not self._ended:
            self._wake()

    def _wake(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self._ended:
            return
        engine, udp = self._engine, self._udp
        now = monotonic()
        try:
            if self._datagrams:
                self._push_datagrams()
            for _ in range(FLUSH_ROUNDS):
                if udp.blocked:
                    break
                datagrams = engine.transmit(now)
                if not datagrams:
                    break
                udp.send(datagrams)
                if len(datagrams) < TRANSMIT_LIMIT:
                    break
            else:
                self._wake()
        except Exception as error:
            self._fail(ProtocolError(f"the QUIC engine gave up: {error}"))
            return
        self._streams.flushed()
        if udp.error is not None:
            self._on_network_error(udp.error, now)
        if not self._closed.done():
            self._arm(now)

    def _push_datagrams(self) -> None:
        """Hand datagrams to the engine as the congestion window allows: its own queue has no end."""
        datagrams, engine = self._datagrams, self._engine
        for _ in range(_DATAGRAM_BATCH):
            if not datagrams or engine.congested:
                break
            if not engine.send_datagram(datagrams.popleft()):
                self.datagrams_dropped += 1
        if datagrams and not engine.congested:
            self._wake()
        if self._datagrams_full and len(datagrams) <= self._limits.datagram_queue // 2:
            self._datagrams_full = False
            if self._datagram_sink is not None:
                self._datagram_sink.on_datagram_room()

    def _arm(self, now: float) -> None:
        """See that the timer fires when the next thing is due; one that fires too early is left alone."""
        when = self._engine.next_timeout()
        if self._established:
            ping = max(self._last_received, self._last_ping) + KEEPALIVE_SECONDS
            when = ping if when is None else min(when, ping)
        if when is None:
            return
        when = max(when, now + TIMER_RESOLUTION)
        if self._timer is not None:
            if self._timer_at <= when:
                return
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_later(when - now, self._on_timer)

    def _on_timer(self, second: bool = False) -> None:
        self._timer = None
        if self._ended:
            return
        now = monotonic()
        if not second and now - self._timer_at > LATE_SECONDS:
            self._timer_at = now + TIMER_RESOLUTION
            self._timer = self._loop.call_later(TIMER_RESOLUTION, self._on_timer, True)
            return
        due = self._engine.next_timeout()
        # The loop's clock may be a hair early.
        if due is not None and due <= now + TIMER_RESOLUTION:
            try:
                self._engine.handle_timeout(max(now, due))
            except Exception as error:
                self._fail(ProtocolError(f"the QUIC engine gave up: {error}"))
                return
            self._dispatch()
        if self._closed.done():
            return
        if self._established and now >= max(self._last_received, self._last_ping) + KEEPALIVE_SECONDS - 0.01:
            self._last_ping = now
            self._engine.ping()
        if self._streams.receive_paused:
            self._watch_stall(now)
        self._flush()

    def _watch_stall(self, now: float) -> None:
        """Nothing is taken from the engine: see that it does not stay so for ever."""
        if not self._engine.alive:
            self._streams.connection_lost(EdgeLostError(f"the connection with the edge {self._peer} ended"))
            self._dispatch()
            return
        progress = self._streams.progress
        if self._stall is None or self._stall[0] != progress:
            self._stall = (progress, now)
        elif now - self._stall[1] >= self._limits.stall_timeout:
            self._stall = None
            self._streams.reset_stalled()

    def _on_network_error(self, error: OSError, now: float) -> None:
        """The kernel has bad news about the way to the edge; a link that is up mostly ignores it."""
        self._udp.error = None
        if not self._established:
            if not self._handshake.done():
                self._handshake.set_exception(explain_udp_error(error, *self.remote_address, None))
            return
        if error.errno != errno.ECONNREFUSED:
            return
        self._refused += 1
        if self._refused >= REFUSED_LIMIT and now - self._last_received >= REFUSED_SECONDS:
            self._finish(explain_loss(error, self._peer, self._busy()))

    # --- the end ---------------------------------------------------------------------------------------------------

    def _busy(self) -> int:
        """Streams in flight beside the control stream, which is open as long as the link is."""
        return len(self._streams) - (self._bridge is not None and not self._bridge.ended.done())

    def _end(self) -> None:
        """The engine came to an end: send what it still has to say, keep why."""
        assert self._termination is not None
        code, reason, by_peer = self._termination
        busy = self._busy()
        try:
            self._udp.send(self._engine.transmit(monotonic()))
        except Exception as error:
            self._report(error)
        if not self._established:
            failure = explain_handshake(code, reason, by_peer, self._peer, self._server_name)
            if not self._handshake.done():
                self._handshake.set_exception(failure)
            self._finish(failure)
        else:
            self._finish(explain_end(code, reason, by_peer, self._peer, busy))

    def _fail(self, error: ProtocolError) -> None:
        """The engine raised: nothing can be sent any more."""
        if not self._handshake.done():
            self._handshake.set_exception(EdgeDialError(str(error)))
        self._finish(error)

    def _finish(self, error: Exception | None) -> None:
        """Let everything go. Idempotent."""
        if self._ended:
            return
        lost = self._engine.figures().get("lost_packets")
        if lost is not None:
            self._last_figures["lost_packets"] = lost
        self._ended = True
        self._error = error
        if self._tap is not None:
            self._tap.on_closed(error)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._write_timeout is not None:
            self._write_timeout.stop()
        self._udp.close()
        if self._keylog is not None:
            self._keylog.close()
        self._datagrams.clear()
        if self._datagram_sink is not None and self._established:
            self._datagram_sink.on_lost()
        self._streams.connection_lost(error or EdgeLostError("connection with edge closed"))
        if self._rpc is not None:
            self._rpc.close()
        if not self._handshake.done():
            self._handshake.cancel()
        elif not self._handshake.cancelled():
            self._handshake.exception()  # nobody has to ask for it
        if not self._closed.done():
            self._closed.set_result(None)

    def _accept_rpc(self, port: StreamPort) -> StreamSink | None:
        assert self._rpc is not None
        return self._rpc.accept(port)

    def _report(self, error: Exception) -> None:
        self._loop.call_exception_handler({"message": "a stream's sink raised", "exception": error, "protocol": self})
