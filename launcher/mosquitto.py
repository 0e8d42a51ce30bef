"""Mosquitto 2.0 and 2.1 with a safe generated configuration.

Owns: finding the binary, its version, the configuration in its dialect, ports, the broker's log lines.
In: a private directory, users. Out: a running broker with two listeners on 127.0.0.1, `Broker`.
Never: listens elsewhere, allows anonymous clients, writes a password (only its hash), runs as root where it need not.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import brokerconf, credentials
from launcher.errors import HopError
from launcher.processes import Child, LineCallback

HOP = "broker"
LOOPBACK = "127.0.0.1"
SEARCH = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/opt/homebrew/bin", "/usr/local/bin")
ADDRESS_TRIES = 5
"""Mosquitto cannot pick a port itself, so a free one may be taken before it binds: try others."""

INSTALL_ADVICE = (
    "install Mosquitto (Debian, Ubuntu: apt install mosquitto; macOS: brew install mosquitto), or use --broker embedded"
)


@dataclass(frozen=True, slots=True)
class Binary:
    """One Mosquitto executable and what it says it is."""

    path: str
    version: tuple[int, int, int]

    def __str__(self) -> str:
        return "Mosquitto " + ".".join(map(str, self.version))


@dataclass(slots=True)
class Broker:
    """A running broker: its child, its two ports on 127.0.0.1, and a name for people."""

    child: Child
    mqtt_port: int
    ws_port: int
    title: str
    mqtt5: bool = True
    proxied: bool = False
    """Its WebSocket listener wants a PROXY header, which brings it the eyeball's address."""


Ready = Callable[[Broker], Coroutine[Any, Any, None]]


def find_program(name: str, search_path: str | None = None) -> str | None:
    """Path of `name` in PATH or where distributions hide daemons."""
    path = os.environ.get("PATH", "") if search_path is None else search_path
    return shutil.which(name, path=os.pathsep.join([path, *SEARCH] if search_path is None else [path]))


