"""Removes a demo's containers when the demo was killed: `python -m launcher.reaper ENGINE NAME`.

Owns: waiting for the end of standard input, whose other end only the demo holds; removing what carries its label.
In: an engine, a stack name that begins with `tunnel-demo-`. Out: nothing is left; exit status 0.
Never: touches another stack.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import Any, Literal

from launcher import engineapi
from launcher.containerspec import LABEL_STACK
from launcher.stackdir import StackError

PREFIX = "tunnel-demo-"
ROUNDS = 10
"""The demo may have been killed while the engine was creating something: look again until a round finds nothing."""


async def remove_all(kind: Literal["docker", "podman"], name: str) -> None:
    """Remove containers, network and volumes of the demo `name`."""
    client, _ = await engineapi.connect(kind)
    try:
        async with engineapi.explained("removing the demo"):
            for _ in range(ROUNDS):
                label = json.dumps({"label": [f"{LABEL_STACK}={name}"]})
                found = await client.containers.list(all=True, filters=label)
                for container in found:
                    await container.delete(force=True, v=True)
                if not found:
                    break
                await asyncio.sleep(0.5)
            networks: Any = client.networks
            volumes: Any = client.volumes
            for network in await networks.list(filters={"label": [f"{LABEL_STACK}={name}"]}):
                await (await networks.get(network["Id"])).delete()
            for volume in (await volumes.list()).get("Volumes") or []:
                if str(volume["Name"]).startswith(f"{name}-"):
                    await (await volumes.get(volume["Name"])).delete()
    finally:
        await client.close()


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 2 or not arguments[1].startswith(PREFIX):
        print("usage: python -m launcher.reaper ENGINE tunnel-demo-NAME", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a closed terminal must not end the one that cleans up
    sys.stdin.buffer.read()
    try:
        asyncio.run(remove_all("podman" if arguments[0] == "podman" else "docker", arguments[1]))
    except StackError:
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
