"""What only QUIC has: key exchanges, limits of streams, datagrams, the ends of a connection, fall-back."""

import asyncio
import importlib.metadata
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import capnp
import pytest
import uvloop
from aioquic import tls
from aioquic.quic.connection import QuicConnection

from connector.devedge import quictls
from connector.devedge.quiclink import QuicLink
from connector.devedge.quicmessages import DATA_SIGNATURE, decode_connect_response, response_length
from connector.devedge.quicrpc import register_udp_session, unregister_udp_session
from connector.devedge.quicsession import DATAGRAM_OVERHEAD, QuicStream
from connector.devedge.server import DevEdge, Settings
from connector.errors import ConfigError, WireError
from connector.transport.rpc import load_schema
from tests.devedge.edges import edge_and_connector, get, read_head, run_edge, running_edge, visit
from tests.devedge.fake_connector import PROTOCOL, FakeStream
from tests.devedge.fake_quic_connector import FakeQuicConnector, FakeQuicStream
from tests.devedge.test_public_http2 import Visitor2, echo, wait, websocket_request
from tests.support.aio import until
from tests.support.processes import ROOT

pytestmark = pytest.mark.usefixtures("quic")


@pytest.fixture
def quic() -> Any:
    token = PROTOCOL.set("quic")
    yield
    PROTOCOL.reset(token)


def link_of(edge: DevEdge) -> QuicLink:
    [link] = edge.roster.links
    assert isinstance(link, QuicLink)
    return link


def test_one_port_takes_both_protocols(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path) as (edge, _, recorder):
            PROTOCOL.set("http2")
            async with edge_and_connector(tmp_path / "other", listen=("127.0.0.1", 0)) as (_, _, other):
                assert other.named("registered")[0]["protocol"] == "http2"
            [event] = recorder.named("registered")
            assert event["protocol"] == "quic"
            assert event["address"].startswith("127.0.0.1:")
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
                tcp.connect(edge.edge_address)

    run_edge(main())


