"""The entrance of the proxy: every stream of the edge is accepted here.

Owns: the rule set in force, one pool per rule, the streams that are active, counters and events.
In: Request and StreamPort from a link. Out: a StreamSink; events to `on_event`.
Never: parses HTTP or moves payload.

Events (`on_event(name, fields)`, only when somebody listens;
with `access_events=False` only `failed`:
`request` at the start, `response` when a head went out, `finished` at the end, `failed` with error, cause and advice.
All carry `request` (the Request itself), `kind`, `host`, `path` (never the query: it may hold secrets), `rule` and
`service`. An eyeball that goes away is a `finished` with `whole` false and `aborted`, not an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from connector.errors import ConnectorError
from connector.protocol.http1 import OwnFields
from connector.protocol.ports import Acceptor, Request, RequestKind, StreamPort, StreamSink, Tap
from connector.proxy import limits
from connector.proxy.builtin import IGNORE, ConfigurationSink, answer_status
from connector.proxy.destinations import Destinations
from connector.proxy.dispatch_end import close, drain
from connector.proxy.exchange import Exchange
from connector.proxy.flows import Flows
from connector.proxy.http import HttpExchange, Route
from connector.proxy.ingress import DEFAULT_INGRESS, Ingress, OriginSettings, Rule, ServiceKind
from connector.proxy.origin_proxy import NO_PROXIES, OriginProxies
from connector.proxy.origin_tls import ContextCache
from connector.proxy.origins import OriginPool
from connector.proxy.reply import UnsupportedError, cause_of, describe, refuse
from connector.proxy.splice import DrainQueue
from connector.proxy.watch import RequestTrace, Tracing, Watch
from connector.proxy.websocket import WebSocketExchange
from connector.proxy.write_queue import WriteQueue
from connector.proxy.ws_pings import PingClock, PingClocks

if TYPE_CHECKING:  # loaded where a rule or a request wants them
    from connector.proxy.access import Access, AccessGate
    from connector.proxy.asgi import AsgiSite
    from connector.proxy.hello_world import HelloSite
    from connector.proxy.tcp import FlowRoute

OnEvent = Callable[[str, dict[str, Any]], None]

OnConfiguration = Callable[[bytes], "bytes | asyncio.Future[bytes]"]
"""Answers the body of a push, at once or later."""


class Prepared(NamedTuple):
    """A rule set with its routes made, not yet in force."""

    ingress: Ingress
    routes: list[Route | FlowRoute | None]
    doubts: tuple[str, ...]
    """What may not work."""


class Dispatcher:
    """All streams of one connector, over whichever links they come. `accept` is the Acceptor of those links."""

    def __init__(
        self,
        *,
        ingress: Ingress = DEFAULT_INGRESS,
        connector_id: UUID,
        tags: Iterable[tuple[str, str]] = (),
        loop: asyncio.AbstractEventLoop,
        on_event: OnEvent | None = None,
        access_events: bool = True,
        on_configuration: OnConfiguration | None = None,
        flows: Flows | None = None,
        access_keys_url: str = "",
        origin_proxies: OriginProxies = NO_PROXIES,
    ) -> None:
        self.loop = loop
        self.flows = flows or Flows()
        self.on_event = on_event
        self._on_access: OnEvent | None = None
        self.set_access_events(access_events)
        self.on_configuration = on_configuration
        self.watch: Watch | None = None
        self.tap: Tap | None = None
        self.tracing: Tracing | None = None
        self.management: Acceptor | None = None
        """Serves the requests whose host is `management_host`; set both."""
        self.management_host = b""
        self.applications: Mapping[str, AsgiSite] = {}
        """Code that serves rules of this process's own, by the text of their service."""
        self.requests = 0
        self.errors = 0
        self.responses: dict[int, int] = {}
        """Whole responses by status."""
        self.failures: dict[str, int] = {}
        """Requests that failed, by cause (`reply.cause_of`): for meters."""
        names = [(f"Cf-Warp-Tag-{name}", value) for name, value in tags]
        self._fields = OwnFields(
            (name.encode(), value.encode()) for name, value in [*names, ("Cf-Warp-Tag-ID", str(connector_id))]
        )
        self.writes = WriteQueue()
        """Where links say where their reads begin and end."""
        self._active: set[Exchange] = set()
        self._gates: set[AccessGate] = set()
        self._told: set[Exchange] = set()
        self._access_keys_url = access_keys_url
        self._access: Access | None = None
        self._hello: HelloSite | None = None
        self._destinations = Destinations(loop)
        self._tcp_drains = DrainQueue(loop, self.writes, limits.TCP_HALF_CLOSED, while_moving=True)
        self._carrier_clock = PingClock(loop, limits.CARRIER_PING)
        self._configuring = 0
        self._drained: asyncio.Future[None] | None = None
        self._drains = DrainQueue(loop, self.writes)
        self._clocks = PingClocks(loop)
        self._proxies = origin_proxies
        self._routes: list[Route | FlowRoute | None] = []
        self._retired: list[OriginPool] = []
        self._ingress = DEFAULT_INGRESS
        self._closed = False
        self.doubts = self.set_ingress(ingress)
        """What of the first rules may not work; see `set_ingress`."""

    def set_access_events(self, wanted: bool) -> None:
        """Report every request from now on, or failures only."""
        self._on_access = self.on_event if wanted else None

    @property
    def ingress(self) -> Ingress:
        """The rule set in force."""
        return self._ingress

    @property
    def active(self) -> int:
        """Streams that are being served."""
        return len(self._active) + len(self._gates) + self._configuring

    def live(self) -> Iterable[tuple[Rule, tuple[int, int]]]:
        """Every request that a rule serves now, with its payload bytes from and to the edge so far."""
        return [(exchange.rule, exchange.port.traffic()) for exchange in self._active if exchange.rule is not None]

    @property
    def open_connections(self) -> int:
        """Connections to origins, idle ones included."""
        return sum(pool.open for pool in self.pools())

    @property
    def dialling(self) -> int:
        """Dials in flight: the only tasks of the proxy."""
        return sum(pool.dialling for pool in self.pools())

    def set_ingress(self, ingress: Ingress) -> tuple[str, ...]:
        """Put a rule set in force for new requests; running ones finish on the old one. Return what may not work.

        Errors: ConfigError when an origin cannot start (unreadable `caPool`); then nothing has changed.
        """
        prepared = self.prepare(ingress)
        self.enforce(prepared)
        return prepared.doubts

    def prepare(self, ingress: Ingress) -> Prepared:
        """Do everything that can fail about putting a rule set in force. Errors: ConfigError."""
        self._load_services(ingress)
        contexts = ContextCache()
        kinds = (ServiceKind.HTTP, ServiceKind.HELLO)
        doubts = tuple(filter(None, (contexts.doubt(rule) for rule in ingress.rules if rule.service.kind in kinds)))
        return Prepared(ingress, [self._make_route(rule, contexts) for rule in ingress.rules], doubts)

    def enforce(self, prepared: Prepared) -> None:
        """Put a rule set in force that was prepared here."""
        ingress, routes, _ = prepared
        for route in self._routes:
            if isinstance(route, Route):
                route.pool.close()
                self._retired.append(route.pool)
        self._retired = [pool for pool in self._retired if pool.open or pool.dialling]
        self._routes = routes
        self._ingress = ingress
        self.flows.configure(ingress.warp_routing)

    def accept(self, request: Request, port: StreamPort) -> StreamSink:
        """Serve a stream: choose the rule, start the exchange. Never raises."""
        self.requests += 1
        kind = request.kind
        if kind is RequestKind.CONFIGURATION:
            return self._accept_configuration(request, port)
        if kind is RequestKind.TCP:
            return self._accept_flow(request, port)
        if kind not in {RequestKind.HTTP, RequestKind.WEBSOCKET}:
            return self._refuse(request, port, None, UnsupportedError(f"{kind.name} streams are not served here"))
        if self.management is not None and request.host == self.management_host:
            return self.management(request, port)
        trace = self.tracing(request.trace) if request.trace and self.tracing is not None else None
        rule = self._ingress.match(request.host, request.target)
        if trace is not None:
            trace.matched(request.host, rule.index)
        if self._on_access is not None:
            self._event("request", request, rule)
        if self.watch is not None:
            self.watch.started(request, rule)
        if rule.access.required:
            return self._admit(request, port, rule, trace)
        return self._serve(request, port, rule, trace)

    def _admit(self, request: Request, port: StreamPort, rule: Rule, trace: RequestTrace | None) -> StreamSink:
        """Serve a request that an Access token lets pass, now or when the keys are there."""
        from connector.proxy.access import AccessGate, token_of  # noqa: PLC0415  (loaded with the rules)

        access = self._access
        assert access is not None, "a rule with Access came without its keys' cache"
        token = token_of(request)
        try:
            team = access.check(rule.access, token)
        except ConnectorError as error:
            return self._refuse(request, port, rule, error)
        if team is None:
            return self._serve(request, port, rule, trace)

        def decided(gate: AccessGate) -> None:
            self._gates.discard(gate)
            if gate.gone:
                self._left_at_gate(request, port, rule)
                return
            try:
                if self._closed:
                    raise UnsupportedError("the connector is closing")
                access.check_again(rule.access, token)
            except ConnectorError as error:
                gate.open(self._refuse(request, port, rule, error))
            else:
                gate.open(self._serve(request, port, rule, trace))
            self._maybe_drained()

        gate = AccessGate(request, port, team, decided)
        self._gates.add(gate)
        team.refresh(self.loop, gate.decided)
        return gate

    def _left_at_gate(self, request: Request, port: StreamPort, rule: Rule) -> None:
        """Count a request whose eyeball went away while the keys were fetched."""
        if self.watch is not None:
            self.watch.finished(request, rule, 0, False, port.traffic(), 0.0)
        if self._on_access is not None:
            self._event("finished", request, rule, status=None, whole=False, aborted=True)
        self._maybe_drained()

    def _accept_flow(self, request: Request, port: StreamPort) -> StreamSink:
        """Serve a TCP flow of the private network, if the limit of flows allows it."""
        trace = self.tracing(request.trace, text=True) if request.trace and self.tracing is not None else None
        from connector.proxy.tcp import PrivateFlow  # noqa: PLC0415  (few connectors have private networks)

        if self._closed:
            return self._refuse(request, port, None, UnsupportedError("the connector is closing"))
        try:
            self.flows.limiter.take_tcp()
        except ConnectorError as error:
            return self._refuse(request, port, None, error)
        if self._on_access is not None:
            self._event("request", request, None)
        if self.watch is not None:
            self.watch.started(request, None)
        warp = self.flows.warp
        settings = OriginSettings(connect_timeout=warp.connect_timeout, tcp_keep_alive=warp.tcp_keep_alive)
        route = self._flow_route(None, settings)
        return self._start(PrivateFlow(self, request, port, route, self.flows), trace)

    def _serve(self, request: Request, port: StreamPort, rule: Rule, trace: RequestTrace | None) -> StreamSink:
        """Serve a request by its rule."""
        service = rule.service
        if service.kind is ServiceKind.STATUS:
            if trace is not None:
                port.spans = trace.answered(service.status)
            answer_status(port, service.status)
            self._count(service.status)
            if self.watch is not None:
                self.watch.finished(request, rule, service.status, True, port.traffic(), 0.0)
            if self._on_access is not None:
                self._event("response", request, rule, status=service.status)
                self._event("finished", request, rule, status=service.status)
            return IGNORE
        if self._closed:
            return self._refuse(request, port, rule, UnsupportedError("the connector is closing"))
        if service.kind is ServiceKind.HELLO:
            assert self._hello is not None, "the test site's rule came without its site"
            return self._start(self._hello.open(self, request, port, rule), trace)
        if service.kind is ServiceKind.APPLICATION:
            return self._start(self.applications[service.text].open(self, request, port, rule), trace)
        route = self._route(rule)
        exchange: Exchange
        if not isinstance(route, Route):
            from connector.proxy.tcp import CarriedFlow, SocksFlow  # noqa: PLC0415  (loaded with the route)

            negotiated = service.kind is ServiceKind.SOCKS or rule.settings.proxy_type == "socks"
            exchange = (SocksFlow if negotiated else CarriedFlow)(self, request, port, route)
        elif request.kind is RequestKind.WEBSOCKET:
            interval = rule.settings.ws_keep_alive
            clock = self._clocks.get(interval) if interval else None
            exchange = WebSocketExchange(self, request, port, route, self._drains, clock)
        else:
            exchange = self._http_exchange(request, port, route)
        return self._start(exchange, trace)

    def _start(self, exchange: Exchange, trace: RequestTrace | None) -> StreamSink:
        self._active.add(exchange)
        exchange.trace = trace
        if self._on_access is not None or self.watch is not None:
            exchange.started = monotonic()
        exchange.start()
        return exchange

    def go_away(self) -> int:
        """Say goodbye on every WebSocket (Close 1001, at a frame boundary); return on how many it was said so far.

        The links should stay for WS_CLOSE_WAIT, so that what was written leaves and a frame under way can end.
        """
        self._told.update(exchange for exchange in list(self._active) if exchange.go_away())
        return len(self._told)

    def drain(self, timeout: float) -> Coroutine[Any, Any, bool]:
        """Wait until no stream is active, at most `timeout` seconds; return whether that came true."""
        return drain(self, timeout)

    def when_drained(self) -> asyncio.Future[None]:
        """Return what is done when no stream is active any more; ask while one is."""
        if self._drained is None:
            self._drained = self.loop.create_future()
        return self._drained

    def close(self) -> Coroutine[Any, Any, None]:
        """Cancel what is active, close all pools, and wait until nothing is left."""
        return close(self)

    def cancel_all(self) -> Access | None:
        """Serve nothing from now on and end what is served; return what is left to close with the pools."""
        self._closed = True
        for exchange in list(self._active):
            exchange.cancel()
        for gate in list(self._gates):
            gate.decided()
        return self._access

    # -- called by exchanges

    def exchange_failed(self, exchange: Exchange, error: BaseException) -> None:
        """Count and report."""
        self._count_failure(error)
        if self.watch is not None:
            self.watch.failed()
        if self.on_event is not None:
            self._event("failed", exchange.request, exchange.rule, status=exchange.status, **describe(error))

    def exchange_answered(self, exchange: Exchange) -> None:
        """Report a response head."""
        if self._on_access is not None:
            self._event("response", exchange.request, exchange.rule, status=exchange.status)

    def exchange_finished(self, exchange: Exchange) -> None:
        """Forget an exchange."""
        self._active.discard(exchange)
        if exchange.whole:
            self._count(exchange.status)
        if self.watch is not None:
            self.watch.finished(
                exchange.request, exchange.rule, exchange.status, exchange.whole, exchange.port.traffic(),
                monotonic() - exchange.started,
            )  # fmt: skip
        if self._on_access is not None:
            milliseconds = round((monotonic() - exchange.started) * 1000, 3)
            fields = {"status": exchange.status or None, "whole": exchange.whole, "ms": milliseconds}
            if exchange.aborted:
                fields["aborted"] = True
            self._event("finished", exchange.request, exchange.rule, **fields)
        self._maybe_drained()

    # -- inside

    def _http_exchange(self, request: Request, port: StreamPort, route: Route) -> HttpExchange:
        if not route.pool.offers_http2:
            return HttpExchange(self, request, port, route)
        from connector.proxy.http2_exchange import Http2Exchange  # noqa: PLC0415  (few rules want the library)

        return Http2Exchange(self, request, port, route)

    def _load_services(self, ingress: Ingress) -> None:
        """Load what rules want that most have not, before their first request."""
        if self._hello is None and any(rule.service.kind is ServiceKind.HELLO for rule in ingress.rules):
            from connector.proxy.hello_world import HelloSite  # noqa: PLC0415

            self._hello = HelloSite(self.loop)
        if self._access is None and any(rule.access.required for rule in ingress.rules):
            from connector.proxy.access import Access  # noqa: PLC0415

            self._access = Access(self.loop, keys_url=self._access_keys_url)

    def _make_route(self, rule: Rule, contexts: ContextCache) -> Route | FlowRoute | None:
        """Return a rule at work; None for services that need no origin."""
        service, settings = rule.service, rule.settings
        if service.kind is ServiceKind.HTTP:
            pool = OriginPool(self.loop, service, settings, contexts, self._proxies.hop_to(service, settings))
            return Route(rule, pool, self._fields)
        if service.kind in {ServiceKind.TCP, ServiceKind.BASTION, ServiceKind.SOCKS}:
            return self._flow_route(rule, settings)
        return None

    def _flow_route(self, rule: Rule | None, settings: OriginSettings) -> FlowRoute:
        from connector.proxy.tcp import FlowRoute  # noqa: PLC0415  (few rules are of TCP)

        return FlowRoute(rule, settings, self._destinations, self._tcp_drains, self._drains, self._carrier_clock)

    def _route(self, rule: Rule) -> Route | FlowRoute:
        route = self._routes[rule.index]
        assert route is not None, f"nothing serves {rule.service.text}"
        return route

    def pools(self) -> list[OriginPool]:
        """Return the pools of all rules, retired ones that still have connections, and those of single destinations."""
        routes = (route.pool for route in self._routes if isinstance(route, Route))
        return [*routes, *self._retired, *self._destinations.pools]

    def _count_failure(self, error: BaseException) -> None:
        self.errors += 1
        cause = cause_of(error)
        self.failures[cause] = self.failures.get(cause, 0) + 1

    def _count(self, status: int) -> None:
        self.responses[status] = self.responses.get(status, 0) + 1

    def _maybe_drained(self) -> None:
        if self._drained is not None and not self.active:
            if not self._drained.done():
                self._drained.set_result(None)
            self._drained = None

    def _refuse(self, request: Request, port: StreamPort, rule: Rule | None, error: BaseException) -> StreamSink:
        status = refuse(port, error, responded=False)
        self._count_failure(error)
        self._count(status)
        if self.on_event is not None:
            self._event("failed", request, rule, status=status, **describe(error))
        if self.watch is not None and request.kind is not RequestKind.CONFIGURATION:
            if rule is None:
                self.watch.started(request, None)
            self.watch.failed()
            self.watch.finished(request, rule, status, True, port.traffic(), 0.0)
        return IGNORE

    def _accept_configuration(self, request: Request, port: StreamPort) -> StreamSink:
        handler = self.on_configuration
        if handler is None:
            return self._refuse(
                request, port, None, UnsupportedError("this connector takes no configuration from the edge")
            )

        def done(error: BaseException | None) -> None:
            self._configuring -= 1
            if error is not None:
                self._refuse(request, port, None, error)
            self._maybe_drained()

        self._configuring += 1
        return ConfigurationSink(port, handler, done)

    def _event(self, name: str, request: Request, rule: Rule | None, **fields: Any) -> None:
        assert self.on_event is not None
        fields["request"] = request
        fields["kind"] = request.kind.name.lower()
        fields["method"] = request.method.decode("latin-1")
        fields["host"] = request.host.decode("latin-1")
        fields["path"] = request.target.partition(b"?")[0].decode("latin-1")
        if rule is not None:
            fields["rule"] = rule.index
            fields["service"] = rule.service.text
        self.on_event(name, fields)
