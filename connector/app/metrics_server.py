"""The metrics address: a small HTTP/1.1 server for probes, Prometheus and `tunnel diag`.

Owns: the listening sockets, their connections and limits; which address is taken. In: Routes. Out: answers.
Never: knows what a page says; reads a request body; imports more than the connector has loaded anyway (an HTTP
framework costs a quarter of a second of start-up).
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import socket
from collections.abc import Awaitable
from typing import cast

import httptools

from connector.app.answers import NOT_FOUND, Answer, Routes, split_target
from connector.app.config import default_metrics_address, split_address
from connector.app.logs import Logger
from connector.errors import ConfigError

KNOWN_PORTS = (20241, 20242, 20243, 20244, 20245)
"""Tried in order at the default address, so that `tunnel diag` finds the process; a random port beyond them."""

REQUEST_SECONDS = 10.0
"""What a request, an answer that the client must take, and a pause between requests may take. cloudflared: 10 s."""

MAX_CONNECTIONS = 64
"""Probes and scrapers are a handful; whoever comes beyond is closed at once."""

MAX_HEAD = 32 * 1024
"""Bytes of one read and of a whole request. Heads: nginx 4 x 8 KiB; nobody has to send a body."""

_REASONS = {200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
            500: "Internal Server Error", 503: "Service Unavailable"}  # fmt: skip


def known_addresses() -> list[str]:
    """Give the addresses at which a connector that was not told otherwise may be found."""
    host = default_metrics_address().rpartition(":")[0]
    return [f"{host}:{port}" for port in KNOWN_PORTS]


class MetricsServer:
    """Serves until closed: `async with MetricsServer(...)`. No task of its own; one per answer that takes long."""

    __slots__ = ("_address", "_connections", "_log", "_routes", "_server", "address")

    def __init__(self, address: str, routes: Routes, log: Logger) -> None:
        self._address = address
        self._routes = routes
        self._log = log
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self.address = address
        """Where it listens, with the real port; valid inside `async with`."""

    async def __aenter__(self) -> MetricsServer:
        sock = _listen(self._address)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(loop, self._routes, self), sock=sock)
        host, port = sock.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.abort()

    def admit(self, connection: _Connection) -> bool:
        """Take a new connection if there is room."""
        if len(self._connections) >= MAX_CONNECTIONS:
            return False
        self._connections.add(connection)
        return True

    def leave(self, connection: _Connection) -> None:
        """Forget a connection."""
        self._connections.discard(connection)

    def failed(self, path: str, error: Exception) -> None:
        """Report a page that raised."""
        self._log.bug(f"Cannot answer {path} at the metrics address", error)


def _listen(address: str) -> socket.socket:
    """Give a listening socket. Errors: ConfigError, when the address is taken or not this machine's."""
    if address == default_metrics_address():
        host = address.rpartition(":")[0]
        for port in (*KNOWN_PORTS, 0):
            try:
                return _bind(host, port)
            except OSError as failure:
                error = failure
    else:
        host, port = split_address(address, "--metrics", any_host=True)
        try:
            return _bind(host, port)
        except OSError as failure:
            error = failure
    raise ConfigError(
        f"Error opening metrics server listener: failed to bind to address ({address}): {error.strerror or str(error)}",
        advice="Another process may use this port: give another one with --metrics HOST:PORT.",
    )


def _bind(host: str, port: int) -> socket.socket:
    """Bind as Go does: no host and 0.0.0.0 are everything in both IP versions, localhost is IPv4."""
    if host in {"", "0.0.0.0", "::"}:
        if socket.has_dualstack_ipv6():
            try:
                return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
            except OSError as error:
                if host == "::" or getattr(error, "errno", None) not in _NO_IPV6:
                    raise
        return socket.create_server(("0.0.0.0", port), backlog=128)
    if host == "localhost":
        return socket.create_server(("127.0.0.1", port), backlog=128)
    family, _, _, _, sockaddr = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(sockaddr[:2], family=family, backlog=128)


class _Connection(asyncio.Protocol):
    """One client. Requests are answered in order, one at a time; what comes early waits in the socket."""

    def __init__(self, loop: asyncio.AbstractEventLoop, routes: Routes, server: MetricsServer) -> None:
        self._loop = loop
        self._routes = routes
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._url = b""
        self._head_bytes = 0
        self._later: list[tuple[str, str, bool]] = []
        self._full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if not self._server.admit(self):
            self._transport.abort()
            return
        self._arm()

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD:
            self._refuse()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # an offer; it is not taken
        except httptools.HttpParserError:
            self._refuse()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.leave(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        self._transport = None

    def pause_writing(self) -> None:
        """The client does not take its answers: read no more requests."""
        self._full = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It takes them again."""
        self._full = False
        self._go_on()

    def abort(self) -> None:
        """End at once."""
        if self._transport is not None:
            self._transport.abort()

    # -- httptools

    def on_message_begin(self) -> None:
        self._url = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        method = self._parser.get_method().decode("latin-1")
        request = (method, self._url.decode("latin-1"), self._parser.should_keep_alive())
        if self._task is not None or self._full:
            self._later.append(request)  # bounded: a head's worth of pipelined requests
            if self._transport is not None:
                self._transport.pause_reading()
        else:
            self._answer(*request)

    # -- inside

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(REQUEST_SECONDS, self.abort)

    def _refuse(self) -> None:
        if self._transport is not None:
            self._send(Answer(400, b"400 Bad Request"), head_only=False, keep=False)

    def _answer(self, method: str, target: str, keep: bool) -> None:
        path, query = split_target(target)
        page = self._routes.get(path)
        answer: Answer | Awaitable[Answer]
        try:
            answer = NOT_FOUND if page is None else page(query)
        except Exception as error:
            self._server.failed(path, error)
            answer = Answer(500, b"internal error\n")
        if inspect.isawaitable(answer):
            if self._timer is not None:
                self._timer.cancel()  # the page has limits of its own
            self._task = self._loop.create_task(self._wait(path, answer, method == "HEAD", keep))
        else:
            assert isinstance(answer, Answer)
            self._send(answer, head_only=method == "HEAD", keep=keep)

    async def _wait(self, path: str, answer: Awaitable[Answer], head_only: bool, keep: bool) -> None:
        try:
            made = await answer
        except Exception as error:
            self._server.failed(path, error)
            made = Answer(500, b"internal error\n")
        self._task = None
        self._send(made, head_only=head_only, keep=keep)
        self._go_on()

    def _go_on(self) -> None:
        """Answer what waits, as long as the client takes it; then read on."""
        while self._later and self._task is None and not self._full and self._transport is not None:
            self._answer(*self._later.pop(0))
        idle = not self._later and self._task is None and not self._full
        if idle and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _send(self, answer: Answer, *, head_only: bool, keep: bool) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._arm()
        lines = [
            f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, '')}",
            f"Content-Type: {answer.content_type}",
            f"Content-Length: {len(answer.body)}",
            *(f"{name}: {value}" for name, value in answer.headers),
            *(() if keep else ("Connection: close",)),
        ]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        transport.write(head if head_only else head + answer.body)
        if not keep:
            transport.close()


_NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})
"""What bind says where this machine has no IPv6."""
