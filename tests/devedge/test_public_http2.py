"""HTTP/2 visitors, WebSockets of both kinds, and pressure in both directions."""

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from connector.devedge import quicsession
from connector.devedge.h2session import QUEUE_HIGH, STREAM_WINDOW, H2Session, RawHeaders
from connector.devedge.headers import websocket_accept
from connector.devedge.server import DevEdge
from tests.devedge.edges import cancelled, edge_and_connector, get, read_head, run_edge, visit, visitor_tls
from tests.devedge.fake_connector import FakeStream
from tests.support.aio import until

KEY = base64.b64encode(b"0123456789abcdef")


class Reply:
    """One response as an HTTP/2 visitor sees it."""

    def __init__(self) -> None:
        self.fields: dict[bytes, bytes] = {}
        self.body = bytearray()
        self.trailers: RawHeaders = ()
        self.head = asyncio.Event()
        self.done = asyncio.Event()
        self.error: BaseException | None = None
        self.stream: Any = None
        self.hold = False
        self.received = 0

    def on_headers(self, headers: RawHeaders) -> None:
        self.fields = dict(headers)
        self.head.set()

    def on_data(self, data: bytes) -> None:
        self.received += len(data)
        if self.hold:
            return
        self.body += data
        self.stream.consumed(len(data))

    def on_eof(self, trailers: RawHeaders) -> None:
        self.trailers = trailers
        self.done.set()

    def on_reset(self, error: BaseException | None) -> None:
        self.error = error
        self.done.set()

    def pause_writing(self) -> None:
        pass

    def resume_writing(self) -> None:
        pass


class Visitor2(H2Session):
    """An HTTP/2 client; by h2, as the edge itself."""

    def __init__(self) -> None:
        super().__init__(client=True)
        self.lost = asyncio.Event()

    def on_lost(self, error: BaseException | None) -> None:
        self.lost.set()

    def request(
        self, *headers: tuple[bytes, bytes], method: bytes = b"GET", path: bytes = b"/", end: bool = True
    ) -> Reply:
        reply = Reply()
        pseudo = [(b":method", method), (b":scheme", b"https"), (b":authority", b"localhost"), (b":path", path)]
        reply.stream = self.open_stream([*pseudo, *headers], reply, end_stream=end)
        return reply

    @classmethod
    async def connect(cls, edge: DevEdge) -> "Visitor2":
        host, port = edge.public_address
        _, protocol = await asyncio.get_running_loop().create_connection(
            cls, host, port, ssl=visitor_tls(edge, "h2"), server_hostname="localhost"
        )
        return protocol

    async def __aenter__(self) -> "Visitor2":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        async with asyncio.timeout(30):
            await self.lost.wait()


async def wait(event: asyncio.Event) -> None:
    async with asyncio.timeout(30):
        await event.wait()


def echo(request: FakeStream) -> None:
    request.echo = True
    if b"sec-websocket-key" in request.fields:
        request.accept_websocket((b"Sec-WebSocket-Protocol", b"mqtt"))
    else:
        request.respond(200)
    original = request.on_eof

    def on_eof(trailers: RawHeaders) -> None:
        original(trailers)
        request.stream.write_eof([(b"x-sum", b"1")])

    request.on_eof = on_eof  # type: ignore[method-assign]


def test_many_requests_at_once(tmp_path: Path, protocol: str) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path, echo) as (edge, connector, _), await Visitor2.connect(edge) as visitor:
            replies = [
                visitor.request(
                    (b"cookie", b"a=1"), (b"cookie", b"b=2"), (b"te", b"trailers"), method=b"POST", end=False
                )
                for _ in range(50)
            ]
            for i, reply in enumerate(replies):
                reply.stream.write(b"%d" % i * 1000)
                reply.stream.write_eof()
            for i, reply in enumerate(replies):
                await wait(reply.done)
                assert reply.error is None
                assert reply.fields[b":status"] == b"200"
                assert reply.body == b"%d" % i * 1000
                assert dict(reply.trailers) == ({} if protocol == "quic" else {b"x-sum": b"1"})
            fields = connector.requests[0].fields
            assert fields[b"cookie"] == b"a=1; b=2"
            assert fields[b"te"] == b"trailers"

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_a_visitor_that_resets_cancels_the_request(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            edge_and_connector(tmp_path, lambda request: None) as (edge, connector, recorder),
            await Visitor2.connect(edge) as visitor,
        ):
            reply = visitor.request()
            await until(lambda: connector.requests)
            reply.stream.reset()
            assert cancelled(await connector.requests[0].reset)
            await until(lambda: recorder.named("stream_closed"))

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_a_reset_in_the_middle_is_passed_on(tmp_path: Path) -> None:
    def handler(request: FakeStream) -> None:
        request.respond(200, [(b"Content-Length", b"100")])
        request.stream.write(b"part")
        asyncio.get_running_loop().call_later(0.05, request.stream.reset)

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, _, _), await Visitor2.connect(edge) as visitor:
            reply = visitor.request()
            await wait(reply.done)
            assert reply.body == b"part"
            assert "INTERNAL_ERROR" in str(reply.error)

    run_edge(main())


