"""The command `launcher`.

Owns: arguments, help, exit statuses.
In: argv. Out: an exit status: 0 done or stopped by its user; 1 a hop failed (named on the last lines);
    2 wrong arguments; 128 + N ended by signal N before everything was up.
Never: does the work itself.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import NoReturn

from launcher import stack_commands

EXIT_USAGE = 2

DESCRIPTION = """\
An MQTT broker behind a tunnel connector, as a careful operator would set it up.

  launcher up --token-file token      broker and connector, in containers or as
                                      processes; prints users and the public URL
  launcher status | logs -f | doctor  look at it
  launcher down                       stop it; the data stays"""

DEMO_DESCRIPTION = """\
Start a broker, a dev edge and a connector on this machine, send MQTT messages
through all of them over secure WebSocket, and show what happens:

  MQTT client --wss--> dev edge ==edge protocol==> connector --ws--> broker

Needs no Cloudflare account, no Docker and no network. Everything listens on
127.0.0.1 only and is gone when the command ends."""

DEMO_EPILOG = """\
exit status:
  0    checked (--once), or stopped with Ctrl-C
  1    a hop failed; the last lines name it and say what to do
  2    wrong arguments
  128+N  ended by signal N before everything was up

examples:
  launcher demo                        watch until Ctrl-C
  launcher demo --once                 check every hop and exit
  launcher demo --json | jq .          events for programs
  launcher demo --broker embedded      without Mosquitto"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line on what was wrong, one on what to do."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\nFor what is possible: {self.prog} --help\n")


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: a number from 0 (any free one) to 65535")
    return int(text)


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=79)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(prog="launcher", description=DESCRIPTION, formatter_class=_formatter, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    demo = commands.add_parser(
        "demo",
        help="everything on this machine: broker, dev edge, connector, self-check",
        description=DEMO_DESCRIPTION,
        epilog=DEMO_EPILOG,
        formatter_class=_formatter,
        allow_abbrev=False,
    )
    demo.add_argument("--once", action="store_true", help="exit after the self-check")
    demo.add_argument("--json", action="store_true", help="print JSON lines for programs")
    demo.add_argument(
        "--broker",
        choices=("auto", "mosquitto", "embedded"),
        default="auto",
        help="which broker: Mosquitto, or the embedded amqtt (default: Mosquitto where it is installed)",
    )
    demo.add_argument(
        "--protocol",
        choices=("auto", "http2", "quic"),
        default="http2",
        help="transport between connector and dev edge (default: %(default)s)",
    )
    demo.add_argument(
        "--public-port",
        type=_port,
        metavar="PORT",
        help="port of the public side (default: 8443 if it is free, else any free one)",
    )
    demo.add_argument(
        "--engine",
        choices=("native", "docker", "podman"),
        default="native",
        help="run the three as processes, or as containers (default: %(default)s)",
    )
    demo.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="keep CA, password and the broker's data in DIR, and use them again",
    )
    stack_commands.add(commands, _Parser)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    top = parser()
    try:
        arguments = top.parse_args(argv)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else EXIT_USAGE
    if arguments.command is None:
        top.print_help(sys.stderr)
        return EXIT_USAGE
    if sys.platform == "win32":
        print("launcher: needs Linux or macOS (on Windows: WSL)", file=sys.stderr)
        return 1
    if arguments.command != "demo":
        return stack_commands.run(arguments)
    if arguments.engine != "native":
        return stack_commands.run_demo(arguments)
    from launcher.demo import Demo, Options  # noqa: PLC0415 - `--help` should not wait for paho
    from launcher.view import Console  # noqa: PLC0415

    options = Options(
        broker=arguments.broker,
        protocol=arguments.protocol,
        public_port=arguments.public_port,
        once=arguments.once,
        keep=arguments.keep,
    )
    return asyncio.run(Demo(options, Console(sys.stdout, as_json=arguments.json)).run())
