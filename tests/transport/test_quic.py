"""QUIC links against a mini edge on aioquic: both engines, both loops."""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import capnp
import pytest

from connector.errors import ConfigError, EdgeDialError, EdgeLostError, EdgeTlsError
from connector.protocol.ports import Buffer, Request, ResetCode, StreamPort
from connector.protocol.quic_limits import QuicLimits
from connector.transport import quic, quic_engine
from connector.transport.link import Link
from connector.transport.quic import dial_quic
from connector.transport.quic_trust import quic_context
from connector.transport.rpc import ConnectionOptions, RegistrationClient
from connector.wire.token import Token
from tests.support.aio import run, until
from tests.support.certs import Authority
from tests.support.mini_edge import Registrar, RpcServer
from tests.support.mini_quic_edge import RPC, MiniQuicEdge, RpcClient
from tests.transport.quic_rig import Acceptor, Echo, Slow, both, everywhere, linked, run_on

TOKEN = Token("0123456789abcdef0123456789abcdef", bytes(range(32)), uuid.UUID("f1e2d3c4-b5a6-4978-8a9b-0c1d2e3f4a5b"))
CLIENT = uuid.UUID("11223344-5566-4778-899a-abbccddeeff0")


@everywhere
def test_registration_requests_and_a_clean_end(tmp_path: Path, engine: str, loop: str) -> None:
    async def main() -> None:
        async with capnp.kj_loop(), linked(tmp_path, engine) as (link, edge, accept):
            as_link: Link = link
            assert as_link.protocol == "quic"
            assert link.remote_address == ("127.0.0.1", edge.edge.port)
            control = await link.control_stream(1)
            registrar = Registrar()
            async with RpcServer(edge.control, registrar):  # type: ignore[arg-type]
                async with RegistrationClient(control) as client:
                    details = await client.register(TOKEN, 0, ConnectionOptions(client_id=CLIENT), 5)
                    assert details.location == "lis01"
                    stream = edge.request("https://app.example.com/hi?x=1", [("HttpHeader:Accept", "*/*")])
                    error, metadata = await stream.response()
                    assert (error, metadata) == ("", [("HttpStatus", "200"), ("HttpHeader:X-Path", "/hi?x=1")])
                    assert await stream.body() == b""
                    await stream.until(lambda: stream.stopped is not None)  # its FIN never came
                    assert stream.stopped == 0
                    await client.unregister(5)
                assert registrar.unregistered == 1
                await edge.control.until(edge.control.ended.is_set)
            assert accept.sinks[0].calls == ["eof"]
            await until(lambda: link.open_streams == 0)
            edge.shut()
            await link.wait_closed()

    run_on(loop, main())


@everywhere
def test_bodies_both_ways(tmp_path: Path, engine: str, loop: str) -> None:
    async def main() -> None:
        body = os.urandom(300_000)
        async with linked(tmp_path, engine) as (_, edge, accept):
            posts = [
                edge.request("/post", [("HttpMethod", "POST"), ("HttpHeader:Content-Length", str(len(body)))])
                for _ in range(4)
            ]
            sockets = [edge.request("/ws", kind="websocket") for _ in range(4)]
            for stream in posts:
                stream.send(body, end=True)
            for stream in sockets:
                assert (await stream.response())[1][0] == ("HttpStatus", "200")
                stream.send(b"x" * 128)
                assert await stream.read(128) == b"x" * 128
                stream.send(b"", end=True)
            for stream in posts:
                await stream.response()
                assert await stream.body() == body
                assert stream.stopped in (None, 0)
            for stream in sockets:
                assert await stream.body() == b""
            assert [sink.calls for sink in accept.sinks if "reset" in sink.calls] == []

    run_on(loop, main())


