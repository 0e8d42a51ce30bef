"""Management: who may ask, what is answered, and the log stream's rules."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable, Coroutine
from typing import Any
from uuid import UUID

import pytest

from connector.app import log_stream
from connector.app.answers import text_answer
from connector.app.config import RunConfig
from connector.app.logs import Logger, LogOutput
from connector.app.management import Management, read_token
from connector.protocol.ports import Headers, Request, RequestKind
from connector.wire.token import Token
from connector.wire.ws_messages import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    Message,
    MessageReader,
    accept_value,
    encode_close,
    encode_frame,
)
from tests.support.aio import run, until
from tests.support.memory_port import MemoryPort

HOST = b"management.argotunnel.com"
KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
CONNECTOR = UUID("11223344-5566-4778-899a-abbccddeeff0")


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def token(actor: str = "me", *, alg: str = "ES256", **claims: Any) -> str:
    body = {"tun": {"id": "t", "account_tag": "a"}, "actor": {"id": actor}, **claims}
    return f"{part({'alg': alg})}.{part(body)}.c2ln"


class Rig:
    def __init__(self, **settings: Any) -> None:
        self.stream = io.StringIO()
        self.log = Logger(LogOutput(level="error", stream=self.stream, wall_clock=lambda: 1_787_220_000.0))
        config = RunConfig(Token("a" * 32, b"s" * 32, UUID(int=1)))
        for name, value in settings.items():
            setattr(config, name, value)

        async def metrics(_: Any) -> Any:
            return text_answer("metrics")

        self.it = Management(
            config, CONNECTOR, self.log, metrics=metrics, profiles={"/debug/pprof/heap": lambda _: text_answer("heap")}
        )

    def ask(
        self, path: str, *, method: str = "GET", headers: Headers = (), kind: RequestKind = RequestKind.HTTP,
        access: str | None = None,
    ) -> MemoryPort:  # fmt: skip
        target = f"{path}?access_token={token() if access is None else access}"
        request = Request(kind, method.encode(), target.encode(), HOST, headers, -1)
        port = MemoryPort()
        port.sink = self.it.accept(request, port)
        return port

    def socket(self, actor: str = "me", headers: Headers = ()) -> Client:
        port = self.ask(
            "/logs", headers=((b"sec-websocket-key", KEY), *headers), kind=RequestKind.WEBSOCKET, access=token(actor)
        )
        return Client(port)


class Client:
    """The far end of a log stream."""

    def __init__(self, port: MemoryPort) -> None:
        self.port = port
        deflate = port.header(b"Sec-Websocket-Extensions") is not None
        self.reader = MessageReader(masked=False, limit=1 << 20, deflate=deflate)
        self.read = 0

    def send(self, value: Any) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.port.send(encode_frame(TEXT, data, mask=b"abcd"))

    def messages(self) -> list[Message]:
        data = bytes(self.port.body[self.read :])
        self.read += len(data)
        return self.reader.receive(data)

    def events(self) -> list[dict[str, Any]]:
        return [event for m in self.messages() if m.opcode == TEXT for event in json.loads(m.data)["logs"]]

    def closed(self) -> tuple[int, str]:
        (message,) = [m for m in self.messages() if m.opcode == CLOSE]
        assert self.port.ended
        return message.code, message.data.decode()


def managed(body: Callable[[Rig], Coroutine[Any, Any, None]], **settings: Any) -> None:
    async def main() -> None:
        rig = Rig(**settings)
        try:
            await body(rig)
        finally:
            await rig.it.close()
        assert not rig.it.streams.sessions
        assert not rig.log.output.enabled("debug")

    run(main())


@pytest.mark.parametrize(
    "access",
    ["", "x", "a.b.c", token(alg="HS256"), token(actor=""), token(tun={"id": "t"}), token(tun=[]), token(actor={}),
     f"{part([])}.{part({})}.x", token() + ".more", "é.é.é"],
)  # fmt: skip
def test_without_a_proper_token_there_is_nothing(access: str) -> None:
    async def body(rig: Rig) -> None:
        for path in ("/ping", "/logs", "/metrics", "/nothing"):
            port = rig.ask(path, access=access)
            assert port.status == 400
            assert json.loads(port.body) == {
                "errors": [{"code": 1001, "message": "missing access_token query parameter"}]
            }
            assert port.header(b"content-type") == b"application/json"

    managed(body)
    assert read_token(token("somebody")) is not None


def test_routes_and_methods() -> None:
    async def body(rig: Rig) -> None:
        assert (rig.ask("/ping").status, bytes(rig.ask("/ping").body)) == (200, b"")
        assert rig.ask("/ping", method="HEAD").status == 200
        assert rig.ask("/ping", method="POST").status == rig.ask("/host_details", method="HEAD").status == 405
        assert rig.ask("/nothing").status == 404
        assert rig.ask("/debug/pprof/cmdline").status == 404
        assert bytes(rig.ask("/debug/pprof/heap").body) == b"heap"
        assert await rig.ask("/metrics").whole() == b"metrics"
        details = json.loads(rig.ask("/host_details").body)
        assert (details["connector_id"], details["hostname"]) == (str(CONNECTOR), "custom:shed")
        assert details["ip"] == "127.0.0.1"

    managed(body, label="shed", service_op="127.0.0.1:80")


def test_diagnostics_can_be_closed() -> None:
    async def body(rig: Rig) -> None:
        assert rig.ask("/metrics").status == rig.ask("/debug/pprof/heap").status == 404
        assert rig.ask("/ping").status == 200

    managed(body, management_diagnostics=False)


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [(b"https://dash.cloudflare.com", True), (b"http://dash.cloudflare.com", False), (b"https://evil.example", False),
     (b"https://cloudflare.com.evil.example", False), (b"", False)],
)  # fmt: skip
def test_cross_origin_reading(origin: bytes, allowed: bool) -> None:
    async def body(rig: Rig) -> None:
        port = rig.ask("/ping", headers=((b"origin", origin),) if origin else ())
        assert port.header(b"vary") == b"Origin"
        assert port.header(b"access-control-allow-origin") == (origin if allowed else None)
        assert port.header(b"access-control-allow-credentials") == (b"true" if allowed else None)

    managed(body)


@pytest.mark.parametrize(
    ("origin", "status"),
    [(b"", 101), (b"https://dash.cloudflare.com", 101), (b"https://" + HOST, 101), (b"https://evil.example", 403)],
)
def test_the_handshake(origin: bytes, status: int) -> None:
    async def body(rig: Rig) -> None:
        client = rig.socket(headers=((b"origin", origin),) if origin else ())
        assert client.port.status == status
        if status == 101:
            assert client.port.header(b"sec-websocket-accept") == accept_value(KEY)
        assert rig.ask("/logs").status == 426
        wrong = ((b"sec-websocket-key", KEY), (b"sec-websocket-version", b"8"))
        assert rig.ask("/logs", headers=wrong, kind=RequestKind.WEBSOCKET).status == 400

    managed(body)


@pytest.mark.parametrize("extension", [b"", b"permessage-deflate; client_max_window_bits"])
def test_events_are_streamed_whatever_the_level(extension: bytes) -> None:
    async def body(rig: Rig) -> None:
        client = rig.socket(headers=((b"sec-websocket-extensions", extension),) if extension else ())
        assert (client.port.header(b"sec-websocket-extensions") is not None) is bool(extension)
        rig.log.info("before")
        client.send({"type": "start_streaming"})
        rig.log.debug("fine detail", connIndex=1, event=1)
        rig.log.info("", error="broke")
        await until(lambda: len(client.port.body) > 100)
        await asyncio.sleep(0)
        started, detail, broken = client.events()
        assert started["message"] == "Streaming logs"
        assert detail == {
            "time": "2026-08-20T10:00:00Z", "message": "fine detail", "event": "http", "fields": {"connIndex": 1},
        }  # fmt: skip
        assert broken == {"time": "2026-08-20T10:00:00Z", "level": "error", "fields": {"error": "broke"}}
        client.send({"type": "stop_streaming"})
        rig.log.warn("after")
        await asyncio.sleep(0)
        assert client.events() == []
        assert not client.port.ended

    managed(body)


def test_secrets_do_not_reach_the_stream() -> None:
    async def body(rig: Rig) -> None:
        rig.log.output.redactor.add("hunter2hunter2")
        client = rig.socket()
        client.send({"type": "start_streaming"})
        rig.log.error("x", error=f"hunter2hunter2 {token()}")
        await asyncio.sleep(0)
        assert client.events()[-1]["fields"]["error"] == "***** *****"

    managed(body)


def test_filters() -> None:
    async def body(rig: Rig) -> None:
        client = rig.socket()
        client.send({"type": "start_streaming", "filters": {"events": ["http", "tcp"], "level": "warn"}})
        for level in ("debug", "info", "warn", "error"):
            for event in range(4):
                rig.log.log(level, level, event=event)
        await asyncio.sleep(0)
        assert [(e["level"], e["event"]) for e in client.events()] == [
            ("warn", "http"), ("warn", "tcp"), ("error", "http"), ("error", "tcp"),
        ]  # fmt: skip
        client.send({"type": "start_streaming", "filters": {"sampling": 0.5, "events": ["udp"]}})
        seen = 0
        for _ in range(50):
            for _ in range(20):
                rig.log.info("x", event=3)
            await asyncio.sleep(0)
            seen += len(client.events())
        assert 350 < seen < 650

    managed(body)


def test_what_does_not_fit_the_window_is_dropped() -> None:
    async def body(rig: Rig) -> None:
        client = rig.socket()
        client.send({"type": "start_streaming"})
        await asyncio.sleep(0)
        client.events()
        for number in range(100):
            rig.log.info(str(number))
        await asyncio.sleep(0)
        assert [e["message"] for e in client.events()] == [str(number) for number in range(log_stream.WINDOW)]
        client.port.pause()
        for number in range(100):
            rig.log.info(str(number))
            await asyncio.sleep(0)
        assert client.events() == []
        client.port.take()
        await asyncio.sleep(0)
        assert len(client.events()) == log_stream.WINDOW

    managed(body)


def test_one_person_streams_at_a_time() -> None:
    async def body(rig: Rig) -> None:
        first = rig.socket("me")
        first.send({"type": "start_streaming"})
        other = rig.socket("you")
        other.send({"type": "start_streaming"})
        assert other.closed() == (4002, "limit exceeded for streaming sessions")
        again = rig.socket("me")
        again.send({"type": "start_streaming"})
        await asyncio.sleep(0)
        assert first.closed() == (1000, "context closed")
        rig.log.info("goes on")
        await asyncio.sleep(0)
        assert again.events()[-1]["message"] == "goes on"
        again.port.peer_reset()
        third = rig.socket("you")
        third.send({"type": "start_streaming"})
        assert not third.port.ended

    managed(body)


@pytest.mark.parametrize(
    ("sent", "code", "reason"),
    [
        ({"type": "dance"}, 1003, "invalid client message type was provided: dance"),
        ({}, 1003, "invalid message type was provided"),
        ([], 1003, "invalid message type was provided"),
        ({"type": "start_streaming", "filters": {"level": "loud"}}, 4001, "expected start streaming as first event"),
        ({"type": "start_streaming", "filters": {"events": "http"}}, 4001, "expected start streaming as first event"),
        ({"type": "start_streaming", "filters": {"sampling": "x"}}, 4001, "expected start streaming as first event"),
    ],
)
def test_wrong_messages(sent: Any, code: int, reason: str) -> None:
    async def body(rig: Rig) -> None:
        client = rig.socket()
        client.send(sent)
        assert client.closed() == (code, reason)

    managed(body)


def test_wrong_frames_pings_and_goodbyes() -> None:
    async def body(rig: Rig) -> None:
        client = rig.socket()
        client.send(b"no json")
        assert client.closed()[0] == 1003
        client = rig.socket()
        client.port.send(encode_frame(BINARY, b"x", mask=b"abcd"))
        assert client.closed() == (1003, "invalid message type was provided")
        client = rig.socket()
        client.port.send(encode_frame(TEXT, b"x"))
        assert client.closed()[0] == 1002
        client = rig.socket()
        client.port.send(encode_frame(TEXT, bytes(40_000), mask=b"abcd"))
        assert client.closed()[0] == 1009
        client = rig.socket()
        client.port.send(encode_frame(PING, b"hi", mask=b"abcd"))
        assert client.messages() == [Message(PONG, b"hi")]
        client.port.send(encode_close(1000, "bye", mask=b"abcd"))
        assert client.closed() == (1000, "")
        client = rig.socket()
        client.port.send_eof()
        assert client.port.ended

    managed(body)


def test_who_does_not_stream_is_closed_and_pinged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_stream, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(log_stream, "PING_SECONDS", 0.02)

    async def body(rig: Rig) -> None:
        client = rig.socket()
        await until(lambda: client.port.ended)
        messages = client.messages()
        assert messages[0] == Message(PING)
        assert messages[-1] == Message(CLOSE, b"session was idle for too long", 4003)
        streaming = rig.socket()
        streaming.send({"type": "start_streaming"})
        await asyncio.sleep(0.5)
        assert not streaming.port.ended

    managed(body)
