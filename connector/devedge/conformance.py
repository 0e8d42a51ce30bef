"""`connector conformance --connector 'COMMAND …'`: any connector against the dev edge, as a table of verdicts.

Owns: the flags, the child process, the order, the table. In: argv. Out: lines on stdout; status 1 when a case failed.
Never: needs anything beside this package; leaves a process behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from connector.devedge.events import Event
from connector.devedge.faults import parse_faults
from connector.devedge.probe import Origin, Visitor
from connector.devedge.scenarios import CASES, Case, Mismatch
from connector.devedge.server import DevEdge, Settings
from connector.errors import ConnectorError, UsageError

OWN = (
    f"{shlex.quote(sys.executable)} -m connector run --edge {{edge}} --cacert {{ca}} --token-file {{token_file}}"
    " --protocol {protocol} --ha-connections 1 --grace-period 20s --no-prechecks"
)

CASE_SECONDS = 150.0
"""Limit of one case; the slowest wait for a connector's back-off."""

KILL_SECONDS = 5.0

EPILOG = f"""\
In COMMAND are replaced: {{edge}} {{ca}} {{token_file}} {{token}} {{protocol}}.
For cloudflared:
  --connector 'cloudflared tunnel --no-autoupdate --edge {{edge}} --cacert {{ca}}
     --no-prechecks --protocol {{protocol}} --grace-period 20s run --token-file {{token_file}}'

{len(CASES)} cases in the areas: {", ".join(dict.fromkeys(case.area for case in CASES))}.
"""


def main(argv: list[str]) -> int:
    """Run `connector conformance`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="connector conformance",
        description="Test what a connector does against a dev edge on this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--connector", default=OWN, metavar="COMMAND", help="default: this one")
    parser.add_argument("--protocol", action="append", choices=("http2", "quic"), help="default: both")
    parser.add_argument(
        "--case", action="append", default=[], metavar="TEXT", help="only cases with this in their name"
    )
    parser.add_argument("--area", action="append", default=[], metavar="NAME", help="only this area")
    parser.add_argument("--json", action="store_true", help="one JSON object a verdict")
    parser.add_argument("--verbose", action="store_true", help="show what a failed connector printed")
    args = parser.parse_args(argv)
    cases = [
        case
        for case in CASES
        if (not args.area or case.area in args.area)
        and (not args.case or any(text.lower() in f"{case.area} {case.name}".lower() for text in args.case))
    ]
    try:
        if not cases:
            raise UsageError(
                "no case has that name", advice=f"Areas: {', '.join(dict.fromkeys(c.area for c in CASES))}."
            )
        command = shlex.split(args.connector)
        if not command:
            raise UsageError("--connector is empty")
        return asyncio.run(_main(command, cases, args))
    except ConnectorError as error:
        print(f"connector conformance: {error}", file=sys.stderr)
        if error.advice:
            print(error.advice, file=sys.stderr)
        return 255 if isinstance(error, UsageError) else 1
    except ValueError as error:
        print(f"connector conformance: --connector: {error}", file=sys.stderr)
        return 255


async def _main(command: list[str], cases: list[Case], args: argparse.Namespace) -> int:
    import capnp  # noqa: PLC0415 - heavy, and not needed for --help

    protocols = args.protocol or (["http2", "quic"] if any("{protocol}" in word for word in command) else ["http2"])
    table = Table(as_json=args.json, verbose=args.verbose)
    async with capnp.kj_loop():
        for protocol in protocols:
            await run_cases(command, protocol, cases, table)
    return table.end()


async def run_cases(command: list[str], protocol: str, cases: list[Case], table: Table) -> None:
    """Run the cases of one protocol: those that share a connector first."""
    wanted = [case for case in cases if case.only in {"", protocol}]
    shared = [case for case in wanted if not case.own]
    if shared:
        try:
            async with rig(command, protocol) as common:
                for case in shared:
                    await _judge(case, protocol, common, table)
        except Mismatch as error:
            for case in shared:
                if (case, protocol) not in table.done:
                    table.add(case, protocol, "FAIL", error.expected, error.came, 0.0, error.output)
    for case in wanted:
        if case.own:
            try:
                async with rig(command, protocol, faults=case.faults, wait=not case.refused) as own:
                    await _judge(case, protocol, own, table)
            except Mismatch as error:
                table.add(case, protocol, "FAIL", error.expected, error.came, 0.0, error.output)


async def _judge(case: Case, protocol: str, at: ProcessRig, table: Table) -> None:
    started = time.monotonic()
    verdict, expected, came = "pass", "", ""
    try:
        async with asyncio.timeout(CASE_SECONDS):
            await case.run(at)
    except Mismatch as error:
        verdict, expected, came = "FAIL", error.expected, error.came
    except TimeoutError:
        verdict, expected, came = "FAIL", "an answer in time", "nothing"
    except (OSError, asyncio.IncompleteReadError, ValueError, KeyError) as error:
        verdict, expected, came = "FAIL", "an answer", f"{type(error).__name__}: {error}"
    table.add(
        case, protocol, verdict, expected, came, time.monotonic() - started, "" if verdict == "pass" else at.tail()
    )


class ProcessRig:
    """One connector as a child process, with its edge, origin and visitor."""

    def __init__(self, edge: DevEdge, origin: Origin, protocol: str) -> None:
        self.edge = edge
        self.origin = origin
        self.protocol = protocol
        self.visitor = Visitor(edge.public_address[1], edge.ca_file)
        self.events: list[Event] = []
        self.output: list[str] = []
        self.process: asyncio.subprocess.Process | None = None
        self._news = asyncio.Event()
        edge.events.listen(self._on_event)

    def _on_event(self, event: Event) -> None:
        self.events.append(event)
        self._news.set()

    async def event(self, name: str, *, limit: float = 30.0, after: int = 0, **fields: Any) -> Event:
        """Return an event of the edge, already seen or still to come."""
        try:
            async with asyncio.timeout(limit):
                while True:
                    for event in self.events[after:]:
                        if event["event"] == name and all(event.get(key) == value for key, value in fields.items()):
                            return event
                    if self.process is not None and self.process.returncode is not None:
                        status = self.process.returncode
                        raise Mismatch(f"the edge sees {name}", f"the connector has ended with status {status}")
                    self._news.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.5):
                            await self._news.wait()
        except TimeoutError:
            raise Mismatch(f"the edge sees {name}", f"nothing within {limit:g} s") from None

    def stop(self, number: int) -> None:
        """Send the connector a signal."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait for the connector's end."""
        assert self.process is not None
        try:
            async with asyncio.timeout(40):
                return await self.process.wait()
        except TimeoutError:
            raise Mismatch("the connector ends", "it still runs after 40 s") from None

    def tail(self) -> str:
        """Return the last lines that it printed."""
        return "\n".join(self.output[-12:])

    async def read(self) -> None:
        """Keep reading what it prints."""
        assert self.process is not None
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):
            async for line in self.process.stdout:
                self.output.append(line.decode("utf-8", "replace").rstrip())
                del self.output[:-200]


