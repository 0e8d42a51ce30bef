"""The configuration file of this machine: where it is looked for, what it sets, and the credentials it leads to.

Owns: search paths, reading, the flags that a file may set, credentials files. In: Flags, the file system.
Out: LocalConfig; Token; ConfigError. Never: watches (`config_watch.py`) or judges rules (`proxy/ingress.py`).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from connector.app.command_table import program
from connector.app.durations import parse_duration
from connector.app.flag_table import FLAGS, Flag
from connector.app.flags import Flags, Value, convert, looks_like_token
from connector.errors import ConfigError, UsageError, WireError
from connector.wire.token import NIL, Token, decode_credentials

if TYPE_CHECKING:
    from connector.app.logs import Logger
    from connector.app.yaml_document import YamlFile

DIRECTORIES: Final = (
    "~/.cloudflared", "~/.cloudflare-warp", "~/cloudflare-warp", "/etc/cloudflared", "/usr/local/etc/cloudflared"
)  # fmt: skip
"""cloudflared's directories in its order; its files run here unchanged."""

NAMES: Final = ("config.yml", "config.yaml")

MAX_FILE: Final = 1024 * 1024
"""Bytes of a configuration file, as of a push."""

MAX_CREDENTIALS: Final = 64 * 1024
"""Bytes of a credentials file; real ones have some 200."""

_NOT_FROM_FILE: Final = frozenset(
    ("config", "output", "icmpv4-src", "icmpv6-src", "max-active-flows", "dns-resolver-addrs", "overwrite-dns")
)
"""Flags that cloudflared does not read from a file."""

RUN_ONLY: Final = frozenset(("credentials-contents", "features", "token", "token-file"))
"""Flags of the command `run` alone: other commands do not look at these keys."""


class LocalConfig(NamedTuple):
    """One file as read. `stamp` tells whether it changed since."""

    path: str
    file: YamlFile
    stamp: tuple[int, ...]


def find_config() -> str:
    """Return the first default file that exists, or nothing."""
    for directory in DIRECTORIES:
        for name in NAMES:
            path = os.path.join(os.path.expanduser(directory), name)
            if os.path.exists(path):
                return path
    return ""


NO_CONFIG: Final = (
    f"Cannot determine default configuration path. No file [{' '.join(NAMES)}] in [{' '.join(DIRECTORIES)}]"
)


def stamp(path: str) -> tuple[int, ...]:
    """Return what changes when a file does: also when it is renamed into place, or a link to it is. Errors: OSError."""
    status = os.stat(path)
    return (status.st_mtime_ns, status.st_ino, status.st_size, status.st_dev)


def load(path: str) -> LocalConfig:
    """Read a file. Errors: ConfigError."""
    from connector.app.yaml_document import read_yaml  # noqa: PLC0415  (slow to import; many runs have no file)

    try:
        when = stamp(path)
        with open(path, "rb") as file:
            data = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"open {path}: {cause[:1].lower()}{cause[1:]}",
            advice="--config must name a readable file (inside a container: is it mounted?).",
        ) from None
    if len(data) > MAX_FILE:
        raise ConfigError(f"{path} is larger than {MAX_FILE // 1024} KiB", advice="Is this a configuration file?")
    return LocalConfig(path, read_yaml(data, path), when)


def configured_flags(flags: Flags, *, skip: frozenset[str] = frozenset()) -> tuple[Flags, LocalConfig | None]:
    """Return the flags in force, and the configuration file that was found (`--config`, else a default one)."""
    path = flags.text("config") or find_config()
    if not path:
        return flags, None
    local = load(path)
    return flags.with_file(file_flags(local, skip=skip, already=flags.is_set), path), local


def file_flags(
    local: LocalConfig, *, skip: frozenset[str] = frozenset(), already: Callable[[str], bool] = lambda _: False
) -> dict[str, Value]:
    """Return the flags that a file sets, except those `already` set. Errors: ConfigError for a wrong type."""
    found: dict[str, Value] = {}
    for name, raw in local.file.settings.items():
        flag = FLAGS.get(name)
        if flag is None or name in _NOT_FROM_FILE or name in skip or already(name):
            continue
        value = _flag_value(flag, raw, local.path)
        if value is not None:
            found[name] = value
    return found


def unknown_keys(local: LocalConfig) -> list[str]:
    """Return the top-level keys that mean nothing, sorted."""
    return sorted(name for name in local.file.settings if name not in FLAGS or name in _NOT_FROM_FILE)


_EXPECTED: Final = {"bool": ("boolean", bool), "string": ("string", str), "int": ("int", int), "uint": ("int", int)}
_GO_NAMES: Final = {
    bool: "bool", int: "int", float: "float64", str: "string", list: "[]interface {}",
    dict: "map[string]interface {}",
}  # fmt: skip


