"""The command line of the benchmark: `python -m benchmarks`, or `make bench ARGS=...`.

Owns: flags, progress, the order of a run, files in the results folder.
In: arguments; CLOUDFLARED in the environment. Out: a table on stdout, `--json`, an SVG.
Never: measures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.rows import Row, all_rows
from benchmarks.runner import Bench, Contender, cloudflared, other, ours

TRANSPORTS = ("http2", "quic")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run connectors side by side and compare their CPU time per unit of work. CLOUDFLARED=/path in the "
        "environment adds the original.",
    )
    parser.add_argument("--quick", action="store_true", help="two short rounds of everything, under 50 s")
    parser.add_argument("--full", action="store_true", help="10,000 idle WebSockets instead of 2,000")
    parser.add_argument("--rows", metavar="PART,...", help="only rows whose names contain one of these; `list` lists")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds per row and connector (5; 2 with --quick)")
    parser.add_argument("--seconds", type=float, metavar="S", help="length of one round (1; 0.3 with --quick)")
    parser.add_argument("--transport", choices=TRANSPORTS, default="http2", help="what carries the tunnel")
    parser.add_argument(
        "--connector",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="one more connector; {edge}, {ca}, {transport} and {token_file} in COMMAND are filled in",
    )
    parser.add_argument("--without-ours", action="store_true", help="leave this project's connector out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where the SVG goes")
    return parser.parse_args(argv)


def contenders_of(options: argparse.Namespace) -> list[Contender]:
    """Who runs; raises ValueError."""
    found = [] if options.without_ours else [ours()]
    binary = os.environ.get("CLOUDFLARED")
    if binary:
        if not shutil.which(binary):
            raise ValueError(f"CLOUDFLARED={binary} is not a program")
        found.append(cloudflared(binary))
    found += [other(text) for text in options.connector]
    if len({contender.name for contender in found}) < len(found) or not found:
        raise ValueError("connectors need names of their own, and there must be one")
    return found


def chosen(options: argparse.Namespace) -> list[Row]:
    """Rows to run; raises ValueError."""
    rows = all_rows(quick=options.quick, full=options.full)
    if options.rows and options.rows != "list":
        parts = [part.strip() for part in options.rows.split(",")]
        rows = [row for row in rows if any(part in row.name for part in parts)]
    if not rows:
        raise ValueError(f"--rows {options.rows}: no row has that in its name (--rows list shows them)")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status: 1 if a connector failed a row, 2 for a usage error."""
    options = parse(argv)
    try:
        contenders, rows = contenders_of(options), chosen(options)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if options.rows == "list":
        print("\n".join(f"{row.name:<16}{row.unit}" for row in rows))
        return 0
    names = [contender.name for contender in contenders]
    rounds = options.rounds or (2 if options.quick else 5)
    seconds = options.seconds or (0.3 if options.quick else 1.0)
    began = time.monotonic()
    tty = sys.stderr.isatty()

    def progress(text: str) -> None:
        if tty:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    found: list[dict[str, Any]] = []
    wide = shutil.get_terminal_size((110, 24)).columns >= 107
    with Bench(contenders, transport=options.transport, rounds=rounds, seconds=seconds) as bench:
        where = (
            "connectors on core {}, load on core {}".format(*bench.cores) if bench.cores[0] is not None else "one core"
        )
        print(f"{', '.join(names)} over {options.transport}; {rounds} rounds in turns; {where}")
        print(f"CPU per unit: min/median/max; ratio: to {report.REFERENCE}" + ("; loads of a core" if wide else ""))
        print(report.HEADER + (report.WIDE if wide else ""))
        for row in rows:
            item = report.row_object(bench.run_row(row, progress), names)
            progress("")
            print("\n".join(report.table_lines(item, wide=wide)), flush=True)
            found.append(item)
        failed = any(item["errors"] for item in found)
        if failed:
            print(f"\nThe connectors' last words:\n{bench.log()}", file=sys.stderr)
    if report.REFERENCE not in names:
        print("No ratios: set CLOUDFLARED=/path/to/cloudflared to have the original run beside.")
    options.results.mkdir(parents=True, exist_ok=True)
    picture = options.results / f"bench-{options.transport}.svg"
    picture.write_text(report.svg(found, names))
    if options.json:
        settings = {"rounds": rounds, "seconds": seconds, "quick": options.quick, "transport": options.transport}
        document = {"machine": report.machine(), "settings": settings, "connectors": names, "rows": found}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{time.monotonic() - began:.0f} s; plot: {picture}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