def test_plain_connect_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path) as (edge, _, _), await Visitor2.connect(edge) as visitor:
            reply = Reply()
            reply.stream = visitor.open_stream([(b":method", b"CONNECT"), (b":authority", b"a:1")], reply)
            await wait(reply.head)
            assert reply.fields[b":status"] == b"501"

    run_edge(main())


def websocket_request(*more: str) -> bytes:
    lines = [
        "GET /ws HTTP/1.1",
        "Host: localhost",
        "Connection: keep-alive, Upgrade",
        "Upgrade: websocket",
        f"Sec-WebSocket-Key: {KEY.decode()}",
        "Sec-WebSocket-Version: 13",
        *more,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@pytest.mark.usefixtures("protocol")
def test_a_websocket_over_http1(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path, echo) as (edge, connector, recorder):
            async with visit(edge) as (reader, writer):
                writer.write(websocket_request("Sec-WebSocket-Protocol: mqtt") + b"early bytes")
                status, headers = await read_head(reader)
                assert status == 101
                assert headers["upgrade"] == "websocket"
                assert headers["connection"] == "Upgrade"
                assert headers["sec-websocket-accept"] == websocket_accept(KEY).decode()
                assert headers["sec-websocket-protocol"] == "mqtt"
                assert await reader.readexactly(11) == b"early bytes"
                writer.write(b"\x82\x00raw")
                assert await reader.readexactly(5) == b"\x82\x00raw"
                fields = connector.requests[0].fields
                assert fields[b"cf-cloudflared-proxy-connection-upgrade"] == b"websocket"
                assert fields[b"sec-websocket-key"] == KEY
                assert fields[b"sec-websocket-protocol"] == b"mqtt"
                assert not {b"connection", b"upgrade", b"sec-websocket-version"} & set(fields)
                writer.close()
                await wait(connector.requests[0].eof)  # a close is the end of the request, not a reset
            await until(lambda: recorder.named("stream_closed"))
            assert recorder.named("request")[0]["kind"] == "websocket"
            assert recorder.named("response")[0]["status"] == 101
            assert (recorder.named("stream_closed")[0]["bytes_up"]) == 16

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_the_origin_ends_a_websocket(tmp_path: Path) -> None:
    def handler(request: FakeStream) -> None:
        request.accept_websocket()
        request.stream.write(b"bye")
        request.stream.write_eof()

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, connector, recorder):
            async with visit(edge) as (reader, writer):
                writer.write(websocket_request())
                assert (await read_head(reader))[0] == 101
                assert await reader.read() == b"bye"
            await wait(connector.requests[0].eof)
            await until(lambda: recorder.named("stream_closed"))

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_a_refused_websocket_leaves_the_connection_usable(tmp_path: Path) -> None:
    def handler(request: FakeStream) -> None:
        request.respond(403, [(b"Content-Length", b"2")])
        request.stream.write(b"no")
        request.stream.write_eof()

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, connector, _), visit(edge) as (reader, writer):
            for _ in range(2):
                writer.write(websocket_request())
                assert (await read_head(reader))[0] == 403
                assert await reader.readexactly(2) == b"no"
            await wait(connector.requests[1].eof)

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_a_websocket_over_http2(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path, echo) as (edge, connector, _), await Visitor2.connect(edge) as visitor:
            reply = visitor.request(
                (b":protocol", b"websocket"),
                (b"sec-websocket-version", b"13"),
                (b"sec-websocket-protocol", b"mqtt"),
                method=b"CONNECT",
                end=False,
            )
            await wait(reply.head)
            assert reply.fields[b":status"] == b"200"
            assert reply.fields[b"sec-websocket-protocol"] == b"mqtt"
            assert b"sec-websocket-accept" not in reply.fields
            assert b"upgrade" not in reply.fields
            reply.stream.write(b"raw")
            await until(lambda: reply.body == b"raw")
            assert connector.requests[0].fields[b":method"] == b"GET"
            assert len(base64.b64decode(connector.requests[0].fields[b"sec-websocket-key"])) == 16
            reply.stream.write_eof()  # half-close: the other side still speaks
            await wait(connector.requests[0].eof)
            await wait(reply.done)
            assert reply.error is None

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_a_wrong_accept_is_not_passed_to_http2(tmp_path: Path) -> None:
    def handler(request: FakeStream) -> None:
        request.respond(request.switched, [(b"Sec-WebSocket-Accept", b"nonsense"), (b"Upgrade", b"websocket")])

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, _, _), await Visitor2.connect(edge) as visitor:
            reply = visitor.request((b":protocol", b"websocket"), method=b"CONNECT", end=False)
            await wait(reply.head)
            assert reply.fields[b":status"] == b"502"

    run_edge(main())


