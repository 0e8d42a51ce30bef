"""The dev edge under real cloudflared: what the other half of every test here must be able to do.

Run with `CLOUDFLARED=/path/to/cloudflared pytest tests/conformance/test_cloudflared.py`.
"""

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
from tests.support.origins import CHUNK, http_origin, mosquitto, raw_origin
from tests.support.processes import MOSQUITTO, Child, Tunnel, dev_edge, edge_token, tunnel

CLOUDFLARED = os.environ.get("CLOUDFLARED", "")
pytestmark = pytest.mark.skipif(
    not CLOUDFLARED, reason="NO CLOUDFLARED BINARY: the dev edge is not compared with the real thing (set CLOUDFLARED)"
)

FLAGS = ("tunnel", "--no-autoupdate", "--edge", "{edge}", "--cacert", "{ca}", "--no-prechecks")
RUN = ("--grace-period", "10s", "--metrics", "127.0.0.1:0", "run", "--token-file", "{token_file}")

MIB = 1 << 20
SIZES = {"http2": 256 * MIB, "quic": 64 * MIB}
WEBSOCKETS = {"http2": 500, "quic": 200}
"""The edge's QUIC is pure Python, 15 times as costly as its HTTP/2: less of the same."""


@pytest.fixture(scope="module", params=["http2", "quic"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def command(protocol: str) -> tuple[str, ...]:
    return (CLOUDFLARED, *FLAGS, "--protocol", protocol, *RUN)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, command: tuple[str, ...], protocol: str) -> Iterator[Tunnel]:
    state = tmp_path_factory.mktemp("state")
    with http_origin() as port, tunnel(state, f"http://127.0.0.1:{port}", command=command) as both:
        [registered] = [event for event in both.edge.events if event["event"] == "registered"]
        assert registered["protocol"] == protocol
        yield both


def visitor(up: Tunnel) -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=str(up.ca))
    return http.client.HTTPSConnection("localhost", up.port, context=context, timeout=60)


def test_registration_and_configuration(tmp_path: Path, command: tuple[str, ...]) -> None:
    with tunnel(tmp_path, "http_status:418", command=command) as up:
        [registered] = [event for event in up.edge.events if event["event"] == "registered"]
        assert registered["version"].startswith("20")
        assert {"serialized_headers", "allow_remote_config"} <= set(registered["features"])
        connection = visitor(up)
        connection.request("GET", "/")
        with connection.getresponse() as response:
            assert response.status == 418
        connection.close()


def test_a_changed_file_is_in_force_at_once(tmp_path: Path, command: tuple[str, ...]) -> None:
    file = tmp_path / "edge.toml"
    text = "[tunnels.test]\ningress = [{{ service = 'http_status:{}' }}]\n"
    file.write_text(text.format(418))
    with FileTunnel(tmp_path, file, command) as (edge, port, ca):
        edge.event("configuration", applied=True, version=1)
        file.write_text(text.format(451))
        edge.event("configuration", applied=True, version=2)
        context = ssl.create_default_context(cafile=str(ca))
        connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=60)
        connection.request("GET", "/")
        with connection.getresponse() as response:
            assert response.status == 451
        connection.close()


class FileTunnel:
    """A dev edge with --config, and cloudflared."""

    def __init__(self, state: Path, file: Path, command: tuple[str, ...]) -> None:
        self._command = command
        self._edge = dev_edge(state, "--config", str(file))
        self._state = state

    def __enter__(self) -> tuple[Child, int, Path]:
        edge, listening = self._edge.__enter__()
        token_file = self._state / "token"
        token_file.write_text(edge_token(self._state))
        values = {"edge": listening["edge"], "ca": listening["ca"], "token_file": str(token_file)}
        self._connector = Child(*(part.format(**values) for part in self._command))
        self._connector.__enter__()
        return edge, int(listening["public"].rpartition(":")[2]), Path(listening["ca"])

    def __exit__(self, *error: object) -> None:
        self._connector.__exit__(None, None, None)
        self._edge.__exit__(None, None, None)


def test_requests(up: Tunnel) -> None:
    connection = visitor(up)
    connection.request("POST", "/p?x=%2F", body=b"hello", headers={"X-Own": "1", "Cf-Ray": "spoofed"})
    seen = json.loads(connection.getresponse().read())
    headers = {name.lower(): value for name, value in seen["headers"]}
    assert (seen["method"], seen["target"], seen["size"], headers["x-own"]) == ("POST", "/p?x=%2F", 5, "1")
    assert headers["cf-ray"] != "spoofed"
    assert headers["cf-connecting-ip"] == "127.0.0.1"
    connection.request(
        "PUT", "/upload", body=iter([b"ab", b"c"]), encode_chunked=True, headers={"Expect": "100-continue"}
    )
    assert json.loads(connection.getresponse().read())["size"] == 3
    connection.request("HEAD", "/")
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"")
    connection.close()


def test_a_large_body_up(up: Tunnel, protocol: str) -> None:
    size = SIZES[protocol]
    blocks = size // len(CHUNK)
    before = up.edge.memory()
    connection = visitor(up)
    body = (CHUNK for _ in range(blocks))
    connection.request("PUT", "/upload", body=body, headers={"Content-Length": str(size)})
    digest = hashlib.sha256()
    for _ in range(blocks):
        digest.update(CHUNK)
    assert json.loads(connection.getresponse().read()) == {"size": size, "sha256": digest.hexdigest()}
    connection.close()
    assert up.edge.memory("VmHWM") - before < 24 * MIB


