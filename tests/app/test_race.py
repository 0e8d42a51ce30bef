"""The race's driver: dials as the race orders them, one link at the end, nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from connector.app.race import run_race
from connector.errors import EdgeDialError
from connector.protocol.protocol_choice import Transport
from tests.support.aio import run, until

QUIC, HTTP2 = Transport.QUIC, Transport.HTTP2


class FakeLink:
    """A link that only knows whether it was aborted."""

    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


class Dials:
    """Dials that end when the test says so."""

    def __init__(self) -> None:
        self.futures: dict[Transport, asyncio.Future[FakeLink]] = {}
        self.heard: dict[Transport, Callable[[], None]] = {}

    async def dial(self, transport: Transport, on_heard: Callable[[], None]) -> FakeLink:
        self.futures[transport] = asyncio.get_running_loop().create_future()
        self.heard[transport] = on_heard
        return await self.futures[transport]


def test_quic_that_answers_at_once_is_alone() -> None:
    async def main() -> None:
        dials = Dials()
        race = asyncio.create_task(run_race(dials.dial))  # type: ignore[arg-type]
        await until(lambda: QUIC in dials.futures)
        link = FakeLink()
        dials.futures[QUIC].set_result(link)
        finish = await race
        assert (finish.link, finish.transport, finish.quic_error) == (link, QUIC, None)
        assert HTTP2 not in dials.futures
        assert not link.aborted

    run(main())


def test_silence_brings_http2_in_and_the_late_one_is_called_off() -> None:
    async def main() -> None:
        dials = Dials()
        race = asyncio.create_task(run_race(dials.dial))  # type: ignore[arg-type]
        await until(lambda: HTTP2 in dials.futures)
        dials.futures[HTTP2].set_result(FakeLink())
        finish = await race
        assert (finish.transport, finish.quic_heard, finish.quic_error) == (HTTP2, False, None)
        assert dials.futures[QUIC].cancelled()

    run(main())


def test_an_answer_over_quic_holds_http2_back() -> None:
    async def main() -> None:
        dials = Dials()
        race = asyncio.create_task(run_race(dials.dial))  # type: ignore[arg-type]
        await until(lambda: QUIC in dials.futures)
        dials.heard[QUIC]()
        done, _ = await asyncio.wait([race], timeout=0.6)
        assert not done
        assert HTTP2 not in dials.futures
        dials.futures[QUIC].set_exception(EdgeDialError("certificate"))
        await until(lambda: HTTP2 in dials.futures)
        dials.futures[HTTP2].set_exception(EdgeDialError("refused"))
        with pytest.raises(EdgeDialError, match="refused"):
            await race

    run(main())


def test_http2_won_and_quic_told_why_it_failed() -> None:
    async def main() -> None:
        dials = Dials()
        race = asyncio.create_task(run_race(dials.dial))  # type: ignore[arg-type]
        await until(lambda: QUIC in dials.futures)
        error = EdgeDialError("not permitted")
        dials.futures[QUIC].set_exception(error)
        await until(lambda: HTTP2 in dials.futures)
        dials.futures[HTTP2].set_result(FakeLink())
        assert (await race).quic_error is error

    run(main())


def test_both_up_in_one_turn_leave_one_link() -> None:
    async def main() -> None:
        dials = Dials()
        race = asyncio.create_task(run_race(dials.dial))  # type: ignore[arg-type]
        await until(lambda: HTTP2 in dials.futures)
        links = {QUIC: FakeLink(), HTTP2: FakeLink()}
        for transport, link in links.items():
            dials.futures[transport].set_result(link)
        finish = await race
        await asyncio.sleep(0)
        other = QUIC if finish.transport is HTTP2 else HTTP2
        assert not links[finish.transport].aborted
        assert links[other].aborted

    run(main())


def test_a_race_that_is_called_off_leaves_nothing() -> None:
    async def main() -> None:
        dials = Dials()
        race = asyncio.create_task(run_race(dials.dial))  # type: ignore[arg-type]
        await until(lambda: HTTP2 in dials.futures)
        race.cancel()
        with pytest.raises(asyncio.CancelledError):
            await race
        assert all(future.cancelled() for future in dials.futures.values())

    run(main())
