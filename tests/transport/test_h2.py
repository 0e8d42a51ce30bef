"""Links over real TLS: life, flow control, every way to end, every way not to begin."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from connector.errors import EdgeDialError, EdgeLostError, EdgeTlsError, ProtocolError
from connector.protocol.h2_limits import H2Limits
from connector.protocol.ports import Buffer, Request, StreamPort
from connector.transport.h2 import WRITE_HIGH_WATER, H2Link, dial_h2
from connector.transport.link import explain_dial_error, explain_loss, format_address
from connector.transport.tls import edge_context
from tests.support.aio import run, until
from tests.support.mini_edge import MiniEdge, MiniEdgeConnection

Loop = Callable[[], asyncio.AbstractEventLoop] | None
LOOPS = [pytest.param(None, id="asyncio"), pytest.param(uvloop.new_event_loop, id="uvloop")]
both_loops = pytest.mark.parametrize("loop", LOOPS)


class Sink:
    """Records; consumes at once unless told to hold."""

    def __init__(self, port: StreamPort, hold: bool = False) -> None:
        self.port = port
        self.hold = hold
        self.data = bytearray()
        self.eof = False
        self.reset: list[BaseException | None] = []
        self.paused: list[bool] = []

    def on_data(self, data: Buffer) -> None:
        self.data += data
        if not self.hold:
            self.port.consumed(len(data))

    def on_eof(self) -> None:
        self.eof = True

    def on_reset(self, error: BaseException | None) -> None:
        self.reset.append(error)

    def pause_writing(self) -> None:
        self.paused.append(True)

    def resume_writing(self) -> None:
        self.paused.append(False)


class Acceptor:
    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.sinks: list[Sink] = []

    def __call__(self, request: Request, port: StreamPort) -> Sink:
        self.requests.append(request)
        self.sinks.append(Sink(port))
        return self.sinks[-1]


class Setup:
    def __init__(self, edge: MiniEdge, link: H2Link, peer: MiniEdgeConnection, accept: Acceptor) -> None:
        self.edge, self.link, self.peer, self.accept = edge, link, peer, accept

    async def sink(self, number: int = 0) -> Sink:
        await until(lambda: len(self.accept.sinks) > number, what="a request")
        return self.accept.sinks[number]


@asynccontextmanager
async def linked(tmp_path: Path, **options: Any) -> AsyncIterator[Setup]:
    async with MiniEdge(tmp_path) as edge:
        accept = Acceptor()
        link = await dial_h2("127.0.0.1", edge.port, context=edge_context(edge.cacert), accept=accept, **options)
        peer = await edge.accepted()
        try:
            yield Setup(edge, link, peer, accept)
        finally:
            link.abort()
            try:
                await link.wait_closed()
            except (EdgeLostError, ProtocolError):
                pass


def with_link(
    tmp_path: Path, body: Callable[[Setup], Coroutine[Any, Any, None]], loop: Loop = None, **options: Any
) -> None:
    async def main() -> None:
        async with linked(tmp_path, **options) as setup:
            await body(setup)

    run(main(), loop_factory=loop)


@both_loops
def test_request_and_response(tmp_path: Path, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        stream = s.peer.open([(b"accept", b"*/*")])
        sink = await s.sink()
        assert s.accept.requests[0].host == b"app.example.com"
        stream.send(b"question", end=True)
        await until(lambda: sink.eof)
        assert sink.data == b"question"
        sink.port.respond(200, ((b"Content-Type", b"text/plain"),))
        sink.port.write(b"answer")
        sink.port.write_eof()
        async with asyncio.timeout(30):
            await stream.ended.wait()
        assert (stream.status, bytes(stream.data)) == (200, b"answer")
        assert s.link.open_streams == 0
        assert s.link.remote_address == ("127.0.0.1", s.edge.port)
        assert s.link.local_address[0] == "127.0.0.1"
        assert s.link.protocol == "http2"

    with_link(tmp_path, body, loop)


@both_loops
def test_socket_options(tmp_path: Path, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        assert s.link._transport is not None
        sock = s.link._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if sys.platform == "linux":
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15

    with_link(tmp_path, body, loop)


@both_loops
def test_one_write_per_tick(tmp_path: Path, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        s.peer.open([])
        s.peer.open([])
        await s.sink(1)
        await s.peer.ready.wait()
        await until(lambda: not s.link._flush_due and s.peer.h2.local_settings.initial_window_size)
        writes: list[int] = []
        transport = s.link._transport
        assert transport is not None

        class Counting:
            def write(self, data: bytes) -> None:
                writes.append(len(data))
                transport.write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(transport, name)

        s.link._transport = Counting()  # type: ignore[assignment]
        for sink in s.accept.sinks:
            sink.port.respond(200, ())
            for _ in range(100):
                sink.port.write(b"x" * 10)
            sink.port.write_eof()
        await until(lambda: writes)
        s.link._transport = transport
        assert len(writes) == 1

    with_link(tmp_path, body, loop)


@both_loops
def test_a_slow_edge_pauses_the_sinks(tmp_path: Path, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        stream = s.peer.open([])
        s.peer.h2.increment_flow_control_window(64 << 20, stream.stream_id)
        s.peer.h2.increment_flow_control_window(64 << 20)
        s.peer.flush()
        sink = await s.sink()
        await s.peer.ready.wait()
        assert s.peer.transport is not None
        sink.port.respond(200, ())
        s.peer.transport.pause_reading()
        total = 0
        assert s.link._transport is not None
        async with asyncio.timeout(20):
            while not (sink.paused and sink.paused[-1]):
                sink.port.write(b"y" * 50_000)
                total += 50_000
                await asyncio.sleep(0)
        assert total < 64 << 20
        assert s.link._transport.get_write_buffer_size() >= WRITE_HIGH_WATER or s.link._engine.bytes_queued
        s.peer.transport.resume_reading()
        await until(lambda: sink.paused[-1] is False, limit=20)
        sink.port.write_eof()
        async with asyncio.timeout(20):
            await stream.ended.wait()
        assert len(stream.data) == total

    with_link(tmp_path, body, loop)


@both_loops
def test_large_upload_arrives_whole(tmp_path: Path, loop: Loop) -> None:
    payload = bytes(range(256)) * 16_384  # 4 MiB

    async def body(s: Setup) -> None:
        stream = s.peer.open([])
        sink = await s.sink()
        stream.send(payload, end=True)
        await until(lambda: sink.eof, limit=20)
        assert sink.data == payload

    with_link(tmp_path, body, loop)


# --- endings -------------------------------------------------------------------------------------------------------


@both_loops
def test_edge_closes_idle_link(tmp_path: Path, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        s.peer.open_control()
        await s.link.control_stream(5)
        s.peer.close()
        await s.link.wait_closed()
        await s.link.wait_closed()

    with_link(tmp_path, body, loop)


@both_loops
def test_edge_closes_busy_link(tmp_path: Path, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        s.peer.open([])
        sink = await s.sink()
        s.peer.close()
        with pytest.raises(EdgeLostError, match="closed the connection with 1 request in flight"):
            await s.link.wait_closed()
        assert len(sink.reset) == 1
        assert isinstance(sink.reset[0], EdgeLostError)
        with pytest.raises(EdgeLostError):
            await s.link.control_stream(1)

    with_link(tmp_path, body, loop)


@both_loops
def test_edge_resets(tmp_path: Path, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        s.peer.open([])
        await s.sink()
        s.peer.cut()
        with pytest.raises(EdgeLostError, match=r"reset by the edge 127\.0\.0\.1:\d+ with 1 request"):
            await s.link.wait_closed()

    with_link(tmp_path, body, loop)


@both_loops
def test_goaway_then_close_is_clean(tmp_path: Path, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        stream = s.peer.open([], end=True)
        sink = await s.sink()
        s.peer.send_goaway()
        await until(lambda: s.link._engine.goaway_received)
        sink.port.respond(200, ())
        sink.port.write_eof()
        async with asyncio.timeout(30):
            await stream.ended.wait()
        assert stream.status == 200
        s.peer.close()
        await s.link.wait_closed()

    with_link(tmp_path, body, loop)


@both_loops
def test_peer_breaks_http2(tmp_path: Path, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        s.peer.open([])
        sink = await s.sink()
        s.peer.send_raw(b"\0\0\x04\x08\0\0\0\0\0\0\0\0\0")  # WINDOW_UPDATE of 0
        with pytest.raises(ProtocolError, match="WINDOW_UPDATE of 0"):
            await s.link.wait_closed()
        await s.peer.wait_closed()
        assert s.peer.goaway is not None
        assert s.peer.goaway.error_code == 1
        assert len(sink.reset) == 1

    with_link(tmp_path, body, loop)


@both_loops
@pytest.mark.parametrize("how", ["close", "abort"])
def test_ends_from_here(tmp_path: Path, loop: Loop, how: str) -> None:
    async def body(s: Setup) -> None:
        s.peer.open([])
        s.peer.open_control()
        sink = await s.sink()
        bridge = await s.link.control_stream(5)
        getattr(s.link, how)()
        getattr(s.link, how)()
        assert len(sink.reset) == 1
        await s.link.wait_closed()
        await s.peer.wait_closed()
        assert bridge.ended.done()
        s.link.close()
        s.link.abort()
        assert "ended" in repr(s.link)

    with_link(tmp_path, body, loop)


@both_loops
def test_close_sends_what_is_queued(tmp_path: Path, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        stream = s.peer.open([], end=True)
        sink = await s.sink()
        sink.port.respond(200, ())
        sink.port.write(b"z" * 50_000)
        sink.port.write_eof()
        s.link.close()
        await s.peer.wait_closed()
        assert len(stream.data) == 50_000

    with_link(tmp_path, body, loop)


def test_no_preface(tmp_path: Path) -> None:
    async def main() -> None:
        async with MiniEdge(tmp_path, speak=False) as edge:
            link = await dial_h2(
                "127.0.0.1",
                edge.port,
                context=edge_context(edge.cacert),
                accept=Acceptor(),
                limits=H2Limits(preface_timeout=0.05),
            )
            with pytest.raises(ProtocolError, match="no HTTP/2 preface"):
                await link.wait_closed()

    run(main())


def test_no_settings(tmp_path: Path) -> None:
    async def main() -> None:
        async with MiniEdge(tmp_path, speak=False) as edge:
            link = await dial_h2(
                "127.0.0.1",
                edge.port,
                context=edge_context(edge.cacert),
                accept=Acceptor(),
                limits=H2Limits(settings_timeout=0.05),
            )
            (await edge.accepted()).send_raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            with pytest.raises(ProtocolError, match="no SETTINGS"):
                await link.wait_closed()

    run(main())


# --- dialling ------------------------------------------------------------------------------------------------------


async def dial(port: int, context: ssl.SSLContext, host: str = "127.0.0.1", **options: Any) -> H2Link:
    return await dial_h2(host, port, context=context, accept=Acceptor(), **options)


@both_loops
def test_refused(loop: Loop) -> None:
    async def main() -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            with pytest.raises(EdgeDialError, match="refuses connections") as caught:
                await dial(sock.getsockname()[1], edge_context())
        assert not isinstance(caught.value, EdgeTlsError)
        assert caught.value.advice

    run(main(), loop_factory=loop)


@both_loops
def test_unknown_name(loop: Loop) -> None:
    async def main() -> None:
        with pytest.raises(EdgeDialError, match="does not resolve"):
            await dial(7844, edge_context(), host="no-such-host.invalid")
        with pytest.raises(EdgeDialError, match="does not resolve"):
            await dial(7844, edge_context(), host="a" * 70 + ".invalid")

    run(main(), loop_factory=loop, limit=60)


@both_loops
def test_bind_address_that_is_not_ours(tmp_path: Path, loop: Loop) -> None:
    async def main() -> None:
        async with MiniEdge(tmp_path) as edge:
            with pytest.raises(EdgeDialError, match="cannot bind") as caught:
                await dial(edge.port, edge_context(), local_address=("192.0.2.1", 0))
            assert "--edge-bind-address" in caught.value.advice
            link = await dial(edge.port, edge_context(edge.cacert), local_address=("127.0.0.1", 0))
            link.close()
            await link.wait_closed()

    run(main(), loop_factory=loop)


@both_loops
def test_untrusted_certificate_names_its_issuer(tmp_path: Path, loop: Loop) -> None:
    async def main() -> None:
        async with MiniEdge(tmp_path) as edge:
            with pytest.raises(EdgeTlsError, match="not trusted") as caught:
                await dial(edge.port, edge_context())
            assert "CN=Test CA" in str(caught.value)
            assert "h2.cftunnel.com" in str(caught.value)
            assert "--cacert" in caught.value.advice

    run(main(), loop_factory=loop)


@both_loops
def test_wrong_name(tmp_path: Path, loop: Loop) -> None:
    async def main() -> None:
        async with MiniEdge(tmp_path, names=("other.example",)) as edge:
            with pytest.raises(EdgeTlsError, match=r"another name than h2\.cftunnel\.com: other\.example"):
                await dial(edge.port, edge_context(edge.cacert))

    run(main(), loop_factory=loop)


@asynccontextmanager
async def plain_server(act: Callable[[asyncio.StreamWriter], None]) -> AsyncIterator[int]:
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        act(writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.close()
            try:
                await writer.wait_closed()
            except ConnectionError:
                pass
        await server.wait_closed()


@both_loops
def test_peer_that_is_not_tls(loop: Loop) -> None:
    async def main() -> None:
        async with plain_server(lambda w: w.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
            with pytest.raises(EdgeTlsError, match="does not speak TLS"):
                await dial(port, edge_context())

    run(main(), loop_factory=loop)


@both_loops
def test_peer_that_closes_at_once(loop: Loop) -> None:
    async def main() -> None:
        async with plain_server(lambda w: w.close()) as port:
            with pytest.raises(EdgeTlsError, match="closed the connection during the TLS handshake"):
                await dial(port, edge_context())

    run(main(), loop_factory=loop)


@both_loops
def test_peer_that_says_nothing(loop: Loop) -> None:
    async def main() -> None:
        async with plain_server(lambda w: None) as port:
            with pytest.raises(EdgeDialError, match=r"not done within 0.1 seconds"):
                await dial(port, edge_context(), handshake_timeout=0.1)

    run(main(), loop_factory=loop)


@both_loops
def test_connect_time_out(loop: Loop) -> None:
    async def main() -> None:
        # A listener whose queue is full drops SYNs: no answer, as from a silent firewall.
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            port = full.getsockname()[1]
            fillers = [socket.socket() for _ in range(4)]
            try:
                for filler in fillers:
                    filler.setblocking(False)
                    filler.connect_ex(("127.0.0.1", port))
                with pytest.raises(EdgeDialError, match=r"no answer from .* within 0\.2 seconds"):
                    await dial(port, edge_context(), connect_timeout=0.2)
            finally:
                for filler in fillers:
                    filler.close()

    run(main(), loop_factory=loop)


@both_loops
def test_cancelled_dial_leaves_nothing(loop: Loop) -> None:
    async def main() -> None:
        connected = asyncio.Event()
        async with plain_server(lambda w: connected.set()) as port:
            task = asyncio.create_task(dial(port, edge_context()))
            await connected.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main(), loop_factory=loop)


@both_loops
def test_a_check_of_a_link_that_works_leaves_it_alone(tmp_path: Path, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        s.peer.open_control()
        await s.link.control_stream(5)
        for _ in range(2):
            s.link.check()
            s.link.check()  # one at a time
            await until(lambda: s.link._check is None, what="the edge answered the PING")
        s.peer.close()
        await s.link.wait_closed()

    with_link(tmp_path, body, loop)


@both_loops
def test_a_check_ends_a_link_whose_edge_is_gone(tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connector.transport.h2.CHECK_SECONDS", 0.2)

    async def body(s: Setup) -> None:
        s.peer.open_control()
        await s.link.control_stream(5)
        s.link.check()
        await until(lambda: s.link._check is None, what="an answer: nothing is on its way any more")
        s.peer.transport.pause_reading()
        s.link.check()
        with pytest.raises(EdgeLostError, match="no sign of life") as caught:
            await s.link.wait_closed()
        assert not caught.value.by_edge
        s.link.check()  # of an ended link: nothing

    with_link(tmp_path, body, loop)


@both_loops
def test_goaway_is_told_once(tmp_path: Path, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        s.peer.open_control()
        await s.link.control_stream(5)
        told: list[None] = []
        s.link.on_goaway = lambda: told.append(None)
        s.peer.send_goaway()
        await until(lambda: told, what="the link told of GOAWAY")
        s.link.check()
        await until(lambda: s.link._check is None)
        assert told == [None]

    with_link(tmp_path, body, loop)


# --- words ---------------------------------------------------------------------------------------------------------


def test_words_for_losses() -> None:
    assert explain_loss(None, "e", 0) is None
    for error, text in (
        (None, "closed the connection with 2 requests in flight"),
        (ConnectionResetError(), "reset by the edge"),
        (BrokenPipeError(), "reset by the edge"),
        (TimeoutError(errno.ETIMEDOUT, "timed out"), "no sign of life"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "became unreachable"),
        (ssl.SSLError(1, "bad record mac"), "broke"),
    ):
        assert text in str(explain_loss(error, "e", 2))


def test_words_for_dialling() -> None:
    for number, text in (
        (errno.ENETUNREACH, "unreachable"),
        (errno.ETIMEDOUT, "no answer"),
        (errno.EPERM, "cannot connect"),
    ):
        assert text in str(explain_dial_error(OSError(number, "text"), "e"))
    assert format_address("::1", 1) == "[::1]:1"
    assert format_address("h", 1) == "h:1"


def test_interpreter_ends_clean_in_the_middle(tmp_path: Path) -> None:
    """A process that ends with a registration under way prints nothing and does not crash."""
    script = Path(__file__).parent / "ends_in_the_middle.py"
    for loop in ("asyncio", "uvloop"):
        done = subprocess.run(
            [sys.executable, "-X", "dev", str(script), str(tmp_path), loop],
            capture_output=True,
            timeout=60,
            check=False,
            cwd=Path(__file__).parents[2],
        )
        assert (done.returncode, done.stdout) == (0, b"registering\n"), done.stderr.decode()
        assert b"Traceback" not in done.stderr
