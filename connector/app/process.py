"""One run of the connector as a process: loop, signals, servers, start and end.

Owns: the event loop, signal handlers, pidfile, exit status. In: RunConfig, Logger. Out: an exit status.
Never: knows what travels on a connection.
"""

from __future__ import annotations

import asyncio
import os
import platform
import sys
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack

from connector import __version__
from connector.app.access_log import EVENT_HTTP
from connector.app.addresses import find_edge
from connector.app.config import RunConfig
from connector.app.connection import EdgeConnection
from connector.app.dialler import Dialler
from connector.app.first_objects import loading
from connector.app.logs import MASK, Logger, capture_stdlib
from connector.app.malloc import keep_freed_memory
from connector.app.observation import Observation
from connector.app.orchestrator import Orchestrator
from connector.app.request_log import request_log, write_timeout_log
from connector.app.service_notify import ServiceNotify
from connector.app.signals import Signals, Stop, StoppedEarlyError
from connector.app.state import TunnelState
from connector.app.stdin_control import StdinControl
from connector.app.supervisor import Supervisor
from connector.app.token_watch import TokenWatch
from connector.app.transport_choice import TransportChoice
from connector.errors import ConnectorError, DiscoveryError, UsageError, WireError
from connector.proxy.dispatch import Dispatcher
from connector.proxy.dns_service import VirtualDns
from connector.proxy.flows import Flows
from connector.proxy.ingress import DEFAULT_INGRESS
from connector.proxy.origin_proxy import OriginProxies
from connector.transport.kj import kj_loop
from connector.transport.wakeups import Wakeups

PRECHECKS_WAIT = 1.5
"""How long the pre-checks wait for the first registration: to load what they need takes as much CPU as all the rest."""

PRECHECKS_REST = 0.3
"""And after it, for the configuration."""

MALLOC_SECONDS = 1.0
"""After the start: when malloc is told to keep what payload buffers leave."""

RECORDS_SECONDS = 2.0
"""How long the start waits for the edge's TXT records, beside the look-up of its addresses. Later they are asked again
in the background, and what they say counts for new connections."""

ACCESS_KEYS_VARIABLE = "CONNECTOR_ACCESS_KEYS_URL"
"""Where the keys of Access teams are fetched instead of at Cloudflare: for tests without a network. Whoever sets it
decides who passes, so each start says that it is set."""

LOOP_VARIABLE = "CONNECTOR_LOOP"


