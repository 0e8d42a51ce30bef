"""Traffic for the inspector without a network: a link, a registration, an HTTP exchange, an MQTT session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from connector.inspector.hub import Inspector
from connector.inspector.links import LinkRecord
from connector.protocol.ports import (
    Buffer,
    Headers,
    Request,
    RequestKind,
    ResetCode,
    ResponseSource,
    StreamPort,
    StreamSink,
)
from connector.wire import mqtt, websocket
from connector.wire.h2_frames import DATA, FLAG_END_HEADERS, HEADERS, PREFACE, encode_frame, encode_settings
from connector.wire.h2_hpack import hpack_literal
from connector.wire.mqtt_encode import encode_packet
from tests.support.vectors import vector

SECRETS = [
    b"MQTT-PASSWORD-1", b"BEARER-SECRET-1", b"COOKIE-SECRET-1", b"QUERY-SECRET-1", b"BODY-SECRET-1",
    b"SET-COOKIE-SECRET-1", b"FORM-SECRET-1", b"TOPIC-SECRET-1", bytes(range(32)),
]  # fmt: skip
"""Everything that `play_everything` says and no capture may hold; the last is the tunnel secret of the vectors."""


class Later:
    """Stands in for `loop.call_later`: nothing is due before the writer closes."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def __call__(self, seconds: float, call: Callable[[], None]) -> None:
        self.calls.append(call)


class Port:
    """A StreamPort that remembers the order of calls."""

    stream_id = 3

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.spans = b""

    def respond(
        self, status: int, headers: Headers, source: ResponseSource = ResponseSource.ORIGIN, reason: bytes = b""
    ) -> None:
        self.calls.append(("respond", status))

    def write(self, data: Buffer) -> None:
        self.calls.append(("write", bytes(data)))

    def write_eof(self, trailers: Headers = ()) -> None:
        self.calls.append(("write_eof",))

    def reset(self, code: ResetCode) -> None:
        self.calls.append(("reset", code))

    def stop_reading(self) -> None:
        self.calls.append(("stop_reading",))

    def consumed(self, n: int) -> None:
        self.calls.append(("consumed", n))

    def traffic(self) -> tuple[int, int]:
        return 0, 0


class Sink:
    """A StreamSink that remembers, and the port that it was given."""

    def __init__(self) -> None:
        self.port: StreamPort | None = None
        self.calls: list[tuple[Any, ...]] = []

    def on_data(self, data: Buffer) -> None:
        self.calls.append(("data", bytes(data)))

    def on_eof(self) -> None:
        self.calls.append(("eof",))

    def on_reset(self, error: BaseException | None) -> None:
        self.calls.append(("reset", str(error)))

    def pause_writing(self) -> None:
        self.calls.append(("pause",))

    def resume_writing(self) -> None:
        self.calls.append(("resume",))


def open_stream(link: LinkRecord, request: Request) -> tuple[StreamSink, StreamPort, Port, Sink]:
    """Let `request` come over `link`: what the transport holds, what the proxy holds, and the real ends."""
    sink, port = Sink(), Port()

    def accept(request: Request, given: StreamPort) -> StreamSink:
        sink.port = given
        return sink

    outer = link.acceptor(accept)(request, port)
    assert sink.port is not None
    return outer, sink.port, port, sink


def websocket_request(path: bytes = b"/mqtt") -> Request:
    return Request(
        RequestKind.WEBSOCKET, b"GET", path, b"mqtt.example.com",
        [(b"sec-websocket-protocol", b"mqtt"), (b"cf-connecting-ip", b"203.0.113.9"), (b"cf-ray", b"abc-FRA")],
    )  # fmt: skip


def up(payload: bytes, *, fin: bool = True, opcode: int = websocket.BINARY) -> bytes:
    return websocket.encode_frame(websocket.Frame(opcode, payload, fin=fin, mask=b"\x11\x22\x33\x44"))


def down(payload: bytes, *, opcode: int = websocket.BINARY) -> bytes:
    return websocket.encode_frame(websocket.Frame(opcode, payload))


def connect(client_id: str = "sensor-1", keep_alive: int = 30, **fields: Any) -> bytes:
    return encode_packet(
        mqtt.CONNECT,
        {"client_id": client_id, "keep_alive": keep_alive, "username": "alice", "password": SECRETS[0], **fields},
    )


def packet(name: str, version: int = mqtt.V311, **fields: Any) -> bytes:
    return encode_packet(mqtt.KINDS[name], fields, version)


def play_http(link: LinkRecord) -> None:
    request = Request(
        RequestKind.HTTP, b"POST", b"/a?access_token=QUERY-SECRET-1&b=2", b"web.example.com",
        [
            (b"authorization", b"Bearer BEARER-SECRET-1"), (b"cookie", b"a=COOKIE-SECRET-1"),
            (b"content-type", b"application/x-www-form-urlencoded"), (b"cf-ray", b"def-FRA"),
        ],
    )  # fmt: skip
    sink, port, _, _ = open_stream(link, request)
    sink.on_data(b"user=a&password=FORM-")
    sink.on_data(b"SECRET-1&c=d")
    sink.on_eof()
    port.respond(200, [(b"Content-Type", b"application/json"), (b"Set-Cookie", b"s=SET-COOKIE-SECRET-1")])
    port.write(b'{"hello": 1, "api_key": "BODY-')
    port.write(b'SECRET-1"}')
    port.write_eof()


def play_mqtt(link: LinkRecord, *, end: bool = True) -> tuple[StreamSink, StreamPort]:
    sink, port, _, _ = open_stream(link, websocket_request())
    port.respond(101, [(b"Upgrade", b"websocket"), (b"Sec-WebSocket-Protocol", b"mqtt")])
    hello = connect()
    for part in (hello[:20], hello[20:31], hello[31:]):  # the password begins in one frame and ends in another
        sink.on_data(up(part))
    port.write(down(packet("CONNACK", session_present=False, reason=0)))
    sink.on_data(up(packet("PUBLISH", topic="a/b", payload=b'{"token":"TOPIC-SECRET-1"}', qos=1, packet_id=1)))
    port.write(down(packet("PUBACK", packet_id=1)))
    if end:
        sink.on_data(up(packet("DISCONNECT")))
        sink.on_eof()
        port.write_eof()
    return sink, port


def play_control(link: LinkRecord) -> None:
    """A control stream in HTTP/2 frames, with the registration in it."""
    block = hpack_literal(b"cf-cloudflared-proxy-connection-upgrade", b"control-stream")
    link.on_bytes(False, PREFACE + encode_settings([(4, 65_535)]) + encode_frame(HEADERS, FLAG_END_HEADERS, 1, block))
    call = vector("rpc_bootstrap_q0") + vector("rpc_call_registerConnection_q1")
    link.on_bytes(True, encode_settings([]) + encode_frame(DATA, 0, 1, call[:300]))
    link.on_bytes(True, encode_frame(DATA, 0, 1, call[300:]))
    link.on_bytes(False, encode_frame(DATA, 0, 1, vector("rpc_return_registerConnection_details")))
    block = hpack_literal(b"authorization", b"Bearer BEARER-SECRET-1")
    link.on_bytes(False, encode_frame(HEADERS, FLAG_END_HEADERS, 3, block))


def play_everything(hub: Inspector) -> LinkRecord:
    link = hub.open_link("http2", "192.0.2.7:7844", 0)
    play_control(link)
    play_http(link)
    play_mqtt(link)
    hub.on_event("log", {"message": "Registered tunnel connection", "connIndex": 0})
    link.on_closed(None)
    return link
