"""What one run of the connector was asked to do: checked values made from flags, environment and the token.

Owns: RunConfig and every check that needs no network. In: Flags. Out: RunConfig.
Never: prints the token or the secret; opens a socket.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from connector.app.command_table import program
from connector.app.durations import format_duration
from connector.app.flags import Flags, looks_like_token
from connector.app.local_config import LocalConfig, find_token
from connector.app.origin_flags import own_defaults, start_rules
from connector.errors import ConfigError, UsageError, WireError
from connector.protocol.protocol_choice import ADDRESS_BUDGET
from connector.proxy.dns_service import parse_resolvers
from connector.proxy.ingress import DEFAULT_INGRESS, Ingress, OriginSettings
from connector.wire.token import Token, decode_token

if TYPE_CHECKING:
    from connector.proxy.asgi import AsgiSite
    from connector.proxy.ingress import Ingress
    from connector.transport.outbound_proxy import OutboundProxy

MAX_GRACE = 180.0
MAX_HA_CONNECTIONS = 32
"""More connections than any edge hands out addresses for; a guard against a slip of the keyboard."""

FEATURES = ("allow_remote_config", "management_logs", "serialized_headers")
"""Feature strings of what this version can do (capnp-rpc section 3.1)."""

POST_QUANTUM = "postquantum"
"""Announced with --post-quantum."""

MIN_WINDOW = 64 * 1024
MAX_WINDOW = 1 << 30
"""Bytes; a window below one burst stalls every transfer, one beyond a gibibyte is no limit any more."""

_REMOVED_FEATURES = frozenset({"support_datagram_v3", "support_datagram_v3_1"})
_TAG_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+\-.^_`|~]+")

RUNTIME_VARIABLE = "CONNECTOR_RUNTIME"
"""`container` (the image sets it) makes the default metrics address reachable from outside, as cloudflared's image has
it by a build flag."""

MANAGEMENT_HOST = "management.argotunnel.com"
MANAGEMENT_HOST_FED = "management.fed.argotunnel.com"
"""Where requests of a tunnel whose token names the endpoint `fed` come from."""

TOKEN_LIMIT = 64 * 1024
"""Bytes read of a token file; real tokens have some 200."""


class RunConfig:
    """One run, checked. Plain data; built by `run_config`."""

    __slots__ = (
        "access_log",
        "address_budget",
        "applications",
        "bind_address",
        "cacert",
        "capture",
        "dns_resolvers",
        "edges",
        "exempt_by_environment",
        "features",
        "fixed_ingress",
        "grace_period",
        "ha_connections",
        "icmp_source4",
        "icmp_source6",
        "ingress",
        "inspect",
        "ip_version",
        "label",
        "management_diagnostics",
        "management_host",
        "max_active_flows",
        "metrics",
        "no_redact",
        "origin_defaults",
        "pidfile",
        "post_quantum",
        "prechecks",
        "protocol",
        "proxy",
        "proxy_exempt",
        "quic_connection_window",
        "quic_pmtu",
        "quic_stream_window",
        "quick_hostname",
        "region",
        "retries",
        "rpc_timeout",
        "service_op",
        "settings",
        "stdin_control",
        "tags",
        "token",
        "token_file",
        "token_given",
        "watched",
        "workers",
        "write_timeout",
    )  # fmt: skip

    def __init__(self, token: Token) -> None:
        self.token = token
        self.edges: list[str] = []
        """`host:port` of each --edge; empty: the edge is looked up."""
        self.region = token.endpoint
        self.cacert: str | None = None
        self.protocol = "auto"
        self.proxy: OutboundProxy | None = None
        """Connections to the edge over TCP go through it."""
        self.proxy_exempt: Callable[[str], bool] = lambda _: False
        """Whether this edge host is reached without it."""
        self.exempt_by_environment = False
        """Whether it is NO_PROXY that says so."""
        self.token_given = True
        """The token came by flag or environment, not by a file: `auto` then does not ask for the protocol record."""
        self.token_file: str | None = None
        """Where the token came from; when that file changes, the connections register again."""
        self.stdin_control = False
        self.prechecks = False
        self.fixed_ingress: Ingress | None = None
        """Rules that a program brings, in place of the edge's; `applications` serve some of them."""
        self.applications: Mapping[str, AsgiSite] = {}
        self.quick_hostname = ""
        """Host name of a quick tunnel."""
        self.post_quantum = False
        self.quic_pmtu = True
        self.quic_connection_window: int | None = None
        self.quic_stream_window: int | None = None
        """Bytes; None: what this program has by itself."""
        self.address_budget = ADDRESS_BUDGET
        self.ha_connections = 4
        self.ip_version = "auto"
        self.bind_address: str | None = None
        self.features: list[str] = list(FEATURES)
        self.tags: list[tuple[str, str]] = []
        self.ingress = DEFAULT_INGRESS
        """What serves until the edge pushes a configuration."""
        self.watched: tuple[Flags, LocalConfig] | None = None
        """The configuration file that is read again when it changes."""
        self.metrics: str | None = None
        """Where the metrics server listens; None: nowhere."""
        self.access_log = False
        self.label = ""
        self.management_host = MANAGEMENT_HOST
        self.management_diagnostics = True
        self.service_op = "198.41.200.113:80"
        self.pidfile: str | None = None
        self.inspect: str | None = None
        """`host:port` of the inspector's page."""
        self.capture: str | None = None
        self.no_redact = False
        self.grace_period = 30.0
        self.origin_defaults = OriginSettings()
        """What counts where a rule says nothing."""
        self.workers = 1
        """Processes that the connections are spread over; with 1 this process serves them itself."""
        self.retries = 5
        self.rpc_timeout = 5.0
        self.write_timeout = 0.0
        """Seconds; 0: never."""
        self.max_active_flows: int | None = None
        """None: the configuration says it."""
        self.dns_resolvers: list[tuple[bytes, int]] = []
        self.icmp_source4 = ""
        self.icmp_source6 = ""
        self.settings: dict[str, str] = {}

    @property
    def own_rules(self) -> Ingress | None:
        """The rules that a file or flags give; None where there are none and everything gets 503."""
        return self.ingress if self.ingress.rules != DEFAULT_INGRESS.rules else None


