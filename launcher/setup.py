"""The broker's files for a stack that the launcher does not run: `python -m launcher.setup DIRECTORY` (compose, init
containers).

Owns: making mosquitto.conf, users, rules and health check files in a directory once; showing the first passwords once.
In: the directory (a volume), actions `make`, `show`, `add NAME`; `token` (another volume).
Out: files; exit status 0, or 1 with one line.
Never: changes users that are there already; prints a password into a log.

The configuration is the one of 2.0, which 2.1 takes too: here nobody can ask the broker for its version.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from launcher import brokerconf, credentials
from launcher.accounts import FIRST_USER, HEALTH, Accounts
from launcher.brokerconf import Dialect, Listener, Shape
from launcher.errors import UsageError
from launcher.stackdir import StackDir, StackError
from launcher.tokens import VARIABLES, check

FIRST = "first-passwords"
PORTABLE = Dialect((2, 0, 11))


class BrokerDirectory(StackDir):
    """A directory that holds the broker's files and nothing else."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.broker = path
        self.health = path / "health"


def make(directory: BrokerDirectory, data: str) -> str:
    """Write what is missing; says what was done."""
    directory.health.mkdir(mode=0o700, parents=True, exist_ok=True)
    shape = Shape(
        listeners=(Listener(1883), Listener(9001, "websockets")),
        directory=f"{directory.path}/",
        data=data,
        written_by="`launcher.setup`",
        save_each_change=True,
    )
    directory.write(directory.path / "mosquitto.conf", brokerconf.configuration(PORTABLE, shape))
    if (directory.path / "passwords").is_file():
        directory.accounts()
        return "the users and rules that were there are kept"
    book, shown = Accounts.first_run()
    directory.write_health(shown.pop(HEALTH))
    directory.write(directory.path / FIRST, "".join(f"{name} {password}\n" for name, password in shown.items()))
    directory.write_accounts(book)
    return (
        f"made the users {' and '.join(shown)}; their passwords are shown once by: docker compose run --rm setup show"
    )


def show(directory: BrokerDirectory) -> str:
    """The first passwords, and their end."""
    path = directory.path / FIRST
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        if not (directory.path / "passwords").is_file():
            raise StackError("there are no users yet", advice="start it first: docker compose up -d") from None
        raise StackError(
            "the first passwords were shown already",
            advice="make another user: docker compose run --rm setup add NAME",
        ) from None
    path.unlink()
    return text.rstrip()


def add(directory: BrokerDirectory, name: str) -> str:
    """One more user, or a new password for one that is there."""
    book = directory.accounts()
    password = credentials.new_password()
    try:
        book.set_password(name, password, typed=False)
    except ValueError as error:
        raise StackError(str(error)) from error
    directory.write_accounts(book)
    return f"{name} {password}\nThe broker reads it after: docker compose exec mosquitto sh -c 'kill -HUP 1'"


def keep_token(path: Path) -> str:
    """Write the token of the environment to the file."""
    name = next((name for name in VARIABLES if os.environ.get(name)), VARIABLES[-1])
    token = check(os.environ.get(name, ""), name)
    StackDir(path.parent).write(path, token.text + "\n", mode=0o400)
    return f"token of tunnel {token.tunnel}"


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="launcher.setup", description="The broker's files, in a directory.")
    parser.add_argument("--directory", type=Path, default=Path("/mosquitto/config"))
    parser.add_argument("--data", default="/mosquitto/data/", help="the broker's data, as it sees it")
    parser.add_argument("action", nargs="?", choices=("make", "show", "add", "token"), default="make")
    parser.add_argument("--token-file", type=Path, default=Path("/etc/connector/token"))
    parser.add_argument("user", nargs="?", default=FIRST_USER)
    args = parser.parse_args(argv)
    directory = BrokerDirectory(args.directory)
    try:
        if args.action == "make":
            print(make(directory, args.data))
        elif args.action == "token":
            print(keep_token(args.token_file))
        elif args.action == "show":
            print(show(directory))
        else:
            print(add(directory, args.user))
    except (StackError, UsageError) as error:
        print(f"setup: {error}" + (f"\n  what to do: {error.advice}" if error.advice else ""), file=sys.stderr)
        return 1
    except OSError as error:
        print(f"setup: {args.directory} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
