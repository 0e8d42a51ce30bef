"""HTTP/1.1 visitors: what reaches the connector, what comes back."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.devedge.edges import cancelled, edge_and_connector, get, read_head, run_edge, running_edge, visit
from tests.devedge.fake_connector import FakeStream
from tests.support.aio import until


def answer(body: bytes = b"ok", *headers: tuple[bytes, bytes], status: int = 200) -> Callable[[FakeStream], None]:
    def respond(request: FakeStream) -> None:
        request.respond(status, [(b"Content-Length", str(len(body)).encode()), *headers])
        request.stream.write(body)
        request.stream.write_eof()

    return respond


@pytest.mark.usefixtures("protocol")
def test_a_get_carries_the_headers_of_an_edge(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path, answer(b"hello", (b"X-Two", b"a"), (b"X-Two", b"b"))) as (
            edge,
            connector,
            recorder,
        ):
            head = (
                "User-Agent: t\r\nCf-Ray: spoofed\r\nCf-Connecting-Ip: 6.6.6.6\r\nX-Forwarded-For: 1.2.3.4\r\n"
                "X-Forwarded-Proto: http\r\nCf-Access-Jump-Destination: h:1\r\nKeep-Alive: 5\r\nX-Hop: 1\r\n"
                "Cf-Cloudflared-Proxy-Src: x\r\nCookie: a=1\r\n"
            )
            status, headers, body = await get(edge, "/hi?secret=1", head=head)
            assert (status, body, headers["x-two"]) == (200, b"hello", "b")
            [request] = connector.requests
            fields = request.fields
            assert fields[b":method"] == b"GET"
            assert fields[b":path"] == b"/hi?secret=1"
            assert fields[b":authority"] == b"localhost"
            assert fields[b":scheme"] == b"https"
            assert fields[b"cf-connecting-ip"] == b"127.0.0.1"
            assert fields[b"x-forwarded-for"] == b"1.2.3.4, 127.0.0.1"
            assert fields[b"x-forwarded-proto"] == b"https"
            assert fields[b"cf-visitor"] == b'{"scheme":"https"}'
            assert fields[b"cdn-loop"].startswith(b"cloudflare")
            assert fields[b"cf-access-jump-destination"] == b"h:1"
            assert fields[b"cookie"] == b"a=1"
            ray = fields[b"cf-ray"].decode()
            assert len(ray) == 20
            assert ray.endswith("-DEV")
            assert headers["cf-ray"] == ray
            assert not {b"host", b"connection", b"keep-alive", b"cf-cloudflared-proxy-src"} & set(fields)
            assert not any(b"upgrade" in name for name in fields)
            assert "secret" not in str(recorder.events)
            await until(lambda: recorder.named("stream_closed"))
            [closed] = recorder.named("stream_closed")
            assert (closed["ray"], closed["bytes_down"]) == (ray, 5)

    run_edge(main())


def test_one_connection_serves_many_requests_and_bodies(tmp_path: Path, protocol: str) -> None:
    def handler(request: FakeStream) -> None:
        async def later() -> None:
            await request.eof.wait()
            answer(bytes(request.body).upper())(request)

        tasks.append(asyncio.get_running_loop().create_task(later()))

    tasks: list[asyncio.Task[None]] = []

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, connector, _), visit(edge) as (reader, writer):
            writer.write(b"POST /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc")
            assert (await read_head(reader))[0] == 200
            assert await reader.readexactly(3) == b"ABC"
            writer.write(b"POST /b HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            writer.write(b"2\r\nde\r\n1\r\nf\r\n0\r\n\r\n")
            assert (await read_head(reader))[0] == 200
            assert await reader.readexactly(3) == b"DEF"
            # Pipelined: the answers come in order.
            writer.write(b"".join(b"GET /%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % i for i in range(5)))
            for _ in range(5):
                assert (await read_head(reader))[1]["content-length"] == "0"
            assert [request.path for request in connector.requests] == ["/a", "/b", "/0", "/1", "/2", "/3", "/4"]
            assert connector.requests[0].fields[b"content-length"] == b"3"
            assert b"content-length" not in connector.requests[1].fields
            expected = b"chunked" if protocol == "quic" else None  # HTTP/2 has a word of its own for that
            assert connector.requests[1].fields.get(b"transfer-encoding") == expected
            await asyncio.gather(*tasks)

    run_edge(main())


def test_a_body_of_unknown_length_is_chunked_and_may_have_trailers(tmp_path: Path) -> None:
    def handler(request: FakeStream) -> None:
        request.respond(200, [(b"Transfer-Encoding", b"chunked"), (b"Connection", b"close, X-Hop"), (b"X-Hop", b"1")])
        request.stream.write(b"abc")
        request.stream.write_eof([(b"x-sum", b"7")])

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, _, _), visit(edge) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            status, headers = await read_head(reader)
            assert (status, headers["transfer-encoding"]) == (200, "chunked")
            assert "connection" not in headers
            assert "x-hop" not in headers
            assert await reader.readuntil(b"0\r\n") == b"3\r\nabc\r\n0\r\n"
            assert await reader.readuntil(b"\r\n\r\n") == b"x-sum: 7\r\n\r\n"

    run_edge(main())


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
@pytest.mark.usefixtures("protocol")
def test_responses_without_body(tmp_path: Path, method: str, status: int) -> None:
    def handler(request: FakeStream) -> None:
        headers = [(b"Content-Length", b"10")] if status != 204 else []
        request.respond(status, headers, end=True)

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, _, _), visit(edge) as (reader, writer):
            for _ in range(2):
                writer.write(f"{method} / HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert (await read_head(reader))[0] == status

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_expect_is_answered_by_the_edge(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path, answer()) as (edge, connector, _), visit(edge) as (reader, writer):
            writer.write(b"PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
            assert (await read_head(reader))[0] == 100
            writer.write(b"hi")
            assert (await read_head(reader))[0] == 200
            assert b"expect" not in connector.requests[0].fields

    run_edge(main())


@pytest.mark.parametrize("after_head", [False, True])
@pytest.mark.usefixtures("protocol")
def test_a_reset_by_the_connector(tmp_path: Path, after_head: bool) -> None:
    def handler(request: FakeStream) -> None:
        if after_head:
            request.respond(200, [(b"Content-Length", b"100")])
            request.stream.write(b"part")
            asyncio.get_running_loop().call_soon(lambda: asyncio.get_running_loop().call_soon(request.stream.reset))
        else:
            request.stream.reset()

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, _, _), visit(edge) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            status, headers = await read_head(reader)
            if after_head:
                assert (status, headers["content-length"]) == (200, "100")
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await reader.readexactly(100)
            else:
                assert status == 502
                assert b"hop: dev edge to connector" in await reader.readexactly(int(headers["content-length"]))

    run_edge(main())


@pytest.mark.parametrize(
    ("meta", "text"),
    [
        (b'{"src":"cloudflared"}', b"hop: connector to origin"),
        (b'{"src":"cloudflared","flow_rate_limited":true}', b"limit of flows"),
    ],
)
def test_a_failure_of_the_connector_is_a_page(tmp_path: Path, meta: bytes, text: bytes) -> None:
    def handler(request: FakeStream) -> None:
        head = [(b":status", b"502"), (b"cf-cloudflared-response-meta", meta)]
        request.stream.send_headers(head, end_stream=True)

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, _, _):
            status, headers, body = await get(edge)
            assert (status, headers["content-type"]) == (502, "text/plain; charset=utf-8")
            assert text in body

    run_edge(main())


@pytest.mark.parametrize(
    "head",
    [
        [(b":status", b"200"), (b"cf-cloudflared-response-headers", b"%%%")],
        [(b":status", b"77")],
        [(b":status", b"200"), (b"cf-cloudflared-response-headers", b"Q29udGVudC1MZW5ndGg:eHg")],
    ],
)
def test_a_response_that_makes_no_sense_is_a_502_or_an_abort(tmp_path: Path, head: list[tuple[bytes, bytes]]) -> None:
    def handler(request: FakeStream) -> None:
        request.stream.send_headers(head, end_stream=True)

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, _, recorder), visit(edge) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            try:
                assert (await read_head(reader))[0] == 502
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            await until(lambda: recorder.named("stream_closed"))

    run_edge(main())


def test_pages_of_the_edge_say_what_to_do(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_edge(tmp_path) as (edge, recorder):
            status, _, body = await get(edge)
            assert status == 530
            assert b"1033" in body
            assert b"connector edge token demo" in body
            status, _, body = await get(edge, host="other.test")
            assert status == 530
            assert b"1016" in body
            assert b"other.test" in body
            async with visit(edge) as (reader, writer):  # and the connection goes on
                for _ in range(2):
                    writer.write(b"GET / HTTP/1.1\r\nHost: DEMO.localhost:1\r\n\r\n")
                    status, headers = await read_head(reader)
                    await reader.readexactly(int(headers["content-length"]))
            assert len(recorder.named("stream_closed")) == 4

    run_edge(main())


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000 + b"\r\n\r\n", 431),
        (
            b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 8\r\n\r\n",
            426,
        ),
    ],
)
def test_bad_requests_are_refused(tmp_path: Path, request_bytes: bytes, status: int) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path) as (edge, connector, _), visit(edge) as (reader, writer):
            writer.write(request_bytes)
            assert (await read_head(reader))[0] == status
            assert not connector.requests

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_a_visitor_that_leaves_cancels_the_request(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path, lambda request: None) as (edge, connector, _):
            async with visit(edge) as (_, writer):
                writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                await until(lambda: connector.requests)
            error = await connector.requests[0].reset
            assert cancelled(error)

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_an_early_answer_reaches_a_visitor_that_still_sends(tmp_path: Path) -> None:
    def handler(request: FakeStream) -> None:
        request.hold = True
        answer(b"too large", status=413)(request)

    async def main() -> None:
        async with edge_and_connector(tmp_path, handler) as (edge, connector, _), visit(edge) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000\r\n\r\n" + b"x" * 100_000)
            assert (await read_head(reader))[0] == 413
            assert await reader.readexactly(9) == b"too large"
            async with asyncio.timeout(30):
                await connector.requests[0].reset

    run_edge(main())


@pytest.mark.usefixtures("protocol")
def test_the_loss_of_a_link_is_a_page_or_a_cut(tmp_path: Path) -> None:
    async def main() -> None:
        async with edge_and_connector(tmp_path, lambda request: None) as (edge, connector, recorder):
            running = asyncio.create_task(get(edge))
            await until(lambda: connector.requests)
            connector.abort()
            status, _, body = await running
            assert (status, b"hop: dev edge to connector" in body) == (502, True)
            await until(lambda: recorder.named("disconnected"))

    run_edge(main())
