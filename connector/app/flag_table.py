"""Every flag of `tunnel` and `tunnel run`: name, type, default, environment, and what this version does with it.

Owns: the table. In: nothing. Out: FLAGS, by name. Never: parses.
"""

from __future__ import annotations

from typing import NamedTuple

USED, NO_EFFECT = "used", "no effect"
"""What a flag does here: something; nothing yet (one warning line says so); nothing ever (one debug line)."""


class Flag(NamedTuple):
    """One flag. `kind` is bool, string, int, uint, duration or list."""

    name: str
    kind: str = "string"
    default: str = ""
    env: tuple[str, ...] = ()
    alias: str = ""
    effect: str = NO_EFFECT
    group: str = ""
    metavar: str = ""
    help: str = ""
    choices: tuple[str, ...] = ()
    secret: bool = False
    bare: str = ""
    """Of a duration that may stand alone: what it means then, and what `true` means."""
    lenient: bool = False
    """Whether a text outside `choices` means the default, with an error line, as in cloudflared."""


GROUPS = (
    "Credentials",
    "Edge",
    "Single origin",
    "Logs",
    "Metrics and diagnosis",
    "Operation",
    "Shutdown and retries",
)
"""Order of the groups in help."""

WS_KEEP_ALIVE = "40s"
"""Cloudflare cuts a WebSocket after 100 s without traffic: two PINGs may be lost."""

_LEVELS = ("trace", "debug", "info", "warn", "error", "fatal")

_CREDENTIALS = [
    Flag(
        "token",
        env=("TUNNEL_TOKEN",),
        metavar="TOKEN",
        secret=True,
        help="The tunnel's token. On the command line other users of the machine may see it: prefer --token-file.",
    ),
    Flag(
        "token-file",
        env=("TUNNEL_TOKEN_FILE",),
        metavar="FILE",
        help="Read the token from FILE; white space around it does not matter. --token wins.",
    ),
    Flag(
        "credentials-file",
        env=("TUNNEL_CRED_FILE",),
        alias="cred-file",
        metavar="FILE",
        help="Credentials of the tunnel that TUNNEL names, as `tunnel create` wrote them.",
    ),
    Flag(
        "credentials-contents",
        env=("TUNNEL_CRED_CONTENTS",),
        metavar="JSON",
        secret=True,
        help="The same, as text. Better in the environment than on the command line.",
    ),
    Flag(
        "origincert",
        env=("TUNNEL_ORIGIN_CERT",),
        metavar="FILE",
        help="The account's certificate: credentials files are looked for beside it.",
    ),
    Flag("config", metavar="FILE", help="Read flags and ingress rules from this YAML file."),
]

