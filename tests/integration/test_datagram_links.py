"""Private networks over real QUIC links in one process: migration, floods, tasks; both engines."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import capnp
import pytest

from connector.app.tracing import trace_request
from connector.devedge.datagrams import DatagramDesk, FlowRefusedError
from connector.devedge.quiclink import QuicLink as EdgeLink
from connector.devedge.quicrpc import RpcCall, unregister_udp_session
from connector.devedge.server import DevEdge, Settings
from connector.protocol.counts import COUNTS
from connector.proxy.dispatch import Dispatcher
from connector.proxy.flows import Flows
from connector.proxy.udp import LinkDatagrams, PrivateNetwork
from connector.transport.quic import QuicLink, dial_quic
from connector.transport.quic_trust import quic_context
from connector.transport.rpc import ConnectionOptions, RegistrationClient
from connector.wire.token import decode_token
from tests.support.aio import run, until

ENGINES = ("qh3", "aioquic")


class Handlers:
    """The RPC of a link."""

    def __init__(self, sink: LinkDatagrams) -> None:
        self.register_udp_session = sink.register_udp_session
        self.unregister_udp_session = sink.unregister_udp_session

    def update_configuration(self, version: int, config: bytes) -> tuple[int, str]:
        return version, ""


class Rig:
    """A dev edge and this process's links to it."""

    def __init__(self, edge: DevEdge, engine: str, stack: contextlib.AsyncExitStack) -> None:
        loop = asyncio.get_running_loop()
        self.edge = edge
        self.engine = engine
        self.stack = stack
        self.flows = Flows()
        self.dispatcher = Dispatcher(connector_id=uuid.uuid4(), loop=loop, flows=self.flows)
        self.network = PrivateNetwork(self.flows, loop)
        self.events: list[tuple[str, str]] = []
        stack.push_async_callback(self.dispatcher.close)
        stack.push_async_callback(self.network.close)

    async def link(self, index: int, version: int) -> tuple[QuicLink, EdgeLink]:
        """Dial and register one more."""
        sink = self.network.open_sink(index, version)
        link = await dial_quic(
            *self.edge.edge_address, context=quic_context(str(self.edge.ca_file)), accept=self.dispatcher.accept,
            rpc_handlers=Handlers(sink), datagrams=sink, engine=self.engine,
        )  # fmt: skip
        self.stack.callback(link.abort)
        client = await self.stack.enter_async_context(RegistrationClient(await link.control_stream(10)))
        known = set(self.edge.roster.links_of(self.edge.tunnel()))
        features = ("support_datagram_v3_2",) if version == 3 else ("support_datagram_v2",)
        options = ConnectionOptions(client_id=self.dispatcher_id, features=features)
        await client.register(decode_token(self.edge.token()), index, options, 20)
        [peer] = set(self.edge.roster.links_of(self.edge.tunnel())) - known
        assert isinstance(peer, EdgeLink)
        return link, peer

    dispatcher_id = uuid.uuid4()


@contextlib.asynccontextmanager
async def rig(state: Path, engine: str) -> AsyncIterator[Rig]:
    async with (
        capnp.kj_loop(),
        DevEdge(Settings(state, tunnel_names=["test"], ingress=["http_status:418"])) as edge,
        contextlib.AsyncExitStack() as stack,
    ):
        yield Rig(edge, engine, stack)


class Echo(asyncio.DatagramProtocol):
    """Answers in capitals, `copies` times."""

    copies = 1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.DatagramTransport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        for _ in range(self.copies):
            self.transport.sendto(data.upper(), address)


@contextlib.asynccontextmanager
async def echo() -> AsyncIterator[tuple[Echo, tuple[str, int]]]:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(Echo, local_addr=("127.0.0.1", 0))
    try:
        yield protocol, transport.get_extra_info("sockname")
    finally:
        transport.close()


def desk_of(link: EdgeLink) -> DatagramDesk:
    return link.desk


@pytest.mark.parametrize("engine", ENGINES)
def test_a_flow_moves_to_another_connection_and_survives_the_old_one(tmp_path: Path, engine: str) -> None:
    async def main() -> None:
        async with rig(tmp_path, engine) as it, echo() as (_, dest):
            first, first_peer = await it.link(0, 3)
            second, second_peer = await it.link(1, 3)
            came: list[bytes] = []
            flow = await desk_of(first_peer).open_udp(dest, came.append)
            stays = await desk_of(first_peer).open_udp(dest, came.append)
            flow.send(b"one")
            await until(lambda: b"ONE" in came)
            key = ("cloudflared_udp_migrated_flows", ("1",))
            before = COUNTS.numbers.get(key, 0)
            await flow.move(desk_of(second_peer))
            assert COUNTS.numbers[key] == before + 1
            assert (it.network.watched, it.flows.limiter.active) == (2, 2)
            first_peer.abort()  # and everything that is still bound to it
            await until(lambda: it.flows.limiter.active == 1)
            assert not stays.open
            flow.send(b"two")
            await until(lambda: b"TWO" in came)
            second.abort()
            await until(lambda: it.flows.limiter.active == 0)
            assert it.network.watched == 0
            with contextlib.suppress(Exception):
                await first.wait_closed()

    run(main(), limit=60)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("version", [2, 3])
