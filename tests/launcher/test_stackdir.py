"""The stack's directory: settings, private and whole files, one command at a time, who a pid means."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from launcher.identity import Identity, started
from launcher.stackdir import Settings, StackDir, StackError, check_name, default_directory
from tests.launcher.support import linux


def test_settings_are_kept_and_unknown_ones_ignored(tmp_path: Path) -> None:
    directory = StackDir(tmp_path / "s")
    with pytest.raises(StackError, match="there is no stack here"):
        directory.load()
    directory.make()
    settings = Settings(name="x", hostname="h", connector_args=["--a"])
    directory.save(settings)
    assert directory.load() == settings
    text = directory.settings_file.read_text().replace('"name"', '"of_the_future": 1, "name"')
    directory.settings_file.write_text(text)
    assert directory.load() == settings
    directory.settings_file.write_text("{")
    with pytest.raises(StackError, match="cannot be read"):
        directory.load()


def test_files_are_private_replaced_whole_and_links_are_not_followed(tmp_path: Path) -> None:
    directory = StackDir(tmp_path / "s")
    directory.make()
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    directory.token_file.symlink_to(victim)
    directory.write(directory.token_file, "new")
    assert victim.read_text() == "untouched"
    assert stat.S_IMODE(directory.token_file.stat().st_mode) == 0o600
    assert [path.name for path in directory.path.iterdir() if path.name.startswith(".new")] == []


def test_a_failing_write_keeps_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = StackDir(tmp_path / "s")
    directory.make()
    directory.write(directory.token_file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StackError, match="No space left on device") as caught:
        directory.write(directory.token_file, "new")
    assert "the disk is full" in caught.value.advice
    assert directory.token_file.read_text() == "old"
    assert [path.name for path in directory.path.iterdir() if path.name.startswith(".new")] == []


def test_one_command_at_a_time(tmp_path: Path) -> None:
    directory = StackDir(tmp_path / "s")
    with (
        directory.changing("up"),
        pytest.raises(StackError, match=r"`launcher up` \(process \d+\) is at work"),
        StackDir(tmp_path / "s").changing("down"),
    ):
        pass
    with directory.changing("down"):
        pass


def test_a_directory_that_others_may_change_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(0o777)
    with pytest.raises(StackError, match="can be changed by other users"):
        StackDir(tmp_path / "s").make()


@pytest.mark.parametrize("name", ["", "A", "-a", "a b", "a/b", "x" * 40, "../x"])
def test_names_that_containers_cannot_have(name: str) -> None:
    with pytest.raises(StackError, match="stack name"):
        check_name(name)
    with pytest.raises(StackError):
        default_directory(name)


@linux
def test_a_pid_means_one_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        one = Identity.of(child.pid)
        assert one.alive
        assert not Identity(child.pid, "1").alive
        assert not Identity(child.pid, "1").send(signal.SIGKILL)
        assert one.alive
        assert one.send(signal.SIGTERM)
        child.wait()
        assert not one.alive
        assert not one.send(signal.SIGTERM)
        assert one.wait_gone(0)
    assert started(0) == ""
    assert started(2**22 + 1) == ""
