"""One view of all workers: metrics that are added up, pages that show every process.

Owns: which numbers are the leading process's own, how the others add up, what stays of a worker that died.
In: what workers told. Out: pages. Never: lets a counter go down because a worker ended.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from connector.app.answers import Answer, Query, Routes, text_answer
from connector.app.config import RunConfig
from connector.app.metric_families import COUNTER, FAMILIES
from connector.app.metrics import Metrics, ProcessExtras, Rows
from connector.app.pages import Pages
from connector.app.workers import messages as say
from connector.protocol.counts import Histogram

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

    from connector.app.meters import Meters
    from connector.proxy.dispatch import Dispatcher

LEADERS: Final = frozenset({
    "build_info", "promhttp_metric_handler_requests_total", "promhttp_metric_handler_requests_in_flight",
})  # fmt: skip
"""Numbers of the program or the page itself, which workers leave out."""

GC_NUMBERS: Final = ("gc:collected", "gc:uncollectable", "gc:collections")
"""What workers tell of their garbage collectors, by generation; prometheus_client has families for them."""

Tally = dict[tuple[str, tuple[str, ...]], "float | Histogram"]

AskAll = Callable[[str, Query], Awaitable[list[tuple[int, int, Any]]]]
"""Asks all workers; gives index, process id and answer of each that did."""


def add_up(tally: Tally, numbers: list[say.Number], histograms: list[say.Buckets]) -> None:
    """Add what one worker told to `tally`."""
    for name, labels, value in numbers:
        before = tally.get((name, labels), 0.0)
        assert not isinstance(before, Histogram)
        tally[name, labels] = before + value
    for name, labels, bounds, counts, total in histograms:
        found = tally.get((name, labels))
        if not isinstance(found, Histogram) or found.bounds != bounds:
            found = tally[name, labels] = Histogram(bounds)
        found.counts = [a + b for a, b in zip(found.counts, counts, strict=True)]
        found.sum += total


def counters(numbers: list[say.Number]) -> list[say.Number]:
    """Give those that only go up: what stays when the process that counted them is gone."""
    kept = []
    for number in numbers:
        family = FAMILIES.get(number[0])
        if (family is not None and family.kind == COUNTER) or number[0] in GC_NUMBERS:
            kept.append(number)
    return kept


class CrewMetrics(Metrics):
    """The page `/metrics` of a run with workers."""

    def __init__(self, dispatcher: Dispatcher, meters: Meters, ask: AskAll, pids: Callable[[], list[int]]) -> None:
        super().__init__(dispatcher, meters)
        self._ask = ask
        self._pids = pids
        self.gone: Tally = {}
        """What workers that died had counted when they told it last."""
        self._collected: dict[tuple[str, str], float] = {}

    def bury(self, numbers: list[say.Number], histograms: list[say.Buckets]) -> None:
        """Keep the counters of a worker that died."""
        add_up(self.gone, counters(numbers), histograms)

    async def _all_rows(self) -> Rows:
        tally: Tally = {key: v.copy() if isinstance(v, Histogram) else v for key, v in self.gone.items()}
        for _, _, answer in await self._ask("metrics", {}):
            add_up(tally, answer.numbers, answer.histograms)
        own = self.rows()
        numbers = [(name, labels, value) for name, labels, value in own if not isinstance(value, Histogram)]
        add_up(tally, numbers, [
            (name, labels, tuple(value.bounds), value.counts, value.sum)
            for name, labels, value in own
            if isinstance(value, Histogram)
        ])  # fmt: skip
        for generation, facts in enumerate(gc.get_stats()):
            for name in GC_NUMBERS:
                key = (name, (str(generation),))
                before = tally.pop(key, 0.0)
                assert not isinstance(before, Histogram)
                self._collected[name, str(generation)] = before + facts[name.partition(":")[2]]
        return [(name, labels, value) for (name, labels), value in tally.items()]

    def _registry(self) -> CollectorRegistry:
        import prometheus_client  # noqa: PLC0415  (slow, and rarely needed)

        registry = prometheus_client.CollectorRegistry()
        registry.register(_Processes(self._pids))
        prometheus_client.PlatformCollector(registry=registry)
        registry.register(_Garbage(self._collected))
        registry.register(ProcessExtras())
        return registry


class _Processes:
    """prometheus_client's view of a process, added up over all of ours; limits and start are the leading one's.

    The CPU time of workers that are gone counts too: the kernel keeps it as that of our children.
    """

    def __init__(self, pids: Callable[[], list[int]]) -> None:
        self._pids = pids

    def collect(self) -> Iterator[Metric]:
        import resource  # noqa: PLC0415  (not on Windows, where there are no workers)

        from prometheus_client import ProcessCollector  # noqa: PLC0415

        gone = resource.getrusage(resource.RUSAGE_CHILDREN)
        sums = {"process_cpu_seconds": gone.ru_utime + gone.ru_stime}
        own = list(ProcessCollector(registry=None).collect())
        for pid in self._pids():
            for metric in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                sums[metric.name] = sums.get(metric.name, 0) + metric.samples[0].value
        for metric in own:
            if metric.name not in {"process_start_time_seconds", "process_max_fds"}:
                sample = metric.samples[0]
                metric.samples = [sample._replace(value=sample.value + sums.get(metric.name, 0))]
            yield metric


class _Garbage:
    """prometheus_client's families of the garbage collector, with everybody's numbers."""

    def __init__(self, numbers: dict[tuple[str, str], float]) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.metrics_core import CounterMetricFamily  # noqa: PLC0415

        for name, family, text in (
            ("gc:collected", "python_gc_objects_collected", "Objects collected during gc"),
            ("gc:uncollectable", "python_gc_objects_uncollectable", "Uncollectable objects found during GC"),
            ("gc:collections", "python_gc_collections", "Number of times this generation was collected"),
        ):
            metric = CounterMetricFamily(family, text, labels=["generation"])
            for (which, generation), value in sorted(self._numbers.items()):
                if which == name:
                    metric.add_metric([generation], value)
            yield metric


class CrewPages(Pages):
    """Pages that show the leading process and every worker."""

    def __init__(
        self, config: RunConfig, connector_id: UUID, dispatcher: Dispatcher, metrics: Metrics, ask: AskAll
    ) -> None:
        super().__init__(config, connector_id, dispatcher, metrics)
        self._ask = ask

    def routes(self) -> Routes:
        """See Pages."""
        return super().routes() | {
            "/debug/pprof/goroutine": lambda query: self._together(super(CrewPages, self).stacks, "goroutine", query),
            "/debug/pprof/heap": lambda query: self._together(super(CrewPages, self).heap, "heap", query),
            "/debug/pprof/profile": lambda query: self._together(super(CrewPages, self).profile, "profile", query),
            "/debug/requests": self._requests,
        }

    def shared_profiles(self) -> Routes:
        """See Pages."""
        routes = self.routes()
        return {path: routes[path] for path in ("/debug/pprof/heap", "/debug/pprof/goroutine")}

    async def _together(self, own: Callable[[Query], Answer | Awaitable[Answer]], name: str, query: Query) -> Answer:
        async def mine() -> Answer:
            answer = own(query)
            return answer if isinstance(answer, Answer) else await answer

        first, others = await asyncio.gather(mine(), self._ask(f"/debug/pprof/{name}", query))
        if first.status != 200:
            return first
        parts = [f"== leading process\n{first.body.decode()}"]
        parts += [f"== worker {index} (process {pid})\n{answer.text}" for index, pid, answer in others]
        return text_answer("\n".join(parts))

    async def _requests(self, query: Query) -> Answer:
        others = await self._ask("/debug/requests", query)
        return text_answer(
            "\n".join(f"== worker {index} (process {pid})\n{answer.text}" for index, pid, answer in others)
        )
