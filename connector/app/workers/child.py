"""Where a worker's process begins, and how it ends with the leading one.

Owns: signals, the watch for the leading process's end, the loop, the first message. In: descriptors, by arguments.
Out: an exit status. Never: outlives the leading process; imports what a worker needs before that is certain.

Signals are the leading process's business: here they are ignored, so that a Ctrl-C or a service manager that signals
the whole group does not cut what should drain.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from typing import Any

from connector import __version__


def main() -> int:
    """Run a worker: `child.py VERSION INDEX SOCKET LIFE MEMORY`, of these three descriptors that were left open."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.setpgid(0, 0)  # no session of its own: on Linux that would be a scheduling group as well
    index, descriptor, life, memory = map(int, sys.argv[2:6])
    _die_with_leader(life)
    if sys.argv[1] != __version__:
        print(
            f"version {__version__} was installed while version {sys.argv[1]} runs: restart the connector", flush=True
        )
        return 1
    try:
        from setproctitle import setproctitle  # noqa: PLC0415  (optional)

        setproctitle(f"connector worker {index}")
    except ImportError:
        pass
    from connector.app.first_objects import loading  # noqa: PLC0415  (after the watch for the leader's end has begun)

    with loading():
        from connector.app.process import loop_factory  # noqa: PLC0415
        from connector.app.workers import worker  # noqa: F401, PLC0415

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_main(socket.socket(fileno=descriptor), memory))


def _die_with_leader(life: int) -> None:
    """See to it that this process ends with the leading one, however that ends and whatever happens here.

    The other end of `life` is open in the leading process only, so its end is read here as the end of a file. On Linux
    the kernel is asked as well: it reaches a process that cannot run, because it is stopped or inside a library.
    """

    def watch() -> None:
        try:
            while os.read(life, 1):
                pass
        except OSError:
            pass
        os._exit(1)

    threading.Thread(target=watch, name="end of the leading process", daemon=True).start()
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415  (loaded for malloc's settings anyway)

        PR_SET_PDEATHSIG = 1
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        except (OSError, AttributeError):
            pass  # the thread is there


async def _main(sock: socket.socket, memory: int) -> int:
    from connector.app.workers import messages as say  # noqa: PLC0415
    from connector.app.workers.pipe import Pipe  # noqa: PLC0415
    from connector.app.workers.worker import Worker  # noqa: PLC0415

    loop = asyncio.get_running_loop()
    first: asyncio.Future[say.Settings] = loop.create_future()
    early: list[Any] = []

    def on_first(message: Any) -> None:
        if isinstance(message, say.Settings):
            first.set_result(message)
        elif isinstance(message, say.Quit) and not first.done():
            os._exit(0)  # stopped while it was starting
        else:
            early.append(message)

    pipe = await Pipe.open(sock, say.to_worker, on_first, lambda why: os._exit(1))
    worker = Worker(pipe, memory)
    return await worker.run(await first, early)


if __name__ == "__main__":
    raise SystemExit(main())
