"""`--stdin-control`: commands from standard input.

Owns: the thread that reads, and the words of the commands. In: lines. Out: a call per `reconnect`, log lines.
Never: holds the process up at its end (the thread is a daemon); reads further than MAX_LINE for one command.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable

from connector.app.durations import format_duration, parse_duration
from connector.app.logs import Logger

MAX_LINE = 4096
"""Bytes of a command; real ones have 20."""

HELP = (
    "Supported command:\nreconnect [delay]\n"
    "- restarts one randomly chosen connection with optional delay before reconnect\n"
)


class StdinControl:
    """One per process. `start` inside the loop; `on_reconnect(delay)` is called in it, delay in seconds."""

    def __init__(self, log: Logger, on_reconnect: Callable[[float], None], *, descriptor: int = 0) -> None:
        self._log = log
        self._on_reconnect = on_reconnect
        self._descriptor = descriptor
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to read."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, name="stdin control", daemon=True).start()

    def _read(self) -> None:
        assert self._loop is not None
        rest = b""
        try:
            # Not sys.stdin: a thread inside its buffer at the end of the process is a fatal error of the interpreter.
            while data := os.read(self._descriptor, MAX_LINE):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._loop.call_soon_threadsafe(self.command, line.decode("utf-8", "replace").rstrip("\r"))
                rest = rest[-MAX_LINE:]
        except (OSError, RuntimeError):
            pass  # standard input or the loop is closed: there is nobody left to command or to be commanded

    def command(self, line: str) -> None:
        """Do what one line says."""
        word, _, argument = line.partition(" ")
        match word:
            case "":
                return
            case "reconnect":
                try:
                    delay = parse_duration(argument.strip()) if argument.strip() else 0.0
                except ValueError:
                    self._log.error(f'time: invalid duration "{argument.strip()}"', advice="For example: reconnect 5s")
                    return
                self._log.info("Sending reconnect signal", delay=format_duration(max(0.0, delay)))
                self._on_reconnect(max(0.0, delay))
            case "help":
                self._log.info(HELP)
            case _:
                self._log.info("Unknown command", command=line)
                self._log.info(HELP)
