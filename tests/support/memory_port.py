"""An edge in memory: a StreamPort that records what the proxy does, and holds both sides to ports.py.

It lends scrambled-after-use buffers, counts credit, plays a slow edge, and fails a test whose sink or exchange breaks
the contract: a second head, payload before the head, calls on the sink from inside a write, credit never lent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from connector.protocol.ports import (
    Acceptor,
    Buffer,
    Headers,
    Request,
    RequestKind,
    ResetCode,
    ResponseSource,
    StreamSink,
)

WINDOW = 1024 * 1024


class MemoryPort:
    """One stream. The test plays the edge: `send`, `send_eof`, `peer_reset`, `pause`; then looks at what came back."""

    def __init__(self, *, high_water: int | None = None) -> None:
        self.sink: StreamSink | None = None
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.source: ResponseSource | None = None
        self.reason = b""
        self.body = bytearray()
        self.trailers: list[tuple[bytes, bytes]] = []
        self.ended = False
        self.reset_code: ResetCode | None = None
        self.stopped = False
        self.sent = 0
        self.credited = 0
        self.sent_eof = False
        self.was_reset = False
        self.writes = 0
        self.max_queued = 0
        self.max_outstanding = 0
        self._high_water = high_water
        self._queued = 0
        self._paused = False
        self._inside = 0
        self.spans = b""
        self._changed = asyncio.Event()

    # -- StreamPort: called by the proxy

    def respond(
        self, status: int, headers: Headers, source: ResponseSource = ResponseSource.ORIGIN, reason: bytes = b""
    ) -> None:
        if self.over:
            return
        assert not self.status, "respond called twice"
        assert 100 <= status <= 999, f"impossible status {status}"
        for name, value in headers:
            assert not {0, 10, 13} & set(name + value), f"unsafe header {name!r}: {value!r}"
        self.status, self.headers, self.source, self.reason = status, list(headers), source, reason
        self._changed.set()

    def write(self, data: Buffer) -> None:
        if self.over:
            return
        assert self.status, "write before respond"
        assert not self.ended, "write after write_eof"
        self.writes += 1
        self.body += data
        self._queued += len(data)
        self.max_queued = max(self.max_queued, self._queued)
        if self._high_water is not None and self._queued > self._high_water and not self._paused:
            self._paused = True
            assert self.sink is not None
            self.sink.pause_writing()
        self._changed.set()

    def write_eof(self, trailers: Headers = ()) -> None:
        if self.over:
            return
        assert self.status, "write_eof before respond"
        assert not self.ended, "write_eof called twice"
        self.ended = True
        self.trailers = list(trailers)
        self._changed.set()

    def reset(self, code: ResetCode) -> None:
        if not self.over:
            self.reset_code = code
            self._changed.set()

    def stop_reading(self) -> None:
        self.stopped = True
        self._changed.set()

    def consumed(self, n: int) -> None:
        assert n >= 0
        if self.stopped or self.over:
            return
        self.credited += n
        assert self.credited <= self.sent, "credit given back that was never taken"
        self._changed.set()

    def traffic(self) -> tuple[int, int]:
        return self.sent, len(self.body)

    # -- the edge: called by the test

    @property
    def over(self) -> bool:
        """Whether the stream is gone both ways."""
        return self.was_reset or self.reset_code is not None or (self.ended and (self.stopped or self.sent_eof))

    @property
    def outstanding(self) -> int:
        return self.sent - self.credited

    def send(self, data: bytes) -> None:
        """Deliver payload as a borrowed view that is scrambled right afterwards."""
        assert not self.sent_eof
        if self.stopped or self.reset_code is not None:
            return
        assert self.sink is not None
        self.sent += len(data)
        self.max_outstanding = max(self.max_outstanding, self.outstanding)
        lent = bytearray(data)
        self.sink.on_data(memoryview(lent))
        lent[:] = b"\xaa" * len(lent)

    def send_eof(self) -> None:
        self.sent_eof = True
        if self.stopped or self.reset_code is not None:
            return
        assert self.sink is not None
        self.sink.on_eof()

    def peer_reset(self, error: BaseException | None = None) -> None:
        assert self.sink is not None
        self.was_reset = True
        self.sink.on_reset(error)

    def pause(self) -> None:
        """Take nothing more from now on."""
        assert self.sink is not None
        self._paused = True
        self.sink.pause_writing()

    def take(self) -> bytes:
        """Read what is queued; a paused writer may go on."""
        data = bytes(self.body[len(self.body) - self._queued :])
        self._queued = 0
        if self._paused:
            self._paused = False
            assert self.sink is not None
            self.sink.resume_writing()
        return data

    async def send_all(self, data: bytes, *, chunk: int = 16_384, window: int = WINDOW) -> None:
        """Deliver a long payload as credit allows, then the end."""
        view = memoryview(data)
        while view and not self.stopped and not self.over:
            await self.until(lambda: self.outstanding < window or self.stopped or self.over)
            size = min(chunk, window - self.outstanding)
            self.send(bytes(view[:size]))
            view = view[size:]
            await asyncio.sleep(0)
        if not self.over:
            self.send_eof()

    async def until(self, condition: Callable[[], object], *, limit: float = 30) -> None:
        """Wait until `condition` holds; woken by whatever the proxy does."""
        async with asyncio.timeout(limit):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def head(self) -> int:
        """Wait for the response head; return the status (0: the stream was reset)."""
        await self.until(lambda: self.status or self.reset_code is not None)
        return self.status

    async def whole(self) -> bytes:
        """Wait for the end of the response; return the body."""
        await self.until(lambda: self.ended or self.reset_code is not None)
        return bytes(self.body)

    async def received(self, size: int) -> bytes:
        """Wait for `size` bytes of body."""
        await self.until(lambda: len(self.body) >= size or self.ended or self.reset_code is not None)
        return bytes(self.body)

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


def request(
    method: str = "GET",
    target: str = "/",
    *,
    host: str = "app.example.com",
    kind: RequestKind = RequestKind.HTTP,
    headers: Headers = (),
    length: int = 0,
) -> Request:
    """Return a Request as a transport would make it."""
    if kind is RequestKind.WEBSOCKET:
        length = -1
    return Request(kind, method.encode(), target.encode(), host.encode(), headers, length)


def open_stream(accept: Acceptor, opening: Request, *, high_water: int | None = None) -> MemoryPort:
    """Let `accept` serve a new stream; return the edge's end of it."""
    port = MemoryPort(high_water=high_water)
    port.sink = accept(opening, port)
    return port
