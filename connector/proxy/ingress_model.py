"""Ingress rules as values: what a service, a rule and a rule set are, and which rule serves a request.

Owns: the frozen models and matching by host and path. In: values from `ingress.py`. Out: Ingress.match.
Never: reads a configuration or opens anything; a rule set is a value that is swapped whole.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from enum import Enum
from typing import Final
from urllib.parse import unquote

import msgspec

from connector.proxy import limits
from connector.proxy.idna_names import lookup_name
from connector.proxy.patterns import PathPattern


class ServiceKind(Enum):
    """What a rule's service is. TCP is every scheme that is not HTTP: tcp, ssh, rdp, smb and unknown ones.

    APPLICATION is code in this process; no configuration can name it, only the program that this one is a part of.
    """

    HTTP = "http"
    STATUS = "http_status"
    HELLO = "hello_world"
    BASTION = "bastion"
    SOCKS = "socks-proxy"
    TCP = "tcp"
    APPLICATION = "application"


class Service(msgspec.Struct, frozen=True):
    """One origin service. HTTP: `host` and `port`, or `path` of a unix socket; `tls` says https. TCP: `host`, `port`.

    `port` is 0 where the configuration names none and the scheme has no default; cloudflared accepts that (and ports
    beyond 65535) and fails on every request.
    """

    kind: ServiceKind
    text: str
    """As cloudflared prints it, without user name and password: safe to log."""
    host: str = ""
    """Name or IP literal without brackets; internationalised names in their ASCII form."""
    port: int = 0
    path: str = ""
    tls: bool = False
    status: int = 0
    scheme: str = ""
    """Of URLs, lower case, as configured: `ws`, `ssh`."""

    @property
    def authority(self) -> str:
        """`host[:port]` as it stands in a URL; of a unix socket `localhost`."""
        if self.path:
            return "localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


class AccessSettings(msgspec.Struct, frozen=True):
    """Cloudflare Access: who may pass."""

    required: bool = False
    team_name: str = ""
    audience: tuple[str, ...] = ()
    """Accepted `aud` entries; none of them lets nobody in."""
    environment: str = ""
    """`fed` for the FedRAMP key server, else empty."""


Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class IPRule(msgspec.Struct, frozen=True):
    """One line of a socks-proxy's policy. The first rule that applies decides; if none does, the answer is no."""

    network: Network
    ports: tuple[int, ...] = ()
    """Sorted; empty means every port."""
    allow: bool = False

    def applies(self, address: Address, port: int) -> bool:
        """Tell whether this rule decides about a destination."""
        return (not self.ports or port in self.ports) and address in self.network


class OriginSettings(msgspec.Struct, frozen=True):
    """`originRequest` of one rule with everything filled in. Times in seconds; 0 means no limit."""

    connect_timeout: float = 30
    tls_timeout: float = 10
    tcp_keep_alive: float = 30
    no_happy_eyeballs: bool = False
    keep_alive_connections: int = 100
    keep_alive_timeout: float = 90
    http_host_header: str = ""
    origin_server_name: str = ""
    match_sni_to_host: bool = False
    ca_pool: str = ""
    no_tls_verify: bool = False
    disable_chunked_encoding: bool = False
    bastion_mode: bool = False
    proxy_address: str = "127.0.0.1"
    proxy_port: int = 0
    proxy_type: str = ""
    """`socks`: a TCP service speaks SOCKS5 first."""
    ip_rules: tuple[IPRule, ...] = ()
    """For display; a socks-proxy obeys `Rule.ip_rules`."""
    http2_origin: bool = False
    access: AccessSettings = AccessSettings()
    """For display; what is enforced is `Rule.access`."""
    ws_keep_alive: float = 0
    """Extension: seconds without traffic after which a WebSocket's eyeball gets a PING; 0 never."""
    ws_subprotocols: tuple[str, ...] | None = None
    """Extension: the subprotocols that the origin takes, best first; None passes the eyeball's list on untouched."""
    proxy_protocol: str = ""
    """Extension: `v2` puts a PROXY protocol header with the eyeball's address before each origin connection."""
    access_log: bool = False
    """Extension: one log line at info level per finished request."""


