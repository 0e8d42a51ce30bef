"""Ports of this machine that lead into a connector's private network, as if a device with WARP ran here.

Owns: the listeners of `--udp` and `--tcp`, the pings of `--ping`; one flow per client.
In: LISTEN=DEST. Out: flows and streams over registered links; events.
Never: decides what a connector may reach.
"""

from __future__ import annotations

import asyncio
from collections import deque
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from connector.devedge.connectors import Link
from connector.devedge.datagrams import DatagramDesk, UdpFlow
from connector.devedge.streams import RawHeaders, Stream, StreamLostError
from connector.errors import ConfigError, WireError

if TYPE_CHECKING:
    from connector.devedge.server import DevEdge

MAX_CLIENTS = 1024
"""UDP clients of one port at once; the datagrams of more are dropped."""

CLIENT_IDLE = 210.0
"""Seconds without a datagram after which a UDP client is forgotten."""

WAITING = 32
"""Datagrams of a client that wait while its flow is being opened."""

HIGH_WATER = 256 * 1024
"""Bytes that wait for a TCP client before the connector's credit is held back."""

PING_INTERVAL = 1.0

Address = tuple[str, int]


class Route(NamedTuple):
    """One LISTEN=DEST."""

    listen: Address
    dest: Address


def parse_route(text: str, flag: str) -> Route:
    """Read `PORT=IP:PORT` or `ADDRESS:PORT=IP:PORT`. Raises ConfigError."""
    listen, equals, dest = text.partition("=")
    if not equals:
        raise ConfigError(f"{flag} {text}: not LISTEN=DEST", advice="For example 127.0.0.1:5353=10.0.0.53:53.")
    at = _address(listen if ":" in listen else f"127.0.0.1:{listen}", flag, text)
    to = _address(dest, flag, text)
    try:
        ip_address(to[0])
    except ValueError:
        raise ConfigError(
            f"{flag} {text}: {to[0]!r} is no IP address", advice="Devices resolve names themselves; give an address."
        ) from None
    return Route(at, to)


def _address(text: str, flag: str, whole: str) -> Address:
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{flag} {whole}: {text!r} is not ADDRESS:PORT")
    return host, int(port)


def quic_desk(edge: DevEdge, name: str | None = None) -> DatagramDesk:
    """Return the datagrams of the tunnel's next QUIC link. Raises StreamLostError when there is none."""
    tunnel = edge.tunnel(name)
    for _ in edge.roster.links_of(tunnel):
        link = edge.roster.pick(tunnel)
        if link is not None and link.desk is not None:
            return link.desk
    raise StreamLostError(f"tunnel {tunnel.name!r} has no connector attached over QUIC")


# -- UDP --------------------------------------------------------------------------------------------------------------


