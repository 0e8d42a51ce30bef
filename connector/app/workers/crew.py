"""The crew: all workers of a run, led by the process that was started.

Owns: which worker has which connections, the answers to what workers say, heartbeats, restarts, the end of all.
In: the parts of `process.serve`, messages. Out: messages; calls of the supervisor's parts; the pages' numbers.
Never: serves a request.

*Strategy*: everything that a run has once stays in this process and is what it is without workers: supervisor,
addresses, knowledge about QUIC, token, configuration versions, log, pages. The supervisor starts, stops and restarts
connections as ever; they just happen to be in other processes (`remote.py`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from typing import Any, Final
from uuid import UUID

from connector.app.answers import Answer, Query, Routes
from connector.app.config import RunConfig
from connector.app.durations import format_duration
from connector.app.log_stream import LIMIT_EXCEEDED
from connector.app.logs import LEVELS, Logger
from connector.app.meters import Meters
from connector.app.metrics import Metrics
from connector.app.pages import Pages
from connector.app.state import TunnelState
from connector.app.supervisor import Connection
from connector.app.token_rotation import TokenRotation
from connector.app.transport_choice import TransportChoice
from connector.app.workers import messages as say
from connector.app.workers.flow_count import FlowCount, make_memory
from connector.app.workers.gather import CrewMetrics, CrewPages
from connector.app.workers.one_worker import PAUSES, OneWorker
from connector.app.workers.remote import CrewDialler, LeadersRotation, RemoteConnection, use_token
from connector.app.workers.settings import pack_config, pack_rules
from connector.app.workers.steps import LeadersOrchestrator
from connector.errors import ConnectorError, EdgeDialError, EdgeLostError
from connector.protocol.edge_addresses import EdgeAddress
from connector.proxy.dispatch import Dispatcher
from connector.proxy.limits import CLOSE_WAIT
from connector.wire.ws_messages import NORMAL

BEAT_SECONDS: Final = 5.0
"""Between two pings."""

MAX_UNANSWERED: Final = 6
"""Pings in a row without an answer after which a worker is ended: 30 s in which its connections served nobody. A
machine that was stopped for longer is noticed (the beats themselves come late), and nobody is blamed for it."""

ASK_SECONDS: Final = 2.0
"""How long a worker may take to tell its numbers; the page shows its last ones otherwise."""

PROFILE_SECONDS: Final = 130.0
"""The same for a sampling profile, which takes as long as was asked for."""

PROBE_SECONDS: Final = 30.0

QUIT_SECONDS: Final = CLOSE_WAIT + 2.0
"""How long workers may take to let their origins go, at the end."""


class CrewError(ConnectorError):
    """The workers cannot do their work."""


class Crew:
    """One per run with `--workers`."""

    def __init__(self, config: RunConfig, connector_id: UUID, log: Logger) -> None:
        self._config = config
        self._connector_id = connector_id
        self._log = log.bind(event=0)
        self._output = log.output
        self._loop = asyncio.get_running_loop()
        self._connections: dict[int, RemoteConnection] = {}
        self._state: TunnelState | None = None
        self._routes: Routes = {}
        self._rotation: TokenRotation = LeadersRotation(config.token, self.tell_all)
        self._serial = 0
        self._probe: asyncio.Future[say.Probed] | None = None
        self._streamer: OneWorker | None = None
        self._actor = ""
        self._error: ConnectorError | None = None
        self._draining = False
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._beat_timer: asyncio.TimerHandle | None = None
        self._beat_at = 0.0
        self.icmp_sources: list[str] = []
        count = min(config.workers, config.ha_connections)
        self._memory = make_memory(count)
        self._flows = FlowCount(os.dup(self._memory), 0)
        self._life = os.pipe()
        self._workers = [
            OneWorker(
                index,
                self._log,
                (self._life[0], self._memory),
                on_start=self._on_start,
                on_message=self._on_message,
                on_lost=self._on_lost,
            )
            for index in range(count)
        ]

    # -- put together, in the order of `process.serve`

    def make_pages(self, dispatcher: Dispatcher, meters: Meters) -> tuple[Metrics, Pages]:
        """Give metrics and pages of all workers."""
        self._metrics = CrewMetrics(dispatcher, meters, self._ask_all, self._pids)
        pages = CrewPages(self._config, self._connector_id, dispatcher, self._metrics, self._ask_all)
        pages.icmp_sources = self.icmp_sources
        self._routes = {"/metrics": self._metrics.answer, **pages.shared_profiles()}
        return self._metrics, pages

    def make_orchestrator(self, dispatcher: Dispatcher) -> LeadersOrchestrator:
        """Give the orchestrator of all workers."""
        self._dispatcher = dispatcher
        self._orchestrator = LeadersOrchestrator(dispatcher, Logger(self._output), self._config.origin_defaults)
        return self._orchestrator

    def make_dialler(self) -> CrewDialler:
        """Give the supervisor's dialler."""
        return CrewDialler(self._config, self._dispatcher.accept, self._orchestrator, self)

    def start(self, choice: TransportChoice) -> None:
        """Start the processes: they get ready while the edge is looked up."""
        self._choice = choice
        choice.on_change = lambda: self.tell_all(self._knowledge())
        self._log.info(
            f"{len(self._workers)} workers serve the connections", workers=len(self._workers),
            connections=self._config.ha_connections,
        )  # fmt: skip
        for worker in self._workers:
            worker.start()
        self._beat_at = self._loop.time()
        self._beat_timer = self._loop.call_later(BEAT_SECONDS, self._beat)

    def serve(self, state: TunnelState, wanted: int) -> None:
        """Begin to work for the supervisor, with no more workers than there are connections."""
        self._state = state
        state.rotation = self._rotation
        if wanted < len(self._workers):
            self._log.info(f"The workers that stay: {wanted}, because no more connections are possible", workers=wanted)
            for worker in self._workers[wanted:]:
                worker.wanted = False
                worker.send(say.Quit())

    def connect(self, conn_index: int, _: TunnelState) -> Connection:
        """Make a connection for the supervisor."""
        connection = self._connections[conn_index] = RemoteConnection(conn_index, self)
        return connection

    async def close(self) -> None:
        """End all workers, and wait for their ends."""
        self._closing = True
        if self._beat_timer is not None:
            self._beat_timer.cancel()
        await self._orchestrator.close()
        self.tell_all(say.Quit())
        await asyncio.gather(*(worker.wait_ended(QUIT_SECONDS) for worker in self._workers))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for descriptor in (*self._life, self._memory):
            os.close(descriptor)
        self._flows.close()

    # -- for connections (see remote.Telling)

    def tell(self, conn_index: int, message: say.Message) -> None:
        """See Telling."""
        self._worker_of(conn_index).send(message)

    def tell_all(self, message: say.Message) -> None:
        """See Telling."""
        for worker in self._workers:
            worker.send(message)

    def begin(self, connection: RemoteConnection) -> None:
        """See Telling."""
        if self._error is not None:
            connection.end(_ended(connection.conn_index, self._error))
        elif self._draining:
            connection.end(_ended(connection.conn_index))
        else:
            worker = self._worker_of(connection.conn_index)
            worker.running.add(connection.conn_index)
            worker.send(self._run(connection.conn_index))

    def leave(self, connection: RemoteConnection) -> None:
        """See Telling."""
        self._worker_of(connection.conn_index).running.discard(connection.conn_index)

    def drain(self) -> None:
        """See Telling."""
        if self._draining or self._state is None:
            return
        self._draining = True
        deadline = self._state.stop_deadline
        self.tell_all(say.Stop(0.0 if deadline is None else max(0.0, deadline - self._loop.time())))
        for worker in self._workers:
            if not worker.up:
                self._end_connections(worker)

    def registered(self, conn_index: int) -> bool:
        """See Telling."""
        return self._state is not None and conn_index in self._state.connected

    async def probe(self, address: EdgeAddress) -> say.Probed:
        """See Telling."""
        worker = next((worker for worker in self._workers if worker.up), None)
        if worker is None:
            return say.Probed("no worker is there to probe", forbidden=False)
        self._probe = self._loop.create_future()
        worker.send(say.Probe(address.host, address.port))
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                return await self._probe
        except TimeoutError:
            return say.Probed("no answer", forbidden=False)
        finally:
            self._probe = None

    # -- workers that start and end

    def _worker_of(self, conn_index: int) -> OneWorker:
        wanted = [worker for worker in self._workers if worker.wanted]
        return wanted[conn_index % len(wanted)]

    def _run(self, conn_index: int) -> say.Run:
        return say.Run(conn_index, registered=self._state is not None and self._state.registrations > 0)

    def _knowledge(self) -> say.Choice:
        return say.Choice(*self._choice.knowledge)

    def _threshold(self) -> int:
        return next(LEVELS[level] for level in LEVELS if self._output.enabled(level) or level == "fatal")

    def _on_start(self, worker: OneWorker) -> None:
        """Tell a new process who it is and how things stand, as soon as no configuration is on its way."""
        if not worker.wanted or self._closing:
            worker.send(say.Quit())
            return
        self._keep(self._introduce(worker, worker.pid))

    async def _introduce(self, worker: OneWorker, pid: int) -> None:
        async with self._orchestrator.lock:
            if worker.pid != pid:
                return  # it has ended meanwhile
            rotation = self._rotation
            worker.send(
                say.Settings(
                    worker=worker.index,
                    connector_id=str(self._connector_id),
                    threshold=self._threshold(),
                    config=pack_config(self._config, rotation.before or rotation.token),
                    version=self._orchestrator.version,
                    rules=pack_rules(self._dispatcher.ingress),
                )
            )
            self._orchestrator.workers.add(worker)
        if rotation.before is not None:
            worker.send(use_token(rotation.token))
        worker.send(self._knowledge())
        worker.send(say.Connected(len(self._state.connected) if self._state is not None else 0))
        worker.send(say.Streamer(self._actor))
        for conn_index in sorted(worker.running):
            worker.send(self._run(conn_index))
        if self._draining:
            self._end_connections(worker)

    def _on_lost(self, worker: OneWorker, why: str) -> None:
        self._orchestrator.lost(worker)
        self._flows.clear(worker.index)
        self._metrics.bury(*worker.served)
        worker.served = ([], [])
        if self._streamer is worker:
            self._stream(None, "")
        state = self._state
        if state is not None:
            for conn_index in worker.running:
                state.disconnected(conn_index)
            self._tell_connected()
        if self._closing or not worker.wanted or self._error is not None:
            return
        if self._draining:
            self._log.error(f"Worker {worker.index} ended while it drained", error=why, process=worker.pid)
            self._end_connections(worker)
            return
        pause = worker.start_again()
        if pause is None:
            self._fail(
                CrewError(
                    f"worker {worker.index} ended {len(PAUSES) + 1} times in a row: {why}",
                    advice="Lines of it above may tell why. Without --workers the connector is one process.",
                )
            )
            return
        self._log.error(
            f"Worker {worker.index} ended unexpectedly; it is started again in {format_duration(pause)}",
            error=why,
            process=worker.pid,
            advice="The connections of the other workers are not affected.",
        )

    def _end_connections(self, worker: OneWorker) -> None:
        for conn_index in list(worker.running):
            self._connections[conn_index].end(_ended(conn_index))

    def _fail(self, error: ConnectorError) -> None:
        """End the run."""
        if self._error is not None:
            return
        self._error = error
        for conn_index, connection in self._connections.items():
            connection.end(_ended(conn_index, error))

    def _beat(self) -> None:
        now = self._loop.time()
        stood_still = now - self._beat_at > 2 * BEAT_SECONDS
        self._beat_at = now
        self._beat_timer = self._loop.call_later(BEAT_SECONDS, self._beat)
        for worker in self._workers:
            if not worker.up:
                continue
            if stood_still:
                worker.unanswered = 0
            if worker.unanswered >= MAX_UNANSWERED:
                self._log.error(
                    f"Worker {worker.index} does not answer and is ended",
                    process=worker.pid,
                    seconds=round(MAX_UNANSWERED * BEAT_SECONDS),
                )
                worker.kill()
                continue
            worker.unanswered += 1
            worker.send(say.Ping(0))

    # -- messages

    def _on_message(self, worker: OneWorker, message: Any) -> None:
        try:
            self._take(worker, message)
        except Exception as error:
            self._log.bug(f"A message of worker {worker.index} failed: {type(message).__name__}", error)

    def _take(self, worker: OneWorker, message: say.ToLeader) -> None:
        match message:
            case say.Log(level, text, fields):
                self._output.emit(level if level in LEVELS else "info", text, fields)
            case say.Pong():
                worker.unanswered = 0
            case say.Hello(sources):
                self.icmp_sources[:] = sources
            case say.Failed(text, advice):
                self._fail(CrewError(text, advice=advice))
            case say.FlowBegan(flow_id, began):
                for other in self._workers:
                    if other is not worker:
                        other.send(say.FlowMoved(flow_id, began))
            case say.Push():
                self._keep(self._push(worker, message))
            case say.Prepared():
                self._orchestrator.prepared(worker, message)
            case say.Numbers(serial) | say.Text(serial):
                self._answered(worker, serial, message)
            case say.AskPage():
                self._keep(self._page(worker, message))
            case say.Listen(actor):
                self._listen(worker, actor)
            case say.Probed():
                if self._probe is not None and not self._probe.done():
                    self._probe.set_result(message)
            case say.TokenNews(secret, accepted):
                self._token_news(worker, secret, accepted)
            case say.CameUp() | say.DialFailed() | say.LinkEnded() | say.UsePort():
                self._path_news(worker, message)
            case _:
                if self._state is not None:
                    self._connection_news(self._state, worker, message)

    def _connection_news(self, state: TunnelState, worker: OneWorker, message: say.ToLeader) -> None:
        match message:
            case say.NeedAddress(conn_index):
                address = state.book.get(conn_index)
                host, port = ("", 0) if address is None else address
                worker.send(say.Address(conn_index, host, port))
            case say.Rotate(conn_index, unreachable, leave_region):
                state.book.rotate(conn_index, unreachable=unreachable, leave_region=leave_region)
            case say.Unreached():
                state.dial_failed()
            case say.Registered(conn_index, host, port, transport, location):
                if not state.stopping:
                    state.registered(conn_index, EdgeAddress(host, port), transport, location)
                    self._tell_connected()
            case say.Disconnected(conn_index):
                if conn_index in state.connected:
                    state.disconnected(conn_index)
                    self._tell_connected()
            case say.Ended(conn_index):
                self._connections[conn_index].end(message)

    def _tell_connected(self) -> None:
        if self._state is not None:
            self.tell_all(say.Connected(len(self._state.connected)))

    def _path_news(self, worker: OneWorker, message: say.ToLeader) -> None:
        """Take what happened to a dial or a link; the worker gets the verdict in any case."""
        choice = self._choice
        match message:
            case say.UsePort(port):
                choice.use_port(port)
                return
            case say.CameUp(transport, raced, heard, failed, forbidden):
                error = _dial_error(forbidden) if failed else None
                choice.came_up(transport, raced=raced, quic_heard=heard, quic_error=error)
            case say.DialFailed(plan, forbidden):
                choice.dial_failed(plan, _dial_error(forbidden))
            case say.LinkEnded(transport, by_edge):
                choice.link_ended(transport, None if by_edge else EdgeLostError(""))
        worker.send(self._knowledge())

    def _token_news(self, worker: OneWorker, secret: bytes, accepted: bool) -> None:
        rotation = self._rotation
        current = rotation.token
        if accepted and secret == current.secret:
            rotation.accepted(current)
        elif not accepted and secret == current.secret and rotation.refused(current):
            for other in self._workers:
                if other is not worker:
                    other.send(say.DropToken())
        elif not accepted:
            worker.send(use_token(rotation.token))  # others have it already, and it works for them

    async def _push(self, worker: OneWorker, message: say.Push) -> None:
        version, error = await self._orchestrator.push(message.version, message.config)
        worker.send(say.PushDone(message.serial, version, error))

    # -- what is shown

    def _pids(self) -> list[int]:
        return [worker.pid for worker in self._workers if worker.up]

    async def _ask_all(self, page: str, query: Query) -> list[tuple[int, int, Any]]:
        """Ask every worker that is up; give index, process and answer of those that did."""
        self._serial += 1
        serial = self._serial
        futures: dict[OneWorker, asyncio.Future[Any]] = {}
        for worker in self._workers:
            if worker.up:
                worker.asked[serial] = futures[worker] = self._loop.create_future()
                worker.send(say.Ask(serial, page, dict(query)))
        if futures:
            limit = PROFILE_SECONDS if page.endswith("/profile") else ASK_SECONDS
            await asyncio.wait(futures.values(), timeout=limit)
        found = []
        for worker, future in futures.items():
            worker.asked.pop(serial, None)
            if future.done() and not future.cancelled():
                found.append((worker.index, worker.pid, future.result()))
            elif page == "metrics" and worker.served != ([], []):
                found.append((worker.index, worker.pid, say.Numbers(serial, *worker.served)))
        return found

    def _answered(self, worker: OneWorker, serial: int, message: Any) -> None:
        if isinstance(message, say.Numbers):
            worker.served = (message.numbers, message.histograms)
        future = worker.asked.pop(serial, None)
        if future is not None and not future.done():
            future.set_result(message)

    async def _page(self, worker: OneWorker, message: say.AskPage) -> None:
        page = self._routes.get(message.page)
        answer = Answer(404) if page is None else page(message.query)
        made = answer if isinstance(answer, Answer) else await answer
        worker.send(say.PageDone(message.serial, made.status, made.body, made.content_type))

    def _listen(self, worker: OneWorker, actor: str) -> None:
        """A management session of this worker streams the log from now on (`actor`), or none does any more."""
        if not actor:
            if self._streamer is worker:
                self._stream(None, "")
            return
        if self._streamer is not None and self._streamer is not worker:
            if self._actor != actor:  # both began in the same moment
                worker.send(say.EndStream(LIMIT_EXCEEDED, "limit exceeded for streaming sessions"))
                return
            self._streamer.send(say.EndStream(NORMAL, "context closed"))
        self._stream(worker, actor)

    def _stream(self, worker: OneWorker | None, actor: str) -> None:
        self._streamer, self._actor = worker, actor
        if worker is None:
            self._output.listen(None)
        else:
            self._output.listen(lambda level, event, text: worker.send_if_room(say.LogEvent(level, event, text)))
        self.tell_all(say.LogLevel(self._threshold()))
        for other in self._workers:
            other.send(say.Streamer("" if other is worker else actor))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something short beside everything else."""
        task = self._loop.create_task(work)
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self._log.bug("The crew failed in the background", error)

        task.add_done_callback(done)


def _dial_error(forbidden: bool) -> EdgeDialError:
    error = EdgeDialError("")
    error.forbidden = forbidden
    return error


def _ended(conn_index: int, error: ConnectorError | None = None) -> say.Ended:
    """Give the end of a connection that its worker cannot tell."""
    return say.Ended(conn_index, False, str(error) if error is not None else "", error.advice if error else "")
