"""`connector edge` with an inspector around it.

Owns: what `--inspect` and `--capture` mean on the dev edge, and what its page may order: faults, and replays through
the edge. In: argv. Out: an exit status. Never: does anything without one of the two flags.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from connector.devedge.cli import main as edge_main
from connector.devedge.faults import GRAMMAR
from connector.devedge.repeat import repeat
from connector.devedge.server import DevEdge
from connector.errors import UsageError


def main(argv: list[str]) -> int:
    """Run `connector edge`."""
    return edge_main(argv, inspected)


@asynccontextmanager
async def inspected(edge: DevEdge, args: argparse.Namespace) -> AsyncIterator[None]:
    """Watch a dev edge."""
    from connector.app.inspecting import CaptureControls, changed_request, serve  # noqa: PLC0415 - loads the page
    from connector.inspector.hub import Inspector  # noqa: PLC0415
    from connector.inspector.streams import StreamRecord  # noqa: PLC0415

    hub = Inspector("edge", no_redact=args.no_redact, title=", ".join(tunnel.name for tunnel in edge.tunnels))

    class EdgeControls(CaptureControls):
        """Orders to a running dev edge."""

        features = ("capture", "replay", "faults")

        async def replay(self, record: StreamRecord, changes: dict[str, Any]) -> int:
            """Send a request through the edge again."""
            request, body = changed_request(record, changes)
            before = hub.seen
            repeat(edge.roster, request.method, request.host, request.target, request.headers, body)
            if hub.seen == before:
                raise UsageError("the edge could not send it", advice="Is a connector attached?")
            hub.streams[hub.seen].replay = record.identity
            return hub.seen

        def faults(self) -> dict[str, Any]:
            """Return what is in force."""
            return {"active": edge.roster.faults.active(), "grammar": GRAMMAR}

        def add_fault(self, text: str) -> None:
            """Switch one on."""
            edge.roster.faults.add(text)
            edge.events.emit("fault", on=text)

        def clear_fault(self, name: str) -> None:
            """Switch one, or all, off."""
            edge.roster.faults.clear(name)
            edge.events.emit("fault", off=name or "all")

    def say(text: str, fields: dict[str, Any]) -> None:
        edge.events.emit("inspector", message=text, **fields)

    def warn(text: str) -> None:
        print(f"connector edge: {text}", file=sys.stderr)

    remove = edge.events.listen(lambda event: hub.on_event("edge", {"message": event["event"], **event}))
    edge.roster.tap = hub
    try:
        async with serve(hub, EdgeControls(hub), args.inspect, args.capture, say, warn):
            yield
    finally:
        edge.roster.tap = None
        remove()