def run_tunnel(config: RunConfig, log: Logger) -> int:
    """Run until a signal or a fatal error; give the exit status. Errors of the start are printed as log lines."""
    factory = loop_factory()
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(_main(config, log))
    except ConnectorError as error:
        advice = {"advice": error.advice} if error.advice else {}
        log.error(str(error), **advice)
        return 1
    finally:
        log.output.close()


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Give uvloop's factory where it is installed, or None for asyncio's own; CONNECTOR_LOOP chooses."""
    choice = os.environ.get(LOOP_VARIABLE, "")
    if choice not in {"", "asyncio", "uvloop"}:
        raise UsageError(f'invalid value "{choice}" for {LOOP_VARIABLE}', advice="Allowed: asyncio, uvloop.")
    if choice == "asyncio" or sys.platform == "win32":
        return None
    try:
        import uvloop  # noqa: PLC0415  (optional)
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _main(config: RunConfig, log: Logger) -> int:
    stop = Stop()
    Signals(asyncio.get_running_loop(), log, stop).install()
    capture_stdlib(log)
    _raise_file_limit()
    asyncio.get_running_loop().call_later(MALLOC_SECONDS, keep_freed_memory)  # loads ctypes, which no start needs
    notify = ServiceNotify(log)
    notify.start()
    stop.heard.append(notify.stopping)

    def on_up(_: TunnelState) -> None:
        _write_pidfile(config, log)
        notify.ready(f"Tunnel {config.token.tunnel_id} is connected")

    try:
        await serve(config, log, stop, on_up=on_up)
    except StoppedEarlyError:
        return 0
    except RunEndedError:
        return 1
    finally:
        notify.close()
    return 0


class RunEndedError(Exception):
    """The run ended by itself; what ended it is the cause, and stands in the log already."""


async def serve(config: RunConfig, log: Logger, stop: Stop, *, on_up: Callable[[TunnelState], None]) -> None:
    """Keep the tunnel up until `stop` is asked for; `on_up` hears of the first registration.

    Errors: ConnectorError for what fails before the first dial, RunEndedError afterwards, StoppedEarlyError between.
    """
    connector_id = uuid.uuid4()
    _log_start(config, log, connector_id)
    loop = asyncio.get_running_loop()
    dispatcher = Dispatcher(
        ingress=config.ingress,
        connector_id=connector_id,
        tags=tuple(config.tags),
        loop=loop,
        on_event=request_log(log),
        access_events=log.output.enabled("debug"),
        flows=Flows(max_active_flows=config.max_active_flows, dns=VirtualDns(config.dns_resolvers)),
        access_keys_url=access_keys_url(log),
        origin_proxies=OriginProxies(os.environ),
    )
    crew = None
    if config.workers > config.ha_connections:
        log.info(
            f"You requested {config.workers} workers, but there are only {config.ha_connections} connections for them",
            workers=config.ha_connections,
        )
    if min(config.workers, config.ha_connections) > 1:
        from connector.app.workers.crew import Crew  # noqa: PLC0415  (most runs are one process)

        crew = Crew(config, connector_id, log)
    observation = Observation(config, connector_id, dispatcher, log, crew)
    dispatcher.applications = config.applications
    orchestrator: Orchestrator
    if crew is None:
        orchestrator = Orchestrator(dispatcher, log, config.origin_defaults)
    else:
        orchestrator = crew.make_orchestrator(dispatcher)
    orchestrator.warn(dispatcher.doubts)
    if config.fixed_ingress is not None:
        dispatcher.set_ingress(config.fixed_ingress)
        orchestrator.fixed = True
    dispatcher.on_configuration = orchestrator.on_configuration
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(kj_loop())
        stack.push_async_callback(dispatcher.close)
        if config.proxy is not None:
            log.info(f"The edge is reached through the proxy {config.proxy}, over HTTP/2", protocol=config.protocol)
        if config.watched is not None:
            from connector.app.config_watch import ConfigWatch  # noqa: PLC0415  (most runs have no file)

            config_watch = ConfigWatch(*config.watched, orchestrator, log)
            config_watch.start(loop)
            stack.callback(config_watch.stop)
        choice = TransportChoice(
            "http2" if config.proxy is not None and config.protocol == "auto" else config.protocol,
            log,
            account_tag=config.token.account_tag,
            token_given=config.token_given,
            features=tuple(config.features),
            post_quantum=config.post_quantum,
            clock=loop.time,
        )
        if crew is not None:
            stack.push_async_callback(crew.close)
            crew.start(choice)
            dialler: Dialler = crew.make_dialler()
        else:
            dialler = _dialler(config, dispatcher, orchestrator, choice, log)
            if dialler.private is not None:
                stack.push_async_callback(dialler.private.close)
                observation.pages.icmp_sources = dialler.private.icmp_sources
        log.info(f"Initial protocol {choice.initial.value}")
        records = None if config.edges else _records(choice, log)  # an edge that was named by hand has none
        try:
            async with stop.starting():
                book, _ = await asyncio.gather(find_edge(config, log), _limited(records))
        except StoppedEarlyError:
            log.info("Tunnel server stopped")
            raise
        wanted = min(config.ha_connections, book.capacity)
        if wanted < config.ha_connections:
            log.info(f"You requested {config.ha_connections} HA connections but I can give you at most {wanted}.")
        state = TunnelState(
            config=config,
            connector_id=connector_id,
            log=log,
            dialler=dialler,
            choice=choice,
            book=book,
            active_streams=lambda: dispatcher.active,
            go_away=dispatcher.go_away,
            orchestrator=orchestrator,
        )
        if config.inspect is not None or config.capture is not None:
            from connector.app.inspecting import inspected  # noqa: PLC0415  (rarely needed)

            await stack.enter_async_context(inspected(config, dispatcher, dialler, log))
        await stack.enter_async_context(observation.serve(state))
        if crew is not None:
            crew.serve(state, wanted)
        connect = EdgeConnection if crew is None else crew.connect
        supervisor = Supervisor(state, wanted, look_up_records=records, connect=connect)
        wakeups = Wakeups(lambda news: supervisor.woken(",".join(cause.value for cause in news.causes)))
        wakeups.start()
        stack.callback(wakeups.close)
        state.on_first_registration = lambda: on_up(state)
        if config.token_file is not None:
            watch = TokenWatch(config.token_file, config.token, log, supervisor.use_token)
            watch.start()
            stack.callback(watch.close)
        if config.prechecks and not choice.skip_prechecks:
            up = asyncio.Event()

            def first_registration() -> None:
                on_up(state)
                up.set()

            state.on_first_registration = first_registration
            checks = asyncio.create_task(_prechecks(config, log, up), name="pre-checks")
            stack.push_async_callback(cancelled, checks)
        if config.stdin_control:
            log.info("Enabling control through stdin")
            StdinControl(log, supervisor.reconnect).start()
        stop.heard.append(observation.close_streams)
        stop.then(supervisor.stop)
        try:
            await supervisor.run()
        except ConnectorError as error:
            advice = {"advice": error.advice} if error.advice else {}
            what = "The tunnel cannot be kept up" if state.registrations else "initial tunnel connection failed"
            log.error(what, error=str(error), **advice)
            log.info("Initiating shutdown")
            raise RunEndedError from error
        except Exception as error:
            log.bug("initial tunnel connection failed", error)
            raise RunEndedError from error
        finally:
            orchestrator.shut()
            log.info("Tunnel server stopped")


def _dialler(
    config: RunConfig, dispatcher: Dispatcher, orchestrator: Orchestrator, choice: TransportChoice, log: Logger
) -> Dialler:
    """Make what dials the edge. Errors: ConfigError."""
    dialler = Dialler(
        config,
        dispatcher.accept,
        orchestrator,
        quic=choice.needs_quic,
        http2=choice.needs_http2,
        on_malformed=lambda what: log.debug("The edge sent a request that is none", event=EVENT_HTTP, error=what),
        on_write_timeout=write_timeout_log(config, log),
    )
    dialler.batch = dispatcher.writes
    if choice.needs_quic:
        from connector.app.private_network import PrivateLinks  # noqa: PLC0415  (datagrams are QUIC's)

        loop = asyncio.get_running_loop()
        dialler.private = PrivateLinks(
            config, dispatcher.flows, log, loop=loop, version=lambda: choice.datagram_version
        )
    return dialler


async def _prechecks(config: RunConfig, log: Logger, up: asyncio.Event) -> None:
    """Run the pre-checks once the first registration is through, or takes too long."""
    try:
        async with asyncio.timeout(PRECHECKS_WAIT):
            await up.wait()
            await asyncio.sleep(PRECHECKS_REST)
    except TimeoutError:
        pass
    with loading():
        from connector.app.prechecks import log_prechecks  # noqa: PLC0415  (loads dnspython)

    await log_prechecks(config, log)


async def cancelled(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _limited(look_up: Callable[[], Awaitable[None]] | None) -> None:
    if look_up is not None:
        try:
            async with asyncio.timeout(RECORDS_SECONDS):
                await look_up()
        except TimeoutError:
            pass  # the supervisor asks again


def _records(choice: TransportChoice, log: Logger) -> Callable[[], Awaitable[None]]:
    """Give what looks the edge's two TXT records up and hands them to `choice`."""

    async def look_up() -> None:
        from connector.transport.discovery import protocol_shares, remote_features  # noqa: PLC0415  (loads dnspython)
        from connector.transport.resolvers import SystemResolver  # noqa: PLC0415

        resolver = SystemResolver()
        shares = features = None
        try:
            shares = await protocol_shares(resolver)
        except (DiscoveryError, WireError) as error:
            log.debug("Unable to lookup protocol percentage.", error=str(error))
        try:
            features = await remote_features(resolver)
        except (DiscoveryError, WireError) as error:
            log.debug("Failed to fetch features, default to disable", error=str(error))
        choice.records_tried()
        choice.learn(shares, features)

    return look_up