_EDGE = [
    Flag(
        "edge",
        "list",
        env=("TUNNEL_EDGE",),
        metavar="HOST:PORT",
        help="Connect to this edge instead of Cloudflare's; repeatable, one connection per address.",
    ),
    Flag(
        "cacert", env=("TUNNEL_CACERT",), metavar="FILE", help="Trust only the PEM certificates in FILE for the edge."
    ),
    Flag(
        "protocol",
        default="auto",
        env=("TUNNEL_TRANSPORT_PROTOCOL",),
        alias="p",
        metavar="NAME",
        help="auto, quic or http2; auto tries QUIC first, HTTP/2 0.3 s later, and returns to QUIC when it works.",
    ),
    Flag("ha-connections", "int", "4", metavar="N", help="How many connections to keep up, 1 to 32."),
    Flag(
        "region",
        env=("TUNNEL_REGION",),
        metavar="NAME",
        help="Connect to this region of Cloudflare's edge only, such as us. Without it, worldwide.",
    ),
    Flag(
        "edge-ip-version",
        default="auto",
        env=("TUNNEL_EDGE_IP_VERSION",),
        metavar="V",
        choices=("auto", "4", "6"),
        help="auto, 4 or 6: which addresses of the edge to use.",
    ),
    Flag(
        "edge-bind-address",
        env=("TUNNEL_EDGE_BIND_ADDRESS",),
        metavar="IP",
        help="Local address for connections to the edge.",
    ),
    Flag(
        "edge-proxy",
        env=("TUNNEL_EDGE_PROXY",),
        metavar="URL",
        secret=True,
        help="Reach the edge through this proxy: http://HOST:PORT, https:// or socks5://, over HTTP/2. Without it "
        "HTTPS_PROXY, ALL_PROXY and NO_PROXY count; none: no proxy at all.",
    ),
    Flag("features", "list", alias="F", metavar="NAME", help="Announce this feature too; repeatable."),
    Flag(
        "post-quantum",
        "bool",
        env=("TUNNEL_POST_QUANTUM",),
        alias="pq",
        help="Connect with post-quantum key exchange or not at all; over QUIC only.",
    ),
    Flag(
        "max-edge-addr-retries",
        "int",
        "8",
        metavar="N",
        help="Dials in a row that may reach nobody before the waits between them start over.",
    ),
    Flag(
        "quic-disable-pmtu-discovery",
        "bool",
        env=("TUNNEL_DISABLE_QUIC_PMTU",),
        help="Send QUIC packets of 1,200 bytes, never larger ones.",
    ),
    Flag(
        "quic-connection-level-flow-control-limit",
        "int",
        "31457280",
        env=("TUNNEL_QUIC_CONN_LEVEL_FLOW_CONTROL_LIMIT",),
        metavar="BYTES",
        help="What the edge may send ahead on one QUIC connection.",
    ),
    Flag(
        "quic-stream-level-flow-control-limit",
        "int",
        "1048576",
        env=("TUNNEL_QUIC_STREAM_LEVEL_FLOW_CONTROL_LIMIT",),
        metavar="BYTES",
        help="What the edge may send ahead on one QUIC stream.",
    ),
    Flag(
        "write-stream-timeout",
        "duration",
        "0s",
        env=("TUNNEL_STREAM_WRITE_TIMEOUT",),
        metavar="TIME",
        help="Give a stream up that the edge does not take data from for so long; 0: never.",
    ),
]

