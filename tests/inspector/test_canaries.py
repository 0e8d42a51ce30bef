"""A distinct secret in every place where one can be, with a telling name and without; no byte of any export has one.

Looked for are the secret itself, and its hexadecimal and base64 forms at every alignment.
"""

from __future__ import annotations

import base64
import json
import random
import string
import uuid
from collections.abc import Iterator

import pytest

from connector.app.tui import describe
from connector.inspector.capture import CaptureWriter, read_bytes, read_capture, write_items
from connector.inspector.capture_commands import FORMATS, export_bytes
from connector.inspector.decode import decode
from connector.inspector.hub import Inspector
from connector.inspector.snapshot import load_items, snapshot_items
from connector.inspector.snippets import snippet
from connector.inspector.streams import BODY_KEPT
from connector.inspector.wire_commands import as_dump, as_json
from connector.protocol.ports import Request, RequestKind
from connector.wire import mqtt, websocket
from connector.wire.connect import encode_connect_request
from connector.wire.h2_frames import FLAG_END_HEADERS, HEADERS, encode_frame
from connector.wire.h2_headers import RESPONSE_HEADERS, encode_serialised_headers
from connector.wire.h2_hpack import hpack_literal
from connector.wire.token import Token, encode_token
from tests.inspector.traffic import Later, connect, down, open_stream, packet, play_control, up, websocket_request


class Canaries:
    """Makes secrets, and knows what it made. `word`: like a password that a person chose; `random`: like a token."""

    def __init__(self) -> None:
        self._rng = random.Random(7)
        self.made: dict[str, bytes] = {}

    def random(self, place: str, size: int = 40) -> bytes:
        return self._keep(place, "".join(self._rng.choices(string.ascii_letters + string.digits, k=size)).encode())

    def hex(self, place: str) -> bytes:
        return self._keep(place, self._rng.randbytes(20).hex().encode())

    def word(self, place: str) -> bytes:
        return self._keep(place, f"canary-in-{place.replace(' ', '-').replace('/', '-')}".encode())

    def jwt(self, place: str) -> bytes:
        parts = (b'{"alg":"HS256"}', f'{{"sub":"{place}"}}'.encode(), self._rng.randbytes(32))
        return self._keep(place, b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts))

    def _keep(self, place: str, secret: bytes) -> bytes:
        assert place not in self.made
        self.made[place] = secret
        return secret

    def found(self, data: bytes) -> list[str]:
        """Name the places whose secret is in `data`."""
        compact = data.replace(b" ", b"")
        return [
            place for place, secret in self.made.items()
            if any(form in data or form in compact for form in _forms(secret))
        ]  # fmt: skip


def _forms(secret: bytes) -> Iterator[bytes]:
    yield secret
    yield secret.hex().encode()
    for shift in range(3):  # base64 of something that has the secret in it
        text = base64.b64encode(b"\0" * shift + secret)
        yield text[(0, 2, 3)[shift] : len(text) - 4]