@pytest.mark.parametrize("kind", ["http1", "http2"])
def test_a_visitor_that_does_not_read_stops_the_connector(tmp_path: Path, kind: str, protocol: str) -> None:
    total = (24 if protocol == "quic" else 64) * 1024 * 1024  # both ends in pure Python: 0.1 s a MiB
    sent = 0

    def handler(request: FakeStream) -> None:
        nonlocal sent
        if request.path == "/other":
            request.respond(200, end=True)
            return
        request.respond(200, [(b"Content-Length", str(total).encode())])

        def pump() -> None:
            nonlocal sent
            while sent < total and not request.paused:
                request.stream.write(bytes(65536))
                sent += 65536
            if sent == total:
                request.stream.write_eof()

        request.on_resume = pump
        pump()

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, connector, _):
            if kind == "http1":
                async with visit(edge) as (reader, writer):
                    writer.transport.pause_reading()
                    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    await stalled(lambda: sent)
                    assert (await get(edge, "/other"))[0] == 200  # others are not held up
                    writer.transport.resume_reading()
                    assert (await read_head(reader))[0] == 200
                    left = total
                    while left:
                        left -= len(await reader.read(1 << 18))
            else:
                async with await Visitor2.connect(edge) as visitor:
                    reply = visitor.request()
                    reply.hold = True
                    await stalled(lambda: sent)
                    assert (await get(edge, "/other"))[0] == 200
                    reply.hold = False
                    reply.stream.consumed(reply.received)
                    await wait(reply.done)
                    assert reply.received == total
            assert connector.requests

    async def stalled(count: Callable[[], int]) -> None:
        """Wait until nothing moves; what is on its way must be bounded."""
        await until(lambda: count() > 0)
        before = -1
        while before != count():
            before = count()
            await asyncio.sleep(0.3)
        assert count() < 16 * 1024 * 1024  # socket buffers included, of both TLS connections

    run_edge(main(), limit=110)


@pytest.mark.parametrize("kind", ["http1", "http2"])
def test_an_origin_that_does_not_read_stops_the_visitor(tmp_path: Path, kind: str, protocol: str) -> None:
    total = (8 if protocol == "quic" else 32) * 1024 * 1024
    window = quicsession.STREAM_WINDOW if protocol == "quic" else STREAM_WINDOW
    least = window - 4096 if protocol == "quic" else window  # less what opened the stream

    def handler(request: FakeStream) -> None:
        request.hold = True
        request.keep_body = False

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, connector, _):
            if kind == "http1":
                async with visit(edge) as (reader, writer):
                    writer.write(f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {total}\r\n\r\n".encode())
                    writer.write(bytes(total))
                    await until(lambda: connector.requests and connector.requests[0].received >= least)
                    assert connector.requests[0].received <= window
                    await finish(connector.requests[0])
                    assert (await read_head(reader))[0] == 200
            else:
                async with await Visitor2.connect(edge) as visitor:
                    reply = visitor.request(method=b"POST", end=False)
                    reply.stream.write(bytes(total))
                    reply.stream.write_eof()
                    await until(lambda: connector.requests and connector.requests[0].received >= least)
                    assert connector.requests[0].received <= window
                    assert reply.stream.pending > total - 2 * QUEUE_HIGH - 3 * window
                    await finish(connector.requests[0])
                    await wait(reply.done)
                    assert reply.fields[b":status"] == b"200"

    async def finish(request: FakeStream) -> None:
        request.release()
        async with asyncio.timeout(20):
            await request.eof.wait()
        assert request.received == total
        request.respond(200, end=True)

    run_edge(main(), limit=110)


@pytest.mark.usefixtures("protocol")
def test_five_hundred_websockets(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path, echo) as (edge, _, recorder), await Visitor2.connect(edge) as visitor:
            replies = [
                visitor.request((b":protocol", b"websocket"), method=b"CONNECT", path=b"/%d" % i, end=False)
                for i in range(500)
            ]
            tasks = len(asyncio.all_tasks())
            for i, reply in enumerate(replies):
                await wait(reply.head)
                assert reply.fields[b":status"] == b"200"
                reply.stream.write(b"hello %d" % i)
            assert len(asyncio.all_tasks()) <= tasks
            for i, reply in enumerate(replies):
                await until(lambda reply=reply, i=i: reply.body == b"hello %d" % i)  # type: ignore[misc]
                reply.stream.write_eof()
            for reply in replies:
                await wait(reply.done)
            await until(lambda: len(recorder.named("stream_closed")) == 500)

    run_edge(main(), limit=110)
