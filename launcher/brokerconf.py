"""mosquitto.conf: writing a safe one in the dialect of the broker's version, and reading somebody else's.

Owns: every option that we set and why, the differences of 2.0 and 2.1, what makes a foreign configuration open.
In: what the broker is (`Dialect`), where things are (`Shape`), or the text of a file. Out: text, `Finding`s.
Never: starts a broker, writes a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

MAX_PACKET_BYTES = 1_048_576
"""1 MiB: above every sensor, below what would let one client fill the broker (2.0 has no limit of its own)."""

MAX_CONNECTIONS = 1_000
MAX_QUEUED_MESSAGES = 1_000
MAX_QUEUED_BYTES = 16_777_216
MAX_INFLIGHT = 20
HEADER_BYTES = 16_384
"""Request head of a WebSocket: Access adds a JWT and cookies to it, and 4 KiB (2.1's default) are too few for those."""

AUTOSAVE_SECONDS = 60
CLIENT_EXPIRATION = "14d"
"""A session whose client stayed away for so long is dropped with its queue."""

PASSWORD_PLUGIN, ACL_PLUGIN = "mosquitto_password_file.so", "mosquitto_acl_file.so"
Severity = Literal["open", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """What the broker understands. `plugins`: the directory with 2.1's file plugins, empty where there are none."""

    version: tuple[int, int, int]
    plugins: str = ""

    @property
    def modern(self) -> bool:
        """2.1 or newer: settings per listener, plugins in place of `password_file` and `acl_file`."""
        return self.version >= (2, 1, 0)

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


@dataclass(frozen=True, slots=True)
class Listener:
    """One address. No host: every interface, which is right inside a container's private network only."""

    port: int
    protocol: Literal["mqtt", "websockets"] = "mqtt"
    host: str | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """Where the broker's things are (paths as it sees them, with a final slash or empty) and what it should do."""

    listeners: Sequence[Listener]
    directory: str = ""
    data: str = "data"
    user: str | None = None
    written_by: str = "the launcher"
    anonymous: bool = False
    save_each_change: bool = False
    proxy_protocol: bool = False
    debug: bool = False


def configuration(dialect: Dialect, shape: Shape) -> str:
    """Text of mosquitto.conf."""
    lines = [f"# Written by {shape.written_by} for Mosquitto {dialect}; every start replaces it."]
    if dialect.modern and dialect.plugins:
        folder = dialect.plugins.rstrip("/")
        lines += [
            f"global_plugin {folder}/{PASSWORD_PLUGIN}",
            f"plugin_opt_password_file {shape.directory}passwords",
            f"global_plugin {folder}/{ACL_PLUGIN}",
            f"plugin_opt_acl_file {shape.directory}acl",
        ]
    else:
        lines += [f"password_file {shape.directory}passwords", f"acl_file {shape.directory}acl"]
    if not dialect.modern:
        lines.append(f"allow_anonymous {_bool(shape.anonymous)}")
    lines += [
        "",
        "# Bounds: packets, queues per client, clients, the head of a WebSocket's request.",
        f"max_packet_size {MAX_PACKET_BYTES}",
        f"max_queued_messages {MAX_QUEUED_MESSAGES}",
        f"max_queued_bytes {MAX_QUEUED_BYTES}",
        f"max_inflight_messages {MAX_INFLIGHT}",
    ]
    if dialect.modern:
        lines += [f"packet_buffer_size {HEADER_BYTES}", f"global_max_connections {MAX_CONNECTIONS}"]
    else:
        lines.append(f"websockets_headers_size {HEADER_BYTES}")
    lines += [
        "",
        "persistence true",
        f"persistence_location {shape.data}",
        f"persistent_client_expiration {CLIENT_EXPIRATION}",
    ]
    if shape.save_each_change:
        lines += ["autosave_on_changes true", "autosave_interval 1"]
    else:
        lines.append(f"autosave_interval {AUTOSAVE_SECONDS}")
    lines += ["", "log_dest stderr"]  # 2.0 buffers standard output when it is a pipe: lines would come minutes late
    kinds = ["error", "warning", "notice", "information"] + (["subscribe", "debug"] if shape.debug else [])
    lines += [f"log_type {kind}" for kind in kinds]
    lines += ["connection_messages true", "log_timestamp false", "sys_interval 10", "set_tcp_nodelay true"]
    if shape.user is not None:
        lines.append(f"user {shape.user}")
    for listener in shape.listeners:
        lines += ["", f"listener {listener.port}" + (f" {listener.host}" if listener.host else "")]
        lines += [f"protocol {listener.protocol}", f"max_connections {MAX_CONNECTIONS}"]
        if dialect.modern:
            lines.append(f"listener_allow_anonymous {_bool(shape.anonymous)}")
        if listener.protocol == "websockets":
            if listener.host is not None and ":" not in listener.host and not dialect.modern:
                # 2.0 hands the address to libwebsockets, which listens on every interface unless IPv6 is off too.
                lines.append("socket_domain ipv4")
            if shape.proxy_protocol and dialect.modern:
                lines.append("enable_proxy_protocol 2")
    return "\n".join(lines) + "\n"


def _bool(value: bool) -> str:
    return "true" if value else "false"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a configuration that its owner should know."""

    severity: Severity
    text: str


@dataclass(slots=True)
class Reading:
    """A foreign mosquitto.conf, as far as it decides who may come in and what survives."""

    listeners: list[Listener] = field(default_factory=list)
    anonymous: bool = False
    authenticated: bool = False
    rules: bool = False
    persistence: bool = False
    proxied_port: int = 0
    """Port of a WebSocket listener that wants a PROXY header of version 2 first; 0: none does."""
    data: str = ""
    files: dict[str, str] = field(default_factory=dict)
    includes: bool = False
    findings: list[Finding] = field(default_factory=list)

    @property
    def open(self) -> bool:
        """Whether a stranger can use the broker."""
        return any(finding.severity == "open" for finding in self.findings)


DEPRECATED = ("password_file", "acl_file", "per_listener_settings", "auto_id_prefix", "allow_zero_length_clientid")


def read(text: str, dialect: Dialect | None = None) -> Reading:
    """Understand a configuration, and say where it is open or forgetful."""
    result = Reading()
    say = result.findings
    explicit: bool | None = None
    options: list[tuple[str, str]] = []
    for raw in text.splitlines():
        line = raw.strip()
        if line and not line.startswith("#"):
            word, _, rest = line.partition(" ")
            options.append((word, rest.strip()))
    for word, rest in options:
        if word in {"listener", "port"}:
            parts = rest.split()
            if not parts or not parts[0].isdigit() or not 0 <= int(parts[0]) <= 65535:
                say.append(Finding("warning", f"`{word} {rest}` has no port that can be read"))
                continue
            result.listeners.append(Listener(int(parts[0]), "mqtt", parts[1] if len(parts) > 1 else None))
        elif word == "protocol" and result.listeners and rest == "websockets":
            last = result.listeners.pop()
            result.listeners.append(Listener(last.port, "websockets", last.host))
        elif word == "enable_proxy_protocol" and result.listeners and rest == "2":
            result.proxied_port = result.listeners[-1].port
        elif word in {"allow_anonymous", "listener_allow_anonymous"}:
            explicit = bool(explicit) or rest == "true"
        elif word in {"password_file", "acl_file", "plugin_opt_password_file", "plugin_opt_acl_file"}:
            kind = word.removeprefix("plugin_opt_")
            result.files[kind] = rest
            if kind == "password_file":
                result.authenticated = True
            else:
                result.rules = True
        elif word in {"plugin", "auth_plugin", "global_plugin", "plugin_load"} and "dynamic_security" in rest:
            result.authenticated = result.rules = True
        elif word in {"psk_file", "require_certificate"}:
            result.authenticated = True
        elif word == "persistence":
            result.persistence = rest == "true"
        elif word == "persistence_location":
            result.data = rest
        elif word == "include_dir":
            result.includes = True
    # Without a listener 1.6 and 2.x differ; 2.x then serves the loopback only, and lets everybody there in.
    result.anonymous = explicit if explicit is not None else not result.listeners
    if result.anonymous:
        say.append(Finding("open", "allow_anonymous true: everybody who knows the host name may read and write"))
    elif not result.authenticated and not result.includes:
        say.append(Finding("warning", "no password_file: nobody can log in"))
    if not result.rules and not result.includes:
        severity: Severity = "warning" if not result.anonymous else "note"
        say.append(Finding(severity, "no acl_file: every client sees every topic of every other"))
    if result.authenticated and result.anonymous and result.rules:
        say.append(Finding("note", "user names prove nothing while clients without a password are let in"))
    if not result.listeners:
        say.append(Finding("warning", "no listener: the broker answers on its own loopback only, the connector cannot"))
    elif not any(listener.protocol == "websockets" for listener in result.listeners):
        say.append(Finding("warning", "no listener with `protocol websockets`: the tunnel carries WebSockets"))
    if not result.persistence:
        say.append(Finding("warning", "persistence is off: retained messages and sessions are gone after a restart"))
    if not any(word in {"max_packet_size", "message_size_limit"} for word, _ in options):
        say.append(Finding("note", "no max_packet_size: one client may send packets of 256 MB"))
    if any(word == "log_dest" and rest.startswith("stdout") for word, rest in options):
        say.append(Finding("note", "log_dest stdout is buffered by 2.0 and lost when it is killed: stderr is not"))
    if dialect is not None and dialect.modern:
        old = [word for word, _ in options if word in DEPRECATED]
        if old:
            say.append(Finding("note", f"Mosquitto {dialect} calls {', '.join(dict.fromkeys(old))} deprecated"))
    if result.includes:
        say.append(Finding("note", "include_dir: the files there were not looked at"))
    return result
