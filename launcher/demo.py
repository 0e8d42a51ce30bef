"""The demo: broker, dev edge and connector as child processes, checked end to end, then watched.

Owns: the order of the start, who is waited for on what, the directory with everything in it, the end.
In: `Options`, a `Console`. Out: an exit status; HopError inside, told by the console.
Never: imports `connector` (it runs as `python -m connector`); leaves a child behind (see guard.py).

Reading order: `run` (signals, exit status), `_up` (the start), `_watch` (the live view), `_down`.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from launcher import clients, mosquitto, selfcheck
from launcher.credentials import User, new_password
from launcher.errors import HopError
from launcher.processes import Child, Stream
from launcher.view import BrokerReader, Console, EdgeReader, Event, read_connector

T = TypeVar("T")

TUNNEL = "demo"
PATH = "/mqtt"
PREFIX = "tunnel-demo-"
LOCK = "lock"
PREFERRED_PUBLIC_PORT = 8443

BROKER_SECONDS = 15.0
EDGE_SECONDS = 20.0
REGISTRATION_SECONDS = 30.0
CONFIGURATION_SECONDS = 10.0
"""Each is many times what a loaded two-core machine needs; past it something is stuck, and waiting longer only
hides which hop."""

CONNECTOR_GRACE = 8.0
"""The connector drains for up to 3 s of these (`--grace-period`), then unregisters."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line chose."""

    broker: str = "auto"
    protocol: str = "http2"
    public_port: int | None = None
    once: bool = False
    keep: Path | None = None


