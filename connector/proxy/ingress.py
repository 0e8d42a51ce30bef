"""Ingress rules: which request goes to which origin service.

Owns: the JSON form of a configuration, its checks and their texts, and matching by host and path.
In: decoded JSON, or one URL from a flag. Out: frozen Ingress, Rule, Service, OriginSettings; ConfigError.
Never: opens anything; a rule set is a value that is swapped whole.

Read in this order: Ingress.match, parse_remote_config, parse_service.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from connector.errors import ConfigError
from connector.proxy import limits
from connector.proxy.patterns import PatternError, compile_path


class ServiceKind(Enum):
    """What a rule's service is."""

    HTTP = "http"
    STATUS = "http_status"
    HELLO = "hello_world"
    BASTION = "bastion"
    SOCKS = "socks-proxy"
    TCP = "tcp"


@dataclass(frozen=True, slots=True)
class Service:
    """One origin service. For HTTP: `host` and `port`, or `path` of a unix socket; `tls` says https."""

    kind: ServiceKind
    text: str
    """As configured, without user name and password: safe to log."""
    host: str = ""
    port: int = 0
    path: str = ""
    tls: bool = False
    status: int = 0

    @property
    def authority(self) -> str:
        """`host[:port]` as it stands in a URL; of a unix socket `localhost`."""
        if self.path:
            return "localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class AccessSettings:
    """Cloudflare Access: who may pass."""

    required: bool = False
    team_name: str = ""
    audience: tuple[str, ...] = ()
    environment: str = ""


@dataclass(frozen=True, slots=True)
class OriginSettings:
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
    ip_rules: tuple[tuple[str, tuple[int, ...], bool], ...] = ()
    http2_origin: bool = False
    access: AccessSettings = AccessSettings()


@dataclass(frozen=True, slots=True)
class Rule:
    """One ingress rule. `index` counts from 0, as in logs."""

    index: int
    service: Service
    hostname: str = ""
    path: str = ""
    pattern: re.Pattern[str] | None = None
    settings: OriginSettings = OriginSettings()
    access: AccessSettings = AccessSettings()
    """The rule's own `access` object: the only one that is enforced (a global one is not, as in cloudflared)."""

    def matches_host(self, host: str) -> bool:
        """Return whether `host` (no port) falls under the rule's hostname. Case counts, as in cloudflared."""
        if self.hostname in {"", "*"}:
            return True
        return any(
            host == name or (name.startswith("*.") and host.endswith(name[1:]))
            for name in {self.hostname, _ascii_hostname(self.hostname)}
        )


@dataclass(frozen=True, slots=True)
class Ingress:
    """A whole rule set. The last rule serves everything that no other matches."""

    version: int
    rules: tuple[Rule, ...]
    warp_routing: Mapping[str, int] = field(default_factory=dict)
    _hosts: dict[bytes, tuple[Rule, ...]] = field(default_factory=dict, compare=False, repr=False)

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
        for rule in candidates:
            if rule.pattern is None or rule.pattern.search(path):
                return rule
        return self.rules[-1]

    def _candidates(self, key: bytes) -> tuple[Rule, ...]:
        """Return the rules for a host, up to the first without a path."""
        host = _without_port(key.decode("utf-8", "surrogateescape"))
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


def _without_port(host: str) -> str:
    """Return `host` without a port; brackets of an IPv6 literal go with it."""
    name, colon, port = host.rpartition(":")
    if not colon or "]" in port or (":" in name and not name.endswith("]")):
        return host
    return name[1:-1] if name.startswith("[") and name.endswith("]") else name


def _ascii_hostname(name: str) -> str:
    if name.isascii():
        return name
    try:
        return name.encode("idna").decode("ascii")
    except UnicodeError:
        return name


# -- remote configuration

_MISSING: Final = object()
_INT64: Final = range(-(2**63), 2**63)
"""What Go reads as a number; a loop's clock takes all of it."""


class _Object:
    """A JSON object with case-insensitive keys that names itself in errors."""

    def __init__(self, value: object, where: str) -> None:
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise ConfigError(f"{where or 'the configuration'} must be a JSON object, not {_json_type(value)}")
        self._where = where
        self._values = {str(key).lower(): item for key, item in value.items()}

    def child(self, key: str) -> _Object:
        return _Object(self._values.get(key.lower()), self.name(key))

    def name(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def get(self, key: str, kind: str) -> Any:
        """Return a value of the JSON type `kind`, or _MISSING for an absent one or null."""
        value = self._values.get(key.lower())
        if value is None:
            return _MISSING
        accepted = {"string": str, "boolean": bool, "integer": int, "seconds": int, "list": list, "object": dict}[kind]
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind != "boolean"):
            want = "an integer number of seconds" if kind == "seconds" else f"a JSON {kind}"
            raise ConfigError(f"{self.name(key)} must be {want}, not {_json_type(value)}")
        if isinstance(value, int) and value not in _INT64:
            raise ConfigError(f"{self.name(key)} does not fit into 64 bits")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        value = self.get(key, "list")
        if value is _MISSING:
            return ()
        if not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{self.name(key)} must be a list of strings")
        return tuple(value)


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, float):
        return f"the fraction {value}"
    return {str: "a string", int: "a number", list: "a list", dict: "an object"}.get(type(value), type(value).__name__)


