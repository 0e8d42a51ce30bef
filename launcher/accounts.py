"""The stack's broker users and their topic rules, as the two files that Mosquitto reads.

Owns: the user list with hashes, the rules (`topic`, `pattern`, `deny`), their file formats both ways, who is reserved.
In: names, passwords, topics; the text of existing files. Out: file text; ValueError naming what cannot be stored.
Never: keeps a password after hashing it, talks to a broker.

Rules in words: a user may do what its own `topic` lines and every `pattern` line allow, unless one of them says `deny`;
what no line names is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from launcher import credentials
from launcher.credentials import topic_matches

ADMIN, HEALTH, FIRST_USER = "admin", "health", "device"
CHECK_TOPIC = "selfcheck/health"
"""The one topic of the health user. Not below `health/`, which `pattern readwrite %u/#` would open to it."""

RESERVED = frozenset({HEALTH, "selfcheck"})
"""Names that nobody may take: the health user, and whoever would own its topic by the pattern."""

USER_PATTERN = "%u/#"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
"""No `/ + # %`: the name becomes a topic level. Mosquitto itself takes more and then refuses such users by pattern."""

TYPED_ITERATIONS = 20_000
"""For passwords that people chose: about 10 ms of the broker's one thread for each CONNECT, so that a thousand clients
that come back at once are in again after ten seconds. Generated ones need no stretching (`credentials.ITERATIONS`)."""

MIN_TYPED = 8
MAX_PASSWORD = 1024
MAX_TOPIC = 1024
MAX_USERS = 10_000
ACCESS = ("read", "write", "readwrite", "deny")


@dataclass(frozen=True, slots=True)
class Rule:
    """One line: what may be done with a topic filter."""

    access: str
    topic: str

    def allows(self, verb: str, topic: str) -> bool:
        """Whether this line is a permission for `verb` (read or write) on `topic`."""
        return self.access in {verb, "readwrite"} and topic_matches(self.topic, topic)


@dataclass(slots=True)
class Accounts:
    """All users of one broker and their rules. Change it with its methods, then write both files."""

    hashes: dict[str, str] = field(default_factory=dict)
    rules: dict[str, list[Rule]] = field(default_factory=dict)
    patterns: list[Rule] = field(default_factory=list)
    anonymous: list[Rule] = field(default_factory=list)

    @classmethod
    def first_run(cls) -> tuple[Accounts, dict[str, str]]:
        """An admin, one ordinary user and the health user, with new passwords (name to password)."""
        book = cls(patterns=[Rule("readwrite", USER_PATTERN)])
        shown = {name: credentials.new_password() for name in (ADMIN, FIRST_USER, HEALTH)}
        for name, password in shown.items():
            book.hashes[name] = credentials.hash_password(password)
        book.rules[ADMIN] = [Rule("readwrite", "#"), Rule("read", "$SYS/#")]
        book.rules[HEALTH] = [Rule("deny", f"{HEALTH}/#"), Rule("readwrite", CHECK_TOPIC)]
        return book, shown

    @classmethod
    def parse(cls, passwords: str, acl: str) -> Accounts:
        """Read both files; ValueError names the file and the line that cannot be understood."""
        book = cls()
        for number, line in enumerate(passwords.splitlines(), 1):
            name, colon, hashed = line.partition(":")
            if not line.strip() or line.startswith("#"):
                continue
            if not colon or not name or not hashed:
                raise ValueError(f"passwords line {number}: not NAME:HASH")
            book.hashes[name] = hashed.strip()
        user: str | None = None
        for number, raw in enumerate(acl.splitlines(), 1):
            line = raw.strip()
            if not line or line.startswith("#"):
                continue
            word, _, rest = line.partition(" ")
            rest = rest.strip()
            if word == "user" and rest:
                user = rest
                book.rules.setdefault(user, [])
            elif word in {"topic", "pattern"} and rest:
                rule = _rule(rest)
                if word == "pattern":
                    book.patterns.append(rule)
                elif user is None:
                    book.anonymous.append(rule)
                else:
                    book.rules[user].append(rule)
            else:
                raise ValueError(f"acl line {number}: {line[:60]!r} is no rule")
        return book

    def passwords_text(self) -> str:
        """What Mosquitto reads as its password file."""
        return "".join(f"{name}:{hashed}\n" for name, hashed in self.hashes.items())

    def acl_text(self) -> str:
        """What Mosquitto reads as its ACL file; what it does not name is refused."""
        lines = [
            "# Written by the launcher (`launcher acl`, `launcher user`): changes made here are kept when they can"
        ]
        lines += ["# be read, comments are not.", ""]
        lines += [f"topic {rule.access} {rule.topic}" for rule in self.anonymous]
        for name, rules in self.rules.items():
            if rules:
                lines += ["", f"user {name}", *(f"topic {rule.access} {rule.topic}" for rule in rules)]
        lines += ["", *(f"pattern {rule.access} {rule.topic}" for rule in self.patterns)]
        return "\n".join(lines) + "\n"

    def set_password(self, name: str, password: str, *, typed: bool) -> None:
        """Make the user or give it this password."""
        check_name(name)
        if typed and len(password) < MIN_TYPED:
            raise ValueError(f"that password is too short: at least {MIN_TYPED} characters")
        if not password or len(password.encode()) > MAX_PASSWORD or any(c in password for c in "\0\r\n"):
            raise ValueError(f"a password has 1 to {MAX_PASSWORD} bytes and no line break")
        if name not in self.hashes and len(self.hashes) >= MAX_USERS:
            raise ValueError(f"there are {MAX_USERS} users already; a broker for more wants a database plugin")
        iterations = TYPED_ITERATIONS if typed else credentials.ITERATIONS
        self.hashes[name] = credentials.hash_password(password, iterations=iterations)

    def remove(self, name: str) -> None:
        """Remove the user and its rules."""
        self.known(name)
        if name == HEALTH:
            raise ValueError(f"{HEALTH!r} is the user of the health check: without it the broker counts as broken")
        del self.hashes[name]
        self.rules.pop(name, None)

    def known(self, name: str) -> None:
        """ValueError when there is no such user."""
        if name not in self.hashes:
            raise ValueError(f"there is no user {name!r}; there are: {', '.join(self.hashes) or 'none'}")

    def grant(self, name: str, access: str, topic: str) -> bool:
        """Add a rule, or change the access of the one for `topic`; False when it was so already."""
        self.known(name)
        if name == HEALTH:
            raise ValueError(f"{HEALTH!r} keeps its one topic {CHECK_TOPIC}")
        check_topic(topic)
        if access not in ACCESS:
            raise ValueError(f"access {access!r}: one of {', '.join(ACCESS)}")
        rules = self.rules.setdefault(name, [])
        wanted = Rule(access, topic)
        if wanted in rules:
            return False
        rules[:] = [rule for rule in rules if rule.topic != topic]
        rules.append(wanted)
        return True

    def revoke(self, name: str, topic: str) -> None:
        """Remove the rules of `name` for exactly this filter."""
        self.known(name)
        if name == HEALTH:
            raise ValueError(f"{HEALTH!r} keeps its one topic {CHECK_TOPIC}")
        rules = self.rules.get(name, [])
        left = [rule for rule in rules if rule.topic != topic]
        if len(left) == len(rules):
            own = ", ".join(rule.topic for rule in rules) or "none"
            raise ValueError(f"{name!r} has no rule for {topic!r}; it has: {own} (and the patterns of all users)")
        self.rules[name] = left

    def decide(self, name: str, verb: str, topic: str) -> tuple[bool, str]:
        """Whether the user may read or write the topic, and which line says so."""
        own = [("topic", rule) for rule in self.rules.get(name, [])]
        every = [("pattern", Rule(rule.access, rule.topic.replace("%u", name))) for rule in self.patterns]
        for word, rule in own + every:
            if rule.access == "deny" and topic_matches(rule.topic, topic):
                return False, f"{word} deny {rule.topic}"
        for word, rule in own + every:
            if rule.allows(verb, topic):
                return True, f"{word} {rule.access} {rule.topic}"
        return False, "no rule names it"


def _rule(rest: str) -> Rule:
    access, _, topic = rest.partition(" ")
    if access in ACCESS and topic.strip():
        return Rule(access, topic.strip())
    return Rule("readwrite", rest)


def check_name(name: str) -> None:
    """ValueError when a user cannot have this name."""
    if not NAME.fullmatch(name):
        raise ValueError(f"user name {name!r}: 1 to 64 of letters, digits and _ . @ - (it becomes a topic level)")
    if name in RESERVED and name != HEALTH:
        raise ValueError(f"user name {name!r} is taken by the health check's topic")


def check_topic(topic: str) -> None:
    """ValueError when this is no topic filter."""
    levels = topic.split("/")
    bad = (
        not topic
        or len(topic.encode()) > MAX_TOPIC
        or topic != topic.strip()
        or any(not c.isprintable() for c in topic)
        or any("#" in level and level != "#" for level in levels)
        or any("+" in level and level != "+" for level in levels)
        or "#" in levels[:-1]
    )
    if bad:
        raise ValueError(f"topic filter {topic!r}: levels between slashes, + for one level, # only as the last")


def topics_of(book: Accounts, name: str) -> Sequence[str]:
    """What the user may do, for people."""
    own = [f"{rule.access} {rule.topic}" for rule in book.rules.get(name, [])]
    if name == HEALTH:
        return own
    return own + [f"{rule.access} {rule.topic.replace('%u', name)}" for rule in book.patterns]
