"""The command line: words to a command, errors to exit statuses.

Owns: `main`, exit statuses, wiping the token off the process list. In: argv. Out: an exit status.
Never: imports more than the command at hand needs; prints a secret; knows what a command does.

Statuses: 0 fine or stopped as asked; 1 something failed; 255 the command line makes no sense. cloudflared answers an
unknown flag with status 0; we do not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from connector.app.command_table import ABSENT, COMMANDS, SHORT, WORD_ALIASES, Call, program
from connector.app.first_objects import loading
from connector.errors import ConnectorError, UsageError

if TYPE_CHECKING:
    from connector.app.flags import Level

USAGE_STATUS = 255


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


_SECRET_FLAGS = ("token", "credentials-contents", "edge-proxy")


def _wipe_title(words: Sequence[str]) -> str:
    """Take secrets off the process list at once.

    Gives what became of a token: "wiped", "visible" (it could not be done), or nothing when there was none.
    """
    masked: list[str] = []
    hidden: set[str] = set()
    pending = ""
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        flag = name if word.startswith("-") and name in _SECRET_FLAGS else ""
        if pending or "eyJ" in word:
            masked.append("*****")
            hidden.add(pending or "token")
        elif flag and equals:
            masked.append(f"--{flag}=*****")
            hidden.add(flag)
        else:
            masked.append(word)
        pending = "" if equals else flag
    if not hidden:
        return ""
    warned_of = hidden - {"edge-proxy"}
    try:
        from setproctitle import setproctitle

        setproctitle(" ".join([program(), *masked]))
    except ImportError:
        return "visible" if warned_of else ""
    return "wiped" if warned_of else ""


def _command(argv: list[str], exposed: str) -> int:
    with loading():
        from connector.app.flags import parse_level

    if not argv:
        return _help("")
    top = parse_level(argv, version_flag=True)
    if top.version:
        return _invoke("version", [], [], exposed)
    if top.help:
        return _help("")
    levels = [top]
    if not top.rest:  # flags alone fall to `tunnel`, as in cloudflared: `cloudflared --url http://localhost:8080`
        return _invoke("tunnel", levels, [], exposed)
    word, rest = top.rest[0], top.rest[1:]
    path = _resolve(word)
    if path == "tunnel":
        tunnel = parse_level(rest)
        levels.append(tunnel)
        if tunnel.help:
            return _help("tunnel")
        if not tunnel.rest:
            return _invoke("tunnel", levels, [], exposed)
        path, rest = _resolve(f"tunnel {tunnel.rest[0]}"), tunnel.rest[1:]
    if path not in COMMANDS:  # words that only lead to commands, such as tunnel ingress
        group = parse_level(rest)
        levels.append(group)
        if group.help or not group.rest:
            return _help(path)
        path, rest = _resolve(f"{path} {group.rest[0]}"), group.rest[1:]
    command = COMMANDS[path]
    if command.raw:
        return int(_load(command.target)(rest))
    level = parse_level(rest, own=command.flags, tunnel_flags=command.tunnel_flags)
    if level.help:
        return _help(path)
    return _invoke(path, [*levels, level], level.rest, exposed)


def _resolve(words: str) -> str:
    """Give the command's own words; UsageError with the nearest one for what is no command."""
    words = WORD_ALIASES.get(words, words)
    words = SHORT.get(words, words)
    if words in COMMANDS or any(each.startswith(words + " ") for each in COMMANDS):
        return words
    if words in ABSENT:
        raise UsageError(f"this connector has no command {words}", advice=ABSENT[words])
    from difflib import get_close_matches

    from connector.app.flags import looks_like_token

    prefix, _, word = words.rpartition(" ")
    prefix = f"{prefix} " if prefix else ""
    known = [each.removeprefix(prefix).partition(" ")[0] for each in COMMANDS if each.startswith(prefix)]
    known = list(dict.fromkeys(known if prefix else [*SHORT, *known]))
    close = get_close_matches(word, known, n=1)
    advice = f"Did you mean {prefix}{close[0]}?" if close else f"Commands: {', '.join(known)}."
    shown = "(hidden: looks like a token)" if looks_like_token(word) else word
    raise UsageError(f"unknown command: {prefix}{shown}", advice=advice)


def _invoke(path: str, levels: list[Level], arguments: list[str], exposed: str) -> int:
    from connector.app.flags import Flags

    command = COMMANDS.get(path)
    if command is None:
        return _help(path)  # words that only lead to commands: tunnel ingress
    flags = Flags(levels, os.environ, own=command.flags)
    call = Call(program(), path, flags, arguments, exposed, os.environ)
    return int(_load(command.target)(call))


def _load(target: str) -> Callable[..., int]:
    from importlib import import_module

    module, _, name = target.partition(":")
    with loading():
        function: Callable[..., int] = getattr(import_module(module), name)
    return function


def _help(path: str) -> int:
    from connector.app.usage import usage

    print(usage(path, program()), end="")
    return 0


def _explain(error: ConnectorError) -> str:
    return f"{error}\n{error.advice}" if error.advice else str(error)


def _usage_error(error: UsageError, words: Sequence[str]) -> int:
    command = f"{program()} tunnel run" if "run" in words else program()
    print(f"{_explain(error)}\nSee '{command} --help'.", file=sys.stderr)
    return USAGE_STATUS
