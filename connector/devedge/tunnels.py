"""The tunnels that the dev edge serves: identities, configurations, and which host belongs to which.

Owns: the TOML format of `--config`, `tunnels.json` in the state directory (generated identities and secrets, and the
configuration version of each tunnel), and host routing.
In: names, files, `--ingress` texts. Out: `Tunnel`s in a `Directory`; ConfigError naming file, key and reason.
Never: talks to a connector or puts a secret into a text or repr.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
import secrets
import tomllib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from connector.devedge.authority import StateDir
from connector.errors import ConfigError

DEV_ACCOUNT = "de" * 16
"""Account tag of tunnels that name none."""

TUNNEL_KEYS = ("id", "account", "secret", "hostnames", "ingress", "originRequest", "warp-routing")
RULE_KEYS = ("hostname", "path", "service", "originRequest")

NAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?")
HOSTNAME = re.compile(r"(\*\.)?([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


class Tunnel:
    """One tunnel. `config` is the remote configuration JSON value, None for a locally managed tunnel."""

    __slots__ = ("account", "config", "hostnames", "id", "name", "secret", "version")

    def __init__(self, name: str, tunnel_id: uuid.UUID, account: str, secret: bytes) -> None:
        self.name = name
        self.id = tunnel_id
        self.account = account
        self.secret = secret
        self.hostnames: list[str] = []
        self.config: dict[str, Any] | None = None
        self.version = 0

    def __repr__(self) -> str:
        return f"<Tunnel {self.name} {self.id}>"

    @property
    def all_hostnames(self) -> list[str]:
        """Hosts that lead here: NAME.localhost, the declared ones, and those of the ingress rules."""
        rules = self.config.get("ingress", []) if self.config else []
        found = [f"{self.name.lower()}.localhost", *self.hostnames]
        found += [rule["hostname"].lower() for rule in rules if rule.get("hostname") not in (None, "", "*")]
        return list(dict.fromkeys(found))


class Declaration:
    """What a user said about one tunnel: everything but the name may be missing."""

    __slots__ = ("account", "config", "hostnames", "id", "name", "secret")

    def __init__(self, name: str) -> None:
        self.name = name
        self.id: uuid.UUID | None = None
        self.account: str | None = None
        self.secret: bytes | None = None
        self.hostnames: list[str] = []
        self.config: dict[str, Any] | None = None


class Directory:
    """All tunnels, by id and by host. Replaced as a whole when the configuration file changes."""

    def __init__(self, tunnels: Iterable[Tunnel]) -> None:
        self.tunnels = {tunnel.id: tunnel for tunnel in tunnels}
        self._hosts: dict[str, Tunnel] = {}
        for tunnel in self.tunnels.values():
            for host in tunnel.all_hostnames:
                other = self._hosts.setdefault(host, tunnel)
                if other is not tunnel:
                    raise ConfigError(
                        f"hostname {host!r} belongs to two tunnels, {other.name!r} and {tunnel.name!r}",
                        advice="A hostname leads to one tunnel.",
                    )

    @property
    def hostnames(self) -> list[str]:
        """Every declared host."""
        return list(self._hosts)

    def by_host(self, host: str) -> Tunnel | None:
        """Find the tunnel of a host (without port, lower case)."""
        found = self._hosts.get(host)
        if found is not None:
            return found
        labels = host.split(".")
        for i in range(1, len(labels)):
            found = self._hosts.get("*." + ".".join(labels[i:]))
            if found is not None:
                return found
        if host in LOCAL_HOSTS and len(self.tunnels) == 1:
            return next(iter(self.tunnels.values()))
        return None


class TunnelStore:
    """`tunnels.json`: what the edge generated and must remember. One instance per state directory."""

    def __init__(self, state: StateDir) -> None:
        self._state = state

    def resolve(self, declarations: Sequence[Declaration]) -> list[Tunnel]:
        """Complete declarations with remembered or new identities, and give each configuration its version."""
        with self._state.locked():
            known = self._read()
            before = json.dumps(known, sort_keys=True)
            tunnels = [self._resolve_one(declaration, known) for declaration in declarations]
            if json.dumps(known, sort_keys=True) != before:
                self._state.write("tunnels.json", json.dumps(known, indent=1, sort_keys=True).encode())
        seen: dict[uuid.UUID, str] = {}
        for tunnel in tunnels:
            if tunnel.id in seen:
                raise ConfigError(f"tunnels {seen[tunnel.id]!r} and {tunnel.name!r} have the same id {tunnel.id}")
            seen[tunnel.id] = tunnel.name
        return tunnels

    def knows(self, name: str) -> bool:
        """Whether a tunnel of this name was ever declared here."""
        with self._state.locked():
            return name in self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self._state.path / "tunnels.json"
        try:
            known = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}", advice="Delete it to have new tunnel secrets made.") from error
        if not isinstance(known, dict) or not all(isinstance(entry, dict) for entry in known.values()):
            raise ConfigError(f"{path}: not what this program writes", advice="Delete it; new secrets are made.")
        return known

    def _resolve_one(self, declaration: Declaration, known: dict[str, dict[str, Any]]) -> Tunnel:
        entry = known.setdefault(declaration.name, {})
        if declaration.id is None:
            entry.setdefault("id", str(uuid.uuid4()))
        if declaration.secret is None:
            entry.setdefault("secret", base64.b64encode(secrets.token_bytes(32)).decode())
        try:
            tunnel = Tunnel(
                declaration.name,
                declaration.id or uuid.UUID(entry["id"]),
                declaration.account or DEV_ACCOUNT,
                declaration.secret or base64.b64decode(entry["secret"], validate=True),
            )
        except ValueError as error:
            path = self._state.path / "tunnels.json"
            raise ConfigError(
                f"{path}: {declaration.name}: {error}", advice="Delete it; new secrets are made."
            ) from error
        tunnel.hostnames = declaration.hostnames
        tunnel.config = declaration.config
        if declaration.config is not None:
            # A connector that outlives the edge must see a changed configuration as a newer one.
            digest = hashlib.sha256(json.dumps(declaration.config, sort_keys=True).encode()).hexdigest()
            if entry.get("config") != digest:
                entry["config"] = digest
                entry["version"] = int(entry.get("version", 0)) + 1
            tunnel.version = int(entry["version"])
        return tunnel


# Reading what users write.


def check_name(name: str, where: str) -> str:
    """Return a tunnel name that can be a DNS label, or raise ConfigError."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: tunnel name {name!r} is not a DNS label",
            advice="Use 1 to 63 letters, digits and inner hyphens: NAME.localhost leads to the tunnel.",
        )
    return name