class Facts:
    """What the dev edge has told so far, for the start to wait on."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.listening: asyncio.Future[dict[str, Any]] = loop.create_future()
        self.registered: asyncio.Future[dict[str, Any]] = loop.create_future()
        self.configured: asyncio.Future[dict[str, Any]] = loop.create_future()

    def take(self, event: Event) -> None:
        """Look at one event of the edge."""
        if event.name == "listening":
            _settle(self.listening, event.facts)
        elif event.name == "registered":
            _settle(self.registered, event.facts)
        elif event.name == "register_refused":
            _fail(self.registered, HopError("registration", f"the dev edge refused it: {event.facts.get('cause')}"))
        elif event.name == "configuration" and event.facts.get("applied"):
            _settle(self.configured, event.facts)
        elif event.name == "configuration":
            message = f"the connector refused version {event.facts.get('version')}: {event.facts.get('error')}"
            _fail(self.configured, HopError("configuration", message))


def _settle(future: asyncio.Future[dict[str, Any]], facts: dict[str, Any]) -> None:
    if not future.done():
        future.set_result(facts)


def _fail(future: asyncio.Future[dict[str, Any]], error: HopError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # asked for later, or never


class Demo:
    """One run. Call `run` once."""

    def __init__(self, options: Options, console: Console) -> None:
        self.options = options
        self.console = console
        self.children: list[Child] = []
        self.directory = Path()
        self.ready = False
        self._signal: int | None = None
        self._closing = False
        self._cancelled = threading.Event()
        self._live = False
        self._edge_reader = EdgeReader()
        self._broker_reader = BrokerReader()
        self._lock = -1
        self._facts: Facts

    async def run(self) -> int:
        """Start, check, show, stop; the exit status."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def interrupted(number: int) -> None:
            self._cancelled.set()
            if self._closing:  # asked twice: stop waiting for an orderly end
                for child in self.children:
                    child.kill()
            else:
                self._signal = number
                task.cancel()

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, interrupted, number)
        self.console.on_lost = lambda: interrupted(signal.SIGPIPE)
        try:
            try:
                await self._up()
                if not self.options.once:
                    await self._watch()
                return 0
            except asyncio.CancelledError:
                if self._signal is None:
                    raise
                task.uncancel()
                return 0 if self.ready else 128 + self._signal
            except HopError as error:
                self.console.failure(error.hop, error.message, error.advice or ADVICE.get(error.hop, ""), error.tail)
                return 1
            finally:
                self._closing = True
                self._cancelled.set()
                await self._down()
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    # The start.

    async def _up(self) -> None:
        self._facts = Facts()
        self._make_directory()
        demo = User(TUNNEL, self._password(), (f"{TUNNEL}/#",))
        health = User("health", new_password(), (selfcheck.CHECK_TOPIC,))
        self.console.hide(demo.password)
        self.console.hide(health.password)
        self.console.text("MQTT client --wss--> dev edge ==edge protocol==> connector --ws--> broker\n")
        broker = await self._start_broker([demo, health], health)
        edge_address, public, cafile = await self._start_edge(broker)
        await self._start_connector(edge_address, cafile)
        host, port = public
        target = selfcheck.Target(host, port, PATH, cafile, broker.mqtt5)
        await self._check(target, demo, health)
        self.ready = True
        place = clients.Place(host, port, PATH, cafile, broker.mqtt_port, self.directory / "clients", demo.name)
        clients.write_files(place, demo)
        await self._tell(place, demo)

    def _make_directory(self) -> None:
        keep = self.options.keep
        if keep is None:
            remove_abandoned(Path(tempfile.gettempdir()))
            self.directory = Path(tempfile.mkdtemp(prefix=PREFIX))
            self._lock = hold_lock(self.directory)
            return
        try:
            keep.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.directory = keep.resolve(strict=True)
            status = self.directory.stat()
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise HopError(
                    "directory",
                    f"{keep} can be changed by other users",
                    advice=f"name a directory of your own, or: chmod go-w {keep}",
                )
        except OSError as error:
            raise HopError("directory", f"{keep}: {error.strerror}", advice="name another one with --keep") from error

    def _password(self) -> str:
        """The demo user's password: a new one, or with --keep the one that existing clients use."""
        try:
            known = (self.directory / "clients" / "password").read_text(encoding="utf-8").strip()
        except OSError:
            known = ""
        return known or new_password()

    async def _start_broker(self, users: list[User], health: User) -> mosquitto.Broker:
        choice = self.options.broker
        title = "broker"
        binary = None
        if choice != "embedded":
            try:
                binary = await asyncio.to_thread(mosquitto.find_mosquitto)
            except HopError as error:
                if choice == "mosquitto":
                    raise
                self.console.progress(title, error.message)
            if binary is None and choice == "mosquitto":
                raise HopError(title, "Mosquitto is not installed", advice=mosquitto.INSTALL_ADVICE)
        directory = self.directory / "broker"

        def on_line(_stream: Stream, line: str) -> None:
            event = self._broker_reader.read(line)
            if event is not None and self._live:
                self.console.event(event)

        async def ready(broker: mosquitto.Broker) -> None:
            self.console.progress(
                title, f"{broker.title} starting: 127.0.0.1, mqtt {broker.mqtt_port}, ws {broker.ws_port}"
            )
            await self._await_listeners(broker, health)

        broker: mosquitto.Broker | None = None
        if binary is not None:
            try:
                broker = await mosquitto.start(
                    directory, users, binary, on_line=on_line, ready=ready, proxied=binary.version >= (2, 1, 0)
                )
            except HopError as error:
                unable = any("websockets support not available" in line.lower() for line in error.tail)
                if choice == "mosquitto" or not unable:
                    raise
                self.console.progress(title, f"{binary} at {binary.path} was built without WebSockets")
        if broker is None:
            from launcher import embedded  # noqa: PLC0415 - loads amqtt, which most runs do not need

            if not embedded.available():
                raise HopError(title, "neither Mosquitto nor amqtt is installed", advice=mosquitto.INSTALL_ADVICE)
            why = "as asked for" if choice == "embedded" else "no usable Mosquitto here"
            self.console.progress(title, f"using the embedded broker amqtt ({why}): MQTT 3.1.1, for trying out only")
            broker = await mosquitto.start_embedded(directory, users, on_line=on_line, ready=ready)
        self.children.append(broker.child)
        return broker

    async def _await_listeners(self, broker: mosquitto.Broker, health: User) -> None:
        """Until both listeners accept the health user; both must be closed to other machines."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + BROKER_SECONDS
        took = []
        for port, path in ((broker.mqtt_port, None), (broker.ws_port, PATH)):
            proxied = broker.proxied and path is not None
            target = selfcheck.Target("127.0.0.1", port, path, mqtt5=broker.mqtt5, proxied=proxied)
            while True:
                try:
                    ms = await asyncio.to_thread(selfcheck.check_listener, target, health, cancelled=self._cancelled)
                    took.append(f"{'ws' if path else 'mqtt'} {ms:.0f} ms")
                    break
                except (HopError, selfcheck.RefusedError) as error:
                    if isinstance(error, selfcheck.RefusedError) or loop.time() >= deadline:
                        message = f"no authenticated CONNECT on {target.url}: {error}"
                        raise HopError("broker", message, tail=broker.child.tail) from error
                await asyncio.sleep(0.05)  # nothing but another try can tell that a port is open
            if await asyncio.to_thread(mosquitto.open_to_others, port):
                raise HopError(
                    "broker",
                    f"{broker.title} listens on all interfaces at port {port} although told 127.0.0.1",
                    advice="use another Mosquitto build, or --broker embedded",
                )
        self.console.progress("broker", f"ready: user accepted, {', '.join(took)}", pid=broker.child.pid)

    async def _start_edge(self, broker: mosquitto.Broker) -> tuple[str, tuple[str, int], Path]:
        """Returns the address for connectors, the public address, and the CA file."""
        wanted = self.options.public_port
        first = PREFERRED_PUBLIC_PORT if wanted is None else wanted
        ports = [first, 0] if wanted is None and first else [first]
        if len(ports) == 2 and not _port_is_free(first):
            ports = [0]
        rules = self.directory / "tunnels.toml"
        mosquitto.write_private(rules, tunnel_rules(TUNNEL, f"http://127.0.0.1:{broker.ws_port}", broker.proxied))
        for port in ports:
            edge = await self._start_python(
                "dev edge",
                f"edge --listen 127.0.0.1:0 --public 127.0.0.1:{port} --output json",
                {"--state-dir": self.directory / "edge", "--config": rules},
                self._on_edge_line,
            )
            try:
                facts = await self._wait(self._facts.listening, "dev edge", EDGE_SECONDS, "its listening event", edge)
                break
            except HopError as error:
                taken = edge.exited.done() and any("taken" in line or "in use" in line for line in error.tail)
                if not taken:
                    raise
                if port == ports[-1]:
                    raise HopError(
                        "dev edge",
                        f"port {port} of 127.0.0.1 is taken",
                        advice="name another one with --public-port, or 0 for any free one",
                    ) from error
                self.children.remove(edge)
        cafile = Path(str(facts["ca"]))
        url = urlsplit(str(facts["public"]))
        if not url.hostname or not url.port:
            raise HopError("dev edge", f"its public address cannot be read: {facts['public']!r}")
        edge_address = str(facts["edge"])
        self.console.progress("edge", f"listening: {edge_address}, public {facts['public']}", pid=edge.pid)
        return edge_address, (url.hostname, url.port), cafile

    async def _start_connector(self, edge_address: str, cafile: Path) -> None:
        lines: list[str] = []
        printer = await self._start_python(
            "dev edge",
            f"edge token {TUNNEL}",
            {"--state-dir": self.directory / "edge"},
            lambda stream, line: lines.append(line) if stream == "stdout" else None,
            secret=True,
        )
        self.children.remove(printer)
        try:
            status = await asyncio.wait_for(asyncio.shield(printer.exited), EDGE_SECONDS)
        except TimeoutError:
            status = None
        finally:
            await printer.stop()
        if status != 0 or len(lines) != 1:
            raise HopError("dev edge", f"it printed no token ({printer.describe_end()})", tail=printer.tail)
        self.console.hide(lines[0])
        token_file = self.directory / "token"
        mosquitto.write_private(token_file, lines[0] + "\n")

        connector = await self._start_python(
            "connector",
            f"run --edge {edge_address} --protocol {self.options.protocol} --ha-connections 1 --output json"
            " --no-autoupdate --no-prechecks --grace-period 3s",
            {"--cacert": cafile, "--token-file": token_file},
            self._on_connector_line,
            grace=CONNECTOR_GRACE,
        )
        facts = self._facts
        registered = await self._wait(
            facts.registered, "registration", REGISTRATION_SECONDS, "registration with the dev edge", connector
        )
        protocol, address = registered.get("protocol"), registered.get("address")
        self.console.progress("connector", f"registered from {address} over {protocol}", pid=connector.pid)
        applied = await self._wait(
            facts.configured, "configuration", CONFIGURATION_SECONDS, "applied configuration", connector
        )
        self.console.progress("connector", f"configuration version {applied.get('version')} applied")

    async def _start_python(
        self,
        name: str,
        flags: str,
        files: dict[str, Path],
        on_line: Callable[[Stream, str], None],
        *,
        grace: float = 5.0,
        secret: bool = False,
    ) -> Child:
        """Start `python -m connector` with `flags` (no spaces inside one) and `files` (any path)."""
        command = [sys.executable, "-m", "connector", *flags.split()]
        for flag, path in files.items():
            command += [flag, str(path)]
        child = await Child.start(name, command, on_line=on_line, grace=grace, secret=secret)
        self.children.append(child)
        return child

    def _on_edge_line(self, stream: Stream, line: str) -> None:
        event = self._edge_reader.read(line)
        if stream == "stdout":
            self._facts.take(event)
        if self._live:
            self.console.event(event)

    def _on_connector_line(self, _stream: Stream, line: str) -> None:
        if self._live:
            self.console.event(read_connector(line))

    async def _check(self, target: selfcheck.Target, demo: User, health: User) -> None:
        loop = asyncio.get_running_loop()

        def report(step: selfcheck.Step) -> None:
            loop.call_soon_threadsafe(self.console.check, step.hop, step.detail, step.ms)

        checking = asyncio.to_thread(selfcheck.run, target, demo, health, report, cancelled=self._cancelled)
        limit = selfcheck.STEP_SECONDS * 9
        try:
            await self._wait(checking, "self-check", limit, "its end", None)
        except HopError as error:
            if not error.tail:
                error.tail = [f"{child.name}: {line}" for child in self.children for line in _tail(child)[-4:]]
            raise

    async def _wait(self, what: Awaitable[T], hop: str, seconds: float, expected: str, waiting_for: Child | None) -> T:
        """`what`, unless a child ends or the time is up first; both are HopErrors with last lines."""
        task = asyncio.ensure_future(what)
        ends = {child.exited: child for child in self.children}
        try:
            done, _ = await asyncio.wait({task, *ends}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if task in done:
                return task.result()
            for exited, child in ends.items():
                if exited in done:
                    raise self._died(child)
            raise HopError(hop, f"no {expected} within {seconds:.0f} s")
        except HopError as error:
            if not error.tail and waiting_for is not None:
                error.tail = _tail(waiting_for)
            raise
        finally:
            if not task.done():
                task.cancel()

    def _died(self, child: Child) -> HopError:
        return HopError(child.name, f"it ended by itself: {child.describe_end()}", tail=_tail(child))

    async def _tell(self, place: clients.Place, demo: User) -> None:
        """Where to connect and how."""
        tools = await asyncio.to_thread(clients.installed_mosquitto_clients)
        parts = clients.snippets(place, tools)
        head = f"""
