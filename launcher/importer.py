"""`launcher import`: from the compose folder that people start with to a stack that is safe.

Owns: reading such a folder (compose file, .env, mosquitto.conf, users, rules, database), what is unsafe in it.
In: a folder. Out: findings; a stack directory that the next `up` uses; a copy of the broker's database.
Never: changes the folder, starts or stops a container, prints the token.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import brokerconf, tokens
from launcher.accounts import ADMIN, CHECK_TOPIC, FIRST_USER, HEALTH, USER_PATTERN, Accounts, Rule
from launcher.credentials import hash_password, new_password
from launcher.errors import UsageError
from launcher.output import Output
from launcher.stackdir import Settings, StackDir, StackError, explained

COMPOSE_NAMES = ("compose.yaml", "compose.yml", "docker-compose.yml", "docker-compose.yaml")
MAX_FILE = 1_048_576
DATABASE = "mosquitto.db"
TOKEN_WORD = re.compile(r"eyJ[A-Za-z0-9+/=]{20,}")


@dataclass(slots=True)
class Folder:
    """What was found in the folder."""

    compose: Path | None = None
    services: dict[str, dict[str, Any]] = field(default_factory=dict)
    broker: str = ""
    connector: str = ""
    conf: Path | None = None
    passwords: Path | None = None
    acl: Path | None = None
    database: Path | None = None
    volume: str = ""
    unsafe: list[str] = field(default_factory=list)


def read_folder(folder: Path) -> Folder:
    """Understand the folder; StackError when it is none of this kind."""
    result = Folder()
    result.compose = next((folder / name for name in COMPOSE_NAMES if (folder / name).is_file()), None)
    if result.compose is None:
        raise StackError(
            f"{folder} has no {COMPOSE_NAMES[2]}", advice="name the folder that `docker compose up` runs in"
        )
    import yaml  # noqa: PLC0415

    try:
        with explained(str(result.compose)):
            data = yaml.safe_load(result.compose.read_text(encoding="utf-8"))
        services = data["services"]
        result.services = {str(name): dict(one or {}) for name, one in services.items()}
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StackError(f"{result.compose} is no compose file: {error}".splitlines()[0]) from error
    for name, one in result.services.items():
        image = str(one.get("image", ""))
        if "mosquitto" in f"{name} {image}" and not result.broker:
            result.broker = name
        if "cloudflared" in f"{name} {image}" and not result.connector:
            result.connector = name
    if not result.broker:
        raise StackError(f"{result.compose} has no Mosquitto service", advice=f"it has: {', '.join(result.services)}")
    _read_mounts(folder, result)
    if result.volume:
        result.volume = _volume_name(folder, data, result.volume)
    _judge_compose(result)
    return result


def _volume_name(folder: Path, data: dict[str, Any], volume: str) -> str:
    """What compose calls the volume on the engine: the project's name before it, unless the file says otherwise."""
    declared = (data.get("volumes") or {}).get(volume) or {}
    if declared.get("name") or declared.get("external"):
        return str(declared.get("name") or volume)
    project = str(data.get("name") or re.sub(r"[^a-z0-9_-]", "", folder.resolve().name.lower()).lstrip("_-"))
    return f"{project}_{volume}"


def _mounts(service: dict[str, Any]) -> list[tuple[str, str]]:
    """(source, target) of a service's volumes."""
    found = []
    for one in service.get("volumes") or []:
        if isinstance(one, dict):
            found.append((str(one.get("source", "")), str(one.get("target", ""))))
        else:
            parts = str(one).split(":")
            found.append((parts[0], parts[1]) if len(parts) > 1 else ("", parts[0]))
    return found