_ORIGIN = [
    Flag(
        "url",
        default="http://localhost:8080",
        env=("TUNNEL_URL",),
        metavar="URL",
        help="Send all requests to this service, until the edge pushes a configuration. Without it they get 503.",
    ),
    Flag("hello-world", "bool", env=("TUNNEL_HELLO_WORLD",), help="Serve a built-in test page instead of --url."),
    Flag(
        "unix-socket",
        env=("TUNNEL_UNIX_SOCKET",),
        metavar="PATH",
        help="A unix socket of the service instead of --url.",
    ),
    Flag("socks5", "bool", env=("TUNNEL_SOCKS",), help="Be a SOCKS5 server instead of --url."),
    Flag("bastion", "bool", env=("TUNNEL_BASTION",), help="Go where the request says: a jump host."),
    Flag("http-host-header", env=("TUNNEL_HTTP_HOST_HEADER",), metavar="HOST", help="Host header for the service."),
    Flag(
        "origin-server-name",
        env=("TUNNEL_ORIGIN_SERVER_NAME",),
        metavar="NAME",
        help="Name that the service's certificate must have.",
    ),
    Flag(
        "origin-ca-pool",
        env=("TUNNEL_ORIGIN_CA_POOL",),
        metavar="FILE",
        help="PEM certificates to trust for the service.",
    ),
    Flag("no-tls-verify", "bool", env=("NO_TLS_VERIFY",), help="Take any certificate of the service."),
    Flag(
        "no-chunked-encoding",
        "bool",
        env=("TUNNEL_NO_CHUNKED_ENCODING",),
        help="Send request bodies with a length, never chunked; for WSGI servers.",
    ),
    Flag("http2-origin", "bool", env=("TUNNEL_ORIGIN_ENABLE_HTTP2",), help="Speak HTTP/2 with an https service."),
    Flag("proxy-connect-timeout", "duration", "30s", metavar="TIME", help="Limit of a connection to the service."),
    Flag("proxy-tls-timeout", "duration", "10s", metavar="TIME", help="Limit of the TLS handshake with it."),
    Flag("proxy-tcp-keepalive", "duration", "30s", metavar="TIME", help="Interval of TCP keep-alive."),
    Flag("proxy-no-happy-eyeballs", "bool", help="Do not try IPv4 beside a slow IPv6."),
    Flag("proxy-keepalive-connections", "int", "100", metavar="N", help="Idle connections to keep."),
    Flag("proxy-keepalive-timeout", "duration", "90s", metavar="TIME", help="How long to keep one idle."),
    Flag(
        "tag",
        "list",
        env=("TUNNEL_TAG",),
        metavar="NAME=VALUE",
        help="Add the header Cf-Warp-Tag-NAME: VALUE to requests; repeatable.",
    ),
    Flag(
        "ws-keepalive",
        "duration",
        "0s",
        env=("TUNNEL_WS_KEEPALIVE",),
        metavar="[TIME]",
        bare=WS_KEEP_ALIVE,
        help="Ping WebSocket visitors after so long without traffic (Cloudflare cuts at 100s), 40s if it stands alone. "
        "This and the next two are for rules that say nothing of their own.",
    ),
    Flag(
        "ws-subprotocols",
        "list",
        env=("TUNNEL_WS_SUBPROTOCOLS",),
        metavar="NAME",
        help="Offer services this WebSocket subprotocol alone where a visitor offers it, such as mqtt; repeatable.",
    ),
    Flag(
        "proxy-protocol",
        env=("TUNNEL_PROXY_PROTOCOL",),
        metavar="v2[@HOST:PORT,...]",
        help="v2: begin connections to services with a PROXY protocol header that names the visitor; v2@HOST:PORT: "
        "to that service alone.",
    ),
    Flag("icmpv4-src", env=("TUNNEL_ICMPV4_SRC",), metavar="IP", help="Source of pings to private networks over IPv4."),
    Flag(
        "icmpv6-src",
        env=("TUNNEL_ICMPV6_SRC",),
        metavar="IP",
        help="The same over IPv6; an interface may follow: ADDRESS%INTERFACE.",
    ),
    Flag(
        "max-active-flows",
        "uint",
        env=("TUNNEL_MAX_ACTIVE_FLOWS",),
        metavar="N",
        help="TCP and UDP flows of private networks at a time; 0: no limit.",
    ),
    Flag(
        "dns-resolver-addrs",
        "list",
        env=("TUNNEL_DNS_RESOLVER_ADDRS",),
        metavar="IP:PORT",
        help="Resolvers for private networks' virtual DNS; repeatable.",
    ),
]

_LOGS = [
    Flag(
        "loglevel",
        default="info",
        env=("TUNNEL_LOGLEVEL",),
        metavar="LEVEL",
        choices=_LEVELS,
        lenient=True,
        help="debug, info, warn, error or fatal. Lines go to stderr.",
    ),
    Flag(
        "output",
        default="default",
        env=("TUNNEL_MANAGEMENT_OUTPUT", "TUNNEL_LOG_OUTPUT"),
        metavar="FORMAT",
        choices=("default", "json"),
        lenient=True,
        help="default (for people) or json (one object a line).",
    ),
    Flag("logfile", env=("TUNNEL_LOGFILE",), metavar="FILE", help="Write JSON lines to FILE too."),
    Flag(
        "log-directory",
        env=("TUNNEL_LOGDIRECTORY",),
        metavar="DIR",
        help="The same, in files that are rotated at 1 MB.",
    ),
    Flag(
        "access-log",
        "bool",
        env=("TUNNEL_ACCESS_LOG",),
        help="One line a request: ray, client, rule, status, bytes, milliseconds.",
    ),
]

