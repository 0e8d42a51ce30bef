from __future__ import annotations

import asyncio
import json
import socket
from uuid import UUID

import pytest

from connector.app.health import HealthServer
from connector.app.state import Snapshot
from connector.errors import ConfigError
from tests.support.aio import run

CONNECTOR = UUID("11223344-5566-4778-899a-abbccddeeff0")


async def get(address: str, path: str) -> tuple[int, str]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.decode().partition("\r\n\r\n")
    return int(head.split()[1]), body


def test_the_routes() -> None:
    ready = 0

    async def main() -> None:
        nonlocal ready
        async with HealthServer("127.0.0.1:0", CONNECTOR, lambda: Snapshot(ready, 2, 7, 3, 5)) as server:
            status, body = await get(server.address, "/ready")
            assert (status, json.loads(body)) == (
                503,
                {"status": 503, "readyConnections": 0, "connectorId": str(CONNECTOR)},
            )
            ready = 2
            status, body = await get(server.address, "/ready")
            assert (status, body) == (200, f'{{"status":200,"readyConnections":2,"connectorId":"{CONNECTOR}"}}')
            assert await get(server.address, "/healthcheck") == (200, "OK\n")
            status, body = await get(server.address, "/metrics")
            assert status == 200
            assert "cloudflared_tunnel_ha_connections 2\n" in body
            assert 'cloudflared_tunnel_tunnel_register_success{rpcName="registerConnection"} 3\n' in body
            assert "cloudflared_orchestration_config_version 5\n" in body
            assert (await get(server.address, "/other"))[0] == 404

    run(main())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", ""])
def test_every_host_form_listens(host: str) -> None:
    async def main() -> None:
        async with HealthServer(f"{host}:0", CONNECTOR, lambda: Snapshot(1, 1, 0, 1, -1)) as server:
            port = server.address.rpartition(":")[2]
            assert (await get(f"127.0.0.1:{port}", "/ready"))[0] == 200

    run(main())


def test_a_taken_port_is_a_clear_error() -> None:
    async def main(address: str) -> None:
        async with HealthServer(address, CONNECTOR, lambda: Snapshot(0, 0, 0, 0, -1)):
            raise AssertionError("it bound")

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match="failed to bind to address") as caught:
            run(main(address))
        assert address in str(caught.value)
        assert "--metrics" in caught.value.advice