def _read_mounts(folder: Path, result: Folder) -> None:
    mapped: dict[str, Path] = {}
    for source, target in _mounts(result.services[result.broker]):
        if source.startswith((".", "/", "~")):
            mapped[target.rstrip("/")] = (folder / Path(source).expanduser()).resolve()
        elif target.rstrip("/") in {"/mosquitto/data", "/mosquitto"}:
            result.volume = source
    for target, path in mapped.items():
        if target.endswith("mosquitto.conf") and path.is_file():
            result.conf = path
        elif target == "/mosquitto/config" and (path / "mosquitto.conf").is_file():
            result.conf = path / "mosquitto.conf"
    if result.conf is None:
        places = (
            folder / "mosquitto.conf",
            folder / "mosquitto" / "mosquitto.conf",
            folder / "config" / "mosquitto.conf",
        )
        result.conf = next((path for path in places if path.is_file()), None)

    def here(inside: str) -> Path | None:
        """The file on this machine that the broker sees as `inside`."""
        for target, path in mapped.items():
            if inside == target:
                return path if path.is_file() else None
            if inside.startswith(target + "/") and (path / inside[len(target) + 1 :]).is_file():
                return path / inside[len(target) + 1 :]
        return None

    if result.conf is not None:
        reading = brokerconf.read(_text(result.conf))
        result.passwords = here(reading.files["password_file"]) if "password_file" in reading.files else None
        result.acl = here(reading.files["acl_file"]) if "acl_file" in reading.files else None
        data = (reading.data or "/mosquitto/data").rstrip("/")
        result.database = here(f"{data}/{DATABASE}")


def _text(path: Path) -> str:
    with explained(str(path)):
        if path.stat().st_size > MAX_FILE:
            raise StackError(f"{path} is larger than {MAX_FILE} bytes: that is something else")
        return path.read_text(encoding="utf-8", errors="replace")


def _judge_compose(result: Folder) -> None:
    say = result.unsafe
    for name, one in result.services.items():
        command = one.get("command", "")
        words = " ".join(str(word) for word in command) if isinstance(command, list) else str(command)
        if "--token" in words:
            say.append(f"{name}: the token is on the command line, where `ps` and `docker inspect` show it")
        if TOKEN_WORD.search(words):
            say.append(f"{name}: the token itself stands in the compose file")
        image = str(one.get("image", ""))
        if image.endswith(":latest") or (image and ":" not in image.rpartition("/")[2] and "@" not in image):
            say.append(f"{name}: image {image} is not pinned; `latest` moved from Mosquitto 2.0 to 2.1 silently")
        if one.get("privileged") or "SYS_ADMIN" in [str(cap) for cap in one.get("cap_add") or []]:
            say.append(f"{name}: runs with rights over the whole machine (privileged or SYS_ADMIN)")
        for port in one.get("ports") or []:
            if name == result.broker:
                say.append(f"{name}: port {port} is published: the broker is open past the tunnel")
        if name == result.broker and not any("/mosquitto/data" in target for _, target in _mounts(one)):
            say.append(f"{name}: no volume for /mosquitto/data: retained messages and sessions die with the container")
        if name in {result.broker, result.connector} and not one.get("healthcheck"):
            say.append(f"{name}: no health check")
        if name == result.connector and not one.get("depends_on"):
            say.append(f"{name}: starts without waiting for the broker")