@both
def test_many_streams_at_once_and_no_task_for_any(tmp_path: Path, engine: str) -> None:
    count = 1_500 if engine == "qh3" else 400  # 4,000 with real programs: tests/faults

    async def main() -> None:
        async with linked(tmp_path, engine) as (link, edge, _):
            tasks = len(asyncio.all_tasks())
            streams = [edge.request("/ws", kind="websocket") for _ in range(count)]
            for stream in streams:
                await stream.response(60)
            assert link.open_streams == count + 1
            assert len(asyncio.all_tasks()) == tasks
            for stream in streams:
                stream.send(b"ping", end=True)
            for stream in streams:
                assert await stream.body(60) == b"ping"
            await until(lambda: link.open_streams == 1)

    run(main(), limit=110)


@both
def test_resets_have_code_0_both_ways(tmp_path: Path, engine: str) -> None:
    async def main() -> None:
        async with linked(tmp_path, engine) as (link, edge, accept):
            ours = edge.request("/ws", kind="websocket")
            await ours.response()
            accept.sinks[0].port.reset(ResetCode.FAILED)
            await ours.until(lambda: ours.reset is not None and ours.stopped is not None)
            assert (ours.reset, ours.stopped) == (0, 0)
            for give_up in ("send_reset", "send_stop"):
                theirs = edge.request("/ws", kind="websocket")
                await theirs.response()
                getattr(theirs, give_up)(7)
                sink = accept.sinks[-1]
                await sink.ended.wait()
                assert sink.calls == ["reset"]
                sink.port.write(b"late")
            unknown = edge.open(b"GET / HTTP/1.1\r\n\r\n")
            await unknown.until(lambda: unknown.reset is not None and unknown.stopped is not None)
            assert (unknown.reset, unknown.stopped) == (0, 0)
            await until(lambda: link.open_streams == 1)
            stream = edge.request("/after")
            await stream.response()

    run(main())


@both
def test_writing_to_stopped_streams_never_hurts_the_link(tmp_path: Path, engine: str) -> None:
    """STOP_SENDING may be known to the library before its event was handed out; sends must not raise then."""

    class Stubborn(Echo):
        def on_data(self, data: Buffer) -> None:
            self.port.consumed(len(data))
            for _ in range(20):
                self.port.write(b"x" * 1000)

    async def main() -> None:
        async with linked(tmp_path, engine, Stubborn) as (_, edge, accept):
            streams = [edge.request("/ws", kind="websocket") for _ in range(50)]
            for stream in streams:
                await stream.response()
            for stream in streams:
                stream.send(b"data")
                stream.send_stop()
                stream.send(b"more")
                stream.send_reset()
            for sink in list(accept.sinks):
                await sink.ended.wait()
            after = edge.request("/after")
            await after.response()

    run(main())


@both
def test_a_slow_eyeball_pauses_its_origin_and_nobody_else(tmp_path: Path, engine: str) -> None:
    limits = QuicLimits(stream_high_water=65_536, stream_low_water=16_384)

    async def main() -> None:
        async with linked(
            tmp_path, engine, limits=limits, edge_options={"max_stream_data": 50_000, "max_data": 10_000_000}
        ) as (_, edge, accept):
            slow = edge.request("/ws", kind="websocket")
            await slow.response()
            edge.hold(True)
            sink = accept.sinks[0]
            written = 0
            while "pause" not in sink.calls:
                sink.port.write(b"x" * 10_000)
                written += 10_000
                await asyncio.sleep(0)
                assert written < 1_000_000
            other = edge.request("/other")
            await other.response()
            edge.hold(False)
            await until(lambda: "resume" in sink.calls)
            sink.port.write_eof()
            assert len(await slow.body()) == written

    run(main())


@both
def test_a_slow_origin_bounds_what_is_held(tmp_path: Path, engine: str) -> None:
    size = 6_000_000
    limits = QuicLimits(
        stream_window=400_000, connection_window=1_000_000, receive_high_water=500_000, receive_low_water=400_000
    )

    async def main() -> None:
        async with linked(tmp_path, engine, Slow, limits=limits) as (_, edge, accept):
            stream = edge.request("/up", [("HttpMethod", "POST"), ("HttpHeader:Content-Length", str(size))])
            await stream.response()
            stream.send(bytes(size), end=True)
            sink = accept.sinks[0]
            await until(lambda: sink.held >= 300_000)
            assert stream.waiting >= size - sink.held - 1_000_000
            assert not sink.ended.is_set()
            taken = 0
            while taken < size // 2:
                step = sink.held
                sink.take(step)
                taken += step
                await until(lambda: sink.held)
            # Everything that windows and marks allow arrived at times, and no more.
            assert sink.most_held <= 900_000
            sink.greedy = True
            sink.take(sink.held)
            assert await stream.body() == b""
            assert sink.total == size

    run(main())