def access_keys_url(log: Logger) -> str:
    """Give where keys of Access teams are fetched instead of at Cloudflare, or nothing; a line says so."""
    url = os.environ.get(ACCESS_KEYS_VARIABLE, "")
    if url:
        log.warn(f"{ACCESS_KEYS_VARIABLE} is set: Access tokens are checked against keys of {url}, not of Cloudflare")
    return url


def _log_start(config: RunConfig, log: Logger, connector_id: uuid.UUID) -> None:
    log.info("Starting tunnel", tunnelID=str(config.token.tunnel_id))
    log.info(f"Version {__version__}")
    loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    log.info(f"OS: {sys.platform}, Python: {platform.python_version()}, loop: {loop}, arch: {platform.machine()}")
    if config.settings:
        log.info("Settings: map[" + " ".join(f"{name}:{text}" for name, text in config.settings.items()) + "]")
    if environment := shown_environment(os.environ):
        log.info(f"Environmental variables {environment}")
    log.info(f"Generated Connector ID: {connector_id}")
    for warning in config.ingress.warnings:
        log.warn(f"Configuration: {warning}")
    if config.ingress.rules == DEFAULT_INGRESS.rules:
        log.debug("Requests get 503 until the edge pushes a configuration")


def shown_environment(environ: Mapping[str, str]) -> str:
    """Give the variables of cloudflared's family as it prints them, secrets masked; empty when there are none."""
    shown = []
    for name, value in sorted(environ.items()):
        if "TUNNEL_" in f"{name}={value}" and "=" not in value:
            secret = any(word in name for word in ("TOKEN", "SECRET", "KEY", "CRED", "PROXY")) and not name.endswith(
                "_FILE"
            )
            shown.append(f"{name}:{MASK if secret else value}")
    return f"map[{' '.join(shown)}]" if shown else ""


def _raise_file_limit() -> None:
    """Take as many file descriptors as the system lets us: every stream to an origin needs one."""
    if sys.platform == "win32":
        return
    import resource  # noqa: PLC0415  (not on Windows)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            pass  # macOS refuses an unlimited hard limit; the soft one stays


def _write_pidfile(config: RunConfig, log: Logger) -> None:
    if config.pidfile is not None:
        try:
            with open(os.path.expanduser(config.pidfile), "w", encoding="ascii") as file:
                file.write(str(os.getpid()))
        except OSError as error:
            log.error("Unable to write pidfile", error=str(error))