def test_without_quic_the_udp_port_is_free(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_edge(tmp_path, quic=False) as (edge, _):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
                udp.bind(edge.edge_address)

    run_edge(main())


def test_a_taken_udp_port_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        for attempt in range(20):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
                udp.bind(("127.0.0.1", 0))
                edge = DevEdge(Settings(tmp_path, tunnel_names=["demo"], listen=udp.getsockname()))
                with pytest.raises(ConfigError, match="port is taken") as caught:
                    await edge.start()
                if "UDP" in str(caught.value) or attempt == 19:  # else somebody has the same number for TCP
                    break
        assert "the UDP port is taken" in str(caught.value)
        assert "--no-quic" in caught.value.advice

    run_edge(main())


@pytest.mark.parametrize("version", ["1.3.0", None])
def test_another_aioquic_is_told_at_once(tmp_path: Path, version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    async def main() -> None:
        edge = DevEdge(Settings(tmp_path, tunnel_names=["demo"]))
        with pytest.raises(ConfigError, match=r"aioquic 1\.7\.x, and there is") as caught:
            await edge.start()
        assert "--no-quic" in caught.value.advice

    monkeypatch.setattr(importlib.metadata, "version", answer)
    run_edge(main())


@pytest.mark.parametrize("group", list(quictls.EXCHANGES))
def test_each_key_exchange(tmp_path: Path, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """aioquic's client sends shares of X25519 and P-256; an edge that wants only another one cannot have it."""
    monkeypatch.setattr(quictls, "EXCHANGES", {group: quictls.EXCHANGES[group]})

    async def main() -> None:
        async with running_edge(tmp_path) as (edge, _):
            connector = FakeQuicConnector(edge, None)
            if group == quictls.X25519MLKEM768:
                await until(lambda: connector.over)
                assert "key exchange" in connector.quic._close_event.reason_phrase  # type: ignore[union-attr]
                connector.vanish()
                return
            async with connector:
                await connector.ready.wait()
                assert (await connector.register(edge.tunnel())).which() == "connectionDetails"

    run_edge(main())


def test_a_share_that_is_missing_is_asked_for(tmp_path: Path) -> None:
    """aioquic's client cannot answer a HelloRetryRequest, so this looks at it; real cloudflared answers one."""
    sent: list[bytes] = []

    def handle(self: Any, data: Any, out: Any) -> None:
        sent.append(data.data_slice(0, data.capacity))
        raise tls.AlertUnexpectedMessage("a retry")

    async def main() -> None:
        async with running_edge(tmp_path) as (edge, _):
            connector = FakeQuicConnector(edge, None)
            await until(lambda: connector.over)
            connector.vanish()

    original = tls.Context._client_send_hello

    def hello_without_share(self: Any, out: Any) -> None:
        monkey.setattr(tls, "push_list", skip)
        original(self, out)
        monkey.setattr(tls, "push_list", plain)

    plain = tls.push_list
    lists = 0

    def skip(buffer: Any, capacity: int, function: Any, values: Any) -> None:
        nonlocal lists
        lists += 1
        plain(buffer, capacity, function, [] if lists == 3 else values)  # the third list holds the key shares

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(tls.Context, "_client_send_hello", hello_without_share)
        monkey.setattr(tls.Context, "_client_handle_hello", handle)
        run_edge(main())
    assert len(sent) == 1
    assert quictls.RETRY_RANDOM in sent[0]


@pytest.mark.parametrize(
    ("options", "reason"), [({"alpn": "h3"}, "ALPN"), ({"name": "other.example"}, "other.example")]
)
def test_a_wrong_handshake_fails(tmp_path: Path, options: dict[str, str], reason: str) -> None:
    async def main() -> None:
        async with running_edge(tmp_path) as (edge, recorder):
            connector = FakeQuicConnector(edge, None, **options)  # type: ignore[arg-type]
            await until(lambda: connector.over)
            close = connector.quic._close_event
            assert close is not None
            assert reason in close.reason_phrase
            connector.vanish()
            assert not edge.roster.links
            assert not recorder.named("disconnected")

    run_edge(main())


def test_noise_is_ignored_and_other_versions_are_answered(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path, echo) as (edge, _, _):
            loop = asyncio.get_running_loop()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
                udp.setblocking(False)
                udp.connect(edge.edge_address)
                for noise in (b"", b"\0", b"\x40", b"\xc0", bytes(1200), b"\xff" * 1200, b"\x40" * 40):
                    udp.send(noise)
                udp.send(bytes.fromhex("c0fafafafa") + b"\x08" + b"d" * 8 + b"\x08" + b"s" * 8 + bytes(1200))
                async with asyncio.timeout(30):
                    answer = await loop.sock_recv(udp, 2000)
                assert answer[1:5] == bytes(4)
                assert answer.endswith(bytes.fromhex("00000001"))
            assert (await get(edge))[0] == 200

    run_edge(main())


@pytest.mark.parametrize(("listen", "asked"), [("0.0.0.0", "127.0.0.2"), ("::", "::1"), ("127.0.0.1", "127.0.0.1")])
def test_the_address_that_was_asked_answers(tmp_path: Path, listen: str, asked: str) -> None:
    """Bound to all addresses, the kernel alone would answer from the first one of the loopback interface."""

    async def main() -> None:
        async with running_edge(tmp_path, listen=(listen, 0)) as (edge, _):
            with socket.socket(socket.AF_INET6 if ":" in asked else socket.AF_INET, socket.SOCK_DGRAM) as asker:
                asker.setblocking(False)
                asker.connect((asked, edge.edge_address[1]))  # so that it hears nobody else
                asker.send(bytes([0xC0, 0x1A, 0x2A, 0x3A, 0x4A, 8]) + bytes(8) + bytes([0]) + bytes(1200))
                async with asyncio.timeout(30):
                    answer = await asyncio.get_running_loop().sock_recv(asker, 2000)
                assert answer[1:5] == bytes(4)  # Version Negotiation

    run_edge(main())


def test_streams_beyond_the_connectors_limit_wait(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_edge(tmp_path) as (edge, recorder):
            taken: list[FakeStream] = []
            async with await FakeQuicConnector.dial(edge, taken.append, max_streams=4) as connector:
                await connector.register(edge.tunnel())
                gets = [asyncio.create_task(get(edge, f"/{i}")) for i in range(12)]
                await until(lambda: len(taken) == 4 and len(recorder.named("request")) == 12)
                for task in gets[8:]:  # visitors that leave before their turn
                    task.cancel()
                await until(lambda: len(recorder.named("stream_closed")) == 4)
                for _ in range(8):
                    await until(lambda: taken)
                    taken.pop().respond(204, end=True)
                assert [(await task)[0] for task in gets[:8]] == [204] * 8
                assert not recorder.named("disconnected")

    run_edge(main())


def test_a_failure_of_the_connector_is_a_page_with_its_words(tmp_path: Path) -> None:
    def handler(request: FakeStream) -> None:
        assert isinstance(request, FakeQuicStream)
        limited = [("FlowConnectRateLimited", "true")] if request.path == "/limit" else []
        request.answer("unable to reach the origin", limited)
        request.stream.write_eof()

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, _, _):
            status, _, body = await get(edge)
            assert (status, b"unable to reach the origin" in body) == (502, True)
            assert b"hop: connector to origin" in body
            assert b"limit of flows" in (await get(edge, "/limit"))[2]

    run_edge(main())


def test_header_values_may_be_any_bytes(tmp_path: Path) -> None:
    def handler(request: FakeStream) -> None:
        request.respond(200, [(b"Content-Length", b"0"), (b"X-Name", b"caf\xe9")], end=True)

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, _, _):
            assert (await get(edge))[1]["x-name"] == "caf\xe9"

    run_edge(main())


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        DATA_SIGNATURE + b"01" + b"\xff\xff\xff\xff",
        DATA_SIGNATURE + b"01" + b"\0\0\0\0\xff\xff\xff\x7f",
        DATA_SIGNATURE + b"01" + bytes.fromhex("0000000001000000") + b"\xff" * 8,
        DATA_SIGNATURE + b"01" + bytes.fromhex("0000000001000000") + bytes(8),  # no status
        DATA_SIGNATURE,
    ],
)
def test_a_response_that_makes_no_sense_is_a_502(tmp_path: Path, answer: bytes) -> None:
    def handler(request: FakeStream) -> None:
        request.stream.write(answer)
        request.stream.write_eof()

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, _, recorder):
            assert (await get(edge))[0] == 502
            await until(lambda: recorder.named("stream_closed"))
            assert not recorder.named("disconnected")

    run_edge(main())


