"""What every engine can do with a stack, and the facts that commands print.

Owns: the interface `Engine`, the values it returns, reading the connector's own answers and log lines.
In: JSON and log text of the connector. Out: `StackState`, `LogLine`.
Never: knows whether a service is a container or a process.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from launcher.brokerconf import Dialect, Reading, read
from launcher.stackdir import Settings

BROKER, CONNECTOR = "broker", "connector"
SERVICES = (BROKER, CONNECTOR)
METRICS_PORT = 20241
LOOPBACK = "127.0.0.1"
WS_PORT = 9001

WS_KEEP_ALIVE = "40s"
"""Cloudflare cuts a WebSocket after 100 s without traffic, and MQTT clients may stay silent for longer."""

WS_SUBPROTOCOL = "mqtt"
"""Mosquitto 2.1 takes no list; some clients offer `mqtt` and `mqttv3.1`."""

Service = Literal["broker", "connector"]
Progress = Callable[[str, str], None]
"""Called with a service (or `engine`) and one line of what is going on."""


@dataclass(slots=True)
class ServiceState:
    """One service as it is now. `state`: running, restarting, exited, created, absent."""

    service: str
    state: str = "absent"
    health: str = ""
    what: str = ""
    restarts: int = 0
    since: str = ""
    detail: str = ""


@dataclass(slots=True)
class StackState:
    """What `launcher status` shows."""

    name: str
    engine: str
    directory: str
    services: list[ServiceState] = field(default_factory=list)
    ready_connections: int | None = None
    connections: list[dict[str, Any]] = field(default_factory=list)
    rule: str = ""
    hostnames: list[str] = field(default_factory=list)
    last_error: str = ""
    open_to_everyone: bool = False

    @property
    def up(self) -> bool:
        """Broker not unhealthy, connector registered."""
        return (
            len(self.services) == 2
            and all(one.state == "running" and one.health != "unhealthy" for one in self.services)
            and bool(self.ready_connections)
        )


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that `doctor` looked at. `good` None: worth knowing, nothing is broken."""

    name: str
    good: bool | None
    text: str
    advice: str = ""
    ms: float | None = None


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of one service; `time` in RFC 3339, so that lines of both can be sorted."""

    service: str
    time: str
    text: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `up` should bring about, with the texts of all files."""

    settings: Settings
    token: str = field(repr=False)
    passwords: str = field(repr=False)
    acl: str = field(repr=False)
    health_password: str = field(repr=False)
    own_config: str | None = field(default=None, repr=False)
    connector_ca: str | None = None
    database: bytes | None = field(default=None, repr=False)
    wait_seconds: float = 60.0


class Engine(Protocol):
    """Runs one stack. Every method raises StackError with one line."""

    title: str

    async def up(self, wanted: Wanted, progress: Progress) -> Dialect:
        """Start or update both services; returns when the connector is registered."""
        ...

    async def down(self, progress: Progress, *, volumes: bool = False) -> bool:
        """Stop the connector, then the broker; False when nothing ran."""
        ...

    async def restart(self, services: Sequence[str], progress: Progress, wait_seconds: float = 60.0) -> None:
        """Stop and start the services, in the right order."""
        ...

    async def states(self) -> list[ServiceState]:
        """Both services."""
        ...

    async def fetch(self, path: str) -> Any:
        """The connector's answer on its metrics port: JSON, or None when it does not answer."""
        ...

    def logs(self, services: Sequence[str], *, follow: bool, tail: int) -> AsyncIterator[LogLine]:
        """Lines of the services, sorted by time; with `follow` for as long as the caller listens."""
        ...

    async def reload(self, passwords: str, acl: str, health_password: str) -> None:
        """Give the running broker new users and rules; StackError when it refused them and has the old ones again."""
        ...

    async def broker_check(self, user: str, password: str, ws: bool, proxied: bool) -> float:
        """An authenticated CONNECT and a QoS 1 round trip as the connector would reach the broker; milliseconds."""
        ...

    async def connector_doctor(self, url: str | None) -> list[Check]:
        """`connector doctor` from where the connector stands; empty when its program has none."""
        ...

    async def examine(self) -> list[Check]:
        """What only the engine can tell: images, volumes, ports, the configuration that the broker has."""
        ...

    async def close(self) -> None:
        """Release what the client side holds; the stack stays."""
        ...


