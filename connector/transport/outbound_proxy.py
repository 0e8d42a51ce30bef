"""TCP to the edge through an office's proxy: HTTP CONNECT, or SOCKS5.

Owns: which proxy the environment names for an address (HTTPS_PROXY, ALL_PROXY, NO_PROXY), and both handshakes.
In: an environment, an address. Out: OutboundProxy; a connected socket, as if it had been dialled; EdgeDialError.
Never: carries QUIC (no such proxy is common), sends a password to anybody but the proxy, or shows it in an error.

*Strategy*: the handshake runs on the bare socket before anybody else sees it. The edge says nothing before the TLS
hello, so whatever follows the proxy's answer at once is an error, and no byte can be lost to a buffer.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from connector.errors import ConfigError, EdgeDialError
from connector.transport.link import dial_tcp, format_address

MAX_ANSWER = 16 * 1024
"""Bytes of a proxy's answer to CONNECT; real ones have some hundred, and a page of HTML may follow a refusal."""

DEFAULT_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}

PROXY_ADVICE = "Check the proxy named by HTTPS_PROXY or --edge-proxy, or exempt the edge with NO_PROXY=argotunnel.com."


class OutboundProxy(NamedTuple):
    """A proxy. `repr` and `str` do not show the password."""

    scheme: str
    host: str
    port: int
    user: str = ""
    password: str = ""

    def __repr__(self) -> str:
        return f"{self.scheme}://{format_address(self.host, self.port)}"

    def __str__(self) -> str:
        return repr(self)


def parse_proxy(text: str, source: str) -> OutboundProxy:
    """Read a proxy's URL; without a scheme it is http, as curl and Go have it. ConfigError names `source`."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit("")
    if not host or parts.scheme not in DEFAULT_PORTS:
        raise ConfigError(
            f"{source} names no proxy that can be used",  # not its text, which may hold a password
            advice="Write http://HOST:PORT, https://HOST:PORT or socks5://HOST:PORT, with USER:PASSWORD@ if needed.",
        )
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return OutboundProxy(parts.scheme, host, port or DEFAULT_PORTS[parts.scheme], user, password)


def proxy_from_environment(environ: Mapping[str, str]) -> OutboundProxy | None:
    """Give the proxy for the edge: HTTPS_PROXY, then ALL_PROXY, in either case. Errors: ConfigError."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        if text := environ.get(name, ""):
            return parse_proxy(text, name)
    return None


def exempt(host: str, environ: Mapping[str, str], *, also: Iterable[str] = ()) -> bool:
    """Whether NO_PROXY (or its being this machine) keeps `host` from the proxy; `also` are other names of it.

    Entries: `*`, a domain (with all below it), an address, a network such as 10.0.0.0/8; each may end with a port,
    which is ignored.
    """
    address = _maybe_address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    names = [name.lower().rstrip(".") for name in (host, *also)]
    for entry in (environ.get("NO_PROXY") or environ.get("no_proxy") or "").split(","):
        text = entry.strip().lower()
        if text == "*":
            return True
        if not text:
            continue
        if address is not None and _holds(text, address):
            return True
        domain = text.removeprefix("*").lstrip(".")
        if ":" in domain and domain.count(":") == 1:
            domain = domain.partition(":")[0]
        if any(name == domain or name.endswith("." + domain) for name in names):
            return True
    return False


def _maybe_address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _holds(text: str, address: IPv4Address | IPv6Address) -> bool:
    try:
        return address in ip_network(text, strict=False)
    except ValueError:
        return False


async def dial_through(
    proxy: OutboundProxy,
    host: str,
    port: int,
    *,
    local_address: tuple[str, int] | None = None,
    timeout: float = 15.0,
) -> socket.socket:
    """Return a socket that reaches `host:port` through `proxy`. Errors: EdgeDialError that says whose fault it was."""
    try:
        async with asyncio.timeout(timeout):
            try:
                sock = await dial_tcp(proxy.host, proxy.port, local_address=local_address, timeout=timeout)
            except EdgeDialError as error:
                raise EdgeDialError(f"the proxy {proxy} cannot be reached: {error}", advice=PROXY_ADVICE) from None
            try:
                return await shake_hands(sock, proxy, host, port)
            except BaseException:
                sock.close()
                raise
    except TimeoutError:
        raise EdgeDialError(
            f"the proxy {proxy} did not connect to {format_address(host, port)} within {timeout:g} seconds",
            advice=PROXY_ADVICE,
        ) from None
    except OSError as error:
        raise EdgeDialError(
            f"the proxy {proxy} broke the connection: {error.strerror or error}", advice=PROXY_ADVICE
        ) from None


async def shake_hands(sock: socket.socket, proxy: OutboundProxy, host: str, port: int) -> socket.socket:
    """Ask the proxy at the other end of `sock` for `host:port`; return the socket that leads there, often the same.

    Errors: EdgeDialError; OSError where the proxy breaks the connection.
    """
    if proxy.scheme in {"socks5", "socks5h"}:
        await _socks(sock, proxy, host, port)
    elif proxy.scheme == "https":
        return await _connect_over_tls(sock, proxy, host, port)
    else:
        await _connect(sock, proxy, host, port)
    return sock


# -- HTTP CONNECT (RFC 9110 section 9.3.6)


