"""Every command: its words, where its code is, its own flags, one line of help.

Owns: the table; the call that a command gets. In: nothing. Out: COMMANDS, by words. Never: imports a command's code.

A command is a function `(Call) -> int` that gives the exit status, named as `package.module:function` so that nothing
is loaded before it is asked for. Raise UsageError (255) or another ConnectorError (1) for what cannot be done.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from connector.app.flag_table import Flag

if TYPE_CHECKING:
    from connector.app.flags import Flags


PROGRAMS = ("connector", "cloudflared")
"""Names under which the program is installed; the second so that a container's health check finds it."""


def program() -> str:
    """Give the name that the program was called by, where it is one of its names."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return name if name in PROGRAMS else PROGRAMS[0]


class Command(NamedTuple):
    """One command."""

    target: str
    summary: str
    arguments: str = ""
    """What may follow the flags, for help."""
    flags: tuple[Flag, ...] = ()
    """Flags of its own; they win over flags of `tunnel` with the same name."""
    tunnel_flags: bool = True
    """Whether it takes the flags of `tunnel` and `tunnel run` too."""
    raw: bool = False
    """Whether it reads its words itself."""
    hidden: bool = False


class Call(NamedTuple):
    """What a command is called with."""

    program: str
    """`connector` or `cloudflared`, for messages."""
    words: str
    """The command's own words, as in COMMANDS."""
    flags: Flags
    arguments: list[str]
    """What follows the flags."""
    exposed: str
    """"wiped" or "visible" when a secret stood on the command line, else nothing."""
    environ: Mapping[str, str]


_API_URL = Flag(
    "api-url",
    default="https://api.cloudflare.com/client/v4",
    env=("TUNNEL_API_URL",),
    metavar="URL",
    help="Where Cloudflare's API is.",
)

