"""A tunnel as a part of another program: `async with connector.Tunnel(...)`.

Owns: Tunnel, and its log's way into `logging`. In: a token, rules or an ASGI application, options. Out: a tunnel that
is connected when the `with` block begins and drained when it has ended.
Never: touches signals, the process's title, limits or standard streams: they are the program's own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import structs

from connector.app.config import RunConfig, split_address
from connector.app.logs import LEVELS, Logger, LogOutput
from connector.app.process import RunEndedError, serve
from connector.app.signals import Stop, StoppedEarlyError
from connector.app.state import TunnelState
from connector.errors import ConfigError, ConnectorError
from connector.proxy.asgi import Application, AsgiSite
from connector.proxy.ingress import Ingress, ServiceKind, ingress_from_url, parse_remote_config
from connector.proxy.ingress import Service as ServedService
from connector.wire.token import Token, decode_token

Service = str | Application
Rules = Service | Sequence[Mapping[str, Any]]

_LEVEL_NUMBERS = {"trace": 5, "debug": 10, "info": 20, "warn": 30, "error": 40, "fatal": 50}


class _LoggingOutput(LogOutput):
    """Log lines as records of the logger `connector`; fields stand in the text and in `record.fields`."""

    def __init__(self, logger: logging.Logger) -> None:
        level = next((name for name in LEVELS if logger.isEnabledFor(_LEVEL_NUMBERS[name])), "fatal")
        super().__init__(level=level)
        self._logger = logger

    def _write(self, level: str, message: str, fields: dict[str, Any]) -> None:
        text = " ".join([message, *(f"{name}={value}" for name, value in sorted(fields.items()))])
        self._logger.log(_LEVEL_NUMBERS[level], "%s", self.redactor.redact(text), extra={"fields": fields})


class Tunnel:
    """One tunnel, run by this program's event loop. Use as `async with Tunnel(...) as tunnel:`, once.

    `ingress` is what requests go to: a URL such as `http://localhost:8080`, an ASGI application, or a list of rules as
    in cloudflared's configuration (`hostname`, `path`, `service`, `originRequest`), whose `service` may be an
    application too. Without it the edge's configuration says; with it the edge's pushes are refused, since the program
    decides.

    `edge` are `HOST:PORT`s to use instead of Cloudflare's; `cacert` is a PEM file to trust for them. `metrics` is where
    to serve the metrics address, nowhere by default. Times are in seconds. Lines go to `logging`, logger `connector`.

    Errors of entering: ConnectorError and its kinds (a token that is none, an edge that refuses it). Retries go on for
    ever otherwise, so surround it with `asyncio.timeout` where a start must not hang.
    """

    def __init__(
        self,
        *,
        token: str,
        ingress: Rules | None = None,
        edge: Sequence[str] = (),
        cacert: str | None = None,
        protocol: str = "auto",
        region: str = "",
        ha_connections: int = 4,
        grace_period: float = 30.0,
        retries: int = 5,
        tags: Mapping[str, str] | None = None,
        metrics: str | None = None,
        logger: logging.Logger | None = None,
    ) -> None:
        self.log = Logger(_LoggingOutput(logger or logging.getLogger("connector")))
        config = RunConfig(decode_token(token))
        self.log.output.redactor.add(token)
        self.log.output.redactor.add_bytes(config.token.secret)
        if protocol not in {"auto", "quic", "http2"}:
            raise ConfigError(f"unknown protocol {protocol}", advice="Allowed: auto, quic, http2.")
        for each in edge:
            split_address(each, "edge")
        config.edges, config.cacert, config.protocol = list(edge), cacert, protocol
        config.region = region or config.token.endpoint
        config.ha_connections, config.grace_period, config.retries = ha_connections, grace_period, retries
        config.tags = list((tags or {}).items())
        config.metrics = metrics
        self.sites: dict[str, AsgiSite] = {}
        if ingress is not None:
            config.fixed_ingress = self._rules(ingress)
            config.features = [name for name in config.features if name != "allow_remote_config"]
        config.applications = self.sites
        self._config = config
        self._stop = Stop()
        self._task: asyncio.Task[None] | None = None
        self._state: TunnelState | None = None

    def __repr__(self) -> str:
        return f"<Tunnel {self._config.token.tunnel_id} {self.ready_connections} connections>"

    @property
    def token(self) -> Token:
        """Which tunnel; its `repr` shows no secret."""
        return self._config.token

    @property
    def connector_id(self) -> str:
        """This connector's UUID, as the dashboard shows it."""
        return "" if self._state is None else str(self._state.connector_id)

    @property
    def ready_connections(self) -> int:
        """How many connections to the edge are registered now."""
        return 0 if self._state is None else len(self._state.connected)

    async def wait_closed(self) -> None:
        """Wait until the tunnel ends by itself. Errors: ConnectorError, what ended it."""
        assert self._task is not None, "use `async with`"
        try:
            await asyncio.shield(self._task)
        except RunEndedError as error:
            raise _cause(error) from None

    async def __aenter__(self) -> Tunnel:
        if self._task is not None:
            raise RuntimeError("a Tunnel is used once")
        started: list[AsgiSite] = []
        try:
            for site in self.sites.values():
                await site.startup()
                started.append(site)
            await self._connect()
        except BaseException:
            await self._end()
            for site in started:
                await site.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._end()
        finally:
            for site in self.sites.values():
                await site.close()

    async def _connect(self) -> None:
        up: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_up(state: TunnelState) -> None:
            self._state = state
            if not up.done():
                up.set_result(None)

        self._task = asyncio.create_task(serve(self._config, self.log, self._stop, on_up=on_up), name="tunnel")
        await asyncio.wait({self._task, up}, return_when=asyncio.FIRST_COMPLETED)
        if up.done():
            return
        error = self._task.exception()
        assert error is not None
        raise _cause(error)

    async def _end(self) -> None:
        if self._task is None:
            return
        self._stop.ask()
        try:
            await asyncio.shield(self._task)
        except asyncio.CancelledError:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            raise
        except (RunEndedError, StoppedEarlyError, ConnectorError):
            pass  # it was told by the one who entered or waited

    def _rules(self, ingress: Rules) -> Ingress:
        """Make the rule set; applications get a site each."""
        if isinstance(ingress, str) and ingress.startswith(("http_status:", "hello_world", "unix:", "unix+tls:")):
            return self._rules([{"service": ingress}])
        if isinstance(ingress, str):
            return ingress_from_url(ingress)
        if callable(ingress):
            return self._rules([{"service": ingress}])
        documents, names = [], []
        for rule in ingress:
            service = rule.get("service")
            if callable(service):
                name = f"asgi:{getattr(service, '__qualname__', type(service).__qualname__)}"
                while name in self.sites and self.sites[name].application is not service:
                    name += "'"
                self.sites.setdefault(name, AsgiSite(service, name=name.removeprefix("asgi:")))
                names.append(name)
                documents.append({**rule, "service": "http_status:503"})
            else:
                names.append("")
                documents.append(dict(rule))
        parsed = parse_remote_config(-1, {"ingress": documents})
        rules = tuple(
            structs.replace(rule, service=ServedService(ServiceKind.APPLICATION, name)) if name else rule
            for rule, name in zip(parsed.rules, names, strict=True)
        )
        return Ingress(-1, rules, parsed.warp_routing, parsed.warnings, parsed.defaults)


def _cause(error: BaseException) -> BaseException:
    """Give the error that ended a run, without the wrapping that says that it was logged."""
    return error.__cause__ or error if isinstance(error, RunEndedError) else error
