"""What only QUIC carries, between real cloudflared and a dev edge in this process: datagrams, private TCP, retries.

Run with `CLOUDFLARED=/path/to/cloudflared pytest tests/conformance`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import struct
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import capnp
import pytest

from connector.devedge import quictls
from connector.devedge.quiclink import QuicLink
from connector.devedge.quicrpc import register_udp_session, unregister_udp_session
from connector.devedge.server import DevEdge, Settings
from connector.devedge.streams import RawHeaders
from tests.devedge.edges import Recorder, get
from tests.support.aio import run, until
from tests.support.processes import Child

CLOUDFLARED = os.environ.get("CLOUDFLARED", "")
pytestmark = pytest.mark.skipif(
    not CLOUDFLARED, reason="NO CLOUDFLARED BINARY: the dev edge is not compared with the real thing (set CLOUDFLARED)"
)

SESSION = uuid.UUID("0a1b2c3d-4e5f-4061-8273-8495a6b7c8d9")
LOCALHOST = ipaddress.ip_address("127.0.0.1").packed


@contextlib.asynccontextmanager
async def attached(state: Path, *flags: str) -> AsyncIterator[tuple[DevEdge, QuicLink, Recorder]]:
    """A dev edge, and cloudflared registered with it over QUIC."""
    recorder = Recorder()
    settings = Settings(state, tunnel_names=["test"], ingress=["http_status:418"])
    async with capnp.kj_loop(), DevEdge(settings, recorder.log) as edge:
        token = state / "token"
        token.write_text(edge.token())
        host, port = edge.edge_address
        command = (
            *(CLOUDFLARED, "tunnel", "--no-autoupdate", "--edge", f"{host}:{port}", "--cacert", edge.ca_file),
            *("--protocol", "quic", "--no-prechecks", "--metrics", "127.0.0.1:0"),
            *("run", *flags, "--token-file", token),
        )
        with Child(*command) as child:
            try:
                await until(lambda: recorder.named("configuration"), limit=20)
            except AssertionError:
                raise AssertionError(child.text) from None
            [link] = edge.roster.links
            assert isinstance(link, QuicLink)
            yield edge, link, recorder
            await asyncio.get_running_loop().run_in_executor(None, child.__exit__, None, None, None)


class UdpEcho(asyncio.DatagramProtocol):
    """An origin that answers in capitals."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.DatagramTransport)
        self.transport = transport

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        self.transport.sendto(data.upper(), address)


@contextlib.asynccontextmanager
async def udp_origin() -> AsyncIterator[int]:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(UdpEcho, local_addr=("127.0.0.1", 0))
    try:
        yield transport.get_extra_info("sockname")[1]
    finally:
        transport.close()


async def answered(link: QuicLink, datagram: bytes, answer: bytes) -> None:
    """Send a datagram until its answer comes: some are lost, large ones before cloudflared has found the path's MTU."""
    came = asyncio.Event()

    def look(data: bytes) -> None:
        if data == answer:
            came.set()

    link.datagram_listeners.append(look)
    try:
        async with asyncio.timeout(20):
            while not came.is_set():
                assert link.send_datagram(datagram)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await came.wait()
    finally:
        link.datagram_listeners.remove(look)


def test_udp_sessions_of_version_2(tmp_path: Path) -> None:
    async def main() -> None:
        async with attached(tmp_path) as (_, link, recorder), udp_origin() as port:
            assert await register_udp_session(link, SESSION, LOCALHOST, port) == ""
            for payload in (b"hello", b"", b"x" * 1280):
                await answered(link, payload + SESSION.bytes + b"\0", payload.upper() + SESSION.bytes + b"\0")
            await unregister_udp_session(link, SESSION, "enough")
            # A session that the connector ends is told over a stream of the connector's.
            other = uuid.uuid4()
            assert await register_udp_session(link, other, LOCALHOST, port, 1_000_000_000) == ""
            await until(lambda: recorder.named("udp_session_ended"))
            [event] = recorder.named("udp_session_ended")
            assert (event["session"], "idle" in event["message"]) == (other.hex, True)
            await unregister_udp_session(link, other, "gone already")  # no error, though nothing is there
            await until(lambda: recorder.named("datagrams"))
            assert recorder.named("datagrams")[-1]["connection"] == str(link.connection)

    run(main())


def test_udp_sessions_of_version_3(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            attached(tmp_path, "--features", "support_datagram_v3_2") as (_, link, recorder),
            udp_origin() as port,
        ):
            assert "support_datagram_v3_2" in recorder.named("registered")[0]["features"]
            seen: list[bytes] = []
            link.datagram_listeners.append(seen.append)
            identity = SESSION.bytes
            assert link.send_datagram(struct.pack("!BBHH", 0, 0, port, 210) + identity + LOCALHOST)
            await until(lambda: b"\x03\x00" + identity + b"\0\0" in seen)
            for payload in (b"hello", b"y" * 1100):  # more, and cloudflared may end the session before it knows the MTU
                await answered(link, b"\1" + identity + payload, b"\1" + identity + payload.upper())

    run(main())


class TcpStream:
    """Collects what a private TCP stream brings."""

    def __init__(self) -> None:
        self.head: RawHeaders = ()
        self.data = bytearray()
        self.ended = asyncio.Event()

    def on_headers(self, headers: RawHeaders) -> None:
        self.head = headers

    def on_data(self, data: bytes) -> None:
        self.data += data

    def on_eof(self, trailers: RawHeaders) -> None:
        self.ended.set()

    def on_reset(self, error: BaseException | None) -> None:
        self.ended.set()

    def pause_writing(self) -> None:
        pass

    def resume_writing(self) -> None:
        pass


def test_private_tcp(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readexactly(5)).upper())
        writer.close()
        await writer.wait_closed()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server, attached(tmp_path) as (_, link, _):
            port = server.sockets[0].getsockname()[1]
            handler = TcpStream()
            stream = link.open_tcp(f"127.0.0.1:{port}", handler)
            stream.write(b"hello")
            async with asyncio.timeout(10):
                await handler.ended.wait()
            assert (handler.head[0], bytes(handler.data)) == ((b"", b""), b"HELLO")
            stream.write_eof()
            refused = TcpStream()
            link.open_tcp("127.0.0.1:1", refused).write(b"hello")
            async with asyncio.timeout(10):
                await refused.ended.wait()
            assert b"unable to dial tcp" in refused.head[0][1]

    run(main())


@pytest.mark.parametrize(
    ("groups", "flags"),
    [((quictls.P256,), ()), ((quictls.X25519MLKEM768,), ("--post-quantum",)), ((quictls.X25519MLKEM768,), ())],
)
def test_key_exchanges(
    tmp_path: Path, groups: tuple[int, ...], flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cloudflared sends one share, X25519MLKEM768; an edge without ML-KEM asks for P-256 by a HelloRetryRequest."""
    monkeypatch.setattr(quictls, "EXCHANGES", {group: quictls.EXCHANGES[group] for group in groups})

    async def main() -> None:
        async with attached(tmp_path, *flags) as (edge, _, _):
            assert (await get(edge))[0] == 418

    run(main())
