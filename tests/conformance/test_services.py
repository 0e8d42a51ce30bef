"""TCP-like services, the test site and private TCP: the same demands, made of this connector and of cloudflared.

Run with `CLOUDFLARED=/path/to/cloudflared pytest tests/conformance/test_services.py`; without it only ours is asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest
import websockets

from tests.integration.test_services import Everything, everything
from tests.support.aio import run
from tests.support.origins import free_port

CLOUDFLARED = os.environ.get("CLOUDFLARED", "")
OURS = (sys.executable, "-m", "connector", "run", "--edge", "{edge}", "--cacert", "{ca}", "--output", "json")
THEIRS = (CLOUDFLARED, "tunnel", "--no-autoupdate", "--edge", "{edge}", "--cacert", "{ca}", "--no-prechecks")
TAIL = ("--token-file", "{token_file}", "--protocol", "{protocol}")
COMMANDS = {
    "ours": (*OURS, *TAIL),
    "cloudflared": (*THEIRS, "--protocol", "{protocol}", "--metrics", "127.0.0.1:0", "run", *TAIL[:2]),
}
NO_BINARY = "NO CLOUDFLARED BINARY: services are not compared with the real thing (set CLOUDFLARED)"


@pytest.fixture(scope="module", params=[(who, how) for who in COMMANDS for how in ("http2", "quic")], ids="-".join)
def up(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Everything]:
    who, protocol = request.param
    if who == "cloudflared" and not CLOUDFLARED:
        pytest.skip(NO_BINARY)
    with everything(tmp_path_factory.mktemp("state"), protocol, COMMANDS[who]) as it:
        yield it


def test_the_test_site(up: Everything) -> None:
    response, page = up.get("hello.test", "/page?x=1", headers={"X-Own": "<1>"})
    assert response.status == 200
    assert b"/page?x=1" in page
    assert b"<1>" not in page
    response, body = up.get("hello.test", "/uptime")
    assert set(json.loads(body)) == {"startTime", "uptime"}
    assert up.get("hello.test", "/_health")[1] == b"ok"

    async def main() -> None:
        async with up.websocket("hello.test", "/ws") as talk:
            await talk.send("grüß")
            assert await talk.recv() == "grüß"
            await talk.send(b"\0\1")
            assert await talk.recv() == b"\0\1"
            await (await talk.ping(b"there?"))

    run(main(), limit=90)


def test_tcp_over_websocket(up: Everything) -> None:
    async def main() -> None:
        async with up.websocket("tcp.test") as talk:
            for number in range(50):
                data = bytes([number]) * (number * 100 + 1)
                await talk.send(data)
                got = b""
                while len(got) < len(data):
                    got += await talk.recv()
                assert got == data
            await (await talk.ping(b"there?"))

    run(main(), limit=90)


def test_bastion(up: Everything) -> None:
    async def main() -> None:
        for jump in (f"127.0.0.1:{up.echoes}", f"tcp://127.0.0.1:{up.echoes}/x"):
            async with up.websocket("bastion.test", additional_headers={"Cf-Access-Jump-Destination": jump}) as talk:
                await talk.send(b"hi")
                assert await talk.recv() == b"hi"
        for headers in ({}, {"Cf-Access-Jump-Destination": "127.0.0.1"}, {"Cf-Access-Jump-Destination": "127.0.0.1:1"}):
            with pytest.raises(websockets.InvalidStatus) as refused:
                await up.websocket("bastion.test", additional_headers=headers)
            assert refused.value.response.status_code == 502

    run(main(), limit=90)


def test_socks(up: Everything) -> None:
    port = struct.pack(">H", up.echoes)

    async def talk_to(*sent: bytes) -> bytes:
        async with up.websocket("socks.test") as talk:
            for each in sent:
                await talk.send(each)
            got = b""
            try:
                async with asyncio.timeout(20):
                    while len(got) < 12 and not got.endswith(b"\xff"):
                        got += await talk.recv()
            except websockets.ConnectionClosed:
                pass
            return got

    async def main() -> None:
        assert (await talk_to(b"\x05\x01\x00", b"\x05\x01\x00\x01\x7f\0\0\1" + port))[:6] == b"\x05\0\x05\0\0\1"
        assert (await talk_to(b"\x05\x01\x00", b"\x05\x01\x00\x03\x09localhost" + port))[:6] == b"\x05\0\x05\0\0\1"
        denied = await talk_to(b"\x05\x01\x00", b"\x05\x01\x00\x01\x7f\0\0\1\0\x16")
        assert denied == b"\x05\0" + b"\x05\x02\0\x01\x7f\0\0\1\0\x16"
        named = await talk_to(b"\x05\x01\x00", b"\x05\x01\x00\x03\x09localhost\0\x16")
        assert named[:12] == b"\x05\0" + b"\x05\x02\0\x03\x09local"
        bind = await talk_to(b"\x05\x01\x00", b"\x05\x02\x00\x01\x7f\0\0\1\0\x16")
        assert bind == b"\x05\0" + b"\x05\x07\0\x01\0\0\0\0\0\0"
        assert await talk_to(b"\x05\x01\x02") == b"\x05\xff"

    run(main(), limit=120)


def test_private_tcp(up: Everything) -> None:
    with socket.create_connection(("127.0.0.1", up.forwarded["echo"]), timeout=60) as client:
        client.sendall(b"raw")
        assert client.recv(3, socket.MSG_WAITALL) == b"raw"


@pytest.mark.skipif(not CLOUDFLARED, reason=NO_BINARY)
def test_cloudflareds_own_client_reaches_a_tcp_service(up: Everything) -> None:
    """`cloudflared access tcp`: the other end of the carrier as users run it."""
    port = free_port()
    command = [CLOUDFLARED, "access", "tcp", "--hostname", "tcp.test", "--url", f"127.0.0.1:{port}"]
    client = subprocess.Popen(
        [*command, "--connect-to", f"tcp.test:{up.port}:127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:

        async def main() -> None:
            async with asyncio.timeout(60):
                while True:
                    try:
                        reader, writer = await asyncio.open_connection("127.0.0.1", port)
                        break
                    except OSError:
                        await asyncio.sleep(0.1)
                data = bytes(range(256)) * 40
                writer.write(data)
                assert await reader.readexactly(len(data)) == data
                writer.close()

        run(main(), limit=90)
    finally:
        client.terminate()
        _, errors = client.communicate(timeout=20)
        sys.stderr.write(errors.decode("utf-8", "replace")[-2000:])
