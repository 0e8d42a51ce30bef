"""An ASGI application as an origin, in this process: no socket, no HTTP/1.1 in between (asgi.readthedocs.io, 3.0).

Owns: AsgiSite (one application: its lifespan and running requests), AsgiExchange (one HTTP request), AsgiWebSocket.
In: calls of StreamSink; the application's `send`. Out: the application's `receive`; answers on the StreamPort.
Never: gives the edge credit for a byte that the application has not received; ends an application that is done soon
after its eyeball left.

*Strategy*: ASGI's interface is a coroutine per request, so this is the one origin that costs a task per stream. `send`
waits while the edge takes no more, `receive` gives credit, so that both directions are slowed by the slower end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from connector.errors import ConnectorError, OriginError, WireError
from connector.protocol.ports import Buffer, Request, RequestKind, ResetCode, StreamPort
from connector.proxy.carrier import answer_close
from connector.proxy.exchange import Owner
from connector.proxy.ingress import Rule
from connector.proxy.tcp import switch_headers
from connector.proxy.watch import RequestTrace
from connector.wire.ws_stream import (
    BINARY,
    CLOSE,
    GOING_AWAY,
    NORMAL,
    PING,
    PONG,
    PROTOCOL_FAILURE,
    TEXT,
    ClientFrames,
    close_frame,
    encode_frame,
)

Message = MutableMapping[str, Any]
Application = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

MAX_MESSAGE: Final = 16 * 1024 * 1024
"""Bytes of a WebSocket message, which ASGI hands over whole. Precedent: uvicorn's default."""

TOO_BIG: Final = 1009
BROKEN: Final = 1011
ABNORMAL: Final = 1006
"""Close codes (RFC 6455 section 7.4.1)."""

ABANDONED_SECONDS: Final = 30.0
"""How long an application may run on after its eyeball left, as long as the grace period; then it is cancelled."""

LIFESPAN_SECONDS: Final = 60.0
"""Limit of an application's start-up and of its shutdown: databases and caches take a while."""