def test_many_flows_cost_no_tasks_and_all_end_with_the_link(tmp_path: Path, engine: str, version: int) -> None:
    async def main() -> None:
        async with rig(tmp_path, engine) as it, echo() as (_, dest):
            link, peer = await it.link(0, version)
            count = 200
            came: list[bytes] = []
            flows = []
            for _ in range(count):
                flows.append(await desk_of(peer).open_udp(dest, came.append, idle=100))
            tasks = len(asyncio.all_tasks())
            for _ in range(20):
                if len(set(came)) == count:
                    break
                for number, flow in enumerate(flows):
                    if b"F%d" % number not in came:
                        flow.send(b"f%d" % number)
                    if number % 25 == 0:
                        await asyncio.sleep(0)
                with contextlib.suppress(AssertionError):
                    await until(lambda: len(set(came)) == count, limit=2)
            assert len(set(came)) == count
            assert it.network.watched == count
            assert len(asyncio.all_tasks()) <= tasks
            link.abort()
            assert (it.network.watched, it.flows.limiter.active) == (0, 0)

    run(main(), limit=100)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_flood_from_an_origin_is_bounded_and_the_link_lives(tmp_path: Path, engine: str) -> None:
    async def main() -> None:
        async with rig(tmp_path, engine) as it, echo() as (protocol, dest):
            link, peer = await it.link(0, 3)
            protocol.copies = 500
            came = 0

            def count(payload: bytes) -> None:
                nonlocal came
                came += 1

            flow = await desk_of(peer).open_udp(dest, count)
            most = 0
            for number in range(4):
                flow.send(b"x" * 1000)
                for _ in range(50):
                    most = max(most, len(link._datagrams))
                    await asyncio.sleep(0)
                await until(lambda number=number: came > number * 30)  # type: ignore[misc]
            assert most <= 32
            # Too long for a packet of this path: lost alone, whatever comes after it passes.
            protocol.copies = 1
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wide:
                wide.bind(("127.0.0.1", 0))
                wide.setblocking(False)
                seen: list[bytes] = []
                other = await desk_of(peer).open_udp(wide.getsockname(), seen.append)
                other.send(b"hello")
                _, address = await asyncio.get_running_loop().sock_recvfrom(wide, 2000)
                for size in (1400, 65000, 1281, 1280):
                    wide.sendto(b"y" * size, address)
                for _ in range(20):
                    wide.sendto(b"after", address)
                    with contextlib.suppress(AssertionError):
                        await until(lambda: b"after" in seen, limit=1)
                        break
                assert b"after" in seen
                assert all(len(payload) <= 1280 for payload in seen)

    run(main(), limit=60)


@pytest.mark.parametrize("version", [2, 3])
def test_refusals_reach_the_edge(tmp_path: Path, version: int) -> None:
    async def main() -> None:
        async with rig(tmp_path, "qh3") as it, echo() as (_, dest):
            _, peer = await it.link(0, version)
            it.flows.configure({"maxActiveFlows": 1})
            flow = await desk_of(peer).open_udp(dest, lambda payload: None)
            with pytest.raises(FlowRefusedError, match="too many active flows"):
                await desk_of(peer).open_udp(dest, lambda payload: None)
            if version == 2:
                await flow.close()
                assert it.flows.limiter.active == 0
                with pytest.raises(FlowRefusedError, match="unable to create a UDP socket"):
                    await desk_of(peer).open_udp(("255.255.255.255", 9), lambda payload: None)
            else:
                it.flows.configure({})
                with pytest.raises(FlowRefusedError, match="bind"):
                    await desk_of(peer).open_udp(("255.255.255.255", 9), lambda payload: None)

    run(main(), limit=60)


def test_an_exception_goes_out_as_its_text_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, "qh3") as it:
            link, peer = await it.link(0, 3)
            with pytest.raises(capnp.KjException) as refused:
                await unregister_udp_session(peer, uuid.uuid4(), "x")
            assert "datagram v3 does not support UnregisterUdpSession RPC" in str(refused.value)
            with pytest.raises(capnp.KjException) as malformed:
                await RpcCall(peer).call(
                    lambda server: server.registerUdpSession(sessionId=b"x"), lambda answer: answer
                )
            assert "a session ID has 16 bytes" in str(malformed.value)
            for error in (refused, malformed):
                remote = str(error.value).partition("remote exception: ")[2].splitlines()
                assert "RpcRefusal: " in remote[0]
                assert "File " not in str(error.value)
            link.abort()

    run(main(), limit=60)


def test_an_idle_session_is_told_by_an_rpc_that_the_edge_reads(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, "qh3") as it, echo() as (_, dest):
            link, peer = await it.link(0, 2)
            ends: list[str] = []
            for _ in range(5):
                await desk_of(peer).open_udp(dest, lambda payload: None, ends.append, idle=0.5)
            await until(lambda: len(ends) == 5, limit=30)
            assert ends == ["session idle for 0.5s"] * 5
            await until(lambda: it.network.watched == 0, limit=30)  # the RPC streams too
            await until(lambda: link.open_streams == 1, limit=30)

    run(main(), limit=60)


def test_traced_sessions_and_pings_give_spans_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, "qh3") as it, echo() as (_, dest):
            it.network._tracing = lambda context: trace_request(context, text=True)
            link, peer = await it.link(0, 2)
            context = "0123456789abcdeffedcba9876543210:0011223344556677:0:1"
            for port, error in ((dest[1], ""), (0, "")):
                session = uuid.uuid4()
                answer = await RpcCall(peer).call(
                    lambda server, session=session, port=port: server.registerUdpSession(  # type: ignore[misc]
                        sessionId=session.bytes, dstIp=b"\x7f\0\0\1", dstPort=port, closeAfterIdleHint=0,
                        traceContext=context,
                    ),
                    lambda answer: (str(answer.result.err), bytes(answer.result.spans)),
                )  # fmt: skip
                assert answer[0] == error
                assert b"register-session" in answer[1]
                assert str(session).encode() in answer[1]
                assert f"127.0.0.1:{port}".encode() in answer[1]
                assert bytes.fromhex(context[:32]) in answer[1]
            link.abort()

    run(main(), limit=60)
