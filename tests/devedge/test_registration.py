"""Registration, configuration pushes, leaving: the RPC side, seen from a connector on general libraries."""

import asyncio
import uuid
from pathlib import Path

import pytest
import uvloop

from connector.devedge.connectors import LOCATION
from connector.devedge.h2session import H2Stream
from connector.devedge.streams import RawHeaders
from tests.devedge.edges import edge_and_connector, get, run_edge, running_edge
from tests.devedge.fake_connector import FakeConnector, FakeH2Connector
from tests.support.aio import until


@pytest.mark.usefixtures("protocol")
def test_a_connector_with_the_right_secret_is_registered(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_edge(tmp_path) as (edge, recorder), await FakeConnector.connect(edge) as connector:
            answer = await connector.register(edge.tunnel())
            assert answer.which() == "connectionDetails"
            details = answer.connectionDetails
            assert details.locationName == LOCATION
            assert details.tunnelIsRemotelyManaged is False
            [event] = recorder.named("registered")
            assert event["connection"] == str(uuid.UUID(bytes=details.uuid))
            assert event["connector"] == str(connector.connector_id)
            assert event["version"] == "fake"
            assert event["features"] == ["allow_remote_config", "serialized_headers"]

    run_edge(main())


@pytest.mark.parametrize("wrong", ["secret", "account", "tunnel"])
@pytest.mark.usefixtures("protocol")
def test_wrong_credentials_are_refused(tmp_path: Path, wrong: str) -> None:
    async def main() -> None:
        async with running_edge(tmp_path) as (edge, recorder), await FakeConnector.connect(edge) as connector:
            tunnel = edge.tunnel()
            answer = await connector.register(
                tunnel,
                secret=b"x" * 32 if wrong == "secret" else None,
                account="someone else" if wrong == "account" else None,
                tunnel_id=uuid.uuid4() if wrong == "tunnel" else None,
            )
            assert answer.which() == "error"
            expected = "Tunnel not found" if wrong == "tunnel" else "Invalid tunnel secret"
            assert answer.error.cause == f"Unauthorized: {expected}"
            [event] = recorder.named("register_refused")
            assert event["cause"] == answer.error.cause
            secrets = (tunnel.secret.hex(), edge.token())
            assert not any(secret in str(recorder.events) for secret in secrets)

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_the_same_connection_twice_is_a_duplicate(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            edge_and_connector(tmp_path) as (edge, first, _),
            await FakeConnector.connect(edge) as second,
        ):
            second.connector_id = first.connector_id
            answer = await second.register(edge.tunnel())
            assert answer.error.cause == "EDUPCONN"
            answer = await second.register(edge.tunnel(), conn_index=1)
            assert answer.which() == "connectionDetails"

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_the_configuration_is_pushed_after_registration(tmp_path: Path) -> None:
    async def main() -> None:
        ingress = ["app.test=http://127.0.0.1:1", "http_status:418"]
        async with edge_and_connector(tmp_path, ingress=ingress) as (edge, connector, recorder):
            pushed = await connector.configurations.get()
            assert pushed == {
                "version": 1,
                "config": {
                    "ingress": [
                        {"hostname": "app.test", "service": "http://127.0.0.1:1"},
                        {"service": "http_status:418"},
                    ]
                },
            }
            await until(lambda: recorder.named("configuration"))
            [event] = recorder.named("configuration")
            assert (event["applied"], event["error"], event["version"]) == (True, None, 1)
            assert edge.tunnel().config is not None

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_an_error_of_a_push_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path) as (edge, connector, recorder):
            connector.configuration_error = "no such service"
            edge.push(9, {"ingress": "nonsense"})
            await until(lambda: recorder.named("configuration"))
            [event] = recorder.named("configuration")
            assert event["applied"] is False
            assert "no such service" in event["error"]

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_an_unregistered_connector_gets_no_new_request_and_is_closed_when_idle(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path, lambda request: None) as (edge, connector, recorder):
            running = asyncio.create_task(get(edge))
            await until(lambda: connector.requests)
            await connector.unregister()
            await until(lambda: recorder.named("unregistered"))
            status, _, body = await get(edge)
            assert (status, b"1033" in body) == (530, True)
            assert not connector.lost.is_set()
            request = connector.requests[0]
            request.respond(200, [(b"Content-Length", b"2")])
            request.stream.write(b"ok")
            request.stream.write_eof()
            assert (await running)[2] == b"ok"
            async with asyncio.timeout(30):
                await connector.lost.wait()
            await until(lambda: recorder.named("disconnected"))
            assert recorder.named("disconnected")[0]["error"] is None

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_requests_are_spread_over_connections(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            edge_and_connector(tmp_path) as (edge, first, _),
            await FakeConnector.connect(edge) as second,
        ):
            await second.register(edge.tunnel(), conn_index=1)
            for _ in range(4):
                await get(edge)
            assert (len(first.requests), len(second.requests)) == (2, 2)

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_a_local_configuration_is_shown(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path) as (_, connector, recorder):
            request = (await connector.open_rpc()).updateLocalConfiguration_request()
            request.config = b'{"ingress":[]}'
            async with asyncio.timeout(30):
                await request.send()
            [event] = recorder.named("local_configuration")
            assert event["config"] == {"ingress": []}

    run_edge(main())


BOOTSTRAP = bytes.fromhex(
    "0000000005000000 0000000001000100 0800000000000000 0000000001000100 0000000000000000 0000000000000000"
)


class HastyConnector(FakeH2Connector):
    """Sends its first RPC message in the same breath as the head of the control stream, as cloudflared does."""

    def on_request(self, stream: H2Stream, headers: RawHeaders) -> None:
        super().on_request(stream, headers)
        if self.control.done():
            self.answered = asyncio.Event()
            self.control.result().tap = lambda data: self.answered.set()
            stream.write(BOOTSTRAP)


def test_connectors_that_speak_at_once_on_uvloop(tmp_path: Path) -> None:
    """pycapnp must be reading before the first byte is there: under uvloop anything else ends the process."""

    async def main() -> None:
        async with running_edge(tmp_path) as (edge, recorder):
            for _ in range(10):
                connectors = [await HastyConnector.dial(edge) for _ in range(5)]
                for connector in connectors:
                    assert isinstance(connector, HastyConnector)
                    await until(connector.control.done)
                    async with asyncio.timeout(30):
                        await connector.answered.wait()
                await asyncio.gather(*(connector.leave() for connector in connectors))
            await until(lambda: len(recorder.named("disconnected")) == 50)

    run_edge(main(), loop_factory=uvloop.new_event_loop)