def play(hub: Inspector, made: Canaries) -> None:
    for protocol in ("http2", "quic"):
        link = hub.open_link(protocol, "192.0.2.7:7844", 0)
        if protocol == "http2":
            play_control(link)
        name = f"over {protocol} "
        headers = [
            (b"authorization", b"Basic " + base64.b64encode(b"user:" + made.word(name + "basic"))),
            (b"proxy-authorization", b"Bearer " + made.word(name + "bearer")),
            (b"cookie", b"theme=dark; sid=" + made.word(name + "cookie")),
            (b"x-access-key", made.word(name + "access key")),
            (b"x-odd", made.random(name + "odd header")), (b"x-odder", b"v1 " + made.jwt(name + "jwt") + b" end"),
            (b"x-hex", made.hex(name + "hex header")), (b"x-github", b"ghp_" + made.random(name + "known kind", 36)),
            (b"referer", b"https://u:" + made.word(name + "referer") + b"@h/?q=" + made.random(name + "referer query")),
            (b"sec-websocket-protocol", b"mqtt, bearer." + made.random(name + "subprotocol")),
            (b"content-type", b"multipart/form-data; boundary=XYZ"), (b"cf-ray", b"91ffb152111c0c20-DEV"),
        ]  # fmt: skip
        target = (
            b"/hooks/" + made.random(name + "path") + b"/go?token=" + made.word(name + "query")
            + b"&n=" + made.random(name + "query without name")
            + b"&u=ftp://u:" + made.word(name + "url in query") + b"@h"
        )  # fmt: skip
        body = (
            b'--XYZ\r\nContent-Disposition: form-data; name="password"\r\n\r\n' + made.word(name + "form part")
            + b"\r\n--XYZ--\r\n<user><password type='x'>" + made.word(name + "xml") + b"</password></user>\r\n"
            + b"user=a&pwd=" + made.word(name + "form") + b"&x=" + made.random(name + "form without name")
            + b" postgres://u:" + made.word(name + "database url") + b"@db/x"
        )  # fmt: skip
        request = Request(RequestKind.HTTP, b"POST", target, b"web.example.com", headers)
        if protocol == "http2":
            block = b"".join(hpack_literal(key, value) for key, value in [(b":path", target), *headers])
            link.on_bytes(False, encode_frame(HEADERS, FLAG_END_HEADERS, 5, block))
        else:
            fields = [(b"HttpHeader:" + key, value) for key, value in headers]
            opening = b"\x0a\x36\xcd\x12\xa1\x3e01" + encode_connect_request(
                0, b"https://web.example.com" + target, fields
            )
            for part in (opening[:100], opening[100:], body):
                link.on_stream_bytes(4, False, part, False)
        sink, port, _, _ = open_stream(link, request)
        for start in range(0, len(body), 37):
            sink.on_data(body[start : start + 37])
        sink.on_eof()
        answer = [
            (b"Set-Cookie", b"sid=" + made.word(name + "set-cookie") + b"; Path=/"),
            (b"Location", b"/next?code=" + made.word(name + "location")), (b"Content-Type", b"application/json"),
        ]  # fmt: skip
        if protocol == "http2":
            block = hpack_literal(RESPONSE_HEADERS, encode_serialised_headers(answer))
            link.on_bytes(True, encode_frame(HEADERS, FLAG_END_HEADERS, 5, block))
        port.respond(200, answer)
        port.write(
            b'{"data":"' + made.random(name + "json without name") + b'","a":{"refreshToken":"'
            + made.word(name + "json") + b'"},"b64":"' + base64.b64encode(made.random(name + "base64", 41)) + b'"}'
        )  # fmt: skip
        port.write_eof([(b"x-signature", made.word(name + "trailer"))])
        # A body that is cut where a secret begins.
        sink, port, _, _ = open_stream(link, Request(RequestKind.HTTP, b"GET", b"/", b"web.example.com", []))
        port.respond(200, [])
        port.write(b" " * (BODY_KEPT - 30) + made.random(name + "cut body", 60)[:30] + b"rest")
        made.made[name + "cut body"] = made.made[name + "cut body"][:18]
        port.write_eof()
        play_mqtt(hub, made, name, mqtt.V311)
        play_mqtt(hub, made, name + "5 ", mqtt.V5)
        play_text(hub, made, name)
    secret = made.random("tunnel secret", 32)
    token = encode_token(Token("0" * 32, secret, uuid.UUID(int=7), ""))
    made.made["tunnel token"] = token.encode()[:60]
    hub.on_event("log", {"message": f"started with {token}", "url": f"https://u:{made.word('event').decode()}@h/"})
    hub.on_configuration(3, json.dumps({"ingress": [{"service": f"http://u:{made.word('configuration').decode()}@h"}]}))


def play_mqtt(hub: Inspector, made: Canaries, name: str, version: int) -> None:
    link = next(reversed(hub.links.values()))
    sink, port, _, _ = open_stream(link, websocket_request(b"/mqtt?access_token=" + made.word(name + "upgrade query")))
    port.respond(101, [(b"Upgrade", b"websocket")])
    properties = {}
    if version == mqtt.V5:
        properties = {
            "authentication_method": "x", "authentication_data": made.word(name + "auth data"),
            "user_property": [["token", made.word(name + "user property").decode()],
                              ["x", made.random(name + "user property without name").decode()]],
        }  # fmt: skip
    hello = connect(
        "sensor-1", version=version, username=made.random(name + "mqtt user").decode(), properties=properties,
        password=made.word(name + "mqtt password"),
        will={"topic": "gone", "payload": b'{"key":"' + made.word(name + "will") + b'"}', "qos": 0, "retain": False},
    )  # fmt: skip
    for start in range(0, len(hello), 23):  # the frames cut every secret
        sink.on_data(up(hello[start : start + 23]))
    port.write(down(packet("CONNACK", version, session_present=False, reason=0)))
    if version == mqtt.V5:
        sink.on_data(
            up(packet("AUTH", version, reason=24, properties={"authentication_data": made.word(name + "auth")}))
        )
        more = {"properties": {"user_property": [["password", made.word(name + "published property").decode()]]}}
    else:
        more = {}
    topic = f"v1/{made.random(name + 'topic', 20).decode()}/up"
    payload = b'{"token":"' + made.word(name + "payload") + b'","v":"' + made.random(name + "plain payload") + b'"}'
    sink.on_data(up(packet("PUBLISH", version, topic=topic, payload=payload, qos=1, packet_id=1, **more)))
    sink.on_data(up(packet("SUBSCRIBE", version, packet_id=2, filters=[{"topic": topic, "qos": 0}])))
    port.write(down(packet("SUBACK", version, packet_id=2, reasons=[0])))
    long = b"x" * 990 + b" " + made.random(name + "long payload", 60)
    made.made[name + "long payload"] = long[991:1_009]  # what would be kept of it
    sink.on_data(up(packet("PUBLISH", version, topic="t", payload=long)))