def origin_of(settings: Settings) -> str:
    """The origin service that the tunnel's rule has to name."""
    if settings.engine == "native":
        return f"http://localhost:{settings.ws_port}"
    return "http://mosquitto:9001"


def rules_of(configuration: Any) -> list[tuple[str, str]]:
    """(hostname, service) of the ingress rules in the connector's `/config` answer or pushed configuration."""
    if not isinstance(configuration, dict):
        return []
    inner = configuration.get("config", configuration)
    ingress = inner.get("ingress") if isinstance(inner, dict) else None
    found = []
    for rule in ingress if isinstance(ingress, list) else []:
        if isinstance(rule, dict) and isinstance(rule.get("service"), str):
            found.append((str(rule.get("hostname") or "*"), rule["service"]))
    return found


def broker_hosts(settings: Settings) -> list[str]:
    """How a rule may call the broker."""
    if settings.engine == "native":
        return ["localhost", LOOPBACK]
    return ["mosquitto", f"{settings.name}-broker"]


def proxy_option(settings: Settings) -> str:
    """Value of the connector's --proxy-protocol: a header for the broker's listener, and for no other service."""
    return "v2@" + ",".join(f"{host}:{settings.proxied_port}" for host in broker_hosts(settings))


def proxied_port(settings: Settings, own: Reading | None, dialect: Dialect, progress: Progress, *, sends: bool) -> int:
    """Port of the broker's listener that wants a PROXY header; 0 where nobody sends one (`sends`) or it takes none."""
    if own is not None:
        return own.proxied_port
    if settings.proxy_protocol and not dialect.modern:
        progress(BROKER, f"Mosquitto {dialect} takes no client addresses from a connector: 2.1 does")
    if settings.proxy_protocol is False or not (dialect.modern and sends):
        return 0
    return settings.ws_port if settings.engine == "native" else WS_PORT


def reaches_broker(service: str, settings: Settings) -> bool:
    """Whether a rule's service is this stack's broker."""
    wanted, got = urlsplit(origin_of(settings)), urlsplit(service)
    hosts = broker_hosts(settings)
    return got.scheme in {"http", "ws", "tcp"} and got.hostname in hosts and got.port == wanted.port


def describe_rules(rules: Sequence[tuple[str, str]], settings: Settings) -> tuple[str, list[str]]:
    """The rule for people, and the public host names that lead to the broker."""
    if not rules:
        return "", []
    good = [(host, service) for host, service in rules if reaches_broker(service, settings)]
    if good:
        return ", ".join(f"{host} -> {service}" for host, service in good), [host for host, _ in good if host != "*"]
    others = ", ".join(f"{host} -> {service}" for host, service in rules)
    return f"none leads to {origin_of(settings)} (there is: {others})", []


CONFIGURED = re.compile(r"Updated to new configuration.*")
CONSOLE = re.compile(r"^(\d{4}-\S+Z) (DBG|INF|WRN|ERR|FTL|PNC) (.*)$")


def read_log(text: str) -> tuple[str, str]:
    """(level, message) of one connector log line, whichever format."""
    if text.startswith("{"):
        try:
            facts = json.loads(text)
        except ValueError:
            return "info", text
        if isinstance(facts, dict):
            message = str(facts.get("message", ""))
            if facts.get("error"):
                message = f"{message}: {facts['error']}" if message else str(facts["error"])
            return str(facts.get("level", "info")), message
    found = CONSOLE.match(text)
    if found:
        level = {"DBG": "debug", "INF": "info", "WRN": "warn", "ERR": "error"}.get(found[2], "fatal")
        return level, found[3].strip()
    return ("error" if text.lower().startswith("error") else "info"), text


def pushed_configuration(lines: Sequence[str]) -> Any:
    """The last configuration that the connector's log lines tell of; None without one."""
    for text in reversed(lines):
        if "Updated to new configuration" not in text:
            continue
        if text.startswith("{"):
            try:
                return json.loads(json.loads(text)["config"])
            except (ValueError, KeyError, TypeError):
                continue
        found = re.search(r'config=("(?:[^"\\]|\\.)*")', text)
        if found:
            try:
                return json.loads(json.loads(found[1]))
            except ValueError:
                continue
    return None


