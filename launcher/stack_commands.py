"""The stack's commands on the command line: their arguments, and errors to exit statuses.

Owns: arguments and help of everything but `demo`; signals while a command runs.
In: argparse's subparsers; parsed arguments. Out: an exit status: 0 done; 1 failed, or (status, doctor) not healthy;
    2 wrong arguments; 130 interrupted.
Never: does the work (commands.py).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from launcher.errors import UsageError

EXIT_USAGE = 2
INTERRUPTED = 130

UP_DESCRIPTION = """\
Start an MQTT broker and a tunnel connector, or bring the ones that run to what
the options say. The broker is closed: users with random passwords are made at
the first start and shown once; each may use the topics below its own name.

  MQTT client --wss, port 443--> Cloudflare ==tunnel==> connector --> broker

The token comes from the first of: --token, --token-file, TUNNEL_TOKEN,
CLOUDFLARE_TUNNEL_TOKEN, .env in this directory, a compose secret, the last
`up`, a prompt. What was chosen once is kept; later runs need no options."""

UP_EPILOG = """\
In the dashboard the tunnel's public hostname needs: service HTTP, URL
mosquitto:9001 (containers) or localhost:9001 (native)."""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help that fits 80 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=79)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: a number from 1 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r}: seconds from 1 to 3600")
    return value


def _version(text: str) -> tuple[int, int, int]:
    parts = text.split(".")
    if len(parts) not in {2, 3} or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: a Mosquitto version such as 2.1.2")
    numbers = [int(part) for part in parts]
    return numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else 0


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of lines")
    return int(text)


def add(commands: Any, parser_class: type[argparse.ArgumentParser]) -> None:
    """Add all of them to `commands`."""

    def command(name: str, summary: str, description: str = "", epilog: str = "") -> argparse.ArgumentParser:
        one: argparse.ArgumentParser = commands.add_parser(
            name,
            help=summary,
            description=description or summary,
            epilog=epilog,
            formatter_class=Formatter,
            allow_abbrev=False,
        )
        one.add_argument("--name", default="tunnel", help="the stack's name (default: %(default)s)")
        one.add_argument(
            "--state-dir", metavar="DIR", help="its directory (default: ~/.local/state/tunnel-launcher/NAME)"
        )
        one.add_argument("--json", action="store_true", help="JSON lines for programs")
        return one

    def action(group: Any, name: str, summary: str) -> argparse.ArgumentParser:
        """A word below a command; the options of all commands may stand behind it too."""
        one: argparse.ArgumentParser = group.add_parser(
            name, help=summary, description=summary, formatter_class=Formatter, allow_abbrev=False
        )
        for flag in ("--name", "--state-dir"):
            one.add_argument(flag, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        one.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return one

    up = command("up", "start or update broker and connector", UP_DESCRIPTION, UP_EPILOG)
    up.add_argument("--engine", choices=("auto", "docker", "podman", "native"), help="what to run it with")
    up.add_argument("--token", metavar="T", help="the token (others can see it here: prefer a file)")
    up.add_argument("--token-file", type=Path, metavar="FILE", help="file with the token; - is standard input")
    up.add_argument("--hostname", metavar="H", help="the tunnel's public hostname, for `status` and `doctor`")
    up.add_argument("--config", metavar="FILE", help="your own mosquitto.conf, used as it is ('' goes back to ours)")
    up.add_argument(
        "--allow-anonymous",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let everybody in who knows the host name; must be confirmed, or said again with --yes",
    )
    up.add_argument("--yes", action="store_true", help="do not ask")
    up.add_argument("--durability", choices=("each", "interval"), help=(
        "save the broker's database after each change (default), or every 60 s and at its end"
    ))  # fmt: skip
    up.add_argument(
        "--proxy-protocol",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the connector tells Mosquitto 2.1 each client's address (default where both can)",
    )
    up.add_argument("--broker-image", metavar="I", help="default: eclipse-mosquitto:2.1.2; name@sha256:... pins it")
    up.add_argument("--connector-image", metavar="I", help="default: built from this project's Dockerfile")
    up.add_argument("--mqtt-port", type=_port, metavar="PORT", help="native: MQTT on 127.0.0.1 (1883)")
    up.add_argument("--ws-port", type=_port, metavar="PORT", help="native: WebSockets on 127.0.0.1 (9001)")
    up.add_argument("--timeout", type=_seconds, default=60.0, metavar="S", help="wait for the registration (60)")
    up.add_argument("--foreground", action="store_true", help="native: stay, for systemd and the like")
    up.add_argument("--edge", action="append", metavar="HOST:PORT", help="another edge, such as `connector edge`")
    up.add_argument("--cacert", metavar="FILE", help="the CA of that edge")
    up.add_argument("--connector-arg", action="append", metavar="ARG", help="one more word for the connector")

    down = command("down", "stop both, connector first; the data stays")
    down.add_argument(
        "--volumes", action="store_true", help="delete the data too; must be confirmed or said with --yes"
    )
    down.add_argument("--yes", action="store_true", help="do not ask")

    command("status", "one table; exit status 0 when everything works")

    logs = command("logs", "log lines of both")
    logs.add_argument("services", nargs="*", metavar="SERVICE", help="broker, connector (default: both)")
    logs.add_argument("-f", "--follow", action="store_true", help="go on with what comes")
    logs.add_argument("--tail", type=_count, default=200, metavar="N", help="last lines of each (200)")

    restart = command("restart", "stop and start in the right order")
    restart.add_argument("services", nargs="*", metavar="SERVICE", help="broker, connector (default: both)")
    restart.add_argument("--timeout", type=_seconds, default=60.0, metavar="S", help="wait for the registration (60)")

    config = command("config", "what would run")
    config.add_argument("--compose", action="store_true", help="as compose YAML")
    config.add_argument("--broker", action="store_true", help="mosquitto.conf alone")
    config.add_argument("--dialect", type=_version, default=(2, 1, 2), metavar="V", help="for Mosquitto V (2.1.2)")
    config.add_argument("--plugins", metavar="DIR", help="where 2.1's file plugins are (/usr/lib in its image)")

    user = command("user", "users of the broker")
    actions = user.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=parser_class)
    for name, summary in (("add", "make a user"), ("passwd", "another password"), ("remove", "remove a user")):
        one = action(actions, name, summary)
        one.add_argument("user", metavar="NAME")
        if name != "remove":
            one.add_argument("--random", action="store_true", help="a random password, shown once")
            one.add_argument("--password-file", metavar="FILE", help="take it from a file; - is standard input")
    action(actions, "list", "users and their rules")

    acl = command("acl", "who may use which topics")
    actions = acl.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=parser_class)
    action(actions, "list", "all rules")
    allow = action(actions, "allow", "allow a user a topic filter")
    allow.add_argument("user", metavar="NAME")
    allow.add_argument("topic", metavar="FILTER")
    allow.add_argument("--access", choices=("read", "write", "readwrite"), default="readwrite")
    for name, summary in (("deny", "refuse a topic filter, whatever else allows it"), ("remove", "remove a rule")):
        one = action(actions, name, summary)
        one.add_argument("user", metavar="NAME")
        one.add_argument("topic", metavar="FILTER")
    check = action(actions, "check", "whether a user may, and which rule says so")
    check.add_argument("user", metavar="NAME")
    check.add_argument("verb", choices=("read", "write"))
    check.add_argument("topic", metavar="TOPIC")

    doctor = command("doctor", "check every hop, and print lines for clients")
    doctor.add_argument("--hostname", metavar="H[:PORT]", help="the public host name (default: what the tunnel says)")
    doctor.add_argument(
        "--cafile", type=Path, metavar="FILE", help="CA of the public side, where it is not a public one"
    )

    seed = command("import", "take over a compose folder with mosquitto.conf and .env, safely")
    seed.add_argument("path", metavar="PATH", help="the folder with docker-compose.yml")
    seed.add_argument("--engine", choices=("auto", "docker", "podman", "native"), help="what it will run with")
    seed.add_argument("--dry-run", action="store_true", help="only say what is unsafe")


def run(args: argparse.Namespace) -> int:
    """Run one parsed command; returns its exit status."""
    from launcher import commands  # noqa: PLC0415 - `--help` should not wait for it
    from launcher.output import Output  # noqa: PLC0415

    output = Output(as_json=args.json)
    for service in getattr(args, "services", []):
        if service not in {"broker", "connector"}:
            output.failure(f"there is no service {service!r}", "broker or connector")
            return EXIT_USAGE
    work = getattr(commands, "import_" if args.command == "import" else args.command)
    return guarded(work(args, output), output)


def run_demo(args: argparse.Namespace) -> int:
    """`launcher demo --engine docker`."""
    from launcher.containerdemo import demo  # noqa: PLC0415
    from launcher.output import Output  # noqa: PLC0415

    output = Output(as_json=args.json)
    return guarded(demo(args, output), output)


def guarded(work: Coroutine[Any, Any, int], output: Any) -> int:
    """Run it; every failure is one line, an interrupt ends it in order."""
    from launcher.stackdir import StackError  # noqa: PLC0415

    async def interruptible() -> int:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, task.cancel)
        return await work

    try:
        return asyncio.run(interruptible())
    except StackError as error:
        output.error(error)
        return 1
    except UsageError as error:
        output.failure(str(error), error.advice)
        return EXIT_USAGE
    except (asyncio.CancelledError, KeyboardInterrupt):
        output.failure("interrupted", "what runs already was left as it is: launcher status, launcher down")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
