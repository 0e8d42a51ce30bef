"""How links to the edge are made: which transport, with which trust, from which local address.

Owns: the TLS contexts (made once) and the local UDP port of each conn_index. In: settings; an edge address.
Out: a Link. Never: registers, retries, or loads the QUIC library when it is not asked for.
"""

from __future__ import annotations

import json
from typing import Any

from connector.app.config import RunConfig
from connector.app.orchestrator import Orchestrator
from connector.protocol.edge_addresses import EdgeAddress
from connector.protocol.ports import Acceptor
from connector.transport.h2 import dial_h2
from connector.transport.link import Link
from connector.transport.tls import edge_context

DIAL_SECONDS = 15.0
"""Limit of the TCP connect, and again of the TLS handshake, as cloudflared has it."""


class Dialler:
    """One per run. `protocol` is what it dials: `http2` or `quic`."""

    def __init__(self, config: RunConfig, accept: Acceptor, orchestrator: Orchestrator) -> None:
        self.protocol = "quic" if config.protocol == "quic" else "http2"
        self._bind = config.bind_address
        self._rpc_timeout = config.rpc_timeout
        self._accept = accept
        self._orchestrator = orchestrator
        self._ports: dict[int, int] = {}
        self._tls: Any
        if self.protocol == "quic":
            from connector.transport.quic_trust import quic_context  # noqa: PLC0415  (slow to import)

            self._tls = quic_context(config.cacert)
        else:
            self._tls = edge_context(config.cacert)

    @property
    def features(self) -> tuple[str, ...]:
        """What registration may announce because of the transport."""
        return ("support_quic_eof",) if self.protocol == "quic" else ()

    async def dial(self, address: EdgeAddress, conn_index: int) -> Link:
        """Return an established link. Errors: EdgeDialError and its kinds."""
        if self.protocol == "quic":
            return await self._dial_quic(address, conn_index)
        return await dial_h2(
            address.host,
            address.port,
            context=self._tls,
            accept=self._accept,
            local_address=(self._bind, 0) if self._bind else None,
            connect_timeout=DIAL_SECONDS,
            handshake_timeout=DIAL_SECONDS,
        )

    async def _dial_quic(self, address: EdgeAddress, conn_index: int) -> Link:
        """Dial over UDP, from the port that this conn_index had before: a NAT on the way then knows it still."""
        from connector.transport.quic import dial_quic  # noqa: PLC0415  (slow to import)

        link = await dial_quic(
            address.host,
            address.port,
            context=self._tls,
            accept=self._accept,
            on_configuration=self._on_configuration,
            local_host=self._bind,
            local_port=self._ports.get(conn_index, 0),
            rpc_timeout=self._rpc_timeout,
        )
        self._ports[conn_index] = link.local_address[1]
        return link

    def _on_configuration(self, version: int, config: bytes) -> tuple[int, str]:
        """Answer a push over an RPC stream: the version in force, and an error's text."""
        try:
            parsed = json.loads(config)
        except (ValueError, RecursionError) as error:
            return self._orchestrator.version, f"the configuration is not JSON: {error}"
        text = self._orchestrator.apply(version, parsed)
        return self._orchestrator.version, text or ""
