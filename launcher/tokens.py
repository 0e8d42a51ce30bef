"""Where the tunnel token comes from, and whether it can be one.

Owns: the order of the sources, reading `.env` files, the look of a token.
In: command-line options, the environment, files, a prompt. Out: the token text; TokenError with advice.
Never: prints a token; tells more of it than the tunnel's id.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import stat
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import UsageError

VARIABLES = ("TUNNEL_TOKEN", "CLOUDFLARE_TUNNEL_TOKEN")
FILE_VARIABLES = ("TUNNEL_TOKEN_FILE", "CLOUDFLARE_TUNNEL_TOKEN_FILE")
SECRETS = (Path("/run/secrets/tunnel_token"), Path("/run/secrets/TUNNEL_TOKEN"))
"""Where compose and swarm put secrets of these names."""

MAX_BYTES = 16 * 1024
"""Tokens have about 200 characters; a file that is larger is something else."""

WHERE = "Zero Trust dashboard: Networks, Tunnels, your tunnel, Configure: the long word after --token (eyJ...)"
ADVICE = f"give it with --token-file FILE, or CLOUDFLARE_TUNNEL_TOKEN in .env; find it in the {WHERE}"
PLACEHOLDERS = frozenset({"your_token", "your-token", "changeme", "<token>", "token"})


@dataclass(frozen=True, slots=True)
class Token:
    """A token that can be one, and where it was found. `repr` hides it."""

    text: str = field(repr=False)
    source: str
    tunnel: str


def check(text: str, source: str) -> Token:
    """The token in `text`; UsageError says what is wrong with it without showing it."""
    word = text.strip()
    if not word or word.lower() in PLACEHOLDERS:
        shown = f"still holds the placeholder {word!r}" if word else "is empty"
        raise UsageError(f"the token from {source} {shown}", advice=ADVICE)
    if "--token" in word:  # people paste the whole command of the dashboard
        word = word.rpartition("--token")[2].lstrip("= ").split()[0] if word.rpartition("--token")[2].split() else ""
    if len(word) > MAX_BYTES:
        raise UsageError(f"the token from {source} has {len(word)} characters: that is something else", advice=ADVICE)
    try:
        facts = json.loads(base64.b64decode(word, validate=True))
        tunnel = str(uuid.UUID(facts["t"]))
        if not facts["a"] or not base64.b64decode(facts["s"], validate=True):
            raise ValueError
    except (ValueError, binascii.Error, KeyError, TypeError) as error:
        raise UsageError(
            f"the token from {source} is not a tunnel token", advice=f"it is cut short or something else; {ADVICE}"
        ) from error
    return Token(word, source, tunnel)


def read_file(path: Path) -> str:
    """The file's text; UsageError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1).decode("utf-8", "replace")
    except OSError as error:
        raise UsageError(f"token file {path}: {error.strerror}", advice=ADVICE) from error


def exposed_file(path: Path) -> bool:
    """Whether other users of this machine can read it."""
    try:
        return bool(path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))
    except OSError:
        return False


def read_env_file(path: Path) -> dict[str, str]:
    """The `NAME=value` lines of a compose `.env` file."""
    found: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    for raw in text.splitlines():
        line = raw.strip().removeprefix("export ")
        name, equals, value = line.partition("=")
        if not equals or line.startswith("#"):
            continue
        value = value.strip()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        elif " #" in value:
            value = value.partition(" #")[0].rstrip()
        found[name.strip()] = value
    return found


def find(
    *,
    token: str | None = None,
    token_file: Path | None = None,
    directory: Path,
    kept: Path | None = None,
    environment: Mapping[str, str] | None = None,
    prompt: Callable[[], str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Token:
    """The first of: --token, --token-file, variables, `.env` in `directory`, a secret, the kept one, the prompt."""
    environment = os.environ if environment is None else environment
    if token is not None:
        warn("a token on a command line can be read by every user of this machine: prefer --token-file")
        return check(token, "--token")
    if token_file is not None:
        if str(token_file) == "-":
            return check(sys.stdin.read(MAX_BYTES + 1), "standard input")
        if exposed_file(token_file):
            warn(f"{token_file} can be read by other users: chmod 600 {token_file}")
        return check(read_file(token_file), str(token_file))
    for name in VARIABLES:
        if environment.get(name):
            return check(environment[name], name)
    for name in FILE_VARIABLES:
        if environment.get(name):
            return check(read_file(Path(environment[name])), environment[name])
    env_file = directory / ".env"
    values = read_env_file(env_file)
    for name in VARIABLES:
        if values.get(name):
            if exposed_file(env_file):
                warn(f"{env_file} holds the token and can be read by other users: chmod 600 {env_file}")
            return check(values[name], f"{env_file} ({name})")
    for path in SECRETS:
        if path.is_file():
            return check(read_file(path), str(path))
    if kept is not None and kept.is_file():
        return check(read_file(kept), str(kept))
    if prompt is not None:
        return check(prompt(), "the prompt")
    raise UsageError("there is no tunnel token", advice=ADVICE)
