"""Generated users and the password hashes that Mosquitto reads.

Owns: the password file line format `name:$7$iterations$salt$hash` (PBKDF2-HMAC-SHA512, base64), which
      every Mosquitto from 2.0 on reads whatever else it was built with.
In: names. Out: random passwords, hashes, ACL text.
Never: writes a password anywhere but into the objects it returns; a `repr` hides it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

ITERATIONS = 1000
"""What Mosquitto 2.1 uses (2.0: 101). Passwords here carry 144 random bits, so stretching adds nothing but
time in a broker that has one thread; people's own passwords belong into Mosquitto's own tools."""

MAX_ITERATIONS = 1_000_000
"""Ceiling when checking: a hash line from elsewhere must not stall the embedded broker."""

SALT_BYTES = 12
"""Mosquitto 2.0 reads exactly this length; 2.1 reads any."""

HASH_BYTES = 64


@dataclass(frozen=True, slots=True)
class User:
    """One broker user, and the topic filters it may read and write. `repr` hides the password."""

    name: str
    password: str = field(repr=False)
    topics: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.name or any(c in self.name for c in ":\r\n") or self.name != self.name.strip():
            raise ValueError(f"user name {self.name!r}: no colon, newline or surrounding space can be stored")
        for topic in self.topics:
            if any(c in topic for c in "\r\n") or topic != topic.strip() or not topic:
                raise ValueError(f"topic {topic!r}: no newline or surrounding space can be stored")


def new_password() -> str:
    """24 random characters that need no quoting in a shell, a URL or Python."""
    while True:
        password = secrets.token_urlsafe(18)
        if not password.startswith("-"):  # would read as an option in an option file
            return password


def hash_password(password: str, *, salt: bytes | None = None, iterations: int = ITERATIONS) -> str:
    """Return the `$7$...` field for `password`."""
    salt = secrets.token_bytes(SALT_BYTES) if salt is None else salt
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, iterations, HASH_BYTES)
    return f"$7${iterations}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def verify_password(password: str, hashed: str) -> bool:
    """Whether `password` belongs to the `$7$...` field; False for anything that is not such a field."""
    parts = hashed.split("$")
    if len(parts) != 5 or parts[0] or parts[1] != "7" or not (parts[2].isascii() and parts[2].isdigit()):
        return False
    iterations = int(parts[2]) if len(parts[2]) <= 7 else 0
    if not 1 <= iterations <= MAX_ITERATIONS:
        return False
    try:
        salt = base64.b64decode(parts[3], validate=True)
        expected = base64.b64decode(parts[4], validate=True)
    except (binascii.Error, ValueError):
        return False
    if len(expected) != HASH_BYTES:
        return False
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, iterations, HASH_BYTES)
    return hmac.compare_digest(digest, expected)


def password_file(users: Sequence[User]) -> str:
    """The text of Mosquitto's `password_file`."""
    return "".join(f"{user.name}:{hash_password(user.password)}\n" for user in users)


def acl_file(users: Sequence[User]) -> str:
    """The text of Mosquitto's `acl_file`: what is not named here is refused."""
    blocks = []
    for user in users:
        blocks.append(f"user {user.name}\n" + "".join(f"topic readwrite {topic}\n" for topic in user.topics))
    return "\n".join(blocks)


def topic_matches(pattern: str, topic: str) -> bool:
    """Whether the topic name or filter `topic` lies wholly inside the filter `pattern` (MQTT 5 section 4.7)."""
    allowed, asked = pattern.split("/"), topic.split("/")
    if asked[0].startswith("$") and allowed[0] in {"#", "+"}:
        return False
    for index, level in enumerate(allowed):
        if level == "#":
            return True
        if index >= len(asked) or asked[index] == "#":
            return False
        if level != "+" and level != asked[index]:
            return False
    return len(allowed) == len(asked)
