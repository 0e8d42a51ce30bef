"""`connector edge`: the dev edge on the command line.

Owns: the flags, signals and exit status of the subcommand.
In: `main(argv)`. Out: event lines on stdout, one clear line on stderr for what goes wrong, the exit status.
Never: prints a token unless asked by `token`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from ipaddress import ip_address
from pathlib import Path

from connector.devedge.authority import Authority, StateDir, default_state_dir
from connector.devedge.events import EventLog
from connector.devedge.faults import GRAMMAR, parse_faults
from connector.devedge.forward import parse_route
from connector.devedge.management import ManagementDesk
from connector.devedge.server import DevEdge, Settings, tunnel_token
from connector.devedge.tunnels import Declaration, Tunnel, TunnelStore, check_name, read_config_file
from connector.errors import ConfigError, ConnectorError, UsageError

EPILOG = f"""\
commands:
  connector edge [flags]       run the dev edge (without flags: tunnel `dev`)
  connector edge token NAME    print the token of a tunnel, nothing else
  connector edge ca            print the path of the CA file, making the CA
  connector edge management NAME
                               print a token for `connector tail`

faults (--fault, repeatable):
{chr(10).join("  " + line for line in GRAMMAR.splitlines())}

example:
  connector edge --tunnel demo --ingress http://127.0.0.1:8080 \\
      --listen 127.0.0.1:7844 --public 127.0.0.1:8443
  connector run --edge 127.0.0.1:7844 --cacert "$(connector edge ca)" \\
      --token "$(connector edge token demo)"
  curl --cacert "$(connector edge ca)" https://localhost:8443/
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help that fits 80 columns whatever the terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=80)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="connector edge",
        description="A small Cloudflare edge for this machine: connectors register with it,\n"
        "visitors reach their origins through it. For development and tests only.",
        epilog=EPILOG,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="CA, keys, secrets (~/.local/state/…)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with tunnels; re-read on change")
    parser.add_argument("--tunnel", action="append", default=[], metavar="NAME", help="declare a tunnel (repeatable)")
    parser.add_argument(
        "--ingress", action="append", default=[], metavar="[HOST=]SERVICE", help="ingress rule (repeatable)"
    )
    parser.add_argument("--listen", metavar="ADDR:PORT", default="127.0.0.1:0", help="for connectors (127.0.0.1:0)")
    parser.add_argument("--public", metavar="ADDR:PORT", default="127.0.0.1:0", help="for visitors (127.0.0.1:0)")
    parser.add_argument("--quick", metavar="ADDR:PORT", help="hand quick tunnels out here, over plain HTTP")
    parser.add_argument("--no-quic", action="store_true", help="serve connectors over TCP (HTTP/2) only")
    parser.add_argument(
        "--quic-packet-size", type=int, metavar="BYTES", help="largest QUIC packet (loopback 1452, else 1232)"
    )
    parser.add_argument(
        "--udp", action="append", default=[], metavar="LISTEN=DEST", help="UDP port into the private network"
    )
    parser.add_argument(
        "--tcp", action="append", default=[], metavar="LISTEN=DEST", help="TCP port into the private network"
    )
    parser.add_argument("--ping", action="append", default=[], metavar="IP", help="ping IP through the connector")
    parser.add_argument("--output", choices=("default", "json"), default="default", help="form of the event lines")
    parser.add_argument(
        "--inspect", nargs="?", const="127.0.0.1:0", metavar="ADDR:PORT", help="show what passes on a page"
    )
    parser.add_argument("--capture", metavar="FILE", help="append what passes to FILE, secrets masked")
    parser.add_argument("--no-redact", action="store_true", help="let page and capture show secrets")
    parser.add_argument("--fault", action="append", default=[], metavar="FAULT", help="misbehave, see below")
    return parser


Inspect = Callable[[DevEdge, "argparse.Namespace"], AbstractAsyncContextManager[object]]
"""Puts an inspector in place around a running edge; the command line brings it (this package must not know one)."""


def main(argv: list[str], inspect: Inspect | None = None) -> int:
    """Run `connector edge` with the arguments behind those words; returns the exit status."""
    if not argv or argv[0] not in ("token", "ca", "management"):
        command, rest = "run", argv
    else:
        command, rest = argv[0], argv[1:]
    try:
        if command == "token":
            return _token(rest)
        if command == "ca":
            return _ca(rest)
        if command == "management":
            return _management(rest)
        return _run(rest, inspect)
    except ConnectorError as error:
        print(f"connector edge: {error}", file=sys.stderr)
        if error.advice:
            print(error.advice, file=sys.stderr)
        return 255 if isinstance(error, UsageError) else 1


