"""`launcher demo --engine docker`: the demo as containers, and a broker restart that loses nothing.

Owns: a dev edge in a third container, its CA and token, the checks, the restart, the end.
In: the demo's arguments. Out: an exit status; progress.
Never: publishes a port beyond 127.0.0.1, leaves a container: a reaper process removes them when this one is killed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from launcher import clients, selfcheck
from launcher import containerspec as spec
from launcher.accounts import CHECK_TOPIC, FIRST_USER, HEALTH, Accounts
from launcher.commands import ended
from launcher.containers import Containers
from launcher.credentials import User
from launcher.demo import tunnel_rules
from launcher.engineapi import explained, run_in
from launcher.errors import HopError
from launcher.output import Output
from launcher.processes import child_environment
from launcher.stack import BROKER, Wanted
from launcher.stackdir import Settings, StackDir, StackError

PREFIX = "tunnel-demo-"
EDGE_RULES = f"{spec.CONNECTOR_DIR}/tunnels.toml"
EDGE_DIR = "/tmp/edge"  # noqa: S108 - inside the container
TUNNEL, PATH = "demo", "/mqtt"
PREFERRED_PORT = 8443
EDGE_SECONDS = 30.0


async def demo(args: argparse.Namespace, output: Output) -> int:
    """Start, check, restart the broker, stay until interrupted (or not, with --once), remove everything."""
    name = f"{PREFIX}{secrets.token_hex(3)}"
    settings = Settings(name=name, engine=args.engine)
    settings.connector_args = ["--edge", "edge:7844", "--protocol", args.protocol, "--ha-connections", "1"]
    settings.connector_args += ["--grace-period", "3s", "--no-prechecks"]
    scratch = Path(tempfile.mkdtemp(prefix=PREFIX))
    engine = await Containers.open("podman" if args.engine == "podman" else "docker", settings)
    reaper: asyncio.subprocess.Process | None = None
    try:
        reaper = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "launcher.reaper", args.engine, name),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=child_environment(),
        )
        return await _Demo(args, output, engine, StackDir(scratch)).run()
    except HopError as error:
        raise StackError(f"{error.hop}: {error.message}", advice=error.advice) from error
    finally:
        await asyncio.shield(_end(engine, reaper, output))
        shutil.rmtree(scratch, ignore_errors=True)


async def _end(engine: Containers, reaper: asyncio.subprocess.Process | None, output: Output) -> None:
    with contextlib.suppress(StackError):
        await _remove_edge(engine)
        await engine.down(output.progress, volumes=True)
        await engine.remove_volume(f"{engine.settings.name}-edge")
    await engine.close()
    if reaper is not None and reaper.stdin is not None:
        reaper.stdin.close()
        await reaper.wait()


async def _remove_edge(engine: Containers) -> None:
    await engine.remove(f"{engine.settings.name}-edge")


class _Demo:
    """One run."""

    def __init__(self, args: argparse.Namespace, output: Output, engine: Containers, directory: StackDir) -> None:
        self.args = args
        self.output = output
        self.engine = engine
        self.directory = directory
        self._cancelled = threading.Event()

    async def run(self) -> int:
        output, engine, settings = self.output, self.engine, self.engine.settings
        output.text("MQTT client --wss--> dev edge ==edge protocol==> connector --ws--> broker (three containers)\n")
        self.directory.make()
        await engine.prepare(output.progress)
        edge = await self._start_edge()
        port = await self._published(edge)
        ca = await self._from_edge(edge, ["cat", f"{EDGE_DIR}/ca.pem"])
        token = await self._from_edge(edge, ["connector", "edge", "token", TUNNEL, "--state-dir", EDGE_DIR])
        cafile = self.directory.path / "ca.pem"
        self.directory.write(cafile, ca)
        output.progress("edge", f"listening: public https://localhost:{port}")
        book, passwords = Accounts.first_run()
        wanted = Wanted(
            settings=settings,
            token=token.strip(),
            passwords=book.passwords_text(),
            acl=book.acl_text(),
            health_password=passwords[HEALTH],
            connector_ca=ca,
        )
        await engine.up(wanted, output.progress)
        target = selfcheck.Target("localhost", port, PATH, cafile)
        user = User(FIRST_USER, passwords[FIRST_USER], ())
        health = User(HEALTH, passwords[HEALTH], ())
        try:
            await asyncio.to_thread(
                selfcheck.run, target, user, health, self._report, topic=CHECK_TOPIC, cancelled=self._cancelled
            )
            await self._restart(target, user)
        finally:
            self._cancelled.set()
        await self._tell(target, user, passwords, port)
        if not self.args.once:
            await self._watch()
        return 0

    def _report(self, step: selfcheck.Step) -> None:
        if self.output.as_json:
            self.output.facts("check", hop=step.hop, detail=step.detail, ms=round(step.ms, 2))
        else:
            self.output.progress("check", f"{step.hop}: {step.detail}, {step.ms:.1f} ms")

    async def _start_edge(self) -> Any:
        settings, engine = self.engine.settings, self.engine
        name = f"{settings.name}-edge"
        wanted = self.args.public_port
        ports = [wanted] if wanted is not None else [PREFERRED_PORT, 0] if _free(PREFERRED_PORT) else [0]
        words = ["edge", "--state-dir", EDGE_DIR, "--listen", "0.0.0.0:7844", "--public", "0.0.0.0:8443"]
        words += ["--config", EDGE_RULES, "--output", "json"]
        connector = spec.connector_spec(settings, ca=False)
        for port in ports:
            host = {
                **connector["HostConfig"],
                "Binds": [f"{settings.name}-edge:{spec.CONNECTOR_DIR}"],
                "RestartPolicy": {"Name": "no"},
            }
            host["PortBindings"] = {"8443/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port or "")}]}
            config = {
                **connector,
                "Entrypoint": ["connector"],
                "Cmd": words,
                "Labels": spec.labels(settings, "edge"),
                "ExposedPorts": {"8443/tcp": {}},
                "HostConfig": host,
                "Healthcheck": {"Test": ["NONE"]},
                "NetworkingConfig": {"EndpointsConfig": {spec.network_name(settings.name): {"Aliases": ["edge"]}}},
            }
            rules = tunnel_rules(TUNNEL, "http://mosquitto:9001", proxied=False)
            async with explained("creating the dev edge"):
                edge: Any = await engine.client.containers.create(config, name=name)
                await edge.put_archive(spec.CONNECTOR_DIR, spec.archive({"tunnels.toml": rules}, spec.CONNECTOR_UID))
            try:
                async with explained("starting the dev edge"):
                    await edge.start()
                return edge
            except StackError as error:
                await _remove_edge(engine)
                taken = "allocated" in str(error) or "in use" in str(error)
                if not taken or port == ports[-1]:
                    raise
        raise AssertionError

    async def _published(self, edge: Any) -> int:
        async with explained("asking for the public port"):
            facts = await edge.show()
        found = (facts["NetworkSettings"].get("Ports") or {}).get("8443/tcp")
        if not found:
            raise StackError("the dev edge ended at once", advice="docker logs tells why, if it is still there")
        return int(found[0]["HostPort"])

    async def _from_edge(self, edge: Any, command: list[str]) -> str:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + EDGE_SECONDS
        text = ""
        while loop.time() < deadline:
            status, text = await run_in(edge, command)
            if status == 0 and text.strip():
                return text
            await asyncio.sleep(0.2)  # it makes its CA first
        raise StackError(f"the dev edge does not come up: {text.strip()[-200:]}", advice="run it with --engine native")

    async def _restart(self, target: selfcheck.Target, user: User) -> None:
        """A retained message, and a QoS 1 message for a client that is away, over a restart of the broker."""
        old = selfcheck.Target(target.host, target.port, target.ws_path, target.cafile, mqtt5=False)
        news, state = f"{user.name}/news", f"{user.name}/state"

        def before() -> None:
            with selfcheck.Session(old, user.name, user.password, durable="demo-reader") as session:
                session.connect()
                session.subscribe(news)
            with selfcheck.Session(target, user.name, user.password) as session:
                session.connect()
                session.publish(state, b"retained before the restart", retain=True)
                session.publish(news, b"for a client that was away")

        def after() -> None:
            with selfcheck.Session(old, user.name, user.password, durable="demo-reader") as session:
                session.connect()
                if not session.session_present:
                    raise HopError(BROKER, "the session of a client that was away is gone after the restart")
                session.receive(news, b"for a client that was away")
            with selfcheck.Session(target, user.name, user.password) as session:
                session.connect()
                session.subscribe(state)
                session.receive(state, b"retained before the restart")

        await asyncio.to_thread(before)
        self.output.progress("check", "a client left, its QoS 1 message waits; another message is retained")
        await self.engine.restart([BROKER], self.output.progress)
        await asyncio.to_thread(after)
        self.output.progress("check", "after the restart: session, QoS 1 message and retained message are there")
        self.output.facts("restart", survived=["session", "qos1", "retained"])

    async def _tell(self, target: selfcheck.Target, user: User, passwords: dict[str, str], port: int) -> None:
        output, settings = self.output, self.engine.settings
        if self.args.once:
            output.facts("ready", url=target.url)
            output.text("\nEvery hop works, and a restart of the broker lost nothing.")
            return
        place = clients.Place("localhost", port, PATH, target.cafile or Path(), 0, self.directory.path, user.name)
        output.facts("ready", url=target.url, ca=str(target.cafile), username=user.name, password=user.password)
        output.text(f"\nReady. Public address:  {place.url}\n       CA certificate:  {target.cafile}")
        output.text(f"       user, password:  {user.name}  {user.password}   (topics {user.name}/#)")
        output.text(f"       containers:      {settings.name}-edge, -connector, -broker\n")
        self.directory.write(place.password_file, user.password)
        for part in clients.snippets(place, None)[:2]:
            output.text(f"# {part.title}" + (f" ({part.needs})" if part.needs else ""))
            output.text(part.command + "\n")
        output.text("Everything that happens from here on; Ctrl-C ends it and removes the containers.")

    async def _watch(self) -> None:
        try:
            async for line in self.engine.logs(["broker", "connector"], follow=True, tail=0):
                self.output.log(line)
        except asyncio.CancelledError:
            ended()


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
