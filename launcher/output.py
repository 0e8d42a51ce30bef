"""What the stack's commands print: progress, tables, logs; JSON lines for programs.

Owns: the look of `up`, `status`, `logs`, `doctor`; colours and NO_COLOR; where errors go.
In: facts. Out: text on standard output, errors on standard error (with `--json` all on standard output).
Never: prints a secret but by `reveal`, or a control character out of a log.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from launcher.stack import Check, LogLine, StackState
from launcher.stackdir import StackError
from launcher.view import clean

COLOURS = {"broker": "32", "connector": "35", "engine": "36", "doctor": "34", "demo": "1", "edge": "36"}


class Output:
    """One command's mouth."""

    def __init__(self, *, as_json: bool = False, out: TextIO | None = None, errors: TextIO | None = None) -> None:
        self.out = sys.stdout if out is None else out
        self.errors = sys.stderr if errors is None else errors
        self.as_json = as_json
        self._colour = self.out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._begun = time.monotonic()

    def paint(self, code: str, text: str) -> str:
        """`text` in a colour, where colours are wanted."""
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and code else text

    def facts(self, event: str, **facts: Any) -> None:
        """One JSON line, for programs only."""
        if self.as_json:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            print(json.dumps({"time": now, "event": event, **facts}, ensure_ascii=False), file=self.out, flush=True)

    def text(self, text: str = "") -> None:
        """For people only."""
        if not self.as_json:
            print(text, file=self.out, flush=True)

    def progress(self, service: str, text: str) -> None:
        """One step of something that takes a while."""
        elapsed = time.monotonic() - self._begun
        if self.as_json:
            self.facts("progress", service=service, text=text, elapsed=round(elapsed, 3))
        else:
            label = self.paint(COLOURS.get(service, ""), f"{service:<10}")
            self.text(f"{elapsed:6.2f} s {label} {clean(text)}")

    def warning(self, text: str, **facts: Any) -> None:
        """Something that should be changed."""
        if self.as_json:
            self.facts("warning", text=text, **facts)
        else:
            print(f"{self.paint('33;1', 'warning:')} {text}", file=self.errors, flush=True)

    def failure(self, message: str, advice: str = "") -> None:
        """Why the command ends with status 1."""
        if self.as_json:
            self.facts("failed", message=message, advice=advice)
            return
        print(f"launcher: {clean(message)}", file=self.errors)
        if advice:
            print(f"  what to do: {clean(advice)}", file=self.errors, flush=True)

    def status(self, state: StackState) -> None:
        """The one table."""
        if self.as_json:
            self.facts(
                "status",
                name=state.name,
                engine=state.engine,
                directory=state.directory,
                up=state.up,
                services=[
                    {
                        "service": one.service,
                        "state": one.state,
                        "health": one.health,
                        "what": one.what,
                        "restarts": one.restarts,
                        "since": one.since,
                        "detail": one.detail,
                    }
                    for one in state.services
                ],
                registrations=state.ready_connections,
                connections=state.connections,
                rule=state.rule,
                hostnames=state.hostnames,
                last_error=state.last_error,
                open_to_everyone=state.open_to_everyone,
            )
            return
        rows = [("", state.name, state.engine)]
        for one in state.services:
            health = f"{one.state}, {one.health}" if one.health else one.state
            detail = [one.what] if one.what else []
            if one.since and one.state == "running":
                detail.append(f"since {one.since}")
            if one.restarts:
                detail.append(f"{one.restarts} restart{'s' if one.restarts != 1 else ''}")
            if one.detail:
                detail.append(one.detail)
            rows.append((one.service, health, ", ".join(detail)))
        count = state.ready_connections
        places = ", ".join(str(one.get("edgeAddress")) for one in state.connections if one.get("edgeAddress"))
        rows.append(("registrations", "unknown" if count is None else str(count), places))
        rows.append(("rule", "", state.rule or "not known: the connector has no configuration yet"))
        hosts = ", ".join(f"wss://{host}:443/mqtt" for host in state.hostnames)
        rows.append(
            ("public", "", hosts or "not known: add a public hostname to the tunnel, or name it: up --hostname")
        )
        rows.append(("last error", "", state.last_error or "none"))
        if state.open_to_everyone:
            rows.append(("access", "OPEN", "everybody who knows the host name may read and write"))
        wide = max(len(second) for _, second, _ in rows)
        for first, second, third in rows:
            colour = "32" if second.endswith(("healthy", "registered")) and "not" not in second else ""
            if "unhealthy" in second or "not registered" in second or second in {"exited", "OPEN", "restarting"}:
                colour = "31"
            shown = self.paint(colour, f"{clean(second):<{wide}}")
            self.text(f"{first:<14}{shown}  {clean(third)}".rstrip())

    def log(self, line: LogLine) -> None:
        """One line of a service."""
        if self.as_json:
            print(
                json.dumps({"time": line.time, "service": line.service, "line": line.text}, ensure_ascii=False),
                file=self.out,
                flush=True,
            )
            return
        label = self.paint(COLOURS.get(line.service, ""), f"{line.service:<9} |")
        print(f"{label} {clean(line.text)}", file=self.out, flush=True)

    def check(self, check: Check) -> None:
        """One row of `doctor`."""
        if self.as_json:
            self.facts("check", name=check.name, good=check.good, text=check.text, advice=check.advice, ms=check.ms)
            return
        word, colour = {True: ("ok", "32"), None: ("note", "33"), False: ("FAIL", "31;1")}[check.good]
        took = f", {check.ms:.1f} ms" if check.ms is not None else ""
        self.text(f"{self.paint(colour, f'{word:<5}')} {check.name:<14} {clean(check.text)}{took}")
        if check.good is not True and check.advice:
            self.text(f"      what to do: {clean(check.advice)}")

    def users(self, passwords: dict[str, str], *, why: str) -> None:
        """Passwords, this once."""
        if self.as_json:
            self.facts("users", why=why, users=[{"name": n, "password": p} for n, p in passwords.items()])
            return
        self.text(f"\n{why}, shown this once (only hashes are kept):")
        for name, password in passwords.items():
            self.text(f"  {name:<10} {password}")

    def error(self, error: StackError) -> None:
        """A StackError in one line and its advice."""
        self.failure(str(error), error.advice)


def rows_of(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width."""
    if not table:
        return []
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
