"""A dispatcher in front of one or more origins, and the events it reported."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from connector.protocol.ports import RequestKind
from connector.proxy.dispatch import Dispatcher
from connector.proxy.ingress import USUAL, Ingress, OriginSettings, parse_remote_config
from tests.support.memory_port import MemoryPort, open_stream, request

CONNECTOR_ID = UUID("11111111-2222-4333-8444-555555555555")


class Rig:
    """One dispatcher under test."""

    def __init__(self, ingress: Ingress, **options: Any) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.dispatcher = Dispatcher(
            ingress=ingress,
            connector_id=CONNECTOR_ID,
            loop=asyncio.get_running_loop(),
            on_event=lambda name, fields: self.events.append((name, fields)),
            **options,
        )

    def open(self, method: str = "GET", target: str = "/", *, high_water: int | None = None, **kind: Any) -> MemoryPort:
        return open_stream(self.dispatcher.accept, request(method, target, **kind), high_water=high_water)

    def websocket(self, target: str = "/", *, high_water: int | None = None, **kind: Any) -> MemoryPort:
        return self.open("GET", target, high_water=high_water, kind=RequestKind.WEBSOCKET, **kind)

    def failures(self) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == "failed"]

    def pool(self) -> Any:
        route = self.dispatcher._routes[0]
        assert route is not None
        return route.pool


@asynccontextmanager
async def rig(
    service: str, settings: dict[str, Any] | None = None, *, base: OriginSettings = USUAL, **options: Any
) -> AsyncIterator[Rig]:
    """Serve every request from one origin; on leaving nothing may be active or open."""
    config = {"ingress": [{"service": service, "originRequest": settings or {}}]}
    it = Rig(parse_remote_config(1, config, base), **options)
    try:
        yield it
    finally:
        await it.dispatcher.close()
    assert it.dispatcher.active == 0
    assert it.dispatcher.open_connections == 0
    assert it.dispatcher.dialling == 0
