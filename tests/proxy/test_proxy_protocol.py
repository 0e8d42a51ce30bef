"""PROXY protocol v2: the bytes, and that origins get them first and on a connection of their own."""

from __future__ import annotations

import ipaddress
import socket
import threading
from pathlib import Path

import pytest

from connector.proxy.proxy_protocol import LOCAL, SIGNATURE, client_address, encode_proxy_header
from tests.proxy.conftest import Runner
from tests.proxy.rig import rig
from tests.support.aio import until
from tests.support.certs import Authority
from tests.support.raw_origin import RawConnection, RawOrigin

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
CLIENT = [(b"cf-connecting-ip", b"203.0.113.9")]


def decode(head: bytes) -> tuple[int, str, str, int, int]:
    """Return command, source, target and ports; written from the format's text, apart from the code under test."""
    assert head[:12] == b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a"
    version_command, family = head[12], head[13]
    assert version_command >> 4 == 2
    size = int.from_bytes(head[14:16], "big")
    assert len(head) == 16 + size
    if version_command & 15 == 0:
        assert size == 0
        return 0, "", "", 0, 0
    width = {0x11: 4, 0x21: 16}[family]
    body = head[16:]
    source, target = (_text(body[at : at + width]) for at in (0, width))
    ports = body[2 * width :]
    return 1, source, target, int.from_bytes(ports[:2], "big"), int.from_bytes(ports[2:4], "big")


def _text(packed: bytes) -> str:
    address = ipaddress.ip_address(packed)
    mapped = getattr(address, "ipv4_mapped", None)
    return f"::ffff:{mapped}" if mapped else str(address)  # as Python 3.13 writes it, also on older ones


def test_the_bytes() -> None:
    four = encode_proxy_header("203.0.113.9", ("127.0.0.1", 9001))
    assert decode(four) == (1, "203.0.113.9", "127.0.0.1", 0, 9001)
    six = encode_proxy_header("2001:db8::9", ("::1", 80, 0, 0))
    assert decode(six) == (1, "2001:db8::9", "::1", 0, 80)
    mixed = encode_proxy_header("2001:db8::9", ("127.0.0.1", 80))
    assert decode(mixed)[:3] == (1, "2001:db8::9", "::ffff:127.0.0.1")
    mixed = encode_proxy_header("203.0.113.9", ("fe80::1%eth0", 80, 0, 2))
    assert decode(mixed)[:3] == (1, "::ffff:203.0.113.9", "fe80::1")
    assert decode(encode_proxy_header("203.0.113.9", "/run/broker.sock")) == (1, "203.0.113.9", "0.0.0.0", 0, 0)
    assert decode(encode_proxy_header("", ("127.0.0.1", 1)))[0] == 0
    assert LOCAL.startswith(SIGNATURE)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(b"203.0.113.9", "203.0.113.9"), (b" 2001:DB8:0:0::1 ", "2001:db8::1"), (b"nobody", ""), (b"", "")],
)
def test_the_eyeballs_address(value: bytes, expected: str) -> None:
    assert client_address([(b"accept", b"*/*"), (b"Cf-Connecting-Ip", value)]) == expected
    assert client_address([(b"x-forwarded-for", b"203.0.113.9")]) == "", "an eyeball could have set it"


def test_every_request_has_a_connection_of_its_own_that_begins_with_the_header(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        head = await connection.read_exactly(28)
        heads.append(decode(head))
        await connection.read_request()
        connection.send(OK)
        await connection.closed()

    heads: list[tuple[int, str, str, int, int]] = []

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url, {"proxyProtocol": "v2"}) as it:
            for _ in range(3):
                assert await it.open(headers=CLIENT).whole() == b"ok"
            await until(lambda: it.dispatcher.open_connections == 0)
            assert heads == [(1, "203.0.113.9", "127.0.0.1", 0, origin.port)] * 3

    on_loop(main())


def test_a_websocket_and_an_unknown_client(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        assert decode(await connection.read_exactly(16))[0] == 0
        await connection.read_head()
        connection.send(SWITCH)
        while data := await connection.read_some():
            connection.send(data)

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url, {"proxyProtocol": "v2"}) as it:
            port = it.websocket()
            assert await port.head() == 101
            port.send(b"\x81\x82\0\0\0\0hi")
            assert await port.received(8) == b"\x81\x82\0\0\0\0hi"
            port.send_eof()
            await port.whole()

    on_loop(main())


def test_it_stands_in_front_of_tls(tmp_path: Path, on_loop: Runner) -> None:
    """A TLS server that is given the header where its handshake should be fails; so it is read off the socket first."""
    context = Authority().server_context(tmp_path, "origin.test")
    found: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        peer, _ = listener.accept()
        found.append(peer.recv(28, socket.MSG_WAITALL))
        with context.wrap_socket(peer, server_side=True) as secure:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += secure.recv(65536)
            secure.sendall(OK)
            secure.recv(1)

    async def main() -> None:
        settings = {"proxyProtocol": "v2", "noTLSVerify": True}
        async with rig(f"https://127.0.0.1:{listener.getsockname()[1]}", settings) as it:
            assert await it.open(headers=CLIENT).whole() == b"ok"
            assert decode(found[0])[1] == "203.0.113.9"

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    on_loop(main())
    thread.join(10)
    listener.close()


def test_an_eyeball_that_leaves_during_the_dial_gives_its_connection_to_nobody(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.closed()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url, {"proxyProtocol": "v2"}) as it:
            port = it.open(headers=CLIENT)
            port.peer_reset()
            await until(lambda: it.dispatcher.dialling == 0 and it.dispatcher.open_connections == 0)
            assert it.pool().idle == 0

    on_loop(main())


def test_tcp_and_unix_origins_get_it_too(tmp_path: Path, on_loop: Runner) -> None:
    async def tcp(connection: RawConnection) -> None:
        heads.append(decode(await connection.read_exactly(28)))
        connection.send(b"220 hello\r\n")
        await connection.closed()

    async def unix(connection: RawConnection) -> None:
        heads.append(decode(await connection.read_exactly(28)))
        await connection.read_request()
        connection.send(OK)
        await connection.closed()

    heads: list[tuple[int, str, str, int, int]] = []
    settings = {"proxyProtocol": "v2"}

    async def main() -> None:
        async with RawOrigin(tcp) as origin, rig(f"tcp://127.0.0.1:{origin.port}", settings) as it:
            port = it.websocket(headers=CLIENT)
            assert await port.received(13) == b"\x82\x0b220 hello\r\n"
            port.peer_reset()
            assert heads == [(1, "203.0.113.9", "127.0.0.1", 0, origin.port)]
        async with RawOrigin(unix, path=str(tmp_path / "origin.sock")) as origin, rig(origin.url, settings) as it:
            assert await it.open(headers=CLIENT).whole() == b"ok"
            assert heads[1:] == [(1, "203.0.113.9", "0.0.0.0", 0, 0)]

    on_loop(main())
