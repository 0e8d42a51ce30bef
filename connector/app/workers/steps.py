"""Configurations in step: every worker has a rule set ready before any of them uses it.

Owns: the order of changes, and the version in force. In: pushes that came over any worker's connections, the local
file. Out: messages to the workers; answers. Never: leaves two workers on different rules, beyond the moment that a
message takes.

*Strategy*: two phases. All workers prepare (that is where files are read and everything can fail) and answer; if all
could, all are told to use it, else all to forget it. One change at a time, under a lock that a worker's start takes
too: its settings hold the rules in force, and what comes later reaches it as a change. A worker that dies meanwhile is
not waited for; it starts again with the outcome.
"""

from __future__ import annotations

import asyncio
import json
from typing import Final

from connector.app.logs import Logger
from connector.app.orchestrator import Orchestrator
from connector.app.workers import messages as say
from connector.app.workers.one_worker import OneWorker
from connector.app.workers.settings import pack_rules
from connector.errors import ConfigError, ConnectorError
from connector.proxy.dispatch import Dispatcher, Prepared
from connector.proxy.ingress import LOCAL_VERSION, Ingress, OriginSettings, parse_remote_config
from connector.proxy.ingress_diff import describe_changes

STEP_SECONDS: Final = 3.0
"""How long a worker may take to get ready. The edge waits for 5 s over QUIC; getting ready takes milliseconds."""


class StepError(ConnectorError):
    """A worker did not get ready."""


class LeadersOrchestrator(Orchestrator):
    """The orchestrator of the leading process. `workers` are those that have their settings."""

    __slots__ = ("_answers", "_dispatcher", "_serial", "_tasks", "lock", "workers")

    def __init__(self, dispatcher: Dispatcher, log: Logger, base: OriginSettings) -> None:
        super().__init__(dispatcher, log, base)
        self._dispatcher = dispatcher
        self._serial = 0
        self._answers: dict[OneWorker, asyncio.Future[say.Prepared]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.workers: set[OneWorker] = set()
        self.lock = asyncio.Lock()

    async def push(self, version: int, config: bytes) -> tuple[int, str]:
        """Answer a push: the version in force and an error's text. See Orchestrator.on_rpc."""
        try:
            parsed = json.loads(config)
        except (ValueError, RecursionError) as error:
            return self.version, f"the configuration is not JSON: {error}"
        async with self.lock:
            if not self._is_news(version):
                return self.version, self._refusal() or ""
            text = json.dumps(parsed, separators=(",", ":"), ensure_ascii=False)
            try:
                ingress = parse_remote_config(version, parsed, self._base)
                prepared = self._dispatcher.prepare(ingress)
                await self._step(version, ingress, prepared)
            except Exception as error:  # as in one process
                return self.version, self._failed(error, version, text)
            self._updated(version, text)
            self.warn(ingress.warnings, prepared.doubts)
            return self.version, ""

    def apply_local(self, ingress: Ingress) -> list[str] | None:
        """See Orchestrator. What this process can check it checks now; the workers follow."""
        if self.version > LOCAL_VERSION or self._shut:
            return None
        changes = describe_changes(self._dispatcher.ingress, ingress)
        prepared = self._dispatcher.prepare(ingress)
        self.warn(prepared.doubts)
        task = asyncio.get_running_loop().create_task(self._follow(ingress, prepared), name="local configuration")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return changes

    def prepared(self, worker: OneWorker, message: say.Prepared) -> None:
        """Take a worker's answer."""
        answer = self._answers.get(worker)
        if answer is not None and not answer.done() and message.serial == self._serial:
            answer.set_result(message)

    def lost(self, worker: OneWorker) -> None:
        """Note that a worker is gone."""
        self.workers.discard(worker)
        answer = self._answers.get(worker)
        if answer is not None and not answer.done():
            answer.set_result(say.Prepared(self._serial, "", ""))

    async def close(self) -> None:
        """End what is under way."""
        self.shut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, ingress: Ingress, prepared: Prepared) -> None:
        async with self.lock:
            if self.version > LOCAL_VERSION:
                return  # the edge was faster
            try:
                await self._step(self.version, ingress, prepared)
            except ConnectorError as error:
                self._log.error(
                    "The configuration file was not reloaded after all; the old rules stay", error=str(error)
                )

    async def _step(self, version: int, ingress: Ingress, prepared: Prepared) -> None:
        """Put a rule set in force everywhere, or nowhere. Errors: ConfigError, StepError."""
        self._serial += 1
        serial, loop = self._serial, asyncio.get_running_loop()
        message = say.Rules(serial, version, pack_rules(ingress))
        answers = self._answers = {worker: loop.create_future() for worker in self.workers}
        for worker in answers:
            worker.send(message)
        error: ConnectorError | None = None
        if answers:
            _, late = await asyncio.wait(answers.values(), timeout=STEP_SECONDS)
            for worker, answer in answers.items():
                if answer in late:
                    error = StepError(f"worker {worker.index} did not get ready within {STEP_SECONDS:g} seconds")
                elif answer.result().error and error is None:
                    error = ConfigError(answer.result().error, advice=answer.result().advice)
        for worker in answers:
            worker.send(say.Enforce(serial, error is None))
        self._answers = {}
        if error is not None:
            raise error
        self._dispatcher.enforce(prepared)