def test_responses_are_read_from_pieces() -> None:
    schema = load_schema("quic_metadata").ConnectResponse
    message = DATA_SIGNATURE + b"01" + schema.new_message(error="boom").to_bytes()
    for size in range(len(message)):
        assert response_length(message[:size]) in (None, len(message))
    assert decode_connect_response(message[8:]) == (b"boom", [])
    with pytest.raises(WireError):
        response_length(b"\x0a\x36\xcd\x13")


def test_datagrams_are_counted(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path) as (edge, connector, recorder):
            assert isinstance(connector, FakeQuicConnector)
            link = link_of(edge)
            seen: list[bytes] = []
            link.datagram_listeners.append(seen.append)
            for i in range(3):
                assert connector.send_datagram(b"datagram %d" % i)
            await until(lambda: len(seen) == 3)
            await until(lambda: recorder.named("datagrams"))
            assert recorder.named("datagrams")[0]["count"] in (1, 2, 3)
            largest = bytes(1452 - DATAGRAM_OVERHEAD)
            assert link.send_datagram(largest)
            assert not link.send_datagram(largest + b"x")  # the library would never get rid of it
            await until(lambda: connector.datagrams == [largest])

    run_edge(main())


def test_udp_sessions_over_rpc_streams(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path) as (edge, connector, recorder):
            assert isinstance(connector, FakeQuicConnector)
            link, session = link_of(edge), uuid.uuid4()
            assert await register_udp_session(link, session, b"\x7f\0\0\1", 53) == ""
            assert await register_udp_session(link, session, b"\x7f\0\0\1", 1) == "too many active flows"
            await unregister_udp_session(link, session, "enough")
            with pytest.raises(capnp.KjException, match="no message"):
                await unregister_udp_session(link, session, "")
            assert connector.sessions == [(session.bytes, 53), (session.bytes, 1), (session.bytes, 0)]
            await connector.end_session(session.bytes, "idle")
            [event] = recorder.named("udp_session_ended")
            assert (event["session"], event["message"]) == (session.hex, "idle")
            await until(lambda: list(link.streams) == [0])

    run_edge(main())