def run_config(flags: Flags, words: Sequence[str], token_text: str, local: LocalConfig | None = None) -> RunConfig:
    """Check everything; UsageError (status 255) or ConfigError (status 1) says what is wrong and what to do."""
    if len(words) > 1:
        late = next((word for word in words if word.startswith("-")), None)
        raise UsageError(
            f'"{program()} tunnel run" accepts only one argument, the ID or name of the tunnel to run.',
            advice=f"Flags go before it: move {late.partition('=')[0]} to the left." if late else "",
        )
    if token_text:
        try:
            config = RunConfig(decode_token(token_text))
        except WireError as error:
            raise UsageError(str(error), advice=error.advice) from None
    else:
        config = RunConfig(find_token(flags, words, local))
    config.protocol = _protocol(flags.text("protocol"))
    config.token_given = flags.is_set("token")
    config.prechecks = not flags.value("no-prechecks")
    config.token_file = (flags.text("token-file") or None) if not flags.text("token") else None
    config.stdin_control = bool(flags.value("stdin-control"))
    config.post_quantum = bool(flags.value("post-quantum"))
    if config.post_quantum:
        if config.protocol in {"http2", "h2mux"}:
            raise ConfigError(
                "post-quantum key exchange is not possible over HTTP/2 here: Python's TLS cannot ask for it",
                advice="Use --protocol quic with --post-quantum, or do without one of the two.",
            )
        config.features.append(POST_QUANTUM)
    config.quic_pmtu = not flags.value("quic-disable-pmtu-discovery")
    config.quic_connection_window = _window(flags, "quic-connection-level-flow-control-limit")
    config.quic_stream_window = _window(flags, "quic-stream-level-flow-control-limit")
    config.address_budget = int(flags.number("max-edge-addr-retries"))
    config.origin_defaults = own_defaults(flags)
    config.grace_period = flags.number("grace-period")
    if config.grace_period > MAX_GRACE:
        raise ConfigError(
            f"grace-period must be equal or less than {format_duration(MAX_GRACE)}",
            advice=f"--grace-period is {format_duration(config.grace_period)}.",
        )
    _positive(config.grace_period, "grace-period", zero=True)
    config.ha_connections = int(flags.number("ha-connections"))
    if not 1 <= config.ha_connections <= MAX_HA_CONNECTIONS:
        raise ConfigError(
            f"--ha-connections {config.ha_connections} is not possible", advice=f"Allowed: 1 to {MAX_HA_CONNECTIONS}."
        )
    config.workers = _workers(flags, config.ha_connections)
    config.retries = int(flags.number("retries"))
    _positive(config.retries, "retries", zero=True)
    config.rpc_timeout = flags.number("rpc-timeout")
    config.write_timeout = flags.number("write-stream-timeout")
    _positive(config.rpc_timeout, "rpc-timeout", zero=False)
    _private_network(config, flags)
    config.edges = flags.texts("edge") if flags.is_set("edge") else []
    for edge in config.edges:
        split_address(edge, "--edge")
    _choose_proxy(config, flags)
    config.region = _region(flags.text("region"), config.token)
    config.cacert = flags.text("cacert") or None
    if config.cacert is not None and not os.path.isfile(config.cacert):
        raise ConfigError(f"--cacert: no such file: {config.cacert}", advice="Give a file with PEM certificates.")
    config.ip_version = flags.text("edge-ip-version")
    config.bind_address = _bind_address(flags.text("edge-bind-address"))
    wanted = [name for name in flags.texts("features") if name not in _REMOVED_FEATURES]
    config.features = list(dict.fromkeys([*config.features, *wanted]))
    config.tags = [_tag(text) for text in flags.texts("tag")]
    config.ingress = start_rules(flags, local)
    config.watched = None if local is None else (flags, local)
    config.metrics = flags.text("metrics") if flags.is_set("metrics") else default_metrics_address()
    split_address(config.metrics, "--metrics", any_host=True)
    config.access_log = bool(flags.value("access-log"))
    config.label = flags.text("label")
    fed = config.token.endpoint == "fed"
    config.management_host = MANAGEMENT_HOST_FED if fed else flags.text("management-hostname")
    config.management_diagnostics = bool(flags.value("management-diagnostics"))
    config.service_op = flags.text("service-op-ip")
    config.pidfile = flags.text("pidfile") or None
    config.inspect = flags.text("inspect") or None
    if config.inspect is not None:
        split_address(config.inspect, "--inspect", any_host=True)
    config.capture = flags.text("capture") or None
    config.no_redact = bool(flags.value("no-redact"))
    config.settings = flags.settings()
    return config