class UdpForward(asyncio.DatagramProtocol):
    """One UDP port; every client of it has a flow of its own."""

    def __init__(self, edge: DevEdge, route: Route) -> None:
        self.edge = edge
        self.route = route
        self.transport: asyncio.DatagramTransport | None = None
        self.clients: dict[Any, _Client] = {}
        self._sweep: asyncio.TimerHandle | None = None

    @classmethod
    async def listen(cls, edge: DevEdge, route: Route) -> UdpForward:
        """Take the port. Raises OSError."""
        loop = asyncio.get_running_loop()
        _, forward = await loop.create_datagram_endpoint(lambda: cls(edge, route), local_addr=route.listen)
        return forward

    @property
    def address(self) -> Address:
        """Where it listens."""
        assert self.transport is not None
        host, port = self.transport.get_extra_info("sockname")[:2]
        return host, port

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Listening."""
        self.transport = cast("asyncio.DatagramTransport", transport)  # uvloop's is none by class
        self._schedule()

    def datagram_received(self, data: bytes, address: Any) -> None:
        """A client sent something."""
        client = self.clients.get(address)
        if client is None:
            if len(self.clients) >= MAX_CLIENTS:
                return
            client = self.clients[address] = _Client(self, address)
        client.send(data)

    def close(self) -> None:
        """Give the port back; the flows end with their links, or of idleness."""
        if self._sweep is not None:
            self._sweep.cancel()
        for client in list(self.clients.values()):
            client.leave()
        if self.transport is not None:
            self.transport.close()

    def _schedule(self) -> None:
        self._sweep = asyncio.get_running_loop().call_later(CLIENT_IDLE / 4, self._forget_idle)

    def _forget_idle(self) -> None:
        now = asyncio.get_running_loop().time()
        for client in list(self.clients.values()):
            if now - client.last >= CLIENT_IDLE:
                client.leave()
        self._schedule()


class _Client:
    """One sender to a UDP port."""

    def __init__(self, forward: UdpForward, address: Any) -> None:
        self._forward = forward
        self._address = address
        self._loop = asyncio.get_running_loop()
        self._flow: UdpFlow | None = None
        self._waiting: deque[bytes] = deque(maxlen=WAITING)
        self.last = self._loop.time()
        self._opening: asyncio.Task[None] | None = self._loop.create_task(self._open(), name="devedge udp flow")
        forward.edge.roster.watch(self._opening)

    def send(self, data: bytes) -> None:
        """Pass a datagram on, or keep it until the flow is there."""
        self.last = self._loop.time()
        if self._flow is not None:
            self._flow.send(data)
        else:
            self._waiting.append(data)

    def leave(self) -> None:
        """Forget the client."""
        self._forward.clients.pop(self._address, None)
        if self._opening is not None:
            self._opening.cancel()
        flow, self._flow = self._flow, None
        if flow is not None and flow.open and flow.desk.attached:
            self._forward.edge.roster.watch(self._loop.create_task(_close_quietly(flow), name="devedge udp close"))

    async def _open(self) -> None:
        edge, dest = self._forward.edge, self._forward.route.dest
        try:
            self._flow = await quic_desk(edge).open_udp(dest, self._on_payload, self._on_end)
        except Exception as error:
            edge.events.emit("udp_flow_refused", dest=_join(dest), error=str(error) or type(error).__name__)
            self._opening = None
            self.leave()
            return
        self._opening = None
        edge.events.emit("udp_flow", dest=_join(dest), flow=self._flow.flow_id.hex(), version=self._flow.desk.version)
        while self._waiting:
            self._flow.send(self._waiting.popleft())

    def _on_payload(self, payload: bytes) -> None:
        self.last = self._loop.time()
        if self._forward.transport is not None:
            self._forward.transport.sendto(payload, self._address)

    def _on_end(self, why: str) -> None:
        self._forward.edge.events.emit("udp_flow_ended", dest=_join(self._forward.route.dest), error=why)
        self._flow = None
        self.leave()


async def _close_quietly(flow: UdpFlow) -> None:
    try:
        await flow.close()
    except Exception:  # noqa: S110  (the connector is leaving, or does not answer: nobody waits for this)
        pass


# -- TCP --------------------------------------------------------------------------------------------------------------


class TcpForward:
    """One TCP port; every connection to it is a stream."""

    def __init__(self, edge: DevEdge, route: Route) -> None:
        self.edge = edge
        self.route = route
        self.clients: set[TcpClient] = set()
        self._server: asyncio.Server | None = None

    @classmethod
    async def listen(cls, edge: DevEdge, route: Route) -> TcpForward:
        """Take the port. Raises OSError."""
        forward = cls(edge, route)
        loop = asyncio.get_running_loop()
        forward._server = await loop.create_server(lambda: TcpClient(forward), *route.listen)
        return forward

    @property
    def address(self) -> Address:
        """Where it listens."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    def close(self) -> None:
        """Give the port back and drop the connections."""
        if self._server is not None:
            self._server.close()
        for client in list(self.clients):
            client.abort()


