"""Users and rules: both files there and back, what cannot be stored, and a real Mosquitto that reads them."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from launcher import brokerconf, mosquitto, selfcheck
from launcher.accounts import ADMIN, CHECK_TOPIC, FIRST_USER, HEALTH, TYPED_ITERATIONS, Accounts, Rule, topics_of
from launcher.credentials import User, verify_password
from tests.launcher.support import needs_mosquitto


def test_first_run_makes_an_admin_a_user_and_a_health_user() -> None:
    book, shown = Accounts.first_run()
    assert set(shown) == {ADMIN, FIRST_USER, HEALTH}
    assert len(set(shown.values())) == 3
    for name, password in shown.items():
        assert verify_password(password, book.hashes[name])
        assert password not in book.passwords_text() + book.acl_text()
    again = Accounts.parse(book.passwords_text(), book.acl_text())
    assert again == book


@pytest.mark.parametrize(
    ("name", "verb", "topic", "allowed"),
    [
        (ADMIN, "write", "any/thing", True),
        (ADMIN, "read", "$SYS/broker/uptime", True),
        (ADMIN, "write", "$SYS/broker/uptime", False),
        (FIRST_USER, "write", "device/a/b", True),
        (FIRST_USER, "read", "admin/a", False),
        (HEALTH, "write", CHECK_TOPIC, True),
        (HEALTH, "write", "health/x", False),
        (HEALTH, "read", "device/x", False),
    ],
)
def test_who_may_what(name: str, verb: str, topic: str, allowed: bool) -> None:
    assert Accounts.first_run()[0].decide(name, verb, topic)[0] is allowed


def test_rules_are_granted_changed_denied_and_revoked() -> None:
    book, _ = Accounts.first_run()
    assert book.grant(FIRST_USER, "read", "plant/+/state")
    assert not book.grant(FIRST_USER, "read", "plant/+/state")
    assert book.decide(FIRST_USER, "read", "plant/1/state") == (True, "topic read plant/+/state")
    assert book.decide(FIRST_USER, "write", "plant/1/state") == (False, "no rule names it")
    assert book.grant(FIRST_USER, "readwrite", "plant/+/state")
    assert len(book.rules[FIRST_USER]) == 1
    book.grant(FIRST_USER, "deny", "device/secret/#")
    assert book.decide(FIRST_USER, "read", "device/secret/x") == (False, "topic deny device/secret/#")
    assert "readwrite device/#" in topics_of(book, FIRST_USER)
    book.revoke(FIRST_USER, "plant/+/state")
    with pytest.raises(ValueError, match="has no rule for 'plant/x'"):
        book.revoke(FIRST_USER, "plant/x")
    with pytest.raises(ValueError, match="keeps its one topic"):
        book.grant(HEALTH, "read", "#")


@pytest.mark.parametrize("name", ["", "a/b", "a+", "#", "a b", "a:b", "%u", "x" * 65, "health\n", "selfcheck"])
def test_names_that_cannot_be_topics_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="user name"):
        Accounts().set_password(name, "long enough", typed=True)


@pytest.mark.parametrize("topic", ["", "a#", "#/a", "a/+b", " a", "a\nb", "x" * 1025])
def test_filters_that_are_none_are_refused(topic: str) -> None:
    book, _ = Accounts.first_run()
    with pytest.raises(ValueError, match="topic filter"):
        book.grant(FIRST_USER, "read", topic)


def test_passwords_that_cannot_work_are_refused() -> None:
    book = Accounts()
    with pytest.raises(ValueError, match="too short"):
        book.set_password("bob", "short", typed=True)
    for bad in ("", "a\nb" * 5, "x" * 2000):
        with pytest.raises(ValueError, match="password"):
            book.set_password("bob", bad, typed=False)
    book.set_password("bob", "typed by a person", typed=True)
    assert book.hashes["bob"].split("$")[2] == str(TYPED_ITERATIONS)


@pytest.mark.parametrize(
    ("passwords", "acl", "named"),
    [("nocolon\n", "", "passwords line 1"), ("", "user a\nfoo bar\n", "acl line 2"), (":x\n", "", "passwords line 1")],
)
def test_damaged_files_are_named(passwords: str, acl: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Accounts.parse(passwords, acl)


def test_foreign_files_are_understood() -> None:
    acl = "# comment\ntopic read $SYS/#\n\nuser roger\ntopic foo/bar\ntopic deny x/#\npattern write $SYS/broker/%c/#\n"
    book = Accounts.parse("# c\nroger:$6$x$y\n", acl)
    assert book.anonymous == [Rule("read", "$SYS/#")]
    assert book.rules["roger"] == [Rule("readwrite", "foo/bar"), Rule("deny", "x/#")]
    assert book.patterns == [Rule("write", "$SYS/broker/%c/#")]


@needs_mosquitto
def test_mosquittos_own_tool_and_ours_understand_each_other(tmp_path: Path) -> None:
    tool = mosquitto.find_program("mosquitto_passwd")
    if tool is None:
        pytest.skip("NO mosquitto_passwd HERE")
    file = tmp_path / "passwords"
    subprocess.run([tool, "-H", "sha512-pbkdf2", "-c", "-b", str(file), "theirs", "their secret"], check=True)
    name, _, hashed = file.read_text().strip().partition(":")
    assert name == "theirs"
    assert verify_password("their secret", hashed)
    book = Accounts.parse(file.read_text(), "")
    book.set_password("ours", "our own secret", typed=True)
    file.write_text(book.passwords_text())
    subprocess.run([tool, "-H", "sha512-pbkdf2", "-b", str(file), "theirs", "changed secret"], check=True)
    again = Accounts.parse(file.read_text(), "")
    assert verify_password("our own secret", again.hashes["ours"])
    assert verify_password("changed secret", again.hashes["theirs"])


@needs_mosquitto
def test_a_real_broker_enforces_exactly_these_rules(tmp_path: Path) -> None:
    """Also on 2.1 with its plugins: MOSQUITTO=/path/to/mosquitto MOSQUITTO_PLUGINS=/dir."""
    from launcher.native import find_dialect
    from tests.launcher.support import wait_gone

    binary, dialect = find_dialect()
    book, shown = Accounts.first_run()
    book.set_password("typed", "a typed password", typed=True)
    book.grant(FIRST_USER, "write", "plant/+/state")
    book.grant(FIRST_USER, "deny", "device/secret/#")

    async def scenario() -> None:
        identity = mosquitto.prepare_directory(tmp_path / "broker", [], mosquitto.broker_identity())
        folder = tmp_path / "broker"
        mosquitto.write_private(folder / "passwords", book.passwords_text(), identity)
        mosquitto.write_private(folder / "acl", book.acl_text(), identity)

        async def attempt(mqtt_port: int, ws_port: int) -> mosquitto.Child:
            shape = brokerconf.Shape(
                listeners=[
                    brokerconf.Listener(mqtt_port, "mqtt", "127.0.0.1"),
                    brokerconf.Listener(ws_port, "websockets", "127.0.0.1"),
                ],
                user=None if identity else "root",
            )
            mosquitto.write_private(folder / "mosquitto.conf", brokerconf.configuration(dialect, shape), identity)
            command = [binary.path, "-c", "mosquitto.conf"]
            return await mosquitto.Child.start("broker", command, on_line=None, cwd=folder, identity=identity)

        async def ready(broker: mosquitto.Broker) -> None:
            from tests.launcher.support import accepts

            await accepts(broker, User(HEALTH, shown[HEALTH], ()))

        broker = await mosquitto.start_with_ports(attempt, "test", ready)
        try:
            await asyncio.to_thread(enforce, broker)
        finally:
            await broker.child.stop()
        if broker.child.pid:
            wait_gone(broker.child.pid)

    def enforce(broker: mosquitto.Broker) -> None:
        for port, path in ((broker.mqtt_port, None), (broker.ws_port, "/mqtt")):
            target = selfcheck.Target("127.0.0.1", port, path)
            typed = User("typed", "a typed password", ())
            assert selfcheck.round_trip(target, typed, "typed/x") > 0
            for name in (ADMIN, FIRST_USER, HEALTH):
                with selfcheck.Session(target, name, shown[name]) as session:
                    session.connect()
                    for topic in (CHECK_TOPIC, "health/x", "device/a", "device/secret/a", "plant/1/state", "other"):
                        allowed = session.publish(topic, b"x") < 128
                        assert allowed is book.decide(name, "write", topic)[0], (name, topic)

    asyncio.run(scenario())
