"""Help texts, 80 columns wide. Owns: what `--help` prints. In: a command's words. Out: text. Never: prints."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from connector.app.command_table import COMMANDS, SHORT, Call
from connector.app.flag_table import FLAGS, GROUPS, NO_EFFECT, USED, Flag
from connector.errors import UsageError

WIDTH = 80

_TITLE = "serve a Cloudflare tunnel, or try one without Cloudflare"

_START = """
Start here:
  {program} run --token-file FILE       the token comes from the dashboard
  {program} tunnel --url localhost:8080 a quick tunnel, without an account
  {program} help flags                  flags that are accepted without effect
"""

_TUNNEL = """\
{program} tunnel - run a tunnel

Usage:
  {program} tunnel [flags] run [flags] [TUNNEL]
  {program} tunnel [flags] --url URL     a quick tunnel, without an account
  {program} tunnel [flags] COMMAND [flags]

Commands:
{commands}

Flags may stand before or after the word run; after it they win.
"""

_RUN = """\
{program} run - keep connections to the edge up and serve what it sends

Usage:
  {program} run [flags] [TUNNEL]
  {program} tunnel [flags] run [flags] [TUNNEL]

TUNNEL, an ID or a name, is needed only where credentials come from a file; a
token says it itself.

Boolean flags take no word after them (--flag or --flag=false); all others do
(--flag VALUE or --flag=VALUE). One or two dashes are the same. Values come from
flags, then from the environment, then from --config, then the default.
"""

_DOCTOR = """
Hops, and the exit status when the first thing that fails is that one:
  10 dns           the edge's addresses    17 origin-dns  the service's name
  11 udp           QUIC, port 7844         18 origin-tcp  connection to it
  12 tcp           HTTP/2's, port 7844     19 origin-tls  TLS with it
  13 tls           with the edge           20 http        an answer of it
  14 registration  needs a token           21 websocket   for wss:// URLs
  15 configuration what the edge pushes    22 mqtt        CONNECT of a broker
  16 rule          which one serves URL     0 everything works
udp and tcp only warn where the other one works, or --protocol says otherwise.
"""

_TAIL = """\
Other flags of cloudflared are accepted, without effect in this version; they
are listed by: {program} help flags
"""

_NO_DEFAULT_SHOWN = frozenset({"url", "metrics"})
"""Flags whose default says what is not so: without --url nothing is sent to localhost:8080."""


def help_(call: Call) -> int:
    """Print the help of a command."""
    words = " ".join(call.arguments)
    words = SHORT.get(words, words)
    if words not in {"", "flags", "tunnel"} and words not in COMMANDS:
        raise UsageError(f"no help about {words}", advice=f"Try: {call.program} help.")
    print(usage(words, call.program), end="")
    return 0


def usage(words: str, program: str = "connector") -> str:
    """Give the help text of a command; of nothing (the whole program), of `flags`."""
    if words == "":
        return f"{program} - {_TITLE}\n\nUsage:\n{_commands('', program)}\n{_START.format(program=program)}"
    if words == "flags":
        return _ignored()
    if words in {"tunnel", "tunnel run"}:
        head = _TUNNEL if words == "tunnel" else _RUN
        groups = "\n".join(_group(group) for group in GROUPS)
        text = head.format(program=program, commands=_commands("tunnel ", program))
        return f"{text}\n{groups}\n{_TAIL.format(program=program)}"
    if words not in COMMANDS:
        return f"{program} {words}\n\nCommands:\n{_commands(words + ' ', program)}\n"
    return _command(words, program)


def _commands(prefix: str, program: str) -> str:
    rows = []
    for words, command in COMMANDS.items():
        if command.hidden or not words.startswith(prefix) or words in {"tunnel", "help"}:
            continue
        shown = next((short for short, long in SHORT.items() if long == words and not prefix), words)
        left = f"  {program} {shown}"
        text = textwrap.wrap(command.summary, WIDTH - 36)
        rows.append(f"{left:<34}  {text[0]}")
        rows.extend(" " * 36 + line for line in text[1:])
    return "\n".join(rows)


def _command(words: str, program: str) -> str:
    command = COMMANDS[words]
    arguments = f" {command.arguments}" if command.arguments else ""
    flags = " [flags]" if command.flags or command.tunnel_flags else ""
    text = f"{program} {words} - {command.summary}\n\nUsage:\n  {program} {words}{flags}{arguments}\n"
    if command.flags:
        text += "\nFlags:\n" + "".join(_lines(command.flags))
    if words == "doctor":
        text += _DOCTOR
    if command.tunnel_flags:
        text += f"\nIt takes the flags of {program} tunnel run too.\n"
    return text


def _group(group: str) -> str:
    flags = (flag for flag in FLAGS.values() if flag.effect == USED and flag.group == group)
    return f"{group}:\n" + "".join(_lines(flags))


def _lines(flags: Iterable[Flag]) -> Iterable[str]:
    for flag in flags:
        names = f"--{flag.name}" + (f", {'-' if len(flag.alias) < 3 else '--'}{flag.alias}" if flag.alias else "")
        yield f"  {names} {flag.metavar}".rstrip() + "\n"
        text = flag.help
        if flag.default and flag.name not in _NO_DEFAULT_SHOWN:
            text += f" Default: {flag.default}."
        if flag.env:
            text += f" [{', '.join(flag.env)}]"
        for line in textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6):
            yield line + "\n"


def _ignored() -> str:
    def names(effect: str) -> str:
        text = " ".join(f"--{name}" for name, flag in FLAGS.items() if flag.effect == effect)
        indent = "  "
        return textwrap.fill(
            text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
        )

    return f"Accepted, and without any effect:\n{names(NO_EFFECT)}\n"
