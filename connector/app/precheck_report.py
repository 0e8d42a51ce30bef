"""What the pre-checks found: rows, verdict, and the three forms in which it is shown.

Owns: the verdict's rules and the forms (box, log lines, JSON for `tunnel diag`). In: rows. Out: lines, JSON values.
Never: probes anything.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from connector.app.log_table import log_table
from connector.app.logs import Logger

TITLE = "CONNECTIVITY PRE-CHECKS"


class Kind(IntEnum):
    """What a row is about; the numbers are those of `prechecks.json`."""

    DNS = 0
    QUIC = 1
    HTTP2 = 2
    API = 3


class Status(IntEnum):
    """How it went; the numbers are those of `prechecks.json`."""

    PASS = 0
    FAIL = 1
    SKIP = 2


COMPONENTS = {
    Kind.DNS: "DNS Resolution",
    Kind.QUIC: "UDP Connectivity",
    Kind.HTTP2: "TCP Connectivity",
    Kind.API: "Cloudflare API",
}


class Row(NamedTuple):
    """One check of one target. `action` says what to do; of a failed one only."""

    kind: Kind
    target: str
    status: Status
    details: str
    action: str = ""


class Report:
    """All rows of one run."""

    def __init__(self, rows: Sequence[Row], *, protocol: str = "auto", run_id: uuid.UUID | None = None) -> None:
        self.rows = tuple(rows)
        self.run_id = run_id or uuid.uuid4()
        self._protocol = protocol

    def _failed(self, kind: Kind) -> bool:
        return any(row.kind is kind and row.status is Status.FAIL for row in self.rows)

    def _passed(self, kind: Kind) -> bool:
        rows = [row for row in self.rows if row.kind is kind]
        return bool(rows) and all(row.status is Status.PASS for row in rows)

    @property
    def hard_fail(self) -> bool:
        """Whether no tunnel can be expected: no DNS, or neither transport."""
        return self._failed(Kind.DNS) or (self._failed(Kind.QUIC) and self._failed(Kind.HTTP2))

    @property
    def degraded(self) -> bool:
        """Whether something does not work that a tunnel can do without."""
        one = self._failed(Kind.QUIC) != self._failed(Kind.HTTP2)
        return not self.hard_fail and (one or self._failed(Kind.API))

    @property
    def suggested(self) -> str:
        """The protocol to use: `quic`, `http2`, or nothing."""
        kinds = {"quic": Kind.QUIC, "http2": Kind.HTTP2}
        wanted = kinds.get(self._protocol)
        if wanted is not None and not self._failed(wanted) and any(row.kind is wanted for row in self.rows):
            return self._protocol
        return next((name for name, kind in kinds.items() if self._passed(kind)), "")

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        if self.hard_fail:
            return "SUMMARY: Environment has critical failures. cloudflared may not be able to establish a tunnel."
        if self.degraded:
            text = "SUMMARY: Environment ready with degraded transport."
            return f"{text} cloudflared will proceed using '{self.suggested}'." if self.suggested else text
        text = "SUMMARY: Environment is healthy."
        return f"{text} cloudflared will use '{self.suggested}' as primary protocol." if self.suggested else text

    def lines(self) -> list[str]:
        """The table, what to do, and the verdict; cloudflared's words, which people search for."""
        table = [("COMPONENT", "TARGET", "STATUS", "DETAILS")]
        table += [(COMPONENTS[row.kind], row.target, row.status.name, row.details) for row in self.rows]
        widths = [max(len(cells[column]) for cells in table) + 2 for column in range(3)]
        level = "ERROR" if self.hard_fail else "WARNING"
        actions = [f"{level}: {row.action}" for row in self.rows if row.status is Status.FAIL and row.action]
        text = [
            "".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)) + cells[3] for cells in table
        ]
        return [*text, *actions, "", self.summary]

    def log(self, log: Logger) -> None:
        """Print the box, then one structured line a row and one for the whole."""
        log_table(log, self.lines(), title=TITLE)
        run_id = str(self.run_id)
        for row in self.rows:
            log.info(
                "precheck",
                run_id=run_id,
                component=COMPONENTS[row.kind],
                target=row.target,
                status=row.status.name.lower(),
                details=row.details,
            )
        suggested = {"suggested_protocol": self.suggested} if self.suggested else {}
        log.info("precheck complete", run_id=run_id, hard_fail=self.hard_fail, **suggested)

    def to_json(self) -> dict[str, Any]:
        """Give the value that `tunnel diag` writes to prechecks.json."""
        return {
            "RunID": str(self.run_id),
            "Results": [
                {
                    "Type": int(row.kind),
                    "Component": COMPONENTS[row.kind],
                    "Target": row.target,
                    "ProbeStatus": int(row.status),
                    "Details": row.details,
                    "Action": row.action,
                }
                for row in self.rows
            ],
            "SuggestedProtocol": {"http2": 0, "quic": 1}.get(self.suggested),
        }
