"""How links to the edge are made: which transport, with which trust, from which local address.

Owns: the TLS contexts (made once) and the local UDP port of each conn_index. In: settings; an edge address.
Out: a Link. Never: registers, retries, chooses, or loads the QUIC library when it is not asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from connector.app.config import RunConfig
from connector.app.orchestrator import Orchestrator
from connector.errors import ConfigError
from connector.protocol.edge_addresses import EdgeAddress
from connector.protocol.ports import Acceptor, Batch, LinkTap, Request, StreamPort, StreamSink, Tap
from connector.protocol.protocol_choice import Transport
from connector.transport.h2 import dial_h2
from connector.transport.link import Link, TcpDial, dial_tcp, format_address
from connector.transport.tls import edge_context

if TYPE_CHECKING:
    from connector.app.private_network import PrivateLinks

DIAL_SECONDS = 15.0
"""Limit of the TCP connect, and again of the TLS handshake, as cloudflared has it."""


class Dialler:
    """One per run; `quic` and `http2` say which transports it must be ready for."""

    def __init__(
        self,
        config: RunConfig,
        accept: Acceptor,
        orchestrator: Orchestrator,
        *,
        quic: bool,
        http2: bool,
        on_malformed: Callable[[str], None] | None = None,
        on_write_timeout: Callable[[Transport, int], None] | None = None,
    ) -> None:
        self._config = config
        self._accept = accept
        self.tap: Tap | None = None
        """Looks on at every link dialled from now on."""
        self._orchestrator = orchestrator
        self._on_malformed = on_malformed
        self._on_write_timeout = on_write_timeout
        self._ports: dict[int, int] = {}
        self.batch: Batch | None = None
        """Told where reads of links begin and end."""
        self.private: PrivateLinks | None = None
        """Serves the datagrams of QUIC links; without it there are none."""
        self._tls = edge_context(config.cacert) if http2 else None
        self._quic_tls: Any = None
        self._quic_options: dict[str, Any] = {}
        if quic:
            self._prepare_quic()

    def features(self, transport: Transport, conn_index: int) -> tuple[str, ...]:
        """What the registration of `conn_index` may announce because of its transport."""
        if transport is not Transport.QUIC:
            return ()
        return ("support_quic_eof", *(self.private.features(conn_index) if self.private is not None else ()))

    async def dial(
        self,
        transport: Transport,
        address: EdgeAddress,
        conn_index: int,
        on_heard: Callable[[], None] | None = None,
    ) -> Link:
        """Return an established link. Errors: EdgeDialError and its kinds.

        `on_heard` is called at the first UDP packet from the edge.
        """
        tap = None
        if self.tap is not None:
            tap = self.tap.open_link(transport.value, format_address(address.host, address.port), conn_index)
        try:
            link = await self._dial(transport, address, conn_index, on_heard, tap)
        except BaseException as error:
            if tap is not None:
                tap.on_closed(error)
            raise
        told = self._on_write_timeout
        if self._config.write_timeout > 0 and told is not None:
            link.limit_writes(self._config.write_timeout, lambda: told(transport, conn_index))
        return link

    async def _dial(
        self,
        transport: Transport,
        address: EdgeAddress,
        conn_index: int,
        on_heard: Callable[[], None] | None,
        tap: LinkTap | None,
    ) -> Link:
        if transport is Transport.QUIC:
            return await self._dial_quic(address, conn_index, on_heard, tap)
        assert self._tls is not None
        bind, proxy = self._config.bind_address, self._config.proxy
        dial: TcpDial = dial_tcp
        if proxy is not None and not self._config.proxy_exempt(address.host):
            from connector.transport.outbound_proxy import dial_through  # noqa: PLC0415  (few need it)

            dial = partial(dial_through, proxy)
        return await dial_h2(
            address.host,
            address.port,
            context=self._tls,
            accept=self._accept_for(conn_index),
            tap=tap,
            batch=self.batch,
            local_address=(bind, 0) if bind else None,
            dial=dial,
            connect_timeout=DIAL_SECONDS,
            handshake_timeout=DIAL_SECONDS,
        )

    async def probe_quic(self, address: EdgeAddress) -> None:
        """Shake hands over QUIC and hang up. Errors: EdgeDialError and its kinds."""
        from connector.transport.quic import dial_quic  # noqa: PLC0415  (loaded by `_prepare_quic`)

        link = await dial_quic(
            address.host,
            address.port,
            context=self._quic_tls,
            accept=self._accept,
            local_host=self._config.bind_address,
            **self._quic_options,
        )
        link.close()

    def _prepare_quic(self) -> None:
        """Load the library now: during the first dial it would eat the head start. Errors: ConfigError."""
        from connector.protocol.quic_limits import DEFAULT_LIMITS  # noqa: PLC0415
        from connector.transport.quic_engine import find_engine  # noqa: PLC0415
        from connector.transport.quic_trust import quic_context  # noqa: PLC0415

        config = self._config
        _, engine = find_engine("auto")
        if config.post_quantum and not engine.post_quantum:
            raise ConfigError(
                "the QUIC library in use has no post-quantum key exchange",
                advice="Install qh3 2.1, or do without --post-quantum.",
            )
        limits = DEFAULT_LIMITS
        if config.quic_connection_window is not None:
            limits = limits._replace(connection_window=config.quic_connection_window)
        if config.quic_stream_window is not None:
            limits = limits._replace(stream_window=config.quic_stream_window)
        self._quic_tls = quic_context(config.cacert, self._tls)
        self._quic_options = {
            "limits": limits, "path_mtu_discovery": config.quic_pmtu, "post_quantum_only": config.post_quantum,
        }  # fmt: skip

    async def _dial_quic(
        self, address: EdgeAddress, conn_index: int, on_heard: Callable[[], None] | None, tap: LinkTap | None
    ) -> Link:
        """Dial over UDP, from the port that this conn_index had before: a NAT on the way then knows it still."""
        from connector.app.private_network import LinkHandlers  # noqa: PLC0415  (loaded with `private`)
        from connector.transport.quic import dial_quic  # noqa: PLC0415  (loaded by `_prepare_quic`)

        sink = self.private.open(conn_index) if self.private is not None else None
        link = await dial_quic(
            address.host,
            address.port,
            context=self._quic_tls,
            accept=self._accept_for(conn_index),
            tap=tap,
            batch=self.batch,
            on_configuration=self._orchestrator.on_rpc,
            rpc_handlers=LinkHandlers(sink, self._orchestrator.on_rpc) if sink is not None else None,
            datagrams=sink,
            on_malformed=self._on_malformed,
            on_heard=on_heard,
            local_host=self._config.bind_address,
            local_port=self._ports.get(conn_index, 0),
            rpc_timeout=self._config.rpc_timeout,
            **self._quic_options,
        )
        self._ports[conn_index] = link.local_address[1]
        return link

    def _accept_for(self, conn_index: int) -> Acceptor:
        """Let requests know which connection they came over."""
        accept = self._accept

        def accept_from(request: Request, port: StreamPort) -> StreamSink:
            request.conn_index = conn_index
            return accept(request, port)

        return accept_from
