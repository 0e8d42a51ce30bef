"""Children seen through `Child`: their lines, their end, what they must not inherit."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from launcher import processes
from launcher.processes import Child, child_environment
from tests.launcher.support import linux, wait_gone
from tests.support.aio import run, until

STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"


async def finished(code: str, *, secret: bool = False) -> tuple[Child, list[tuple[str, str]]]:
    lines: list[tuple[str, str]] = []
    child = await Child.start(
        "test", [sys.executable, "-c", code], on_line=lambda stream, line: lines.append((stream, line)), secret=secret
    )
    await child.exited
    await child.stop()
    return child, lines


def test_lines_of_both_streams_and_the_status() -> None:
    child, lines = run(finished("import sys; print('a\\n\\nb'); print('c', file=sys.stderr); sys.exit(3)"))
    assert [line for stream, line in lines if stream == "stdout"] == ["a", "b"]
    assert ("stderr", "c") in lines
    assert child.status == 3
    assert child.describe_end() == "exit status 3"
    assert sorted(child.tail) == ["a", "b", "c"]


def test_the_tail_is_bounded_and_the_last_line_needs_no_newline() -> None:
    child, lines = run(finished("print('\\n'.join(map(str, range(100)))); print('end', end='')"))
    assert len(lines) == 101
    assert len(child.tail) == processes.TAIL_LINES
    assert child.tail[-1] == "end"


def test_a_line_without_end_is_cut_not_collected() -> None:
    child, lines = run(finished("import sys; sys.stdout.write('x' * 3_000_000)"))
    assert child.status == 0
    assert all(len(line) <= processes.LINE_LIMIT for _, line in lines)


def test_bytes_that_are_no_text_do_no_harm() -> None:
    _, lines = run(finished("import os; os.write(1, bytes(range(128, 160)) + b'\\n')"))
    assert len(lines) == 1


def test_a_secret_is_handed_over_but_not_kept() -> None:
    child, lines = run(finished("import sys; print('token'); print('why', file=sys.stderr)", secret=True))
    assert ("stdout", "token") in lines
    assert list(child.tail) == ["why"]


def test_a_signal_is_named() -> None:
    child, _ = run(finished("import os; os.kill(os.getpid(), 9)"))
    assert child.describe_end() == "killed by SIGKILL"


def test_a_missing_program_is_an_end_with_a_reason(tmp_path: Path) -> None:
    async def main() -> None:
        child = await Child.start("test", [str(tmp_path / "missing")])
        assert await child.exited == 127
        assert "cannot start" in child.tail[0]

    run(main())


@linux
def test_stop_waits_for_the_end_and_can_be_called_again() -> None:
    async def main() -> None:
        child = await Child.start("test", [sys.executable, "-c", "import time; time.sleep(60)"])
        await until(lambda: child.pid, what="pid")
        assert child.pid is not None
        assert await child.stop() == -15
        wait_gone(child.pid)
        assert await child.stop() == -15
        child.kill()

    run(main())


@linux
def test_kill_does_not_wait_for_the_grace_time() -> None:
    async def main() -> None:
        up = asyncio.Event()
        child = await Child.start("test", [sys.executable, "-c", STUBBORN], on_line=lambda *_: up.set(), grace=60)
        await up.wait()
        child.ask_to_stop()
        child.kill()
        await child.exited
        assert child.status == -9

    run(main(), limit=60)


def test_the_connectors_variables_stay_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNNEL_TOKEN", "x")
    monkeypatch.setenv("KEPT", "y")
    environment = child_environment()
    assert "TUNNEL_TOKEN" not in environment
    assert environment["KEPT"] == "y"