def play_text(hub: Inspector, made: Canaries, name: str) -> None:
    """Text messages, one in pieces, and a close frame that says too much."""
    link = next(reversed(hub.links.values()))
    sink, port, _, _ = open_stream(link, websocket_request(b"/chat"))
    port.respond(101, [(b"Upgrade", b"websocket")])
    sink.on_data(up(b'{"password":"' + made.word(name + "text frame") + b'"}', opcode=websocket.TEXT))
    whole = b"hello " + made.random(name + "text in pieces")
    sink.on_data(up(whole[:20], fin=False, opcode=websocket.TEXT))
    sink.on_data(up(whole[20:], opcode=websocket.CONTINUATION))
    port.write(down(b"\x03\xe8bye " + made.random(name + "close reason"), opcode=websocket.CLOSE))
    sink.on_eof()
    port.write_eof()


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Canaries, Inspector, bytes, bytes]:
    made, hub = Canaries(), Inspector("connector")
    path = tmp_path_factory.mktemp("canaries") / "x.capture"
    writer = CaptureWriter(str(path), hub, Later())
    hub.recorders.append(writer.record)
    play(hub, made)
    writer.close()
    assert len(made.made) > 90
    return made, hub, path.read_bytes(), write_items(read_capture(str(path))[1], redacted=True)


def test_the_recording(played: tuple[Canaries, Inspector, bytes, bytes]) -> None:
    made, hub, data, again = played
    assert made.found(data) == made.found(again) == []
    assert made.found(write_items(snapshot_items(hub), redacted=True)) == []


@pytest.mark.parametrize("form", FORMATS)
def test_every_export(played: tuple[Canaries, Inspector, bytes, bytes], form: str) -> None:
    made, hub, _, _ = played
    assert made.found(export_bytes(snapshot_items(hub), form)) == []


def test_what_the_page_and_the_terminal_get(played: tuple[Canaries, Inspector, bytes, bytes]) -> None:
    made, live, _, again = played
    loaded = Inspector("capture")
    load_items(loaded, read_bytes(again)[1])
    for hub in (live, loaded):
        told: list[object] = [
            hub.rows(),
            hub.sessions(),
            hub.topics.rows(1e9),
            list(hub.events),
            list(hub.configurations),
        ]
        for record in hub.streams.values():
            frames = hub.frames(record, 0, 10_000)
            told += [record.detail(), frames, describe(record.detail(), frames)]
            told += [snippet(record, kind) for kind in ("curl", "pytest")]
            if record.frames is not None and record.frames.mqtt is not None:
                told.append(snippet(record, "mosquitto_pub"))
        for link in hub.links.values():
            told += [link.summary(), link.rows(0, 10_000)]
        told += [row.row(full=True) for row in hub.control]
        assert made.found(json.dumps(told, ensure_ascii=False).encode()) == []
        assert made.found(json.dumps(told).replace("\\", "").encode()) == []


def test_the_canaries_would_be_found() -> None:
    made, hub = Canaries(), Inspector("connector", no_redact=True)
    play(hub, made)
    data = write_items(snapshot_items(hub), redacted=False)
    joined = b"".join(entry.payload for record in hub.streams.values() if record.frames for entry in record.frames.ring)
    assert set(made.made) - set(made.found(data + joined)) == {"tunnel secret"}  # base64 of base64, in the token


def test_decode() -> None:
    made = Canaries()
    fields = [
        (b"Authorization", b"Bearer " + made.word("serialised")), (b"x-odd", made.random("serialised odd")),
        (b"accept", b"*/*"),
    ]  # fmt: skip
    metadata = [(b"HttpHeader:" + name, value + b"2") for name, value in fields]
    inputs = [
        ("headers", encode_serialised_headers(fields)),
        ("connect-request", b"\x0a\x36\xcd\x12\xa1\x3e01" + encode_connect_request(
            0, b"https://h/?token=" + made.word("dest"), metadata)),
        ("h2", encode_frame(HEADERS, FLAG_END_HEADERS, 1, b"".join(hpack_literal(*field) for field in fields))),
        ("mqtt", connect(password=made.word("password"))),
        ("mqtt", packet("PUBLISH", mqtt.V5, topic="t", payload=b"", properties={
            "user_property": [["token", made.word("property").decode()]]})),
        ("websocket", up(b'{"password":"' + made.word("text") + b'"}', opcode=websocket.TEXT)),
    ]  # fmt: skip
    for form, data in inputs:
        found = decode(data, form)
        assert made.found(as_dump(found, False).encode()) == [], form
        assert made.found(as_json(found, False).encode()) == [], form
        assert made.found((as_dump(found, True) + as_json(found, True)).encode()), form
