"""Each fault as a connector sees it."""

import asyncio
from pathlib import Path

import capnp
import pytest

from connector.devedge.faults import parse_faults
from tests.devedge.edges import cancelled, edge_and_connector, get, read_head, run_edge, running_edge, visit
from tests.devedge.fake_connector import FakeConnector, FakeStream
from tests.devedge.test_public_http2 import websocket_request
from tests.support.aio import until


@pytest.mark.parametrize(
    ("fault", "cause", "retry_after", "should_retry"),
    [
        ("EDUPCONN", "EDUPCONN", 0, True),
        ("unauthorized", "Unauthorized: Invalid tunnel secret", 0, False),
        ("permanent", "dev edge fault: registration=permanent", 0, False),
        ("retry-after:5", "try later", 5_000_000_000, True),
    ],
)
@pytest.mark.usefixtures("protocol")
def test_refusals(tmp_path: Path, fault: str, cause: str, retry_after: int, should_retry: bool) -> None:
    async def main() -> None:
        async with running_edge(tmp_path, faults=(f"registration={fault}*1",)) as (edge, recorder):
            async with await FakeConnector.connect(edge) as connector:
                error = (await connector.register(edge.tunnel())).error
                assert (error.cause, error.retryAfter, error.shouldRetry) == (cause, retry_after, should_retry)
                assert recorder.named("register_refused")[0]["cause"] == cause
            async with await FakeConnector.connect(edge) as connector:  # *1 is used up
                assert (await connector.register(edge.tunnel())).which() == "connectionDetails"

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_exception(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            running_edge(tmp_path, faults=("registration=exception",)) as (edge, _),
            await FakeConnector.connect(edge) as connector,
        ):
            with pytest.raises(capnp.KjException) as raised:
                await connector.register(edge.tunnel())
            lines = raised.value.description.splitlines()
            assert [line.rpartition(".")[2] for line in lines] == [
                "FaultInjected: dev edge fault: registration=exception"
            ]

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_stall(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_edge(tmp_path, faults=("registration=stall",)) as (edge, recorder):
            async with await FakeConnector.connect(edge) as connector:
                registering = asyncio.ensure_future(connector.register(edge.tunnel()))
                done, _ = await asyncio.wait([registering], timeout=0.5)
                assert not done
                connector.abort()
                with pytest.raises((capnp.KjException, TimeoutError)):
                    await registering
            await until(lambda: recorder.named("disconnected"))

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_close(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            running_edge(tmp_path, faults=("registration=close",)) as (edge, _),
            await FakeConnector.connect(edge) as connector,
        ):
            with pytest.raises(capnp.KjException):
                await connector.register(edge.tunnel())
            async with asyncio.timeout(30):
                await connector.lost.wait()

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_garbage(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            running_edge(tmp_path, faults=("registration=garbage",)) as (edge, _),
            await FakeConnector.connect(edge) as connector,
        ):
            with pytest.raises(capnp.KjException):
                await connector.register(edge.tunnel())

    run_edge(main())


def test_goaway_lets_open_requests_finish(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path, lambda request: None, faults=("goaway-after:0.3",)) as (
            edge,
            connector,
            _,
        ):
            running = asyncio.create_task(get(edge))
            async with asyncio.timeout(30):
                await connector.gone_away.wait()
            assert (await get(edge))[0] == 530
            request = connector.requests[0]
            request.respond(200)
            request.stream.write(b"late")
            request.stream.write_eof()
            assert b"late" in (await running)[2]
            async with asyncio.timeout(30):
                await connector.lost.wait()

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_close_after_requests(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path, faults=("close-after:2",)) as (edge, connector, _):
            assert (await get(edge))[0] == 204
            await get(edge)
            async with asyncio.timeout(30):
                await connector.lost.wait()

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_idle_websockets_are_cut(tmp_path: Path) -> None:
    def handler(request: FakeStream) -> None:
        request.accept_websocket()

    async def main() -> None:
        async with (
            edge_and_connector(tmp_path, handler, faults=("idle-cut:0.2",)) as (edge, connector, _),
            visit(edge) as (reader, writer),
        ):
            writer.write(websocket_request())
            assert (await read_head(reader))[0] == 101
            async with asyncio.timeout(30):
                try:
                    assert await reader.read() == b""
                except ConnectionError:
                    pass
            assert cancelled(await connector.requests[0].reset)

    run_edge(main())


def test_switching_one_off_leaves_the_counts_of_the_others() -> None:
    faults = parse_faults(["registration=EDUPCONN*2", "reset:2", "delay:5"])
    assert faults.take_registration() == "EDUPCONN"
    assert not faults.take_request()
    faults.clear("delay")
    assert faults.active() == ["registration=EDUPCONN*2", "reset:2"]
    assert (faults.take_registration(), faults.take_registration()) == ("EDUPCONN", None)
    assert faults.take_request()