def _small_parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"connector edge {command}", description=description, formatter_class=_Help, allow_abbrev=False
    )
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="as for `connector edge`")
    return parser


def _token(argv: list[str]) -> int:
    parser = _small_parser("token", "Print the token of a tunnel to stdout.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file that declares the tunnel")
    parser.add_argument("name", metavar="NAME", help="name of the tunnel")
    args = parser.parse_args(argv)
    print(tunnel_token(_tunnel(args, "token")))
    return 0


def _management(argv: list[str]) -> int:
    parser = _small_parser("management", "Print a token for the management of a tunnel to stdout; it lasts an hour.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file that declares the tunnel")
    parser.add_argument("--actor", default="dev@localhost", metavar="NAME", help="who asks; one streams at a time")
    parser.add_argument("name", metavar="NAME", help="name of the tunnel")
    args = parser.parse_args(argv)
    tunnel = _tunnel(args, "management")
    print(ManagementDesk(StateDir(args.state_dir or default_state_dir())).issue(tunnel, args.actor))
    return 0


def _tunnel(args: argparse.Namespace, command: str) -> Tunnel:
    """Find the tunnel that the arguments name, making it where no file declares it."""
    name = check_name(args.name, f"connector edge {command}")
    declaration = Declaration(name)
    if args.config is not None:
        found = {declared.name: declared for declared in read_config_file(args.config)}
        if name not in found:
            raise ConfigError(f"{args.config}: there is no tunnel {name!r}", advice=f"It has: {', '.join(found)}.")
        declaration.id, declaration.account, declaration.secret = (
            found[name].id,
            found[name].account,
            found[name].secret,
        )
    store = TunnelStore(StateDir(args.state_dir or default_state_dir()))
    if args.config is None and not store.knows(name):
        print(f"connector edge: new tunnel {name!r}; serve it with --tunnel {name}", file=sys.stderr)
    return store.resolve([declaration])[0]


def _ca(argv: list[str]) -> int:
    args = _small_parser("ca", "Print the path of the CA file.").parse_args(argv)
    print(Authority.open(StateDir(args.state_dir or default_state_dir())).ca_file)
    return 0


def _run(argv: list[str], inspect: Inspect | None) -> int:
    args = _parser().parse_args(argv)
    names = [check_name(name, "--tunnel") for name in args.tunnel]
    settings = Settings(
        (args.state_dir or default_state_dir()).absolute(),
        tunnel_names=list(dict.fromkeys(names)) or ([] if args.config or args.quick else ["dev"]),
        config_file=args.config,
        ingress=args.ingress,
        listen=_address(args.listen, "--listen"),
        public=_address(args.public, "--public"),
        quick=_address(args.quick, "--quick") if args.quick else None,
        faults=parse_faults(args.fault),
        quic=not args.no_quic,
        datagram_size=_packet_size(args.quic_packet_size),
        udp=[parse_route(text, "--udp") for text in args.udp],
        tcp=[parse_route(text, "--tcp") for text in args.tcp],
        ping=[_ip(text) for text in args.ping],
    )
    colour = None if args.output == "default" else False
    events = EventLog(sys.stdout, as_json=args.output == "json", colour=colour)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(settings, events, args, inspect))


async def _serve(settings: Settings, events: EventLog, args: argparse.Namespace, inspect: Inspect | None) -> int:
    import capnp  # noqa: PLC0415 - heavy, and not needed for `token` and `ca`

    async with capnp.kj_loop():
        edge = DevEdge(settings, events)
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _on_stop_signal, stop)
        loop.add_signal_handler(signal.SIGHUP, edge.reload)
        async with AsyncExitStack() as stack:
            if inspect is not None and (args.inspect is not None or args.capture is not None):
                await stack.enter_async_context(inspect(edge, args))
            await edge.start()
            await stop.wait()
            await edge.stop()
    events.emit("stopped")
    return 0


def _on_stop_signal(stop: asyncio.Event) -> None:
    if stop.is_set():
        os._exit(130)  # the second signal means now
    stop.set()


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return uvloop.Loop


def _packet_size(value: int | None) -> int | None:
    if value is not None and not 1200 <= value <= 65_000:
        raise UsageError(f"--quic-packet-size {value}: not within 1200 to 65000", advice="For example 1232.")
    return value


def _ip(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError:
        raise UsageError(f"--ping {text}: not an IP address") from None


def _address(text: str, flag: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{flag} {text}: not ADDRESS:PORT", advice="For example 127.0.0.1:0.")
    return host, int(port)