def parse_ingress_flags(texts: Sequence[str]) -> dict[str, Any]:
    """Make a configuration from `--ingress HOST=SERVICE` and `--ingress SERVICE`."""
    rules: list[dict[str, Any]] = []
    catch_all: dict[str, Any] | None = None
    for text in texts:
        head, equals, tail = text.partition("=")
        if not equals or ":" in head or "/" in head:
            if catch_all is not None:
                raise ConfigError(
                    f"--ingress {text}: a second service without a hostname, after {catch_all['service']!r}",
                    advice="Write HOST=SERVICE for all but one.",
                )
            catch_all = {"service": _service(text, f"--ingress {text}")}
            continue
        rules.append({"hostname": _hostname(head, f"--ingress {text}"), "service": _service(tail, f"--ingress {text}")})
    return {"ingress": [*rules, catch_all or {"service": "http_status:404"}]}


def read_config_file(path: Path) -> list[Declaration]:
    """Read the tunnels of a TOML file; raises ConfigError naming file, key and reason."""
    try:
        data = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}", advice="Check --config.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for key in data:
        if key != "tunnels":
            raise ConfigError(f"{path}: {key}: unknown key", advice="Tunnels are tables named [tunnels.NAME].")
    tables = data.get("tunnels")
    if not isinstance(tables, dict) or not tables:
        raise ConfigError(f"{path}: tunnels: no tunnel is declared", advice="Add a table [tunnels.NAME].")
    return [_declaration(name, table, str(path)) for name, table in tables.items()]


