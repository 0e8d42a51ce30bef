"""4,000 WebSockets at once on one QUIC connection, with real programs on every side (`make faults`; a smoke here)."""

from __future__ import annotations

import asyncio
import os
import resource
import ssl
from pathlib import Path

import pytest

from tests.support.aio import run
from tests.support.origins import raw_origin
from tests.support.processes import tunnel

STREAMS = int(os.environ.get("STREAMS", "4000" if os.environ.get("FAULTS") else "200"))
AT_ONCE = 50
"""Visitors that shake hands at a time: TLS is what a test of this size costs."""

UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
ECHO = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" \
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n\x81\x02hi"  # fmt: skip


@pytest.mark.timeout(600)
def test_many_streams_on_one_quic_connection(tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 4 * STREAMS:
        pytest.skip(f"needs {4 * STREAMS} open files, and the limit here is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * STREAMS + 1000 if hard != resource.RLIM_INFINITY else 65_536, hard))

    async def main(port: int, ca: Path) -> None:
        context = ssl.create_default_context(cafile=str(ca))
        gate = asyncio.Semaphore(AT_ONCE)
        streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

        async def open_one() -> None:
            async with gate:
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, ssl=context, server_hostname="localhost"
                )
                writer.write(UPGRADE)
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 101"), head
                assert await reader.readexactly(4) == b"\x81\x02hi"
                streams.append((reader, writer))

        await asyncio.gather(*(open_one() for _ in range(STREAMS)))
        assert len(streams) == STREAMS
        for _, writer in streams:  # all of them at once, while all are open
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in streams), return_exceptions=True)

    with (
        raw_origin(ECHO, close=False) as origin,
        tunnel(tmp_path, f"http://127.0.0.1:{origin}", run_args=("--protocol", "quic")) as up,
    ):
        before = up.connector.memory()
        run(main(up.port, up.ca), limit=580)
        peak = up.connector.memory("VmHWM")
        print(f"{STREAMS} streams: connector {before / 1e6:.1f} MB before, {peak / 1e6:.1f} MB at most")
        assert not [e for e in up.edge.events if e["event"] == "disconnected"]