def default_metrics_address() -> str:
    """Give the metrics address that is in force when nobody names one: the first free port of a known few."""
    return "0.0.0.0:0" if os.environ.get(RUNTIME_VARIABLE) == "container" else "localhost:0"


def _workers(flags: Flags, connections: int) -> int:
    """Give the number of processes that `--workers` asks for; no more than there are connections is of use."""
    text = flags.text("workers")
    if text == "1":
        return 1
    from connector.app.workers.count import wanted_workers  # noqa: PLC0415  (few ask for it)

    workers = wanted_workers(text, connections)
    if workers > 1 and sys.platform == "win32":
        raise ConfigError("--workers is not possible on Windows", advice="Leave it out: one process serves all.")
    for name in ("inspect", "capture"):
        if workers > 1 and flags.text(name):
            raise ConfigError(
                f"--{name} sees one process only and is not possible with {workers} workers",
                advice=f"Give --workers 1 while you use --{name}.",
            )
    return workers


def _private_network(config: RunConfig, flags: Flags) -> None:
    if flags.is_set("max-active-flows"):
        config.max_active_flows = int(flags.number("max-active-flows"))
    try:
        config.dns_resolvers = parse_resolvers(flags.texts("dns-resolver-addrs"))
    except ValueError as error:
        raise ConfigError(f"--dns-resolver-addrs: {error}") from None
    config.icmp_source4 = flags.text("icmpv4-src")
    config.icmp_source6 = flags.text("icmpv6-src")


