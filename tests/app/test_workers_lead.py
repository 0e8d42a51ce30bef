"""The leading process's side of workers: configurations in step, heartbeats, one person who streams, tokens."""

from __future__ import annotations

import asyncio
import io
import json
import uuid
from collections.abc import Callable
from typing import Any, cast

import pytest

from connector.app.config import RunConfig
from connector.app.log_stream import LIMIT_EXCEEDED
from connector.app.logs import Logger, LogOutput
from connector.app.meters import Meters
from connector.app.workers import messages as say
from connector.app.workers import steps
from connector.app.workers.crew import BEAT_SECONDS, MAX_UNANSWERED, Crew
from connector.app.workers.one_worker import PAUSES, OneWorker
from connector.app.workers.steps import LeadersOrchestrator
from connector.proxy.dispatch import Dispatcher
from connector.proxy.ingress import USUAL, parse_remote_config
from connector.wire.token import Token
from tests.support.aio import run

CONFIG = {"ingress": [{"service": "http_status:201"}]}


class Fake:
    """A worker that answers Rules as it is told, and remembers what it was sent."""

    def __init__(self, index: int, answer: Callable[[Fake, say.Rules], None] = lambda fake, message: None) -> None:
        self.index = index
        self.pid = 1000 + index
        self.up = self.wanted = True
        self.unanswered = 0
        self.crashes = 0
        self.killed = 0
        self.pause: float | None = 0.5
        self.running: set[int] = set()
        self.served: tuple[list[Any], list[Any]] = ([], [])
        self.asked: dict[int, Any] = {}
        self.sent: list[Any] = []
        self._answer = answer

    def send(self, message: Any) -> None:
        self.sent.append(message)
        if isinstance(message, say.Rules):
            self._answer(self, message)

    def send_if_room(self, message: Any) -> None:
        self.sent.append(message)

    def kill(self) -> None:
        self.killed += 1

    def start_again(self) -> float | None:
        return self.pause

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]


def real(fake: Fake) -> OneWorker:
    return cast("OneWorker", fake)


class Stepping:
    """An orchestrator with workers."""

    def __init__(self, *answers: str | None) -> None:
        loop = asyncio.get_running_loop()
        self.stream = io.StringIO()
        log = Logger(LogOutput(level="debug", json_lines=True, stream=self.stream))
        self.dispatcher = Dispatcher(connector_id=uuid.uuid4(), loop=loop)
        self.orchestrator = LeadersOrchestrator(self.dispatcher, log, USUAL)
        self.workers = [Fake(index, self._answer(text)) for index, text in enumerate(answers)]
        self.orchestrator.workers = {real(fake) for fake in self.workers}

    def _answer(self, text: str | None) -> Callable[[Fake, say.Rules], None]:
        def answer(fake: Fake, message: say.Rules) -> None:
            if text == "dies":
                self.orchestrator.lost(real(fake))
            elif text is not None:
                self.orchestrator.prepared(real(fake), say.Prepared(message.serial, text, ""))

        return answer

    async def push(self, version: int, config: Any = CONFIG) -> tuple[int, str]:
        return await self.orchestrator.push(version, json.dumps(config).encode())

    @property
    def used(self) -> list[list[bool]]:
        return [[message.use for message in fake.of(say.Enforce)] for fake in self.workers]


def test_all_workers_are_ready_before_any_uses_a_configuration() -> None:
    async def main() -> None:
        it = Stepping("", "")
        assert await it.push(3) == (3, "")
        assert it.used == [[True], [True]]
        assert it.dispatcher.ingress.rules[0].service.text == "http_status:201"
        assert await it.push(3) == (3, "")  # not newer: nobody is bothered
        assert await it.push(2) == (3, "")
        assert it.used == [[True], [True]]
        it.orchestrator.shut()
        assert await it.push(4) == (3, "connector already shut down")

    run(main())


@pytest.mark.parametrize(
    ("answers", "error"),
    [(("", "caPool '/x' cannot be read"), "caPool '/x' cannot be read"), (("", None), "worker 1 did not get ready")],
)
def test_what_one_worker_cannot_is_refused_for_all(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[str | None, ...], error: str
) -> None:
    monkeypatch.setattr(steps, "STEP_SECONDS", 0.01)

    async def main() -> None:
        it = Stepping(*answers)
        before = it.dispatcher.ingress
        version, text = await it.push(3)
        assert version == -1
        assert text.startswith(error)
        assert it.used == [[False], [False]]
        assert it.dispatcher.ingress is before
        assert "Failed to update configuration; the old one stays" in it.stream.getvalue()

    run(main())


def test_a_worker_that_dies_meanwhile_is_not_waited_for() -> None:
    async def main() -> None:
        it = Stepping("", "dies")
        assert await it.push(3) == (3, "")
        assert it.used[0] == [True]
        assert it.orchestrator.workers == {real(it.workers[0])}

    run(main())


def test_what_is_none_reaches_no_worker() -> None:
    async def main() -> None:
        it = Stepping("")
        assert (await it.orchestrator.push(3, b"{"))[1].startswith("the configuration is not JSON")
        assert (await it.push(3, {"ingress": [{"service": "http_status:200", "path": "("}]}))[0] == -1
        assert it.workers[0].sent == []

    run(main())


