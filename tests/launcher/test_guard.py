"""The guard: whatever happens to the launcher, to the guard or to the child, no process is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.processes import GUARD
from tests.launcher.support import linux, wait_gone

pytestmark = linux

STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
OBEDIENT = "import signal; print('up', flush=True); signal.pause()"


class Guarded:
    """A guard started as the launcher starts it, with the launcher's end of the socket in our hands."""

    def __init__(self, *command: str, grace: float = 30.0, identity: tuple[str, str] | None = None) -> None:
        self.lifeline, theirs = socket.socketpair()
        self.lifeline.settimeout(20)
        user = ["--uid", identity[0], "--gid", identity[1]] if identity else []
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), "--grace", str(grace), *user, "--", *command],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        theirs.close()
        self.reports = self.lifeline.makefile("r")

    def child_pid(self) -> int:
        word, number = self.reports.readline().split()
        assert word == "pid"
        return int(number)

    def up(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"up\n"

    def close(self) -> None:
        self.reports.close()
        self.lifeline.close()
        self.process.communicate(timeout=40)


@pytest.fixture
def opened() -> Iterator[list[Guarded]]:
    guards: list[Guarded] = []
    yield guards
    for guarded in guards:
        guarded.close()


def python(opened: list[Guarded], code: str, grace: float = 30.0) -> Guarded:
    guarded = Guarded(sys.executable, "-c", code, grace=grace)
    opened.append(guarded)
    return guarded


def test_exit_status_is_reported_and_passed_on(opened: list[Guarded]) -> None:
    guarded = python(opened, "raise SystemExit(7)")
    guarded.child_pid()
    assert guarded.reports.readline() == "exit 7\n"
    assert guarded.process.wait(20) == 7


def test_a_signal_is_reported_as_negative(opened: list[Guarded]) -> None:
    guarded = python(opened, "import os; os.kill(os.getpid(), 9)")
    guarded.child_pid()
    assert guarded.reports.readline() == "exit -9\n"
    assert guarded.process.wait(20) == 137


def test_a_command_that_cannot_start_says_so(opened: list[Guarded], tmp_path: Path) -> None:
    guarded = Guarded(str(tmp_path / "missing"))
    opened.append(guarded)
    assert guarded.reports.readline() == "exit 127\n"
    assert guarded.process.stderr is not None
    assert b"cannot start" in guarded.process.stderr.read()


def test_end_of_the_lifeline_ends_the_child_in_order(opened: list[Guarded]) -> None:
    guarded = python(opened, OBEDIENT)
    pid = guarded.child_pid()
    guarded.up()
    guarded.lifeline.shutdown(socket.SHUT_WR)
    assert guarded.reports.readline() == "exit -15\n"
    wait_gone(pid)


def test_asking_ends_the_child_in_order(opened: list[Guarded]) -> None:
    guarded = python(opened, OBEDIENT)
    guarded.child_pid()
    guarded.up()
    guarded.lifeline.sendall(b"t")
    assert guarded.reports.readline() == "exit -15\n"


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace_time(opened: list[Guarded]) -> None:
    guarded = python(opened, STUBBORN, grace=0.2)
    pid = guarded.child_pid()
    guarded.up()
    guarded.lifeline.shutdown(socket.SHUT_WR)
    assert guarded.reports.readline() == "exit -9\n"
    wait_gone(pid)


def test_k_kills_at_once_even_while_waiting(opened: list[Guarded]) -> None:
    guarded = python(opened, STUBBORN)  # grace 30 s, more than any wait here
    guarded.child_pid()
    guarded.up()
    guarded.lifeline.sendall(b"t")
    guarded.lifeline.sendall(b"k")
    assert guarded.reports.readline() == "exit -9\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_to_the_guard_end_the_child(opened: list[Guarded], number: signal.Signals) -> None:
    guarded = python(opened, OBEDIENT)
    pid = guarded.child_pid()
    guarded.up()
    guarded.process.send_signal(number)
    assert guarded.reports.readline() == "exit -15\n"
    wait_gone(pid)


def test_killing_the_guard_kills_the_child(opened: list[Guarded]) -> None:
    guarded = python(opened, STUBBORN)
    pid = guarded.child_pid()
    guarded.up()
    guarded.process.kill()
    wait_gone(pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_killing_the_guard_kills_a_child_of_another_user(opened: list[Guarded]) -> None:
    # PR_SET_PDEATHSIG does not survive a change of user, so the guard must change first.
    guarded = Guarded("sh", "-c", "trap '' TERM; id -u; exec tail -f /dev/null", identity=("65534", "65534"))
    opened.append(guarded)
    pid = guarded.child_pid()
    assert guarded.process.stdout is not None
    assert guarded.process.stdout.readline() == b"65534\n"
    guarded.process.kill()
    wait_gone(pid)


def test_grandchildren_in_the_group_go_too(opened: list[Guarded]) -> None:
    code = (
        "import subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], stdout=subprocess.PIPE); "
        "child.stdout.readline(); print(child.pid, flush=True)"
    )
    guarded = python(opened, code)
    guarded.child_pid()
    assert guarded.process.stdout is not None
    grandchild = int(guarded.process.stdout.readline())
    assert guarded.reports.readline() == "exit 0\n"
    wait_gone(grandchild)


def test_death_of_the_launcher_is_the_end_of_the_lifeline() -> None:
    launcher = f"""
import socket, subprocess, sys
ours, theirs = socket.socketpair()
subprocess.Popen([sys.executable, "-I", "-S", {str(GUARD)!r}, "--grace", "0.2", "--",
                  sys.executable, "-c", {STUBBORN!r}], stdin=theirs, start_new_session=True)
theirs.close()
print(ours.makefile("r").readline().split()[1], flush=True)
import signal
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = {process.stdout.readline().strip(), process.stdout.readline().strip()}  # the child's line may be first
        assert "up" in lines
        pid = int((lines - {"up"}).pop())
        process.kill()
        wait_gone(pid)
