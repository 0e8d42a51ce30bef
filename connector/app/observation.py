"""Everything by which a run can be watched, put together: meters, access log, tracing, metrics
address, management.

Owns: the order in which the parts start. In: RunConfig, Dispatcher, Logger. Out: an Observation.
Never: decides anything about the tunnel.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from uuid import UUID

from connector.app.access_log import access_log
from connector.app.config import RunConfig
from connector.app.logs import Logger
from connector.app.meters import Meters
from connector.app.metrics import Metrics
from connector.app.metrics_server import MetricsServer
from connector.app.pages import Pages
from connector.app.state import TunnelState
from connector.protocol.ports import Request, StreamPort, StreamSink
from connector.proxy.dispatch import Dispatcher
from connector.proxy.watch import RequestTrace

if TYPE_CHECKING:  # loaded by the first request that wants it
    from connector.app.management import Management
    from connector.app.workers.crew import Crew


class Observation:
    """One per run: made before the first request can come, served around the supervisor's run.

    With a `crew` it shows what all its workers do.
    """

    def __init__(
        self, config: RunConfig, connector_id: UUID, dispatcher: Dispatcher, log: Logger, crew: Crew | None = None
    ) -> None:
        self._config = config
        self._connector_id = connector_id
        self._log = log
        self._state: TunnelState | None = None
        self._management: Management | None = None
        self.meters = Meters(lambda: dispatcher.ingress.rules, access_log(log), every=config.access_log)
        dispatcher.watch = self.meters
        dispatcher.tracing = _trace_request
        log.output.on_listen = lambda: dispatcher.set_access_events(log.output.enabled("debug"))
        if crew is None:
            self.metrics = Metrics(dispatcher, self.meters)
            self.pages = Pages(config, connector_id, dispatcher, self.metrics)
        else:
            self.metrics, self.pages = crew.make_pages(dispatcher, self.meters)
        self.metrics.hostname = config.quick_hostname
        dispatcher.management_host = config.management_host.encode()
        dispatcher.management = self._manage

    def close_streams(self) -> None:
        """End the log streams."""
        if self._management is not None:
            self._management.streams.close()

    def _manage(self, request: Request, port: StreamPort) -> StreamSink:
        """Answer a request for the management host."""
        if self._management is None:
            from connector.app.management import Management  # noqa: PLC0415  (few are ever asked)

            self._management = Management(
                self._config,
                self._connector_id,
                self._log,
                metrics=self.metrics.answer,
                profiles=self.pages.shared_profiles(),
            )
            self._management.state = self._state
        return self._management.accept(request, port)

    @asynccontextmanager
    async def serve(self, state: TunnelState) -> AsyncIterator[None]:
        """Serve the metrics address while the tunnel runs. Errors: ConfigError."""
        self.metrics.state = self._state = state
        if state.dialler.private is not None:
            self.pages.icmp_sources = state.dialler.private.icmp_sources
        address = self._config.metrics
        try:
            if address is None:
                yield
                return
            async with MetricsServer(address, self.pages.routes(), self._log) as server:
                self._log.info(f"Starting metrics server on {server.address}/metrics")
                yield
            self._log.info("Metrics server stopped")
        finally:
            if self._management is not None:
                await self._management.close()


def _trace_request(context: bytes, *, text: bool = False) -> RequestTrace | None:
    from connector.app.tracing import trace_request  # noqa: PLC0415  (few requests are traced)

    return trace_request(context, text=text)
