"""A worker: some of the HA connections of a run, in a process of its own.

Owns: the order in which its parts start and end; the tasks of its connections. In: messages of the leading process.
Out: messages. Never: reads flags, files of settings or standard input; writes to the log itself.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Coroutine
from typing import Any
from uuid import UUID

from connector.app.access_log import EVENT_HTTP, access_log
from connector.app.answers import Answer, Query
from connector.app.connection import EdgeConnection, WaitTogetherError
from connector.app.dialler import Dialler
from connector.app.logs import Logger, capture_stdlib
from connector.app.malloc import keep_freed_memory
from connector.app.management import Management
from connector.app.meters import Meters
from connector.app.metrics import Metrics
from connector.app.pages import Pages
from connector.app.process import access_keys_url
from connector.app.request_log import request_log, write_timeout_log
from connector.app.tracing import trace_request
from connector.app.workers import messages as say
from connector.app.workers.flow_count import FlowCount
from connector.app.workers.gather import GC_NUMBERS, LEADERS
from connector.app.workers.pipe import Pipe
from connector.app.workers.settings import unpack_config, unpack_rules
from connector.app.workers.shares import (
    SharedBook,
    SharedChoice,
    SharedOrchestrator,
    SharedRotation,
    Silence,
    WorkerLog,
    WorkerState,
)
from connector.errors import ConnectorError, EdgeDialError
from connector.protocol.counts import Histogram
from connector.protocol.edge_addresses import EdgeAddress
from connector.proxy.dispatch import Dispatcher
from connector.proxy.dns_service import VirtualDns
from connector.proxy.flows import Flows
from connector.proxy.origin_proxy import OriginProxies
from connector.transport.kj import kj_loop
from connector.wire.token import Token


class Worker:
    """The one of this process."""

    def __init__(self, pipe: Pipe, memory: int) -> None:
        self._pipe = pipe
        self._memory = memory
        self._loop = asyncio.get_running_loop()
        self._output = WorkerLog()
        self._log = Logger(self._output)
        capture_stdlib(self._log)
        self._connections: dict[int, EdgeConnection] = {}
        self._tasks: dict[asyncio.Task[None], int] = {}
        self._others: set[asyncio.Task[None]] = set()
        self._pages: dict[int, asyncio.Future[Answer]] = {}
        self._serial = 0
        self._quit = self._loop.create_future()

    async def run(self, settings: say.Settings, early: list[Any]) -> int:
        """Serve until the leading process says Quit."""
        self._output.attach(self._pipe, settings.threshold)
        try:
            async with kj_loop():
                try:
                    self._assemble(settings)
                except ConnectorError as error:
                    self._pipe.send(say.Failed(str(error), error.advice))
                    return 1
                self._pipe.hand_to(self._on_message)
                for message in early:
                    self._on_message(message)
                self._pipe.send(say.Hello(list(self._icmp_sources)))
                await self._quit
                await self._end()
        finally:
            self._pipe.close()
        return 0

    def _assemble(self, settings: say.Settings) -> None:
        """Make everything that a connection needs. Errors: ConfigError."""
        keep_freed_memory()
        config = self._config = unpack_config(settings.config)
        connector_id = UUID(settings.connector_id)
        log, output, pipe, loop = self._log, self._output, self._pipe, self._loop
        output.quiet = True
        self._dispatcher = dispatcher = Dispatcher(
            ingress=unpack_rules(settings.rules),
            connector_id=connector_id,
            tags=tuple(config.tags),
            loop=loop,
            on_event=request_log(log),
            access_events=output.enabled("debug"),
            flows=Flows(
                max_active_flows=config.max_active_flows,
                dns=VirtualDns(config.dns_resolvers),
                count=FlowCount(self._memory, settings.worker),
            ),
            access_keys_url=access_keys_url(log),
            origin_proxies=OriginProxies(os.environ),
        )
        meters = Meters(lambda: dispatcher.ingress.rules, access_log(log), every=config.access_log)
        dispatcher.watch = meters
        dispatcher.tracing = trace_request
        output.on_listen = lambda: dispatcher.set_access_events(output.enabled("debug"))
        self._metrics = Metrics(dispatcher, meters)
        self._own_pages = Pages(config, connector_id, dispatcher, self._metrics).routes()
        self._management = Management(
            config,
            connector_id,
            log,
            metrics=lambda query: self._ask_page("/metrics", query),
            profiles={
                "/debug/pprof/heap": lambda query: self._ask_page("/debug/pprof/heap", query),
                "/debug/pprof/goroutine": lambda query: self._ask_page("/debug/pprof/goroutine", query),
            },
        )
        self._streams = self._management.streams
        self._streams.on_actor = self._streams_here
        dispatcher.management_host = config.management_host.encode()
        dispatcher.management = self._management.accept
        self._orchestrator = SharedOrchestrator(dispatcher, log, pipe)
        self._orchestrator.version = settings.version
        dispatcher.on_configuration = self._orchestrator.on_push
        self._choice = choice = SharedChoice(
            pipe,
            "http2" if config.proxy is not None and config.protocol == "auto" else config.protocol,
            Logger(Silence()),  # the leading process says it once
            account_tag=config.token.account_tag,
            token_given=config.token_given,
            features=tuple(config.features),
            post_quantum=config.post_quantum,
            clock=loop.time,
        )
        self._dialler = dialler = Dialler(
            config,
            dispatcher.accept,
            self._orchestrator,
            quic=choice.needs_quic,
            http2=choice.needs_http2,
            on_malformed=lambda what: log.debug("The edge sent a request that is none", event=EVENT_HTTP, error=what),
            on_write_timeout=write_timeout_log(config, log),
        )
        dialler.batch = dispatcher.writes
        self._icmp_sources: list[str] = []
        if choice.needs_quic:
            from connector.app.private_network import PrivateLinks  # noqa: PLC0415  (datagrams are QUIC's)

            output.quiet = settings.worker > 0  # what it says about ICMP is true of all, and said once
            dialler.private = PrivateLinks(
                config,
                dispatcher.flows,
                log,
                loop=loop,
                version=lambda: choice.datagram_version,
                on_started=lambda flow: pipe.send(say.FlowBegan(flow.flow_id, flow.began)),
            )
            self._icmp_sources = dialler.private.icmp_sources
        output.quiet = False
        self._book = SharedBook(pipe)
        self._state = WorkerState(
            config=config,
            connector_id=connector_id,
            log=log,
            dialler=dialler,
            choice=choice,
            book=self._book,
            active_streams=lambda: dispatcher.active,
            go_away=dispatcher.go_away,
            orchestrator=self._orchestrator,
        )
        self._state.pipe = pipe
        self._state.rotation = SharedRotation(pipe, config.token)
        self._management.state = self._state

    # -- messages

    def _on_message(self, message: Any) -> None:
        try:
            self._take(message)
        except Exception as error:
            self._log.bug(f"A worker failed over the message {type(message).__name__}", error)

    def _take(self, message: say.ToWorker) -> None:
        state = self._state
        match message:
            case say.Run(conn_index, registered):
                state.registrations += registered
                self._run(conn_index)
            case say.Address():
                self._book.given(message)
            case say.Connected(count):
                state.connected_elsewhere = count
            case say.Choice(selector, path, record, port):
                self._choice.adopt(selector, path, record, port)
            case say.Check(conn_index) if conn_index in self._connections:
                self._connections[conn_index].check()
            case say.Wake(conn_index) if conn_index in self._connections:
                self._connections[conn_index].wake()
            case say.MoveOn(conn_index, delay) if conn_index in self._connections:
                if delay is None:
                    self._connections[conn_index].move_on()
                else:
                    self._connections[conn_index].reconnect(delay)
            case say.UseToken():
                self._use_token(message)
            case say.DropToken():
                state.rotation.refused(state.rotation.token)
            case say.Rules():
                self._orchestrator.prepare(message)
            case say.Enforce():
                self._orchestrator.enforce(message)
            case say.PushDone():
                self._orchestrator.pushed(message)
            case say.Ask():
                self._keep(self._answer(message))
            case say.PageDone():
                self._page_done(message)
            case say.LogLevel(threshold):
                self._output.set_threshold(threshold)
            case say.Streamer(actor):
                self._streams.elsewhere = actor
            case say.LogEvent():
                self._output.on_event(message)
            case say.EndStream(code, reason):
                if self._streams.streaming is not None:
                    self._streams.streaming.end(code, reason)
            case say.Probe(host, port):
                self._keep(self._probe(host, port))
            case say.FlowMoved(flow_id, began):
                if self._dialler.private is not None:
                    self._dialler.private.network.moved_away(flow_id, began)
            case say.Ping(serial):
                self._pipe.send(say.Pong(serial))
            case say.Stop(seconds):
                self._stop(seconds)
            case say.Quit():
                if not self._quit.done():
                    self._quit.set_result(None)
            case _:
                pass  # about a connection that this worker has not

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._others.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._others.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self._log.bug("A worker failed in the background", error)

        task.add_done_callback(done)

    # -- connections

    def _run(self, conn_index: int) -> None:
        connection = self._connections.get(conn_index)
        if connection is None:
            connection = self._connections[conn_index] = EdgeConnection(conn_index, self._state)
        task = self._loop.create_task(connection.run(), name=f"edge connection {conn_index}")
        self._tasks[task] = conn_index
        self._state.connection_tasks = len(self._tasks)
        task.add_done_callback(self._ended)
        if self._state.stopping:
            connection.stop()

    def _ended(self, task: asyncio.Task[None]) -> None:
        conn_index = self._tasks.pop(task)
        self._state.connection_tasks = len(self._tasks)
        error = None if task.cancelled() else task.exception()
        text = advice = ""
        if error is not None and not isinstance(error, WaitTogetherError):
            text = str(error) or type(error).__name__
            advice = error.advice if isinstance(error, ConnectorError) else ""
        self._pipe.send(say.Ended(conn_index, isinstance(error, WaitTogetherError), text, advice))

    def _stop(self, seconds: float) -> None:
        if self._state.stop_deadline is None:
            self._state.stop_deadline = self._loop.time() + seconds
        self._streams.close()
        for connection in self._connections.values():
            connection.stop()

    async def _end(self) -> None:
        tasks = [*self._tasks, *self._others]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._orchestrator.shut()
        await self._management.close()
        if self._dialler.private is not None:
            await self._dialler.private.close()
        await self._dispatcher.close()

    def _use_token(self, message: say.UseToken) -> None:
        token = Token(message.account_tag, message.secret, UUID(message.tunnel_id), message.endpoint)
        self._state.rotation.begin(token, ())

    async def _probe(self, host: str, port: int) -> None:
        try:
            await self._dialler.probe_quic(EdgeAddress(host, port))
        except EdgeDialError as error:
            self._pipe.send(say.Probed(str(error) or "no answer", error.forbidden))
        else:
            self._pipe.send(say.Probed("", forbidden=False))

    # -- what is shown

    async def _answer(self, message: say.Ask) -> None:
        if message.page == "metrics":
            self._pipe.send(self._numbers(message.serial))
            return
        page = self._own_pages[message.page](message.query)
        answer = await page if not hasattr(page, "body") else page
        self._pipe.send(say.Text(message.serial, answer.body.decode("utf-8", "replace")))

    def _numbers(self, serial: int) -> say.Numbers:
        numbers: list[say.Number] = []
        histograms: list[say.Buckets] = []
        for name, labels, value in self._metrics.rows():
            if isinstance(value, Histogram):
                histograms.append((name, labels, tuple(value.bounds), value.counts, value.sum))
            elif name not in LEADERS:
                numbers.append((name, labels, value))
        for (name, labels), value in self._state.links.numbers().items():
            numbers.append((name, labels, value))
        for generation, facts in enumerate(gc.get_stats()):
            for name in GC_NUMBERS:
                numbers.append((name, (str(generation),), facts[name.rpartition(":")[2]]))
        return say.Numbers(serial, numbers, histograms)

    async def _ask_page(self, page: str, query: Query) -> Answer:
        self._serial += 1
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._pages[self._serial] = future
        self._pipe.send(say.AskPage(self._serial, page, dict(query)))
        return await future

    def _page_done(self, message: say.PageDone) -> None:
        future = self._pages.pop(message.serial, None)
        if future is not None and not future.done():
            future.set_result(Answer(message.status, message.body, message.content_type))

    def _streams_here(self, actor: str) -> None:
        self._output.actor = actor