def test_a_large_body_down(up: Tunnel, protocol: str) -> None:
    size = SIZES[protocol]
    before = up.edge.memory()
    connection = visitor(up)
    connection.request("GET", f"/download?size={size}&length=1")
    response = connection.getresponse()
    got, want = hashlib.sha256(), hashlib.sha256()
    while block := response.read(1 << 18):
        got.update(block)
    connection.close()
    for _ in range(size // len(CHUNK)):
        want.update(CHUNK)
    assert got.hexdigest() == want.hexdigest()
    assert up.edge.memory("VmHWM") - before < 24 * MIB


def test_hundreds_of_websockets(up: Tunnel, protocol: str) -> None:
    number = WEBSOCKETS[protocol]

    async def main() -> None:
        context = ssl.create_default_context(cafile=str(up.ca))
        gate = asyncio.Semaphore(50)
        all_open = asyncio.Barrier(number)

        async def one(n: int) -> None:
            async with gate:
                connection = await websockets.connect(
                    f"wss://localhost:{up.port}/ws",
                    ssl=context,
                    subprotocols=[websockets.Subprotocol("mqtt")],
                    open_timeout=60,
                )
            try:
                assert connection.subprotocol == "mqtt"
                await all_open.wait()
                await connection.send(f"{n}" * 50)
                assert await connection.recv() == f"{n}" * 50
            finally:
                await connection.close()

        async with asyncio.TaskGroup() as group:
            for n in range(number):
                group.create_task(one(n))

    run(main(), limit=100)


def test_an_abandoned_request_is_cancelled(up: Tunnel) -> None:
    connection = visitor(up)
    connection.request("GET", "/stall")
    request = up.edge.event("request", path="/stall")
    connection.close()
    assert up.edge.event("stream_closed", ray=request["ray"])["bytes_down"] == 0


def test_a_dead_origin_is_a_page(tmp_path: Path, command: tuple[str, ...]) -> None:
    with raw_origin(b"") as port, tunnel(tmp_path, f"http://127.0.0.1:{port}", command=command) as up:
        connection = visitor(up)
        connection.request("GET", "/")
        response = connection.getresponse()
        assert response.status == 502
        assert b"hop: connector to origin" in response.read()
        connection.close()


def test_a_truncated_response_is_seen_as_such(tmp_path: Path, command: tuple[str, ...]) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + bytes(50_000)  # more than cloudflared holds back
    with raw_origin(answer) as port, tunnel(tmp_path, f"http://127.0.0.1:{port}", command=command) as up:
        connection = visitor(up)
        connection.request("GET", "/")
        response = connection.getresponse()
        assert response.status == 200
        with pytest.raises((http.client.IncompleteRead, ConnectionError, ssl.SSLError)):
            response.read()
        response.close()
        connection.close()


@pytest.mark.broker
@pytest.mark.skipif(MOSQUITTO is None, reason="NO MOSQUITTO BINARY HERE: MQTT is not tested")
def test_mqtt(tmp_path: Path, command: tuple[str, ...]) -> None:
    state = tmp_path / "state"
    state.mkdir()
    with mosquitto(tmp_path) as port, tunnel(state, f"http://127.0.0.1:{port}", command=command) as up:
        subscribed, done = threading.Event(), threading.Event()
        got: list[bytes] = []
        payloads = [b"small", b"x" * 50_000, *(b"%d" % i for i in range(100))]
        client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5, transport="websockets")
        client.tls_set(ca_certs=str(up.ca))
        client.username_pw_set("u", "p")

        def on_connect(*_: object) -> None:
            client.subscribe("t/#", qos=1)

        client.on_connect = on_connect
        client.on_subscribe = lambda *_: subscribed.set()

        def on_message(_client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
            got.append(bytes(message.payload))
            if len(got) == len(payloads):
                done.set()

        client.on_message = on_message
        client.connect("localhost", up.port)
        client.loop_start()
        try:
            assert subscribed.wait(20)
            for payload in payloads:
                client.publish("t/1", payload, qos=1)
            assert done.wait(30), len(got)
            assert got == payloads
        finally:
            client.disconnect()
            client.loop_stop()


def test_sigterm_drains(tmp_path: Path, command: tuple[str, ...]) -> None:
    with http_origin() as port, tunnel(tmp_path, f"http://127.0.0.1:{port}", command=command) as up:
        connection = visitor(up)
        connection.putrequest("PUT", "/upload")
        connection.putheader("Content-Length", "10")
        connection.endheaders()
        connection.send(b"01234")
        up.edge.event("request", path="/upload")
        up.connector.signal(signal.SIGTERM)
        up.edge.event("unregistered")
        connection.send(b"56789")
        assert json.loads(connection.getresponse().read())["size"] == 10
        connection.close()
        assert up.connector.wait() == 0
        assert up.edge.event("disconnected")["error"] is None


@pytest.mark.parametrize("fault", ["registration=EDUPCONN*1", "registration=unauthorized*1"])
def test_refusals_are_survived(tmp_path: Path, command: tuple[str, ...], fault: str) -> None:
    with tunnel(tmp_path, "http_status:200", command=command, edge_args=("--fault", fault)) as up:
        assert [event["event"] for event in up.edge.events if event["event"].startswith("regist")] == [
            "register_refused",
            "registered",
        ]


def test_goaway_is_survived(tmp_path: Path, command: tuple[str, ...]) -> None:
    with tunnel(tmp_path, "http_status:200", command=command, edge_args=("--fault", "goaway-after:0.5")) as up:
        up.edge.event("disconnected")
        up.edge.event("registered", limit=40)