_SETTING_KEYS: Final = (
    ("connectTimeout", "seconds", "connect_timeout"),
    ("tlsTimeout", "seconds", "tls_timeout"),
    ("tcpKeepAlive", "seconds", "tcp_keep_alive"),
    ("noHappyEyeballs", "boolean", "no_happy_eyeballs"),
    ("keepAliveConnections", "integer", "keep_alive_connections"),
    ("keepAliveTimeout", "seconds", "keep_alive_timeout"),
    ("httpHostHeader", "string", "http_host_header"),
    ("originServerName", "string", "origin_server_name"),
    ("matchSNItoHost", "boolean", "match_sni_to_host"),
    ("caPool", "string", "ca_pool"),
    ("noTLSVerify", "boolean", "no_tls_verify"),
    ("disableChunkedEncoding", "boolean", "disable_chunked_encoding"),
    ("bastionMode", "boolean", "bastion_mode"),
    ("proxyAddress", "string", "proxy_address"),
    ("proxyPort", "integer", "proxy_port"),
    ("proxyType", "string", "proxy_type"),
    ("http2Origin", "boolean", "http2_origin"),
)


def _parse_settings(source: _Object, base: OriginSettings) -> OriginSettings:
    """Return `base` with what `source` sets; a value equal to zero counts as set."""
    changes: dict[str, Any] = {}
    for key, kind, name in _SETTING_KEYS:
        value = source.get(key, kind)
        if value is not _MISSING:
            changes[name] = value
            if name in {"http_host_header", "origin_server_name"} and not re.fullmatch(r"[!-~]*", value):
                raise ConfigError(f"{source.name(key)} is not a host name: {value!r}")
    rules = source.get("ipRules", "list")
    if rules is not _MISSING and rules:
        changes["ip_rules"] = tuple(
            _parse_ip_rule(_Object(rule, f"{source.name('ipRules')}[{number}]")) for number, rule in enumerate(rules)
        )
    if source.get("access", "object") is not _MISSING:
        changes["access"] = _parse_access(source.child("access"))
    return replace(base, **changes) if changes else base


def _parse_ip_rule(source: _Object) -> tuple[str, tuple[int, ...], bool]:
    prefix = source.get("prefix", "string")
    ports = source.get("ports", "list")
    allow = source.get("allow", "boolean")
    numbers = () if ports is _MISSING else tuple(ports)
    if not all(isinstance(port, int) and not isinstance(port, bool) for port in numbers):
        raise ConfigError(f"{source.name('ports')} must be a list of port numbers")
    return ("" if prefix is _MISSING else prefix, numbers, allow is True)


def _parse_access(source: _Object) -> AccessSettings:
    required = source.get("required", "boolean")
    team = source.get("teamName", "string")
    environment = source.get("environment", "string")
    return AccessSettings(
        required is True,
        "" if team is _MISSING else team,
        source.strings("audTag"),
        "" if environment is _MISSING else environment,
    )


def parse_remote_config(version: int, config: object) -> Ingress:
    """Return the rule set of a pushed configuration (decoded JSON). Errors: ConfigError naming the rule and the key."""
    top = _Object(config, "")
    defaults = _parse_settings(top.child("originRequest"), OriginSettings())
    warp = top.child("warp-routing")
    warp_routing = {
        key: value
        for key, kind in (("connectTimeout", "seconds"), ("tcpKeepAlive", "seconds"), ("maxActiveFlows", "integer"))
        if (value := warp.get(key, kind)) is not _MISSING
    }
    entries = top.get("ingress", "list")
    if entries is _MISSING or not entries:
        return Ingress(version, DEFAULT_INGRESS.rules, warp_routing)
    rules = tuple(
        _parse_rule(_Object(entry, f"ingress[{number}]"), number, len(entries), defaults)
        for number, entry in enumerate(entries)
    )
    return Ingress(version, rules, warp_routing)


def _parse_rule(source: _Object, number: int, count: int, defaults: OriginSettings) -> Rule:
    """Return rule `number` of `count`. The order of checks is cloudflared's: service, access, hostname, path."""
    text, hostname, path = (
        "" if value is _MISSING else value for value in (source.get(key, "string") for key in _RULE_KEYS)
    )
    own = source.child("originRequest")
    settings = _parse_settings(own, defaults)
    access = _parse_access(own.child("access"))
    try:
        service = parse_service(text, bastion=settings.bastion_mode)
        if service.kind is ServiceKind.SOCKS:
            _check_ip_rules(settings)
        if access.required and access.audience and not access.team_name:
            raise ConfigError("access.TeamName cannot be blank when access.audTags are present")
        _check_hostname(hostname, path, number, count)
        pattern = compile_path(path) if path else None
    except PatternError as error:
        raise ConfigError(f"Rule #{number + 1} has an invalid regex: {error}") from None
    except ConfigError as error:
        error.advice = error.advice or f"see ingress rule #{number + 1} (service {_safe_text(text)!r})"
        raise
    return Rule(number, service, hostname, path, pattern, settings, access)


