"""The dev edge as one object: both listeners, the tunnels, the certificates.

Owns: start, reload and stop of everything in this package.
In: `Settings`. Out: a running `DevEdge` with its addresses, events and hooks for tests.
Never: reads the command line or prints (cli.py), or outlives `stop()`.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from connector.devedge.authority import EDGE_LEAF_NAMES, PUBLIC_LEAF_NAMES, Authority, StateDir
from connector.devedge.connectors import Roster
from connector.devedge.events import Event, EventLog
from connector.devedge.eyeball import ALPN, PublicSide
from connector.devedge.faults import Faults
from connector.devedge.forward import Route, TcpForward, UdpForward, ping_forever
from connector.devedge.h2link import H2Link
from connector.devedge.management import ManagementDesk
from connector.devedge.quickapi import QuickApi
from connector.devedge.quiclisten import QuicListener
from connector.devedge.tunnels import Declaration, Directory, Tunnel, TunnelStore, parse_ingress_flags, read_config_file
from connector.errors import ConfigError
from connector.wire.token import Token, encode_token

PORT_ATTEMPTS = 20
"""Ports that are tried until one is free for TCP and for UDP."""

LOOPBACK_SIZE = 1452
"""Bytes of a QUIC packet where nothing can be too small for it; what cloudflared takes at most."""

SAFE_SIZE = 1232
"""Bytes of a QUIC packet that pass wherever IPv6 does; aioquic does not probe for more."""

HANDSHAKE_LIMIT = 10.0
"""Seconds for a TLS handshake."""

WATCH_INTERVAL = 0.5
"""Seconds between looks at the configuration file's time stamp."""

STOP_LIMIT = 5.0
"""Seconds that `stop` lets requests finish; WebSockets are closed at its end."""


class Settings:
    """What one dev edge is made of. Tunnels come from `config_file`, `tunnel_names`, or both."""

    __slots__ = (
        "config_file",
        "datagram_size",
        "faults",
        "ingress",
        "listen",
        "ping",
        "public",
        "quic",
        "quick",
        "state_dir",
        "tcp",
        "tunnel_names",
        "udp",
    )

    def __init__(
        self,
        state_dir: Path,
        *,
        tunnel_names: list[str] | None = None,
        config_file: Path | None = None,
        ingress: list[str] | None = None,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        public: tuple[str, int] = ("127.0.0.1", 0),
        faults: Faults | None = None,
        quick: tuple[str, int] | None = None,
        quic: bool = True,
        datagram_size: int | None = None,
        udp: list[Route] | None = None,
        tcp: list[Route] | None = None,
        ping: list[str] | None = None,
    ) -> None:
        self.udp = udp or []
        self.tcp = tcp or []
        self.ping = ping or []
        self.quic = quic
        self.quick = quick
        self.datagram_size = datagram_size
        self.state_dir = state_dir
        self.tunnel_names = tunnel_names or []
        self.config_file = config_file
        self.ingress = ingress or []
        self.listen = listen
        self.public = public
        self.faults = faults or Faults()

    def declarations(self) -> list[Declaration]:
        """Read what is declared now; raises ConfigError."""
        found = read_config_file(self.config_file) if self.config_file else []
        names = {declaration.name for declaration in found}
        found += [Declaration(name) for name in self.tunnel_names if name not in names]
        if not found and self.quick is None:
            raise ConfigError("no tunnel is declared", advice="Name one with --tunnel NAME or --config FILE.")
        if self.ingress:
            if len(found) != 1:
                raise ConfigError(
                    f"--ingress with {len(found)} tunnels: it is not clear which one is meant",
                    advice="Write the ingress rules into the --config file.",
                )
            if found[0].config is not None:
                raise ConfigError(f"--ingress: {self.config_file} has ingress rules for {found[0].name!r} already")
            found[0].config = parse_ingress_flags(self.ingress)
        return found