_DIAGNOSIS = [
    Flag(
        "metrics",
        default="localhost:0",
        env=("TUNNEL_METRICS",),
        metavar="HOST:PORT",
        help="Serve /ready, /metrics and more here. By default the first free port of 20241 to 20245.",
    ),
    Flag(
        "no-prechecks",
        "bool",
        env=("TUNNEL_NO_PRECHECKS",),
        help="Do not check at the start how the edge can be reached.",
    ),
    Flag("label", metavar="TEXT", help="A name for this connector, shown in the dashboard."),
    Flag(
        "management-diagnostics",
        "bool",
        "true",
        env=("TUNNEL_MANAGEMENT_DIAGNOSTICS",),
        help="Let the management service read metrics and profiles.",
    ),
    Flag(
        "management-hostname",
        default="management.argotunnel.com",
        env=("TUNNEL_MANAGEMENT_HOSTNAME",),
        metavar="HOST",
        help="Requests for this host name are the management service's.",
    ),
    Flag(
        "service-op-ip",
        default="198.41.200.113:80",
        env=("TUNNEL_SERVICE_OP_IP",),
        metavar="IP:PORT",
        help="Where to look for this machine's own address when the edge cannot be asked.",
    ),
]

_OPERATION = [
    Flag(
        "inspect",
        "optional",
        group="Operation",
        metavar="[HOST:PORT]",
        help="Show the traffic on a page; the log tells its address. Default 127.0.0.1 and a free port.",
    ),
    Flag(
        "capture",
        group="Operation",
        metavar="FILE",
        help="Append what passes to FILE, secrets masked; read it with: capture show|export, inspect, replay.",
    ),
    Flag("no-redact", "bool", group="Operation", help="Let --inspect and --capture show and keep secrets too."),
    Flag(
        "workers",
        default="1",
        env=("TUNNEL_WORKERS",),
        group="Operation",
        metavar="N",
        help="Spread the connections over N processes, for more than one core; auto: one per usable core.",
    ),
    Flag(
        "pidfile",
        env=("TUNNEL_PIDFILE",),
        metavar="FILE",
        help="Write the process id to FILE after the first registration.",
    ),
    Flag(
        "stdin-control",
        "bool",
        env=("STDIN_CONTROL",),
        help="Take commands from standard input: reconnect [TIME], help.",
    ),
    Flag(
        "quick-service",
        default="https://api.trycloudflare.com",
        metavar="URL",
        help="Where `tunnel --url` without a token asks for a quick tunnel.",
    ),
    Flag(
        "hostname",
        env=("TUNNEL_HOSTNAME",),
        metavar="HOST",
        help="Of classic tunnels, which are gone; `run` ignores it with a warning.",
    ),
    Flag(
        "name",
        env=("TUNNEL_NAME",),
        alias="n",
        metavar="NAME",
        help="Create and run a tunnel: refused here, where none can be created.",
    ),
]

_SHUTDOWN = [
    Flag(
        "grace-period",
        "duration",
        "30s",
        env=("TUNNEL_GRACE_PERIOD",),
        metavar="TIME",
        help="How long requests in flight may take after SIGTERM or SIGINT; at most 3m.",
    ),
    Flag(
        "retries",
        "int",
        "5",
        env=("TUNNEL_RETRIES",),
        metavar="N",
        help="Waits between attempts double up to 2^N seconds; attempts never end.",
    ),
    Flag("rpc-timeout", "duration", "5s", metavar="TIME", help="How long the edge may take to answer a registration."),
]