def test_a_push_to_a_connector_that_goes_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path) as (edge, connector, recorder):
            edge.push(7, {"ingress": []})
            connector.abort()
            await until(lambda: recorder.named("disconnected"))
            await until(lambda: not edge.roster.closing)

    run_edge(main())


def test_another_stream_of_the_connector_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path) as (edge, connector, _):
            assert isinstance(connector, FakeQuicConnector)
            request = FakeStream(connector, None, ())
            stream = connector.open_stream(request)
            stream.write(b"hello")
            async with asyncio.timeout(30):
                assert "code 0" in str(await request.reset)
            assert (await get(edge))[0] == 204

    run_edge(main())


@pytest.mark.parametrize("way", ["close", "abort", "vanish", "edge"])
def test_the_ends_of_a_connection(tmp_path: Path, way: str) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path, lambda request: None) as (edge, connector, recorder):
            assert isinstance(connector, FakeQuicConnector)
            running = asyncio.create_task(get(edge))
            await until(lambda: connector.requests)
            if way == "edge":
                link_of(edge).abort("enough")
            else:
                getattr(connector, way)()
            status, _, body = await running
            assert (status, b"hop: dev edge to connector" in body) == (502, True)
            [event] = recorder.named("disconnected")
            errors = {"close": "None", "abort": "0x77: gone", "vanish": "Idle timeout", "edge": "enough"}
            assert errors[way] in str(event["error"])
            if way == "edge":
                async with asyncio.timeout(30):
                    await connector.lost.wait()
                assert "enough" in str(connector.error)
            elif way == "vanish":
                connector.close()

    run_edge(main())


def test_a_connector_whose_address_changes_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path, echo) as (edge, connector, recorder), visit(edge) as (reader, writer):
            assert isinstance(connector, FakeQuicConnector)
            writer.write(websocket_request())
            assert (await read_head(reader))[0] == 101
            for _ in range(3):
                connector.rebind()
                connector.quic.send_ping(1)
                connector.wake()
                writer.write(b"still there")
                async with asyncio.timeout(30):
                    assert await reader.readexactly(11) == b"still there"
            assert not recorder.named("disconnected")

    run_edge(main())


def test_the_library_is_loaded_by_the_first_datagram() -> None:
    code = "import sys, connector.devedge.server; sys.exit(any(name.startswith('aioquic') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_a_drained_link_is_closed_when_idle(tmp_path: Path) -> None:
    async def main() -> None:
        faults = ("goaway-after:0.2",)
        async with edge_and_connector(tmp_path, lambda request: None, faults=faults) as (edge, connector, recorder):
            running = asyncio.create_task(get(edge))
            await until(lambda: connector.requests and link_of(edge).draining)
            assert (await get(edge))[0] == 530
            connector.requests[0].respond(204, end=True)
            assert (await running)[0] == 204
            async with asyncio.timeout(30):
                await connector.lost.wait()
            assert recorder.named("disconnected")[0]["error"] == "after the fault goaway-after:0.2"

    run_edge(main())


def test_what_the_library_raises_ends_one_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
        async with edge_and_connector(tmp_path) as (edge, first, recorder):  # noqa: SIM117 - the second needs the edge
            async with await FakeQuicConnector.dial(edge) as second:
                await second.register(edge.tunnel(), conn_index=1)
                victim = next(iter(edge.roster.links))
                assert isinstance(victim, QuicLink)
                monkeypatch.setattr(victim.quic, "receive_datagram", lambda *_: 1 / 0)
                for connector in (first, second):
                    assert isinstance(connector, FakeQuicConnector)
                    connector.quic.send_ping(1)
                    connector.wake()
                await until(lambda: recorder.named("disconnected"))
                assert (await get(edge))[0] == 204
                assert "division" in recorder.named("disconnected")[0]["error"]
        assert isinstance(told[0]["exception"], ZeroDivisionError)

    run_edge(main())


