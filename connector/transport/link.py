"""What a link is, and what dialling one can go wrong with.

Owns: the Link interface, TCP dialling, the words for dial failures and lost links.
In: an address. Out: a connected socket, EdgeDialError, EdgeLostError.
Never: speaks TLS or a protocol (h2.py does).
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable
from typing import Protocol

from connector.errors import EdgeDialError, EdgeLostError
from connector.transport.bridge import SocketBridge
from connector.transport.lookup import look_up

KEEPALIVE_IDLE = 15
KEEPALIVE_INTERVAL = 15
KEEPALIVE_COUNT = 4
"""TCP keep-alive, in seconds and probes: a silent edge is found dead after 75 s. Precedents: Go (so cloudflared) 15 s
idle and interval with 9 probes; Linux by default 2 h."""

CHECK_SECONDS = 5.0
"""How long the edge may take to answer `Link.check`; the idle time-out of QUIC links, so that both know as soon."""

DIAL_ADVICE = "Check network and firewall: the connector needs outgoing TCP to port 7844 of the edge."


class Link(Protocol):
    """One transport connection to one edge address, established and secured.

    `wait_closed` returns after a clean end (asked for here, or by the edge while nothing was in flight) and raises
    EdgeLostError or ProtocolError after any other.
    """

    @property
    def protocol(self) -> str:
        """Return `http2` or `quic`."""

    @property
    def local_address(self) -> tuple[str, int]:
        """Return host and port of this side."""

    @property
    def remote_address(self) -> tuple[str, int]:
        """Return host and port of the edge."""

    def figures(self) -> dict[str, float]:
        """What is known of the way to the edge, for metrics: names as of `quic_client_*`; also after the end."""

    async def control_stream(self, timeout: float) -> SocketBridge:
        """Return the control stream as soon as it is open. Errors: EdgeLostError."""

    on_goaway: Callable[[], None] | None
    """Called once when the edge says that it opens no more streams here; what is in flight goes on."""

    async def wait_closed(self) -> None:
        """Wait until the link ended; raise why, if not cleanly."""

    @property
    def open_streams(self) -> int:
        """Return how many streams are open, the control stream included while it is."""

    @property
    def in_flight(self) -> int:
        """Return how many streams are open, the control stream not counted."""

    def limit_writes(self, seconds: float, on_timeout: Callable[[], None]) -> None:
        """Give streams up from which the edge takes nothing for so long; `on_timeout` hears of each."""

    def check(self) -> None:
        """Find out soon whether the edge is still there, after news that the path to it may have changed.

        A link that gets no answer within CHECK_SECONDS ends with EdgeLostError.
        """

    def close(self) -> None:
        """Send what is queued, then close."""

    def abort(self) -> None:
        """Close now."""


class TcpDial(Protocol):
    """How a TCP connection to the edge is made: straight (`dial_tcp`), or through somebody."""

    def __call__(
        self, host: str, port: int, *, local_address: tuple[str, int] | None = None, timeout: float = 15.0
    ) -> Awaitable[socket.socket]:
        """Return a connected, non-blocking socket. Errors: EdgeDialError."""


def format_address(host: str, port: int) -> str:
    """Return `host:port`, with brackets around IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def dial_tcp(
    host: str, port: int, *, local_address: tuple[str, int] | None = None, timeout: float = 15.0
) -> socket.socket:
    """Return a connected, non-blocking socket with TCP_NODELAY and keep-alive. Errors: EdgeDialError.

    The addresses of a name are tried in order within one `timeout`; the last failure is the one reported.
    """
    peer = format_address(host, port)
    loop = asyncio.get_running_loop()
    last: OSError | None = None
    try:
        async with asyncio.timeout(timeout):
            try:
                found = await look_up(host, port)
            except (socket.gaierror, UnicodeError) as error:
                raise EdgeDialError(
                    f"the edge address {peer} does not resolve: {_text(error)}",
                    advice="Check the name given with --edge, and this machine's DNS.",
                ) from None
            for family, kind, proto, _, address in found:
                sock = socket.socket(family, kind, proto)
                try:
                    sock.setblocking(False)
                    _set_options(sock)
                    if local_address is not None:
                        sock.bind(local_address)
                    await loop.sock_connect(sock, address)
                except OSError as error:
                    sock.close()
                    last = error
                except BaseException:
                    sock.close()
                    raise
                else:
                    return sock
    except TimeoutError:
        raise EdgeDialError(f"no answer from {peer} within {timeout:g} seconds", advice=DIAL_ADVICE) from None
    raise explain_dial_error(last or OSError("no address"), peer, local_address) from None


def _set_options(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL),
        ("TCP_KEEPCNT", KEEPALIVE_COUNT),
    ):
        option = getattr(socket, name, None)  # macOS and Windows have not all of them
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def explain_dial_error(error: OSError, peer: str, local_address: tuple[str, int] | None = None) -> EdgeDialError:
    """Return the EdgeDialError for a TCP connect that failed with `error`."""
    code = error.errno
    if code == errno.ECONNREFUSED:
        return EdgeDialError(
            f"{peer} refuses connections",
            advice="Nothing listens there: check host and port of --edge; a dev edge must be running.",
        )
    if code in {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN}:
        return EdgeDialError(f"{peer} is unreachable: {_text(error)}", advice=DIAL_ADVICE)
    if code == errno.ETIMEDOUT:
        return EdgeDialError(f"no answer from {peer}: {_text(error)}", advice=DIAL_ADVICE)
    if code in {errno.EADDRNOTAVAIL, errno.EADDRINUSE} and local_address is not None:
        return EdgeDialError(
            f"cannot bind {format_address(*local_address)} to reach {peer}: {_text(error)}",
            advice="--edge-bind-address must be an address of this machine, of the same family as the edge's.",
        )
    return EdgeDialError(f"cannot connect to {peer}: {_text(error)}", advice=DIAL_ADVICE)


def explain_loss(error: BaseException | None, peer: str, streams: int) -> EdgeLostError | None:
    """Return why a link that was not closed here ended; None when the edge closed it with nothing in flight."""
    busy = f" with {streams} request{'s' if streams != 1 else ''} in flight" if streams else ""
    if error is None:
        return lost_by_edge(f"the edge {peer} closed the connection{busy}") if streams else None
    code = getattr(error, "errno", None)
    if code == errno.ETIMEDOUT or isinstance(error, TimeoutError):
        return EdgeLostError(
            f"no sign of life from the edge {peer}, connection given up{busy}",
            advice="The network between here and the edge went away (sleep, roaming, NAT or firewall time-out).",
        )
    if code in {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN}:
        return EdgeLostError(f"the edge {peer} became unreachable{busy}: {_text(error)}", advice=DIAL_ADVICE)
    if isinstance(error, ConnectionError):
        return lost_by_edge(f"connection reset by the edge {peer}{busy}")
    return EdgeLostError(f"connection with the edge {peer} broke{busy}: {_text(error)}")


def lost_by_edge(text: str) -> EdgeLostError:
    """Return the error of a link that the edge ended."""
    error = EdgeLostError(text)
    error.by_edge = True
    return error


def _text(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