_NO_EFFECT = [
    Flag("no-autoupdate", "bool", env=("NO_AUTOUPDATE",)),
    Flag("autoupdate-freq", "duration", "24h"),
    Flag("trace-output", env=("TUNNEL_TRACE_OUTPUT",)),
    Flag("is-autoupdated", "bool"),
    Flag("id", env=("TUNNEL_ID",)),
    Flag("api-key", env=("TUNNEL_API_KEY",), secret=True),
    Flag("api-email", env=("TUNNEL_API_EMAIL",)),
    Flag("api-ca-key", env=("TUNNEL_API_CA_KEY",), secret=True),
    Flag("api-url", default="https://api.cloudflare.com/client/v4", env=("TUNNEL_API_URL",)),
    Flag("metrics-update-freq", "duration", "5s", env=("TUNNEL_METRICS_UPDATE_FREQ",)),
    Flag("heartbeat-interval", "duration", "5s"),
    Flag("heartbeat-count", "int", "5"),
    Flag("compression-quality", "int", "0", env=("TUNNEL_COMPRESSION_LEVEL",)),
    Flag("use-reconnect-token", "bool", "true", env=("TUNNEL_USE_RECONNECT_TOKEN",)),
    Flag("dial-edge-timeout", "duration", "15s", env=("DIAL_EDGE_TIMEOUT",)),
    Flag("lb-pool", env=("TUNNEL_LB_POOL",)),
    Flag("ui", "bool"),
    Flag("max-fetch-size", "int", env=("TUNNEL_MAX_FETCH_SIZE",)),
    Flag("overwrite-dns", "bool", env=("TUNNEL_FORCE_PROVISIONING_DNS",), alias="f"),
    Flag("proxy-dns", "bool"),
    Flag("proxy-dns-port", "int"),
    Flag("proxy-dns-address"),
    Flag("proxy-dns-upstream", "list"),
    Flag("proxy-dns-max-upstream-conns", "int"),
    Flag("proxy-dns-bootstrap", "list"),
    Flag("proxy-connection-timeout", "duration", "90s"),
    Flag("proxy-expect-continue-timeout", "duration", "90s"),
    Flag("proxy-address", default="127.0.0.1", env=("TUNNEL_PROXY_ADDRESS",)),
    Flag("proxy-port", "int", "0", env=("TUNNEL_PROXY_PORT",)),
    Flag("local-ssh-port", env=("LOCAL_SSH_PORT",)),
    Flag("ssh-idle-timeout", "duration", env=("SSH_IDLE_TIMEOUT",)),
    Flag("ssh-max-timeout", "duration", env=("SSH_MAX_TIMEOUT",)),
    Flag("bucket-name", env=("BUCKET_ID",)),
    Flag("region-name", env=("REGION_ID",)),
    Flag("secret-id", env=("SECRET_ID",), secret=True),
    Flag("access-key-id", env=("ACCESS_CLIENT_ID",), secret=True),
    Flag("session-token", env=("SESSION_TOKEN_ID",), secret=True),
    Flag("s3-url-host", env=("S3_URL",)),
    Flag("host-key-path", env=("HOST_KEY_PATH",)),
    Flag(
        "transport-loglevel",
        default="info",
        env=("TUNNEL_PROTO_LOGLEVEL", "TUNNEL_TRANSPORT_LOGLEVEL"),
        alias="proto-loglevel",
        choices=_LEVELS,
        lenient=True,
    ),
    Flag("ssh-server", "bool", env=("TUNNEL_SSH_SERVER",)),
]

_BY_GROUP = dict(zip(GROUPS, (_CREDENTIALS, _EDGE, _ORIGIN, _LOGS, _DIAGNOSIS, _OPERATION, _SHUTDOWN), strict=True))

FLAGS: dict[str, Flag] = {
    flag.name: flag
    for flag in (
        *(flag._replace(group=group, effect=USED) for group, flags in _BY_GROUP.items() for flag in flags),
        *_NO_EFFECT,
    )
}

ALIASES: dict[str, str] = {flag.alias: flag.name for flag in FLAGS.values() if flag.alias}
