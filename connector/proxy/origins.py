"""Connections to one rule's origin: dialled by a short task, kept alive and reused by callbacks.

Owns: OriginPool (idle connections, waiting users, dials in flight) and OriginConnection (a StreamUser).
In: an OriginUser that wants a connection. Out: a connection, at once or later; OriginError.
Never: knows HTTP; it moves bytes and says when a connection is gone.

*Strategy*: `acquire` answers at once from the idle stack (last in, first out), or with a new connection where one can
be had at once. Otherwise one task dials for this user; a connection released meanwhile goes to the user that waits
longest, and the dial's own fruit then becomes idle. One `call_at` per pool ends connections that idled too long. Plain
connections are SocketStreams, those with TLS the loop's own transports.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Protocol, cast

from connector.errors import OriginError
from connector.protocol.ports import Buffer
from connector.proxy import limits
from connector.proxy.ingress import OriginSettings, Service
from connector.proxy.origin_open import H2_KEY, OriginOpener, wait_closed
from connector.proxy.origin_proxy import ProxyHop
from connector.proxy.origin_tls import ContextCache
from connector.proxy.proxy_protocol import encode_proxy_header
from connector.transport.streams import ByteStream, SocketStream, StreamUser

_HANGUP: Final = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


class OriginUser(Protocol):
    """One exchange, as seen by its origin connection. No call blocks or raises."""

    client: str | None
    """The eyeball's address (maybe empty) for a PROXY header; None for none. Such a user always gets a connection of
    its own, and nobody else gets it afterwards: acquire with `fresh`, never release."""

    def on_connected(self, connection: OriginConnection) -> None:
        """Take the connection that `acquire` promised."""

    def on_dial_failed(self, error: OriginError) -> None:
        """No connection will come."""

    def on_origin_data(self, data: Buffer) -> None:
        """Take what the origin sent. Borrowed: valid only during the call."""

    def on_origin_eof(self) -> bool:
        """Take the end of what the origin sends; return whether the connection stays open for writing."""

    def on_origin_lost(self, error: Exception | None) -> None:
        """The connection is gone. Not called after `release` or `abort`."""

    def on_origin_full(self) -> None:
        """The origin takes no more now: hold credit back."""

    def on_origin_ready(self) -> None:
        """The origin takes more again."""


class Multiplexer(Protocol):
    """What shares connections of a pool among exchanges: `http2_origin.Http2Origins`."""

    def close(self) -> None:
        """End idle connections; the others with their last exchange."""


class OriginConnection:
    """One connection to an origin, used by one exchange at a time.

    The user writes with `write` and stops reading with `transport.pause_reading`; it gives the connection
    back with `pool.release` or ends it with `abort`.
    """

    __slots__ = ("_intended", "idle_since", "key", "pool", "transport", "user", "uses", "write")

    transport: ByteStream
    write: Callable[[Buffer], None]
    """Send borrowed bytes."""

    def __init__(self, pool: OriginPool, key: str, intended: OriginUser | None = None) -> None:
        self.pool = pool
        self.key = key
        self.user: OriginUser | None = None
        self.uses = 0
        self._intended = intended
        self.idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Hand the connection to its user, or keep it."""
        self.transport = cast("ByteStream", transport)
        self.transport.set_write_buffer_limits(high=limits.ORIGIN_HIGH_WATER)
        self.write = self._write_copy
        self.pool.opened(self, self._intended)
        # Not at once: a transport may not be paused or aborted yet (uvloop). Nothing can arrive before, except what
        # came along with a TLS handshake.
        self.pool.call_soon(self._settle)

    def attach(self, stream: ByteStream, user: OriginUser | None) -> None:
        """Take a plain stream that was just made, for `user` if it is the only one who may have it."""
        self.transport = stream
        self.write = stream.write
        stream.set_write_buffer_limits(high=limits.ORIGIN_HIGH_WATER)
        self._intended = None
        self.user = user
        self.uses = user is not None

    def write_all(self, chunks: Sequence[Buffer]) -> None:
        """Send several borrowed buffers as one."""
        stream = self.transport
        if isinstance(stream, SocketStream):
            stream.write_all(chunks)
        else:
            stream.write(b"".join(chunks))

    def _write_copy(self, data: Buffer) -> None:
        """Send bytes through a transport that keeps what it cannot send at once."""
        self.transport.write(bytes(data))

    def _settle(self) -> None:
        """Give a new connection to the user that it was dialled for, or to the next."""
        intended, self._intended = self._intended, None
        if intended is not None:
            self.pool.settle(self, intended)

    def data_received(self, data: Buffer) -> None:
        """Pass bytes to the user; without one the connection is of no more use."""
        user = self.user
        if user is not None:
            user.on_origin_data(data)
        elif self._intended is not None:
            self._settle()
            self._successor().data_received(bytes(data))
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

    def _successor(self) -> StreamUser:
        """Return who gets what the transport brings: a user may have put its own protocol there when it was settled."""
        return cast("StreamUser", self.transport.get_protocol())

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

    `contexts` shares TLS contexts with the other rules of a set. The constructor raises ConfigError when `caPool`
    cannot be read. `close` ends idle connections and lets users finish.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        service: Service,
        settings: OriginSettings,
        contexts: ContextCache | None = None,
        hop: ProxyHop | None = None,
    ) -> None:
        self.service = service
        self.hop = hop
        """The proxy in front of the origin."""
        self.settings = settings
        self._loop = loop
        self.call_soon = loop.call_soon
        self.opener = OriginOpener(loop, service, settings, contexts or ContextCache(), hop)
        self._direct = self.opener.direct
        self._dialler = self.opener.dialler
        self.offers_http2 = self.opener.offers_http2
        self.http2: Multiplexer | None = None
        self._idle: dict[str, list[OriginConnection]] = {}
        self._idle_count = 0
        self._open: set[OriginConnection] = set()
        self._waiting: dict[OriginUser, tuple[str, asyncio.Task[None] | None, bool]] = {}
        self._dials: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._emptied: asyncio.Future[None] | None = None
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
        """Tasks that dial or look a name up."""
        return len(self.dials())

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
        """Return an idle connection or a new one, or None and dial: `on_connected` or `on_dial_failed` follows.

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
        if self._direct:
            sock = self._dialler.maybe_open()
            if sock is not None:
                return self.attach(sock, key, user)
        task = self._loop.create_task(self.opener.dial(self, user, key))
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
        if self._dialler.looking_up is not None:
            self._dialler.looking_up.cancel()
        for connection in list(self._open):
            connection.abort()

    def wait_closed(self) -> Coroutine[Any, Any, None]:
        """Wait until no dial runs and no connection is open."""
        return wait_closed(self)

    def dials(self) -> set[asyncio.Task[Any]]:
        """Return the tasks that dial or look a name up."""
        lookup = self._dialler.looking_up
        return self._dials if lookup is None else {*self._dials, lookup}

    def when_empty(self) -> asyncio.Future[None]:
        """Return what is done when the last connection is lost; ask while there is one."""
        if self._emptied is None:
            self._emptied = self._loop.create_future()
        return self._emptied

    # -- called by the opener

    def no_longer_waits(self, user: OriginUser) -> bool:
        """Forget a user whose dial failed; False for one that left, or was served, before."""
        return self._waiting.pop(user, None) is not None

    def prepare(self, key: str, user: OriginUser) -> OriginConnection:
        """Return a connection that is about to be made for `user`."""
        return OriginConnection(self, key, user)

    def attach(
        self, sock: socket.socket, key: str, user: OriginUser | None, client: str | None = None
    ) -> OriginConnection:
        """Make a connection of a plain socket, with a PROXY header on its way for a user who wants one."""
        connection = OriginConnection(self, key)
        stream = SocketStream(self._loop, sock, connection)
        connection.attach(stream, user)
        self._open.add(connection)
        self.dialled += 1
        client = client if user is None else user.client
        if client is not None:
            stream.write(encode_proxy_header(client, stream.get_extra_info("peername") or ""))
        return connection

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
