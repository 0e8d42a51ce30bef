"""Structured log lines: where they go, which pass, and that none shows a secret.

Owns: level filtering, folding of repeats, redaction. In: message plus fields. Out: lines on stderr and in a file, and
events for the management stream.
Never: lets a line out that the redactor has not seen; blocks for anything but the write; raises into the caller.

Strategy: `Logger` is a thin view (bound fields) over one `LogOutput`; the output renders a line, redacts the rendered
text and writes it. Nothing else in the package writes to stderr once the process runs. The standard `logging` module
(asyncio, aiohttp) is routed in by `capture_stdlib`.
"""

from __future__ import annotations

import base64
import re
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from connector.app.log_formats import console_line, file_line, json_line, stream_event, stream_level, stream_type
from connector.protocol.ports import Tap

if TYPE_CHECKING:
    from connector.app.log_files import LogFile

LEVELS = {"trace": 0, "debug": 10, "info": 20, "warn": 30, "error": 40, "fatal": 50}
"""Names as cloudflared spells them in JSON; order of severity."""

Listener = Callable[[str, str, str], None]
"""Takes an event of the management stream: its level and type there, and its JSON."""

FOLD_SECONDS = 10.0
"""A line with the same message and error within this time is counted, not printed. Long enough for a burst of failing
requests to be one line, short enough that a back-off step is seen."""

FOLD_ENTRIES = 256
"""Ceiling of remembered lines; the oldest is flushed and forgotten beyond."""

MASK = "*****"

_TOKEN_SHAPE = re.compile(r"eyJ[A-Za-z0-9+/_-]{12,}={0,2}(?:\.[A-Za-z0-9_-]+){0,2}")
"""Base64 of a JSON object: a tunnel token, or a JWT. Masked also where nobody registered it."""


class Redactor:
    """Masks registered secrets, and whatever has a token's shape. One per process; every line passes through."""

    __slots__ = ("_secrets",)

    def __init__(self) -> None:
        self._secrets: list[str] = []

    def add(self, text: str) -> None:
        """Register `text` as it is, and without trailing padding. Texts under 8 characters are not replaced."""
        for form in {text, text.rstrip("=")}:
            if len(form) >= 8 and form not in self._secrets:
                self._secrets.append(form)
        self._secrets.sort(key=len, reverse=True)

    def add_bytes(self, secret: bytes) -> None:
        """Register a binary secret in the forms in which it could be printed: base64 (both alphabets) and hex."""
        self.add(base64.b64encode(secret).decode())
        self.add(base64.urlsafe_b64encode(secret).decode())
        self.add(secret.hex())

    def redact(self, text: str) -> str:
        """Give `text` with every registered secret masked."""
        for secret in self._secrets:
            if secret in text:
                text = text.replace(secret, MASK)
        return _TOKEN_SHAPE.sub(MASK, text) if "eyJ" in text else text

    def __repr__(self) -> str:
        return f"<Redactor of {len(self._secrets)} texts>"