_RULE_KEYS: Final = ("service", "hostname", "path")


def _check_hostname(hostname: str, path: str, number: int, count: int) -> None:
    if re.search(r"^(?:[^:\[\]]*|\[[^\[\]]*\]):[^:]*$", hostname):
        raise ConfigError("Hostname cannot contain a port")
    if "*" in hostname[1:]:
        raise ConfigError(
            'Hostname patterns can have at most one wildcard character ("*") and it can only be used for subdomains, '
            'e.g. "*.example.com"'
        )
    catch_all = hostname in {"", "*"} and not path
    if number == count - 1 and not catch_all:
        raise ConfigError(
            "The last ingress rule must match all URLs (i.e. it should not have a hostname or path filter)"
        )
    if number < count - 1 and catch_all:
        raise ConfigError(
            f"Rule #{number + 1} is matching the hostname '{hostname}', but this will match every hostname, meaning "
            "the rules which follow it will never be triggered."
        )


def _check_ip_rules(settings: OriginSettings) -> None:
    for prefix, ports, _ in settings.ip_rules:
        try:
            if "/" not in prefix:
                raise ValueError(f"invalid CIDR address: {prefix!r}")
            ipaddress.ip_network(prefix, strict=False)
            if bad := [port for port in ports if not 1 <= port <= 65535]:
                raise ValueError(f"port {bad[0]} is outside 1-65535")
        except ValueError as error:
            raise ConfigError(f"unable to create ip rule for socks-proxy: {error}") from None


# -- services

_DEFAULT_PORTS: Final = {"ssh": 22, "rdp": 3389, "smb": 445, "tcp": 7864}


def _safe_text(text: str) -> str:
    """Return a service without user name and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", text)


def parse_service(text: str, *, bastion: bool = False) -> Service:
    """Return the service that `text` names. Errors: ConfigError."""
    if text.startswith("unix:"):
        return Service(ServiceKind.HTTP, text, path=text[5:])
    if text.startswith("unix+tls:"):
        return Service(ServiceKind.HTTP, text, path=text[9:], tls=True)
    if text.startswith("http_status:"):
        number = text[12:]
        if not re.fullmatch(r"[+-]?[0-9]+", number):
            raise ConfigError(f"invalid HTTP status code: {number!r} is not a number")
        shown = number.lstrip("+").lstrip("0") or "0"  # int() refuses thousands of digits
        if len(shown) != 3 or not 100 <= int(shown) <= 999:
            raise ConfigError(f"invalid HTTP status code: {shown[:20]} is not between 100 and 999")
        return Service(ServiceKind.STATUS, text, status=int(shown))
    if text in {"hello_world", "hello-world"}:
        return Service(ServiceKind.HELLO, text)
    if text == "socks-proxy":
        return Service(ServiceKind.SOCKS, text)
    if text == "bastion" or bastion:
        return Service(ServiceKind.BASTION, text)
    return _parse_url(text)


def _parse_url(text: str) -> Service:
    shown = _safe_text(text)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ConfigError(f"{shown} is an invalid address, please make sure it has a scheme and a hostname") from None
    if not parts.scheme or not host or not re.fullmatch(r"[^\s\x00-\x20\x7f]+", host):
        raise ConfigError(f"{shown} is an invalid address, please make sure it has a scheme and a hostname")
    if parts.path:
        raise ConfigError(
            f"{shown} is an invalid address, ingress rules don't support proxying to a different path on the origin "
            "service. The path will be the same as the eyeball request's path"
        )
    scheme = {"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme)
    if scheme in {"http", "https"}:
        tls = scheme == "https"
        return Service(ServiceKind.HTTP, shown, host, port or (443 if tls else 80), tls=tls)
    port = port or _DEFAULT_PORTS.get(scheme, 0)
    if not port:
        raise ConfigError(f"{shown} needs a port: the scheme {scheme} has no default port")
    return Service(ServiceKind.TCP, shown, host, port)


def ingress_from_url(url: str, settings: OriginSettings | None = None) -> Ingress:
    """Return the rule set of a single origin given as a flag; `localhost:8080` means http. Errors: ConfigError."""
    text = url if "://" in url or url.startswith(("unix:", "unix+tls:", "http_status:", "hello")) else f"http://{url}"
    parts = urlsplit(text) if "://" in text else None
    if parts is not None:
        if parts.scheme not in {"http", "https", "ws", "wss", "rdp", "ssh", "smb", "tcp"}:
            raise ConfigError(f"Currently Cloudflare Tunnel does not support {parts.scheme} protocol.")
        text = f"{parts.scheme}://{parts.netloc}"
    return Ingress(-1, (Rule(0, parse_service(text), settings=settings or OriginSettings()),))


_NO_SETTINGS: Final = OriginSettings(0, 0, 0, keep_alive_connections=0, keep_alive_timeout=0, proxy_address="")

DEFAULT_INGRESS: Final = Ingress(-1, (Rule(0, parse_service("http_status:503"), settings=_NO_SETTINGS),))
"""What serves while there is no configuration: 503 to everything."""
