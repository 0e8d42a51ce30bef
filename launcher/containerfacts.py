"""A stack's containers as the engine and they themselves tell of them.

Owns: finding them, their state, what the connector answers, whether the broker works, what `doctor` asks an engine.
In: an engine's client, settings. Out: `ServiceState`s, `Check`s, answers; StackError.
Never: changes anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
from typing import TYPE_CHECKING, Any

from launcher import containerspec as spec
from launcher import engineapi, selfcheck
from launcher.accounts import CHECK_TOPIC
from launcher.containerlogs import Logs
from launcher.credentials import User
from launcher.engineapi import explained, run_in
from launcher.errors import HopError
from launcher.stack import (
    BROKER,
    CONNECTOR,
    METRICS_PORT,
    Check,
    ServiceState,
    configuration_checks,
    database_check,
    doctor_checks,
    doctor_command,
)
from launcher.stackdir import Settings, StackError

if TYPE_CHECKING:
    import aiodocker

FETCH_SECONDS = 3.0
HEALTH_SECONDS = 10.0
DOCTOR_SECONDS = 90.0


class Facts(Logs):
    """One stack on one engine, looked at."""

    def __init__(self, client: aiodocker.Docker, title: str, settings: Settings) -> None:
        self.client = client
        self.title = title
        self.settings = settings

    async def _find(self, name: str) -> tuple[Any, dict[str, Any]] | None:
        """The container of that name and what the engine knows of it."""
        import aiodocker  # noqa: PLC0415

        async with explained(f"looking for {name}"):
            try:
                container = await self.client.containers.get(name)
                return container, await container.show()
            except aiodocker.DockerError as error:
                if error.status == 404:
                    return None
                raise

    async def existing(self) -> dict[str, Any] | None:
        """Settings of a stack of our name that somebody made on this engine; None when there is none."""
        found = await self._find(spec.broker_name(self.settings.name))
        if found is None:
            return None
        text = (found[1]["Config"].get("Labels") or {}).get(spec.LABEL_SETTINGS)
        try:
            facts = json.loads(text) if text else None
        except ValueError:
            facts = None
        return facts if isinstance(facts, dict) else None

    async def stored_files(self) -> dict[str, str]:
        """Users, rules, the health user's password and the token, out of the volumes of an existing stack."""
        result: dict[str, str] = {}
        wanted = (
            (spec.broker_name(self.settings.name), spec.CONFIG, ("passwords", "acl", "health/password")),
            (spec.connector_name(self.settings.name), spec.CONNECTOR_DIR, ("token",)),
        )
        for name, folder, files in wanted:
            found = await self._find(name)
            if found is None:
                continue
            for file in files:
                async with explained(f"reading {file} of {name}", missing_ok=True):
                    tar = await found[0].get_archive(f"{folder}/{file}")
                    with contextlib.closing(tar):
                        member = tar.next()
                        data = tar.extractfile(member) if member is not None else None
                        if data is not None:
                            result[file] = data.read().decode("utf-8", "replace")
        return result

    async def _show(self, container: Any) -> dict[str, Any]:
        async with explained(f"asking for the state of {container.id[:12]}"):
            facts: dict[str, Any] = await container.show()
            return facts

    async def _tail(self, container: Any, count: int) -> list[str]:
        chunks: list[str] = []
        async with explained("reading the log", missing_ok=True):
            chunks = await container.log(stdout=True, stderr=True, tail=count)
        return [line for line in "".join(chunks).splitlines() if line.strip()][-count:]

    async def states(self) -> list[ServiceState]:
        """Both containers as the engine sees them."""
        result = []
        for service, name in (
            (BROKER, spec.broker_name(self.settings.name)),
            (CONNECTOR, spec.connector_name(self.settings.name)),
        ):
            found = await self._find(name)
            if found is None:
                result.append(ServiceState(service))
                continue
            facts = found[1]
            state = facts["State"]
            health = (state.get("Health") or {}).get("Status") or ""
            if health == "starting" and self.podman:
                health = await self._check_health(*found)
            one = ServiceState(
                service=service,
                state=str(state.get("Status")),
                health="" if health == "none" else health,
                what=str(facts["Config"].get("Image")),
                restarts=int(facts.get("RestartCount") or 0),
                since=str(state.get("StartedAt") or "").partition(".")[0],
            )
            if (facts["Config"].get("Labels") or {}).get(spec.LABEL_ID) != self.settings.id:
                one.detail = "not of this stack"
            elif state.get("Status") == "exited":
                one.detail = f"exit status {state.get('ExitCode')}" + (
                    ", out of memory" if state.get("OOMKilled") else ""
                )
            result.append(one)
        return result

    @property
    def podman(self) -> bool:
        """Whether this is Podman, which leaves health checks to systemd's timers: without them nobody runs any."""
        return self.title.startswith("Podman")

    async def _check_health(self, container: Any, facts: dict[str, Any]) -> str:
        """Run the container's health check now."""
        kind, *words = (facts["Config"].get("Healthcheck") or {}).get("Test") or ["NONE"]
        if kind not in {"CMD", "CMD-SHELL"} or not facts["State"].get("Running"):
            return ""
        try:
            command = words if kind == "CMD" else ["sh", "-c", *words]
            status, _ = await run_in(container, command, limit=HEALTH_SECONDS)
        except StackError:
            return "unhealthy"
        return "healthy" if status == 0 else "unhealthy"

    async def _address(self, service: str) -> str | None:
        name = spec.broker_name(self.settings.name) if service == BROKER else spec.connector_name(self.settings.name)
        found = await self._find(name)
        if found is None or not found[1]["State"].get("Running"):
            return None
        networks = found[1]["NetworkSettings"].get("Networks") or {}
        address = (networks.get(spec.network_name(self.settings.name)) or {}).get("IPAddress")
        return str(address) if address else None

    async def fetch(self, path: str) -> Any:
        """The connector's answer: straight to its address where that can be reached, else from inside."""
        address = await self._address(CONNECTOR)
        if address is None:
            return None
        body = await asyncio.to_thread(_get, address, path)
        if body is None:
            found = await self._find(spec.connector_name(self.settings.name))
            if found is None:
                return None
            with contextlib.suppress(StackError):
                script = (
                    "import sys,urllib.request as u,urllib.error as e\n"
                    f"try: r=u.urlopen('http://127.0.0.1:{METRICS_PORT}{path}',timeout=3)\n"
                    "except e.HTTPError as x: r=x\n"
                    "sys.stdout.write(r.read(65536).decode())"
                )
                status, text = await run_in(found[0], ["python3", "-c", script], limit=20)
                body = text if status == 0 else None
        try:
            return json.loads(body) if body else None
        except ValueError:
            return None

    async def broker_check(self, user: str, password: str, ws: bool, proxied: bool) -> float:
        """From here where the broker's address can be reached, else from inside the connector's container."""
        address = await self._address(BROKER)
        if address is None:
            raise StackError("the broker does not run", advice="launcher up")
        port = 9001 if ws else 1883
        if await asyncio.to_thread(_reachable, address, port):
            target = selfcheck.Target(address, port, "/mqtt" if ws else None, proxied=proxied)
            try:
                return await asyncio.to_thread(selfcheck.round_trip, target, User(user, password, ()), CHECK_TOPIC)
            except (HopError, selfcheck.RefusedError) as error:
                raise StackError(f"{target.url}: {error}", advice="see: launcher logs broker") from error
        found = await self._find(spec.connector_name(self.settings.name))
        if found is None:
            raise StackError("the broker's address cannot be reached from here", advice="launcher up")
        request = {"host": "mosquitto", "port": port, "ws": ws, "user": user, "password": password, "proxied": proxied}
        # The connector's image holds this package too; the password goes over its standard input.
        status, text = await run_in(
            found[0], ["python3", "-m", "launcher.probe"], stdin=json.dumps(request).encode() + b"\n"
        )
        try:
            answer = json.loads(text.splitlines()[-1])
        except (ValueError, IndexError):
            raise StackError(
                f"the check inside the connector's container ended with status {status}: {text.strip()[-200:]}",
                advice="only this project's image can run it",
            ) from None
        if "ms" not in answer:
            raise StackError(str(answer.get("error")), advice="see: launcher logs broker")
        return float(answer["ms"])

    async def connector_doctor(self, url: str | None) -> list[Check]:
        """Inside the connector's container; its image may be another program's, which has no doctor."""
        found = await self._find(spec.connector_name(self.settings.name))
        if found is None or not found[1]["State"].get("Running"):
            return []
        ca = spec.CA if self.settings.connector_ca is not None else None
        command = doctor_command(["connector"], self.settings, spec.TOKEN, ca, url)
        with contextlib.suppress(StackError):
            _, text = await run_in(found[0], command, limit=DOCTOR_SECONDS)
            return doctor_checks(text)
        return []

    async def examine(self) -> list[Check]:
        """Images, volumes, ports, limits, the configuration in the volume."""
        checks = [Check("engine", True, self.title)]
        settings = self.settings
        for image in (settings.broker_image, settings.connector_image):
            good = await engineapi.has_image(self.client, image)
            checks.append(Check("image", good, image if good else f"{image} is missing", "launcher up fetches it"))
        for service, name in (
            (BROKER, spec.broker_name(settings.name)),
            (CONNECTOR, spec.connector_name(settings.name)),
        ):
            found = await self._find(name)
            if found is None or not found[1]["State"].get("Running"):
                checks.append(Check(service, False, f"{name} does not run", "launcher up"))
                continue
            host = found[1]["HostConfig"]
            published = {port for port, where in (found[1]["NetworkSettings"].get("Ports") or {}).items() if where}
            checks.append(
                Check(
                    "ports",
                    not published,
                    f"{name} publishes {', '.join(sorted(published))}" if published else f"{name} publishes none",
                    "remove it and run launcher up: the tunnel needs no open port",
                )
            )
            loose = [word for word, good in (
                ("a writable root", host.get("ReadonlyRootfs")),
                ("capabilities", host.get("CapDrop")),
                ("no memory limit", host.get("Memory")),
            ) if not good]  # fmt: skip
            if loose:
                text = f"{name} has {', '.join(loose)}"
                advice = "was it made by hand? launcher down, then launcher up"
                if loose == ["no memory limit"]:
                    advice = "a rootless engine on cgroups v1 has none to give; else: launcher down, launcher up"
                checks.append(Check("limits", None, text, advice))
            if self.podman and ((found[1]["State"].get("Health") or {}).get("Status") == "starting"):
                health = await self._check_health(*found)
                text = f"{name} is {health}, checked now: Podman runs no health checks without systemd"
                advice = f"`launcher status` checks each time; elsewhere: podman healthcheck run {name}"
                checks.append(Check("health", None if health == "healthy" else False, text, advice))
            if service == BROKER:
                checks += await self._examine_broker(found[0])
        return checks

    async def _examine_broker(self, container: Any) -> list[Check]:
        volume = spec.data_volume(self.settings)
        script = f"head -c 65536 /dev/zero >{spec.DATA}/.probe && rm {spec.DATA}/.probe"
        status, said = await run_in(container, ["sh", "-c", script])
        text = f"{volume} can be written" if status == 0 else f"{volume}: {said.strip().rpartition(': ')[2]}"
        checks = [Check("volume", status == 0, text, "make room, or give it to uid 1883; nothing is saved until then")]
        if self.settings.own_config is None:
            status, size = await run_in(container, ["sh", "-c", f"wc -c <{spec.DATA}/mosquitto.db"])
            checks.append(database_check(int(size) if status == 0 and size.strip().isdigit() else 0, self.settings))
        status, conf = await run_in(container, ["cat", f"{spec.CONFIG}/mosquitto.conf"])
        return checks + configuration_checks(conf if status == 0 else "")


def _get(address: str, path: str) -> str | None:
    connection = http.client.HTTPConnection(address, METRICS_PORT, timeout=FETCH_SECONDS)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.read(1_048_576).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _reachable(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=1.0):
            return True
    except OSError:
        return False
