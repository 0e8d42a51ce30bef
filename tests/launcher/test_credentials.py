"""Users and password hashes; what Mosquitto's own tool writes and reads is the reference."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import credentials
from launcher.credentials import User

needs_passwd = pytest.mark.skipif(shutil.which("mosquitto_passwd") is None, reason="NO mosquitto_passwd HERE")


def test_hash_is_pbkdf2_sha512_in_mosquittos_fields() -> None:
    salt = bytes(range(12))
    field = credentials.hash_password("secret", salt=salt, iterations=101)
    digest = hashlib.pbkdf2_hmac("sha512", b"secret", salt, 101)
    assert field == f"$7$101$AAECAwQFBgcICQoL${base64.b64encode(digest).decode()}"


def test_two_hashes_of_one_password_differ() -> None:
    assert credentials.hash_password("x") != credentials.hash_password("x")


@pytest.mark.parametrize("password", ["", "a", "pässwörd", "with:colon", "with $7$ inside"])
def test_verify_takes_the_password_and_no_other(password: str) -> None:
    field = credentials.hash_password(password)
    assert credentials.verify_password(password, field)
    assert not credentials.verify_password(password + "x", field)


@given(st.text(max_size=200))
def test_verify_of_anything_else_is_false(field: str) -> None:
    assert credentials.verify_password("x", field) is False


@pytest.mark.parametrize(
    "field",
    [
        "$7$0$AAECAwQFBgcICQoL$AAAA",
        "$7$99999999999$AAECAwQFBgcICQoL$" + "A" * 88,
        "$7$٣$AAECAwQFBgcICQoL$" + "A" * 88,
        "$7$101$!!$" + "A" * 88,
        "$6$101$AAECAwQFBgcICQoL$" + "A" * 88,
        "x$7$101$AAECAwQFBgcICQoL",
    ],
)
def test_verify_of_broken_fields_is_false(field: str) -> None:
    assert credentials.verify_password("x", field) is False


@needs_passwd
def test_verify_reads_what_mosquitto_passwd_writes(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    file.write_text("demo:secret word\n")
    file.chmod(0o600)
    subprocess.run(["mosquitto_passwd", "-U", file], check=True, timeout=30, capture_output=True)
    name, _, field = file.read_text().strip().partition(":")
    assert name == "demo"
    if not field.startswith("$7$"):
        pytest.skip(f"this mosquitto_passwd writes another hash: {field[:10]}")
    assert credentials.verify_password("secret word", field)
    assert not credentials.verify_password("secret", field)


def test_passwords_are_long_random_and_need_no_quotes() -> None:
    passwords = {credentials.new_password() for _ in range(500)}
    assert len(passwords) == 500
    assert all(len(p) == 24 and p.replace("-", "").replace("_", "").isalnum() and p[0] != "-" for p in passwords)


def test_repr_hides_the_password() -> None:
    user = User("demo", "topsecret", ("demo/#",))
    assert "topsecret" not in repr(user)
    assert "topsecret" not in credentials.password_file([user])


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", " a", "a\r"])
def test_names_that_the_file_cannot_hold_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="user name"):
        User(name, "x", ())


@pytest.mark.parametrize("topic", ["", "a\nuser b", " a"])
def test_topics_that_the_file_cannot_hold_are_refused(topic: str) -> None:
    with pytest.raises(ValueError, match="topic"):
        User("a", "x", (topic,))


def test_acl_names_each_user_with_its_topics() -> None:
    text = credentials.acl_file([User("a", "x", ("a/#", "b")), User("h", "x", ("h/1",))])
    assert text == "user a\ntopic readwrite a/#\ntopic readwrite b\n\nuser h\ntopic readwrite h/1\n"


@pytest.mark.parametrize(
    ("pattern", "topic", "inside"),
    [
        ("demo/#", "demo/a/b", True),
        ("demo/#", "demo", True),
        ("demo/#", "demo/#", True),
        ("demo/#", "demo/+/x", True),
        ("demo/#", "other", False),
        ("demo/#", "#", False),
        ("demo/#", "+/a", False),
        ("demo/+", "demo/a", True),
        ("demo/+", "demo/+", True),
        ("demo/+", "demo/#", False),
        ("demo/+", "demo/a/b", False),
        ("demo/a", "demo/+", False),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("health/selfcheck", "health/selfcheck", True),
        ("health/selfcheck", "health/#", False),
    ],
)
def test_topic_matches(pattern: str, topic: str, inside: bool) -> None:
    assert credentials.topic_matches(pattern, topic) is inside
