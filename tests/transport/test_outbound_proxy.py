from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from connector.errors import ConfigError, EdgeDialError
from connector.transport import outbound_proxy
from connector.transport.outbound_proxy import OutboundProxy, dial_through, exempt, parse_proxy, proxy_from_environment
from tests.support.aio import run, until
from tests.support.certs import Authority
from tests.support.office_proxy import OfficeProxy


@pytest.mark.parametrize(
    ("text", "proxy"),
    [
        ("http://proxy:3128", OutboundProxy("http", "proxy", 3128)),
        ("proxy:3128", OutboundProxy("http", "proxy", 3128)),
        ("https://proxy", OutboundProxy("https", "proxy", 443)),
        ("socks5://u:p%40ss@[::1]", OutboundProxy("socks5", "::1", 1080, "u", "p@ss")),
        ("socks5h://10.0.0.1:9", OutboundProxy("socks5h", "10.0.0.1", 9)),
    ],
)
def test_urls_of_proxies(text: str, proxy: OutboundProxy) -> None:
    assert parse_proxy(text, "HTTPS_PROXY") == proxy
    assert "p@ss" not in repr(proxy)
    assert "p@ss" not in f"{proxy}"


@pytest.mark.parametrize(
    "text", ["ftp://secret@x", "http://", "socks4://secret@x", "http://secret@x:99999", "http://[x"]
)
def test_what_is_no_proxy_names_its_source_and_no_secret(text: str) -> None:
    with pytest.raises(ConfigError, match="HTTPS_PROXY") as caught:
        parse_proxy(text, "HTTPS_PROXY")
    assert "secret" not in f"{caught.value}"


def test_the_environment() -> None:
    assert proxy_from_environment({}) is None
    assert proxy_from_environment({"HTTPS_PROXY": "", "https_proxy": "a:1", "ALL_PROXY": "b:2"}) == (
        OutboundProxy("http", "a", 1)
    )
    assert proxy_from_environment({"all_proxy": "socks5://b:2"}) == OutboundProxy("socks5", "b", 2)


@pytest.mark.parametrize(
    ("no_proxy", "host", "result"),
    [
        ("", "198.41.200.13", False),
        ("*", "198.41.200.13", True),
        ("198.41.192.0/19", "198.41.200.13", True),
        ("10.0.0.0/8, 198.41.200.13", "198.41.200.13", True),
        ("10.0.0.0/8", "198.41.200.13", False),
        ("argotunnel.com", "198.41.200.13", True),
        (".argotunnel.com", "198.41.200.13", True),
        ("*.argotunnel.com:7844", "198.41.200.13", True),
        ("tunnel.com", "198.41.200.13", False),
        ("2606:4700:a0::/48", "2606:4700:a0::1", True),
        ("", "127.0.0.1", True),
        ("", "::1", True),
        ("", "localhost", True),
    ],
)
def test_no_proxy(no_proxy: str, host: str, result: bool) -> None:
    assert exempt(host, {"NO_PROXY": no_proxy}, also=["region1.v2.argotunnel.com"]) is result
    assert exempt(host, {"no_proxy": no_proxy}, also=["Region1.V2.Argotunnel.com."]) is result


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.read(100))
    await writer.drain()
    writer.close()


async def through(proxy: OutboundProxy, host: str, port: int) -> bytes:
    loop = asyncio.get_running_loop()
    sock = await dial_through(proxy, host, port, timeout=20)
    try:
        await loop.sock_sendall(sock, b"hello")
        return await loop.sock_recv(sock, 100)
    finally:
        sock.close()


def with_echo(test: Callable[[int], Awaitable[None]]) -> None:
    async def main() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        async with server:
            await test(server.sockets[0].getsockname()[1])

    run(main())


@pytest.mark.parametrize("scheme", ["http", "socks5"])
@pytest.mark.parametrize("user", ["", "user"])
@pytest.mark.parametrize("host", ["127.0.0.1", "edge.test"])
def test_bytes_pass(scheme: str, user: str, host: str) -> None:
    async def test(port: int) -> None:
        async with OfficeProxy(user=user, password="pass", goes_to="127.0.0.1") as office:
            proxy = OutboundProxy(scheme, "127.0.0.1", office.port, user, "pass" if user else "")
            assert await through(proxy, host, port) == b"hello"
            assert office.asked == [(scheme, host, port)]

    with_echo(test)


def test_bytes_pass_through_a_proxy_that_speaks_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority()
    trust = ssl.create_default_context(cadata=authority.pem())
    trust.verify_flags &= ~ssl.VERIFY_X509_STRICT
    monkeypatch.setattr("connector.transport.outbound_proxy.ssl.create_default_context", lambda: trust)

    async def test(port: int) -> None:
        async with OfficeProxy(tls=authority.server_context(tmp_path, "localhost"), goes_to="127.0.0.1") as office:
            assert await through(OutboundProxy("https", "localhost", office.port), "edge.test", port) == b"hello"
            tasks = list(outbound_proxy._copying)
            await asyncio.gather(*tasks)  # both directions end with the connection
            await until(lambda: not outbound_proxy._copying)

    with_echo(test)


@pytest.mark.parametrize(
    ("scheme", "answer", "says"),
    [
        ("http", b"HTTP/1.1 403 Forbidden\r\n\r\n", "refuses to connect to edge.test:7844: 403 Forbidden"),
        ("http", b"HTTP/1.1 407 Auth\r\n\r\n", "wants other credentials"),
        ("http", b"SSH-2.0-OpenSSH\r\n\r\n", "does not answer in HTTP"),
        ("http", b"HTTP/1.1 200 OK\r\n\r\nhello", "sent data of its own"),
        ("http", b"x" * 20_000, "does not answer in HTTP"),
        ("http", b"", "closed the connection without an answer"),
        ("socks5", b"HTTP/1.1 400 Bad\r\n\r\n", "does not speak SOCKS5"),
        ("socks5", b"\x05\xff", "wants other credentials"),
        ("socks5", b"\x05\x00\x05\x05\x00\x01", "cannot connect to edge.test:7844: connection refused"),
        ("socks5", b"\x05", "closed the connection in its handshake"),
    ],
)
def test_what_goes_wrong_says_whose_fault_it_is(scheme: str, answer: bytes, says: str) -> None:
    async def main() -> None:
        async with OfficeProxy() as office:
            office.answer = answer
            proxy = OutboundProxy(scheme, "127.0.0.1", office.port, "user", "geheim")
            with pytest.raises(EdgeDialError) as caught:
                await dial_through(proxy, "edge.test", 7844, timeout=20)
            assert "geheim" not in f"{caught.value} {caught.value.advice}"
            assert caught.value.advice
            assert f"the proxy {scheme}://127.0.0.1:{office.port}" in str(caught.value)
            # A proxy that hangs up while it is still being written to may show as a reset instead.
            assert says in str(caught.value) or "broke the connection" in str(caught.value)

    run(main())


def test_a_proxy_that_is_silent_or_absent() -> None:
    async def main() -> None:
        async with OfficeProxy() as office:
            office.silent = True
            with pytest.raises(EdgeDialError, match=r"did not connect to edge\.test:7844 within 0\.3 seconds"):
                await dial_through(OutboundProxy("http", "127.0.0.1", office.port), "edge.test", 7844, timeout=0.3)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            with pytest.raises(EdgeDialError, match="cannot be reached"):
                await dial_through(OutboundProxy("http", "127.0.0.1", port), "edge.test", 7844, timeout=20)

    run(main())
