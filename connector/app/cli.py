"""The command line: words to commands, errors to exit statuses.

Owns: `main`, exit statuses, wiping the token off the process list. In: argv. Out: an exit status.
Never: imports more than the command at hand needs; prints a secret.

Statuses: 0 fine or stopped as asked; 1 something failed; 255 the command line makes no sense. cloudflared answers an
unknown flag with status 0; we do not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from connector import __version__
from connector.errors import ConnectorError, UsageError

if TYPE_CHECKING:
    from connector.app.flags import Level
    from connector.app.logs import Logger

USAGE_STATUS = 255

_COMMANDS = ("run", "tunnel", "edge", "version", "help")
_SUBCOMMANDS = ("run", "ready", "help")
_ABSENT = frozenset({
    "login", "create", "route", "vnet", "list", "info", "ingress", "delete", "cleanup", "token", "diag", "proxy-dns",
    "db-connect", "access", "forward", "tail", "management", "service", "update",
})  # fmt: skip
"""cloudflared's commands that this program does not have."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and give its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    exposed = _wipe_title(words) if argv is None else ""
    try:
        return _command(words, exposed)
    except UsageError as error:
        return _usage_error(error, words)
    except ConnectorError as error:
        print(_explain(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1


def _wipe_title(words: Sequence[str]) -> str:
    """Take secrets off the process list at once. Gives "wiped", "visible" (it could not be done) or nothing to do."""
    masked, hide_next, found = [], False, False
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        secret_flag = word.startswith("-") and name in {"token", "credentials-contents"}
        if hide_next or "eyJ" in word:
            masked.append("*****")
            found = True
        elif secret_flag and equals:
            masked.append(f"--{name}=*****")
            found = True
        else:
            masked.append(word)
        hide_next = secret_flag and not equals
    if not found:
        return ""
    try:
        from setproctitle import setproctitle

        setproctitle(" ".join(["connector", *masked]))
    except ImportError:
        return "visible"
    return "wiped"


def _command(argv: list[str], exposed: str) -> int:
    from connector.app.flags import parse_level

    if not argv:
        return _help("top")
    top = parse_level(argv, version_flag=True)
    if top.version:
        print(_version_line())
        return 0
    if top.help:
        return _help("top")
    if not top.rest:
        raise UsageError("no command given", advice="The command goes after the flags: connector run [flags].")
    word, rest = top.rest[0], top.rest[1:]
    levels = [top]
    if word == "tunnel":
        tunnel = parse_level(rest)
        levels.append(tunnel)
        if tunnel.help:
            return _help("tunnel")
        if not tunnel.rest:
            raise UsageError(
                "tunnel needs a command; quick tunnels are not supported", advice="Use: connector tunnel run [flags]."
            )
        word, rest = tunnel.rest[0], tunnel.rest[1:]
        if word not in _SUBCOMMANDS:
            raise _unknown(word, _SUBCOMMANDS, "tunnel ")
    match word:
        case "run":
            levels.append(parse_level(rest))
            if levels[-1].help:
                return _help("run")
            return _run(levels, exposed)
        case "ready":
            levels.append(parse_level(rest))
            return _ready(levels)
        case "help" | "h":
            topic = "tunnel" if len(levels) == 2 else next((name for name in rest if name in _TOPICS), "top")
            return _help(topic)
        case "version":
            print(__version__ if rest[:1] in (["--short"], ["-s"], ["-short"]) else _version_line())
            return 0
        case "edge":
            from connector.devedge.cli import main as edge_main

            return edge_main(rest)
        case _:
            raise _unknown(word, _COMMANDS, "")


_TOPICS = ("run", "tunnel", "flags")


def _unknown(word: str, known: Sequence[str], prefix: str) -> UsageError:
    from difflib import get_close_matches

    from connector.app.flags import looks_like_token

    if word in _ABSENT:
        return UsageError(f"connector has no command {prefix}{word}", advice="It runs tunnels only: connector run.")
    close = get_close_matches(word, known, n=1)
    advice = f"Did you mean {prefix}{close[0]}?" if close else f"Commands: {', '.join(known)}."
    shown = "(hidden: looks like a token)" if looks_like_token(word) else word
    return UsageError(f"unknown command: {prefix}{shown}", advice=advice)


def _run(levels: list[Level], exposed: str) -> int:
    from connector.app.config import read_token, run_config
    from connector.app.flag_table import LATER, NO_EFFECT
    from connector.app.flags import Flags
    from connector.app.logs import stderr_logger

    flags = Flags(levels, os.environ)
    flags.check()
    log = stderr_logger(
        level=flags.text("loglevel"),
        json_lines=flags.text("output") == "json",
        no_color=bool(os.environ.get("NO_COLOR")),
    )
    token_text = read_token(flags)
    if token_text:
        log.output.redactor.add(token_text)
    if exposed:
        _warn_exposed(log, exposed)
    config = run_config(flags, levels[-1].rest, token_text)
    log.output.redactor.add_bytes(config.token.secret)
    for name in flags.given(LATER):
        log.warn(f"--{name} is not supported by this version and has no effect")
    ignored = flags.given(NO_EFFECT)
    if ignored:
        log.debug("Flags without effect", flags=ignored)

    from connector.app.process import run_tunnel

    return run_tunnel(config, log)


def _warn_exposed(log: Logger, exposed: str) -> None:
    if exposed == "wiped":
        log.warn(
            "The token was given on the command line, where other users could see it for a moment; "
            "it is wiped from the process list now. Prefer --token-file FILE."
        )
    else:
        log.warn(
            "The token was given on the command line and stays visible in the process list, because the package "
            "setproctitle is not installed. Use --token-file FILE."
        )


def _ready(levels: list[Level]) -> int:
    from http.client import HTTPConnection, HTTPException

    from connector.app.config import split_address
    from connector.app.flags import Flags

    if levels[-1].help:
        return _help("tunnel")
    flags = Flags(levels, os.environ)
    address = flags.text("metrics") if flags.is_set("metrics") else ""
    if not address:
        raise UsageError("--metrics has to be provided", advice="Give the address the connector was started with.")
    host, port = split_address(address, "--metrics", any_host=True)
    connection = HTTPConnection(host or "localhost", port, timeout=15)
    try:
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        body = answer.read(65536).decode("utf-8", "replace")
    except (OSError, HTTPException) as error:
        print(f"http://{address}/ready cannot be asked: {error}", file=sys.stderr)
        return 1
    finally:
        connection.close()
    if answer.status == 200:
        return 0
    print(f"http://{address}/ready endpoint returned status code {answer.status}\n{body}", file=sys.stderr)
    return 1


def _help(topic: str) -> int:
    from connector.app.usage import usage

    print(usage(topic), end="")
    return 0


def _version_line() -> str:
    return f"connector version {__version__} (Python {sys.version_info.major}.{sys.version_info.minor})"


def _explain(error: ConnectorError) -> str:
    return f"{error}\n{error.advice}" if error.advice else str(error)


def _usage_error(error: UsageError, words: Sequence[str]) -> int:
    command = "connector tunnel run" if "run" in words else "connector"
    print(f"{_explain(error)}\nSee '{command} --help'.", file=sys.stderr)
    return USAGE_STATUS