def test_two_pushes_at_once_are_one_after_the_other() -> None:
    async def main() -> None:
        it = Stepping("", "")
        answers = await asyncio.gather(*(it.push(version) for version in (2, 1, 3)))
        assert answers == [(2, ""), (2, ""), (3, "")]
        assert it.orchestrator.version == 3

    run(main())


def test_a_local_file_follows_unless_the_edge_was_faster() -> None:
    async def main() -> None:
        it = Stepping("", "")
        rules = parse_remote_config(-1, {"ingress": [{"service": "http_status:202"}]})
        assert it.orchestrator.apply_local(rules) is not None
        await asyncio.gather(*it.orchestrator._tasks)
        assert it.used == [[True], [True]]
        assert it.dispatcher.ingress == rules
        assert it.orchestrator.apply_local(rules) is not None
        await it.push(1)
        await it.orchestrator.close()
        assert it.dispatcher.ingress.rules[0].service.text == "http_status:201"

    run(main())


class Clock:
    """A loop whose time the test sets, and whose timers it fires."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, call: Callable[[], None]) -> None:
        """The test calls it."""


def crew(stream: io.StringIO) -> tuple[Crew, list[Fake], Clock]:
    config = RunConfig(Token("account", b"s" * 32, uuid.uuid4()))
    config.workers = 2
    it = Crew(config, uuid.uuid4(), Logger(LogOutput(level="info", json_lines=True, stream=stream)))
    dispatcher = Dispatcher(connector_id=uuid.uuid4(), loop=asyncio.get_running_loop())
    it.make_pages(dispatcher, Meters(tuple))
    it.make_orchestrator(dispatcher)
    fakes = [Fake(0), Fake(1)]
    it._workers = [real(fake) for fake in fakes]
    clock = Clock()
    it._loop = cast("asyncio.AbstractEventLoop", clock)
    return it, fakes, clock


async def closed(it: Crew) -> None:
    it._workers = []
    await it.close()


def test_a_worker_that_does_not_answer_is_ended_and_a_machine_that_slept_blames_nobody() -> None:
    async def main() -> None:
        stream = io.StringIO()
        it, (well, ill), clock = crew(stream)
        for _ in range(MAX_UNANSWERED):
            clock.now += BEAT_SECONDS
            it._beat()
            it._take(real(well), say.Pong(0))
        assert (well.killed, ill.killed) == (0, 0)
        clock.now += 600  # the machine slept: its beats are late, and all start anew
        it._beat()
        assert ill.killed == 0
        for _ in range(MAX_UNANSWERED):
            clock.now += BEAT_SECONDS
            it._beat()
            it._take(real(well), say.Pong(0))
        assert (well.killed, ill.killed) == (0, 1)
        assert "Worker 1 does not answer and is ended" in stream.getvalue()
        await closed(it)

    run(main())


def test_five_ends_in_a_row_end_the_run() -> None:
    async def main() -> None:
        stream = io.StringIO()
        it, (first, _), _ = crew(stream)
        it._on_lost(real(first), "killed by SIGKILL")
        assert "Worker 0 ended unexpectedly; it is started again in 500ms" in stream.getvalue()
        first.pause = None
        it._on_lost(real(first), "killed by SIGSEGV")
        connection = it.connect(0, cast("Any", None))
        with pytest.raises(Exception, match=f"worker 0 ended {len(PAUSES) + 1} times in a row: killed by SIGSEGV"):
            await connection.run()
        await closed(it)

    run(main())


def test_one_streams_at_a_time_through_whichever_worker() -> None:
    async def main() -> None:
        it, (first, second), _ = crew(io.StringIO())
        log = it._log
        it._listen(real(first), "me")
        assert [message.threshold for message in second.of(say.LogLevel)] == [0]
        assert [message.actor for message in second.of(say.Streamer)] == ["me"]
        log.debug("seen")
        assert [json.loads(message.text)["message"] for message in first.of(say.LogEvent)] == ["seen"]
        it._listen(real(second), "somebody else")  # in the same moment
        assert [message.code for message in second.of(say.EndStream)] == [LIMIT_EXCEEDED]
        it._listen(real(second), "me")  # the same person, through another connection
        assert len(first.of(say.EndStream)) == 1
        it._listen(real(first), "")  # the end of the first session says nothing about the second
        log.debug("here now")
        assert [json.loads(message.text)["message"] for message in second.of(say.LogEvent)] == ["here now"]
        it._listen(real(second), "")
        log.debug("nobody")
        assert len(second.of(say.LogEvent)) == 1
        await closed(it)

    run(main())


def test_a_token_that_is_refused_through_one_worker_is_dropped_by_all() -> None:
    async def main() -> None:
        it, (first, second), _ = crew(io.StringIO())
        old = it._rotation.token
        new = Token("account", b"n" * 32, old.tunnel_id)
        it._rotation.begin(new, (0, 1))
        assert len(first.of(say.UseToken)) == len(second.of(say.UseToken)) == 1
        it._token_news(real(first), new.secret, accepted=False)
        assert it._rotation.token is old
        assert (len(first.of(say.DropToken)), len(second.of(say.DropToken))) == (0, 1)
        it._rotation.begin(new, (0, 1))
        it._token_news(real(second), new.secret, accepted=True)
        it._token_news(real(first), new.secret, accepted=False)  # it works for another: it stays
        assert it._rotation.token is new
        assert first.of(say.UseToken)[-1].secret == new.secret
        await closed(it)

    run(main())
