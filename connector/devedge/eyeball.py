"""The public side: one TLS port for HTTP/1.1 and HTTP/2, by ALPN.

Owns: the choice between the two protocols for each visitor's connection.
In: sockets after their TLS handshake. Out: an `H1Visitor` or an `H2Visitors` on the same transport.
Never: reads a byte itself.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import cast

from connector.devedge.connectors import Roster
from connector.devedge.eyeball_h1 import H1Visitor
from connector.devedge.eyeball_h2 import H2Visitors

ALPN = ["h2", "http/1.1"]


class PublicSide:
    """Protocol factory of the public listener, and the set of open visitors' connections."""

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self.connections: set[H1Visitor | H2Visitors] = set()

    def new_connection(self) -> asyncio.Protocol:
        """Make the protocol of one accepted connection."""
        return _Chooser(self)

    def finish(self) -> None:
        """Let every connection end with what it is doing."""
        for connection in list(self.connections):
            connection.finish()

    def abort(self) -> None:
        """Drop every connection."""
        for connection in list(self.connections):
            connection.abort()


class _Chooser(asyncio.Protocol):
    """Stands in until the handshake is done."""

    def __init__(self, side: PublicSide) -> None:
        self._side = side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        tls = cast(ssl.SSLObject, transport.get_extra_info("ssl_object"))
        chosen: H1Visitor | H2Visitors
        if tls is not None and tls.selected_alpn_protocol() == "h2":
            chosen = H2Visitors(self._side.roster, self._side.connections)
        else:
            chosen = H1Visitor(self._side.roster, self._side.connections)
        cast(asyncio.Transport, transport).set_protocol(chosen)
        chosen.connection_made(transport)
