"""Every flag of `tunnel` and `tunnel run`: name, type, default, environment, and what this version does with it.

Owns: the table. In: nothing. Out: FLAGS, by name. Never: parses.
"""

from __future__ import annotations

from typing import NamedTuple

USED, LATER, NO_EFFECT = "used", "later", "no effect"
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


GROUPS = ("Credentials", "Edge", "Origin", "Operation", "Shutdown and retries")
"""Order of the groups in help."""

_USED = [
    Flag(
        "token",
        env=("TUNNEL_TOKEN",),
        group="Credentials",
        metavar="TOKEN",
        secret=True,
        help="The tunnel's token. On the command line other users of the machine may see it: prefer --token-file.",
    ),
    Flag(
        "token-file",
        env=("TUNNEL_TOKEN_FILE",),
        group="Credentials",
        metavar="FILE",
        help="Read the token from FILE; white space around it does not matter. --token wins.",
    ),
    Flag(
        "edge",
        "list",
        env=("TUNNEL_EDGE",),
        group="Edge",
        metavar="HOST:PORT",
        help="Connect to this edge instead of Cloudflare's; repeatable, one connection per address.",
    ),
    Flag(
        "cacert",
        env=("TUNNEL_CACERT",),
        group="Edge",
        metavar="FILE",
        help="Trust only the PEM certificates in FILE for the edge.",
    ),
    Flag(
        "protocol",
        default="auto",
        env=("TUNNEL_TRANSPORT_PROTOCOL",),
        alias="p",
        group="Edge",
        metavar="NAME",
        help="auto, quic or http2; auto tries QUIC first, HTTP/2 0.3 s later, and returns to QUIC when it works.",
    ),
    Flag(
        "post-quantum",
        "bool",
        env=("TUNNEL_POST_QUANTUM",),
        alias="pq",
        group="Edge",
        help="Connect with post-quantum key exchange or not at all; over QUIC only.",
    ),
    Flag(
        "quic-disable-pmtu-discovery",
        "bool",
        env=("TUNNEL_DISABLE_QUIC_PMTU",),
        group="Edge",
        help="Send QUIC packets of 1,200 bytes, never larger ones.",
    ),
    Flag(
        "quic-connection-level-flow-control-limit",
        "int",
        "31457280",
        env=("TUNNEL_QUIC_CONN_LEVEL_FLOW_CONTROL_LIMIT",),
        group="Edge",
        metavar="BYTES",
        help="What the edge may send ahead on one QUIC connection.",
    ),
    Flag(
        "quic-stream-level-flow-control-limit",
        "int",
        "1048576",
        env=("TUNNEL_QUIC_STREAM_LEVEL_FLOW_CONTROL_LIMIT",),
        group="Edge",
        metavar="BYTES",
        help="What the edge may send ahead on one QUIC stream.",
    ),
    Flag(
        "max-edge-addr-retries",
        "int",
        "8",
        group="Shutdown and retries",
        metavar="N",
        help="Dials in a row that may reach nobody before the waits between them start over.",
    ),
    Flag("ha-connections", "int", "4", group="Edge", metavar="N", help="How many connections to keep up, 1 to 32."),
    Flag(
        "edge-ip-version",
        default="auto",
        env=("TUNNEL_EDGE_IP_VERSION",),
        group="Edge",
        metavar="V",
        choices=("auto", "4", "6"),
        help="auto, 4 or 6: which addresses of the edge to use.",
    ),
    Flag(
        "edge-bind-address",
        env=("TUNNEL_EDGE_BIND_ADDRESS",),
        group="Edge",
        metavar="IP",
        help="Local address for connections to the edge.",
    ),
    Flag(
        "region",
        env=("TUNNEL_REGION",),
        group="Edge",
        metavar="NAME",
        help="Connect to this region of Cloudflare's edge only, such as us. Without it, worldwide.",
    ),
    Flag("features", "list", alias="F", group="Edge", metavar="NAME", help="Announce this feature too; repeatable."),
    Flag(
        "url",
        default="http://localhost:8080",
        env=("TUNNEL_URL",),
        group="Origin",
        metavar="URL",
        help="Send all requests to this service, until the edge pushes a configuration. Without it they get 503.",
    ),
    Flag(
        "tag",
        "list",
        env=("TUNNEL_TAG",),
        group="Origin",
        metavar="NAME=VALUE",
        help="Add the header Cf-Warp-Tag-NAME: VALUE to requests; repeatable.",
    ),
    Flag(
        "loglevel",
        default="info",
        env=("TUNNEL_LOGLEVEL",),
        group="Operation",
        metavar="LEVEL",
        choices=("trace", "debug", "info", "warn", "error", "fatal"),
        help="debug, info, warn, error or fatal. Lines go to stderr.",
    ),
    Flag(
        "output",
        default="default",
        env=("TUNNEL_MANAGEMENT_OUTPUT", "TUNNEL_LOG_OUTPUT"),
        group="Operation",
        metavar="FORMAT",
        choices=("default", "json"),
        help="default (for people) or json (one object a line).",
    ),
    Flag(
        "metrics",
        default="localhost:0",
        env=("TUNNEL_METRICS",),
        group="Operation",
        metavar="HOST:PORT",
        help="Serve /ready, /healthcheck and /metrics here. Without it there is no such server in this version.",
    ),
    Flag(
        "pidfile",
        env=("TUNNEL_PIDFILE",),
        group="Operation",
        metavar="FILE",
        help="Write the process id to FILE after the first registration.",
    ),
    Flag(
        "grace-period",
        "duration",
        "30s",
        env=("TUNNEL_GRACE_PERIOD",),
        group="Shutdown and retries",
        metavar="TIME",
        help="How long requests in flight may take after SIGTERM or SIGINT; at most 3m.",
    ),
    Flag(
        "retries",
        "int",
        "5",
        env=("TUNNEL_RETRIES",),
        group="Shutdown and retries",
        metavar="N",
        help="Waits between attempts double up to 2^N seconds; attempts never end.",
    ),
    Flag(
        "rpc-timeout",
        "duration",
        "5s",
        group="Shutdown and retries",
        metavar="TIME",
        help="How long the edge may take to answer a registration.",
    ),
]