def _declaration(name: str, table: object, path: str) -> Declaration:
    where = f"{path}: tunnels.{name}"
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: must be a table, not {_kind(table)}")
    made = Declaration(check_name(name, where))
    for key in table:
        if key not in TUNNEL_KEYS:
            raise ConfigError(f"{where}.{key}: unknown key", advice=f"Known: {', '.join(TUNNEL_KEYS)}.")
    if "id" in table:
        try:
            made.id = uuid.UUID(_text(table["id"], f"{where}.id"))
        except ValueError as error:
            raise ConfigError(f"{where}.id: not a UUID", advice="Leave it out to have one made.") from error
    if "account" in table:
        made.account = _text(table["account"], f"{where}.account")
    if "secret" in table:
        made.secret = _secret(table["secret"], f"{where}.secret")
    hostnames = table.get("hostnames", [])
    if not isinstance(hostnames, list):
        raise ConfigError(f"{where}.hostnames: must be a list of texts, not {_kind(hostnames)}")
    made.hostnames = [_hostname(host, f"{where}.hostnames[{i}]") for i, host in enumerate(hostnames)]
    made.config = _remote_config(table, where)
    return made


def _remote_config(table: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    keys = [key for key in ("ingress", "originRequest", "warp-routing") if key in table]
    if not keys:
        return None
    config: dict[str, Any] = {}
    for key in keys:
        value = table[key]
        if key == "ingress":
            config[key] = _rules(value, f"{where}.ingress")
        elif isinstance(value, dict):
            config[key] = _json_value(value, f"{where}.{key}")
        else:
            raise ConfigError(f"{where}.{key}: must be a table, not {_kind(value)}")
    return config


def _rules(value: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ConfigError(f"{where}: must be a list of tables, not {_kind(value)}")
    rules: list[dict[str, Any]] = []
    for i, rule in enumerate(value):
        here = f"{where}[{i}]"
        if not isinstance(rule, dict):
            raise ConfigError(f"{here}: must be a table, not {_kind(rule)}")
        for key in rule:
            if key not in RULE_KEYS:
                raise ConfigError(f"{here}.{key}: unknown key", advice=f"Known: {', '.join(RULE_KEYS)}.")
        if "service" not in rule:
            raise ConfigError(f"{here}.service: missing", advice='For example service = "http://127.0.0.1:8080".')
        made: dict[str, Any] = {"service": _service(rule["service"], f"{here}.service")}
        if rule.get("hostname", "") not in ("", "*"):
            made["hostname"] = _hostname(rule["hostname"], f"{here}.hostname")
        if "path" in rule:
            made["path"] = _text(rule["path"], f"{here}.path", empty=True)
        if "originRequest" in rule:
            if not isinstance(rule["originRequest"], dict):
                raise ConfigError(f"{here}.originRequest: must be a table, not {_kind(rule['originRequest'])}")
            made["originRequest"] = _json_value(rule["originRequest"], f"{here}.originRequest")
        rules.append(made)
    if rules and (rules[-1].get("hostname") or rules[-1].get("path")):
        raise ConfigError(
            f"{where}[{len(rules) - 1}]: the last rule must match everything",
            advice='Add { service = "http_status:404" } at the end.',
        )
    return rules


def _service(value: object, where: str) -> str:
    text = _text(value, where)
    known = ("hello_world", "hello-world", "bastion", "socks-proxy")
    if (
        text in known
        or text.startswith(("unix:", "unix+tls:", "http_status:"))
        or re.match(r"[a-z][a-z0-9+.-]*://.", text)
    ):
        return text
    raise ConfigError(
        f"{where}: {text!r} is no service",
        advice="Write http://HOST:PORT, https://…, ws://…, tcp://…, unix:PATH, http_status:NNN or hello_world.",
    )


def _hostname(value: object, where: str) -> str:
    text = _text(value, where).lower()
    if len(text) > 253 or not HOSTNAME.fullmatch(text):
        raise ConfigError(
            f"{where}: {text!r} is not a hostname", advice="No scheme, port or path; a wildcard only as *.example.com."
        )
    return text


def _secret(value: object, where: str) -> bytes:
    try:
        secret = base64.b64decode(_text(value, where), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"{where}: not standard base64", advice="Leave it out to have one made.") from error
    if len(secret) < 16:
        raise ConfigError(f"{where}: shorter than 16 bytes", advice="Leave it out to have 32 random bytes made.")
    return secret


def _text(value: object, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: must be a text, not {_kind(value)}")
    if not value and not empty:
        raise ConfigError(f"{where}: must not be empty")
    return value


def _json_value(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _json_value(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_json_value(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ConfigError(f"{where}: JSON has no {_kind(value)}", advice="Durations are integers in seconds.")


def _kind(value: object) -> str:
    names = {dict: "a table", list: "a list", str: "a text", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
