"""Every recorded HTTP/2 exchange: the same bytes to the origin, the same answer to the edge."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from connector.protocol.ports import Request, RequestKind, ResetCode, ResponseSource
from connector.wire.h2_headers import canonical_name, decode_serialised_headers, is_control_response_header
from tests.proxy.conftest import Runner
from tests.proxy.rig import CONNECTOR_ID, rig
from tests.support.memory_port import open_stream
from tests.support.raw_origin import RawConnection, RawOrigin

ROWS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("http2_transcripts.json").read_text())


def edge_request(row: dict[str, Any]) -> tuple[Request, bytes]:
    """Return the request as it left the recording edge: its client added a user agent and an accept-encoding."""
    case = row["edge_request"]
    headers = [(name.lower().encode(), value.encode()) for name, value in case["headers"]]
    headers = [pair for pair in headers if pair[0] not in {b"connection", b"keep-alive"}]
    names = {name for name, _ in headers}
    if b"user-agent" not in names:
        headers.append((b"user-agent", b"Go-http-client/2.0"))
    if b"accept-encoding" not in names and case["method"] != "HEAD":
        headers.append((b"accept-encoding", b"gzip"))
    body = case.get("body", "").encode()
    websocket = case.get("kind") == "websocket"
    length = -1 if websocket or case.get("body_length_unknown") else len(body)
    kind = RequestKind.WEBSOCKET if websocket else RequestKind.HTTP
    target = case["path"].encode()
    return Request(kind, case["method"].encode(), target, b"mqtt.example.com", headers, length), body


@pytest.mark.parametrize("row", ROWS, ids=[row["name"].replace(" ", "-") for row in ROWS])
def test_exchange_as_recorded(row: dict[str, Any], on_loop: Runner) -> None:
    opening, body = edge_request(row)
    case = row["edge_request"]
    websocket_works = row.get("edge_body") == "ping"

    async def script(connection: RawConnection) -> None:
        await connection.read_request()
        connection.send(case.get("origin_response", "").encode())
        if websocket_works:
            connection.send(await connection.read_exactly(4))
        if case.get("origin_closes"):
            return
        await connection.closed()

    async def main() -> None:
        async with RawOrigin(script) as origin, rig(origin.url) as it:
            port = open_stream(it.dispatcher.accept, opening)
            if body:
                port.send(body)
            if opening.content_length and opening.kind is RequestKind.HTTP:
                port.send_eof()
            await port.head()
            if websocket_works:
                port.send(b"ping")
                await port.received(4)
                port.send_eof()
            await port.whole()
            received = bytes(origin.connections[0].received).decode()
            if "origin_received" in row:
                expected = row["origin_received"].replace("\n[after upgrade] ", "")
                assert received.replace(str(CONNECTOR_ID), "(connector id)") == expected
            if row["edge_status"] == 0:
                assert port.reset_code is ResetCode.FAILED
                return
            assert port.status == (101 if websocket_works else row["edge_status"])
            assert bytes(port.body).decode() == row["edge_body"]
            edge = {name.lower(): value for name, value in row["edge_response_headers"]}
            from_origin = "origin" in edge["cf-cloudflared-response-meta"]
            assert port.source is (ResponseSource.ORIGIN if from_origin else ResponseSource.CONNECTOR)
            serialised = decode_serialised_headers(edge.get("cf-cloudflared-response-headers", "").encode())
            visible = [
                (canonical_name(name), value)
                for name, value in port.headers
                if not is_control_response_header(name.lower())
            ]
            assert sorted(visible) == sorted(serialised)
            trailers = [(name.decode().lower(), value.decode()) for name, value in port.trailers]
            assert trailers == [(name.lower(), value) for name, value in row.get("edge_trailers", [])]
            assert not port.outstanding or port.stopped
            await asyncio.sleep(0)

    on_loop(main())