def test_a_stream_that_is_stopped_swallows_what_comes(tmp_path: Path) -> None:
    def handler(request: FakeStream) -> None:
        assert isinstance(request.stream, QuicStream)
        request.stream.session.quic.stop_stream(request.stream.id, 0)
        request.respond(200, [(b"Content-Length", b"4")])
        request.stream.write(b"done")
        request.stream.write_eof()

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, _, recorder):
            for _ in range(3):
                async with visit(edge) as (reader, writer):
                    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30000000\r\n\r\n"
                    writer.write(head + bytes(1_000_000))
                    assert (await read_head(reader))[0] == 200
                    assert await reader.readexactly(4) == b"done"
            await until(lambda: len(recorder.named("stream_closed")) == 3)
            assert not recorder.named("disconnected")
            assert not link_of(edge).streams or list(link_of(edge).streams) == [0]

    run_edge(main())


def test_streams_leave_nothing_behind(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path, echo) as (edge, connector, recorder):
            assert isinstance(connector, FakeQuicConnector)
            for _ in range(5):
                await asyncio.gather(*(get(edge) for _ in range(20)))
            async with visit(edge) as (reader, writer):
                writer.write(websocket_request())
                assert (await read_head(reader))[0] == 101
            link = link_of(edge)
            await until(lambda: len(recorder.named("stream_closed")) == 101)
            await until(lambda: list(link.streams) == [0])
            await until(lambda: len(link.quic._streams) == 1, what="streams inside aioquic")

    run_edge(main())


def test_a_loss_of_every_tenth_packet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams and credit survive loss in both directions; the drops are the same in every run."""
    counter = 0
    original = QuicConnection.receive_datagram

    def lossy(self: Any, data: bytes, address: Any, now: float) -> None:
        nonlocal counter
        counter += 1
        if counter % 10:
            original(self, data, address, now)

    async def main() -> None:
        async with edge_and_connector(tmp_path, echo) as (edge, _, recorder):
            monkeypatch.setattr(QuicConnection, "receive_datagram", lossy)
            body = bytes(range(256)) * 8192
            async with visit(edge) as (reader, writer):
                writer.write(f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n".encode())
                writer.write(b"Connection: close\r\n\r\n" + body)
                assert (await read_head(reader))[1]["transfer-encoding"] == "chunked"
                received = await reader.read()
            assert len(received) > len(body)
            async with await Visitor2.connect(edge) as visitor:
                replies = [visitor.request(method=b"POST", path=b"/%d" % i, end=False) for i in range(100)]
                for i, reply in enumerate(replies):
                    reply.stream.write(b"%03d" % i * 5000)
                    reply.stream.write_eof()
                for i, reply in enumerate(replies):
                    await wait(reply.done)
                    assert reply.body == b"%03d" % i * 5000
            assert not recorder.named("disconnected")

    run_edge(main(), limit=110)


def test_connectors_on_uvloop(tmp_path: Path) -> None:
    """pycapnp must be reading before the first byte is there, on streams of either side: uvloop ends the process."""

    async def main() -> None:
        async with running_edge(tmp_path, ingress=["http_status:418"]) as (edge, recorder):
            for _ in range(5):
                connectors = [await FakeQuicConnector.dial(edge) for _ in range(5)]
                await asyncio.gather(*(connector.register(edge.tunnel()) for connector in connectors))
                for connector in connectors:
                    async with asyncio.timeout(30):
                        assert (await connector.configurations.get())["version"] == 1
                    await connector.end_session(b"x" * 16, "over")
                await until(lambda: not edge.roster.closing)
                await asyncio.gather(*(connector.leave() for connector in connectors))
                assert len(recorder.named("configuration")) % 5 == 0
            await until(lambda: len(recorder.named("disconnected")) == 25)
            assert {event["applied"] for event in recorder.named("configuration")} == {True}

    run_edge(main(), loop_factory=uvloop.new_event_loop)
