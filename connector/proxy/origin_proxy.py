"""Proxies between this process and HTTP origins: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, read as Go's library reads them.

Owns: which proxy an origin is reached through; the handshake with it in an origin's words. In: an environment,
services, connected sockets. Out: OriginProxies, ProxyHop; OriginDialError. Never: dials; concerns TCP-like services,
unix sockets or the edge (`transport/outbound_proxy.py`, which also owns the handshakes).

A plain HTTP request goes to an HTTP proxy in absolute form; everything else goes through CONNECT, or SOCKS5. This
machine itself is never asked for through a proxy, as in Go.
"""

from __future__ import annotations

import base64
import ipaddress
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from msgspec import structs

from connector.errors import ConfigError, EdgeDialError, OriginDialError
from connector.proxy.ingress import OriginSettings, Service, ServiceKind

if TYPE_CHECKING:  # loaded where the environment names a proxy
    from connector.transport.outbound_proxy import OutboundProxy

PROXY_ADVICE: Final = (
    "HTTP_PROXY and HTTPS_PROXY in this process's environment name the proxy; NO_PROXY=HOST exempts an origin from it"
)
_IP = ipaddress.IPv4Address | ipaddress.IPv6Address


class ProxyHop:
    """The proxy in front of one origin. `problem` says why it cannot be used: every request fails then, as in Go."""

    __slots__ = ("absolute", "authorization", "problem", "proxy", "service")

    def __init__(self, service: Service, proxy: OutboundProxy | None, problem: str = "") -> None:
        if proxy is None:
            from connector.transport.outbound_proxy import OutboundProxy  # noqa: PLC0415

            proxy = OutboundProxy("http", "", 0)
        self.proxy = proxy
        self.problem = problem
        shown = f"{service.text} through the proxy {self.proxy}"
        self.service = structs.replace(service, text=shown, host=self.proxy.host, port=self.proxy.port)
        """Where to dial, for errors."""
        self.absolute = b""
        """What request targets begin with; empty where the origin itself gets the request."""
        self.authorization = b""
        """Value of Proxy-Authorization where targets are absolute."""
        if self.proxy.scheme in {"http", "https"} and not service.tls:
            self.absolute = f"http://{service.authority}".encode()
            if self.proxy.user or self.proxy.password:
                secret = f"{self.proxy.user}:{self.proxy.password}".encode()
                self.authorization = b"Basic " + base64.b64encode(secret)

    @property
    def over_tls(self) -> bool:
        """Whether requests in absolute form go to the proxy over TLS."""
        return bool(self.absolute) and self.proxy.scheme == "https"

    async def shake_hands(self, sock: socket.socket, origin: Service) -> socket.socket:
        """Return a socket whose other end is the origin. Errors: OriginDialError; OSError."""
        if self.absolute:
            return sock
        from connector.transport.outbound_proxy import shake_hands  # noqa: PLC0415

        try:
            return await shake_hands(sock, self.proxy, origin.host, origin.port)
        except EdgeDialError as error:
            sock.close()
            raise OriginDialError(f"origin {origin.text}: {error}", advice=PROXY_ADVICE, cause="unreachable") from None
        except BaseException:
            sock.close()
            raise


class OriginProxies:
    """What one environment says. It is read once, as in Go."""

    __slots__ = ("_everything", "_names", "_networks", "_urls")

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._urls = {
            tls: next((environ[name] for name in names if environ.get(name)), "")
            for tls, names in ((False, ("HTTP_PROXY", "http_proxy")), (True, ("HTTPS_PROXY", "https_proxy")))
        }
        self._everything = False
        self._networks: list[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, str]] = []
        self._names: list[tuple[str, str, bool]] = []
        for entry in (environ.get("NO_PROXY") or environ.get("no_proxy") or "").split(","):
            self._exempt(entry.strip().lower())

    def _exempt(self, text: str) -> None:
        """Take one entry of NO_PROXY: `*`, a network, an address or a domain; the latter two maybe with a port."""
        if text == "*":
            self._everything = True
            return
        host, port = _split(text)
        for candidate, its_port in ((text, ""), (host, port)):
            try:
                self._networks.append((ipaddress.ip_network(candidate, strict=False), its_port))
            except ValueError:
                continue
            return
        host = host.removeprefix("*") if host.startswith("*.") else host
        if host:
            self._names.append((host if host[0] == "." else f".{host}", port, host[0] != "."))

    def hop_to(self, service: Service, settings: OriginSettings) -> ProxyHop | None:
        """Return the proxy in front of a service; None where there is none.

        None as well for rules with a PROXY header: it is for the origin, and no HTTP proxy would understand it.
        """
        url = self._urls[service.tls]
        wanted = service.kind is ServiceKind.HTTP and not service.path and not settings.proxy_protocol
        if not url or not wanted or self.exempts(service.host, service.port):
            return None
        from connector.transport.outbound_proxy import parse_proxy  # noqa: PLC0415

        try:
            return ProxyHop(service, parse_proxy(url, "HTTPS_PROXY" if service.tls else "HTTP_PROXY"))
        except ConfigError as error:
            return ProxyHop(service, None, str(error))

    def exempts(self, host: str, port: int) -> bool:
        """Tell whether a destination is reached without a proxy."""
        name = host.lower()
        address = _maybe_address(name)
        if self._everything or name == "localhost" or (address is not None and address.is_loopback):
            return True
        asked = str(port)
        if address is not None:
            return any(address in network and its in {"", asked} for network, its in self._networks)
        return any(
            (name.endswith(domain) or (itself and name == domain[1:])) and its in {"", asked}
            for domain, its, itself in self._names
        )


def _split(text: str) -> tuple[str, str]:
    """Return host and port of `host:port` or `[v6]:port`; the port is empty where there is none."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not (host.startswith("[") and host.endswith("]"))):
        return text, ""
    return host.removeprefix("[").removesuffix("]"), port


def _maybe_address(host: str) -> _IP | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


NO_PROXIES: Final = OriginProxies({})
"""Of an environment that says nothing."""