class TcpClient(asyncio.Protocol):
    """One connection to a TCP port, and its stream through the connector."""

    def __init__(self, forward: TcpForward) -> None:
        self._forward = forward
        self._upstream: _Upstream | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected: open the stream."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        self.transport.set_write_buffer_limits(high=HIGH_WATER)
        forward = self._forward
        forward.clients.add(self)
        edge, dest = forward.edge, _join(forward.route.dest)
        try:
            link = edge.roster.pick(edge.tunnel())
            if link is None:
                raise StreamLostError(f"tunnel {edge.tunnel().name!r} has no connector attached")
            self._upstream = _Upstream(self, edge, link, dest)
            self._upstream.stream = link.open_tcp(dest, self._upstream)
        except StreamLostError as error:
            edge.events.emit("tcp_flow_refused", dest=dest, error=str(error))
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Pass bytes on."""
        if self._upstream is not None and self._upstream.stream is not None:
            self._upstream.stream.write(data)

    def eof_received(self) -> bool:
        """Pass the client's end on; the answer may still come."""
        if self._upstream is None or self._upstream.stream is None:
            return False
        self._upstream.stream.write_eof()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._forward.clients.discard(self)
        self.transport = None
        if self._upstream is not None:
            self._upstream.leave()

    def pause_writing(self) -> None:
        """The client is slow: credit stays owed."""

    def resume_writing(self) -> None:
        """The client takes more."""
        if self._upstream is not None:
            self._upstream.settle()

    def abort(self) -> None:
        """Drop the connection."""
        if self.transport is not None:
            self.transport.abort()


class _Upstream:
    """The stream of a TCP client: its StreamHandler."""

    def __init__(self, client: TcpClient, edge: DevEdge, link: Link, dest: str) -> None:
        self.stream: Stream | None = None
        self._client = client
        self._edge = edge
        self._link = link
        self._dest = dest
        self._owed = 0

    def on_headers(self, headers: RawHeaders) -> None:
        try:
            trouble = tcp_trouble(self._link, headers)
        except WireError as error:
            trouble = str(error)
        if trouble is not None:
            self._edge.events.emit("tcp_flow_refused", dest=self._dest, error=trouble)
            self._client.abort()
            return
        self._edge.events.emit("tcp_flow", dest=self._dest, protocol=self._link.protocol)

    def on_data(self, data: bytes) -> None:
        if self._client.transport is not None:
            self._client.transport.write(data)
        self._owed += len(data)
        self.settle()

    def on_eof(self, trailers: RawHeaders) -> None:
        if self._client.transport is not None:
            self._client.transport.close()

    def on_reset(self, error: BaseException | None) -> None:
        self.stream = None
        self._client.abort()

    def pause_writing(self) -> None:
        if self._client.transport is not None:
            self._client.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._client.transport is not None:
            self._client.transport.resume_reading()

    def settle(self) -> None:
        """Give credit back unless the client is slow."""
        transport = self._client.transport
        if transport is not None and transport.get_write_buffer_size() > HIGH_WATER:
            return
        owed, self._owed = self._owed, 0
        if owed and self.stream is not None:
            self.stream.consumed(owed)

    def leave(self) -> None:
        """The client is gone."""
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.reset()


def tcp_trouble(link: Link, headers: RawHeaders) -> str | None:
    """Return why a TCP stream was refused; None when it was accepted. Raises WireError."""
    if link.protocol == "quic":
        error = headers[0][1].decode("utf-8", "replace")
        return error or None
    head = link.read_head(headers)
    if head.status == 200 and not head.from_connector:
        return None
    return "too many active flows" if head.flow_limited else head.trouble or f"status {head.status}"


# -- ping -------------------------------------------------------------------------------------------------------------


async def ping_forever(edge: DevEdge, dest: str) -> None:
    """Ping `dest` once a second and tell every answer."""
    source = "10.255.255.1" if ip_address(dest).version == 4 else "fd00:ffff::1"
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        try:
            pong = await quic_desk(edge).ping(source, dest, limit=PING_INTERVAL, repeat=PING_INTERVAL)
        except StreamLostError as error:
            edge.events.emit("ping", dest=dest, answered=False, error=str(error))
        except TimeoutError:
            edge.events.emit("ping", dest=dest, answered=False, error="no answer")
        else:
            milliseconds = round((loop.time() - began) * 1000, 1)
            edge.events.emit("ping", dest=dest, answered=True, source=pong.source, type=pong.kind, ms=milliseconds)
        await asyncio.sleep(max(0.0, PING_INTERVAL - (loop.time() - began)))


def _join(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