def _connect_request(proxy: OutboundProxy, host: str, port: int) -> bytes:
    target = format_address(host, port)
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.user or proxy.password:
        secret = base64.b64encode(f"{proxy.user}:{proxy.password}".encode()).decode()
        lines.append(f"Proxy-Authorization: Basic {secret}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _connect(sock: socket.socket, proxy: OutboundProxy, host: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, _connect_request(proxy, host, port))
    answer = b""
    while b"\r\n\r\n" not in answer and b"\n\n" not in answer:
        data = await loop.sock_recv(sock, 4096)
        if not data:
            raise EdgeDialError(f"the proxy {proxy} closed the connection without an answer", advice=PROXY_ADVICE)
        answer += data
        if len(answer) > MAX_ANSWER:
            break
    _check_answer(answer, proxy, format_address(host, port))


def _check_answer(answer: bytes, proxy: OutboundProxy, target: str) -> None:
    """Raise EdgeDialError unless a proxy's answer says that the tunnel stands."""
    head = answer.replace(b"\r\n", b"\n").partition(b"\n\n")
    words = head[0].partition(b"\n")[0].decode("latin-1").split(None, 2)
    if len(words) < 2 or not words[0].startswith("HTTP/") or not words[1].isdigit() or len(answer) > MAX_ANSWER:
        raise EdgeDialError(f"the proxy {proxy} does not answer in HTTP", advice=PROXY_ADVICE)
    status, reason = int(words[1]), words[2][:100] if len(words) > 2 else ""
    if status == 407:
        raise EdgeDialError(
            f"the proxy {proxy} wants other credentials: {status} {reason}".rstrip(),
            advice="Write USER:PASSWORD@ into the proxy's URL; only Basic is spoken here.",
        )
    if not 200 <= status < 300:
        raise EdgeDialError(
            f"the proxy {proxy} refuses to connect to {target}: {status} {reason}".rstrip(),
            advice="Ask for port 7844 of Cloudflare's edge (argotunnel.com) to be allowed for CONNECT.",
        )
    if head[2]:
        raise EdgeDialError(f"the proxy {proxy} sent data of its own after its answer", advice=PROXY_ADVICE)


async def _connect_over_tls(sock: socket.socket, proxy: OutboundProxy, host: str, port: int) -> socket.socket:
    """Speak CONNECT over TLS with the proxy; the tunnel's bytes are passed on through a pair of sockets.

    TLS inside TLS has no socket that the caller could use, so that two copying tasks stand between; they end with
    either side. Rare enough to pay for it.
    """
    context = ssl.create_default_context()
    try:
        reader, writer = await asyncio.open_connection(sock=sock, ssl=context, server_hostname=proxy.host)
    except ssl.SSLError as error:
        raise EdgeDialError(
            f"no TLS with the proxy {proxy}: {getattr(error, 'verify_message', '') or error.reason or error}",
            advice=PROXY_ADVICE,
        ) from None
    writer.write(_connect_request(proxy, host, port))
    try:
        answer = await reader.readuntil(b"\r\n\r\n")
        _check_answer(answer, proxy, format_address(host, port))
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        writer.transport.abort()
        raise EdgeDialError(f"the proxy {proxy} does not answer in HTTP", advice=PROXY_ADVICE) from None
    except BaseException:
        writer.transport.abort()
        raise
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    inner_reader, inner_writer = await asyncio.open_connection(sock=theirs)
    tasks = {
        asyncio.create_task(_copy(reader, inner_writer), name="proxy to connector"),
        asyncio.create_task(_copy(inner_reader, writer), name="connector to proxy"),
    }
    _copying.update(tasks)
    for task in tasks:
        task.add_done_callback(_copying.discard)
    return ours


_copying: set[asyncio.Task[None]] = set()
"""Keeps the copying tasks alive: the loop holds them by weak references only."""


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.transport.close()


# -- SOCKS5 (RFC 1928, RFC 1929)

_SOCKS_ERRORS = {
    1: "general failure",
    2: "not allowed by its rules",
    3: "network unreachable",
    4: "host unreachable",
    5: "connection refused",
    6: "time to live expired",
    7: "command not supported",
    8: "address type not supported",
}


async def _socks(sock: socket.socket, proxy: OutboundProxy, host: str, port: int) -> None:
    loop = asyncio.get_running_loop()

    async def receive(size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = await loop.sock_recv(sock, size - len(data))
            if not more:
                raise EdgeDialError(f"the proxy {proxy} closed the connection in its handshake", advice=PROXY_ADVICE)
            data += more
        return data

    methods = b"\x00\x02" if proxy.user else b"\x00"
    await loop.sock_sendall(sock, bytes((5, len(methods))) + methods)
    version, method = await receive(2)
    if version != 5:
        raise EdgeDialError(f"the proxy {proxy} does not speak SOCKS5", advice=PROXY_ADVICE)
    if method == 2 and proxy.user:
        user, password = proxy.user.encode()[:255], proxy.password.encode()[:255]
        await loop.sock_sendall(sock, b"\x01" + bytes((len(user),)) + user + bytes((len(password),)) + password)
        if (await receive(2))[1] != 0:
            raise EdgeDialError(f"the proxy {proxy} refuses user name and password", advice=PROXY_ADVICE)
    elif method != 0:
        raise EdgeDialError(
            f"the proxy {proxy} wants other credentials", advice="Write USER:PASSWORD@ into the proxy's URL."
        )
    address = _maybe_address(host)
    if address is not None:
        where = bytes((1 if address.version == 4 else 4,)) + address.packed
    else:
        name = host.encode("idna")
        where = bytes((3, len(name))) + name
    await loop.sock_sendall(sock, b"\x05\x01\x00" + where + port.to_bytes(2, "big"))
    version, code, _, kind = await receive(4)
    if version != 5 or code != 0:
        raise EdgeDialError(
            f"the proxy {proxy} cannot connect to {format_address(host, port)}: "
            f"{_SOCKS_ERRORS.get(code, f'code {code}')}",
            advice="Ask for port 7844 of Cloudflare's edge (argotunnel.com) to be allowed.",
        )
    length = {1: 4, 4: 16}.get(kind)
    await receive((length if length is not None else (await receive(1))[0]) + 2)