def read_token(flags: Flags) -> str:
    """Give the token's text: --token or TUNNEL_TOKEN, else the trimmed content of --token-file, else nothing."""
    text = flags.text("token")
    if text:
        return text
    path = flags.text("token-file")
    if not path:
        return ""
    try:
        with open(path, "rb") as file:
            return file.read(TOKEN_LIMIT).decode().strip()
    except (OSError, ValueError) as error:
        shown = "(hidden: looks like a token)" if looks_like_token(path) else path
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"Failed to read token file: {cause}: {shown}",
            advice="Give the path of a readable text file that holds nothing but the token.",
        ) from None


def _window(flags: Flags, name: str) -> int | None:
    """Give the bytes of a flow-control flag, None unless it was given."""
    if not flags.is_set(name):
        return None
    size = int(flags.number(name))
    if not MIN_WINDOW <= size <= MAX_WINDOW:
        raise ConfigError(f"--{name} {size} is not possible", advice=f"Allowed: {MIN_WINDOW} to {MAX_WINDOW} bytes.")
    return size


def _protocol(text: str) -> str:
    if text.lower() in {"auto", "http2", "quic", "h2mux", ""}:
        return text.lower() or "auto"
    raise ConfigError(f"unknown protocol {text}, --protocol cannot be that", advice="Allowed: auto, http2, quic.")


def _region(flag: str, token: Token) -> str:
    if flag and token.endpoint:
        raise ConfigError(
            "region provided with a token that has an endpoint",
            advice=f"Leave --region {flag} out: the token says {token.endpoint}.",
        )
    return flag or token.endpoint


NO_PROXY = "none"
"""--edge-proxy none: whatever the environment says."""


def _choose_proxy(config: RunConfig, flags: Flags) -> None:
    """Find the way out of an office: --edge-proxy, else what the environment says for the edge."""
    text, environ = flags.text("edge-proxy"), flags.environ
    if not text and not any(name.lower() in {"https_proxy", "all_proxy"} for name in environ):
        return
    from connector.transport import outbound_proxy  # noqa: PLC0415  (few need it)

    if text:
        if text != NO_PROXY:
            config.proxy = outbound_proxy.parse_proxy(text, "--edge-proxy")
        return
    proxy = outbound_proxy.proxy_from_environment(environ)
    if proxy is None:
        return
    hosts = [split_address(edge, "--edge")[0] for edge in config.edges]
    names = () if hosts else EDGE_NAMES
    config.proxy_exempt = lambda host: outbound_proxy.exempt(host, environ, also=names)
    config.exempt_by_environment = True
    if not all(config.proxy_exempt(host) for host in hosts or EDGE_NAMES):
        config.proxy = proxy


EDGE_NAMES = ("region1.v2.argotunnel.com", "region2.v2.argotunnel.com")
"""Names of the edge, for NO_PROXY."""


def _positive(value: float, name: str, *, zero: bool) -> None:
    if value < 0 or (value == 0 and not zero):
        raise ConfigError(f"--{name} must be {'0 or more' if zero else 'more than 0'}")


def split_address(text: str, source: str, *, any_host: bool = False) -> tuple[str, int]:
    """Give host and port of `host:port` or `[v6]:port`; ConfigError names `source`. Host may be empty with any_host."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if (
        not colon
        or not (port.isascii() and port.isdigit() and int(port) <= 65535)
        or (":" in host and not bracketed)
        or (not host and not any_host)
        or (not any_host and int(port) == 0)
    ):
        shown = "(hidden: looks like a token)" if looks_like_token(text) else text
        raise ConfigError(
            f'{source}: "{shown}" is no address', advice="Write HOST:PORT, such as localhost:7844 or [::1]:7844."
        )
    return (host[1:-1] if bracketed else host), int(port)


def _bind_address(text: str) -> str | None:
    if not text:
        return None
    from ipaddress import ip_address  # noqa: PLC0415  (rarely needed, and slow to import)

    try:
        return str(ip_address(text))
    except ValueError:
        raise ConfigError(
            f'--edge-bind-address: "{text}" is no IP address', advice="Give an address of this machine."
        ) from None


def _tag(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not value or not value.isprintable() or not _TAG_NAME.fullmatch(name):
        raise ConfigError(f"Cannot parse tag value {text}", advice="Write --tag NAME=VALUE.")
    return name, value