_LATER = [
    Flag("config"),
    Flag("origincert", env=("TUNNEL_ORIGIN_CERT",)),
    Flag(
        "transport-loglevel",
        default="info",
        env=("TUNNEL_PROTO_LOGLEVEL", "TUNNEL_TRANSPORT_LOGLEVEL"),
        alias="proto-loglevel",
    ),
    Flag("logfile", env=("TUNNEL_LOGFILE",)),
    Flag("log-directory", env=("TUNNEL_LOGDIRECTORY",)),
    Flag("hostname", env=("TUNNEL_HOSTNAME",)),
    Flag("lb-pool", env=("TUNNEL_LB_POOL",)),
    Flag("write-stream-timeout", "duration", "0s", env=("TUNNEL_STREAM_WRITE_TIMEOUT",)),
    Flag("label"),
    Flag("stdin-control", "bool", env=("STDIN_CONTROL",)),
    Flag("name", env=("TUNNEL_NAME",), alias="n"),
    Flag("quick-service", default="https://api.trycloudflare.com"),
    Flag("management-diagnostics", "bool", "true", env=("TUNNEL_MANAGEMENT_DIAGNOSTICS",)),
    Flag("credentials-file", env=("TUNNEL_CRED_FILE",), alias="cred-file"),
    Flag("credentials-contents", env=("TUNNEL_CRED_CONTENTS",), secret=True),
    Flag("icmpv4-src", env=("TUNNEL_ICMPV4_SRC",)),
    Flag("icmpv6-src", env=("TUNNEL_ICMPV6_SRC",)),
    Flag("max-active-flows", "uint", env=("TUNNEL_MAX_ACTIVE_FLOWS",)),
    Flag("dns-resolver-addrs", "list", env=("TUNNEL_DNS_RESOLVER_ADDRS",)),
    Flag("hello-world", "bool", env=("TUNNEL_HELLO_WORLD",)),
    Flag("socks5", "bool", env=("TUNNEL_SOCKS",)),
    Flag("proxy-connect-timeout", "duration", "30s"),
    Flag("proxy-tls-timeout", "duration", "10s"),
    Flag("proxy-tcp-keepalive", "duration", "30s"),
    Flag("proxy-no-happy-eyeballs", "bool"),
    Flag("proxy-keepalive-connections", "int", "100"),
    Flag("proxy-keepalive-timeout", "duration", "90s"),
    Flag("http-host-header", env=("TUNNEL_HTTP_HOST_HEADER",)),
    Flag("origin-server-name", env=("TUNNEL_ORIGIN_SERVER_NAME",)),
    Flag("unix-socket", env=("TUNNEL_UNIX_SOCKET",)),
    Flag("origin-ca-pool", env=("TUNNEL_ORIGIN_CA_POOL",)),
    Flag("no-tls-verify", "bool", env=("NO_TLS_VERIFY",)),
    Flag("no-chunked-encoding", "bool", env=("TUNNEL_NO_CHUNKED_ENCODING",)),
    Flag("http2-origin", "bool", env=("TUNNEL_ORIGIN_ENABLE_HTTP2",)),
    Flag("management-hostname", default="management.argotunnel.com", env=("TUNNEL_MANAGEMENT_HOSTNAME",)),
    Flag("service-op-ip", default="198.41.200.113:80", env=("TUNNEL_SERVICE_OP_IP",)),
    Flag("bastion", "bool", env=("TUNNEL_BASTION",)),
]

_NO_EFFECT = [
    Flag("no-autoupdate", "bool", env=("NO_AUTOUPDATE",)),
    Flag("autoupdate-freq", "duration", "24h"),
    Flag("no-prechecks", "bool", env=("TUNNEL_NO_PRECHECKS",)),
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
    Flag("ssh-server", "bool", env=("TUNNEL_SSH_SERVER",)),
]

FLAGS: dict[str, Flag] = {
    flag.name: flag
    for flag in (
        *(flag._replace(effect=USED) for flag in _USED),
        *(flag._replace(effect=LATER) for flag in _LATER),
        *_NO_EFFECT,
    )
}

ALIASES: dict[str, str] = {flag.alias: flag.name for flag in FLAGS.values() if flag.alias}