class AsgiSite:
    """One application. `startup` before the first request, `close` after the last."""

    def __init__(self, application: Application, *, name: str = "application") -> None:
        self.application = application
        self.name = name
        self.tasks: set[asyncio.Task[None]] = set()
        self.state: dict[str, Any] = {}
        """What the application put into its lifespan's state; each request gets a shallow copy."""
        self._lifespan: asyncio.Task[None] | None = None
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._outbox: asyncio.Queue[Message] = asyncio.Queue()

    def open(self, owner: Owner, request: Request, port: StreamPort, rule: Rule) -> AsgiExchange:
        """Return the exchange that serves a request."""
        kind = AsgiWebSocket if request.kind is RequestKind.WEBSOCKET else AsgiExchange
        return kind(self, owner, request, port, rule)

    async def startup(self) -> None:
        """Run the application's start-up, if it has one. Errors: ConnectorError with the application's words."""

        async def live() -> None:
            scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
            await self.application(scope, self._inbox.get, self._outbox.put)

        self._inbox.put_nowait({"type": "lifespan.startup"})
        self._lifespan = asyncio.create_task(live(), name=f"lifespan of {self.name}")
        answer = await self._answer()
        if answer is not None and answer["type"] == "lifespan.startup.failed":
            await self._end_lifespan()
            raise ConnectorError(f"{self.name} failed to start: {answer.get('message', '')}".rstrip(": "))

    async def close(self) -> None:
        """End what still runs, then the application's lifespan."""
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self._lifespan is not None and not self._lifespan.done():
            self._inbox.put_nowait({"type": "lifespan.shutdown"})
            await self._answer()
        await self._end_lifespan()

    async def _answer(self) -> Message | None:
        """Wait for the application's word; None when its lifespan ends, or raises, without one: it has none."""
        assert self._lifespan is not None
        word = asyncio.create_task(self._outbox.get())
        try:
            await asyncio.wait({word, self._lifespan}, timeout=LIFESPAN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            return word.result() if word.done() else None
        finally:
            word.cancel()

    async def _end_lifespan(self) -> None:
        if self._lifespan is not None:
            self._lifespan.cancel()
            await asyncio.gather(self._lifespan, return_exceptions=True)
            self._lifespan = None


class AsgiExchange:
    """One HTTP request."""

    __slots__ = ("_chunks", "_eof", "_head", "_mute", "_owner", "_task", "_waiting", "_writable", "aborted", "finished",
                 "port", "request", "rule", "site", "started", "status", "trace", "whole")  # fmt: skip

    def __init__(self, site: AsgiSite, owner: Owner, request: Request, port: StreamPort, rule: Rule) -> None:
        self.site = site
        self._owner = owner
        self.request = request
        self.port = port
        self.rule: Rule | None = rule
        self.status = 0
        self.whole = False
        self.aborted = False
        self.finished = False
        self.started = 0.0
        self.trace: RequestTrace | None = None
        self._chunks: deque[bytes] = deque()
        self._eof = request.content_length == 0
        self._head: tuple[int, list[tuple[bytes, bytes]]] | None = None
        self._mute = request.method == b"HEAD"
        self._waiting: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    # -- the stream

    def start(self) -> None:
        """Run the application."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"{self.site.name} request")
        self.site.tasks.add(self._task)
        self._task.add_done_callback(self.site.tasks.discard)

    def on_data(self, data: Buffer) -> None:
        """Keep a piece of the body until the application receives it; the edge's window bounds them."""
        if self.finished:
            self.port.consumed(len(data))
            return
        self._chunks.append(bytes(data))
        self._wake()

    def on_eof(self) -> None:
        """The body is whole."""
        self._eof = True
        self._wake()

    def on_reset(self, error: BaseException | None) -> None:
        """The eyeball went away: the application learns it from `receive` and `send`, and gets a while."""
        self.aborted = True
        self._finish()
        if self._task is not None:
            timer = asyncio.get_running_loop().call_later(ABANDONED_SECONDS, self._task.cancel)
            self._task.add_done_callback(lambda _: timer.cancel())

    def pause_writing(self) -> None:
        """Let `send` wait."""
        self._writable = self._writable or asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """Let `send` go on."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def go_away(self) -> bool:
        """No word for it in plain HTTP."""
        return False

    def cancel(self) -> None:
        """End at once."""
        if self._task is not None:
            self._task.cancel()
        if not self.finished:
            self.port.reset(ResetCode.CANCELLED)
            self._finish()

    # -- the application

    async def _run(self) -> None:
        try:
            await self.site.application(self._scope(), self._receive, self._send)
        except asyncio.CancelledError:
            if not self.finished:
                self.cancel()
            raise
        except Exception as error:
            self._failed(f"{self.site.name} raised {type(error).__name__}: {error}")
            return
        if not self.finished:
            self._failed(f"{self.site.name} returned without a complete response")

    def _scope(self) -> dict[str, Any]:
        request = self.request
        path, _, query = request.target.partition(b"?")
        headers = [(name.lower(), value) for name, value in request.headers]
        host = request.host.decode("latin-1")
        client = next((value.decode("latin-1") for name, value in headers if name == b"cf-connecting-ip"), None)
        name, _, port = host.rpartition(":") if host.rpartition(":")[2].isdigit() else (host, "", "")
        scheme = request.scheme.decode("latin-1")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": request.method.decode("latin-1"),
            "scheme": scheme,
            "path": unquote_to_bytes(path).decode("utf-8", "replace"),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": [(b"host", request.host), *headers],
            "client": (client, 0) if client else None,
            "server": (name, int(port) if port else (443 if scheme == "https" else 80)),
            "state": dict(self.site.state),
        }

    async def _receive(self) -> Message:
        while not (self._chunks or self._eof or self.finished):
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        if self._chunks and not self.finished:
            body = b"".join(self._chunks)
            self._chunks.clear()
            self.port.consumed(len(body))
            return {"type": "http.request", "body": body, "more_body": not self._eof}
        if self._eof and not self.finished:
            self._eof = False  # what follows is the wait for a disconnect
            return {"type": "http.request", "body": b"", "more_body": False}
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self.aborted:
            raise OSError("the eyeball went away")
        kind = message["type"]
        if kind == "http.response.start":
            if self._head is not None:
                raise RuntimeError("http.response.start was sent already")
            headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
            self._head = int(message["status"]), headers
            return
        if kind != "http.response.body" or self._head is None:
            raise RuntimeError(f"{kind!r} is not expected here")
        if self.finished:
            raise RuntimeError("the response is complete already")
        if not self.status:
            self._answer(*self._head)
        body = message.get("body", b"")
        if body and not self._mute:
            self.port.write(body)
        if not message.get("more_body", False):
            self.port.write_eof()
            self.port.stop_reading()
            self.whole = True
            self._finish()
        elif self._writable is not None:
            await self._writable

    # -- inside

    def _answer(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        for name, value in headers:
            if any(byte in b"\r\n\0" for byte in name + value):
                raise ValueError(f"the header {name!r} holds a line end")
        self.status = status
        self.port.respond(status, headers)
        self._owner.exchange_answered(self)

    def _failed(self, text: str) -> None:
        if self.finished:
            return
        self._owner.exchange_failed(self, OriginError(text, advice="see the application's own log"))
        if self.status:
            self.port.reset(ResetCode.FAILED)
        else:
            self._answer(500, [(b"content-type", b"text/plain; charset=utf-8")])
            self.port.write(b"Internal Server Error")
            self.port.write_eof()
            self.port.stop_reading()
        self._finish()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _finish(self) -> None:
        if self.finished:
            return
        self.finished = True
        self._chunks.clear()
        self.resume_writing()
        self._wake()
        self._owner.exchange_finished(self)


class AsgiWebSocket(AsgiExchange):
    """One WebSocket: frames end here, the application sees messages."""

    __slots__ = ("_close", "_frames", "_full", "_messages", "_over", "_parts", "_size", "_unacknowledged")

    def __init__(self, site: AsgiSite, owner: Owner, request: Request, port: StreamPort, rule: Rule) -> None:
        super().__init__(site, owner, request, port, rule)
        self._frames = ClientFrames()
        self._messages: deque[tuple[Message, int]] = deque([({"type": "websocket.connect"}, 0)])
        """What the application has not received yet, and the credit that each gives back."""
        self._parts: list[bytes] = []
        self._size = 0
        self._unacknowledged = 0
        self._close: tuple[int, str] = (ABNORMAL, "")
        self._over = False  # a Close frame went out

    def on_data(self, data: Buffer) -> None:
        """Put messages together."""
        size = len(data)
        if self.finished or self._over:
            self.port.consumed(size)
            return
        try:
            pieces = self._frames.receive(data)
        except WireError as error:
            self._end(PROTOCOL_FAILURE, str(error))
            return
        self._unacknowledged += size
        for opcode, _, ended, payload in pieces:
            if opcode == PING:
                self.port.write(encode_frame(PONG, payload))
            elif opcode == CLOSE:
                code = int.from_bytes(payload[:2], "big") if len(payload) >= 2 else 1005
                self._close = code, payload[2:].decode("utf-8", "replace")
                self._say(answer_close(payload))
                self._leave()
                return
            elif opcode in {TEXT, BINARY} and not self._part(opcode, payload, ended):
                return
        if not self._messages and self._unacknowledged:
            # A message that has not ended: it may have all the credit that its limit allows.
            self.port.consumed(self._unacknowledged)
            self._unacknowledged = 0

    def _part(self, opcode: int, payload: bytes, ended: bool) -> bool:
        """Take a piece of a message; whether the WebSocket goes on."""
        self._parts.append(payload)
        self._size += len(payload)
        if self._size > MAX_MESSAGE:
            self._end(TOO_BIG, f"a message has more than {MAX_MESSAGE} bytes")
            return False
        if not ended:
            return True
        body = b"".join(self._parts)
        self._parts, self._size = [], 0
        message: Message = {"type": "websocket.receive"}
        if opcode == TEXT:
            try:
                message["text"] = body.decode()
            except UnicodeDecodeError:
                self._end(1007, "a text message is not UTF-8")
                return False
        else:
            message["bytes"] = body
        self._messages.append((message, self._unacknowledged))
        self._unacknowledged = 0
        self._wake()
        return True

    def on_eof(self) -> None:
        """The eyeball's end of the stream, without a Close frame."""
        if not self.finished:
            self._leave()

    def go_away(self) -> bool:
        """Say Close 1001."""
        if self.status != 101 or self.finished:
            return False
        self._end(GOING_AWAY, "")
        return True

    def _scope(self) -> dict[str, Any]:
        scope = super()._scope()
        offered = b",".join(value for name, value in self.request.headers if name.lower() == b"sec-websocket-protocol")
        del scope["method"]
        scope["type"] = "websocket"
        scope["scheme"] = "wss" if scope["scheme"] == "https" else "ws"
        scope["subprotocols"] = [part.strip() for part in offered.decode("latin-1").split(",") if part.strip()]
        return scope

    async def _receive(self) -> Message:
        while not self._messages and not self.finished:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        if self._messages:
            message, credit = self._messages.popleft()
            if credit and not self.finished:
                self.port.consumed(credit)
            return message
        code, reason = self._close
        return {"type": "websocket.disconnect", "code": code, "reason": reason}

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if self.finished:
            if kind == "websocket.close":
                return
            raise OSError("the WebSocket is closed")
        if kind == "websocket.accept" and not self.status:
            headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
            if protocol := message.get("subprotocol"):
                headers.append((b"Sec-Websocket-Protocol", str(protocol).encode("latin-1")))
            self._answer(101, [*switch_headers(self.request), *headers])
        elif kind == "websocket.close" and not self.status:
            self._answer(403, [])
            self.port.write_eof()
            self.port.stop_reading()
            self.whole = True
            self._finish()
        elif kind == "websocket.close":
            self._end(int(message.get("code", NORMAL)), str(message.get("reason") or ""))
        elif kind == "websocket.send" and self.status == 101:
            text, data = message.get("text"), message.get("bytes")
            self.port.write(
                encode_frame(TEXT, text.encode()) if text is not None else encode_frame(BINARY, data or b"")
            )
            if self._writable is not None:
                await self._writable
        else:
            raise RuntimeError(f"{kind!r} is not expected here")

    def _failed(self, text: str) -> None:
        if self.finished:
            return
        if self.status != 101:
            super()._failed(text)
            return
        self._owner.exchange_failed(self, OriginError(text, advice="see the application's own log"))
        self._end(BROKEN, "")

    def _say(self, frame: bytes) -> None:
        if not self._over:
            self._over = True
            self.port.write(frame)

    def _end(self, code: int, reason: str) -> None:
        self._close = code, reason
        self._say(close_frame(code, reason))
        self._leave()

    def _leave(self) -> None:
        self.port.write_eof()
        self.port.stop_reading()
        self.whole = True
        self._finish()