class Rule(msgspec.Struct, frozen=True):
    """One ingress rule. `index` counts from 0, as in logs."""

    index: int
    service: Service
    hostname: str = ""
    path: str = ""
    pattern: PathPattern | None = None
    settings: OriginSettings = OriginSettings()
    access: AccessSettings = AccessSettings()
    """The rule's own `access` object: the only one that is enforced (a global one is not, as in cloudflared)."""
    ip_rules: tuple[IPRule, ...] = ()
    """The rule's own `ipRules`: the only ones that a socks-proxy obeys."""

    @property
    def catch_all(self) -> bool:
        """Whether the rule serves every request."""
        return self.hostname in {"", "*"} and not self.path

    def matches_host(self, host: str) -> bool:
        """Return whether `host` (no port) falls under the rule's hostname.

        Case counts, as in cloudflared, except that the name's lookup form (lower case, ASCII) is tried as well.
        """
        if self.hostname in {"", "*"}:
            return True
        return any(
            host == name or (name.startswith("*.") and host.endswith(name[1:]))
            for name in (self.hostname, lookup_name(self.hostname))
            if name
        )


class Ingress(msgspec.Struct, frozen=True):
    """A whole rule set. The last rule serves everything that no other matches."""

    version: int
    rules: tuple[Rule, ...]
    warp_routing: Mapping[str, float] = msgspec.field(default_factory=dict)
    """What the configuration sets of connectTimeout, tcpKeepAlive (seconds) and maxActiveFlows."""
    warnings: tuple[str, ...] = ()
    """What is accepted, as in cloudflared, but cannot work; each names rule and key."""
    defaults: OriginSettings = OriginSettings()
    """The top-level `originRequest`, for display."""
    _hosts: dict[bytes, tuple[Rule, ...]] = msgspec.field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Compare what was configured; what was matched so far does not count."""
        if not isinstance(other, Ingress):
            return NotImplemented
        mine, theirs = ((it.version, it.rules, it.warp_routing, it.warnings, it.defaults) for it in (self, other))
        return mine == theirs

    __hash__ = None  # type: ignore[assignment]  # holds a dictionary

    def match(self, host: bytes | str, target: bytes | str) -> Rule:
        """Return the first rule for a request's host (a port is ignored) and target (a query is ignored)."""
        key = host if isinstance(host, bytes) else host.encode("utf-8", "surrogateescape")
        candidates = self._hosts.get(key)
        if candidates is None:
            candidates = self._candidates(key)
        first = candidates[0]
        if first.pattern is None:
            return first
        raw = target if isinstance(target, str) else target.decode("utf-8", "surrogateescape")
        path = unquote(raw.partition("?")[0], errors="surrogateescape")[: limits.MAX_MATCHED_PATH]
        return self.match_path(candidates, path)

    def match_path(self, candidates: tuple[Rule, ...], path: str) -> Rule:
        """Return the first of `candidates` whose pattern is found in a decoded path; else the last rule of all."""
        for rule in candidates:
            if rule.pattern is None or rule.pattern.found_in(path):
                return rule
        return self.rules[-1]

    def candidates(self, host: str) -> tuple[Rule, ...]:
        """Return the rules for a host (a port is ignored), up to the first without a path."""
        return self._candidates(host.encode("utf-8", "surrogateescape"))

    def _candidates(self, key: bytes) -> tuple[Rule, ...]:
        host = without_port(key.decode("utf-8", "surrogateescape"))
        found = []
        for rule in self.rules:
            if rule.matches_host(host):
                found.append(rule)
                if rule.pattern is None:
                    break
        result = tuple(found) or self.rules[-1:]
        if len(self._hosts) >= limits.MATCH_CACHE:
            self._hosts.clear()
        self._hosts[key] = result
        return result


def without_port(host: str) -> str:
    """Return `host` without a port; brackets of an IPv6 literal go with it."""
    name, colon, port = host.rpartition(":")
    if not colon or "]" in port or (":" in name and not name.endswith("]")):
        return host
    return name[1:-1] if name.startswith("[") and name.endswith("]") else name


_NO_SETTINGS: Final = OriginSettings(0, 0, 0, keep_alive_connections=0, keep_alive_timeout=0, proxy_address="")

DEFAULT_INGRESS: Final = Ingress(
    -1, (Rule(0, Service(ServiceKind.STATUS, "http_status:503", status=503), settings=_NO_SETTINGS),)
)
"""What serves while there is no configuration: 503 to everything."""