def test_with_credit_by_stream_a_slow_origin_costs_the_others_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        limits = QuicLimits(stream_window=200_000, connection_window=2_000_000)
        async with linked(
            tmp_path, "aioquic", lambda r, p: (Slow if r.target == b"/slow" else Echo)(r, p), limits=limits
        ) as (_, edge, accept):
            slow = edge.request("/slow", kind="websocket")
            await slow.response()
            slow.send(bytes(1_000_000))
            await until(lambda: accept.sinks[0].held >= 190_000)
            other = edge.request("/post", [("HttpMethod", "POST"), ("HttpHeader:Content-Length", "1500000")])
            await other.response()
            other.send(bytes(1_500_000), end=True)
            assert len(await other.body()) == 1_500_000
            assert accept.sinks[0].held <= 200_000

    run(main())


def test_a_stalled_origin_is_reset_for_the_sake_of_the_others(tmp_path: Path) -> None:
    limits = QuicLimits(
        stream_window=400_000, connection_window=1_000_000, receive_high_water=300_000, receive_low_water=200_000,
        stall_timeout=0.5,
    )  # fmt: skip

    async def main() -> None:
        async with linked(tmp_path, "qh3", Slow, limits=limits) as (link, edge, accept):
            stuck = edge.request("/stuck", kind="websocket")
            await stuck.response()
            stuck.send(bytes(2_000_000))
            sink = accept.sinks[0]
            await until(lambda: link.receive_paused)
            other = edge.request("/other")
            await asyncio.wait_for(sink.ended.wait(), 30)
            assert sink.calls == ["reset"]
            assert "accepted nothing" in str(sink.error)
            await other.response()
            await stuck.until(lambda: stuck.reset is not None and stuck.stopped is not None)
            assert (stuck.reset, stuck.stopped) == (0, 0)

    run(main())


@everywhere
def test_datagrams(tmp_path: Path, engine: str, loop: str) -> None:
    async def main() -> None:
        received: list[bytes] = []
        async with linked(tmp_path, engine, on_datagram=received.append) as (link, edge, _):
            edge.send_datagram(b"hello")
            await until(lambda: received == [b"hello"])
            await until(lambda: link.mtu == (1_452 if engine == "qh3" else 1_232), what="path MTU probing")
            largest = link.datagram_limit
            assert largest >= 1_180
            for size in (0, 1, 1_000, largest):
                assert link.send_datagram(b"d" * size)
                await edge.until(lambda size=size: edge.datagrams and edge.datagrams[-1] == b"d" * size)  # type: ignore[misc]
            # Too large ones are refused, and block nothing.
            dropped = link.datagrams_dropped
            for size in (largest + 1, 2_000, 20_000, 70_000):
                assert not link.send_datagram(b"d" * size)
            assert link.datagrams_dropped == dropped + 4
            assert link.send_datagram(b"after")
            await edge.until(lambda: edge.datagrams[-1] == b"after")
            # The queue has an end.
            results = [link.send_datagram(b"q") for _ in range(40)]
            assert results.count(True) == QuicLimits().datagram_queue
            stream = edge.request("/after")
            await stream.response()

    run_on(loop, main())


@both
def test_a_datagram_hook_that_raises_is_reported(tmp_path: Path, engine: str) -> None:
    async def main() -> None:
        reports: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))

        def bad(data: bytes) -> None:
            raise RuntimeError("hook")

        async with linked(tmp_path, engine, on_datagram=bad) as (_, edge, _accept):
            edge.send_datagram(b"x")
            await until(lambda: reports)
            stream = edge.request("/")
            await stream.response()
        assert str(reports[0]["exception"]) == "hook"

    run(main())


