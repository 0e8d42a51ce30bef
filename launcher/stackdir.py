"""The directory of one stack: what was chosen, the broker's files, the token, the lock.

Owns: the layout below the directory, the settings file, atomic private writes, who works on the stack right now.
In: a path. Out: `StackDir`; StackError in one line for everything that a file system can do to us.
Never: keeps a broker user's password, but for the health check's own.

    stack.json                  `Settings`
    lock                        held while a command changes the stack; its text names the holder
    token                       the tunnel token
    broker/mosquitto.conf passwords acl health/   what the broker reads; with native processes also broker/data
    native.json, logs/          the native engine's (native.py)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from launcher.accounts import Accounts

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,38}")
DEFAULT_NAME = "tunnel"

BROKER_IMAGE = "eclipse-mosquitto:2.1.2"
"""Pinned: `latest` moved users from 2.0 to 2.1, whose defaults differ, without a word."""

CONNECTOR_IMAGE = "tunnel-connector:0.1.0"


class StackError(Exception):
    """A command on a stack failed; one line and what to do about it."""

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice


@dataclass(slots=True)
class Settings:
    """What was chosen for a stack; kept in stack.json, so that a later `up` needs no options again."""

    name: str = DEFAULT_NAME
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    engine: str = ""
    broker_image: str = BROKER_IMAGE
    connector_image: str = CONNECTOR_IMAGE
    hostname: str | None = None
    own_config: str | None = None
    allow_anonymous: bool = False
    mqtt_port: int = 1883
    ws_port: int = 9001
    proxy_protocol: bool | None = None
    """Whether the connector tells the broker each client's address; None: where both can."""
    durability: str = "each"
    """`each`: what the broker acknowledged is on its disk a moment later. `interval`: once a minute, for a database so
    large, or a disk so slow, that writing it at every change is too much."""
    connector_args: list[str] = field(default_factory=list)
    connector_ca: str | None = None
    proxied_port: int = 0
    """Port of the broker's listener that wants a PROXY header first, 0: none does. Each `up` finds it out."""
    data_volume: str | None = None
    """Name of a volume that was there before (`launcher import`); otherwise one of the stack's own."""


class StackDir:
    """One stack's directory. `open` makes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broker = path / "broker"
        self.settings_file = path / "stack.json"
        self.token_file = path / "token"
        self.health = self.broker / "health"
        self.logs = path / "logs"

    @property
    def exists(self) -> bool:
        """Whether `up` has been here."""
        return self.settings_file.is_file()

    def make(self) -> None:
        """Create it, readable by its owner only."""
        with explained(f"stack directory {self.path}"):
            for path in (self.path, self.broker, self.health):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.path.stat()
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise StackError(
                    f"stack directory {self.path} can be changed by other users",
                    advice=f"use a directory of your own (--state-dir), or: chmod go-w {self.path}",
                )

    def load(self) -> Settings:
        """The settings; StackError when there are none or they are damaged."""
        try:
            facts = json.loads(self.settings_file.read_text(encoding="utf-8"))
            known = {entry.name for entry in fields(Settings)}
            return Settings(**{key: value for key, value in facts.items() if key in known})
        except FileNotFoundError:
            raise StackError(
                f"there is no stack here ({self.path})", advice="make it with: launcher up (or name another: --name)"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise StackError(
                f"{self.settings_file} cannot be read: {error}", advice="remove it; `launcher up` writes a new one"
            ) from error

    def save(self, settings: Settings) -> None:
        """Keep the settings."""
        self.write(self.settings_file, json.dumps(asdict(settings), indent=2) + "\n")

    def accounts(self) -> Accounts:
        """The broker's users and rules; StackError when the files are damaged."""
        try:
            return Accounts.parse(
                (self.broker / "passwords").read_text(encoding="utf-8"),
                (self.broker / "acl").read_text(encoding="utf-8"),
            )
        except FileNotFoundError:
            raise StackError("the broker has no users yet", advice="make the stack first: launcher up") from None
        except (OSError, ValueError) as error:
            raise StackError(
                f"the users or rules in {self.broker} cannot be read: {error}", advice="mend that line by hand"
            ) from error

    def write_accounts(self, book: Accounts) -> None:
        """Replace both files."""
        self.write(self.broker / "passwords", book.passwords_text())
        self.write(self.broker / "acl", book.acl_text())

    def write_health(self, password: str) -> None:
        """The option files with which the Mosquitto clients check the broker as the health user."""
        from launcher.accounts import HEALTH  # noqa: PLC0415

        self.write(self.health / "password", password)
        for client in ("mosquitto_rr", "mosquitto_sub"):
            self.write(self.health / client, f"-u {HEALTH}\n-P {password}\n")

    def health_password(self) -> str:
        """The health user's password."""
        try:
            return (self.health / "password").read_text(encoding="utf-8")
        except OSError as error:
            raise StackError(
                f"the health user's password is missing: {error}", advice="launcher user passwd health makes a new one"
            ) from error

    def write(self, path: Path, text: str, mode: int = 0o600) -> None:
        """Replace `path` in one step: readers see the old or the new text, also when the disk fills up half-way.

        A replaced file keeps its owner, so that a native broker that runs as another user can go on reading it.
        """
        with explained(str(path)):
            try:
                old = path.lstat()
            except FileNotFoundError:
                old = None
            descriptor, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    os.fchmod(descriptor, mode)
                    if old is not None and os.geteuid() == 0:
                        os.fchown(descriptor, old.st_uid, old.st_gid)
                    file.write(text)
                    file.flush()
                    os.fsync(descriptor)
                os.replace(name, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise

    @contextlib.contextmanager
    def changing(self, what: str) -> Iterator[None]:
        """Hold the stack for one command; StackError at once when another one has it."""
        self.make()
        with explained(str(self.path / "lock")):
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another command"
                raise StackError(
                    f"{holder} is at work on this stack", advice="wait until it has ended, then run this again"
                ) from None
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"`launcher {what}` (process {os.getpid()})".encode())
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what a file system answers into one line with advice."""
    try:
        yield
    except OSError as error:
        raise StackError(f"{what}: {error.strerror or error}", advice=storage_advice(error.errno)) from error


def storage_advice(number: int | None) -> str:
    """What to do about an errno of the file system."""
    return {
        errno.ENOSPC: "the disk is full: make room, then run the command again; nothing half-written was kept",
        errno.EDQUOT: "your disk quota is used up: make room, then run the command again",
        errno.EROFS: "it lies on a read-only file system: choose another place with --state-dir",
        errno.EACCES: "you may not write there: choose another place with --state-dir, or run as its owner",
        errno.EPERM: "you may not write there: choose another place with --state-dir, or run as its owner",
    }.get(number or 0, "choose another place with --state-dir")


def check_name(name: str) -> str:
    """The stack's name; StackError when containers cannot be called so."""
    if not NAME.fullmatch(name):
        raise StackError(
            f"stack name {name!r}", advice="1 to 39 of a-z, 0-9, - and _, beginning with a letter or digit"
        )
    return name


def default_directory(name: str) -> Path:
    """Where a stack of that name is kept."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "tunnel-launcher" / check_name(name)


def facts_of(settings: Settings) -> dict[str, Any]:
    """The settings as plain data."""
    return asdict(settings)
