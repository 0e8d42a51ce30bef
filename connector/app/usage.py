"""Help texts, 80 columns wide. Owns: what `--help` prints. In: a level's name. Out: text. Never: prints."""

from __future__ import annotations

import textwrap

from connector.app.flag_table import FLAGS, GROUPS, LATER, NO_EFFECT, USED

WIDTH = 80

_TOP = """\
connector - serve a Cloudflare tunnel, or try one without Cloudflare

Usage:
  connector run [flags]                 run a tunnel (short for tunnel run)
  connector tunnel [flags] run [flags]  the same, as cloudflared spells it
  connector tunnel ready --metrics ADDR ask a running connector: status 0 or 1
  connector edge [flags]                a small edge for tests on this machine
  connector version [--short]           print the version
  connector help [run|tunnel|flags]     print help; flags: those without effect

Start here:
  connector run --token-file FILE       the token comes from the dashboard
"""

_TUNNEL = """\
connector tunnel - run a tunnel

Usage:
  connector tunnel [flags] run [flags] [TUNNEL]
  connector tunnel [flags] ready

Flags may stand before or after the word run; after it they win.
"""

_RUN = """\
connector run - keep connections to the edge up and serve what it sends

Usage:
  connector run [flags]
  connector tunnel [flags] run [flags]

Boolean flags take no word after them (--flag or --flag=false); all others do
(--flag VALUE or --flag=VALUE). One or two dashes are the same.
"""

_TAIL = """\
Other flags of cloudflared are accepted, without effect in this version; they
are listed by: connector help flags
"""


def usage(level: str) -> str:
    """Give the help text of `top`, `tunnel`, `run` or `flags`."""
    if level == "top":
        return _TOP
    if level == "flags":
        return _ignored()
    head = _TUNNEL if level == "tunnel" else _RUN
    return head + "\n" + "\n".join(_group(group) for group in GROUPS) + "\n" + _TAIL


def _group(group: str) -> str:
    lines = [f"{group}:"]
    for flag in FLAGS.values():
        if flag.effect != USED or flag.group != group:
            continue
        names = f"--{flag.name}" + (f", -{flag.alias}" if flag.alias else "")
        lines.append(f"  {names} {flag.metavar}".rstrip())
        text = flag.help
        if flag.default and flag.name not in {"url", "metrics"}:
            text += f" Default: {flag.default}."
        if flag.env:
            text += f" [{', '.join(flag.env)}]"
        lines.extend(textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines) + "\n"


def _ignored() -> str:
    def names(effect: str) -> str:
        text = " ".join(f"--{name}" for name, flag in FLAGS.items() if flag.effect == effect)
        indent = "  "
        return textwrap.fill(
            text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
        )

    return (
        "Accepted, but not supported by this version (a warning says so):\n"
        f"{names(LATER)}\n\nAccepted, and without any effect:\n{names(NO_EFFECT)}\n"
    )
