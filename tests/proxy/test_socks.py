"""SOCKS5 over WebSocket: the bytes, the policy, every refusal."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Any

import pytest

from connector.proxy import limits
from connector.proxy.ingress import IPRule
from connector.proxy.origin_dial import OriginDialler
from connector.proxy.socks import SocksError, SocksServer, allowed
from tests.proxy.conftest import Runner
from tests.proxy.rig import Rig, rig
from tests.proxy.ws_client import frame, frames, received
from tests.support.aio import until
from tests.support.memory_port import MemoryPort
from tests.support.raw_origin import RawConnection, RawOrigin

LOOPBACK = {"ipRules": [{"prefix": "127.0.0.0/8", "allow": True}, {"prefix": "::1/128", "allow": True}]}
GREETING = b"\x05\x01\x00"
NOWHERE = b"\x00\x01\0\0\0\0\0\0"


def connect(host: str, port: int, *, command: int = 1) -> bytes:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.encode()
        return bytes([5, command, 0, 3, len(name)]) + name + port.to_bytes(2, "big")
    return bytes([5, command, 0, 1 if address.version == 4 else 4]) + address.packed + port.to_bytes(2, "big")


def say(port: MemoryPort, data: bytes) -> None:
    port.send(frame(2, data))


async def echo(connection: RawConnection) -> None:
    while data := await connection.read_some():
        connection.send(data)


async def negotiated(it: Rig, request: bytes) -> MemoryPort:
    port = it.websocket()
    assert await port.head() == 101
    say(port, GREETING)
    assert await received(port, 2) == b"\x05\x00"
    say(port, request)
    return port


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("at_once", [True, False])
def test_connect(host: str, at_once: bool, on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig("socks-proxy", LOOPBACK) as it:
            port = it.websocket()
            assert await port.head() == 101, "before any connection is made"
            assert it.dispatcher.open_connections == 0
            everything = GREETING + connect(host, origin.port) + b"hello "
            if at_once:
                say(port, everything)
            else:
                for byte in everything:
                    say(port, bytes([byte]))
            port.send(frame(9, b"ping") + frame(2, b"world"))
            got = await received(port, 2 + 10 + 11)
            assert got[:6] == b"\x05\x00\x05\x00\x00\x01"
            assert got[6:10] == b"\x7f\0\0\1"
            assert int.from_bytes(got[10:12], "big") > 0
            assert got[12:] == b"hello world"
            assert (0x8A, b"ping") in frames(port)
            assert port.outstanding == 0
            port.send(frame(8, b""))
            await port.whole()
            await until(lambda: it.dispatcher.active == 0)

    on_loop(main())


def refusal(rules: dict[str, Any], request: bytes, reply: bytes, cause: str, on_loop: Runner) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    async def main() -> None:
        async with rig("socks-proxy", rules) as it:
            port = await negotiated(it, request)
            await port.whole()
            assert frames(port)[1:] == [(0x82, b"\x05" + reply), (0x88, b"\x03\xe8")]
            assert port.stopped
            await until(lambda: it.dispatcher.active == 0)
            found.extend(it.failures())

    on_loop(main())
    assert [failure["cause"] for failure in found] == [cause]
    return found


def test_denied_without_rules(on_loop: Runner) -> None:
    echoed = b"\x02\x00\x01\x0a\0\0\1\x00\x16"
    [failure] = refusal({}, connect("10.0.0.1", 22), echoed, "access", on_loop)
    assert "no rule of ipRules allows it" in failure["error"]


def test_the_first_rule_that_applies_decides(on_loop: Runner) -> None:
    rules = {
        "ipRules": [{"prefix": "10.0.0.0/24", "ports": [22], "allow": False}, {"prefix": "0.0.0.0/0", "allow": True}]
    }
    [failure] = refusal(rules, connect("10.0.0.1", 22), b"\x02\x00\x01\x0a\0\0\1\x00\x16", "access", on_loop)
    assert "10.0.0.0/24" in failure["error"]


def test_a_denied_name_is_echoed_as_name(on_loop: Runner) -> None:
    name = b"\x02\x00\x03\x09localhost\x00\x16"
    refusal({"ipRules": [{"prefix": "10.0.0.0/8", "allow": True}]}, connect("localhost", 22), name, "access", on_loop)


def test_a_name_that_does_not_resolve(on_loop: Runner) -> None:
    name = b"\x02\x00\x03\x0cnone.invalid\x00\x16"
    refusal(LOOPBACK, connect("none.invalid", 22), name, "dns", on_loop)


def test_refused(on_loop: Runner) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        refusal(LOOPBACK, connect("127.0.0.1", probe.getsockname()[1]), b"\x05" + NOWHERE, "refused", on_loop)


def test_no_route(on_loop: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unreachable(*_: object) -> socket.socket:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(OriginDialler, "open", unreachable)
    refusal(LOOPBACK, connect("127.0.0.1", 1), b"\x03" + NOWHERE, "unreachable", on_loop)


def test_any_other_failure(on_loop: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(*_: object) -> socket.socket:
        raise TimeoutError

    monkeypatch.setattr(OriginDialler, "open", silent)
    refusal(LOOPBACK, connect("127.0.0.1", 1), b"\x04" + NOWHERE, "timeout", on_loop)


@pytest.mark.parametrize("command", [2, 3, 9])
def test_other_commands(command: int, on_loop: Runner) -> None:
    refusal(LOOPBACK, connect("127.0.0.1", 22, command=command), b"\x07" + NOWHERE, "socks", on_loop)


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"\x04\x01", b""),
        (b"\x05\x01\x02", b"\x05\xff"),
        (b"\x05\x00", b"\x05\xff"),
        (GREETING + b"\x05\x01\x00\x07\x01", b""),
        (GREETING + b"\x04\x01\x00\x01\x01", b""),
    ],
)
def test_what_is_no_negotiation_ends(sent: bytes, answer: bytes, on_loop: Runner) -> None:
    async def main() -> None:
        async with rig("socks-proxy", LOOPBACK) as it:
            port = it.websocket()
            say(port, sent)
            await port.whole()
            assert [f for f in frames(port) if f != (0x82, b"\x05\x00")] == [
                *([(0x82, answer)] if answer else []),
                (0x88, b"\x03\xe8"),
            ]
            assert it.failures()[0]["cause"] == "socks"

    on_loop(main())


def test_a_client_that_says_nothing_ends(on_loop: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SOCKS_WAIT", 0.05)

    async def main() -> None:
        async with rig("socks-proxy", LOOPBACK) as it:
            port = it.websocket()
            say(port, b"\x05")
            await port.whole()
            assert "within" in it.failures()[0]["error"]

    on_loop(main())


def test_eyeballs_that_leave_in_the_middle(on_loop: Runner) -> None:
    async def main() -> None:
        async with RawOrigin(echo) as origin, rig("socks-proxy", LOOPBACK) as it:
            greeted = it.websocket()
            say(greeted, GREETING)
            greeted.send_eof()
            await greeted.whole()
            closed = it.websocket()
            closed.send(frame(8, b"\x03\xe8"))
            await closed.whole()
            assert frames(closed) == [(0x88, b"\x03\xe8")]
            broken = it.websocket()
            broken.send(b"GET / HTTP/1.1")
            await broken.whole()
            assert frames(broken) == [(0x88, b"\x03\xea")]
            dialling = await negotiated(it, connect("localhost", origin.port))
            dialling.peer_reset()
            left = it.websocket()
            assert await left.head() == 101
            assert it.dispatcher.go_away() == 1
            assert frames(left) == [(0x88, b"\x03\xe9")]
            await until(lambda: it.dispatcher.active == 0 and it.dispatcher.open_connections == 0)
            assert not it.failures()

    on_loop(main())


def test_proxy_type_socks_leads_to_the_rules_address_whatever_is_asked(on_loop: Runner) -> None:
    async def greets(connection: RawConnection) -> None:
        connection.send(b"SSH-2.0-x\r\n")
        await echo(connection)

    async def main() -> None:
        async with RawOrigin(greets) as origin, rig(f"ssh://127.0.0.1:{origin.port}", {"proxyType": "socks"}) as it:
            port = it.websocket()
            say(port, GREETING + connect("elsewhere.invalid", 9) + b"mine")
            got = await received(port, 2 + 10 + 15)
            assert got[:4] == b"\x05\x00\x05\x00"
            assert got[12:] == b"SSH-2.0-x\r\nmine"
            port.send_eof()
            await port.whole()
            await until(lambda: it.dispatcher.active == 0)

    on_loop(main())


def test_proxy_type_socks_whose_origin_is_away_or_goes(on_loop: Runner) -> None:
    async def goes(connection: RawConnection) -> None:
        connection.abort()

    async def main() -> None:
        async with rig("ssh://127.0.0.1:1", {"proxyType": "socks"}) as it:
            assert await it.websocket().head() == 502
        async with RawOrigin(goes) as origin, rig(f"ssh://127.0.0.1:{origin.port}", {"proxyType": "socks"}) as it:
            port = it.websocket()
            await port.head()
            say(port, GREETING + connect("x", 9))
            await port.whole()
            await until(lambda: it.dispatcher.active == 0)

    on_loop(main())


def test_policy() -> None:
    rules = (
        IPRule(ipaddress.ip_network("10.1.0.0/16"), (22, 80), True),
        IPRule(ipaddress.ip_network("10.0.0.0/8"), (), False),
        IPRule(ipaddress.ip_network("fd00::/8"), (443,), True),
    )

    def passes(address: str, port: int) -> bool:
        return allowed(rules, ipaddress.ip_address(address), port)[0]

    assert passes("10.1.2.3", 80)
    assert not passes("10.1.2.3", 81)
    assert not passes("10.2.0.1", 22)
    assert passes("::ffff:10.1.2.3", 22)
    assert passes("fd00::1", 443)
    assert not passes("fd00::1", 22)
    assert not passes("192.0.2.1", 22)
    assert allowed((), ipaddress.ip_address("127.0.0.1"), 1) == (False, None)


def test_an_address_written_as_a_name_needs_no_look_up() -> None:
    server = SocksServer()
    assert server.receive(GREETING + b"\x05\x01\x00\x03\x09127.0.0.1\x00\x50tail") == b"\x05\x00"
    assert server.destination is not None
    assert str(server.destination.address) == "127.0.0.1"
    assert str(server.destination) == "127.0.0.1:80"
    assert server.rest() == b"tail"
    with pytest.raises(SocksError, match="no host"):
        SocksServer().receive(GREETING + b"\x05\x01\x00\x03\x00\x00\x50")