Ready. Public address:  {place.url}
       CA certificate:  {place.cafile}
       user, password:  {demo.name}  {demo.password}   (topics {TUNNEL}/#)
"""
        if self.options.once:
            head = "\nEvery hop works. Without --once the demo stays, for clients of your own."
        self.console.reveal(
            head,
            event="ready",
            url=place.url,
            ca=str(place.cafile),
            username=demo.name,
            password=demo.password,
            mqtt=f"mqtt://127.0.0.1:{place.mqtt_port}",
            pids={child.name: child.pid for child in self.children},
            snippets=[{"title": part.title, "command": part.command, "needs": part.needs} for part in parts],
        )
        if self.options.once:
            return
        for part in parts:
            self.console.text(f"# {part.title}" + (f" ({part.needs})" if part.needs else ""))
            self.console.text(part.command + "\n")
        if tools is None:
            self.console.text(f"# {clients.without_clients_note(place)}\n")

    # The live view and the end.

    async def _watch(self) -> None:
        self.console.text("Everything that happens from here on; Ctrl-C ends it.")
        self._live = True
        ends = {child.exited: child for child in self.children}
        while True:
            done, _ = await asyncio.wait(ends, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            self.console.flush_folded()
            for exited, child in ends.items():
                if exited in done:
                    self._live = False
                    raise self._died(child)

    async def _down(self) -> None:
        """Connector first, so that it drains and unregisters; then the edge; the broker last."""
        self._live = False
        if self.ready and self._signal is not None:
            self.console.stopping()
        for child in reversed(self.children):
            await child.stop()
        if self.options.keep is None and self.directory != Path():
            await asyncio.to_thread(shutil.rmtree, self.directory, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)


ADVICE = {
    "broker": "read its last lines above; `--broker embedded` does without Mosquitto",
    "dev edge": "read its last lines above; `connector edge --help` shows how to start it by hand",
    "connector": "read its last lines above",
    "registration": "read the connector's last lines above: it says why the dev edge did not take it",
    "configuration": "the dev edge's ingress and the connector disagree: please report it with the lines above",
    selfcheck.TLS: "the dev edge's public side did not answer as expected: see the lines above",
    selfcheck.WEBSOCKET: "502: the connector did not reach the broker; another 5xx: the dev edge has no connector",
    selfcheck.CONNECT: "the WebSocket works, the broker's answer does not come through: see the broker's lines above",
    selfcheck.SUBSCRIBE: "see the broker's lines above",
    selfcheck.PUBLISH: "see the broker's lines above",
    selfcheck.DELIVERY: "the broker took the message and it did not come back: see the broker's lines above",
}


def _tail(child: Child) -> list[str]:
    """The last lines of a child; JSON in words."""
    if child.name == "broker":
        return list(child.tail)
    read = read_connector if child.name == "connector" else EdgeReader().read
    return [read(line).text for line in child.tail]


def tunnel_rules(tunnel: str, service: str, proxied: bool) -> str:
    """The dev edge's configuration file: one rule, with what a broker behind a tunnel wants.

    `wsKeepAlive` pings idle WebSockets, which Cloudflare cuts after 100 s; `proxyProtocol` tells the broker who it is
    that comes. Both are this connector's own options: a dashboard does not offer them.
    """
    options = ["wsKeepAlive = 30"] + (['proxyProtocol = "v2"'] if proxied else [])
    return f"""[tunnels.{tunnel}]
ingress = [{{ service = "{service}", originRequest = {{ {", ".join(options)} }} }}]
"""


def hold_lock(directory: Path) -> int:
    """Mark `directory` as in use for as long as this process lives; returns what to close."""
    descriptor = os.open(directory / "lock.new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(directory / "lock.new", directory / LOCK)  # nobody sees the file before it is locked
    return descriptor


def remove_abandoned(parent: Path) -> None:
    """Remove what demos left behind that were killed too hard to do it themselves: keys, tokens, passwords."""
    for directory in parent.glob(PREFIX + "*"):
        try:
            status = directory.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except OSError:
            pass  # in use
        finally:
            os.close(descriptor)


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
