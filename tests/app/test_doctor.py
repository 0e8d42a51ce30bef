"""`connector doctor`: every hop, working and broken, between the dev edge, real origins and a real Mosquitto."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from connector.app.doctor import FIRST_STATUS, HOPS, Walk, parse_target
from connector.app.doctor_origin import walk_origin
from connector.errors import UsageError
from connector.proxy.ingress import OriginSettings, ingress_from_url
from connector.proxy.proxy_protocol import SIGNATURE
from connector.wire.token import decode_token
from tests.support.aio import run
from tests.support.origins import free_port, http_origin, mosquitto
from tests.support.processes import MOSQUITTO, ROOT, Child, dev_edge, edge_token


def status_of(hop: str) -> int:
    return FIRST_STATUS + HOPS.index(hop)


def doctor(*args: str | Path, token: str = "", **environ: str) -> tuple[int, str, str]:
    result = subprocess.run(
        [sys.executable, "-m", "connector", "doctor", *map(str, args)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=110,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONWARNINGS": "error",
            **environ,
            **({"TUNNEL_TOKEN": token} if token else {}),
        },
    )
    assert "Traceback" not in result.stderr
    assert not token or token[20:] not in result.stdout + result.stderr
    return result.returncode, result.stdout, result.stderr


@contextmanager
def edge(tmp_path: Path, ingress: str, *args: str) -> Iterator[tuple[Child, list[str | Path], str]]:
    with dev_edge(tmp_path, "--ingress", ingress, *args) as (child, listening):
        yield child, ["--edge", listening["edge"], "--cacert", listening["ca"]], edge_token(tmp_path)


def hops(output: str) -> dict[str, dict[str, Any]]:
    return {hop["hop"]: hop for hop in json.loads(output)["hops"]}


def test_the_whole_way_works(tmp_path: Path) -> None:
    with http_origin() as origin, edge(tmp_path, f"http://127.0.0.1:{origin}") as (child, args, token):
        status, out, _ = doctor(*args, "https://localhost/x", token=token)
        assert status == 0, out
        words = [line.split()[:2] for line in out.splitlines()]
        assert words == [
            ["ok", "dns"], ["ok", "udp"], ["ok", "tcp"], ["ok", "tls"], ["ok", "registration"], ["ok", "configuration"],
            ["ok", "rule"], ["ok", "origin-dns"], ["ok", "origin-tcp"], ["skip", "origin-tls"], ["ok", "http"],
            ["skip", "mqtt"],
        ]  # fmt: skip
        assert "the service answers 200" in out
        child.event("registered")
        child.event("unregistered")  # it leaves as at a shutdown


@pytest.mark.skipif(MOSQUITTO is None, reason="no Mosquitto")
@pytest.mark.broker
def test_down_to_the_brokers_answer(tmp_path: Path) -> None:
    with mosquitto(tmp_path) as broker, edge(tmp_path, f"http://127.0.0.1:{broker}") as (_, args, token):
        status, out, _ = doctor(*args, "--json", "wss://localhost/mqtt", token=token)
        assert status == 0, out
        assert hops(out)["mqtt"]["detail"].startswith("CONNACK")
        assert hops(out)["websocket"]["detail"] == "101, sub-protocol mqtt"
        assert all("exit" not in hop for hop in hops(out).values())


def test_without_a_token_it_goes_as_far_as_tls(tmp_path: Path) -> None:
    with edge(tmp_path, "http_status:204") as (child, args, _):
        status, out, _ = doctor(*args, "--json")
        assert status == 0
        assert [hop["status"] for hop in hops(out).values()] == ["ok"] * 4 + ["skip"] * 3
        assert not any(event.get("event") == "registered" for event in child.events)


def test_an_edge_that_is_not_there() -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    status, out, _ = doctor("--edge", nowhere)
    assert status == status_of("tcp")  # UDP alone is a warning
    assert "WARN  udp" in out
    assert "FAIL  tcp" in out
    assert "refuses connections" in out
    status, out, _ = doctor("--edge", nowhere, "--protocol", "quic", "--json")
    assert status == status_of("udp")
    assert hops(out)["udp"]["advice"]


def test_blocked_udp_is_a_warning(tmp_path: Path) -> None:
    with edge(tmp_path, "http_status:204", "--no-quic") as (_, args, token):
        status, out, _ = doctor(*args, "https://localhost/", token=token)
        assert status == 0, out
        assert "WARN  udp" in out
        assert "over http2" in out


def test_a_region_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with edge(tmp_path, "http_status:200") as (_, args, token):
        dead = f"127.0.0.1:{free_port()}"
        status, out, _ = doctor(*args, "--edge", dead, "--json", "https://localhost/", token=token)
        assert status == 0, out
        assert hops(out)["dns"]["detail"] == "2 addresses of the edge"
        for hop in ("udp", "tcp"):
            assert hops(out)[hop]["status"] == "warn"
            here, there = hops(out)[hop]["detail"].split("; not with ")
            assert f"with {args[1]} (region " in here
            assert f"{dead} (region " in there
            assert ", IPv4)" in there
        assert hops(out)["tls"]["status"] == "ok"


def test_a_name_that_leads_nowhere() -> None:
    status, out, _ = doctor("--edge", "edge.invalid:7844", "--json")
    assert status == status_of("dns")
    assert [hop["status"] for hop in hops(out).values()] == ["fail"] + ["skip"] * 6


def test_a_certificate_that_nobody_trusts(tmp_path: Path) -> None:
    with edge(tmp_path, "http_status:204") as (_, args, _token):
        status, out, _ = doctor(*args[:2], "--protocol", "http2")
        assert status == status_of("tls")
        assert "FAIL  tls" in out


def test_a_token_of_another_edge(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with edge(other, "http_status:204") as (_, _args, token):
        pass
    with edge(tmp_path, "http_status:204") as (_, args, _token):
        status, out, _ = doctor(*args, "https://localhost/", token=token)
        assert status == status_of("registration")
        assert "Unauthorized" in out


@pytest.mark.parametrize(
    ("ingress", "url", "hop", "says"),
    [
        ("http://127.0.0.1:{free}", "https://localhost/", "origin-tcp", "nothing listens there"),
        ("http://service.invalid:80", "https://localhost/", "origin-dns", "no such host"),
        ("https://127.0.0.1:{origin}", "https://localhost/", "origin-tls", "plain HTTP"),
        ("http://127.0.0.1:{origin}", "wss://localhost/", "websocket", "handshake with"),
        ("http://127.0.0.1:{silent}", "https://localhost/", "http", "without an HTTP answer"),
        ("unix:{tmp}/none.sock", "https://localhost/", "origin-tcp", "no such socket file"),
    ],
)
def test_what_is_wrong_at_the_service(tmp_path: Path, ingress: str, url: str, hop: str, says: str) -> None:
    with http_origin() as origin, silent() as port:
        service = ingress.format(free=free_port(), origin=origin, silent=port, tmp=tmp_path)
        with edge(tmp_path, service) as (_, args, token):
            status, out, _ = doctor(*args, "--json", url, token=token)
            assert (status, hops(out)[hop]["status"]) == (status_of(hop), "fail"), out
            text = " ".join(str(value) for value in hops(out)[hop].values())
            assert says in text
            assert hops(out)[hop]["meaning"]


@contextmanager
def silent() -> Iterator[int]:
    """A service that closes every connection once it was spoken to."""
    import socketserver

    class Close(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Close) as server:
        import threading

        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_a_service_behind_a_proxy_is_not_asked_past_it(tmp_path: Path) -> None:
    with edge(tmp_path, "http://service.invalid") as (_, args, token):
        status, out, _ = doctor(
            *args, "--json", "localhost/", token=token, HTTP_PROXY="http://u:secret@proxy.invalid:1"
        )
        assert status == 0
        assert "through the proxy http://proxy.invalid:1 of the environment" in hops(out)["http"]["detail"]
        assert "secret" not in out


def test_a_rule_that_needs_no_service(tmp_path: Path) -> None:
    with edge(tmp_path, "http_status:418") as (_, args, token):
        status, out, _ = doctor(*args, "--json", "localhost/teapot", token=token)
        assert status == 0
        assert hops(out)["http"]["detail"] == "the connector answers http_status:418 by itself"


@pytest.mark.parametrize("text", ["ftp://x/", "https://", "https://x/\nHost: y", "https://[x/"])
def test_what_is_no_url(text: str) -> None:
    with pytest.raises(UsageError):
        parse_target(text)


def test_urls() -> None:
    assert parse_target("a.test") == ("https", "a.test", "/")
    assert parse_target("wss://A.test:8443/mqtt?x=1") == ("wss", "a.test", "/mqtt?x=1")


def test_a_configuration_file_names_tunnel_and_rules(tmp_path: Path) -> None:
    """A locally managed tunnel: the edge pushes nothing, the file says where requests go."""
    with http_origin() as origin, dev_edge(tmp_path) as (_, listening):
        token = decode_token(edge_token(tmp_path))
        credentials = tmp_path / "credentials.json"
        credentials.write_text(
            json.dumps(
                {
                    "AccountTag": token.account_tag,
                    "TunnelSecret": base64.b64encode(token.secret).decode(),
                    "TunnelID": str(token.tunnel_id),
                }
            )
        )
        config = tmp_path / "config.yml"
        config.write_text(
            f"tunnel: {token.tunnel_id}\ncredentials-file: {credentials}\n"
            f"ingress:\n- hostname: a.test\n  service: http://127.0.0.1:{origin}\n- service: http_status:404\n"
        )
        args = ("--config", config, "--edge", listening["edge"], "--cacert", listening["ca"])
        status, out, _ = doctor(*args, "--json", "https://a.test/x")
        assert status == 0, out
        assert hops(out)["rule"]["detail"].startswith("rule 0 (a.test)")
        assert hops(out)["http"]["detail"] == "the service answers 200"
        assert "locally managed" in hops(out)["configuration"]["detail"]


def test_a_service_that_wants_to_know_who_comes() -> None:
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readexactly(28))
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def walked() -> Walk:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            walk = Walk(lambda _: None)
            ingress = ingress_from_url(f"http://127.0.0.1:{port}", OriginSettings(proxy_protocol="v2"))
            await walk_origin(walk, ingress, parse_target("http://localhost/"))
            return walk

    walk = run(walked())
    assert [hop.detail for hop in walk.hops if hop.name == "http"] == ["the service answers 200"]
    assert heads[0].startswith(SIGNATURE + b"\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01")  # Mosquitto closes on LOCAL
