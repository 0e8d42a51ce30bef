"""mosquitto.conf: two dialects, read by the real broker of each, and what is open about somebody else's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launcher import brokerconf
from launcher.brokerconf import Dialect, Listener, Shape
from launcher.native import Native, find_dialect
from launcher.stackdir import StackError
from tests.launcher.support import needs_mosquitto

SHAPE = Shape(listeners=(Listener(1883), Listener(9001, "websockets")), directory="/c/", data="/d/")


def options(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_each_version_gets_its_own_dialect() -> None:
    old = options(brokerconf.configuration(Dialect((2, 0, 11)), SHAPE))
    new = options(brokerconf.configuration(Dialect((2, 1, 2), "/usr/lib"), SHAPE))
    assert "password_file /c/passwords" in old
    assert "allow_anonymous false" in old
    assert "global_plugin /usr/lib/mosquitto_password_file.so" in new
    assert "plugin_opt_acl_file /c/acl" in new
    assert new.count("listener_allow_anonymous false") == 2
    assert not any(line.startswith(("password_file", "acl_file", "allow_anonymous", "per_listener")) for line in new)
    assert not any("plugin" in line or line.startswith(("listener_", "global_")) for line in old)
    without = options(brokerconf.configuration(Dialect((2, 1, 2)), SHAPE))
    assert "password_file /c/passwords" in without


@pytest.mark.parametrize("dialect", [Dialect((2, 0, 11)), Dialect((2, 1, 2), "/usr/lib")])
def test_bounds_and_persistence_are_always_there(dialect: Dialect) -> None:
    lines = options(brokerconf.configuration(dialect, SHAPE))
    words = {line.split()[0] for line in lines}
    assert {"max_packet_size", "max_queued_messages", "max_queued_bytes", "max_inflight_messages"} <= words
    assert lines.count("max_connections 1000") == 2
    assert "persistence true" in lines
    assert "persistent_client_expiration 14d" in lines
    assert "autosave_interval 60" in lines
    assert "log_dest stderr" in lines
    each = options(brokerconf.configuration(dialect, Shape(SHAPE.listeners, save_each_change=True)))
    assert "autosave_on_changes true" in each
    assert "autosave_interval 1" in each


def test_what_we_write_we_find_closed() -> None:
    for dialect in (Dialect((2, 0, 11)), Dialect((2, 1, 2), "/usr/lib")):
        reading = brokerconf.read(brokerconf.configuration(dialect, SHAPE), dialect)
        assert not [one for one in reading.findings if "deprecated" not in one.text], reading.findings
        assert not reading.open
        opened = Shape(SHAPE.listeners, anonymous=True)
        assert brokerconf.read(brokerconf.configuration(dialect, opened)).open


def test_proxy_protocol_only_where_the_broker_takes_it() -> None:
    shape = Shape(SHAPE.listeners, proxy_protocol=True)
    assert "enable_proxy_protocol" not in brokerconf.configuration(Dialect((2, 0, 11)), shape)
    assert brokerconf.configuration(Dialect((2, 1, 2)), shape).count("enable_proxy_protocol 2") == 1


@pytest.mark.parametrize(
    ("text", "words", "is_open"),
    [
        ("listener 1883\nallow_anonymous true\n", "everybody who knows the host name", True),
        ("", "no listener", True),
        ("listener 1883\n", "nobody can log in", False),
        ("listener 1883\npassword_file /p\n", "no acl_file", False),
        ("listener 1883\npassword_file /p\nacl_file /a\n", "persistence is off", False),
        ("listener 1883\npassword_file /p\n", "protocol websockets", False),
        ("listener x\n", "has no port", True),
        ("listener 1883\ninclude_dir /x\n", "include_dir", False),
        ("listener 1883\nlistener_allow_anonymous true\n", "everybody", True),
        ("listener 1883\nlog_dest stdout\n", "buffered", False),
    ],
)
def test_what_a_foreign_configuration_gives_away(text: str, words: str, is_open: bool) -> None:
    reading = brokerconf.read(text)
    assert any(words in one.text for one in reading.findings), reading.findings
    assert reading.open is is_open


def test_deprecated_words_are_told_for_the_version_that_dislikes_them() -> None:
    text = "listener 1883\npassword_file /p\nper_listener_settings true\n"
    assert any(
        "password_file, per_listener_settings" in one.text for one in brokerconf.read(text, Dialect((2, 1, 2))).findings
    )
    assert not any("deprecated" in one.text for one in brokerconf.read(text, Dialect((2, 0, 11))).findings)


@needs_mosquitto
def test_the_real_broker_of_21_takes_the_dialect_and_refuses_nonsense(tmp_path: Path) -> None:
    binary, dialect = find_dialect()
    if not dialect.modern:
        pytest.skip("NO MOSQUITTO 2.1 HERE: its dialect was not tried (put one first in PATH)")
    shape = Shape((Listener(0),), directory=f"{tmp_path}/", data=f"{tmp_path}/")
    text = brokerconf.configuration(dialect, shape)
    assert "allow" in text
    with pytest.raises(StackError, match="nonsense"):
        Native.try_configuration("listener 1883\nnonsense 1\n", binary, dialect)
    database = tmp_path / "mosquitto.db"
    database.write_bytes(b"precious")
    conf = f"listener 1883\npersistence true\npersistence_location {tmp_path}/\n"
    Native.try_configuration(conf, binary, dialect)
    assert database.read_bytes() == b"precious"  # its --test-config would have written an empty one over it


@needs_mosquitto
def test_the_installed_broker_starts_with_its_dialect(tmp_path: Path) -> None:
    """Every option is known to it: an unknown one ends a broker at once with a line on standard error."""
    binary, dialect = find_dialect()
    shape = Shape((), directory="", data="data", user="root" if os.geteuid() == 0 else None, save_each_change=True)
    (tmp_path / "data").mkdir()
    for name in ("passwords", "acl"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o600)
    text = brokerconf.configuration(dialect, shape) + "nonsense true\n"
    (tmp_path / "mosquitto.conf").write_text(text)
    done = subprocess.run(
        [binary.path, "-c", "mosquitto.conf"], cwd=tmp_path, capture_output=True, timeout=30, check=False
    )
    said = (done.stdout + done.stderr).decode()
    assert "nonsense" in said
    line = len(text.splitlines())
    assert f"mosquitto.conf:{line}" in said, said  # the last line, ours, is the first that it does not know
