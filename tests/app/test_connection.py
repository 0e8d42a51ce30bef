"""One edge connection in this process, against an edge that does what a real one never should."""

from __future__ import annotations

import asyncio
import io
import json
import uuid
from pathlib import Path
from typing import Any

import capnp
import pytest

from connector.app.addresses import AddressBook
from connector.app.config import RunConfig
from connector.app.connection import EdgeConnection
from connector.app.dialler import Dialler
from connector.app.logs import Logger, LogOutput
from connector.app.orchestrator import Orchestrator
from connector.app.state import TunnelState
from connector.app.supervisor import Supervisor
from connector.app.transport_choice import TransportChoice
from connector.protocol.edge_addresses import EdgeAddress
from connector.protocol.wake_budget import BURST
from connector.proxy.dispatch import Dispatcher
from connector.wire.token import Token
from tests.support.aio import run, until
from tests.support.mini_edge import MiniEdge


class Setup:
    """The state of a process whose only edge is `edge`."""

    def __init__(self, edge: MiniEdge, grace: float = 30.0) -> None:
        self.stream = io.StringIO()
        self.log = Logger(LogOutput(level="debug", json_lines=True, stream=self.stream))
        config = RunConfig(Token("account", b"s" * 32, uuid.uuid4()))
        config.grace_period = grace
        config.cacert = str(edge.cacert)
        identity = uuid.uuid4()
        self.dispatcher = Dispatcher(connector_id=identity, loop=asyncio.get_running_loop())
        orchestrator = Orchestrator(self.dispatcher, self.log)
        self.state = TunnelState(
            config=config,
            connector_id=identity,
            log=self.log,
            dialler=Dialler(config, self.dispatcher.accept, orchestrator, quic=False, http2=True),
            choice=TransportChoice("http2", self.log, clock=asyncio.get_running_loop().time),
            book=AddressBook(((EdgeAddress("127.0.0.1", edge.port),), ())),
            active_streams=lambda: self.dispatcher.active,
            orchestrator=orchestrator,
        )

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    async def message(self, start: str) -> dict[str, Any]:
        await until(lambda: any(line["message"].startswith(start) for line in self.lines), what=start)
        return next(line for line in self.lines if line["message"].startswith(start))


@pytest.mark.parametrize("how", ["garbage", "reset", "close"])
def test_a_control_stream_that_breaks_at_once_is_a_lost_link(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        async with capnp.kj_loop(), MiniEdge(tmp_path) as edge:
            setup = Setup(edge)
            connection = EdgeConnection(0, setup.state)
            task = asyncio.create_task(connection.run())
            peer = await edge.accepted()
            control = peer.open_control()
            if how == "garbage":
                control.send(bytes(range(255, 0, -1)) * 4)
            elif how == "close":
                peer.cut()
            else:
                control.send(b"", end=True)
                peer.close()
            line = await setup.message("Serve tunnel error")
            assert line["level"] == "error"
            assert line["error"]
            assert line["advice"]
            await setup.message("Retrying connection in up to 2s")
            connection.stop()
            await task
            await setup.dispatcher.close()
            assert not [line for line in setup.lines if "traceback" in line]

    run(main())


def test_an_edge_that_opens_no_control_stream_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with capnp.kj_loop(), MiniEdge(tmp_path) as edge:
            setup = Setup(edge)
            supervisor = Supervisor(setup.state, 1)
            task = asyncio.create_task(supervisor.run())
            await edge.accepted()
            supervisor.stop()
            supervisor.stop()  # idempotent
            await task
            await setup.dispatcher.close()
            assert not [line for line in setup.lines if line["level"] == "error"]

    run(main())


def test_one_task_per_edge_connection(tmp_path: Path) -> None:
    async def main() -> None:
        async with capnp.kj_loop(), MiniEdge(tmp_path) as edge:
            before = len(asyncio.all_tasks())
            setup = Setup(edge)
            connection = EdgeConnection(0, setup.state)
            task = asyncio.create_task(connection.run())
            await edge.accepted()
            await until(lambda: len(asyncio.all_tasks()) <= before + 1, what="only the connection's own task is left")
            connection.stop()
            await task
            await setup.dispatcher.close()

    run(main())


def test_a_wake_up_ends_the_back_off_and_not_the_rest(tmp_path: Path) -> None:
    async def main() -> None:
        async with capnp.kj_loop(), MiniEdge(tmp_path) as edge:
            setup = Setup(edge)
            supervisor = Supervisor(setup.state, 1)
            task = asyncio.create_task(supervisor.run())
            (await edge.accepted()).cut()
            await setup.message("Retrying connection in up to")
            supervisor.woken("link_up")
            await edge.accepted()
            supervisor.woken("link_up")  # nobody waits: nothing to cut short
            supervisor.stop()
            await task
            await setup.dispatcher.close()
            assert len([line for line in setup.lines if "retry now" in line["message"]]) <= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("connector.protocol.reconnect.BASE_WAIT", 1000.0)  # without the wake-up, no second dial
        run(main())


def test_flapping_wakes_a_few_times_only(tmp_path: Path) -> None:
    async def main() -> None:
        async with capnp.kj_loop(), MiniEdge(tmp_path) as edge:
            setup = Setup(edge)
            supervisor = Supervisor(setup.state, 1)
            for _ in range(20):
                supervisor.woken("address_new")
            assert [line["retry"] for line in setup.lines] == [True] * BURST + [False] * (20 - BURST)
            await setup.dispatcher.close()

    run(main())
