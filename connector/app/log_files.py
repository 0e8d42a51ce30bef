"""Log files: one that grows, or a directory whose file is rotated.

Owns: the open file. In: whole lines. Out: bytes on disk. Never: formats; raises OSError once it is open.

Names, sizes and modes are cloudflared's: pipelines and `tunnel diag` look for them.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

FILE_MODE = 0o644
DIRECTORY_MODE = 0o744
ROTATE_BYTES = 1024 * 1024
KEPT_FILES = 5
LOG_NAME = "cloudflared.log"


def open_log(path: Path) -> BinaryIO:
    """Open `path` for appending; its directory is made when it is missing. Errors: OSError."""
    path.parent.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
    return os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, FILE_MODE), "ab", buffering=0)


class LogFile:
    """One file that is appended to (`--logfile`), or rotated in its directory (`rotate`, `--log-directory`).

    `failure` holds the text of the last write that failed, until one succeeds.
    """

    def __init__(self, path: Path, *, rotate: bool = False) -> None:
        self.path = path
        self.failure = ""
        self._rotate = rotate
        self._last_turn = datetime.min.replace(tzinfo=UTC)
        self._file: BinaryIO | None = open_log(path)
        self._size = os.fstat(self._file.fileno()).st_size

    def write(self, line: str) -> None:
        """Append one line."""
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        try:
            if self._rotate and self._size and self._size + len(data) > ROTATE_BYTES:
                self._turn()
            if self._file is None:
                self._file = open_log(self.path)
                self._size = os.fstat(self._file.fileno()).st_size
            self._file.write(data)
        except OSError as error:
            self.failure = str(error)
            return
        self.failure = ""
        self._size += len(data)

    def close(self) -> None:
        """Close; a later write opens the file again."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _turn(self) -> None:
        """Give the file a name with its time, and begin a new one; the oldest beyond KEPT_FILES go."""
        self.close()
        now = max(datetime.now(UTC), self._last_turn + timedelta(milliseconds=1))
        while (old := self._old_name(now)).exists():
            now += timedelta(milliseconds=1)  # names are sorted by time, so a taken one means a later one
        self._last_turn = now
        os.rename(self.path, old)
        for path in rotated(self.path)[:-KEPT_FILES]:
            path.unlink(missing_ok=True)

    def _old_name(self, when: datetime) -> Path:
        stamp = when.strftime("%Y-%m-%dT%H-%M-%S.%f")[:-3]
        return self.path.with_name(f"{self.path.stem}-{stamp}{self.path.suffix}")


def rotated(path: Path) -> list[Path]:
    """Give the old files beside `path`, oldest first."""
    return sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))