@everywhere
def test_rpc_streams(tmp_path: Path, engine: str, loop: str) -> None:
    async def main() -> None:
        pushed: list[tuple[int, bytes]] = []

        def configure(version: int, config: bytes) -> tuple[int, str]:
            pushed.append((version, config))
            return (version, "") if version < 9 else (8, "no good")

        async with capnp.kj_loop(), linked(tmp_path, engine, on_configuration=configure) as (link, edge, _):
            for version, expected in ((7, (7, "")), (9, (8, "no good"))):
                async with RpcClient(edge) as cloudflared:
                    answer = (await cloudflared.updateConfiguration(version=version, config=b'{"a":1}')).result
                    assert (answer.latestAppliedVersion, str(answer.err)) == expected
                    del answer
            assert pushed == [(7, b'{"a":1}'), (9, b'{"a":1}')]
            async with RpcClient(edge) as cloudflared:
                answer = (
                    await cloudflared.registerUdpSession(
                        sessionId=bytes(16), dstIp=bytes(4), dstPort=53, closeAfterIdleHint=0, traceContext=""
                    )
                ).result
                assert "no UDP sessions" in str(answer.err)
                del answer
                with pytest.raises(capnp.KjException):
                    await cloudflared.unregisterUdpSession(sessionId=bytes(16), message="x")
            await until(lambda: link.open_streams == 1)
            edge.shut()
            await link.wait_closed()

    run_on(loop, main())


@both
def test_rpc_streams_end_after_their_limit_and_on_garbage(tmp_path: Path, engine: str) -> None:
    async def main() -> None:
        async with (
            capnp.kj_loop(),
            linked(tmp_path, engine, on_configuration=lambda version, _: (version, ""), rpc_timeout=0.3) as (
                link,
                edge,
                _,
            ),
        ):
            silent = edge.open(RPC)
            await silent.until(silent.ended.is_set)
            garbage = edge.open(RPC + b"\xff" * 64)
            await garbage.until(garbage.ended.is_set)
            await until(lambda: link.open_streams == 1)
            # A link that goes takes its RPC streams along.
            edge.open(RPC)
            await until(lambda: link.open_streams == 2)
            link.close()
            await link.wait_closed()

    run(main())


@both
def test_rpc_streams_of_this_side(tmp_path: Path, engine: str) -> None:
    async def main() -> None:
        async with linked(tmp_path, engine) as (link, edge, _):
            bridge = link.open_rpc_stream()
            stream = edge.stream(4)
            assert await stream.read(6) == RPC
            bridge.close()
            await stream.until(stream.ended.is_set)
            link.close()
            with pytest.raises(EdgeLostError):
                link.open_rpc_stream()

    run(main())


# --- the end of links ------------------------------------------------------------------------------------------------


@both
def test_the_edge_closes(tmp_path: Path, engine: str) -> None:
    async def main() -> None:
        async with linked(tmp_path, engine) as (link, edge, _):
            edge.shut()
            await link.wait_closed()  # nothing was in flight
        async with linked(tmp_path, engine) as (link, edge, accept):
            stream = edge.request("/ws", kind="websocket")
            await stream.response()
            edge.shut()
            with pytest.raises(EdgeLostError, match="1 request in flight"):
                await link.wait_closed()
            assert accept.sinks[0].calls == ["reset"]
        async with linked(tmp_path, engine) as (link, edge, _):
            edge.shut(5, "go away")
            with pytest.raises(EdgeLostError, match="code 5: go away"):
                await link.wait_closed()

    run(main())


@both
def test_closing_tells_the_edge(tmp_path: Path, engine: str) -> None:
    async def main() -> None:
        async with linked(tmp_path, engine) as (link, edge, accept):
            stream = edge.request("/ws", kind="websocket")
            await stream.response()
            accept.sinks[0].port.write(b"last words")
            link.close()
            await link.wait_closed()
            await edge.wait_gone()
            assert (edge.close_code, edge.close_reason) == (0, "")
            assert bytes(stream.data) == b"last words"
            assert accept.sinks[0].calls == ["reset"]
            link.close()
            link.abort()
            assert not link.send_datagram(b"x")

    run(main())


