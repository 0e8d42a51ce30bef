"""Connections to one rule's origin: dialled by a short task, kept alive and reused by callbacks.

Owns: OriginPool (idle connections, waiting users, dials in flight) and OriginConnection (an asyncio Protocol).
In: an OriginUser that wants a connection. Out: a connection, at once or later; OriginError.
Never: knows HTTP; it moves bytes and says when a connection is gone.

*Strategy*: `acquire` answers at once from the idle stack (last in, first out). Otherwise one task dials for this user;
a connection released meanwhile goes to the user that waits longest, and the dial's own fruit then becomes idle. One
`call_at` per pool ends connections that idled too long.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import select
import socket
import ssl
from typing import Any, Final, Protocol, cast

from connector.errors import OriginDialError, OriginError
from connector.proxy import limits
from connector.proxy.ingress import OriginSettings, Service
from connector.proxy.ingress_services import port_problem
from connector.proxy.origin_proxy import PROXY_ADVICE, ProxyHop
from connector.proxy.origin_tls import connect_error, connect_timeout, origin_context, tls_error, tls_timeout
from connector.proxy.proxy_protocol import encode_proxy_header
from connector.transport.lookup import look_up

_HANGUP: Final = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR

AddressInfo = tuple[Any, ...]


class OriginUser(Protocol):
    """One exchange, as seen by its origin connection. No call blocks or raises."""

    client: str | None
    """The eyeball's address (maybe empty) for a PROXY header; None for none. Such a user always gets a connection of
    its own, and nobody else gets it afterwards: acquire with `fresh`, never release."""

    def on_connected(self, connection: OriginConnection) -> None:
        """Take the connection that `acquire` promised."""

    def on_dial_failed(self, error: OriginError) -> None:
        """No connection will come."""

    def on_origin_data(self, data: bytes) -> None:
        """Take what the origin sent."""

    def on_origin_eof(self) -> bool:
        """Take the end of what the origin sends; return whether the connection stays open for writing."""

    def on_origin_lost(self, error: Exception | None) -> None:
        """The connection is gone. Not called after `release` or `abort`."""

    def on_origin_full(self) -> None:
        """The origin takes no more now: hold credit back."""

    def on_origin_ready(self) -> None:
        """The origin takes more again."""


H2_KEY: Final = "\0h2"
"""Key of connections that offer HTTP/2; it is not a name, so that it cannot be a key of `matchSNItoHost`."""


class Multiplexer(Protocol):
    """What shares connections of a pool among exchanges: `http2_origin.Http2Origins`."""

    def close(self) -> None:
        """End idle connections; the others with their last exchange."""


class OriginConnection(asyncio.Protocol):
    """One connection to an origin, used by one exchange at a time.

    The user writes with `transport.write` and stops reading with `transport.pause_reading`; it gives the connection
    back with `pool.release` or ends it with `abort`.
    """

    __slots__ = ("_intended", "idle_since", "key", "pool", "transport", "user", "uses")

    transport: asyncio.Transport

    def __init__(self, pool: OriginPool, key: str, intended: OriginUser) -> None:
        self.pool = pool
        self.key = key
        self.user: OriginUser | None = None
        self.uses = 0
        self._intended: OriginUser | None = intended
        self.idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Hand the connection to its user, or keep it."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=limits.ORIGIN_HIGH_WATER)
        self.pool.opened(self, self._intended)
        # Not at once: a transport may not be paused or aborted yet (uvloop). Nothing can arrive before, except what
        # came along with a TLS handshake.
        self.pool.call_soon(self._settle)

    def _settle(self) -> None:
        """Give a new connection to the user that it was dialled for, or to the next."""
        intended, self._intended = self._intended, None
        if intended is not None:
            self.pool.settle(self, intended)

    def data_received(self, data: bytes) -> None:
        """Pass bytes to the user; without one the connection is of no more use."""
        user = self.user
        if user is not None:
            user.on_origin_data(data)
        elif self._intended is not None:
            self._settle()
            self._successor().data_received(data)
        else:
            # Nobody asked: a time-out message, or garbage behind the last answer.
            self.transport.abort()

    def eof_received(self) -> bool:
        """Pass the end on."""
        if self._intended is not None:
            self._settle()
            if self._successor() is not self:
                return bool(self._successor().eof_received())
        user = self.user
        return user.on_origin_eof() if user is not None else False

    def connection_lost(self, error: Exception | None) -> None:
        """Pass the loss on."""
        if self._intended is not None:
            self._settle()
            if self._successor() is not self:
                self._successor().connection_lost(error)
                return
        self.pool.lost(self)
        user, self.user = self.user, None
        if user is not None:
            user.on_origin_lost(error)

    def _successor(self) -> asyncio.Protocol:
        """Return who gets what the transport brings: a user may have put its own protocol there when it was settled."""
        return cast("asyncio.Protocol", self.transport.get_protocol())

    def pause_writing(self) -> None:
        """Tell the user that the origin is slow."""
        if self.user is not None:
            self.user.on_origin_full()

    def resume_writing(self) -> None:
        """Tell the user that the origin caught up."""
        if self.user is not None:
            self.user.on_origin_ready()

    def close(self) -> None:
        """End the connection in order. Once: a second time, asyncio of 3.11.2 forgets what `abort` needs."""
        if not self.transport.is_closing():
            self.transport.close()

    def disown(self, error: Exception) -> None:
        """Take it that the dial failed after `connection_made`: uvloop closes the transport then and tells nobody."""
        self._intended = None
        if self.pool.holds(self):
            self.connection_lost(error)

    def abort(self) -> None:
        """End the connection now; the user hears nothing more of it."""
        self.user = None
        self.transport.abort()

    def hung_up(self) -> bool:
        """Ask the kernel whether the origin has closed already, before the loop says so."""
        number = self.transport.get_extra_info("socket").fileno()
        if number < 0:
            return True
        poll = select.poll()
        poll.register(number, _HANGUP)
        return bool(poll.poll(0))


class OriginPool:
    """All connections of one ingress rule.

    A `context` made before for the same settings may be passed in; otherwise the constructor makes one (ConfigError
    when `caPool` cannot be read). `close` ends idle connections and lets users finish.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        service: Service,
        settings: OriginSettings,
        context: ssl.SSLContext | None = None,
        hop: ProxyHop | None = None,
    ) -> None:
        self.service = service
        self.hop = hop
        """The proxy in front of the origin."""
        self.settings = settings
        self._loop = loop
        self.call_soon = loop.call_soon
        self._context = (context or origin_context(settings)) if service.tls else None
        self.offers_http2 = (
            service.tls and settings.http2_origin and not settings.match_sni_to_host and not settings.proxy_protocol
        )
        self._http2_context = origin_context(settings, http2=True) if self.offers_http2 else None
        self.http2: Multiplexer | None = None
        self._server_name = settings.origin_server_name or service.host or "localhost"
        if hop is not None and hop.over_tls:
            self._context, self._server_name = ssl.create_default_context(), hop.proxy.host
        self._dialled = service if hop is None else hop.service
        self._idle: dict[str, list[OriginConnection]] = {}
        self._idle_count = 0
        self._open: set[OriginConnection] = set()
        self._waiting: dict[OriginUser, tuple[str, asyncio.Task[None] | None, bool]] = {}
        self._dials: set[asyncio.Task[Any]] = set()
        self._lookup: asyncio.Task[list[AddressInfo]] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._emptied: asyncio.Future[None] | None = None
        self._literal = _literal_address(self._dialled)
        self.dialled = 0
        """Connections that were ever opened; for tests and metrics."""

    @property
    def idle(self) -> int:
        """Connections that wait for work."""
        return self._idle_count

    @property
    def open(self) -> int:
        """Connections that exist, whatever they do."""
        return len(self._open)

    @property
    def dialling(self) -> int:
        """Tasks that dial."""
        return len(self._dials)

    def key_for(self, host: bytes, *, upgrade: bool = False) -> str:
        """Return what connections for a request's Host must share: the SNI name with `matchSNItoHost`, else nothing."""
        if self.offers_http2:
            return "" if upgrade else H2_KEY
        if not self.service.tls or not self.settings.match_sni_to_host or self.settings.origin_server_name:
            return ""
        name = host.decode("latin-1")
        head, colon, port = name.rpartition(":")
        return head.strip("[]") if colon and port.isdigit() else name

    def acquire(
        self, user: OriginUser, key: str = "", *, fresh: bool = False, careful: bool = False
    ) -> OriginConnection | None:
        """Return an idle connection, or None and dial: `on_connected` or `on_dial_failed` follows.

        `fresh` takes only a new one; `careful` asks the kernel first whether an idle one still stands (for requests
        that cannot be repeated).
        """
        stack = None if fresh else self._idle.get(key)
        while stack:
            connection = stack.pop()
            self._idle_count -= 1
            if connection.transport.is_closing():
                continue
            if careful and connection.hung_up():
                connection.transport.abort()
                continue
            connection.uses += 1
            connection.user = user
            return connection
        task = self._loop.create_task(self._dial(user, key))
        self._dials.add(task)
        task.add_done_callback(self._dials.discard)
        self._waiting[user] = (key, task, fresh)
        return None

    def cancel(self, user: OriginUser) -> None:
        """Forget a user that waits; its dial ends."""
        waiting = self._waiting.pop(user, None)
        if waiting is not None and waiting[1] is not None:
            waiting[1].cancel()

    def release(self, connection: OriginConnection) -> None:
        """Take a connection back that a whole exchange has left clean and reading."""
        connection.user = None
        if connection.transport.is_closing():
            return
        for user, (key, _, fresh) in self._waiting.items():
            if key == connection.key and not fresh:
                self._hand_over(user, connection)
                return
        limit = self.settings.keep_alive_connections or limits.DEFAULT_IDLE_PER_HOST
        if self._closed or self._idle_count >= limit:
            connection.close()
            return
        connection.idle_since = self._loop.time()
        self._idle.setdefault(connection.key, []).append(connection)
        self._idle_count += 1
        if self._timer is None and self.settings.keep_alive_timeout > 0:  # Go: 0 and less mean no limit
            self._timer = self._loop.call_at(connection.idle_since + self.settings.keep_alive_timeout, self._expire)

    def close(self) -> None:
        """End idle connections and keep none from now on; connections in use finish."""
        self._closed = True
        if self.http2 is not None:
            self.http2.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for stack in self._idle.values():
            for connection in stack:
                connection.close()
        self._idle.clear()
        self._idle_count = 0

    def abort(self) -> None:
        """End everything now. Users hear nothing: abort the exchanges first."""
        self.close()
        self._waiting.clear()
        for task in self._dials:
            task.cancel()
        for connection in list(self._open):
            connection.abort()

    async def wait_closed(self) -> None:
        """Wait until no dial runs and no connection is open."""
        if self._dials:
            await asyncio.wait(self._dials)
        if self._open:
            self._emptied = self._emptied or self._loop.create_future()
            await asyncio.shield(self._emptied)

    # -- called by connections

    def opened(self, connection: OriginConnection, intended: OriginUser | None) -> None:
        """Count a new connection. Its dial is as good as done: ending it now would close the transport behind us."""
        self._open.add(connection)
        self.dialled += 1
        if intended is not None and (waiting := self._waiting.get(intended)) is not None:
            self._waiting[intended] = (waiting[0], None, waiting[2])

    def holds(self, connection: OriginConnection) -> bool:
        """Tell whether a connection was opened and not lost."""
        return connection in self._open

    def settle(self, connection: OriginConnection, intended: OriginUser) -> None:
        """Give a new connection to the user that it was dialled for, or to whoever waits, or keep it."""
        if intended in self._waiting:
            self._hand_over(intended, connection)
        elif intended.client is not None:
            connection.abort()
        else:
            self.release(connection)

    def lost(self, connection: OriginConnection) -> None:
        """Forget a connection that ended."""
        self._open.discard(connection)
        stack = self._idle.get(connection.key)
        if stack and connection in stack:
            stack.remove(connection)
            self._idle_count -= 1
        if not self._open and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)

    # -- inside

    def _hand_over(self, user: OriginUser, connection: OriginConnection) -> None:
        del self._waiting[user]
        connection.uses += 1
        connection.user = user
        user.on_connected(connection)

    def _expire(self) -> None:
        """End what idled too long; arm the timer for the next one."""
        self._timer = None
        now = self._loop.time()
        oldest = None
        for key, stack in list(self._idle.items()):
            while stack and stack[0].idle_since + self.settings.keep_alive_timeout <= now:
                self._idle_count -= 1
                stack.pop(0).close()
            if not stack:
                del self._idle[key]
            elif oldest is None or stack[0].idle_since < oldest:
                oldest = stack[0].idle_since
        if oldest is not None:
            self._timer = self._loop.call_at(oldest + self.settings.keep_alive_timeout, self._expire)

    async def _dial(self, user: OriginUser, key: str) -> None:
        try:
            await self._connect(user, key)
        except OriginError as error:
            failed = error
        except Exception as error:  # whatever it was: a user that waits is never left without an answer
            self._loop.call_exception_handler({"message": "dialling an origin raised", "exception": error})
            failed = OriginDialError(
                f"origin {self.service.text}: cannot connect: {type(error).__name__}: {error}",
                advice="this is a bug in the connector; please report it with this line",
            )
        else:
            return
        if self._waiting.pop(user, None) is not None:
            user.on_dial_failed(failed)

    async def _connect(self, user: OriginUser, key: str) -> None:
        if hopeless := port_problem(self.service):
            raise OriginDialError(f"origin {self.service.text}: {hopeless}", advice="correct the service of the rule")
        hop = self.hop
        if hop is not None and hop.problem:
            raise OriginDialError(f"origin {self.service.text}: {hop.problem}", advice=PROXY_ADVICE)
        limit = self.settings.connect_timeout
        tried: list[str] = []
        try:
            async with asyncio.timeout(limit or None):
                sock = await (self._open_unix() if self.service.path else self._open_tcp(tried))
                if hop is not None:
                    sock = await hop.shake_hands(sock, self.service)
                if user.client is not None:  # in front of TLS, too
                    await self._introduce(sock, user.client)
        except TimeoutError:
            raise connect_timeout(self._dialled, limit, tried) from None
        except (OSError, UnicodeError) as error:
            problem = error if isinstance(error, OSError) else socket.gaierror(0, "not a valid host name")
            failed = connect_error(self._dialled, problem, tried)
            if hop is not None:
                failed.advice = PROXY_ADVICE
            raise failed from None
        name = (key if key and key != H2_KEY else self._server_name) if self._context else None
        try:
            async with asyncio.timeout((self.settings.tls_timeout or None) if self._context else None):
                await self._wrap(sock, user, key, name)
        except TimeoutError:
            raise tls_timeout(self.service, self.settings.tls_timeout) from None
        except (OSError, ssl.SSLError, ValueError) as error:
            raise tls_error(self.service, error, name or "") from None

    async def _introduce(self, sock: socket.socket, client: str) -> None:
        """Send the PROXY header: at most 52 bytes into an empty buffer."""
        try:
            await self._loop.sock_sendall(sock, encode_proxy_header(client, sock.getpeername()))
        except BaseException:
            sock.close()
            raise

    async def _wrap(self, sock: socket.socket, user: OriginUser, key: str, name: str | None) -> None:
        """Turn a connected socket into an OriginConnection, after a TLS handshake where one is due."""
        make = self._loop.create_unix_connection if self.service.path else self._loop.create_connection
        connection = OriginConnection(self, key, user)
        context = self._http2_context if key == H2_KEY else self._context
        try:
            await make(lambda: connection, sock=sock, ssl=context, server_hostname=name)
        except BaseException:
            connection.disown(ConnectionAbortedError("the dial was ended"))
            sock.close()
            raise

    async def _open_unix(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        return await self._connect_socket(sock, self.service.path)

    async def _open_tcp(self, tried: list[str]) -> socket.socket:
        if self._literal is not None:
            infos: list[AddressInfo] = [self._literal]
        else:
            infos = _interleave(await self._look_up())
        return await self._open_in_turn(infos, tried)

    async def _look_up(self) -> list[AddressInfo]:
        """Resolve the service's name; dials that start meanwhile share the answer (a lookup occupies a thread)."""
        lookup = self._lookup
        if lookup is None:
            service = self._dialled
            lookup = self._lookup = self._loop.create_task(
                _resolve(service.host, service.port), name=f"look up {service.host}"
            )
            self._dials.add(lookup)
            lookup.add_done_callback(self._looked_up)
        return await asyncio.shield(lookup)

    def _looked_up(self, lookup: asyncio.Task[list[AddressInfo]]) -> None:
        self._dials.discard(lookup)
        self._lookup = None
        if not lookup.cancelled():
            lookup.exception()  # whoever still waits has it; nobody may

    async def _open_in_turn(self, infos: list[AddressInfo], tried: list[str]) -> socket.socket:
        """Try addresses one after the other; start a race as soon as one is slow."""
        problem: OSError = socket.gaierror(0, "the name has no address")
        for number, info in enumerate(infos):
            rest = infos[number + 1 :]
            hurry = rest and not self.settings.no_happy_eyeballs
            try:
                async with asyncio.timeout(limits.HAPPY_EYEBALLS_DELAY if hurry else None):
                    return await self._open_one(info, tried)
            except TimeoutError as error:
                if hurry:
                    return await self._open_race([*rest, info], tried)
                problem = error
            except OSError as error:
                problem = error
        raise problem

    async def _open_race(self, infos: list[AddressInfo], tried: list[str]) -> socket.socket:
        """Try addresses side by side, the next one when the last failed or is slow (RFC 8305 section 5)."""
        running: set[asyncio.Task[socket.socket]] = set()
        problem: OSError | None = None
        queue = list(infos)
        try:
            while queue or running:
                if queue:
                    running.add(self._loop.create_task(self._open_one(queue.pop(0), tried)))
                done, running = await asyncio.wait(
                    running,
                    timeout=limits.HAPPY_EYEBALLS_DELAY if queue else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                won = None
                for task in done:
                    error = task.exception()
                    if error is None and won is None:
                        won = task.result()
                    elif error is None:
                        task.result().close()
                    elif isinstance(error, OSError):
                        problem = problem or error
                    else:
                        raise error
                if won is not None:
                    return won
        finally:
            for task in running:
                task.cancel()
                task.add_done_callback(_close_result)
        assert problem is not None
        raise problem

    async def _open_one(self, info: AddressInfo, tried: list[str]) -> socket.socket:
        family, kind, protocol, _, address = info
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        label = f"{host}:{address[1]}"
        if label not in tried:
            tried.append(label)
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        period = math.ceil(self.settings.tcp_keep_alive) or 15  # Go: 0 means 15 s, below 0 off
        if period > 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), min(period, 32_767))
        return await self._connect_socket(sock, address)

    async def _connect_socket(self, sock: socket.socket, address: Any) -> socket.socket:
        sock.setblocking(False)
        try:
            await self._loop.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        return sock


async def _resolve(host: str, port: int) -> list[AddressInfo]:
    return await look_up(host, port)


def _close_result(task: asyncio.Task[socket.socket]) -> None:
    """Close the socket of a dial that lost a race in the same moment."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


def _literal_address(service: Service) -> AddressInfo | None:
    """Return the address of an IP literal: no lookup, no thread."""
    try:
        address = ipaddress.ip_address(service.host)
    except ValueError:
        return None
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    where = (service.host, service.port, 0, 0) if address.version == 6 else (service.host, service.port)
    return (family, socket.SOCK_STREAM, 0, "", where)


def _interleave(infos: list[AddressInfo]) -> list[AddressInfo]:
    """Return addresses with the families alternating, the resolver's first one first (RFC 8305 section 4)."""
    if not infos:
        return []
    first = [info for info in infos if info[0] == infos[0][0]]
    second = [info for info in infos if info[0] != infos[0][0]]
    mixed = [info for pair in zip(first, second, strict=False) for info in pair]
    return mixed + first[len(second) :] + second[len(first) :]
