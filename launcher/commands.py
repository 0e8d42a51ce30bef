"""The commands on a stack: up, down, status, logs, restart, config, user, acl.

Owns: what each command does with directory, engine and output; the questions it asks.
In: parsed arguments. Out: an exit status; StackError and UsageError for the command line to print.
Never: knows how an engine works.
"""

from __future__ import annotations

import argparse
import asyncio
import getpass
import json
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from launcher import brokerconf, tokens
from launcher.accounts import ACCESS, HEALTH, Accounts, check_name, topics_of
from launcher.containerspec import broker_conf
from launcher.credentials import new_password
from launcher.errors import UsageError
from launcher.output import Output, rows_of
from launcher.stack import SERVICES, Engine, Wanted, collect, origin_of, proxied_port
from launcher.stackdir import Settings, StackDir, StackError, default_directory, explained
from launcher.stackdir import check_name as check_stack_name

Command = Callable[[argparse.Namespace, Output], Coroutine[Any, Any, int]]


def directory_of(args: argparse.Namespace) -> StackDir:
    """The stack's directory: --state-dir, or the one of its name."""
    name = check_stack_name(args.name)
    return StackDir(Path(args.state_dir).absolute() if args.state_dir else default_directory(name))


async def open_engine(kind: str, settings: Settings, directory: StackDir) -> Engine:
    """The engine of that name; `auto` takes the first that works and tells in the error what the others said."""
    from launcher.native import Native, find_dialect  # noqa: PLC0415

    if kind == "native":
        settings.engine = kind
        return Native(directory, settings)
    if kind in {"docker", "podman"}:
        from launcher.containers import Containers  # noqa: PLC0415

        settings.engine = kind
        return await Containers.open("podman" if kind == "podman" else "docker", settings)
    reasons = []
    for candidate in ("docker", "podman"):
        try:
            return await open_engine(candidate, settings, directory)
        except StackError as error:
            reasons.append(str(error))
    try:
        await asyncio.to_thread(find_dialect)
    except StackError as error:
        reasons.append(str(error))
        raise StackError(f"nothing to run a stack with: {'; '.join(reasons)}", advice=error.advice) from error
    return await open_engine("native", settings, directory)


async def engine_of(directory: StackDir) -> tuple[Engine, Settings]:
    """The engine of an existing stack."""
    settings = directory.load()
    return await open_engine(settings.engine or "auto", settings, directory), settings


# up


async def up(args: argparse.Namespace, output: Output) -> int:
    """Make the stack, or bring the one that is there to what is wanted."""
    directory = directory_of(args)
    shown: dict[str, str] = {}
    with directory.changing("up"):
        known = directory.exists
        settings = directory.load() if known else Settings(name=args.name)
        before = settings.engine
        engine = await open_engine(args.engine or settings.engine or "auto", settings, directory)
        try:
            if known and before and settings.engine != before:
                await _leave(before, directory, settings, output)
            adopted = False
            if not known and settings.engine != "native":
                adopted = await _adopt(engine, directory, settings, output)
            _choose(args, settings)
            own = _own_config(settings, output)
            _confirm_anonymous(args, settings, own, output)
            token = await _token(args, directory, output)
            if not (directory.broker / "passwords").is_file():
                book, shown = Accounts.first_run()
                directory.write_health(shown.pop(HEALTH))
                directory.write_accounts(book)
            book = directory.accounts()
            _anonymous_rules(book, settings.allow_anonymous)
            directory.write_accounts(book)
            directory.write(directory.token_file, token.text)
            directory.save(settings)
            wanted = Wanted(
                settings=settings,
                token=token.text,
                passwords=book.passwords_text(),
                acl=book.acl_text(),
                health_password=directory.health_password(),
                own_config=own,
                connector_ca=_ca(settings),
                database=_database(directory, settings),
                wait_seconds=args.timeout,
            )
            output.progress("engine", f"tunnel {token.tunnel}, token from {token.source}" + (" (adopted)" * adopted))
            if args.foreground:
                from launcher.native import Native  # noqa: PLC0415

                if not isinstance(engine, Native):
                    raise UsageError("--foreground is for native processes", advice="containers run by themselves")
                if shown:
                    output.users(shown, why="Broker users")
                    shown = {}
                await engine.up(wanted, output.progress, foreground=True)
            try:
                await engine.up(wanted, output.progress)
            finally:
                directory.save(settings)  # with what `up` found out
            state = await collect(engine, settings, str(directory.path))
        finally:
            if shown:
                output.users(shown, why="Broker users")
            await engine.close()
    output.text()
    output.status(state)
    if not output.as_json:
        if not state.hostnames:
            output.text(
                f"\nOn the tunnel's Public Hostname tab: service HTTP, URL {origin_of(settings).partition('//')[2]}"
            )
        output.text("\nClients: wss on port 443, path /mqtt, sub-protocol mqtt. `launcher doctor` checks it all and")
        output.text("prints lines to paste; `launcher user add NAME` makes more users.")
    return 0