@both
def test_an_edge_that_is_gone_is_found_out_fast(tmp_path: Path, engine: str) -> None:
    """Its machine answers that nobody listens: well before the idle time-out."""

    async def main() -> None:
        async with MiniQuicEdge(tmp_path) as edge:
            link = await dial_quic(
                "127.0.0.1", edge.port, context=quic_context(edge.cacert), accept=Acceptor(), engine=engine,
                idle_timeout=60,
            )  # fmt: skip
            await edge.accepted()
            edge.vanish()
            with pytest.raises(EdgeLostError, match="reset by the edge"):
                await asyncio.wait_for(link.wait_closed(), 20)

    run(main())


@both
def test_silence_ends_the_link_and_pings_keep_it(tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    idle, pause = 3.0, 0.15
    monkeypatch.setattr(quic, "KEEPALIVE_SECONDS", pause)

    async def main() -> None:
        async with linked(tmp_path, engine, idle_timeout=idle, edge_options={"idle_timeout": idle}) as (link, edge, _):
            # Nobody but us sends anything, so only our pings can keep it for twice the idle time.
            await until(lambda: link._engine._pings >= 2 * idle / pause)  # type: ignore[attr-defined]
            assert link.open_streams == 1
            edge.edge.freeze()
            with pytest.raises(EdgeLostError, match="no sign of life"):
                await asyncio.wait_for(link.wait_closed(), 30)

    run(main())


@everywhere
def test_a_process_that_stood_still_reads_before_it_gives_up(tmp_path: Path, engine: str, loop: str) -> None:
    """The edge spoke while this process did not run: its packets count before the idle time-out does."""
    idle = 1.0

    async def main() -> None:
        async with linked(tmp_path, engine, idle_timeout=idle) as (link, edge, _):
            edge._quic._idle_timeout = lambda: 60.0
            stream = edge.request("/ws", kind="websocket")
            await stream.response()
            here, there = socket.socketpair()
            stopped = asyncio.Event()

            def stand_still() -> None:  # after the sockets were polled and before timers run: the worst place
                asyncio.get_running_loop().remove_reader(here)
                stream.send(b"still here")
                edge.transmit()
                time.sleep(idle + 1.5)
                stopped.set()

            with here, there:
                asyncio.get_running_loop().add_reader(here, stand_still)
                there.send(b"x")
                await stopped.wait()
            assert await stream.read(10) == b"still here"
            assert link.open_streams == 2

    run_on(loop, main())


# --- dialling --------------------------------------------------------------------------------------------------------


async def fails(port: int, cacert: str, engine: str, **options: Any) -> EdgeDialError:
    with pytest.raises(EdgeDialError) as caught:
        await dial_quic("127.0.0.1", port, context=quic_context(cacert), accept=Acceptor(), engine=engine, **options)
    assert caught.value.advice
    return caught.value


@both
def test_dial_failures_say_what_to_do(tmp_path: Path, engine: str) -> None:
    async def main() -> None:
        async with MiniQuicEdge(tmp_path) as edge:
            stranger = tmp_path / "stranger.pem"
            stranger.write_text(Authority("Stranger").pem())
            error = await fails(edge.port, str(stranger), engine)
            assert isinstance(error, EdgeTlsError)
            assert "not trusted" in str(error)
            assert "--cacert" in error.advice
            cacert = edge.cacert
        async with MiniQuicEdge(tmp_path, names=("other.example",)) as edge:
            error = await fails(edge.port, edge.cacert, engine)
            assert isinstance(error, EdgeTlsError)
            assert "quic.cftunnel.com" in str(error)
        async with MiniQuicEdge(tmp_path, alpn="h3") as edge:
            error = await fails(edge.port, edge.cacert, engine)
            assert isinstance(error, EdgeTlsError)
            assert "tunnel protocol" in str(error)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 0))
            port = silent.getsockname()[1]
            error = await fails(port, cacert, engine, handshake_timeout=0.3)
            assert "within 0.3 seconds" in str(error)
            assert "UDP" in error.advice
            error = await fails(port, cacert, engine, idle_timeout=0.3)
            assert "no answer" in str(error)
        error = await fails(port, cacert, engine)
        assert "refuses UDP" in str(error)
        with pytest.raises(EdgeDialError, match="does not resolve"):
            await dial_quic("no.such.host.invalid", 1, context=quic_context(cacert), accept=Acceptor(), engine=engine)
        with pytest.raises(EdgeDialError, match=r"cannot bind 203\.0\.113\.7"):
            await dial_quic(
                "127.0.0.1", 1, context=quic_context(cacert), accept=Acceptor(), engine=engine, local_host="203.0.113.7"
            )

    run(main())


