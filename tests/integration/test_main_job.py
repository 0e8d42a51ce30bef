"""The whole way, every hop real: clients over TLS -> dev edge -> edge protocol -> connector -> origin, and back."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import os
import signal
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
import websockets
from paho.mqtt.enums import CallbackAPIVersion

from tests.support.aio import run
from tests.support.origins import CHUNK, http_origin, mosquitto
from tests.support.processes import MOSQUITTO, Tunnel, tunnel

MIB = 1 << 20
# 256 MB by hand (SIZE=256), less in CI: what is tested, flat memory, does not depend on it.
SIZE = int(os.environ.get("SIZE", "48")) * MIB


PROTOCOLS = ["http2", "quic"]


@pytest.fixture(scope="module", params=PROTOCOLS)
def up(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tunnel]:
    state = tmp_path_factory.mktemp("state")
    args = ("--protocol", str(request.param))
    with http_origin() as port, tunnel(state, f"http://127.0.0.1:{port}", run_args=args) as both:
        assert both.registered["protocol"] == request.param
        yield both


def client(up: Tunnel) -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=str(up.ca))
    return http.client.HTTPSConnection("localhost", up.port, context=context, timeout=60)


def test_a_request_arrives_with_the_edges_headers_and_returns(up: Tunnel) -> None:
    connection = client(up)
    connection.request("POST", "/p/../a?x=%2F", body=b"hello", headers={"X-Own": "1", "Cf-Ray": "spoofed"})
    response = connection.getresponse()
    seen = json.loads(response.read())
    headers = {k.lower(): v for k, v in seen["headers"]}
    assert (response.status, seen["method"], seen["target"], seen["size"]) == (200, "POST", "/p/../a?x=%2F", 5)
    assert headers["x-own"] == "1"
    assert headers["cf-ray"] != "spoofed"
    assert headers["cf-connecting-ip"] == "127.0.0.1"
    assert headers["x-forwarded-proto"] == "https"
    assert "cf-warp-tag-id" in headers
    assert not [name for name in headers if name.startswith("cf-cloudflared")]
    connection.request("GET", "/second")  # the same client connection goes on
    assert json.loads(connection.getresponse().read())["target"] == "/second"
    connection.close()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_up_arrives_whole_and_costs_no_memory(up: Tunnel, chunked: bool) -> None:
    blocks = SIZE // len(CHUNK)
    digest = hashlib.sha256()
    for _ in range(blocks):
        digest.update(CHUNK)
    before = up.connector.memory()
    connection = client(up)
    headers = {} if chunked else {"Content-Length": str(SIZE)}
    connection.request("PUT", "/upload", body=(CHUNK for _ in range(blocks)), headers=headers, encode_chunked=chunked)
    assert json.loads(connection.getresponse().read()) == {"size": SIZE, "sha256": digest.hexdigest()}
    connection.close()
    assert up.connector.memory("VmHWM") - before < 24 * MIB


@pytest.mark.parametrize("length", ["", "&length=1"])
def test_a_large_body_down_arrives_whole_and_costs_no_memory(up: Tunnel, length: str) -> None:
    before = up.connector.memory()
    connection = client(up)
    connection.request("GET", f"/download?size={SIZE}{length}")
    response = connection.getresponse()
    got, size = hashlib.sha256(), 0
    while block := response.read(1 << 18):
        got.update(block)
        size += len(block)
    connection.close()
    want = hashlib.sha256()
    for _ in range(SIZE // len(CHUNK)):
        want.update(CHUNK)
    assert (size, got.hexdigest()) == (SIZE, want.hexdigest())
    assert up.connector.memory("VmHWM") - before < 24 * MIB


def test_500_websockets_echo_at_once(up: Tunnel) -> None:
    count = 500

    async def main() -> None:
        context = ssl.create_default_context(cafile=str(up.ca))
        gate = asyncio.Semaphore(50)  # of handshakes under way; all stay open

        async def one(n: int, all_open: asyncio.Barrier) -> None:
            async with gate:
                socket = await websockets.connect(
                    f"wss://localhost:{up.port}/ws",
                    ssl=context,
                    subprotocols=["mqtt"],
                    compression=None,
                    open_timeout=60,
                )
            try:
                assert socket.subprotocol == "mqtt"
                await all_open.wait()
                for i in range(5):
                    await socket.send(f"{n}.{i}" * 20)
                for i in range(5):
                    assert await socket.recv() == f"{n}.{i}" * 20
            finally:
                await socket.close()

        barrier = asyncio.Barrier(count)
        async with asyncio.TaskGroup() as group:
            for n in range(count):
                group.create_task(one(n, barrier))

    run(main(), limit=100)


def test_an_abandoned_request_leaves_nothing_behind(up: Tunnel) -> None:
    connection = client(up)
    connection.request("GET", "/stall")
    request = up.edge.event("request", path="/stall")
    connection.sock.shutdown(2)
    connection.close()
    closed = up.edge.event("stream_closed", ray=request["ray"])
    assert closed["bytes_down"] == 0


@pytest.mark.broker
@pytest.mark.skipif(MOSQUITTO is None, reason="NO MOSQUITTO BINARY HERE: the main job is not tested")
@pytest.mark.parametrize("transport", PROTOCOLS)
@pytest.mark.parametrize("protocol", [mqtt.MQTTv311, mqtt.MQTTv5])
def test_an_mqtt_message_travels_and_a_wrong_password_is_refused(tmp_path: Path, protocol: int, transport: str) -> None:
    state = tmp_path / "state"
    state.mkdir()
    args = ("--protocol", transport)
    with mosquitto(tmp_path) as port, tunnel(state, f"http://127.0.0.1:{port}", run_args=args) as up:
        got: list[tuple[str, bytes, int]] = []
        subscribed, received, refused = threading.Event(), threading.Event(), threading.Event()
        reasons: list[str] = []

        def connect(password: str) -> mqtt.Client:
            c = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=protocol, transport="websockets")
            c.tls_set(ca_certs=str(up.ca))
            c.username_pw_set("u", password)
            c.on_subscribe = lambda *_: subscribed.set()

            def on_message(_c: mqtt.Client, _u: object, m: mqtt.MQTTMessage) -> None:
                got.append((m.topic, m.payload, m.qos))
                received.set()

            def on_connect(_c: mqtt.Client, _u: object, _f: object, reason: object, _p: object) -> None:
                reasons.append(str(reason))
                if reason != "Success":
                    refused.set()
                    c.disconnect()
                else:
                    c.subscribe("t/#", qos=1)

            c.on_message = on_message
            c.on_connect = on_connect
            c.connect("localhost", up.port, keepalive=30)
            c.loop_start()
            return c

        good = connect("p")
        assert subscribed.wait(20), reasons
        info = good.publish("t/1", b"over the tunnel", qos=1)
        info.wait_for_publish(20)
        assert info.is_published()
        assert received.wait(20)
        assert got == [("t/1", b"over the tunnel", 1)]
        bad = connect("wrong")
        assert refused.wait(20)
        assert "ot authori" in reasons[-1] or "ad user" in reasons[-1].lower(), reasons
        for c in (good, bad):
            c.disconnect()
            c.loop_stop()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sigterm_unregisters_drains_and_exits_0(tmp_path: Path, protocol: str) -> None:
    args = ("--grace-period", "10s", "--protocol", protocol)
    with http_origin() as port, tunnel(tmp_path, f"http://127.0.0.1:{port}", run_args=args) as up:
        connection = client(up)
        connection.putrequest("PUT", "/upload")
        connection.putheader("Content-Length", "10")
        connection.endheaders()
        connection.send(b"01234")
        up.edge.event("request", path="/upload")
        up.connector.signal(signal.SIGTERM)
        up.edge.event("unregistered")
        connection.send(b"56789")  # a request in flight goes on
        assert json.loads(connection.getresponse().read())["size"] == 10
        connection.close()
        assert up.connector.wait() == 0
        up.edge.event("disconnected", error=None)
