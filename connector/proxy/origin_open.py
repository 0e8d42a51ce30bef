"""How a pool's connections come to be: socket, proxy in front of it, PROXY header, TLS; and how they come to an end.

Owns: OriginOpener (the coroutines of one OriginPool).
In: a pool, a user that waits in it. Out: a connection for the pool to settle, or `on_dial_failed` of the user.
Never: keeps connections; which one serves whom is the pool's affair.

Apart from the pool, whose callbacks every request runs through: coroutines stay interpreted in the compiled build.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING, Any, Final

from connector.errors import OriginDialError, OriginError
from connector.proxy.ingress import OriginSettings, Service
from connector.proxy.ingress_services import port_problem
from connector.proxy.origin_dial import OriginDialler
from connector.proxy.origin_proxy import PROXY_ADVICE, ProxyHop
from connector.proxy.origin_tls import ContextCache, connect_error, connect_timeout, tls_error, tls_timeout
from connector.proxy.proxy_protocol import encode_proxy_header

if TYPE_CHECKING:
    from connector.proxy.origins import OriginPool, OriginUser

H2_KEY: Final = "\0h2"
"""Key of connections that offer HTTP/2; it is not a name, so that it cannot be a key of `matchSNItoHost`."""


class OriginOpener:
    """The way to one rule's origin.

    The constructor raises ConfigError when `caPool` cannot be read.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        service: Service,
        settings: OriginSettings,
        contexts: ContextCache,
        hop: ProxyHop | None,
    ) -> None:
        self._loop = loop
        self._service = service
        self._settings = settings
        self._hop = hop
        self.offers_http2 = (
            service.tls and settings.http2_origin and not settings.match_sni_to_host and not settings.proxy_protocol
        )
        self.context = contexts.get(service, settings)
        """TLS of connections; None for plain ones."""
        self.http2_context = contexts.get(service, settings, http2=True) if self.offers_http2 else None
        self._server_name = settings.origin_server_name or service.host or "localhost"
        if hop is not None and hop.over_tls:
            self.context, self._server_name = ssl.create_default_context(), hop.proxy.host
        self._target = service if hop is None else hop.service
        self.dialler = OriginDialler(loop, self._target, settings)
        self.direct = self.context is None and hop is None and settings.connect_timeout >= 0
        """Whether a connected socket is all that a connection takes."""

    async def dial(self, pool: OriginPool, user: OriginUser, key: str) -> None:
        """Make a connection for a user that waits in `pool`, or tell why there is none."""
        try:
            await self.connect(pool, user, key)
        except OriginError as error:
            failed = error
        except Exception as error:  # whatever it was: a user that waits is never left without an answer
            self._loop.call_exception_handler({"message": "dialling an origin raised", "exception": error})
            failed = OriginDialError(
                f"origin {self._service.text}: cannot connect: {type(error).__name__}: {error}",
                advice="this is a bug in the connector; please report it with this line",
            )
        else:
            return
        if pool.no_longer_waits(user):
            user.on_dial_failed(failed)

    async def connect(self, pool: OriginPool, user: OriginUser, key: str) -> None:
        """Make a connection. Errors: OriginError."""
        service, hop = self._service, self._hop
        if hopeless := port_problem(service):
            raise OriginDialError(f"origin {service.text}: {hopeless}", advice="correct the service of the rule")
        if hop is not None and hop.problem:
            raise OriginDialError(f"origin {service.text}: {hop.problem}", advice=PROXY_ADVICE)
        limit = self._settings.connect_timeout
        tried: list[str] = []
        try:
            async with asyncio.timeout(limit or None):
                sock = await self.dialler.open(tried)
                if hop is not None:
                    sock = await hop.shake_hands(sock, service)
                if self.context is not None and user.client is not None:  # in front of TLS
                    await self._introduce(sock, user.client)
        except TimeoutError:
            raise connect_timeout(self._target, limit, tried) from None
        except (OSError, UnicodeError) as error:
            problem = error if isinstance(error, OSError) else socket.gaierror(0, "not a valid host name")
            failed = connect_error(self._target, problem, tried)
            if hop is not None:
                failed.advice = PROXY_ADVICE
            raise failed from None
        if self.context is None:
            pool.settle(pool.attach(sock, key, None, user.client), user)
            return
        name = key if key and key != H2_KEY else self._server_name
        try:
            async with asyncio.timeout(self._settings.tls_timeout or None):
                await self._wrap(pool, sock, user, key, name)
        except TimeoutError:
            raise tls_timeout(service, self._settings.tls_timeout) from None
        except (OSError, ssl.SSLError, ValueError) as error:
            raise tls_error(service, error, name) from None

    async def _introduce(self, sock: socket.socket, client: str) -> None:
        """Send the PROXY header: at most 52 bytes into an empty buffer."""
        try:
            await self._loop.sock_sendall(sock, encode_proxy_header(client, sock.getpeername()))
        except BaseException:
            sock.close()
            raise

    async def _wrap(self, pool: OriginPool, sock: socket.socket, user: OriginUser, key: str, name: str) -> None:
        """Turn a connected socket into an OriginConnection with TLS."""
        make: Any = self._loop.create_unix_connection if self._service.path else self._loop.create_connection
        connection = pool.prepare(key, user)
        context = self.http2_context if key == H2_KEY else self.context
        try:
            await make(lambda: connection, sock=sock, ssl=context, server_hostname=name)
        except BaseException:
            connection.disown(ConnectionAbortedError("the dial was ended"))
            sock.close()
            raise


async def wait_closed(pool: OriginPool) -> None:
    """Wait until no dial of `pool` runs and no connection is open."""
    if dials := pool.dials():
        await asyncio.wait(dials)
    if pool.open:
        await asyncio.shield(pool.when_empty())
