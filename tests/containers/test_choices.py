"""A configuration of one's own, and an open broker: only as far as it is safe or was said twice."""

from __future__ import annotations

from pathlib import Path

from launcher import selfcheck
from tests.containers.stacks import (
    exists,
    inspect,
    stack,
)


def test_own_configuration_is_checked_before_it_is_used(tmp_path: Path) -> None:
    with stack("town", tmp_path) as made:
        made.up().good()
        before = inspect(made.broker)["Id"]
        own = tmp_path / "mosquitto.conf"
        own.write_text("listener 1883\nallow_anonymous true\nlistener 9001\nprotocol websockets\n")
        assert "lets everybody in" in made.up("--config", own).one_line()
        own.write_text("listener 1883\nno_such_option 1\npassword_file /mosquitto/config/passwords\n")
        line = made.up("--config", own).one_line()
        assert "refuses that configuration" in line
        assert "no_such_option" in line
        assert inspect(made.broker)["Id"] == before
        own.write_text(
            "listener 1883\nlistener 9001\nprotocol websockets\nallow_anonymous false\n"
            "password_file /mosquitto/config/passwords\nacl_file /mosquitto/config/acl\n"
            "persistence true\npersistence_location /mosquitto/data/\n"
        )
        made.up("--config", own).good()
        made.public()
        made.up("--config", "").good()
        made.public()


def test_open_to_everyone_only_when_told_twice(tmp_path: Path) -> None:
    with stack("topen", tmp_path) as made:
        assert "say it twice" in made.up("--allow-anonymous").one_line()
        assert not exists(made.broker)
        made.up("--allow-anonymous", "--yes").good()
        with selfcheck.Session(made.edge.target(), None, None) as session:
            session.connect()
        assert made.run("status").good().event("status")["open_to_everyone"] is True
        assert made.run("doctor").status == 1
        made.up("--no-allow-anonymous").good()
        with selfcheck.Session(made.edge.target(), None, None) as session:
            try:
                session.connect()
                raise AssertionError("still open")
            except selfcheck.RefusedError:
                pass


def test_an_image_that_cannot_be_had(tmp_path: Path) -> None:
    with stack("tnoimage", tmp_path) as made:
        line = made.up("--broker-image", "nowhere.invalid/none:1").one_line()
        assert line.startswith("pulling nowhere.invalid/none:1")
        assert "cannot be reached" in line
        assert not exists(made.broker)