class LogOutput:
    """Where lines go, how they look and which pass. `close` prints the counts of what is still folded.

    `file` takes the same lines as JSON. `listen` lets the management stream have every event, whatever its level.
    """

    __slots__ = ("_colour", "_folded", "_json", "_listener", "_stream", "_threshold", "clock", "file", "on_listen",
                 "redactor", "tap", "wall_clock")  # fmt: skip

    def __init__(
        self,
        *,
        level: str = "info",
        json_lines: bool = False,
        colour: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._threshold = LEVELS[level]
        self._json = json_lines
        self._colour = colour and not json_lines
        self._stream = stream
        self._listener: Listener | None = None
        self.file: LogFile | None = None
        self.on_listen: Callable[[], None] = lambda: None
        """Called when `enabled("debug")` may have changed."""
        self.clock = clock
        self.wall_clock = wall_clock
        self.redactor = Redactor()
        self.tap: Tap | None = None
        """Hears of every line, whatever its level."""
        self._folded: OrderedDict[tuple[str, str, str], tuple[float, int]] = OrderedDict()

    def enabled(self, level: str) -> bool:
        """Tell whether a line of `level` would be printed; lets callers skip expensive fields."""
        return LEVELS[level] >= self._threshold or self._listener is not None

    def listen(self, listener: Listener | None) -> None:
        """Give every event to `listener` from now on, or to nobody."""
        self._listener = listener
        self.on_listen()

    def emit(self, level: str, message: str, fields: dict[str, Any]) -> None:
        """Print one line, or count it as a repeat when it carries an error that was printed a moment ago."""
        listener = self._listener
        if listener is not None:
            text = self.redactor.redact(stream_event(self._stamp(), level, message, fields))
            listener(stream_level(level, fields), stream_type(fields), text)
        if self.tap is not None:
            shown = {key: self.redactor.redact(str(value)) for key, value in fields.items()}
            self.tap.on_event("log", {"level": level, "message": self.redactor.redact(message), **shown})
        if LEVELS[level] < self._threshold:
            return
        now = self.clock()
        self._flush(now - FOLD_SECONDS)
        error = fields.get("error")
        if error is not None:
            key = (level, message, str(error))
            seen = self._folded.get(key)
            if seen is not None:
                self._folded[key] = (seen[0], seen[1] + 1)
                return
            if len(self._folded) >= FOLD_ENTRIES:
                self._report(*self._folded.popitem(last=False))
            self._folded[key] = (now, 0)
        self._write(level, message, fields)

    def close(self) -> None:
        """Print what is still folded, close the file. The output stays usable."""
        self._flush(float("inf"))
        if self.file is not None:
            self.file.close()

    def _flush(self, before: float) -> None:
        while self._folded:
            key, (since, count) = next(iter(self._folded.items()))
            if since > before:
                return
            del self._folded[key]
            self._report(key, (since, count))

    def _report(self, key: tuple[str, str, str], seen: tuple[float, int]) -> None:
        if seen[1]:
            level, message, error = key
            self._write(level, message, {"error": error, "repeated": seen[1]})

    def _write(self, level: str, message: str, fields: dict[str, Any]) -> None:
        stamp = self._stamp()
        if self._json:
            line = json_line(stamp, level, message, fields)
        else:
            line = console_line(stamp, level, message, fields, colour=self._colour)
        self._print(line)
        file = self.file
        if file is not None:
            failed = file.failure
            file.write(self.redactor.redact(file_line(stamp, level, message, fields)))
            if file.failure and not failed:
                self._print(console_line(stamp, "error", f"Cannot write to {file.path}", {"error": file.failure}))

    def _print(self, line: str) -> None:
        stream = self._stream if self._stream is not None else sys.stderr
        try:
            stream.write(self.redactor.redact(line) + "\n")
            stream.flush()
        except (OSError, ValueError, UnicodeError):
            pass  # A reader that went away must not stop the tunnel; there is nowhere else to say it.

    def _stamp(self) -> str:
        return datetime.fromtimestamp(self.wall_clock(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Logger:
    """Log lines with bound fields. `bind(connIndex=0)` gives a child; both share the output."""

    __slots__ = ("_fields", "output")

    def __init__(self, output: LogOutput, **fields: Any) -> None:
        self.output = output
        self._fields = fields

    def bind(self, **fields: Any) -> Logger:
        """Give a logger that adds `fields` to every line."""
        return Logger(self.output, **{**self._fields, **fields})

    def log(self, level: str, message: str, **fields: Any) -> None:
        """Print one line at `level` (a name of LEVELS)."""
        self.output.emit(level, message, {**self._fields, **fields} if self._fields else fields)

    def debug(self, message: str, **fields: Any) -> None:
        """Print one line for somebody who looks for a fault in this program."""
        self.log("debug", message, **fields)

    def info(self, message: str, **fields: Any) -> None:
        """Print one line about the ordinary course of things."""
        self.log("info", message, **fields)

    def warn(self, message: str, **fields: Any) -> None:
        """Print one line about something that works, but not as asked."""
        self.log("warn", message, **fields)

    def error(self, message: str, **fields: Any) -> None:
        """Print one line about something that failed."""
        self.log("error", message, **fields)

    def fatal(self, message: str, **fields: Any) -> None:
        """Print the line that explains why the process ends. Does not end it."""
        self.log("fatal", message, **fields)

    def bug(self, message: str, error: BaseException) -> None:
        """Print an unexpected exception: one line, the traceback in a field."""
        trace = "".join(traceback.format_exception(error))
        self.error(message, error=f"{type(error).__name__}: {error}", traceback=trace)


def stderr_logger(
    *,
    level: str = "info",
    json_lines: bool = False,
    no_color: bool = False,
    logfile: str = "",
    log_directory: str = "",
) -> Logger:
    """Make the process's logger: stderr, colours on a terminal unless `no_color`; and a file if one is named.

    A file that cannot be opened is an error line, and the console goes on alone, as in cloudflared.
    """
    colour = not no_color and bool(sys.stderr and sys.stderr.isatty())
    log = Logger(LogOutput(level=level, json_lines=json_lines, colour=colour))
    if logfile or log_directory:
        from pathlib import Path  # noqa: PLC0415  (with log_files: few runs write a file)

        from connector.app.log_files import LOG_NAME, LogFile  # noqa: PLC0415

        path = Path(logfile) if logfile else Path(log_directory) / LOG_NAME
        try:
            log.output.file = LogFile(path.expanduser(), rotate=not logfile)
        except (OSError, RuntimeError) as error:
            log.error(f"Cannot write a log file to {path}: lines go to stderr only", error=str(error))
    if logfile and log_directory:
        log.error(
            f"Your config includes values for both logfile ({logfile}) and log-directory ({log_directory}), "
            "but they are incompatible. logfile takes precedence."
        )
    return log


def capture_stdlib(log: Logger) -> None:
    """Route the standard `logging` module (asyncio, aiohttp) into `log`: warnings and worse."""
    import logging  # noqa: PLC0415  (asyncio has it loaded by now; the command line alone does not need it)

    class Forward(logging.Handler):
        """Turns a LogRecord into one line."""

        def emit(self, record: logging.LogRecord) -> None:
            level = "error" if record.levelno >= logging.ERROR else "warn"
            fields: dict[str, Any] = {"logger": record.name}
            error: object = record.exc_info[1] if record.exc_info else None
            if isinstance(error, BaseException):
                fields["error"] = f"{type(error).__name__}: {error}"
                fields["traceback"] = "".join(traceback.format_exception(error))
            elif error is not None:  # uvloop's TLS reports some ends by the class alone
                fields["error"] = getattr(error, "__name__", repr(error))
            log.log(level, record.getMessage(), **fields)

    root = logging.getLogger()
    root.handlers[:] = [Forward()]
    root.setLevel(logging.WARNING)
