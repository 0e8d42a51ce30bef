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
from benchmarks.connectors import Contender, other, ours
from benchmarks.process import family, start, stop
from benchmarks.rows import all_rows
from benchmarks.runner import Bench, RowResult

ROOT = Path(__file__).resolve().parents[2]
MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
STRACE = shutil.which("strace")
# A container may forbid to trace.
TRACES = (
    STRACE is not None
    and subprocess.run([STRACE, "-qq", "-o", "/dev/null", "true"], check=False, capture_output=True).returncode == 0
)


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


ROWS = {
    "http2": "echo128 50x16,get c32,post,headers,up x1,churn,idle,tcp128 1x1",
    "quic": "echo128 50x16,get c32,down x8,up x8,churn,tcprule128 1x1,udp200 v? x50",
}


@pytest.mark.parametrize("transport", ["http2", "quic"])
def test_a_short_run_of_every_kind_of_work(transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLOUDFLARED", raising=False)
    file = tmp_path / "figures.json"
    done = bench("--quick", "--rounds", "1", "--seconds", "0.05", "--rows", ROWS[transport], "--transport", transport,
                 "--json", str(file), "--results", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())["rows"]
    assert len(found) == 8
    for row in found:
        assert not row["errors"]
        assert set(row) >= {"name", "unit", "cpu_ratio", "connectors"}
        assert row["name"].startswith(transport)
        figures = row["connectors"]["ours"]
        assert figures["cpu_per_unit"]["median"] >= 0
        assert figures["peak_memory"] > 1 << 20
    assert any(row["connectors"]["ours"]["units_per_second"] > 0 for row in found)
    assert (tmp_path / f"bench-{transport}.svg").read_text().startswith("<svg")
    assert max(len(line) for line in done.stdout.splitlines()[:-1]) <= 110


@pytest.mark.skipif(not MOSQUITTO, reason="NO MOSQUITTO: the MQTT rows are not run")
def test_the_rows_of_a_real_broker_and_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLOUDFLARED", raising=False)
    done = bench("--quick", "--rounds", "1", "--seconds", "0.05", "--rows", "http2 mqtt?*,http2 start,image",
                 "--results", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"mqtt0 fan50 +ours +[0-9]", done.stdout), done.stdout
    assert re.search(r"mqtt1 pairs10 +ours +[0-9]", done.stdout), done.stdout
    assert "resident after start" in done.stdout
    assert re.search("image +(-|ours)", done.stdout)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--rows", "nothing"), "no row is called that"),
        (("--rounds", "0"), "must be above 0"),
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
    contenders = [other("gone=true {edge} {token_file}"), other("mute=sleep 60 {edge} {token_file}")]
    contenders[1] = contenders[1]._replace(command=["sleep", "60"])
    with Bench(contenders, transport="http2", rounds=1, seconds=0.1) as it:
        item = report.row_object(it.run_row(row), ["gone", "mute"])
    assert item["errors"] == {"gone": "gone ended with status 0", "mute": "no ready of mute within 1 s"}
    assert all("failed" in line for line in report.table_lines(item, wide=False))


def test_programs_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDFLARED", "/nowhere/cloudflared")
    done = bench("--rows", "get")
    assert done.returncode == 2
    assert "CLOUDFLARED=/nowhere/cloudflared is not a program" in done.stderr
    monkeypatch.delenv("CLOUDFLARED")
    done = bench("--without-ours", "--rows", "http2 get c1", "--connector", "none=/nowhere/none {edge} {token_file}")
    assert done.returncode == 3
    assert "none cannot be started: /nowhere/none" in done.stderr


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
    assert report.svg([item], ["ours", "cloudflared", "third"], "http2").count("<rect") == 6


@pytest.mark.skipif(not TRACES, reason="NO STRACE that may trace: system calls per message and request are not counted")
@pytest.mark.parametrize(
    ("transport", "name", "budget"),
    [("http2", "echo128 1x1", 6.6), ("http2", "get c1", 6.6), ("quic", "echo128 1x1", 9.2), ("quic", "get c1", 9.4)],
)
def test_system_calls_per_unit(transport: str, name: str, budget: float, tmp_path: Path) -> None:
    """One unit at a time: nothing depends on what happens to arrive together. The least is six."""
    assert STRACE is not None
    log = tmp_path / "strace.log"
    [row] = [row for row in all_rows(quick=True, full=False) if row.name == name]
    traced = Contender("ours", [STRACE, "-f", "-qq", "-I2", "-o", str(log), *ours().command])
    with (
        Bench([traced], transport=transport, rounds=1, seconds=0.3) as it,
        it.connectors(RowResult(row, transport)) as up,
    ):
        found = float("inf")
        for _ in range(12):  # whatever else the process does, when the machine is busy, only adds to a round
            before = log.read_bytes().count(b"\n")
            figures = it.measure("ours", up[0][1].pid, row)
            assert "error" not in figures, figures
            if figures["all_units"] >= 50:
                found = min(found, (log.read_bytes().count(b"\n") - before) / figures["all_units"])
            if found <= budget:
                break
    print(f"{found:.2f} system calls per unit")
    assert found <= budget, f"{found:.2f} system calls per unit; the budget is {budget}"
