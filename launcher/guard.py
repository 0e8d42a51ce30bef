"""A wrapper process that lets no child outlive the launcher.

Owns: one child process and its process group.
In: command line `guard.py [--grace S] [--cwd DIR] [--uid N --gid N] -- COMMAND...`; standard input is one end of
    a socket pair whose other end only the launcher holds. End of file there (the launcher closed it, or died of
    anything at all) ends the child: SIGTERM to its group, SIGKILL after `--grace` seconds. A byte `t` there asks for
    the same, a byte `k` for SIGKILL at once.
Out: lines `pid N`, then `exit N` (negative: that signal) on the same socket; the child's own output is untouched.
Never: imports anything outside the standard library, so that it starts in 20 ms and by path (`python -I -S`).

Strategy. The launcher cannot promise to clean up, because SIGKILL exists; the kernel closes its end of the socket
whatever happens. The guard lives in a session of its own, where neither Ctrl-C nor a closed terminal reaches it. When
the guard itself is killed, Linux kills the child (PR_SET_PDEATHSIG). The kernel forgets that wish when a program
changes its user, which Mosquitto does when root starts it: that is why `--uid` drops root here, before the child runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
KILL = b"k"
COMMAND_NOT_STARTED = 127


def _death_wish() -> Callable[[], None] | None:
    """What the child calls between fork and exec: ask Linux for SIGKILL when the guard dies. None elsewhere."""
    if sys.platform != "linux":
        return None
    import ctypes  # noqa: PLC0415 - loaded here, as root, because the child may not be able to read it

    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def wish() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(COMMAND_NOT_STARTED)

    return wish


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # the launcher is gone: nobody to tell
        os.write(0, line.encode() + b"\n")


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def guard(command: list[str], *, grace: float, cwd: str | None, uid: int | None, gid: int | None) -> int:
    """Run `command` until it ends or the launcher does; return its exit status as a shell would."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(wake)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _frame: asked.append(got))
    signal.signal(signal.SIGCHLD, lambda *_: None)

    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            start_new_session=True,
            user=uid,
            group=gid,
            extra_groups=None if uid is None else [],
            preexec_fn=_death_wish(),  # noqa: PLW1509 - the guard has one thread
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"cannot start {command[0]}: {error}", file=sys.stderr, flush=True)
        _tell(f"exit {COMMAND_NOT_STARTED}")
        return COMMAND_NOT_STARTED
    _tell(f"pid {child.pid}")

    watch = [0, woken]
    kill_at: float | None = None
    while child.poll() is None:
        timeout = None if kill_at is None else max(0.0, kill_at - time.monotonic())
        readable, _, _ = select.select(watch, [], [], timeout)
        stop, kill = bool(asked), kill_at is not None and time.monotonic() >= kill_at
        if woken in readable:
            os.read(woken, 4096)
        if 0 in readable:
            try:
                said = os.read(0, 1)
            except OSError:
                said = b""
            if not said:
                watch.remove(0)
            stop, kill = True, kill or said == KILL
        if kill:
            _signal_group(child.pid, signal.SIGKILL)
            kill_at = time.monotonic() + 60.0
        elif stop and kill_at is None:
            _signal_group(child.pid, signal.SIGTERM)
            kill_at = time.monotonic() + grace
    _signal_group(child.pid, signal.SIGKILL)  # what the child left behind in its group
    status = child.returncode
    _tell(f"exit {status}")
    return status if status >= 0 else 128 - status


def main() -> int:
    """Entry point of `python -m launcher.guard` and of `guard.py` by path."""
    parser = argparse.ArgumentParser(description="Run a command that must not outlive the launcher.")
    parser.add_argument("--grace", type=float, default=5.0, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("--cwd", help="directory to run the command in")
    parser.add_argument("--uid", type=int, help="user to run the command as (needs root)")
    parser.add_argument("--gid", type=int, help="group to run the command as (needs root)")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    return guard(options.command, grace=options.grace, cwd=options.cwd, uid=options.uid, gid=options.gid)


if __name__ == "__main__":
    raise SystemExit(main())
