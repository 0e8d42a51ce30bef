"""Every way an origin can fail: 502 for the edge, and an event that says what broke and what to do."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from connector.errors import ConfigError
from connector.protocol.ports import ResponseSource
from connector.proxy import origin_dial
from tests.proxy.conftest import Runner
from tests.proxy.rig import Rig, rig
from tests.support.aio import run, until
from tests.support.certs import Authority
from tests.support.loops import LOOPS
from tests.support.raw_origin import RawConnection, RawOrigin, answering

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def failure(it: Rig, *, websocket: bool = False) -> dict[str, Any]:
    port = it.websocket() if websocket else it.open()
    assert await port.head() == 502
    assert port.source is ResponseSource.CONNECTOR
    assert port.headers == []
    await port.whole()
    assert it.dispatcher.errors == 1
    assert it.dispatcher.active == 0
    (fields,) = it.failures()
    assert fields["path"] == "/"
    return fields


@pytest.mark.parametrize("websocket", [False, True])
def test_refused(websocket: bool, on_loop: Runner) -> None:
    async def main() -> None:
        async with rig(f"http://localhost:{unused_port()}") as it:
            fields = await failure(it, websocket=websocket)
            assert "connection refused" in fields["error"]
            assert "127.0.0.1:" in fields["error"]
            assert "container" in fields["advice"]
            assert "9001" in fields["advice"]
            assert fields["cause"] == "refused"
            assert it.dispatcher.failures == {"refused": 1}

    on_loop(main())


async def _leave_while_dialling(origin: RawOrigin) -> None:
    """Leave after every number of loop turns; whoever comes next is served."""
    async with rig(origin.url, {"noTLSVerify": True}) as it:
        pool = it.pool()
        for turns in range(40):
            pool.close()  # nothing is idle: the next request must dial
            pool._closed = False
            leaver = it.open()
            leaver.send_eof()
            for _ in range(turns):
                await asyncio.sleep(0)
            leaver.peer_reset()
            port = it.open()
            port.send_eof()
            assert await port.head() == 200
            assert await port.whole() == b"ok"
        await until(lambda: pool.open == pool.idle)
        assert not it.failures()


def test_an_eyeball_that_leaves_while_the_origin_is_dialled_spoils_nothing(on_loop: Runner) -> None:
    """A dial that is ended after it brought a connection left a dead one to the next request."""

    async def main() -> None:
        async with RawOrigin(answering(OK)) as origin:
            await _leave_while_dialling(origin)

    on_loop(main())


def test_an_eyeball_that_leaves_during_the_tls_handshake_spoils_nothing(tmp_path: Path) -> None:
    """On uvloop only: asyncio 3.13 itself loses the socket of a TLS connection that is cancelled in its first turn."""

    async def main() -> None:
        async with RawOrigin(answering(OK), tls=Authority().server_context(tmp_path, "localhost")) as origin:
            await _leave_while_dialling(origin)

    run(main(), loop_factory=LOOPS["uvloop"])


@pytest.mark.parametrize("problem", [OverflowError("int too large"), ValueError("what?")])
def test_a_dial_that_raises_something_else_is_still_an_answer(
    problem: Exception, on_loop: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise problem

    async def main() -> None:
        reported: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        async with rig("http://127.0.0.1:1") as it:
            monkeypatch.setattr(it.pool().opener.dialler, "open", broken)
            fields = await failure(it)
            assert type(problem).__name__ in fields["error"]
            assert "report" in fields["advice"]
        assert [context["exception"] for context in reported] == [problem]

    on_loop(main())


def test_unknown_host(on_loop: Runner) -> None:
    async def main() -> None:
        async with rig("http://no-such-host.invalid:80") as it:
            fields = await failure(it)
            assert "no such host 'no-such-host.invalid'" in fields["error"]
            assert fields["advice"]

    on_loop(main())


def test_connect_timeout(on_loop: Runner) -> None:
    async def main() -> None:
        # A listener whose queue is full drops further SYNs.
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            port = full.getsockname()[1]
            fillers = [socket.socket() for _ in range(4)]
            try:
                for filler in fillers:
                    filler.setblocking(False)
                    filler.connect_ex(("127.0.0.1", port))
                async with rig(f"http://127.0.0.1:{port}", {"connectTimeout": 1}) as it:
                    fields = await failure(it)
                    assert "no connection within 1 s" in fields["error"]
                    assert fields["cause"] == "timeout"
            finally:
                for filler in fillers:
                    filler.close()

    on_loop(main())


def test_missing_unix_socket(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(f"unix:{tmp_path}/none.sock") as it:
            fields = await failure(it)
            assert "none.sock" in fields["error"]
            assert "no such socket file" in fields["advice"]

    on_loop(main())


def test_plain_http_where_tls_was_configured(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_some()
        connection.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url.replace("http:", "https:")) as it:
            fields = await failure(it)
            assert "not TLS" in fields["error"]
            assert "http://" in fields["advice"]

    on_loop(main())


def test_tls_where_plain_http_was_configured(on_loop: Runner, tmp_path: Path) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.closed()

    async def main() -> None:
        context = Authority().server_context(tmp_path, "localhost")
        async with RawOrigin(script, tls=context) as origin, rig(origin.url.replace("https:", "http:")) as it:
            port = it.open()
            await port.whole()
            assert port.status in {502, 400}
            if port.status == 502:
                assert it.failures()[0]["cause"] == "protocol"

    on_loop(main())


def test_tls_timeout(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.closed()

    async def main() -> None:
        url = "https:"
        async with RawOrigin(script) as origin, rig(origin.url.replace("http:", url), {"tlsTimeout": 1}) as it:
            fields = await failure(it)
            assert "handshake not done within 1 s" in fields["error"]
            assert fields["cause"] == "timeout"

    on_loop(main())


def test_certificate_nobody_signed(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        context = Authority().server_context(tmp_path, "localhost")
        async with (
            RawOrigin(answering(OK), tls=context) as origin,
            rig(origin.url.replace("127.0.0.1", "localhost")) as it,
        ):
            fields = await failure(it)
            assert "certificate not accepted for 'localhost'" in fields["error"]
            assert "caPool" in fields["advice"]

    on_loop(main())


def test_tls_works_by_pool_by_name_or_unverified(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        authority = Authority()
        context = authority.server_context(tmp_path, "origin.internal")
        pool = tmp_path / "pool.pem"
        pool.write_text(authority.pem())
        names: list[str | None] = []
        context.sni_callback = lambda sock, name, ctx: names.append(name)
        async with RawOrigin(answering(OK), tls=context) as origin:
            for settings in (
                {"caPool": str(pool), "originServerName": "origin.internal"},
                {"caPool": str(pool), "matchSNItoHost": True, "httpHostHeader": "origin.internal"},
                {"noTLSVerify": True, "originServerName": "other.example"},
            ):
                async with rig(origin.url, settings) as it:
                    assert await it.open().whole() == b"ok"
            assert names == ["origin.internal", "origin.internal", "other.example"]
            async with rig(origin.url, {"caPool": str(pool)}) as it:
                assert "127.0.0.1" in (await failure(it))["error"]

    on_loop(main())


def test_sni_that_follows_the_host_does_not_mix_connections(on_loop: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        context = Authority().server_context(tmp_path, "a.example")
        async with (
            RawOrigin(answering(OK), tls=context) as origin,
            rig(origin.url, {"noTLSVerify": True, "matchSNItoHost": True}) as it,
        ):
            for host in ("a.example", "b.example", "a.example:443", "b.example"):
                assert await it.open(host=host).whole() == b"ok"
            assert len(origin.connections) == 2

    on_loop(main())


def test_websocket_over_tls(on_loop: Runner, tmp_path: Path) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_head()
        connection.send(b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        while data := await connection.read_some():
            connection.send(data)

    async def main() -> None:
        context = Authority().server_context(tmp_path, "localhost")
        async with (
            RawOrigin(script, tls=context) as origin,
            rig(origin.url.replace("https", "wss"), {"noTLSVerify": True}) as it,
        ):
            port = it.websocket()
            assert await port.head() == 101
            port.send(b"over tls")
            assert await port.received(8) == b"over tls"
            port.send_eof()
            await port.whole()

    on_loop(main())


@pytest.mark.parametrize("path", ["/no/such/file.pem", "/", "no\0path"])
@pytest.mark.parametrize("service", ["https://localhost:1", "http://localhost:1", "hello_world"])
def test_unreadable_ca_pool_rejects_the_configuration(path: str, service: str, on_loop: Runner) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="caPool"):
            async with rig(service, {"caPool": path}):
                pass

    on_loop(main())


def test_a_ca_pool_without_certificates_is_said(on_loop: Runner, tmp_path: Path) -> None:
    pem = Authority().pem()
    broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    files = {"none": "nothing", "broken": broken, "good": f"# Autorit\u00e9\n{broken}{pem}", "empty": ""}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")

    async def main() -> None:
        for name in files:
            path = tmp_path / name
            async with rig("https://localhost:1", {"caPool": str(path)}) as it:
                text = "could not append the provided origin CA to the certificate pool"
                expected = f"Rule #1: originRequest.caPool: {text}: {path} holds no certificate in PEM"
                assert it.dispatcher.doubts == (() if name == "good" else (expected,))

    on_loop(main())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"banana\r\n\r\n", 'starts with "banana'),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH-2.0"),
        (b"\x15\x03\x01\x00\x02\x02\x16", "TLS alert"),
        (b"", "without an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-", "in the middle of its response head"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"x" * 300_000, "larger than 256 KiB"),
        (b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", "without being asked"),
    ],
    ids=["banana", "ssh", "tls", "nothing", "half", "huge", "switch"],
)
def test_garbage(answer: bytes, words: str, on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_request()
        connection.send(answer)
        if answer:
            await connection.drained()
            await asyncio.sleep(0)

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            fields = await failure(it)
            assert words in fields["error"]
            assert fields["cause"] == "protocol"

    on_loop(main())


def test_server_that_speaks_first(on_loop: Runner) -> None:
    """An SSH or SMTP banner arrives with the connection itself."""

    async def script(connection: RawConnection) -> None:
        connection.send(b"220 mail.example ESMTP\r\n")
        await connection.closed()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            assert "220 mail.example" in (await failure(it))["error"]

    on_loop(main())


def test_connection_reset_before_the_answer(on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_request()
        connection.abort()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            assert "broke before it answered" in (await failure(it))["error"]

    on_loop(main())


def test_secrets_of_a_service_do_not_show(on_loop: Runner) -> None:
    async def main() -> None:
        async with rig(f"http://user:hunter2@127.0.0.1:{unused_port()}") as it:
            port = it.open(target="/x?token=s3cret")
            await port.whole()
            assert "hunter2" not in repr(it.events)
            assert "s3cret" not in repr(it.events)
            assert "hunter2" not in repr(it.dispatcher.ingress)

    on_loop(main())


def test_dials_share_one_lookup(on_loop: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        lookups = 0
        resolve = origin_dial.resolve

        async def counting(*arguments: Any) -> list[Any]:
            nonlocal lookups
            lookups += 1
            return await resolve(*arguments)

        monkeypatch.setattr(origin_dial, "resolve", counting)
        async with RawOrigin(answering(OK)) as origin, rig(origin.url.replace("127.0.0.1", "localhost")) as it:
            ports = [it.open() for _ in range(20)]
            for port in ports:
                assert await port.whole() == b"ok"
            assert lookups == 1

    on_loop(main())


@pytest.mark.parametrize("eyeballs", [True, False])
def test_the_next_address_is_tried_when_one_refuses_or_is_slow(
    eyeballs: bool, on_loop: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            fillers = [socket.socket() for _ in range(4)]
            try:
                for filler in fillers:
                    filler.setblocking(False)
                    filler.connect_ex(full.getsockname())
                async with RawOrigin(answering(OK)) as origin:
                    dead = [("127.0.0.1", unused_port())]
                    slow = [full.getsockname()] if eyeballs else []
                    addresses = [*dead, *slow, ("127.0.0.1", origin.port)]

                    async def several(*_: Any) -> list[Any]:
                        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in addresses]

                    monkeypatch.setattr(origin_dial, "resolve", several)
                    async with rig("http://several.example:80", {"noHappyEyeballs": not eyeballs}) as it:
                        assert await it.open().whole() == b"ok"
            finally:
                for filler in fillers:
                    filler.close()

    on_loop(main())


@pytest.mark.parametrize("websocket", [False, True])
@pytest.mark.parametrize("cause", ["dns", "refused", "reset", "tls", "timeout", "protocol"])
def test_every_502_has_a_cause_of_one_word(cause: str, websocket: bool, on_loop: Runner) -> None:
    async def script(connection: RawConnection) -> None:
        await connection.read_some()
        if cause == "reset":
            connection.abort()
        else:
            connection.send(b"SSH-2.0-dropbear\r\n")

    async def main() -> None:
        async with RawOrigin(script) as origin:
            service = {
                "dns": "http://name.invalid",
                "refused": f"http://127.0.0.1:{unused_port()}",
                "tls": origin.url.replace("http:", "https:"),
                "timeout": "http://192.0.2.1",
            }.get(cause, origin.url)
            async with rig(service) as it:
                if cause == "timeout":
                    it.pool().opener.dialler.open = stuck
                fields = await failure(it, websocket=websocket)
                assert fields["cause"] == cause
                assert fields["status"] == 502
                assert fields["rule"] == 0
                assert it.dispatcher.failures == {cause: 1}

    async def stuck(_tried: list[str]) -> None:
        raise TimeoutError

    on_loop(main())
