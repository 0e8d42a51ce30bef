"""The command line of the benchmark: `python -m benchmarks`, or `make bench ARGS=...`.

Owns: flags, progress, the order of a run, files in the results folder.
In: arguments; CLOUDFLARED in the environment. Out: a table on stdout, `--json`, an SVG per transport.
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
from benchmarks.connectors import Contender, cloudflared, other, ours
from benchmarks.rows import TRANSPORTS, Row, all_rows, matches
from benchmarks.runner import Bench, BenchError

QUICK_ROUNDS = 2
QUICK_SECONDS = 0.12
QUICK_LIMIT = 26.0
"""A quick run's seconds for all rows. Behind that, one short round a row must do, so that it stays under 50 s also on a
machine that is busy with other things."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run connectors side by side and compare their CPU time per unit of work. CLOUDFLARED=/path in the "
        "environment adds the original.",
    )
    parser.add_argument("--quick", action="store_true", help="short rounds of everything, under 50 s")
    parser.add_argument("--full", action="store_true", help="10,000 idle WebSockets instead of 2,000")
    parser.add_argument(
        "--rows", metavar="PATTERN,...", help="only rows whose names contain one, or match; `list` lists"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds per row and connector (5; 2 with --quick)")
    parser.add_argument("--seconds", type=float, metavar="S", help="length of one round (1; 0.12 with --quick)")
    parser.add_argument("--transport", choices=(*TRANSPORTS, "both"), default="both", help="what carries the tunnel")
    parser.add_argument(
        "--connector",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="one more connector; {edge}, {ca}, {transport}, {token_file} and {features} in COMMAND are filled in",
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="NAME=IMAGE", help="a connector's container image"
    )
    parser.add_argument("--without-ours", action="store_true", help="leave this project's connector out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where the SVGs go")
    options = parser.parse_args(argv)
    if (options.rounds is not None and options.rounds < 1) or (options.seconds is not None and options.seconds <= 0):
        parser.error("--rounds and --seconds must be above 0")
    return options


def contenders_of(options: argparse.Namespace) -> list[Contender]:
    """Who runs; raises ValueError."""
    found = [] if options.without_ours else [ours()]
    binary = os.environ.get("CLOUDFLARED")
    if binary:
        if not shutil.which(binary):
            raise ValueError(f"CLOUDFLARED={binary} is not a program: give the path of a cloudflared, or unset it")
        found.append(cloudflared(binary))
    found += [other(text) for text in options.connector]
    if len({contender.name for contender in found}) < len(found) or not found:
        raise ValueError("connectors need names of their own, and there must be one")
    images = dict(text.split("=", 1) for text in options.image if "=" in text)
    return [contender._replace(image=images.get(contender.name, contender.image)) for contender in found]


def chosen(options: argparse.Namespace) -> list[tuple[str, Row]]:
    """Transports and rows to run, in order; raises ValueError."""
    transports = TRANSPORTS if options.transport == "both" else (options.transport,)
    rows = all_rows(quick=options.quick, full=options.full)
    found = [(transport, row) for transport in transports for row in rows if transport in row.transports]
    if options.rows and options.rows != "list":
        parts = [part.strip() for part in options.rows.split(",")]
        found = [item for item in found if any(matches(item[1], item[0], part) for part in parts)]
    if not found:
        raise ValueError(f"--rows {options.rows}: no row is called that (--rows list shows them)")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status: 1 if a connector failed a row, 2 for a usage error, 3 if the load itself failed."""
    options = parse(argv)
    try:
        contenders, rows = contenders_of(options), chosen(options)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if options.rows == "list":
        print("\n".join(f"{transport + ' ' + row.name:<24}{row.unit}" for transport, row in rows))
        return 0
    try:
        return run(options, contenders, rows)
    except BenchError as error:
        print(f"\nbenchmarks: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("\nbenchmarks: interrupted", file=sys.stderr)
        return 130


def run(options: argparse.Namespace, contenders: list[Contender], rows: list[tuple[str, Row]]) -> int:
    """Run the rows; returns the exit status. Errors: BenchError."""
    names = [contender.name for contender in contenders]
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else 5)
    seconds = options.seconds or (QUICK_SECONDS if options.quick else 1.0)
    began = time.monotonic()
    tty = sys.stderr.isatty()
    done = 0

    def progress(text: str) -> None:
        if tty:
            print(f"\r\x1b[K{text and f'[{done}/{len(rows)}] {text}'}", end="", file=sys.stderr, flush=True)

    def late() -> bool:
        return options.quick and time.monotonic() - began > QUICK_LIMIT * (done + 1) / len(rows)

    found: list[dict[str, Any]] = []
    pictures = []
    wide = shutil.get_terminal_size((110, 24)).columns >= 107
    options.results.mkdir(parents=True, exist_ok=True)
    for transport in dict.fromkeys(transport for transport, _ in rows):
        with Bench(
            contenders, transport=transport, rounds=rounds, seconds=seconds, share=options.quick, late=late
        ) as bench:
            where = (
                "connectors on core {}, load on core {}".format(*bench.cores)
                if bench.cores[0] is not None
                else "one core"
            )
            print(f"{', '.join(names)} over {transport}; {rounds} rounds in turns; {where}")
            print(f"CPU per unit: min/median/max; ratio: to {report.REFERENCE}" + ("; loads of a core" if wide else ""))
            print(report.HEADER + (report.WIDE if wide else ""))
            part = []
            for row in [row for over, row in rows if over == transport]:
                item = report.row_object(bench.run_row(row, progress), names)
                progress("")
                done += 1
                print("\n".join(report.table_lines(item, wide=wide)), flush=True)
                part.append(item)
            if any(item["errors"] for item in part):
                print(f"\nThe connectors' last words:\n{bench.log()}", file=sys.stderr)
        found += part
        pictures.append(options.results / f"bench-{transport}.svg")
        pictures[-1].write_text(report.svg(part, names, transport))
    if report.REFERENCE not in names:
        print("No ratios: set CLOUDFLARED=/path/to/cloudflared to have the original run beside.")
    elif not options.without_ours:
        print(report.summary(found))
    if options.json:
        settings = {"rounds": rounds, "seconds": seconds, "quick": options.quick, "transport": options.transport}
        document = {"machine": report.machine(), "settings": settings, "connectors": names, "rows": found}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{time.monotonic() - began:.0f} s; plots: {', '.join(map(str, pictures))}")
    return 1 if any(item["errors"] for item in found) else 0


if __name__ == "__main__":
    sys.exit(main())
