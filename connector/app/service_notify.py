"""What systemd is told: ready, stopping, alive. The protocol is a datagram to the socket that NOTIFY_SOCKET names.

Owns: the socket's name, the watchdog's timer. In: environment; `ready`, `stopping`. Out: datagrams.
Never: stops a run because nobody listens: a failure is one log line.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping

from connector.app.logs import Logger


class ServiceNotify:
    """One per process. Does nothing where NOTIFY_SOCKET is not set.

    The watchdog is fed from the event loop at half the time that systemd allows, so a loop that hangs is noticed. It is
    fed only for the process that WATCHDOG_PID names, as sd_watchdog_enabled(3) demands.
    """

    def __init__(self, log: Logger, environ: Mapping[str, str] = os.environ) -> None:
        self._log = log
        self._address = environ.get("NOTIFY_SOCKET", "")
        self._interval = _watchdog_interval(environ) if self._address else 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._failed = False

    def start(self) -> None:
        """Begin to feed the watchdog, where there is one; inside the loop."""
        if self._interval:
            self._feed()

    def ready(self, status: str) -> None:
        """Tell that the service is up; `status` is one line for `systemctl status`."""
        self._send(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        """Tell that the service is about to end."""
        self._send("STOPPING=1")

    def close(self) -> None:
        """Feed the watchdog no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _feed(self) -> None:
        self._send("WATCHDOG=1")
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._feed)

    def _send(self, text: str) -> None:
        if not self._address or self._failed:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                notify.setblocking(False)  # a full queue must not hold the loop
                notify.connect("\0" + self._address[1:] if self._address.startswith("@") else self._address)
                notify.send(text.encode())
        except BlockingIOError:
            pass  # systemd is busy; the next beat tells it
        except OSError as error:
            self._failed = True
            self._log.warn("Unable to notify systemd", error=str(error))


def _watchdog_interval(environ: Mapping[str, str]) -> float:
    """Give seconds between two signs of life, 0 for none."""
    try:
        microseconds = int(environ.get("WATCHDOG_USEC", "0"))
        pid = int(environ.get("WATCHDOG_PID", "0"))
    except ValueError:
        return 0.0
    if microseconds <= 0 or (pid and pid != os.getpid()):
        return 0.0
    return microseconds / 2e6
