"""HTTP/2 links: one TLS connection to the edge, driven by the sans-I/O engine.

Owns: the socket and TLS of one HTTP/2 link, its one timer, its control stream.
In: an edge address, an Acceptor, a Batch. Out: H2Link; calls of the engine, which calls the acceptor and the sinks.
Never: makes a task, looks at requests other than to keep the control stream.

*Strategy*: one read is parsed whole, then everything it caused goes out in one write: the engine's `wake` asks for one
`call_soon(flush)` a loop tick. The TLS stream lends its buffer of plain bytes, which the engine parses where it lies.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from connector.errors import EdgeDialError, EdgeLostError, ProtocolError
from connector.protocol.h2_connection import H2Connection
from connector.protocol.h2_limits import DEFAULT_LIMITS, H2Limits
from connector.protocol.ports import (
    Acceptor,
    Batch,
    Buffer,
    LinkTap,
    Request,
    RequestKind,
    ResetCode,
    StreamPort,
    StreamSink,
)
from connector.transport.bridge import SocketBridge
from connector.transport.link import CHECK_SECONDS, Link, TcpDial, dial_tcp, explain_loss, format_address
from connector.transport.streams import ByteStream
from connector.transport.tls import EDGE_NAMES, explain_tls_error, maybe_read_peer_certificate
from connector.transport.tls_stream import TlsStream
from connector.transport.write_timeout import WriteTimeout
from connector.wire.h2_frames import encode_ping

WRITE_HIGH_WATER = 256 * 1024
WRITE_LOW_WATER = 64 * 1024
"""Bytes waiting in the transport above which the engine is paused, and below which it goes on. The engine hands over up
to 1 MiB at once (`H2Limits.out_high_water`), so the ceiling is the two together."""

_PING = b"alive?  "
"""What a PING of ours carries: eight bytes of no meaning (RFC 9113 section 6.7)."""


async def dial_h2(
    host: str,
    port: int,
    *,
    context: ssl.SSLContext,
    accept: Acceptor,
    server_name: str = EDGE_NAMES["http2"],
    local_address: tuple[str, int] | None = None,
    dial: TcpDial = dial_tcp,
    connect_timeout: float = 15.0,
    handshake_timeout: float = 15.0,
    limits: H2Limits = DEFAULT_LIMITS,
    tap: LinkTap | None = None,
    batch: Batch | None = None,
) -> H2Link:
    """Return an established link whose first frames are on their way. Errors: EdgeDialError, EdgeTlsError."""
    peer = format_address(host, port)
    loop = asyncio.get_running_loop()
    sock = await dial(host, port, local_address=local_address, timeout=connect_timeout)
    address = (host, port)
    try:
        stream = TlsStream(loop, sock, context, server_name)
        async with asyncio.timeout(handshake_timeout):
            await stream.handshake()
    except TimeoutError:
        raise EdgeDialError(
            f"TLS handshake with {peer} not done within {handshake_timeout:g} seconds",
            advice="Something listens there but does not answer in TLS: check host and port of --edge.",
        ) from None
    except ssl.SSLCertVerificationError as error:
        certificate = await maybe_read_peer_certificate(address, server_name) if dial is dial_tcp else None
        raise explain_tls_error(error, server_name, peer, certificate) from None
    except OSError as error:  # ssl.SSLError is one
        raise explain_tls_error(error, server_name, peer, None) from None
    link = H2Link(accept, loop=loop, limits=limits, peer=peer, tap=tap, batch=batch)
    link.connection_made(stream)
    stream.start(link)
    return link


class H2Link:
    """One HTTP/2 link; made by `dial_h2` alone. Implements Link.

    End it with `close` or `abort`; `wait_closed` may be awaited by several, before and after.
    """

    protocol = "http2"

    def __init__(
        self,
        accept: Acceptor,
        *,
        loop: asyncio.AbstractEventLoop,
        limits: H2Limits = DEFAULT_LIMITS,
        peer: str = "",
        tap: LinkTap | None = None,
        batch: Batch | None = None,
    ) -> None:
        self._batch = batch
        self.local_address: tuple[str, int] = ("", 0)
        self.remote_address: tuple[str, int] = ("", 0)
        self._peer = peer
        self._loop = loop
        self._tap = tap
        self._accept = accept if tap is None else tap.acceptor(accept)
        self._transport: ByteStream | None = None
        self._engine = H2Connection(self._accept_stream, wake=self._wake, limits=limits, on_sink_error=self._report)
        self._flush_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False  # asked for here
        self._ended = False
        self._error: Exception | None = None
        self._closed: asyncio.Future[None] = loop.create_future()
        self._control: asyncio.Future[SocketBridge] = loop.create_future()
        self._bridge: SocketBridge | None = None
        self._check: asyncio.TimerHandle | None = None
        self._write_timeout: WriteTimeout | None = None
        self.on_goaway: Callable[[], None] | None = None

    def __repr__(self) -> str:
        state = "ended" if self._ended else f"{self._engine.open_streams} streams"
        return f"<H2Link {self._peer} {state}>"

    # --- Link ------------------------------------------------------------------------------------------------------

    @property
    def open_streams(self) -> int:
        """How many streams are open, the control stream included."""
        return self._engine.open_streams

    @property
    def in_flight(self) -> int:
        """How many streams are open, the control stream not counted: it is open as long as the link is."""
        return self._engine.open_streams - (self._bridge is not None and not self._bridge.ended.done())

    def figures(self) -> dict[str, float]:
        """Nothing: the kernel keeps what is known of the way."""
        return {}

    async def control_stream(self, timeout: float) -> SocketBridge:
        """Return the control stream once the edge opened it. Errors: EdgeLostError, ProtocolError."""
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(self._control)
        except TimeoutError:
            raise EdgeLostError(
                f"the edge {self._peer} opened no control stream within {timeout:g} seconds",
                advice="TLS works but the peer does not behave like a tunnel edge: check host and port of --edge.",
            ) from None

    async def wait_closed(self) -> None:
        """Wait for the end. Errors: EdgeLostError, ProtocolError when it was not a clean one."""
        await asyncio.shield(self._closed)
        if self._error is not None:
            raise self._error

    def check(self) -> None:
        """See `Link.check`: a PING, and anything that comes counts as an answer."""
        if self._ended or self._closing or self._check is not None:
            return
        self._check = self._loop.call_later(CHECK_SECONDS, self._unanswered)
        self._engine.append(encode_ping(_PING))

    def limit_writes(self, seconds: float, on_timeout: Callable[[], None]) -> None:
        """Give streams up from which the edge takes nothing for so long; `on_timeout` hears of each."""
        if not self._ended:
            self._write_timeout = WriteTimeout(self._engine, seconds, self._wake, on_timeout)

    def close(self) -> None:
        """Send what is queued, close TLS and TCP. Streams that are still open are reset towards their sinks."""
        if self._ended:
            return
        self._closing = True
        transport = self._transport
        if transport is None:
            return
        self._flush()
        transport.close()
        self._engine.connection_lost(self._error)

    def abort(self) -> None:
        """Close now; what is queued is lost."""
        if self._ended:
            return
        self._closing = True
        if self._transport is not None:
            self._transport.abort()
            self._engine.connection_lost(None)

    # --- StreamUser ------------------------------------------------------------------------------------------

    def connection_made(self, transport: ByteStream) -> None:
        """TLS is up: send our SETTINGS."""
        self._transport = transport
        # Behind a proxy that speaks TLS this is a socket pair, which has no addresses; nor has a socket that broke.
        self.local_address = (transport.get_extra_info("sockname") or ())[:2] or ("", 0)
        self.remote_address = (transport.get_extra_info("peername") or ())[:2] or ("", 0)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER, low=WRITE_LOW_WATER)
        if self._closing:
            self._transport.abort()
            return
        self._engine.start(self._loop.time())
        self._arm()

    def data_received(self, data: Buffer) -> None:
        """Parse what one read brought."""
        if self._closing:
            return
        if self._tap is not None:
            self._tap.on_bytes(False, data)
        batch = self._batch
        if batch is not None:
            batch.begin()
        try:
            self._engine.receive_data(data, self._loop.time())
        except ProtocolError as error:
            self._fail(error)
            return
        finally:
            if batch is not None:
                batch.end()
        if self._timer is not None:
            self._arm()
        if self._check is not None:
            self._check.cancel()
            self._check = None
        if self.on_goaway is not None and self._engine.goaway_received:
            said, self.on_goaway = self.on_goaway, None
            said()

    def eof_received(self) -> bool | None:
        """The edge closed; TLS has no half-close, so this is the end."""
        return False

    def pause_writing(self) -> None:
        """The socket does not take more."""
        self._engine.pause_writing()

    def resume_writing(self) -> None:
        """The socket takes more again."""
        self._engine.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        """Settle why, and tell every sink."""
        if self._ended:
            return
        self._ended = True
        for timer in (self._timer, self._check):
            if timer is not None:
                timer.cancel()
        self._timer = self._check = None
        if self._write_timeout is not None:
            self._write_timeout.stop()
        engine = self._engine
        if self._error is None and not self._closing:
            self._error = explain_loss(error, self._peer, self.in_flight)
        engine.connection_lost(self._error or EdgeLostError("connection with edge closed"))
        self._transport = None
        if self._tap is not None:
            self._tap.on_closed(self._error)
        if not self._control.done():
            self._control.set_exception(
                self._error
                or EdgeLostError(f"the edge {self._peer} closed the connection before it opened the control stream")
            )
            self._control.exception()  # nobody has to ask for it
        self._closed.set_result(None)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _accept_stream(self, request: Request, port: StreamPort) -> StreamSink:
        if request.kind is not RequestKind.CONTROL:
            return self._accept(request, port)
        if self._bridge is not None:
            port.reset(ResetCode.REFUSED)
            return _IGNORE
        self._bridge = SocketBridge(port, loop=self._loop, held=True)
        self._control.set_result(self._bridge)
        return self._bridge

    def _wake(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        transport = self._transport
        if transport is not None:
            data = self._engine.data_to_send()
            if data:
                if self._tap is not None:
                    self._tap.on_bytes(True, data)
                transport.write(data)

    def _arm(self) -> None:
        """Keep the one timer at the engine's next deadline."""
        when = self._engine.next_timeout()
        timer = self._timer
        if timer is not None:
            if when == timer.when():
                return
            timer.cancel()
        self._timer = None if when is None else self._loop.call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        try:
            # The loop's clock may be a hair early.
            self._engine.handle_timeout(max(self._loop.time(), self._engine.next_timeout() or 0.0))
        except ProtocolError as error:
            self._fail(error)
            return
        self._arm()

    def _unanswered(self) -> None:
        self._check = None
        self._error = explain_loss(TimeoutError(), self._peer, self.in_flight)
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, error: ProtocolError) -> None:
        """The peer broke HTTP/2: let the GOAWAY out, close, keep why."""
        self._error = error
        self.close()

    def _report(self, error: Exception) -> None:
        self._loop.call_exception_handler({"message": "a stream's sink raised", "exception": error, "protocol": self})


def _is_a_link(link: H2Link) -> Link:
    """Let the type checker hold H2Link to the interface."""
    return link


class _Ignore:
    """The sink of a stream that was refused."""

    __slots__ = ()

    def on_data(self, data: Buffer) -> None:
        """Ignore."""

    def on_eof(self) -> None:
        """Ignore."""

    def on_reset(self, error: BaseException | None) -> None:
        """Ignore."""

    def pause_writing(self) -> None:
        """Ignore."""

    def resume_writing(self) -> None:
        """Ignore."""


_IGNORE = _Ignore()
