"""Log files: what a line looks like, who may read it, rotation."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from connector.app import log_files
from connector.app.log_files import KEPT_FILES, LOG_NAME, ROTATE_BYTES, LogFile, rotated
from connector.app.log_formats import quote, stream_event
from connector.app.logs import stderr_logger


def test_the_file_has_level_first_and_message_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "x.log"
    log = stderr_logger(logfile=str(path), level="warn")
    log.bind(connIndex=1).error("broke", error="why", ip="::1")
    log.info("not this")
    log.output.close()
    (line,) = path.read_text().splitlines()
    assert line.startswith('{"level":"error","connIndex":1,"error":"why","ip":"::1","time":"')
    assert line.endswith('"message":"broke"}')
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 & ~_umask()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o744 & ~_umask()
    assert "ERR broke error=why connIndex=1" in capsys.readouterr().err
    again = stderr_logger(logfile=str(path))
    again.info("more")
    again.output.close()
    assert len(path.read_text().splitlines()) == 2


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_rotation_keeps_five_old_files_and_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "ROTATE_BYTES", 1000)
    file = LogFile(tmp_path / LOG_NAME, rotate=True)
    for number in range(200):
        file.write(f"{number:04} " + "x" * 90)
    file.close()
    old = rotated(file.path)
    assert len(old) == KEPT_FILES
    assert all(path.stat().st_size <= 1000 for path in [*old, file.path])
    kept = [line[:4] for path in [*old, file.path] for line in path.read_text().splitlines()]
    assert kept == [f"{number:04}" for number in range(200 - len(kept), 200)]
    assert old[0].name.startswith("cloudflared-2")
    assert ":" not in old[0].name
    assert ROTATE_BYTES == 1024 * 1024


def test_a_file_that_cannot_be_opened_costs_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    log = stderr_logger(logfile=str(tmp_path / "file" / "below"))
    log.info("goes on")
    text = capsys.readouterr().err
    assert "Cannot write a log file to" in text
    assert "INF goes on" in text


def test_a_full_disk_is_said_once_and_the_console_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    log = stderr_logger(logfile="/dev/full")
    for _ in range(3):
        log.info("line")
    log.output.close()
    text = capsys.readouterr().err
    assert text.count("Cannot write to /dev/full") == 1
    assert text.count("INF line") == 3


def test_both_places_given_the_file_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = stderr_logger(logfile=str(tmp_path / "a.log"), log_directory=str(tmp_path / "b"))
    log.output.close()
    assert "logfile takes precedence" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert (tmp_path / "a.log").exists()


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("a b", '"a b"'), ('a"b', '"a\\"b"'), ("a\\b", '"a\\\\b"'), ("\x07\x00\x7f", '"\\a\\x00\\x7f"'),
        ("é日", '"é日"'), ("\u200b\U000e0001", '"\\u200b\\U000e0001"'), ("\udcff", '"\\xff"'),
    ],
)  # fmt: skip
def test_quotes_are_gos(text: str, quoted: str) -> None:
    assert quote(text) == quoted


@pytest.mark.parametrize(
    ("level", "message", "fields", "event"),
    [
        ("debug", "m", {"event": 0}, {"message": "m"}),
        ("info", "m", {"event": 1, "connIndex": 0},
         {"level": "info", "message": "m", "event": "http", "fields": {"connIndex": 0}}),
        ("warn", "", {"error": "e", "event": 3}, {"level": "error", "event": "udp", "fields": {"error": "e"}}),
        ("fatal", "m", {}, {"message": "m"}),
        ("info", "m", {"event": 9}, {"level": "info", "message": "m"}),
    ],
)  # fmt: skip
def test_stream_events_leave_out_what_is_zero(level: str, message: str, fields: dict[str, Any], event: Any) -> None:
    assert json.loads(stream_event("T", level, message, fields)) == {"time": "T", **event}