def _flag_value(flag: Flag, raw: Any, path: str) -> Value | None:
    """Return a file's value for a flag, None when it does not count: false, 0, an empty text."""
    wanted = "string slice" if flag.kind == "list" else "duration"
    wrong = ConfigError(
        f"expected {_EXPECTED.get(flag.kind, (wanted,))[0]} found {_GO_NAMES.get(type(raw), '<nil>')} for {flag.name}",
        advice=f"The key {flag.name} in {path}" + (': put the value in "quotes".' if flag.kind == "string" else "."),
    )
    if flag.kind == "list":
        if not isinstance(raw, list) or not all(isinstance(item, str) for item in raw):
            raise wrong
        return list(raw)
    if flag.kind == "duration":
        if flag.bare and isinstance(raw, bool):
            return parse_duration(flag.bare) if raw else None
        if not isinstance(raw, str):
            raise wrong
        try:
            return parse_duration(raw) if parse_duration(raw) > 0 else None
        except ValueError:
            raise ConfigError(
                f'time: invalid duration "{raw}" for {flag.name}', advice="Write 30s, 1m30s or 500ms."
            ) from None
    kind = _EXPECTED[flag.kind][1]
    if not isinstance(raw, kind) or (isinstance(raw, bool) and kind is int):
        raise wrong
    if flag.choices and isinstance(raw, str) and raw:
        try:
            return convert(flag, raw, flag.name)
        except UsageError as error:
            raise ConfigError(f'invalid value "{raw}" for the key {flag.name} of {path}', advice=error.advice) from None
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw if raw > 0 else None
    return raw if isinstance(raw, (str, bool)) and raw else None


def say_what_was_read(flags: Flags, local: LocalConfig | None, log: Logger) -> None:
    """Put into the log which file was read and what in it means nothing, or that there is none."""
    if local is None:
        if not flags.is_set("token"):
            log.info(NO_CONFIG)
    elif local.file.empty:
        log.error(f"Configuration file {local.path} was empty")
    else:
        log.info("Configuration file", path=local.path)
        for text in local.file.unused:
            log.warn(f"Configuration: {text}", path=local.path)
        for key in unknown_keys(local):
            log.warn(f"Configuration: the key {key} has no effect in a file", path=local.path)
    rules = local is not None and local.file.document.ingress
    origin = any(flags.is_set(name) for name in ("url", "hello-world", "bastion", "unix-socket"))
    if not rules and not origin and not flags.is_set("token") and not flags.is_set("token-file"):
        log.warn(
            "No ingress rules were defined in provided config (if any) nor from the cli, connector will return 503 for "
            "all incoming HTTP requests"
        )


# -- credentials


def find_token(flags: Flags, words: Sequence[str], local: LocalConfig | None) -> Token:
    """Return the identity of a tunnel that is named instead of given as a token: by argument, or in the file.

    Errors: UsageError when no tunnel is named, ConfigError when its credentials cannot be had.
    """
    name = words[0] if words else (local.file.tunnel if local is not None else "")
    if words and looks_like_token(words[0]):
        raise UsageError(
            "The argument looks like a token, but no flag precedes it.",
            advice="Write it to a file that only you can read, and give --token-file FILE.",
        )
    if not name:
        raise UsageError(
            f'"{program()} tunnel run" requires the token of the tunnel to run, or its ID or name as the last argument '
            "or in the configuration file.",
            advice="Give --token-file FILE, or TUNNEL_TOKEN in the environment.",
        )
    wanted = _as_uuid(name)
    contents, path = flags.text("credentials-contents"), flags.text("credentials-file")
    if wanted is None and not path:
        raise ConfigError(
            f"error parsing tunnel ID: {name} is not a tunnel's ID, and no credentials file says which one it is",
            advice="Give --credentials-file FILE (or the key credentials-file), or the tunnel's UUID.",
        )
    if wanted is None or not contents:
        path = path or _search(wanted, flags.text("origincert"))
        token = _read_credentials(path)
        if wanted is None and token.tunnel_id == NIL:
            raise ConfigError(
                f"error parsing tunnel ID: the credentials file {path} holds no TunnelID",
                advice=f"It is an old one: name the tunnel by its UUID instead of {name!r}.",
            )
        wanted = wanted or token.tunnel_id
    if contents:
        token = _decode(contents, "--credentials-contents" if flags.source("credentials-contents").startswith("--")
                        else "TUNNEL_CRED_CONTENTS")  # fmt: skip
    return Token(token.account_tag, token.secret, wanted, token.endpoint)


def _as_uuid(text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(text)
    except ValueError:
        return None


def _search(wanted: uuid.UUID | None, origincert: str) -> str:
    """Return the credentials file of a tunnel: beside the origin certificate, else in a default directory."""
    directories = [os.path.dirname(os.path.expanduser(origincert))] if origincert else []
    for directory in [*directories, *DIRECTORIES]:
        path = os.path.join(os.path.expanduser(directory), f"{wanted}.json")
        if os.path.isfile(path):
            return path
    raise ConfigError(
        "tunnel credentials file not found",
        advice=f"Looked for {wanted}.json in {', '.join([*directories, *DIRECTORIES])}; "
        "or give --credentials-file FILE.",
    )


def _read_credentials(path: str) -> Token:
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise ConfigError(
            f"Tunnel credentials file '{path}' doesn't exist or is not a file",
            advice="Check --credentials-file or the key credentials-file (inside a container: is it mounted?).",
        )
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_CREDENTIALS + 1).decode("utf-8", "replace")
    except OSError as error:
        raise ConfigError(
            f"couldn't read tunnel credentials from {path}: {error.strerror or error}",
            advice="The file must be readable for the user that runs this process.",
        ) from None
    if path.endswith(".pem"):
        raise ConfigError(
            "The tunnel credentials file should be .json but you gave a .pem.",
            advice="It was created by `cloudflared tunnel create`; cert.pem of `cloudflared tunnel login` is another.",
        )
    return _decode(text, path)


def _decode(text: str, source: str) -> Token:
    try:
        return decode_credentials(text)
    except WireError as error:
        raise ConfigError(f"{source}: {error}", advice=error.advice) from None