def _choose(args: argparse.Namespace, settings: Settings) -> None:
    """What the command line says replaces what was chosen before; the rest stays."""
    for option in (
        "broker_image", "connector_image", "hostname", "mqtt_port", "ws_port", "durability", "proxy_protocol",
    ):  # fmt: skip
        value = getattr(args, option)
        if value is not None:
            setattr(settings, option, value)
    if args.config is not None:
        settings.own_config = None if args.config == "" else str(Path(args.config).absolute())
    if args.edge is not None or args.connector_arg is not None or args.cacert is not None:
        words = list(args.connector_arg or [])
        for address in args.edge or []:
            words += ["--edge", address]
        settings.connector_args = words
        settings.connector_ca = str(Path(args.cacert).absolute()) if args.cacert else None


def _own_config(settings: Settings, output: Output) -> str | None:
    if settings.own_config is None:
        return None
    with explained(f"--config {settings.own_config}"):
        text = Path(settings.own_config).read_text(encoding="utf-8")
    for finding in brokerconf.read(text).findings:
        output.warning(f"{settings.own_config}: {finding.text}", severity=finding.severity)
    return text


def _confirm_anonymous(args: argparse.Namespace, settings: Settings, own: str | None, output: Output) -> None:
    """Twice over: the flag, and a prompt or --yes. Without it an open broker is refused."""
    if args.allow_anonymous is False:
        settings.allow_anonymous = False
    opened = args.allow_anonymous or (own is not None and brokerconf.read(own).open)
    if not opened:
        if own is None and settings.allow_anonymous:
            output.warning("the broker is open to everyone (launcher up --no-allow-anonymous closes it)")
        return
    if not args.allow_anonymous and not settings.allow_anonymous:
        raise StackError(
            f"{settings.own_config} lets everybody in who knows the host name",
            advice="set allow_anonymous false and a password_file there; or say so twice: --allow-anonymous and --yes",
        )
    if settings.allow_anonymous:
        return
    if not args.yes:
        if not sys.stdin.isatty() or output.as_json:
            raise StackError(
                "--allow-anonymous opens the broker to everybody who knows the host name",
                advice="if that is meant, say it twice: --allow-anonymous --yes",
            )
        output.text("The host name of a tunnel is public: everybody will be able to read and write every topic.")
        if input("Type `open` to go on: ").strip() != "open":
            raise StackError("not opened", advice="without --allow-anonymous the broker asks for passwords")
    settings.allow_anonymous = True


def _anonymous_rules(book: Accounts, allowed: bool) -> None:
    from launcher.accounts import Rule  # noqa: PLC0415

    book.anonymous = [Rule("readwrite", "#")] if allowed else []


async def _token(args: argparse.Namespace, directory: StackDir, output: Output) -> tokens.Token:
    asked = sys.stdin.isatty() and not output.as_json
    return await asyncio.to_thread(
        tokens.find,
        token=args.token,
        token_file=args.token_file,
        directory=Path.cwd(),
        kept=directory.token_file,
        prompt=(lambda: getpass.getpass("Tunnel token (not shown): ")) if asked else None,
        warn=output.warning,
    )


def _ca(settings: Settings) -> str | None:
    if settings.connector_ca is None:
        return None
    with explained(f"--cacert {settings.connector_ca}"):
        return Path(settings.connector_ca).read_text(encoding="utf-8")


def _database(directory: StackDir, settings: Settings) -> bytes | None:
    """The database that `import` left for a container; native brokers have it in place."""
    path = directory.broker / "data" / "mosquitto.db"
    if settings.engine == "native" or not path.is_file():
        return None
    with explained(str(path)):
        return path.read_bytes()


async def _adopt(engine: Engine, directory: StackDir, settings: Settings, output: Output) -> bool:
    """Take over a stack of this name that lost its directory (or was made on another machine)."""
    from launcher.containers import Containers  # noqa: PLC0415

    if not isinstance(engine, Containers):
        return False
    facts = await engine.existing()
    if facts is None or facts.get("name") != settings.name:
        return False
    for key, value in facts.items():
        if key != "engine" and hasattr(settings, key):
            setattr(settings, key, value)
    files = await engine.stored_files()
    output.progress("engine", f"found a stack {settings.name!r} without its directory: taking it over")
    if all(name in files for name in ("passwords", "acl", "health/password")):
        directory.write(directory.broker / "passwords", files["passwords"])
        directory.write(directory.broker / "acl", files["acl"])
        directory.write_health(files["health/password"])
    if files.get("token"):
        directory.write(directory.token_file, files["token"])
    return True