def program_version(path: str) -> tuple[int, int, int] | None:
    """The version in the program's own help text, or None when it does not run or is something else."""
    help_flag = "-h" if Path(path).name == "mosquitto" else "--help"
    try:
        done = subprocess.run([path, help_flag], capture_output=True, timeout=10, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(rb"version (\d+)\.(\d+)\.(\d+)", done.stdout + done.stderr)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def find_mosquitto(path: str | None = None) -> Binary | None:
    """The broker to run, or None when there is none; raises HopError when there is one that cannot be used."""
    found = path or find_program("mosquitto")
    if found is None:
        return None
    version = program_version(found)
    if version is None:
        raise HopError(HOP, f"{found} does not tell its version", advice=INSTALL_ADVICE)
    if version < (2, 0, 0):
        text = ".".join(map(str, version))
        raise HopError(HOP, f"Mosquitto {text} at {found} is too old: 2.0 is needed", advice=INSTALL_ADVICE)
    return Binary(found, version)


def broker_identity() -> tuple[int, int] | None:
    """The (uid, gid) a broker started by root should have; None when we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("mosquitto", "_mosquitto", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return entry.pw_uid, entry.pw_gid
    return None


def configuration(
    version: tuple[int, int, int], mqtt_port: int, ws_port: int, *, user: str | None = None, proxied: bool = False
) -> str:
    """Text of the demo's mosquitto.conf in the dialect of `version`; paths are relative to the broker's directory."""
    shape = brokerconf.Shape(
        listeners=(
            brokerconf.Listener(mqtt_port, "mqtt", LOOPBACK),
            brokerconf.Listener(ws_port, "websockets", LOOPBACK),
        ),
        user=user,
        written_by="`launcher demo`",
        proxy_protocol=proxied,
        debug=True,  # tells about single messages (topic and size, never the payload)
    )
    return brokerconf.configuration(brokerconf.Dialect(version), shape)


def write_private(path: Path, text: str, identity: tuple[int, int] | None = None) -> None:
    """Replace `path` by a new file that only its owner can read."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        if identity is not None:
            os.fchown(descriptor, *identity)
        file.write(text)


def prepare_directory(
    directory: Path, users: Sequence[credentials.User], identity: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Write users and rules; return the identity that could be given the files (None: keep our own).

    The broker is started inside `directory` and all its paths are relative, so that it can run as another user
    below a directory that only we can enter.
    """
    for path in (directory, directory / "data"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        if identity is not None:
            try:
                os.chown(path, *identity, follow_symlinks=False)
            except OSError:  # a user namespace that maps root only
                identity = None
    write_private(directory / "passwords", credentials.password_file(users), identity)
    write_private(directory / "acl", credentials.acl_file(users), identity)
    return identity


def free_ports(count: int) -> list[int]:
    """Distinct ports on 127.0.0.1 that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def address_in_use(lines: Sequence[str]) -> bool:
    """Whether a broker that ended was only unlucky with a port."""
    text = "\n".join(lines).lower()
    return (
        "address already in use" in text or "address in use" in text or "unable to create websockets listener" in text
    )


async def start(
    directory: Path,
    users: Sequence[credentials.User],
    binary: Binary,
    *,
    on_line: LineCallback | None,
    ready: Ready,
    ports: Callable[[int], list[int]] = free_ports,
    proxied: bool = False,
) -> Broker:
    """Start Mosquitto and wait until `await ready(broker)` returns; new ports when the chosen ones were taken."""
    wanted = broker_identity()
    identity = prepare_directory(directory, users, wanted)
    user = "root" if identity is None and os.geteuid() == 0 else None

    async def attempt(mqtt_port: int, ws_port: int) -> Child:
        text = configuration(binary.version, mqtt_port, ws_port, user=user, proxied=proxied)
        write_private(directory / "mosquitto.conf", text, identity)
        command = [binary.path, "-c", "mosquitto.conf"]
        return await Child.start("broker", command, on_line=on_line, cwd=directory, identity=identity)

    return await start_with_ports(attempt, str(binary), ready, ports=ports, proxied=proxied)


async def start_embedded(
    directory: Path,
    users: Sequence[credentials.User],
    *,
    on_line: LineCallback | None,
    ready: Ready,
    ports: Callable[[int], list[int]] = free_ports,
) -> Broker:
    """Start the stand-in broker (`python -m launcher.embedded`) with the same users; MQTT 3.1.1 only."""
    prepare_directory(directory, users, None)

    async def attempt(mqtt_port: int, ws_port: int) -> Child:
        command = [sys.executable, "-m", "launcher.embedded", str(directory), str(mqtt_port), str(ws_port)]
        return await Child.start("broker", command, on_line=on_line)

    return await start_with_ports(attempt, "amqtt (embedded)", ready, ports=ports, mqtt5=False)


async def start_with_ports(
    attempt: Callable[[int, int], Awaitable[Child]],
    title: str,
    ready: Ready,
    *,
    ports: Callable[[int], list[int]] = free_ports,
    mqtt5: bool = True,
    proxied: bool = False,
) -> Broker:
    """Run `attempt` with fresh ports until its child is ready, or ends for another reason than a taken port."""
    for _ in range(ADDRESS_TRIES):
        mqtt_port, ws_port = ports(2)
        child = await attempt(mqtt_port, ws_port)
        broker = Broker(child, mqtt_port, ws_port, title, mqtt5, proxied)
        waiting = asyncio.create_task(ready(broker), name="broker readiness")
        try:
            await asyncio.wait({waiting, child.exited}, return_when=asyncio.FIRST_COMPLETED)
            if not child.exited.done():
                waiting.result()
                return broker
        except BaseException:
            await child.stop()
            raise
        finally:
            if not waiting.done():
                waiting.cancel()
            await asyncio.wait({waiting})
        if not address_in_use(child.tail):
            raise HopError(HOP, f"{title} ended at once: {child.describe_end()}", tail=child.tail)
    raise HopError(
        HOP,
        f"{title} found its ports taken {ADDRESS_TRIES} times in a row",
        advice="something on this machine takes ports of 127.0.0.1 faster than a broker starts; try again",
        tail=child.tail,
    )


def open_to_others(port: int) -> bool:
    """Whether `port` also answers on an address of this machine that others can reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; the kernel picks the address it would use (RFC 5737)
        except OSError:
            return False  # no route anywhere
        address = probe.getsockname()[0]
    if address.startswith("127."):
        return False
    try:
        with socket.create_connection((address, port), timeout=1.0):
            return True
    except OSError:
        return False