def last_error(lines: Sequence[str]) -> str:
    """The newest error that a registration has not made obsolete."""
    for text in reversed(lines):
        level, message = read_log(text)
        if level in {"error", "fatal"}:
            return message
        if message.startswith("Registered tunnel connection"):
            return ""
    return ""


def doctor_checks(text: str) -> list[Check]:
    """The hops in `connector doctor --json`'s answer; empty when it is none."""
    try:
        hops = json.loads(text)["hops"]
    except (ValueError, KeyError, TypeError):
        return []
    checks = []
    for hop in hops if isinstance(hops, list) else []:
        status = hop.get("status")
        if status == "skip":
            continue
        good = {"ok": True, "fail": False}.get(status)
        name = f"hop {hop.get('hop')}"
        checks.append(
            Check(name, good, str(hop.get("detail")), str(hop.get("advice") or ""), float(hop.get("ms") or 0))
        )
    return checks


def doctor_command(
    program: Sequence[str], settings: Settings, token_file: str, ca: str | None, url: str | None
) -> list[str]:
    """The command line of `connector doctor` for this stack."""
    words = [*program, "doctor", "--json", *settings.connector_args, "--token-file", token_file]
    if settings.proxied_port:
        words += ["--proxy-protocol", proxy_option(settings)]
    if ca is not None:
        words += ["--cacert", ca]
    return [*words, url] if url else words


def configuration_checks(text: str) -> list[Check]:
    """What a mosquitto.conf says about who may come in."""
    if not text:
        return [Check("configuration", False, "the broker has none", "launcher up writes it")]
    reading = read(text)
    if not reading.findings:
        return [Check("configuration", True, "closed to strangers, bounded, saves what it holds")]
    advice = "launcher up without --config and --allow-anonymous writes a closed one"
    return [
        Check("configuration", False if one.severity == "open" else None, one.text, advice) for one in reading.findings
    ]


LARGE_DATABASE = 4 * 1024 * 1024
"""Written at every change, this takes the broker some 10 ms on a good disk: a hundred changes a second are its end."""


def database_check(size: int, settings: Settings) -> Check:
    """How much the broker writes to keep what it holds, and how often."""
    shown = f"{size / 1_000_000:.1f} MB" if size >= 1_000_000 else f"{max(1, size // 1000)} kB"
    if settings.durability != "each":
        text = f"{shown}, saved once a minute: kill -9 of the broker loses what is newer"
        return Check("database", True, text)
    large = size > LARGE_DATABASE
    advice = "many changes a second? launcher up --durability interval" if large else ""
    return Check("database", None if large else True, f"{shown}, saved after each change", advice)


async def collect(engine: Engine, settings: Settings, directory: str) -> StackState:
    """Everything that `status` shows."""
    state = StackState(settings.name, engine.title, directory, open_to_everyone=settings.allow_anonymous)
    state.services = await engine.states()
    connector = next((one for one in state.services if one.service == CONNECTOR), None)
    if connector is None or connector.state == "absent":
        return state
    lines = [line.text async for line in engine.logs([CONNECTOR], follow=False, tail=400)]
    state.last_error = last_error(lines)
    configuration: Any = None
    if connector.state == "running":
        ready = await engine.fetch("/ready")
        if isinstance(ready, dict) and isinstance(ready.get("readyConnections"), int):
            state.ready_connections = ready["readyConnections"]
            connector.health = "registered" if state.ready_connections else "not registered"
        tunnel = await engine.fetch("/diag/tunnel")
        if isinstance(tunnel, dict) and isinstance(tunnel.get("connections"), list):
            state.connections = [one for one in tunnel["connections"] if isinstance(one, dict)]
        configuration = await engine.fetch("/config")
    rules = rules_of(configuration) or rules_of(pushed_configuration(lines))
    state.rule, state.hostnames = describe_rules(rules, settings)
    if settings.hostname and settings.hostname not in state.hostnames:
        state.hostnames.insert(0, settings.hostname)
    return state