async def _leave(before: str, directory: StackDir, settings: Settings, output: Output) -> None:
    """The stack moves to another engine: end it on the old one first, or both would serve the tunnel."""
    now = settings.engine
    output.progress("engine", f"moving from {before} to {now}; the broker's data stays with {before}")
    try:
        old = await open_engine(before, settings, directory)
    except StackError as error:
        output.warning(f"{before} cannot be asked whether the stack still runs there: {error}")
        return
    finally:
        settings.engine = now
    try:
        await old.down(output.progress)
    finally:
        await old.close()
        settings.engine = now


# down, status, logs, restart


async def down(args: argparse.Namespace, output: Output) -> int:
    """Stop and remove both services; data stays unless --volumes."""
    directory = directory_of(args)
    settings = directory.load()
    if args.volumes and not args.yes:
        if not sys.stdin.isatty() or output.as_json:
            raise StackError("--volumes deletes every retained message and session", advice="say it twice: --yes")
        question = "This deletes every retained message and session. Type `delete`: "
        if (await asyncio.to_thread(input, question)).strip() != "delete":
            raise StackError("nothing was deleted", advice="the data is as it was")
    with directory.changing("down"):
        engine = await open_engine(settings.engine or "auto", settings, directory)
        try:
            did = await engine.down(output.progress, volumes=args.volumes)
        finally:
            await engine.close()
    output.facts("down", changed=did)
    kept = "with the same users; its data was deleted" if args.volumes else "with the same data"
    output.text(f"Stopped; `launcher up` starts it again {kept}." if did else "Nothing was running.")
    return 0


async def status(args: argparse.Namespace, output: Output) -> int:
    """One table; exit status 0 when everything works."""
    directory = directory_of(args)
    engine, settings = await engine_of(directory)
    try:
        state = await collect(engine, settings, str(directory.path))
    finally:
        await engine.close()
    output.status(state)
    return 0 if state.up else 1


async def logs(args: argparse.Namespace, output: Output) -> int:
    """Lines of both services."""
    directory = directory_of(args)
    engine, _ = await engine_of(directory)
    try:
        async for line in engine.logs(args.services or SERVICES, follow=args.follow, tail=args.tail):
            output.log(line)
    except asyncio.CancelledError:
        if not args.follow:
            raise
        ended()  # that is how one ends `logs -f`
    finally:
        await engine.close()
    return 0


async def restart(args: argparse.Namespace, output: Output) -> int:
    """Stop in order, start in order."""
    directory = directory_of(args)
    with directory.changing("restart"):
        engine, _ = await engine_of(directory)
        try:
            await engine.restart(args.services or SERVICES, output.progress, args.timeout)
        finally:
            await engine.close()
    output.facts("restarted")
    return 0


async def config(args: argparse.Namespace, output: Output) -> int:
    """What would run: settings, mosquitto.conf, and the same as compose YAML."""
    from launcher.composefile import compose_text  # noqa: PLC0415

    directory = directory_of(args)
    settings = directory.load() if directory.exists else Settings(name=args.name, engine="docker")
    own = tokens.read_file(Path(settings.own_config)) if settings.own_config else None
    dialect = brokerconf.Dialect(tuple(args.dialect), args.plugins or "")
    if not directory.exists:
        settings.proxied_port = proxied_port(settings, None, dialect, output.progress, sends=True)
    if args.compose:
        print(compose_text(settings, brokerconf.read(own) if own is not None else None), end="")
        return 0
    text = own if own is not None else broker_conf(dialect, settings)
    if args.broker:
        print(text, end="")
        return 0
    facts = {
        "directory": str(directory.path),
        "settings": {key: getattr(settings, key) for key in settings.__slots__},
        "origin": origin_of(settings),
        "mosquitto.conf": text,
    }
    if output.as_json:
        output.facts("config", **facts)
        return 0
    print(json.dumps(facts["settings"], indent=2))
    output.text(f"# rule of the tunnel: service {origin_of(settings)}")
    output.text("# mosquitto.conf (alone: --broker; as compose YAML: --compose)")
    output.text(text.rstrip())
    return 0


