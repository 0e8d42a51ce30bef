"""A Mosquitto for the MQTT rows, with a WebSocket listener and nothing else.

Owns: finding the binary, its configuration, its process.
In: a directory of our own. Out: a Broker, or BrokerMissingError that says what to install.
Never: keeps messages, limits anybody: it is a part of the load.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

from benchmarks.process import start, stop

SEARCH = os.pathsep.join(("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin"))

READY_LIMIT = 10.0
TRIES = 3
"""Mosquitto cannot pick a port itself: somebody may take the free one that was found."""


class BrokerMissingError(Exception):
    """There is no broker; the text says why."""


class Broker:
    """A running Mosquitto; `port` speaks MQTT over WebSocket on 127.0.0.1."""

    def __init__(self, directory: Path, core: int | None) -> None:
        binary = shutil.which("mosquitto") or shutil.which("mosquitto", path=SEARCH)
        if binary is None:
            raise BrokerMissingError("Mosquitto is not installed (Debian, Ubuntu: apt install mosquitto)")
        self._log_path = directory / "mosquitto.log"
        for _ in range(TRIES):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port: int = probe.getsockname()[1]
            lines = [
                f"listener 0 {directory / 'broker.sock'}",  # 2.0 wants one that is no WebSocket's
                f"listener {self.port} 127.0.0.1",
                "socket_domain ipv4",  # or 2.0 listens on every interface
                "protocol websockets",
                "websockets_headers_size 16384",
                "allow_anonymous true",
                "persistence false",
                "max_inflight_messages 0",
                "max_queued_messages 0",
                "set_tcp_nodelay true",
                "log_dest stderr",
                "log_type error",
                "log_type warning",
            ]
            if os.geteuid() == 0:
                lines.append("user root")  # the directory is ours alone
            config = directory / "mosquitto.conf"
            config.write_text("\n".join(lines) + "\n")
            with self._log_path.open("wb") as log:
                self.process = start([binary, "-c", str(config)], core=core, stderr=log)
            if self._listening():
                return
            self.close()
        raise BrokerMissingError(
            f"Mosquitto does not start: {self._log_path.read_text(errors='replace')[-300:].strip()}"
        )

    def close(self) -> None:
        """End it."""
        stop(self.process)

    def _listening(self) -> bool:
        deadline = time.monotonic() + READY_LIMIT
        while self.process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return True
            time.sleep(0.02)
        return False