@both
def test_the_local_port_is_kept_if_it_can_be(tmp_path: Path, engine: str) -> None:
    async def main() -> None:
        async with linked(tmp_path, engine) as (link, _, _a):
            port = link.local_address[1]
        async with linked(tmp_path, engine, local_port=port) as (link, _, _a):
            assert link.local_address[1] == port
            async with linked(tmp_path, engine, local_port=port) as (second, _, _b):
                assert second.local_address[1] != port
        async with linked(tmp_path, engine, local_host="127.0.0.1", local_port=port) as (link, _, _a):
            assert link.local_address == ("127.0.0.1", port)

    run(main())


@both
def test_key_log(tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keylog = tmp_path / "keys.txt"
    monkeypatch.setenv("SSLKEYLOGFILE", str(keylog))

    async def main() -> None:
        async with linked(tmp_path, engine):
            assert "CLIENT_TRAFFIC_SECRET_0" in keylog.read_text()
        context = quic_context(None)
        context.keylog = str(tmp_path / "missing" / "keys.txt")
        with pytest.raises(ConfigError, match="SSLKEYLOGFILE"):
            await dial_quic("127.0.0.1", 9, context=context, accept=Acceptor(), engine=engine)

    run(main())


def test_trust_is_the_systems_roots_and_the_edges_or_the_file_alone(tmp_path: Path) -> None:
    everything = quic_context()
    assert everything.cadata.count(b"BEGIN CERTIFICATE") > 3
    file = tmp_path / "ca.pem"
    file.write_text(Authority().pem())
    assert quic_context(str(file)).cadata.count(b"BEGIN CERTIFICATE") == 1
    with pytest.raises(ConfigError, match="--cacert"):
        quic_context(str(tmp_path / "none.pem"))


def test_without_a_usable_qh3_aioquic_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from connector.transport import quic_engine_qh3

    def broken() -> None:
        raise quic_engine.EngineUnavailableError("made up")

    quic_engine.find_engine.cache_clear()
    monkeypatch.setattr(quic_engine_qh3, "self_check", broken)
    try:

        async def main() -> None:
            async with linked(tmp_path, "auto") as (link, edge, _):
                assert link.engine_name == "aioquic"
                stream = edge.request("/")
                await stream.response()

        run(main())
        with pytest.raises(ConfigError, match="made up"):
            quic_engine.find_engine("qh3")
    finally:
        quic_engine.find_engine.cache_clear()


def test_a_refused_request_reaches_the_log_hook(tmp_path: Path) -> None:
    async def main() -> None:
        texts: list[str] = []
        async with linked(tmp_path, "qh3", on_malformed=texts.append) as (_, edge, _a):
            stream = edge.request("ftp://x/")
            error, metadata = await stream.response()
            assert "URL" in error
            assert metadata == []
            assert len(texts) == 1

    run(main())


def test_sinks_that_raise_are_reported(tmp_path: Path) -> None:
    def bad(request: Request, port: StreamPort) -> Any:
        raise RuntimeError("acceptor")

    async def main() -> None:
        reports: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
        async with linked(tmp_path, "qh3", bad) as (_, edge, _a):
            stream = edge.request("/")
            await stream.until(lambda: stream.reset is not None)
        assert str(reports[0]["exception"]) == "acceptor"

    run(main())
