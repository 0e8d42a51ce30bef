"""A stack as two containers on a private network, over the Docker Engine API (Docker, and Podman's imitation of it).

Owns: creating, adopting, updating, stopping them in the right order; waiting.
In: `Wanted`. Out: what `Engine` promises; progress lines; StackError.
Never: publishes a port, puts a secret into a command line, an environment or an image; deletes data unasked.

Strategy. Files go into named volumes through the archive API, owned by the user that reads them: that works with a
remote engine and without root, where bind mounts with the right owner do not. A hash of each container's description
is its label; `up` leaves alone what has the right one. Podman runs no health checks without systemd, so readiness is
found out here, by running the same command in the container.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher import brokerconf, engineapi
from launcher import containerspec as spec
from launcher.brokerconf import Dialect
from launcher.containerfacts import Facts
from launcher.containerprobe import PROBE, understand
from launcher.engineapi import explained, run_in
from launcher.stack import (
    BROKER,
    CONNECTOR,
    Progress,
    Wanted,
    last_error,
    proxied_port,
)
from launcher.stackdir import CONNECTOR_IMAGE, Settings, StackError
from launcher.stackdir import explained as stored

SOURCE = Path(__file__).resolve().parents[1]
"""Where the Dockerfile is, when this runs from the source tree."""

BROKER_SECONDS = 45.0
"""Until the broker answers its health check; it needs 0.3 s, a database of a gigabyte on a slow disk some more."""

STABLE_SECONDS = 0.3
PROBE_SECONDS = 60.0


class Containers(Facts):
    """One stack on one engine. Make it with `open`; `close` it."""

    @classmethod
    async def open(cls, kind: engineapi.Kind, settings: Settings) -> Containers:
        """Connect to the engine; StackError when there is none."""
        client, title = await engineapi.connect(kind)
        return cls(client, title, settings)

    async def close(self) -> None:
        """Close the connection to the engine; the stack stays."""
        await self.client.close()

    def _ours(self, facts: dict[str, Any], name: str) -> None:
        """StackError when the container is somebody else's."""
        labels = facts["Config"].get("Labels") or {}
        if labels.get(spec.LABEL_STACK) != self.settings.name:
            raise StackError(
                f"the name {name} is taken by a container that is not ours ({facts['Config'].get('Image')})",
                advice=f"choose another name (launcher up --name NAME), or remove it: docker rm -f {name}",
            )
        if labels.get(spec.LABEL_ID) != self.settings.id:
            raise StackError(
                f"{name} belongs to a stack with the same name and another directory",
                advice="use that directory (--state-dir), or choose another name (--name)",
            )

    # Up.

    async def up(self, wanted: Wanted, progress: Progress) -> Dialect:
        """Broker healthy, then the connector, then registered; what runs as wanted already is left alone."""
        settings = self.settings
        progress("engine", self.title)
        for name in (spec.broker_name(settings.name), spec.connector_name(settings.name)):
            found = await self._find(name)
            if found is not None:
                self._ours(found[1], name)
        await self.prepare(progress)
        own = brokerconf.read(wanted.own_config) if wanted.own_config is not None else None
        dialect = await self.probe(wanted.own_config, progress)
        settings.proxied_port = await self._proxied_port(own, dialect, progress)
        await self._up_broker(wanted, own, dialect, progress)
        await self._up_connector(wanted, progress)
        return dialect

    async def prepare(self, progress: Progress) -> None:
        """Images and the network."""
        await self._images(progress)
        await self._network()

    async def _images(self, progress: Progress) -> None:
        settings = self.settings
        client, image = self.client, settings.connector_image
        if not await engineapi.has_image(client, settings.broker_image):
            progress(BROKER, f"pulling {settings.broker_image}")
            await engineapi.pull(client, settings.broker_image, lambda text: progress(BROKER, text))
        ours = (SOURCE / "Dockerfile").is_file() and image == CONNECTOR_IMAGE
        if await engineapi.has_image(client, image):
            built_from = (await engineapi.image_labels(client, image)).get(spec.LABEL_SOURCE)
            if not ours or built_from is None:
                return  # somebody else made it
            context = await asyncio.to_thread(engineapi.context_tar, SOURCE)
            if built_from == engineapi.source_hash(context):
                return
            progress(CONNECTOR, f"building {image} again: {SOURCE} is not what it was made from")
        elif not ours:
            progress(CONNECTOR, f"pulling {image}")
            await engineapi.pull(client, image, lambda text: progress(CONNECTOR, text))
            return
        else:
            context = await asyncio.to_thread(engineapi.context_tar, SOURCE)
            progress(CONNECTOR, f"building {image} from {SOURCE}")
        labels = {spec.LABEL_SOURCE: engineapi.source_hash(context)}
        await engineapi.build(client, context, image, labels, lambda text: progress(CONNECTOR, text))

    async def _networks(self) -> list[dict[str, Any]]:
        """All networks of our name, oldest first: the engine lets two that are made at once have the same one."""
        name = spec.network_name(self.settings.name)
        found = await self.client.networks.list(filters={"name": [name]})
        same = [one for one in found if one.get("Name") == name]
        return sorted(same, key=lambda one: (str(one.get("Created")), str(one.get("Id"))))

    async def _network(self) -> None:
        name = spec.network_name(self.settings.name)
        async with explained(f"creating the network {name}"):
            found = await self._networks()
            if not found:
                config = {"Name": name, "Driver": "bridge", "CheckDuplicate": True}
                config["Labels"] = {spec.LABEL_STACK: self.settings.name, spec.LABEL_ID: self.settings.id}
                await self.client.networks.create(config)
                found = await self._networks()
        if any((one.get("Labels") or {}).get(spec.LABEL_STACK) != self.settings.name for one in found):
            raise StackError(
                f"the name {name} is taken by a network that is not ours",
                advice="choose another name (launcher up --name NAME), or remove it",
            )
        for one in found[1:]:
            with contextlib.suppress(StackError):
                async with explained(f"removing the second network {name}", missing_ok=True):
                    await (await self.client.networks.get(one["Id"])).delete()

    async def _remove_probes(self) -> None:
        """Those of this directory, which has one command at a time: an `up` that was killed left them."""
        labels = spec.labels(self.settings, "probe")
        filters = json.dumps({"label": [f"{key}={value}" for key, value in labels.items()]})
        async with explained("looking for what an earlier command left"):
            found = await self.client.containers.list(all=True, filters=filters)
        for container in found:
            async with explained("removing what an earlier command left", missing_ok=True):
                await container.delete(force=True, v=True)

    async def probe(self, own_config: str | None, progress: Progress) -> Dialect:
        """Run PROBE in the broker's image; StackError for what would keep the broker from working."""
        settings = self.settings
        name = f"{settings.name}-probe-{secrets.token_hex(3)}"  # another directory's `up` may be probing right now
        await self._remove_probes()
        broker = spec.broker_spec(settings, None)
        config = {
            **broker,
            "Entrypoint": ["sh", "-c"],
            "Cmd": [PROBE],
            "Labels": spec.labels(settings, "probe"),
            "HostConfig": {**broker["HostConfig"], "NetworkMode": "none", "RestartPolicy": {"Name": "no"}},
            "Healthcheck": {"Test": ["NONE"]},
        }
        del config["NetworkingConfig"]
        async with explained(f"looking into {settings.broker_image}"):
            async with asyncio.timeout(PROBE_SECONDS):
                container = await self.client.containers.create(config, name=name)
        try:
            if own_config is not None:
                await self._put(container, spec.CONFIG, {"candidate.conf": own_config}, spec.BROKER_UID)
            async with explained(f"looking into {settings.broker_image}"):
                async with asyncio.timeout(PROBE_SECONDS):
                    await container.start()
                    await container.wait()
                lines = "".join(await container.log(stdout=True, stderr=True)).splitlines()
        finally:
            await self.remove(name)
        dialect = understand(lines, settings)
        progress(BROKER, f"Mosquitto {dialect}" + (" with file plugins" if dialect.plugins else ""))
        return dialect

    async def _proxied_port(self, own: brokerconf.Reading | None, dialect: Dialect, progress: Progress) -> int:
        """The broker's listener that will get each client's address from the connector; 0: none."""
        settings = self.settings
        if own is not None or settings.proxy_protocol is not None:
            return proxied_port(settings, own, dialect, progress, sends=True)
        labels = await engineapi.image_labels(self.client, settings.connector_image)
        return proxied_port(settings, own, dialect, progress, sends=spec.LABEL_DEFAULTS in labels)

    async def _put(self, container: Any, folder: str, files: dict[str, str], uid: int) -> None:
        async with explained(f"writing files into {folder}"):
            await container.put_archive(folder, spec.archive(files, uid))

    async def remove(self, name: str) -> None:
        """Remove a container by force, if there is one."""
        found = await self._find(name)
        if found is not None:
            async with explained(f"removing {name}", missing_ok=True):
                await found[0].delete(force=True, v=True)

    async def _create(self, name: str, config: dict[str, Any], settings_label: bool) -> Any:
        config = {**config, "Labels": dict(config["Labels"])}
        if settings_label:
            config["Labels"][spec.LABEL_SETTINGS] = json.dumps(asdict(self.settings))
        async with explained(f"creating {name}"):
            return await self.client.containers.create(config, name=name)

    async def _up_broker(
        self, wanted: Wanted, own: brokerconf.Reading | None, dialect: Dialect, progress: Progress
    ) -> None:
        settings = self.settings
        name = spec.broker_name(settings.name)
        text = wanted.own_config
        if text is None:
            text = spec.broker_conf(dialect, settings)
        config = spec.broker_spec(settings, own)
        digest = spec.digest(config, text)
        config["Labels"][spec.LABEL_HASH] = digest
        files = spec.account_files(wanted.passwords, wanted.acl, wanted.health_password)
        found = await self._find(name)
        if found is not None:
            self._ours(found[1], name)  # again: another directory's `up` may have made it meanwhile
        if found is not None and found[1]["Config"]["Labels"].get(spec.LABEL_HASH) == digest:
            container, facts = found
            await self._put(container, spec.CONFIG, {**files, "mosquitto.conf": text}, spec.BROKER_UID)
            if await self._start(container, facts, progress, BROKER):
                progress(BROKER, "runs as wanted already")
                with contextlib.suppress(StackError):  # it ends just now: the next start reads the files
                    await self._hang_up(container)
        else:
            if found is not None:
                progress(BROKER, "replacing it: its settings or image changed; the data stays")
                await self._stop(found[0], name, spec.BROKER_STOP_SECONDS)
                await self.remove(name)
            container = await self._create(name, config, True)
            await self._put(container, spec.CONFIG, {**files, "mosquitto.conf": text}, spec.BROKER_UID)
            if found is None and wanted.database is not None:
                async with explained("copying the database"):
                    await container.put_archive(
                        spec.DATA, spec.archive({"mosquitto.db": wanted.database}, spec.BROKER_UID)
                    )
                progress(BROKER, "took the database that was imported")
            progress(BROKER, "starting")
            async with explained(f"starting {name}"):
                await container.start()
        await self._wait_broker(container, own)
        progress(BROKER, "healthy: it took a QoS 1 message" if own is None else "healthy: it answers")

    async def _start(self, container: Any, facts: dict[str, Any], progress: Progress, service: str) -> bool:
        """Let it run; True when it does already. One that keeps ending waits ever longer for its restart: not now."""
        state = facts["State"]
        if state.get("Running") and not state.get("Restarting"):
            return True
        async with explained(f"starting the {service}"):
            if state.get("Restarting"):
                progress(service, "it ended and waits for its restart: starting it now")
                await container.restart(t=5)
            else:
                await container.start()
        return False

    async def _wait_broker(self, container: Any, own: brokerconf.Reading | None) -> None:
        command = spec.HEALTH_COMMAND if own is None else spec.ALIVE_COMMAND.format(port=spec.broker_port(own))
        deadline = time.monotonic() + BROKER_SECONDS
        before = (await self._show(container)).get("RestartCount", 0)  # what it lived through is not held against it
        said = ""
        while time.monotonic() < deadline:
            facts = await self._show(container)
            if facts["State"].get("Status") in {"exited", "dead"} or facts.get("RestartCount", 0) > before + 2:
                break
            if facts["State"].get("Running"):
                try:
                    status, said = await run_in(container, ["sh", "-c", command], limit=20)
                except StackError:
                    if not (await self._show(container))["State"].get("Restarting"):
                        raise
                    status = 1
                if status == 0:
                    return
            await asyncio.sleep(STABLE_SECONDS)
        lines = await self._tail(container, 6)
        await self._give_up(container)
        raise StackError(
            f"the broker did not become healthy: {said.strip()[:200] or 'it ends'}; last lines: {' | '.join(lines)}",
            advice="it was stopped and its data kept; mend the cause, then run `launcher up` again",
        )

    async def _give_up(self, container: Any) -> None:
        """A broker that restarts for ever helps nobody: stop it."""
        with contextlib.suppress(StackError):
            await self._stop(container, "the broker", 5)

    async def _up_connector(self, wanted: Wanted, progress: Progress) -> None:
        settings = self.settings
        name = spec.connector_name(settings.name)
        config = spec.connector_spec(settings, ca=wanted.connector_ca is not None)
        digest = spec.digest(config, spec.sealed(settings, wanted.token), wanted.connector_ca or "")
        config["Labels"][spec.LABEL_HASH] = digest
        files = {"token": wanted.token}
        if wanted.connector_ca is not None:
            files["edge-ca.pem"] = wanted.connector_ca
        found = await self._find(name)
        if found is not None:
            self._ours(found[1], name)  # again: another directory's `up` may have made it meanwhile
        if found is not None and found[1]["Config"]["Labels"].get(spec.LABEL_HASH) == digest:
            container = found[0]
            # An `up` that was cut off may have created it and not come to its files.
            await self._put(container, spec.CONNECTOR_DIR, files, spec.CONNECTOR_UID)
            if await self._start(container, found[1], progress, CONNECTOR):
                progress(CONNECTOR, "runs as wanted already")
        else:
            if found is not None:
                progress(CONNECTOR, "replacing it: its token, settings or image changed")
                await self._stop(found[0], name, spec.CONNECTOR_STOP_SECONDS)
                await self.remove(name)
            container = await self._create(name, config, False)
            await self._put(container, spec.CONNECTOR_DIR, files, spec.CONNECTOR_UID)
            progress(CONNECTOR, "starting")
            async with explained(f"starting {name}"):
                await container.start()
        await self._wait_connector(container, wanted.wait_seconds, progress)

    async def _wait_connector(self, container: Any, seconds: float, progress: Progress) -> None:
        deadline = time.monotonic() + seconds
        before = (await self._show(container)).get("RestartCount", 0)
        pause = 0.2
        while time.monotonic() < deadline:
            ready = await self.fetch("/ready")
            if isinstance(ready, dict) and ready.get("readyConnections"):
                count = ready["readyConnections"]
                progress(CONNECTOR, f"registered: {count} connection{'s' if count != 1 else ''} to the edge")
                return
            facts = await self._show(container)
            if facts["State"].get("Status") in {"exited", "dead"} or facts.get("RestartCount", 0) > before + 1:
                break
            await asyncio.sleep(pause)
            pause = min(1.0, pause * 1.5)
        lines = await self._tail(container, 60)
        facts = await self._show(container)
        why = last_error(lines) or " | ".join(lines[-3:]) or "it said nothing"
        if facts["State"].get("Status") in {"exited", "dead"} or facts.get("RestartCount", 0) > before + 1:
            await self._stop(container, "the connector", 5)
            raise StackError(
                f"the connector ends instead of registering: {why}",
                advice="it was stopped, the broker runs; mend the cause (a wrong token?), then run `launcher up` again",
            )
        raise StackError(
            f"the connector is not registered after {seconds:.0f} s: {why}",
            advice="both go on running and it keeps trying; watch it with: launcher logs -f connector",
        )

    # Down and restart.

    async def _stop(self, container: Any, name: str, seconds: int) -> None:
        async with explained(f"stopping {name}", missing_ok=True):
            await container.stop(t=seconds, timeout=seconds + 30)

    async def down(self, progress: Progress, *, volumes: bool = False) -> bool:
        """Connector drains and goes, broker saves and goes, then the network."""
        settings, did = self.settings, False
        for name, seconds, service in (
            (spec.connector_name(settings.name), spec.CONNECTOR_STOP_SECONDS, CONNECTOR),
            (spec.broker_name(settings.name), spec.BROKER_STOP_SECONDS, BROKER),
        ):
            found = await self._find(name)
            if found is None:
                continue
            self._ours(found[1], name)
            did = True
            if found[1]["State"].get("Running"):
                progress(service, "stopping" + (": it drains first" if service == CONNECTOR else ": it saves first"))
                await self._stop(found[0], name, seconds)
            await self.remove(name)
            progress(service, "gone")

        await self._remove_probes()
        network = spec.network_name(settings.name)
        async with explained(f"removing the network {network}", missing_ok=True):
            for one in await self._networks():
                if (one.get("Labels") or {}).get(spec.LABEL_STACK) == settings.name:
                    await (await self.client.networks.get(one["Id"])).delete()
                    did = True
        if volumes:
            name = settings.name
            for volume in (spec.config_volume(name), spec.data_volume(settings), spec.connector_volume(name)):
                did = await self.remove_volume(volume) or did
        return did

    async def remove_volume(self, name: str) -> bool:
        """Remove a volume; False when there was none."""
        from aiodocker.volumes import DockerVolume  # noqa: PLC0415

        volume: Any = DockerVolume(self.client, name)  # type: ignore[no-untyped-call]
        removed: list[str] = []
        async with explained(f"removing the volume {name}", missing_ok=True):
            await volume.delete()
            removed.append(name)
        return bool(removed)

    async def restart(self, services: Sequence[str], progress: Progress, wait_seconds: float = 60.0) -> None:
        """Connector down first and up last, so that it drains while the broker is still there."""
        settings = self.settings
        found = {}
        for service, name in (
            (BROKER, spec.broker_name(settings.name)),
            (CONNECTOR, spec.connector_name(settings.name)),
        ):
            if service in services:
                one = await self._find(name)
                if one is None:
                    raise StackError(f"there is no {service} to restart", advice="launcher up makes it")
                self._ours(one[1], name)
                found[service] = one[0]
        if CONNECTOR in found:
            progress(CONNECTOR, "stopping: it drains first")
            await self._stop(found[CONNECTOR], CONNECTOR, spec.CONNECTOR_STOP_SECONDS)
        if BROKER in found:
            progress(BROKER, "stopping: it saves first")
            await self._stop(found[BROKER], BROKER, spec.BROKER_STOP_SECONDS)
            async with explained("starting the broker"):
                await found[BROKER].start()
            own = _own_reading(settings)
            await self._wait_broker(found[BROKER], own)
            progress(BROKER, "healthy")
        if CONNECTOR in found:
            async with explained("starting the connector"):
                await found[CONNECTOR].start()
            await self._wait_connector(found[CONNECTOR], wait_seconds, progress)

    async def reload(self, passwords: str, acl: str, health_password: str) -> None:
        """New files, SIGHUP, a check; the old files again when the broker does not take them."""
        name = spec.broker_name(self.settings.name)
        found = await self._find(name)
        if found is None:
            return  # not up: the files of the next start
        container, facts = found
        self._ours(facts, name)
        before = await self.stored_files()
        await self._put(container, spec.CONFIG, spec.account_files(passwords, acl, health_password), spec.BROKER_UID)
        if not facts["State"].get("Running"):
            return
        await self._hang_up(container)
        try:
            await self._wait_healthy_again(container)
        except StackError as error:
            old = spec.account_files(
                before.get("passwords", ""), before.get("acl", ""), before.get("health/password", "")
            )
            await self._put(container, spec.CONFIG, old, spec.BROKER_UID)
            async with explained("going back to the old users and rules"):
                await container.restart(t=10)
            await self._wait_healthy_again(container)
            raise StackError(
                f"the broker did not take the change: {error}", advice="it has its old users and rules again"
            ) from error

    @staticmethod
    async def _hang_up(container: Any) -> None:
        """SIGHUP from inside: the engine's own kill call, whatever the signal, ends the restart policy (20.10)."""
        await run_in(container, ["sh", "-c", "kill -HUP 1"])

    async def _wait_healthy_again(self, container: Any) -> None:
        if self.settings.own_config:
            return
        said = ""
        for _ in range(10):
            facts = await self._show(container)
            if facts["State"].get("Running"):
                status, said = await run_in(container, ["sh", "-c", spec.HEALTH_COMMAND], limit=20)
                if status == 0:
                    return
            await asyncio.sleep(STABLE_SECONDS)
        raise StackError(f"its health check fails: {said.strip()[:200]}")


def _own_reading(settings: Settings) -> brokerconf.Reading | None:
    if settings.own_config is None:
        return None
    with stored(settings.own_config):
        return brokerconf.read(Path(settings.own_config).read_text(encoding="utf-8"))
