"""Origins behind a proxy of the environment: which ones, in which form, and what an error says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from connector.proxy.ingress import OriginSettings, parse_service
from connector.proxy.origin_proxy import OriginProxies
from tests.proxy.conftest import Runner
from tests.proxy.rig import Rig, rig
from tests.support.certs import Authority
from tests.support.office_proxy import OfficeProxy
from tests.support.raw_origin import RawConnection, RawOrigin

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"

# As golang.org/x/net/http/httpproxy decides.
NO_PROXY = [
    ("", "origin.test", 80, False),
    ("", "localhost", 80, True),
    ("", "127.8.0.1", 80, True),
    ("", "::1", 80, True),
    ("*", "origin.test", 80, True),
    ("origin.test", "Origin.Test", 80, True),
    ("origin.test", "a.origin.test", 80, True),
    ("origin.test", "anorigin.test", 80, False),
    (".origin.test", "origin.test", 80, False),
    (".origin.test", "a.origin.test", 80, True),
    ("*.origin.test", "origin.test", 80, False),
    ("*.origin.test", "a.origin.test", 80, True),
    ("origin.test:80", "origin.test", 80, True),
    ("origin.test:80", "origin.test", 81, False),
    (" a.test , origin.test ", "origin.test", 80, True),
    ("10.0.0.0/8", "10.1.2.3", 80, True),
    ("10.0.0.0/8", "11.1.2.3", 80, False),
    ("10.1.2.3:81", "10.1.2.3", 80, False),
    ("10.1.2.3:80", "10.1.2.3", 80, True),
    ("fd00::/8", "fd00::1", 80, True),
    ("[fd00::1]:80", "fd00::1", 80, True),
    (",:80,", "origin.test", 80, False),
]


@pytest.mark.parametrize(("entries", "host", "port", "exempt"), NO_PROXY)
def test_no_proxy(entries: str, host: str, port: int, exempt: bool) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        assert OriginProxies({name: entries}).exempts(host, port) is exempt


def test_which_services_have_one() -> None:
    proxies = OriginProxies({"HTTP_PROXY": "http://a:1", "https_proxy": "u:p@b:2", "ALL_PROXY": "http://c:3"})
    usual = OriginSettings()

    def hop(service: str, settings: OriginSettings = usual) -> str:
        found = proxies.hop_to(parse_service(service), settings)
        return "" if found is None else str(found.proxy)

    assert hop("http://o") == hop("ws://o") == "http://a:1"
    assert hop("https://o") == hop("wss://o") == "http://b:2"
    assert hop("unix:/x") == hop("tcp://o:1") == hop("ssh://o") == hop("http://localhost") == ""
    assert hop("http://o", OriginSettings(proxy_protocol="v2")) == ""
    assert OriginProxies({"ALL_PROXY": "http://c:3"}).hop_to(parse_service("http://o"), usual) is None


def proxies_of(proxy: OfficeProxy, scheme: str = "http") -> OriginProxies:
    url = f"{scheme}://{proxy.user and proxy.user + ':' + proxy.password + '@'}127.0.0.1:{proxy.port}"
    return OriginProxies({"HTTP_PROXY": url, "HTTPS_PROXY": url})


def test_a_plain_request_goes_to_the_proxy_in_absolute_form(on_loop: Runner) -> None:
    heads: list[bytes] = []

    async def script(connection: RawConnection) -> None:
        for _ in range(2):
            heads.append(await connection.read_request())
            connection.send(OK)

    async def main() -> None:
        async with OfficeProxy(user="u", password="p@ss", goes_to="127.0.0.1") as proxy, RawOrigin(script) as origin:
            proxies = OriginProxies({"HTTP_PROXY": f"http://u:p%40ss@127.0.0.1:{proxy.port}"})
            port = origin.url.rpartition(":")[2]
            async with rig(f"http://origin.test:{port}", origin_proxies=proxies) as it:
                assert await it.open(target="/a?b=c").whole() == b"ok"
                assert await it.open(target="/again").whole() == b"ok"
            assert proxy.asked == [("absolute", "origin.test", int(port))]

    on_loop(main())
    assert heads[0].startswith(b"GET /a?b=c HTTP/1.1\r\nHost: app.example.com\r\n")
    # The second one came over the same connection, which this proxy passes on untouched.
    assert heads[1].startswith(b"GET http://origin.test:")


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_websockets_go_the_same_way(on_loop: Runner, scheme: str) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_request()
        connection.send(SWITCH)
        connection.send(await connection.read_exactly(4))
        await connection.closed()

    async def main() -> None:
        async with OfficeProxy(goes_to="127.0.0.1") as proxy, RawOrigin(script) as origin:
            port = origin.url.rpartition(":")[2]
            async with rig(f"ws://origin.test:{port}", origin_proxies=proxies_of(proxy, scheme)) as it:
                stream = it.websocket()
                assert await stream.head() == 101
                stream.send(b"ping")
                assert await stream.received(4) == b"ping"
                stream.peer_reset()
            assert proxy.asked == [("absolute" if scheme == "http" else "socks5", "origin.test", int(port))]

    on_loop(main())


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_tls_goes_through_the_proxy_to_the_origin(on_loop: Runner, scheme: str, tmp_path: Path) -> None:
    authority = Authority()
    (tmp_path / "ca.pem").write_text(authority.pem())

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await reader.read()
        writer.close()

    async def main() -> None:
        context = authority.server_context(tmp_path, "origin.test")
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        async with server, OfficeProxy(goes_to="127.0.0.1") as proxy:
            settings = {"caPool": str(tmp_path / "ca.pem")}
            async with rig(f"https://origin.test:{port}", settings, origin_proxies=proxies_of(proxy, scheme)) as it:
                assert await it.open().whole() == b"ok"
            assert proxy.asked == [(scheme, "origin.test", port)]

    on_loop(main())


def failure_of(it: Rig) -> tuple[str, str]:
    (event,) = it.failures()
    return event["error"], event["cause"]


def test_what_a_proxy_refuses_names_both(on_loop: Runner) -> None:
    async def main() -> None:
        async with OfficeProxy(user="u", password="p") as proxy:
            wrong = OriginProxies({"HTTPS_PROXY": f"http://u:secret@127.0.0.1:{proxy.port}"})
            async with rig("https://origin.test:4", origin_proxies=wrong) as it:
                assert await it.open().head() == 502
                text, cause = failure_of(it)
                assert f"origin https://origin.test:4: the proxy http://127.0.0.1:{proxy.port} wants other" in text
                assert cause == "unreachable"
                assert "secret" not in text
            port = proxy.port
        gone = OriginProxies({"HTTP_PROXY": f"http://127.0.0.1:{port}"})
        async with rig("http://origin.test", origin_proxies=gone) as it:
            assert await it.open().head() == 502
            text, cause = failure_of(it)
            assert f"http://origin.test through the proxy http://127.0.0.1:{port}: connection refused" in text
            assert cause == "refused"
        async with rig("http://origin.test", origin_proxies=OriginProxies({"http_proxy": "ftp://secret"})) as it:
            assert await it.open().head() == 502
            assert "HTTP_PROXY names no proxy that can be used" in failure_of(it)[0]

    on_loop(main())
