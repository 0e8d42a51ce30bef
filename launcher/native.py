"""A stack as two processes of this machine, kept by a supervisor (supervise.py).

Owns: preparing the directory, starting and stopping the supervisor, reading what it tells.
In: `Wanted`. Out: what `Engine` promises; StackError.
Never: listens on anything but 127.0.0.1; signals a process that it has not recognised by its start time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from launcher import brokerconf, mosquitto, selfcheck, supervise
from launcher.accounts import CHECK_TOPIC
from launcher.brokerconf import ACL_PLUGIN, PASSWORD_PLUGIN, Dialect, Listener, Shape
from launcher.credentials import User
from launcher.errors import HopError
from launcher.identity import Identity
from launcher.processes import child_environment
from launcher.stack import (
    BROKER,
    CONNECTOR,
    SERVICES,
    WS_KEEP_ALIVE,
    WS_SUBPROTOCOL,
    Check,
    LogLine,
    Progress,
    ServiceState,
    Wanted,
    configuration_checks,
    database_check,
    doctor_checks,
    doctor_command,
    last_error,
    proxied_port,
    proxy_option,
)
from launcher.stackdir import Settings, StackDir, StackError, explained

START_SECONDS = 45.0
STOP_SECONDS = supervise.BROKER_GRACE + supervise.CONNECTOR_GRACE + 10.0
FOLLOW_PAUSE = 0.3
DOCTOR_SECONDS = 90.0
INSTALL = "install Mosquitto (Debian, Ubuntu: apt install mosquitto; macOS: brew install mosquitto), or use containers"


def find_dialect() -> tuple[mosquitto.Binary, Dialect]:
    """The Mosquitto of this machine and what it understands; StackError when there is none."""
    try:
        binary = mosquitto.find_mosquitto()
    except HopError as error:
        raise StackError(error.message, advice=INSTALL) from error
    if binary is None:
        raise StackError("Mosquitto is not installed here", advice=INSTALL)
    plugins = ""
    if binary.version >= (2, 1, 0):
        root = Path(binary.path).resolve().parents[1]
        places = [root / "lib", *sorted((root / "lib").glob("*-linux-gnu")), Path("/usr/lib"), Path("/usr/local/lib")]
        for place in places:
            if (place / PASSWORD_PLUGIN).is_file() and (place / ACL_PLUGIN).is_file():
                plugins = str(place)
                break
    return binary, Dialect(binary.version, plugins)


class Native:
    """One stack in one directory."""

    title = "native processes"

    def __init__(self, directory: StackDir, settings: Settings) -> None:
        self.directory = directory
        self.settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    async def close(self) -> None:
        """Nothing is held; a supervisor that we started is init's from now on."""
        if self._process is not None:
            self._process.returncode = self._process.poll() or 0

    # The supervisor.

    def _state(self) -> dict[str, Any]:
        try:
            facts = json.loads((self.directory.path / supervise.STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def _supervisor(self) -> Identity | None:
        facts = self._state()
        try:
            one = Identity(int(facts["pid"]), str(facts["start"]))
        except (KeyError, TypeError, ValueError):
            return None
        return one if one.alive else None

    def _remains(self) -> list[Identity]:
        """Guards and children of the last supervisor that still live."""
        found = []
        for one in self._state().get("services", {}).values():
            for key in ("guard", "process"):
                if isinstance(one.get(key), list):
                    identity = Identity(int(one[key][0]), str(one[key][1]))
                    if identity.alive:
                        found.append(identity)
        return found

    async def up(self, wanted: Wanted, progress: Progress, *, foreground: bool = False) -> Dialect:
        """Start the supervisor (or leave one that runs what is wanted), until the connector is registered."""
        settings = self.settings
        binary, dialect = await asyncio.to_thread(find_dialect)
        progress("engine", f"native processes: {binary} at {binary.path}")
        own = brokerconf.read(wanted.own_config) if wanted.own_config is not None else None
        settings.proxied_port = proxied_port(settings, own, dialect, progress, sends=True)
        self.directory.save(settings)
        plan = await asyncio.to_thread(self._prepare, wanted, binary, dialect)
        running = self._supervisor()
        if running is not None and self._state().get("hash") == plan["hash"]:
            progress(BROKER, "runs as wanted already")
            running.send(signal.SIGHUP)
        else:
            if running is not None:
                progress("engine", "restarting: settings, token or broker changed; the data stays")
                await self._stop(running)
            await self._wait_remains(progress)
            self._check_ports(settings)
            self.directory.write(self.directory.path / supervise.PLAN, json.dumps(plan))
            if foreground:
                progress("engine", "in the foreground; SIGTERM ends it in order")
                os.execv(sys.executable, [sys.executable, "-m", "launcher.supervise", str(self.directory.path)])  # noqa: S606
            await self._spawn()
        await self._wait_broker(progress)
        await self._wait_connector(wanted.wait_seconds, progress)
        return dialect

    def _prepare(self, wanted: Wanted, binary: mosquitto.Binary, dialect: Dialect) -> dict[str, Any]:
        directory, settings = self.directory, self.settings
        root = os.geteuid() == 0
        identity = mosquitto.broker_identity()
        with explained(str(directory.broker)):
            for path in (directory.broker, directory.broker / "data", directory.health, directory.logs):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = wanted.own_config
        if text is None:
            shape = Shape(
                listeners=(
                    Listener(settings.mqtt_port, "mqtt", mosquitto.LOOPBACK),
                    Listener(settings.ws_port, "websockets", mosquitto.LOOPBACK),
                ),
                user="root" if root and identity is None else None,
                written_by="`launcher up`",
                anonymous=settings.allow_anonymous,
                save_each_change=settings.durability == "each",
                proxy_protocol=bool(settings.proxied_port),
            )
            text = brokerconf.configuration(dialect, shape)
        else:
            self.try_configuration(text, binary, dialect)
        directory.write(directory.broker / "mosquitto.conf", text)
        directory.write(directory.token_file, wanted.token)
        if identity is not None:
            with explained(str(directory.broker)):
                for path in (directory.broker, *directory.broker.rglob("*")):
                    os.chown(path, *identity, follow_symlinks=False)
        self._probe_writable(directory.broker / "data")
        metrics = self._state().get("metrics") or mosquitto.free_ports(1)[0]
        connector = [sys.executable, "-m", "connector", "tunnel", "--no-autoupdate"]
        connector += ["--metrics", f"127.0.0.1:{metrics}", "--ws-keepalive", WS_KEEP_ALIVE]
        connector += ["--ws-subprotocols", WS_SUBPROTOCOL]
        if settings.proxied_port:
            connector += ["--proxy-protocol", proxy_option(settings)]
        connector += settings.connector_args
        if settings.connector_ca is not None:
            connector += ["--cacert", settings.connector_ca]
        connector += ["run", "--token-file", str(directory.token_file)]
        plan: dict[str, Any] = {
            "mqtt_port": settings.mqtt_port,
            "metrics": metrics,
            "managed": wanted.own_config is None,
            BROKER: {
                "command": [binary.path, "-c", "mosquitto.conf"],
                "cwd": str(directory.broker),
                "identity": list(identity) if identity is not None else None,
            },
            CONNECTOR: {"command": connector, "cwd": None, "identity": None},
        }
        seal = hashlib.sha256(f"{settings.id}\0{wanted.token}".encode()).hexdigest()
        plan["hash"] = hashlib.sha256((json.dumps(plan, sort_keys=True) + text + seal).encode()).hexdigest()[:32]
        return plan

    def _probe_writable(self, data: Path) -> None:
        """A broker that cannot save starts all the same and forgets everything: find out first."""
        with explained(f"the broker's data directory {data}"):
            descriptor, name = tempfile.mkstemp(prefix=".probe-", dir=data)
            try:
                os.write(descriptor, bytes(65536))
            finally:
                os.close(descriptor)
                os.unlink(name)

    @staticmethod
    def try_configuration(text: str, binary: mosquitto.Binary, dialect: Dialect) -> None:
        """Let the broker read a foreign configuration without harm; StackError with its words when it refuses."""
        if not dialect.modern:
            return  # 2.0 cannot check without listening; the supervisor tells what it says
        lines = [line for line in text.splitlines() if not line.strip().startswith("persistence ")]
        with tempfile.TemporaryDirectory(prefix="broker-candidate-") as folder:
            path = Path(folder) / "mosquitto.conf"
            # Without persistence: 2.1's --test-config saves an empty database over the real one when it ends.
            path.write_text("\n".join(["persistence false", *lines]) + "\n", encoding="utf-8")
            command = [binary.path, "-c", str(path), "--test-config"]
            done = subprocess.run(command, capture_output=True, timeout=30, check=False, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            said = (done.stdout + done.stderr).decode("utf-8", "replace").splitlines()
            errors = [line for line in said if "error" in line.lower()] or said[-2:]
            raise StackError(
                f"Mosquitto {dialect} refuses that configuration: {'; '.join(errors)[:400]}",
                advice="mend the file given with --config; the running broker was not touched",
            )

    @staticmethod
    def _check_ports(settings: Settings) -> None:
        for port, option in ((settings.mqtt_port, "--mqtt-port"), (settings.ws_port, "--ws-port")):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((mosquitto.LOOPBACK, port))
                except OSError as error:
                    raise StackError(
                        f"port {port} of 127.0.0.1 is taken or not allowed: {error.strerror}",
                        advice=f"another broker? (systemctl stop mosquitto); or choose another one with {option}",
                    ) from error

    async def _spawn(self) -> None:
        with explained(str(self.directory.logs)):
            (self.directory.path / supervise.STATE).unlink(missing_ok=True)
            log = (self.directory.logs / "supervisor.log").open("ab")
        with log:
            # Not asyncio's: that kills the child when its loop is closed, and this one has to outlive us.
            self._process = subprocess.Popen(  # noqa: ASYNC220 - returns after the fork
                [sys.executable, "-m", "launcher.supervise", str(self.directory.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=child_environment(),
            )

    async def _wait_broker(self, progress: Progress) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            facts = self._state()
            if facts.get("failure"):
                await self._wait_end()
                raise StackError(
                    str(facts["failure"])[:600],
                    advice="nothing was left running; mend the cause, then run `launcher up` again",
                )
            broker = facts.get("services", {}).get(BROKER, {})
            if broker.get("health") == "healthy":
                progress(BROKER, "healthy: it took a QoS 1 message")
                return
            status = None if self._process is None else self._process.poll()
            if status is not None and not self._state().get("failure"):
                raise StackError(
                    f"the supervisor ended with status {status}",
                    advice=f"see {self.directory.logs / 'supervisor.log'}",
                )
            await asyncio.sleep(0.1)
        raise StackError("the broker was not healthy in time", advice="launcher logs broker")

    async def _wait_end(self) -> None:
        running = self._supervisor()
        if running is not None:
            await asyncio.to_thread(running.wait_gone, STOP_SECONDS)

    async def _wait_connector(self, seconds: float, progress: Progress) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ready = await self.fetch("/ready")
            if isinstance(ready, dict) and ready.get("readyConnections"):
                count = ready["readyConnections"]
                progress(CONNECTOR, f"registered: {count} connection{'s' if count != 1 else ''} to the edge")
                return
            service = self._state().get("services", {}).get(CONNECTOR, {})
            if service.get("restarts", 0) > 1:
                break
            await asyncio.sleep(0.2)
        lines = [line.text async for line in self.logs([CONNECTOR], follow=False, tail=60)]
        why = last_error(lines) or (lines[-1] if lines else "it said nothing")
        service = self._state().get("services", {}).get(CONNECTOR, {})
        if service.get("restarts", 0) > 1:
            running = self._supervisor()
            if running is not None:
                await self._stop(running)
            raise StackError(
                f"the connector ends instead of registering: {why}",
                advice="everything was stopped; mend the cause (a wrong token?), then run `launcher up` again",
            )
        raise StackError(
            f"the connector is not registered after {seconds:.0f} s: {why}",
            advice="both go on running and it keeps trying; watch it with: launcher logs -f connector",
        )

    async def _stop(self, running: Identity) -> None:
        running.send(signal.SIGTERM)
        if not await asyncio.to_thread(running.wait_gone, STOP_SECONDS):
            running.send(signal.SIGKILL)
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)

    async def _wait_remains(self, progress: Progress) -> None:
        """After a supervisor that was killed its guards end the children: wait for that, then insist."""
        remains = self._remains()
        if remains:
            progress("engine", "the last supervisor was killed; waiting for its processes to end")
        for identity in remains:
            if not await asyncio.to_thread(identity.wait_gone, STOP_SECONDS):
                identity.send(signal.SIGKILL)
                await asyncio.to_thread(identity.wait_gone, 5.0)

    async def down(self, progress: Progress, *, volumes: bool = False) -> bool:
        """Stop the supervisor, which stops the connector, then the broker."""
        running = self._supervisor()
        did = running is not None
        if running is not None:
            progress(CONNECTOR, "stopping: it drains first, then the broker saves")
            await self._stop(running)
            progress(BROKER, "gone")
        await self._wait_remains(progress)
        with explained(str(self.directory.path)):
            (self.directory.path / supervise.STATE).unlink(missing_ok=True)
            if volumes:
                for path in (self.directory.broker / "data").glob("*"):
                    path.unlink()
                    did = True
        return did

    async def restart(self, services: Sequence[str], progress: Progress, wait_seconds: float = 60.0) -> None:
        """One service: end it, the supervisor starts it again. Both: the supervisor too, so that the order is kept."""
        running = self._supervisor()
        if running is None:
            raise StackError("nothing runs here", advice="launcher up")
        if set(services) == set(SERVICES):
            progress(CONNECTOR, "stopping: it drains first, then the broker saves")
            await self._stop(running)
            await self._spawn()
            await self._wait_broker(progress)
            await self._wait_connector(wait_seconds, progress)
            return
        for service in (CONNECTOR, BROKER):
            if service not in services:
                continue
            before = self._state().get("services", {}).get(service, {})
            entry = before.get("process")
            if not isinstance(entry, list):
                raise StackError(f"the {service} is not running right now", advice="launcher status")
            progress(service, "restarting" + (": it drains first" if service == CONNECTOR else ": it saves first"))
            identity = Identity(int(entry[0]), str(entry[1]))
            identity.send(signal.SIGTERM)
            if not await asyncio.to_thread(identity.wait_gone, supervise.CONNECTOR_GRACE):
                identity.send(signal.SIGKILL)
            deadline = time.monotonic() + START_SECONDS
            while time.monotonic() < deadline:
                now = self._state().get("services", {}).get(service, {})
                settled = service != BROKER or now.get("health") == "healthy"
                if now.get("process") not in (None, entry) and settled:
                    break
                await asyncio.sleep(0.1)
        if CONNECTOR in services:
            await self._wait_connector(wait_seconds, progress)
        else:
            progress(BROKER, "healthy")

    # Looking at it.

    async def states(self) -> list[ServiceState]:
        """What the supervisor tells; `absent` when it does not run."""
        facts, alive = self._state(), self._supervisor() is not None
        result = []
        for service in SERVICES:
            one = facts.get("services", {}).get(service, {})
            if not alive:
                detail = "the supervisor was killed: launcher up starts all of it again" if facts else ""
                result.append(ServiceState(service, detail=detail if service == BROKER else ""))
                continue
            what = "mosquitto" if service == BROKER else "connector"
            pid = one.get("process", ["?"])[0]
            result.append(
                ServiceState(
                    service,
                    state=str(one.get("state") or "absent"),
                    health=str(one.get("health") or ""),
                    what=f"{what} (process {pid})",
                    restarts=int(one.get("restarts") or 0),
                    since=str(one.get("since") or ""),
                    detail=str(one.get("detail") or ""),
                )
            )
        return result

    async def fetch(self, path: str) -> Any:
        """The connector's answer on its metrics port."""
        facts = self._state()
        if not facts.get("metrics") or self._supervisor() is None:
            return None
        body = await asyncio.to_thread(_get, int(facts["metrics"]), path)
        try:
            return json.loads(body) if body else None
        except ValueError:
            return None

    async def broker_check(self, user: str, password: str, ws: bool, proxied: bool) -> float:
        """A QoS 1 round trip on one of the two listeners."""
        port = self.settings.ws_port if ws else self.settings.mqtt_port
        target = selfcheck.Target(mosquitto.LOOPBACK, port, "/mqtt" if ws else None, proxied=proxied)
        try:
            return await asyncio.to_thread(selfcheck.round_trip, target, User(user, password, ()), CHECK_TOPIC)
        except (HopError, selfcheck.RefusedError) as error:
            raise StackError(f"{target.url}: {error}", advice="see: launcher logs broker") from error

    async def connector_doctor(self, url: str | None) -> list[Check]:
        """As another process beside the connector."""
        program = [sys.executable, "-m", "connector"]
        token, ca = str(self.directory.token_file), self.settings.connector_ca
        command = doctor_command(program, self.settings, token, ca, url)
        try:
            done = await asyncio.to_thread(
                subprocess.run,
                command,
                capture_output=True,
                timeout=DOCTOR_SECONDS,
                check=False,
                stdin=subprocess.DEVNULL,
                env=child_environment(),
            )
        except (OSError, subprocess.TimeoutExpired):
            return []
        return doctor_checks(done.stdout.decode("utf-8", "replace"))

    async def examine(self) -> list[Check]:
        """The broker's program, its data directory, its listeners, its configuration."""
        checks: list[Check] = []
        try:
            binary, dialect = await asyncio.to_thread(find_dialect)
            plugins = f", file plugins in {dialect.plugins}" if dialect.plugins else ""
            checks.append(Check("engine", True, f"{binary} at {binary.path}{plugins}"))
        except StackError as error:
            checks.append(Check("engine", False, str(error), error.advice))
        running = self._supervisor()
        good = running is not None
        checks.append(Check("supervisor", good, f"process {running.pid}" if running else "not running", "launcher up"))
        try:
            await asyncio.to_thread(self._probe_writable, self.directory.broker / "data")
            checks.append(Check("volume", True, f"{self.directory.broker / 'data'} can be written"))
        except StackError as error:
            checks.append(Check("volume", False, str(error), error.advice))
        if self.settings.own_config is None:
            database = self.directory.broker / "data" / "mosquitto.db"
            size = database.stat().st_size if database.is_file() else 0
            checks.append(database_check(size, self.settings))
        for port in (self.settings.mqtt_port, self.settings.ws_port):
            if good and await asyncio.to_thread(mosquitto.open_to_others, port):
                text = f"port {port} answers on other addresses of this machine too"
                checks.append(Check("ports", False, text, "another program has it, or --config opens it"))
        with contextlib.suppress(OSError):
            text = (self.directory.broker / "mosquitto.conf").read_text(encoding="utf-8")
            checks += configuration_checks(text)
        return checks

    async def reload(self, passwords: str, acl: str, health_password: str) -> None:
        """New files, SIGHUP, a check; the old files and a restart when the broker does not take them."""
        directory = self.directory
        names = ("passwords", "acl")
        before = {name: (directory.broker / name).read_text(encoding="utf-8") for name in names}
        old_health = directory.health_password()
        for name, text in zip(names, (passwords, acl), strict=True):
            directory.write(directory.broker / name, text)
        if health_password != old_health:
            directory.write_health(health_password)
        running = self._supervisor()
        if running is None:
            return
        running.send(signal.SIGHUP)
        why = ""
        for _ in range(5):
            try:
                from launcher.accounts import HEALTH  # noqa: PLC0415

                await self.broker_check(HEALTH, health_password, False, False)
                return
            except StackError as error:
                why = str(error)
                await asyncio.sleep(0.3)
        for name, text in before.items():
            directory.write(directory.broker / name, text)
        directory.write_health(old_health)
        with contextlib.suppress(StackError):
            await self.restart([BROKER], lambda _service, _text: None)
        raise StackError(f"the broker did not take the change: {why}", advice="it has its old users and rules again")

    async def logs(self, services: Sequence[str], *, follow: bool, tail: int) -> AsyncIterator[LogLine]:
        """Lines of the log files, sorted by time; then what is appended."""
        paths = {service: self.directory.logs / f"{service}.log" for service in services}
        lines: list[LogLine] = []
        places: dict[str, tuple[int, int]] = {}
        for service, path in paths.items():
            new, places[service] = _read_from(path, (0, 0))
            lines += [_log_line(service, raw) for raw in new[-tail:]]
        for line in sorted(lines, key=lambda line: line.time):
            yield line
        while follow:
            await asyncio.sleep(FOLLOW_PAUSE)  # two files of which anything may be appended or replaced
            lines = []
            for service, path in paths.items():
                new, places[service] = _read_from(path, places[service])
                lines += [_log_line(service, raw) for raw in new]
            for line in sorted(lines, key=lambda line: line.time):
                yield line


def _read_from(path: Path, place: tuple[int, int]) -> tuple[list[str], tuple[int, int]]:
    """Whole lines behind `place` (inode, offset), and the new place; from the start of a file that was replaced."""
    inode, offset = place
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != inode or status.st_size < offset:
                offset = 0
            file.seek(offset)
            data = file.read()
            whole = data.rfind(b"\n") + 1
            lines = data[:whole].decode("utf-8", "replace").splitlines()
            return lines, (status.st_ino, offset + whole)
    except OSError:
        return [], place


STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\S+Z) (.*)$")


def _log_line(service: str, raw: str) -> LogLine:
    found = STAMP.match(raw)
    return LogLine(service, found[1], found[2]) if found else LogLine(service, "", raw)


def _get(port: int, path: str) -> str | None:
    connection = http.client.HTTPConnection(mosquitto.LOOPBACK, port, timeout=3)
    try:
        connection.request("GET", path)
        return connection.getresponse().read(1_048_576).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
