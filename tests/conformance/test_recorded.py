"""Every recorded exchange, made by a connector as its users start it: real process, TLS, registration, configuration.

Ours always; with CLOUDFLARED=/path/to/cloudflared the same rows are demanded of the original, which shows that the
rows, and the edge that plays them here, are right.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import capnp
import pytest

from connector.wire.h2_headers import canonical_name, decode_serialised_headers
from connector.wire.token import Token, encode_token
from tests.support.aio import run, until
from tests.support.mini_edge import EdgeStream, MiniEdge, MiniEdgeConnection, Registrar, RpcServer
from tests.support.raw_origin import RawConnection, RawOrigin

ROWS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "proxy" / "http2_transcripts.json").read_text(encoding="utf-8")
)
CLOUDFLARED = os.environ.get("CLOUDFLARED", "")
OURS = (sys.executable, "-m", "connector")
CONNECTORS = {"ours": OURS} | ({"cloudflared": (CLOUDFLARED,)} if CLOUDFLARED else {})
TOKEN = Token("0123456789abcdef0123456789abcdef", bytes(range(32)), uuid.UUID("f1e2d3c4-b5a6-4978-8a9b-0c1d2e3f4a5b"))
CONNECTOR_ID = re.compile(r"(?m)^(Cf-Warp-Tag-Id: )[0-9a-f-]{36}\r$")


@asynccontextmanager
async def connected(connector: str, directory: Path) -> AsyncIterator[MiniEdgeConnection]:
    """Start a connector, register it, and let it go with the edge; it must leave on SIGTERM with status 0."""
    async with MiniEdge(directory) as edge:
        command = (
            *("tunnel", "--no-autoupdate", "--edge", f"127.0.0.1:{edge.port}", "--cacert", str(edge.cacert)),
            *("--protocol", "http2", "--no-prechecks", "--metrics", "127.0.0.1:0", "--grace-period", "5s", "run"),
        )
        process = await asyncio.create_subprocess_exec(
            *CONNECTORS[connector],
            *command,
            env={**os.environ, "TUNNEL_TOKEN": encode_token(TOKEN)},
            stderr=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
        )
        try:
            peer = await edge.accepted()
            registrar = Registrar()
            async with RpcServer(peer.open_control(), registrar):
                await until(lambda: registrar.registered, what="registration")
                assert registrar.registered[0]["auth"]["accountTag"] == TOKEN.account_tag
                assert registrar.registered[0]["auth"]["tunnelSecret"] == TOKEN.secret
                assert registrar.registered[0]["tunnelId"] == TOKEN.tunnel_id.bytes
                yield peer
                process.terminate()
                await until(lambda: registrar.unregistered, what="unregistration")
                peer.close()
                async with asyncio.timeout(30):
                    assert await process.wait() == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def push(peer: MiniEdgeConnection, version: int, service: str) -> dict[str, Any]:
    """Push a configuration; return the connector's answer."""
    config = {"version": version, "config": {"ingress": [{"service": service}]}}
    stream = peer.open([(b"cf-cloudflared-proxy-connection-upgrade", b"update-configuration")])
    stream.send(json.dumps(config).encode(), end=True)
    async with asyncio.timeout(30):
        await stream.ended.wait()
    answer: dict[str, Any] = json.loads(bytes(stream.data))
    return answer


def open_request(peer: MiniEdgeConnection, case: dict[str, Any]) -> EdgeStream:
    """Open a row's request as the recording edge sent it: its client added a user agent and an accept-encoding."""
    fields = [(name.lower().encode(), value.encode()) for name, value in case["headers"]]
    fields = [field for field in fields if field[0] not in {b"connection", b"keep-alive"}]
    names = {name for name, _ in fields}
    body = case.get("body", "").encode()
    websocket = case.get("kind") == "websocket"
    if b"user-agent" not in names:
        fields.append((b"user-agent", b"Go-http-client/2.0"))
    if b"accept-encoding" not in names and case["method"] != "HEAD":
        fields.append((b"accept-encoding", b"gzip"))
    if websocket:
        fields.append((b"cf-cloudflared-proxy-connection-upgrade", b"websocket"))
    elif body and not case.get("body_length_unknown"):
        fields.append((b"content-length", str(len(body)).encode()))
    stream = peer.open(
        fields, method=case["method"].encode(), host=b"mqtt.example.com", path=case["path"].encode(),
        end=not body and not websocket,
    )  # fmt: skip
    if body:
        stream.send(body, end=True)
    return stream


async def exchange(peer: MiniEdgeConnection, row: dict[str, Any], version: int) -> None:
    case = row["edge_request"]
    websocket_works = row.get("edge_body") == "ping"

    async def script(connection: RawConnection) -> None:
        await connection.read_request()
        connection.send((case.get("origin_response") or "").encode())
        if websocket_works:
            connection.send(await connection.read_exactly(4))
        if not case.get("origin_closes"):
            await connection.closed()

    async with RawOrigin(script) as origin:
        assert await push(peer, version, origin.url) == {"lastAppliedVersion": version, "err": None}
        stream = open_request(peer, case)
        await stream.until(lambda: stream.status or stream.ended.is_set())
        if websocket_works:
            stream.send(b"ping")
            await stream.read(4)
            stream.send(b"", end=True)
        async with asyncio.timeout(30):
            await stream.ended.wait()
        if "origin_received" in row:
            received = CONNECTOR_ID.sub("\\1(connector id)\r", bytes(origin.connections[0].received).decode())
            assert received == row["origin_received"].replace("\n[after upgrade] ", "")
        if row["edge_status"] == 0:
            assert stream.reset == 2  # INTERNAL_ERROR
            return
        assert stream.status == row["edge_status"]
        assert bytes(stream.data).decode() == row["edge_body"]
        got = {name.decode(): value.decode() for name, value in stream.headers}
        want = {name.lower(): value for name, value in row["edge_response_headers"]}
        # The library's own fields (date, a sniffed content-type) may be left out; see the specification.
        for name in ("cf-cloudflared-response-meta", "content-length"):
            assert got.get(name) == want.get(name), name
        serialised = "cf-cloudflared-response-headers"
        assert (serialised in got) == (serialised in want)
        assert fields_of(got.get(serialised, "")) == fields_of(want.get(serialised, ""))
        trailers = [(canonical_name(name).decode(), value.decode()) for name, value in stream.trailers]
        assert trailers == [tuple(field) for field in row.get("edge_trailers", [])]


def fields_of(serialised: str) -> list[tuple[bytes, bytes]]:
    """The order of different names is arbitrary."""
    return sorted(decode_serialised_headers(serialised.encode()))


@pytest.mark.parametrize("connector", CONNECTORS)
def test_every_recorded_exchange(connector: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with capnp.kj_loop(), connected(connector, tmp_path) as peer:
            for version, row in enumerate(ROWS, start=1):
                try:
                    await exchange(peer, row, version)
                except BaseException as error:
                    error.add_note(f"in the recorded exchange {row['name']!r}")
                    raise

    run(main(), limit=90)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_configuration_versions(connector: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with capnp.kj_loop(), connected(connector, tmp_path) as peer:
            assert await push(peer, 3, "http_status:418") == {"lastAppliedVersion": 3, "err": None}
            assert await push(peer, 2, "http_status:204") == {"lastAppliedVersion": 3, "err": None}
            refused = await push(peer, 4, "http_status:99999")
            assert refused["lastAppliedVersion"] == 3
            assert refused["err"] is not None
            stream = peer.open([], end=True)
            async with asyncio.timeout(30):
                await stream.ended.wait()
            assert stream.status == 418

    run(main(), limit=60)
