"""Hot reload: the configuration file is read again when it changes, and on SIGHUP.

Owns: noticing a change, reading, the swap of local rules, the lines about it. In: a path. Out: rules in force.
Never: touches a rule set that the edge pushed: that one wins until the process ends, as in cloudflared.

*Strategy*: a timer asks for the file's status once a second (some microseconds) and compares time, inode, size and
device. Not inotify: that says nothing on network file systems and misses files that are mounted one by one into a
container, and files replaced behind a link (ConfigMaps); a status shows all of these, everywhere, at a price that
cannot be measured. A change is taken once it has stood still for one interval, so a file half written is not read.
Everything is checked before anything is put in force; what is wrong is said, and the old rules stay.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Final

from connector.app.flags import Flags
from connector.app.local_config import LocalConfig, file_flags, load, stamp
from connector.app.logs import Logger
from connector.app.orchestrator import Orchestrator
from connector.app.origin_flags import DEFAULT_FLAGS, SETTING_FLAGS, start_rules
from connector.errors import ConfigError

INTERVAL: Final = 1.0
"""Seconds between two looks at the file. Editors save in well under that; people wait gladly for two."""

MAX_LINES: Final = 50
"""Changes that one reload puts in the log; of more only their number."""


class ConfigWatch:
    """One per run that has a file. `start` and `stop` on the loop; `reload` for SIGHUP."""

    def __init__(self, flags: Flags, local: LocalConfig, orchestrator: Orchestrator, log: Logger) -> None:
        self._flags = flags
        self._local = local
        self._orchestrator = orchestrator
        self._log = log
        self._seen = local.stamp
        self._moving = False
        self._missing = False
        self._signals = False
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop, *, signals: bool = True) -> None:
        """Begin to watch."""
        self._loop = loop
        self._timer = loop.call_later(INTERVAL, self._look)
        self._signals = signals and sys.platform != "win32"
        if self._signals:
            loop.add_signal_handler(signal.SIGHUP, self.reload)

    def stop(self) -> None:
        """End watching. SIGHUP is ignored from now on: it must not end a process that drains."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._signals and self._loop is not None:
            self._signals = False
            self._loop.remove_signal_handler(signal.SIGHUP)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _look(self) -> None:
        assert self._loop is not None
        self._timer = self._loop.call_later(INTERVAL, self._look)
        try:
            now = stamp(self._local.path)
        except OSError as error:
            if not self._missing:
                self._log.warn(
                    "The configuration file is gone; the rules stay as they are",
                    path=self._local.path,
                    error=error.strerror or str(error),
                )
            self._missing = True
            return
        self._missing = False
        if now != self._seen:
            self._seen, self._moving = now, True
        elif self._moving:
            self._moving = False
            if now != self._local.stamp:
                self.reload()

    def reload(self) -> None:
        """Read the file and put its rules in force, or say why not."""
        path = self._local.path
        try:
            local = load(path)
            self._moving = False
            self._seen = local.stamp
            # A file that stays wrong is not read again and again.
            self._local = self._local._replace(stamp=local.stamp)
            values = file_flags(local, already=self._given)
            flags = self._flags.with_file(values, path)
            ingress = start_rules(flags, local)
            changes = self._orchestrator.apply_local(ingress)
        except ConfigError as error:
            advice = {"advice": error.advice} if error.advice else {}
            self._log.error(
                "The configuration file was not reloaded; the old rules stay", path=path, error=str(error), **advice
            )
            return
        restart = self._need_restart(local)
        self._local, self._flags = local, flags
        if changes is None:
            self._log.info(
                "The configuration file was read again; the edge's configuration stays in force",
                path=path,
                version=self._orchestrator.version,
            )
        elif not changes:
            self._log.info("The configuration file was read again; its rules are the same", path=path)
        else:
            self._log.info("Reloaded the configuration file", path=path, changes=len(changes))
            for line in changes[:MAX_LINES]:
                self._log.info(f"Configuration: {line}")
            if len(changes) > MAX_LINES:
                self._log.info(f"Configuration: and {len(changes) - MAX_LINES} more changes")
        for text in (*local.file.unused, *ingress.warnings):
            self._log.warn(f"Configuration: {text}", path=path)
        if restart:
            self._log.warn("Some changes take effect after a restart only", keys=",".join(restart), path=path)

    def _given(self, name: str) -> bool:
        source = self._flags.source(name)
        return bool(source) and not source.startswith("the key ")

    def _need_restart(self, local: LocalConfig) -> list[str]:
        """Return the keys that changed and mean nothing to the rules."""
        live = {*SETTING_FLAGS, "url", "unix-socket", "hello-world", "socks5", *DEFAULT_FLAGS}
        names = {*self._local.file.settings, *local.file.settings}
        changed = {
            name
            for name in names
            if name not in live
            and self._local.file.settings.get(name) != local.file.settings.get(name)
            and not self._given(name)
        }
        if local.file.tunnel != self._local.file.tunnel:
            changed.add("tunnel")
        return sorted(changed)