def merge_accounts(result: Folder) -> tuple[Accounts, dict[str, str], str, list[str]]:
    """The old users and rules with what a safe stack needs: (book, new passwords, health password, notes)."""
    notes: list[str] = []
    book = Accounts()
    if result.passwords is not None or result.acl is not None:
        try:
            book = Accounts.parse(
                _text(result.passwords) if result.passwords else "", _text(result.acl) if result.acl else ""
            )
        except ValueError as error:
            raise StackError(f"users or rules of {result.conf}: {error}") from error
    if book.anonymous:
        notes.append("rules for clients without a user were left out: nobody comes in without a password now")
        book.anonymous = []
    for name, hashed in list(book.hashes.items()):
        if not hashed.startswith("$"):
            book.hashes[name] = hash_password(hashed)
            notes.append(f"user {name!r} had a password in plain text: it is hashed now")
    shown: dict[str, str] = {}
    if ADMIN not in book.hashes:
        shown[ADMIN] = new_password()
        book.hashes[ADMIN] = hash_password(shown[ADMIN])
        book.rules[ADMIN] = [Rule("readwrite", "#"), Rule("read", "$SYS/#")]
    if not set(book.hashes) - {ADMIN, HEALTH}:
        shown[FIRST_USER] = new_password()
        book.hashes[FIRST_USER] = hash_password(shown[FIRST_USER])
    if result.acl is None and result.passwords is not None:
        notes.append("there were no rules: every user keeps all topics (`launcher acl` narrows that)")
        for name in book.hashes:
            if name not in {ADMIN, HEALTH}:
                book.rules[name] = [Rule("readwrite", "#")]
    if not any(rule.topic == USER_PATTERN for rule in book.patterns):
        book.patterns.append(Rule("readwrite", USER_PATTERN))
    health = new_password()
    book.hashes[HEALTH] = hash_password(health)
    book.rules[HEALTH] = [Rule("deny", f"{HEALTH}/#"), Rule("readwrite", CHECK_TOPIC)]
    return book, shown, health, notes


async def import_folder(folder: Path, directory: StackDir, args: argparse.Namespace, output: Output) -> int:
    """Say what is unsafe, then write the safe equivalent."""
    if directory.exists:
        raise StackError(
            f"there is a stack {args.name!r} already ({directory.path})", advice="import under another --name"
        )
    result = await asyncio.to_thread(read_folder, folder)
    text = _text(result.conf) if result.conf is not None else ""
    findings = brokerconf.read(text).findings if result.conf is not None else []
    unsafe = [*result.unsafe, *(f"{result.conf.name if result.conf else ''}: {one.text}" for one in findings)]
    output.text(f"Read {result.compose}" + (f" and {result.conf}" if result.conf else "; it has no mosquitto.conf"))
    for one in unsafe:
        output.warning(one)
    try:
        token = await asyncio.to_thread(tokens.find, directory=folder, environment={})
    except UsageError as error:
        token = None
        output.warning(f"{error}: `launcher up` will ask for it")
    book, shown, health, notes = merge_accounts(result)
    for note in notes:
        output.progress("broker", note)
    if args.dry_run:
        output.facts("import", unsafe=unsafe, written=False)
        output.text("Nothing was written (--dry-run).")
        return 0
    settings = Settings(name=args.name, engine=args.engine if args.engine not in {None, "auto"} else "")
    settings.data_volume = result.volume or None
    directory.make()
    directory.write_accounts(book)
    directory.write_health(health)
    if token is not None:
        directory.write(directory.token_file, token.text + "\n")
    kept = _keep_database(result, directory)
    directory.save(settings)
    output.facts("import", unsafe=unsafe, written=True, directory=str(directory.path), data=kept)
    output.progress("broker", f"data: {kept}")
    output.users(shown, why="New broker users")
    stop = f"docker compose --project-directory {folder} down"
    output.text(f"\nWritten to {directory.path}. Next, so that the tunnel is not served twice:")
    output.text(f"  {stop}\n  launcher up{'' if args.name == 'tunnel' else ' --name ' + args.name}")
    output.text("Clients without a user have to log in from then on: wss, port 443, one of the users above.")
    return 0


def _keep_database(result: Folder, directory: StackDir) -> str:
    """Copy the broker's database; says what was done."""
    if result.database is not None:
        target = directory.broker / "data"
        with explained(str(target)):
            target.mkdir(mode=0o700, exist_ok=True)
            shutil.copyfile(result.database, target / DATABASE)
            (target / DATABASE).chmod(0o600)
        return f"{result.database} was copied; `launcher up` gives it to the broker"
    if result.volume:
        return f"in the volume {result.volume}, which the new broker uses too"
    return "there is no database: the old broker kept nothing on disk"