def ended() -> None:
    """The user's Ctrl-C was the way to end this: no failure."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()


# user and acl


async def _apply(directory: StackDir, book: Accounts, health: str, output: Output) -> None:
    """Give the broker the change first; keep it only when the broker took it."""
    engine, _ = await engine_of(directory)
    try:
        await engine.reload(book.passwords_text(), book.acl_text(), health)
    finally:
        await engine.close()
    directory.write_accounts(book)
    if health != directory.health_password():
        directory.write_health(health)


def _password(args: argparse.Namespace, output: Output) -> tuple[str, bool]:
    """(password, whether a person chose it): --random, --password-file (- is standard input), or a prompt."""
    if args.password_file is not None:
        text = sys.stdin.readline() if args.password_file == "-" else tokens.read_file(Path(args.password_file))  # noqa: S105
        return text.rstrip("\r\n"), True
    if args.random or not sys.stdin.isatty() or output.as_json:
        return new_password(), False
    first = getpass.getpass("Password (empty: a random one): ")
    if not first:
        return new_password(), False
    if getpass.getpass("Once more: ") != first:
        raise StackError("the two passwords differ", advice="run the command again")
    return first, True


async def user(args: argparse.Namespace, output: Output) -> int:
    """add, passwd, remove, list."""
    directory = directory_of(args)
    if args.action == "list":
        book = directory.accounts()
        if output.as_json:
            output.facts("users", users=[{"name": name, "may": list(topics_of(book, name))} for name in book.hashes])
        else:
            for line in rows_of([(name, "; ".join(topics_of(book, name))) for name in book.hashes]):
                output.text(line)
        return 0
    with directory.changing(f"user {args.action}"):
        book, health = directory.accounts(), directory.health_password()
        password, typed = "", False
        try:
            if args.action == "remove":
                book.remove(args.user)
            else:
                if args.action == "add":
                    check_name(args.user)
                    if args.user in book.hashes:
                        raise ValueError(f"there is a user {args.user!r} already (launcher user passwd {args.user})")
                else:
                    book.known(args.user)
                password, typed = (new_password(), False) if args.user == HEALTH else _password(args, output)
                book.set_password(args.user, password, typed=typed)
                if args.user == HEALTH:
                    health = password
        except ValueError as error:
            raise StackError(str(error), advice="launcher user --help; launcher user list") from error
        await _apply(directory, book, health, output)
    if password and not typed and args.user != HEALTH:
        output.users({args.user: password}, why="Its password")
    output.facts("changed", user=args.user, action=args.action)
    output.text(f"{args.user}: {'; '.join(topics_of(book, args.user)) if args.action != 'remove' else 'removed'}")
    return 0


async def acl(args: argparse.Namespace, output: Output) -> int:
    """list, check, allow, deny, remove."""
    directory = directory_of(args)
    if args.action in {"list", "check"}:
        book = directory.accounts()
        if args.action == "check":
            book_known(book, args.user)
            allowed, why = book.decide(args.user, args.verb, args.topic)
            output.facts("acl", user=args.user, verb=args.verb, topic=args.topic, allowed=allowed, rule=why)
            output.text(f"{'allowed' if allowed else 'refused'}: {why}")
            return 0 if allowed else 1
        rows = [(name, rule.access, rule.topic) for name, rules in book.rules.items() for rule in rules]
        rows += [("(everyone)", rule.access, rule.topic) for rule in book.patterns]
        rows += [("(anonymous)", rule.access, rule.topic) for rule in book.anonymous]
        if output.as_json:
            output.facts(
                "acl", rules=[{"user": user, "access": access, "topic": topic} for user, access, topic in rows]
            )
        else:
            for line in rows_of(rows):
                output.text(line)
        return 0
    with directory.changing(f"acl {args.action}"):
        book = directory.accounts()
        try:
            if args.action == "remove":
                book.revoke(args.user, args.topic)
            else:
                access = "deny" if args.action == "deny" else args.access
                assert access in ACCESS
                if not book.grant(args.user, access, args.topic):
                    output.text("it is so already")
        except ValueError as error:
            raise StackError(str(error), advice="launcher acl --help; launcher acl list") from error
        await _apply(directory, book, directory.health_password(), output)
    output.facts("changed", user=args.user, action=args.action, topic=args.topic)
    output.text(f"{args.user}: {'; '.join(topics_of(book, args.user))}")
    return 0


def book_known(book: Accounts, name: str) -> None:
    """StackError when there is no such user."""
    try:
        book.known(name)
    except ValueError as error:
        raise StackError(str(error), advice="launcher user list") from error


async def doctor(args: argparse.Namespace, output: Output) -> int:
    """Everything from the engine to the public host name; the first failure decides the exit status."""
    from launcher.doctor import examine  # noqa: PLC0415

    directory = directory_of(args)
    engine, settings = await engine_of(directory)
    try:
        return await examine(engine, settings, directory, output, hostname=args.hostname, cafile=args.cafile)
    finally:
        await engine.close()


async def import_(args: argparse.Namespace, output: Output) -> int:
    """Read a seed's folder, say what is unsafe, write the safe equivalent."""
    from launcher.importer import import_folder  # noqa: PLC0415

    directory = directory_of(args)
    with directory.changing("import"):
        return await import_folder(Path(args.path), directory, args, output)
