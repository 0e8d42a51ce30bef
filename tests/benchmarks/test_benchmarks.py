"""The benchmark runs, checks what it is told, and its system calls stay within their budgets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.process import family, start, stop
from benchmarks.rows import all_rows
from benchmarks.runner import Bench, Contender, RowResult, other, ours

ROOT = Path(__file__).resolve().parents[2]
STRACE = shutil.which("strace")
# A container may forbid to trace.
TRACES = (
    STRACE is not None
    and subprocess.run([STRACE, "-qq", "-o", "/dev/null", "true"], check=False, capture_output=True).returncode == 0
)


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def test_a_short_run_of_every_kind_of_work(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    rows = "echo128 50x16,get c32,post,headers,down x8,up x1,churn,idle,start"
    done = bench("--quick", "--rounds", "1", "--seconds", "0.1", "--rows", rows, "--json", str(file),
                 "--results", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())["rows"]
    assert len(found) == 9
    for row in found:
        assert not row["errors"]
        assert set(row) >= {"name", "unit", "cpu_ratio", "connectors"}
        figures = row["connectors"]["ours"]
        assert figures["cpu_per_unit"]["median"] >= 0
        assert figures["peak_memory"] > 1 << 20
    # A round of a tenth of a second may see no unit end on a machine that is busy with other things.
    assert any(row["connectors"]["ours"]["units_per_second"] > 0 for row in found)
    assert (tmp_path / "bench-http2.svg").read_text().startswith("<svg")
    assert max(len(line) for line in done.stdout.splitlines()[:-1]) <= 110


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--rows", "nothing"), "no row has that"),
        (("--connector", "x"), "not NAME=COMMAND"),
        (("--connector", "ours=a {edge} {ca} {token_file}"), "names of their own"),
        (("--without-ours",), "there must be one"),
    ],
)
def test_what_cannot_be_run_is_refused(args: tuple[str, ...], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLOUDFLARED", raising=False)
    done = bench(*args)
    assert done.returncode == 2
    assert text in done.stderr


def test_a_connector_that_never_comes_is_an_error_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.runner.READY_LIMIT", 1.0)
    row = all_rows(quick=True, full=False)[0]
    with Bench([other("none=true {edge} {token_file}")], transport="http2", rounds=1, seconds=0.1) as it:
        item = report.row_object(it.run_row(row), ["none"])
    assert "no ready of none" in item["errors"]["none"]
    assert any("failed" in line for line in report.table_lines(item, wide=False))


def test_what_a_wrapper_started_ends_with_it() -> None:
    command = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    process = start([sys.executable, "-c", command], core=None)
    for _ in range(1000):
        if len(family(process.pid)) == 2:
            break
        threading.Event().wait(0.01)
    _, inner = family(process.pid)
    stop(process)
    assert not Path(f"/proc/{inner}").exists() or "Z" in Path(f"/proc/{inner}/stat").read_text().split()[2]


def test_ratios_and_medians() -> None:
    row = all_rows(quick=True, full=False)[0]
    result = RowResult(row, "http2")
    plain: dict[str, Any] = {
        **{"units": 1000, "seconds": 1.0, "system": 0.0, "p50": 0.001, "p99": 0.002, "peak": 1 << 25},
        **{"edge_cpu": 0.5, "origin_cpu": 0.1},
    }
    for cpu in (0.02, 0.03, 0.07):
        result.add("ours", {**plain, "cpu": cpu})
        result.add("cloudflared", {**plain, "cpu": cpu * 2})
    result.add("third", {"error": "it went away"})
    item = report.row_object(result, ["ours", "cloudflared", "third"])
    assert item["cpu_ratio"] == pytest.approx(0.5)
    assert item["connectors"]["ours"]["cpu_per_unit"] == pytest.approx({"min": 20.0, "median": 30.0, "max": 70.0})
    lines = report.table_lines(item, wide=False)
    assert re.search(r"20\.0/30\.0/70\.0 +0\.50 +1000 ", lines[0])
    assert max(map(len, lines)) <= 90
    assert "it went away" in lines[2]
    assert report.svg([item], ["ours", "cloudflared", "third"]).count("<rect") == 6


@pytest.mark.skipif(not TRACES, reason="NO STRACE that may trace: system calls per message and request are not counted")
@pytest.mark.parametrize(("name", "budget"), [("echo128 1x1", 6.6), ("get c1", 6.6)])
def test_system_calls_per_unit(name: str, budget: float, tmp_path: Path) -> None:
    """One unit at a time: nothing depends on what happens to arrive together. The least is six."""
    assert STRACE is not None
    log = tmp_path / "strace.log"
    [row] = [row for row in all_rows(quick=True, full=False) if row.name == name]
    traced = Contender("ours", [STRACE, "-f", "-qq", "-I2", "-o", str(log), *ours().command])
    with Bench([traced], transport="http2", rounds=1, seconds=0.5) as it, it.connectors(RowResult(row, "http2")) as up:
        before = log.read_bytes().count(b"\n")
        figures = it.measure("ours", up[0][1].pid, row)
        calls = log.read_bytes().count(b"\n") - before
    assert "error" not in figures, figures
    found = calls / figures["all_units"]
    print(f"{found:.2f} system calls per unit over {figures['all_units']} units")
    assert found <= budget, f"{found:.2f} system calls per unit; the budget is {budget}"
