"""The Docker Engine API as the launcher uses it: aiodocker, with every failure in one line.

Owns: finding the socket, translating errors, pulling and building with progress, running a command in a container.
In: a socket or none, names. Out: aiodocker's objects; StackError.
Never: knows what a stack is. aiodocker is imported when the first engine is asked for (it takes half a second).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import tarfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launcher.pullprogress import PullProgress
from launcher.stackdir import StackError

if TYPE_CHECKING:
    import aiodocker

ANSWER_SECONDS = 60.0
"""Longest wait for an answer that is no stream: a loaded engine takes seconds; a dead one would take for ever."""

Kind = Literal["docker", "podman"]


def sockets(kind: Kind) -> list[str]:
    """Addresses where an engine of this kind may listen, most likely first."""
    host = os.environ.get("CONTAINER_HOST" if kind == "podman" else "DOCKER_HOST")
    if host:
        return [host]
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    if kind == "podman":
        places = [f"{runtime}/podman/podman.sock", "/run/podman/podman.sock"]
    else:
        home = Path.home()
        places = [
            "/var/run/docker.sock",
            f"{runtime}/docker.sock",
            f"{home}/.docker/run/docker.sock",
            f"{home}/.docker/desktop/docker.sock",
        ]
    return [f"unix://{place}" for place in places if Path(place).exists()]


def advice_for(kind: Kind) -> str:
    """What to do when there is no engine."""
    if kind == "podman":
        return "start its API: systemctl start podman.socket (or: podman system service --time=0 &), or --engine native"
    return (
        "is Docker installed and running, and may you use it (group docker)? DOCKER_HOST names another socket; "
        "--engine native does without containers"
    )


async def connect(kind: Kind) -> tuple[aiodocker.Docker, str]:
    """A client of the first engine that answers, and what it is; StackError when none does."""
    import aiodocker  # noqa: PLC0415 - half a second, needed by container commands only

    tried = sockets(kind)
    why = "no socket of it was found"
    for url in tried:
        client = aiodocker.Docker(url=url)
        try:
            version = await asyncio.wait_for(client.version(), 20)
            name = "Podman" if "podman" in str(version.get("Components", "")).lower() else "Docker"
            return client, f"{name} {version.get('Version')} (API {version.get('ApiVersion')})"
        except Exception as error:  # aiodocker lets anything of aiohttp, ssl and os through
            await client.close()
            why = f"{url} does not answer: {_words(error)}"
    raise StackError(f"no {kind} engine: {why}", advice=advice_for(kind))


def _words(error: BaseException) -> str:
    text = str(getattr(error, "message", "") or error) or type(error).__name__
    return text.splitlines()[0][:300] if text else type(error).__name__


@contextlib.asynccontextmanager
async def explained(doing: str, *, missing_ok: bool = False) -> AsyncIterator[None]:
    """Every way in which the engine can fail us, in one line with what we were doing. `missing_ok`: 404 passes."""
    import aiodocker  # noqa: PLC0415
    import aiohttp  # noqa: PLC0415

    try:
        yield
    except aiodocker.DockerError as error:
        if missing_ok and error.status == 404:
            return
        if error.status >= 600:  # aiodocker's way to say that there was no answer at all
            raise _gone(doing, error) from error
        raise StackError(f"{doing}: {_words(error)}", advice=_advice(_words(error))) from error
    except TimeoutError as error:
        raise StackError(f"{doing}: the engine did not answer in time", advice="is it overloaded or stuck?") from error
    except (aiohttp.ClientError, ConnectionError, OSError) as error:
        raise _gone(doing, error) from error


def _gone(doing: str, error: BaseException) -> StackError:
    return StackError(
        f"the engine went away while {doing}: {_words(error)}",
        advice="start it again, then run the same command: it goes on from what is there",
    )


def _advice(text: str) -> str:
    low = text.lower()
    if "no space left" in low:
        return "the engine's disk is full: make room (docker system df), then run the command again"
    if "port is already allocated" in low or "address already in use" in low:
        return "another program has that port"
    if "invalid reference" in low:
        return "an image is called NAME:TAG or NAME@sha256:..., in lower case"
    if any(words in low for words in ("no such host", "registry", "dial tcp", "access denied", "manifest unknown")):
        return "the registry cannot be reached or has no such image: check the name, or load the image by hand"
    if "conflict" in low and "already in use" in low:
        return "another command may be making it right now: run this again, choose another --name, or remove it"
    if "no such container" in low or "already in progress" in low:
        return "another command, or somebody by hand, removed it just now: run this again"
    return "see the engine's own log"


async def has_image(client: aiodocker.Docker, name: str) -> bool:
    """Whether the engine has it."""
    import aiodocker  # noqa: PLC0415

    async with explained(f"looking for the image {name}"):
        try:
            await client.images.inspect(name)
        except aiodocker.DockerError as error:
            if error.status == 404:
                return False
            raise
    return True


async def image_labels(client: aiodocker.Docker, name: str) -> dict[str, str]:
    """The labels of an image that the engine has."""
    async with explained(f"looking into the image {name}"):
        facts: Any = await client.images.inspect(name)
    return dict((facts.get("Config") or {}).get("Labels") or {})


async def pull(client: aiodocker.Docker, name: str, report: Callable[[str], None]) -> None:
    """Fetch the image, telling how far it is."""
    progress = PullProgress()
    async with explained(f"pulling {name}"):
        async for step in client.images.pull(name, stream=True, timeout=None):
            if step.get("error"):
                raise StackError(f"pulling {name}: {step['error']}", advice=_advice(str(step["error"])))
            text = progress.line(step)
            if text:
                report(text)


CONTEXT = (
    "Dockerfile",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "requirements.lock",
    "connector",
    "launcher",
    "proto",
)


def context_tar(root: Path) -> bytes:
    """The build context: what the Dockerfile copies, and nothing that is not source."""

    def keep(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = entry.name.rpartition("/")[2]
        if name in {"__pycache__", "token", ".env"} or name.endswith((".pyc", ".so")):
            return None
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mtime = 0
        return entry

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in CONTEXT:
            if (root / name).exists():
                tar.add(root / name, arcname=name, filter=keep)
    return buffer.getvalue()


def source_hash(context: bytes) -> str:
    """Tells two build contexts apart."""
    return hashlib.sha256(context).hexdigest()[:32]


async def build(
    client: aiodocker.Docker, context: bytes, tag: str, labels: dict[str, str], report: Callable[[str], None]
) -> None:
    """Build the Dockerfile of the context as `tag`, telling about its steps."""
    async with explained(f"building {tag}"):
        stream = client.images.build(
            fileobj=io.BytesIO(context), encoding="identity", tag=tag, labels=labels, stream=True, rm=True, timeout=None
        )
        async for step in stream:
            if step.get("error"):
                raise StackError(f"building {tag}: {step['error'].strip()}", advice=_advice(step["error"]))
            text = str(step.get("stream") or "").strip()
            if text.startswith(("Step ", "Successfully")):
                report(text)


async def run_in(
    container: Any, command: Sequence[str], *, user: str = "", stdin: bytes = b"", limit: float = ANSWER_SECONDS
) -> tuple[int, str]:
    """Run a command in a running container: (exit status, output of both streams)."""
    output = bytearray()
    async with explained(f"running {command[0]} in {container.id[:12]}"):
        async with asyncio.timeout(limit):
            execution = await container.exec(list(command), stdin=bool(stdin), user=user)
            async with execution.start(detach=False) as stream:
                if stdin:
                    await stream.write_in(stdin)
                while (message := await stream.read_out()) is not None:
                    if len(output) < 65536:
                        output += message.data
            facts = await execution.inspect()
    return int(facts.get("ExitCode") or 0), output.decode("utf-8", "replace")