COMMANDS: dict[str, Command] = {
    "tunnel": Command("connector.app.quick:quick", "run a quick tunnel: tunnel --url URL"),
    "tunnel run": Command("connector.app.run:run", "run a tunnel", "[TUNNEL]"),
    "tunnel ready": Command("connector.app.ready:ready", "ask a running connector: status 0 or 1"),
    "tunnel diag": Command(
        "connector.app.diag:diag",
        "collect what a search for a fault needs, in a zip file",
        flags=(
            Flag("diag-container-id", metavar="ID", help="Take the log of this Docker container."),
            Flag("diag-pod-id", metavar="ID", help="Take the log of this Kubernetes pod."),
            Flag("no-diag-logs", "bool", help="Without the log."),
            Flag("no-diag-metrics", "bool", help="Without the metrics."),
            Flag("no-diag-system", "bool", help="Without facts of the machine."),
            Flag("no-diag-runtime", "bool", help="Without profiles."),
            Flag("no-diag-network", "bool", help="Without traced routes and pre-checks."),
        ),
    ),
    "tunnel token": Command(
        "connector.app.tunnel_token:tunnel_token",
        "fetch the token of a tunnel of the account",
        "TUNNEL",
        flags=(
            Flag(
                "credentials-file",
                alias="cred-file",
                metavar="FILE",
                help="Write a credentials file instead of printing the token.",
            ),
            _API_URL,
        ),
    ),
    "management token": Command(
        "connector.app.tunnel_token:management_token",
        "fetch a management token of a tunnel of the account",
        "TUNNEL",
        flags=(
            Flag("resource", metavar="NAME", help="What it is for: logs, admin or host_details."),
            _API_URL,
        ),
        hidden=True,
    ),
    "tail": Command(
        "connector.app.tail:tail",
        "stream a connector's log through the edge",
        "[TOKEN]",
        flags=(
            Flag(
                "token",
                env=("TUNNEL_MANAGEMENT_TOKEN",),
                metavar="TOKEN",
                secret=True,
                help="Management token of the tunnel; better in the variable than here.",
            ),
            Flag(
                "connector-id",
                env=("TUNNEL_MANAGEMENT_CONNECTOR",),
                metavar="UUID",
                help="One of the tunnel's connectors; without it, any.",
            ),
            Flag(
                "event",
                "list",
                env=("TUNNEL_MANAGEMENT_FILTER_EVENTS",),
                metavar="TYPE",
                help="cloudflared, http, tcp or udp; repeatable; without it, all.",
            ),
            Flag(
                "level",
                default="debug",
                env=("TUNNEL_MANAGEMENT_FILTER_LEVEL",),
                metavar="LEVEL",
                help="debug, info, warn or error: that and above.",
            ),
            Flag(
                "sample",
                default="1",
                env=("TUNNEL_MANAGEMENT_FILTER_SAMPLE",),
                metavar="PART",
                help="What part of the events, 0 to 1.",
            ),
            Flag(
                "management-hostname",
                default="management.argotunnel.com",
                env=("TUNNEL_MANAGEMENT_HOSTNAME",),
                metavar="HOST",
                help="The host whose requests the edge gives to the program itself.",
            ),
            Flag("connect", metavar="HOST:PORT", help="Connect here instead: the public address of a dev edge."),
            Flag("cacert", env=("TUNNEL_CACERT",), metavar="FILE", help="Trust only the PEM certificates in FILE."),
            Flag(
                "output",
                default="default",
                env=("TUNNEL_MANAGEMENT_OUTPUT", "TUNNEL_LOG_OUTPUT"),
                metavar="FORMAT",
                choices=("default", "json"),
                help="default (for people) or json (one object a line).",
            ),
        ),
        tunnel_flags=False,
    ),
    "tunnel ingress validate": Command(
        "connector.app.ingress_commands:validate",
        "check the rules of a configuration file",
        flags=(
            Flag(
                "json",
                alias="j",
                env=("TUNNEL_INGRESS_VALIDATE_JSON",),
                metavar="TEXT",
                help="Check these rules instead of a file's.",
            ),
        ),
    ),
    "tunnel ingress rule": Command(
        "connector.app.ingress_commands:rule_for", "print the rule that serves a URL", "URL"
    ),
    "edge": Command(
        "connector.app.inspect_edge:main", "a small edge for tests on this machine", tunnel_flags=False, raw=True
    ),
    "inspect": Command("connector.app.inspect_file:main", "show a capture on a page", tunnel_flags=False, raw=True),
    "replay": Command("connector.app.replay:main", "send a capture's requests again", tunnel_flags=False, raw=True),
    "tui": Command("connector.app.tui:main", "the inspector's table in the terminal", tunnel_flags=False, raw=True),
    "conformance": Command("connector.devedge.conformance:main", "test any connector", tunnel_flags=False, raw=True),
    "capture": Command(
        "connector.inspector.capture_commands:main", "list, filter and export captures", tunnel_flags=False, raw=True
    ),
    "decode": Command(
        "connector.inspector.wire_commands:decode_command",
        "explain bytes of the tunnel protocol",
        tunnel_flags=False,
        raw=True,
    ),
    "encode": Command(
        "connector.inspector.wire_commands:encode_command",
        "make bytes of the tunnel protocol",
        tunnel_flags=False,
        raw=True,
    ),
    "doctor": Command(
        "connector.app.doctor:doctor",
        "walk the way of a request and say where it ends",
        "[URL]",
        flags=(Flag("json", "bool", help="Print one JSON document instead of a line a hop."),),
    ),
    "completion": Command(
        "connector.app.completion:completion", "print a completion script", "bash|zsh|fish", tunnel_flags=False
    ),
    "version": Command(
        "connector.app.version:version",
        "print the version",
        flags=(Flag("short", "bool", alias="s", help="The number alone."),),
        tunnel_flags=False,
    ),
    "update": Command("connector.app.version:update", "say how to update", tunnel_flags=False, hidden=True),
    "help": Command("connector.app.usage:help_", "print help", "[COMMAND|flags]", tunnel_flags=False),
}
"""By words. A command under `tunnel` is also found without it, where no other has its name: `connector run`."""

SHORT = {"run": "tunnel run", "ready": "tunnel ready", "ingress": "tunnel ingress"}
"""Commands of `tunnel` that are also found without that word."""

WORD_ALIASES = {"h": "help", "forward": "access", "tunnel h": "help", "tunnel help": "help"}

ABSENT: dict[str, str] = {
    **dict.fromkeys(
        (
            "login", "tunnel login", "tunnel create", "tunnel route", "tunnel vnet", "tunnel list", "tunnel info",
            "tunnel delete", "tunnel cleanup",
        ),
        "It runs tunnels; they are made and listed in the Zero Trust dashboard, which also shows the token.",
    ),
    "service": "Under systemd use the unit in deploy/systemd, or `docker compose`; a token goes into a file.",
    "access": "It runs tunnels only; use Cloudflare's own cloudflared for this.",
    **dict.fromkeys(
        ("proxy-dns", "tunnel proxy-dns"),
        "dns-proxy feature is no longer supported, by cloudflared neither; use a DNS-over-HTTPS client of your system.",
    ),
    **dict.fromkeys(
        ("db-connect", "tunnel db-connect"), "db-connect command is no longer supported, by cloudflared neither."
    ),
}  # fmt: skip
"""cloudflared's commands that this program does not have, and what to do."""
