"""The metrics address: /ready, /healthcheck and a minimal /metrics.

Owns: one HTTP server. In: a Snapshot per request. Out: answers. Never: changes anything; keeps connections' state.
"""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from aiohttp import web

from connector import __version__
from connector.app.config import split_address
from connector.app.state import Snapshot
from connector.errors import ConfigError

CLOSE_SECONDS = 2.0
"""What running answers get at shutdown; they are tiny."""


class HealthServer:
    """Serves until closed. `async with HealthServer(...)`; the task is aiohttp's own accept callback, not ours."""

    __slots__ = ("_address", "_connector_id", "_runner", "_snapshot", "address")

    def __init__(self, address: str, connector_id: UUID, snapshot: Callable[[], Snapshot]) -> None:
        self._address = address
        self._connector_id = connector_id
        self._snapshot = snapshot
        self._runner = web.ServerRunner(web.Server(self._answer), shutdown_timeout=CLOSE_SECONDS)
        self.address = address
        """Where it listens, with the real port; valid inside `async with`."""

    async def __aenter__(self) -> HealthServer:
        host, port = split_address(self._address, "--metrics", any_host=True)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, _bind_host(host, port), port).start()
        except OSError as error:
            await self._runner.cleanup()
            cause = error.strerror or str(error)
            raise ConfigError(
                f"Error opening metrics server listener: failed to bind to address ({self._address}): {cause}",
                advice="Another process may use this port: give another one with --metrics HOST:PORT.",
            ) from None
        bound_host, bound_port = self._runner.addresses[0][:2]
        self.address = f"[{bound_host}]:{bound_port}" if ":" in bound_host else f"{bound_host}:{bound_port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        match request.path:
            case "/ready":
                now = self._snapshot()
                ready = now.ready_connections
                status = 200 if ready else 503
                text = f'{{"status":{status},"readyConnections":{ready},"connectorId":"{self._connector_id}"'
                if now.quic.text:  # for people; without news the answer is cloudflared's to the byte
                    text += f',"quic":{{"status":"{now.quic.status.value}","reason":"{now.quic.text}"}}'
                text += "}"
                return web.Response(status=status, text=text, content_type="application/json")
            case "/healthcheck":
                return web.Response(text="OK\n")
            case "/metrics":
                return web.Response(text=self._metrics(), content_type="text/plain")
            case _:
                return web.Response(status=404, text="404 page not found\n")

    def _metrics(self) -> str:
        now = self._snapshot()
        rows: tuple[tuple[str, str, str, int], ...] = (
            ("build_info", "gauge", f'{{version="{__version__}"}}', 1),
            ("cloudflared_tunnel_ha_connections", "gauge", "", now.connection_tasks),
            ("cloudflared_tunnel_concurrent_requests_per_tunnel", "gauge", "", now.active_streams),
            (
                "cloudflared_tunnel_tunnel_register_success", "counter", '{rpcName="registerConnection"}',
                now.registrations,
            ),
            ("cloudflared_orchestration_config_version", "gauge", "", now.config_version),
        )  # fmt: skip
        path = now.quic
        rows += (
            (
                "connector_quic_path", "gauge",
                f'{{status="{path.status.value}",reason="{path.reason.value if path.reason else ""}"}}', 1,
            ),
            *(
                (
                    "connector_edge_link_ends", "counter",
                    f'{{transport="{transport.value}",reason="{reason.value}"}}', count,
                )
                for (transport, reason), count in now.link_ends.items()
            ),
        )  # fmt: skip
        text, last = "", ""
        for name, kind, labels, value in rows:
            text += ("" if name == last else f"# TYPE {name} {kind}\n") + f"{name}{labels} {value}\n"
            last = name
        return text


def _bind_host(host: str, port: int) -> str | None:
    """Give what to bind: localhost is IPv4 alone, as Go has it; no host is everything, but one socket for port 0."""
    if host == "localhost":
        return "127.0.0.1"
    return host or (None if port else "0.0.0.0")