class DevEdge:
    """A dev edge. Use as `async with DevEdge(settings) as edge:` inside `capnp.kj_loop()`."""

    def __init__(self, settings: Settings, events: EventLog | None = None) -> None:
        self.settings = settings
        self.events = events or EventLog()
        self._store = TunnelStore(StateDir(settings.state_dir))
        self._authority = Authority.open(StateDir(settings.state_dir))
        self._quick_tunnels: list[Tunnel] = []
        self.management = ManagementDesk(StateDir(settings.state_dir))
        self.roster = Roster(self.events, settings.faults, self._read_directory(), self.management)
        self._public_side = PublicSide(self.roster)
        self._public_tls: ssl.SSLContext | None = None
        self._servers: list[asyncio.Server] = []
        self._quic: QuicListener | None = None
        self._watcher: asyncio.TimerHandle | None = None
        self.forwards: list[UdpForward | TcpForward] = []
        self._pings: list[asyncio.Task[None]] = []
        self._stamp = self._config_stamp()
        self.edge_address = ("", 0)
        self.public_address = ("", 0)

    # What tests and the command line ask.

    @property
    def ca_file(self) -> Path:
        """PEM file that connectors (`--cacert`) and visitors must trust."""
        return self._authority.ca_file

    @property
    def tunnels(self) -> list[Tunnel]:
        """The tunnels in force."""
        return list(self.roster.directory.tunnels.values())

    def tunnel(self, name: str | None = None) -> Tunnel:
        """The tunnel of that name; the first one when no name is given."""
        for tunnel in self.tunnels:
            if name in (None, tunnel.name):
                return tunnel
        raise KeyError(name)

    def token(self, name: str | None = None) -> str:
        """The token of a tunnel."""
        return tunnel_token(self.tunnel(name))

    def management_token(self, name: str | None = None, actor: str = "dev@localhost") -> str:
        """A token for the management of a tunnel."""
        return self.management.issue(self.tunnel(name), actor)

    async def wait_event(self, name: str, *, limit: float = 10.0, **fields: Any) -> Event:
        """Wait for the next event of that name whose fields have these values."""
        found: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

        def look(event: Event) -> None:
            same = event["event"] == name and all(event.get(key) == value for key, value in fields.items())
            if same and not found.done():
                found.set_result(event)

        remove = self.events.listen(look)
        try:
            async with asyncio.timeout(limit):
                return await found
        finally:
            remove()

    def push(self, version: int, config: object, name: str | None = None) -> None:
        """Push any configuration, valid or not, to all connections of a tunnel; for tests."""
        for link in self.roster.links_of(self.tunnel(name)):
            link.push(version, config)

    # Life.

    async def __aenter__(self) -> DevEdge:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(limit=0)

    async def start(self) -> None:
        """Listen on both sides; raises ConfigError when an address cannot be had."""
        try:
            edge_tls = self._authority.server_context(EDGE_LEAF_NAMES)
            self._public_tls = self._authority.server_context(self._public_names(), alpn=ALPN)
            await self._listen_for_connectors(edge_tls)
            self.public_address = await self._listen(
                "--public", self.settings.public, self._public_side.new_connection, self._public_tls
            )
            await self._start_forwards()
            quick = await self._listen_for_quick()
        except BaseException:
            await self.stop(limit=0)
            raise
        if self.settings.config_file is not None:
            self._watcher = asyncio.get_running_loop().call_later(WATCH_INTERVAL, self._watch)
        self.events.emit(
            "listening",
            edge=_join(self.edge_address),
            public=f"https://{_join(self.public_address)}",
            **({"quick": f"http://{_join(quick)}"} if quick else {}),
            ca=str(self.ca_file),
            tunnels=[
                {"name": tunnel.name, "id": str(tunnel.id), "hostnames": tunnel.all_hostnames}
                for tunnel in self.tunnels
            ],
        )

    async def stop(self, *, limit: float = STOP_LIMIT) -> None:
        """Take nothing new, let requests finish for `limit` seconds, then close everything."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        for task in self._pings:
            task.cancel()
        await asyncio.gather(*self._pings, return_exceptions=True)
        for forward in self.forwards:
            forward.close()
        for server in self._servers:
            server.close()
        self._public_side.finish()
        if limit:
            await _until(lambda: not self._public_side.connections, limit)
        self._public_side.abort()
        for link in list(self.roster.links):
            link.send_goaway()
            link.close()
        await _until(lambda: not self.roster.links and not self._public_side.connections, 1.0)
        for link in list(self.roster.links):
            link.abort()
        await _until(lambda: not self.roster.links, 1.0)
        await self.roster.close()
        if self._quic is not None:
            self._quic.close()
            self._quic = None
        for server in self._servers:
            await server.wait_closed()
        self._servers.clear()

    async def _start_forwards(self) -> None:
        """Open the ports into the private network."""
        wanted = [("udp", route) for route in self.settings.udp] + [("tcp", route) for route in self.settings.tcp]
        for kind, route in wanted:
            forward: UdpForward | TcpForward
            try:
                forward = await (UdpForward if kind == "udp" else TcpForward).listen(self, route)
            except OSError as error:
                raise ConfigError(
                    f"--{kind} {_join(route.listen)}: {error.strerror or error}", advice="Name another address."
                ) from error
            self.forwards.append(forward)
            self.events.emit("forward", kind=kind, listen=_join(forward.address), dest=_join(route.dest))
        loop = asyncio.get_running_loop()
        self._pings = [loop.create_task(ping_forever(self, dest), name="devedge ping") for dest in self.settings.ping]

    def reload(self) -> None:
        """Read the configuration again and push it; a bad one is told and changes nothing."""
        self._stamp = self._config_stamp()
        try:
            directory = self._read_directory()
        except ConfigError as error:
            self.events.emit("error", error=str(error), advice=error.advice or None)
            return
        before = {tunnel.id: (tunnel.version, tunnel.config) for tunnel in self.tunnels}
        self.roster.directory = directory
        if self._public_tls is not None:
            self._authority.load_leaf(self._public_tls, self._public_names())
        changed = [t.name for t in self.tunnels if before.get(t.id) != (t.version, t.config)]
        self.events.emit("reloaded", tunnels=[tunnel.name for tunnel in self.tunnels], changed=changed)
        for link in list(self.roster.links):
            if link.tunnel_id is not None and link.tunnel_id not in directory.tunnels:
                link.drain()  # its tunnel is gone
        self.roster.push_all()

    def _read_directory(self) -> Directory:
        return Directory([*self._store.resolve(self.settings.declarations()), *self._quick_tunnels])

    async def _listen_for_quick(self) -> tuple[str, int] | None:
        """Hand out quick tunnels, where --quick says so."""
        if self.settings.quick is None:
            return None
        server = await asyncio.start_server(QuickApi(self._add_quick).accept, *self.settings.quick)
        self._servers.append(server)
        host, port = server.sockets[0].getsockname()[:2]
        return host, port

    def _add_quick(self, tunnel: Tunnel) -> None:
        self._quick_tunnels.append(tunnel)
        self.roster.directory = self._read_directory()
        if self._public_tls is not None:
            self._authority.load_leaf(self._public_tls, self._public_names())
        self.events.emit("quick tunnel", name=tunnel.name, id=str(tunnel.id), hostname=tunnel.hostnames[0])

    def _public_names(self) -> list[str]:
        return [*PUBLIC_LEAF_NAMES, *self.roster.directory.hostnames]

    def _config_stamp(self) -> tuple[int, int, int] | None:
        if self.settings.config_file is None:
            return None
        try:
            status = self.settings.config_file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _watch(self) -> None:
        stamp = self._config_stamp()
        if stamp is not None and stamp != self._stamp:
            self.reload()
        self._watcher = asyncio.get_running_loop().call_later(WATCH_INTERVAL, self._watch)

    async def _listen_for_connectors(self, tls: ssl.SSLContext) -> None:
        """Take one port for TCP and UDP; with port 0 look for one that is free in both."""
        for attempt in range(PORT_ATTEMPTS):
            wanted = self.settings.listen
            self.edge_address = await self._listen("--listen", wanted, lambda: H2Link(self.roster), tls)
            if not self.settings.quic:
                return
            server = self._servers[-1]
            size = self.settings.datagram_size or (
                LOOPBACK_SIZE if ip_address(self.edge_address[0]).is_loopback else SAFE_SIZE
            )
            listener = QuicListener(self.roster, self._authority, size)
            try:
                listener.listen(*self.edge_address, server.sockets[0].family)
            except OSError as error:
                server.close()
                self._servers.remove(server)
                if error.errno == errno.EADDRINUSE and wanted[1] == 0 and attempt < PORT_ATTEMPTS - 1:
                    continue
                taken = error.errno == errno.EADDRINUSE
                reason = "the UDP port is taken" if taken else error.strerror or str(error)
                raise ConfigError(
                    f"--listen {_join(self.edge_address)}: {reason}",
                    advice="Name another port, or close QUIC with --no-quic.",
                ) from error
            self._quic = listener
            return

    async def _listen(
        self, flag: str, address: tuple[str, int], factory: Callable[[], asyncio.Protocol], tls: ssl.SSLContext
    ) -> tuple[str, int]:
        try:
            server = await asyncio.get_running_loop().create_server(
                factory, address[0], address[1], ssl=tls, ssl_handshake_timeout=HANDSHAKE_LIMIT, backlog=1024
            )
        except OSError as error:
            reason = "the port is taken" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
            raise ConfigError(
                f"{flag} {_join(address)}: {reason}", advice="Name another address, or port 0 for a free one."
            ) from error
        self._servers.append(server)
        host, port = server.sockets[0].getsockname()[:2]
        return host, port


def tunnel_token(tunnel: Tunnel) -> str:
    """Make the token of a tunnel."""
    return encode_token(Token(account_tag=tunnel.account, secret=tunnel.secret, tunnel_id=tunnel.id))


async def _until(condition: Callable[[], bool], limit: float) -> None:
    deadline = asyncio.get_running_loop().time() + limit
    while not condition() and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.01)  # only while stopping


def _join(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