@asynccontextmanager
async def rig(
    command: list[str], protocol: str, *, faults: tuple[str, ...] = (), wait: bool = True
) -> AsyncIterator[ProcessRig]:
    """Start edge, origin and connector; wait for registration and configuration unless told not to."""
    with tempfile.TemporaryDirectory(prefix="conformance-") as directory:
        state = Path(directory)
        async with Origin() as origin:
            settings = Settings(
                state, tunnel_names=["conformance"], ingress=[f"http://127.0.0.1:{origin.port}"],
                faults=parse_faults(list(faults)),
            )  # fmt: skip
            edge = DevEdge(settings)
            async with edge:
                made = ProcessRig(edge, origin, protocol)
                token = state / "token"
                token.write_text(edge.token())
                token.chmod(0o600)
                host, port = edge.edge_address
                values = {
                    "edge": f"{host}:{port}", "ca": str(edge.ca_file), "token_file": str(token),
                    "token": edge.token(), "protocol": protocol,
                }  # fmt: skip
                words = [_fill(word, values) for word in command]
                environ = {key: value for key, value in os.environ.items() if not key.startswith("TUNNEL_")}
                try:
                    made.process = await asyncio.create_subprocess_exec(
                        *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                        stderr=asyncio.subprocess.STDOUT, env=environ,
                    )  # fmt: skip
                except OSError as error:
                    raise UsageError(f"--connector {words[0]}: {error.strerror or error}") from None
                reading = asyncio.create_task(made.read(), name="connector output")
                try:
                    if wait:
                        await _started(made)
                    yield made
                finally:
                    await _end(made.process)
                    await reading


async def _started(made: ProcessRig) -> None:
    try:
        await made.event("registered")
        await made.event("configuration")
    except Mismatch as error:
        error.output = made.tail()
        raise


def _fill(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace("{" + name + "}", value)
    return word


async def _end(process: asyncio.subprocess.Process) -> None:
    """A connector that is tested is not waited for: it had its case."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0 if number == signal.SIGTERM else KILL_SECONDS):
                await process.wait()


class Table:
    """The verdicts, printed as they come."""

    def __init__(self, *, as_json: bool = False, verbose: bool = False) -> None:
        self.done: dict[tuple[Case, str], str] = {}
        self._json = as_json
        self._verbose = verbose
        if not as_json:
            print(f"{'area':14} {'protocol':8} {'verdict':7} {'seconds':>7}  case")

    def add(
        self, case: Case, protocol: str, verdict: str, expected: str, came: str, seconds: float, output: str = ""
    ) -> None:
        """Print one."""
        self.done[case, protocol] = verdict
        if self._json:
            fields = {
                "area": case.area, "case": case.name, "protocol": protocol, "verdict": verdict, "expected": expected,
                "came": came, "seconds": round(seconds, 2),
                **({"note": case.note} if case.note and verdict != "pass" else {}),
            }  # fmt: skip
            print(json.dumps(fields, ensure_ascii=False), flush=True)
            return
        print(f"{case.area:14} {protocol:8} {verdict:7} {seconds:7.1f}  {case.name}", flush=True)
        if verdict != "pass":
            print(f"{'':33} expected {expected[:300]}\n{'':33} came     {came[:300]}", flush=True)
            if case.note:
                print(f"{'':33} known    {case.note}", flush=True)
            if self._verbose and output:
                print("\n".join(f"{'':33} | {line[:200]}" for line in output.splitlines()), flush=True)

    def end(self) -> int:
        """Print the sum; return the exit status."""
        failed = sum(verdict != "pass" for verdict in self.done.values())
        if not self._json:
            print(f"{len(self.done)} cases, {failed} failed")
        return 1 if failed else 0
