"""What the load edge does to a connector: one Load class per kind of HTTP and WebSocket work.

Owns: the work itself, its units and latencies.
In: a link of either transport, options of a row. Out: figures of one round.
Never: starts connectors, treats one connector or transport unlike another.

*Strategy*: all work is closed loop: what ends is begun again at once, so the number in flight is constant. CPU clocks
of the connector are read here, at the moments when units are counted. Time stamps are taken once per read.
"""

# ruff: noqa: D102  (callbacks of one interface each, described there)
from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

from benchmarks.fields import MORE_FIELDS, WEBSOCKET, request_fields
from benchmarks.link import Fields, LoadLink, LoadStream
from benchmarks.watched import Watched

WARM_UP = 0.15
"""Seconds of load before the clock starts: connections are dialled and caches are filled."""

DRAIN_LIMIT = 10.0
"""Seconds for what is in flight to end."""

IDLE_BATCH = 200
"""Idle WebSockets that are opened side by side."""


class WorkError(Exception):
    """The connector did not do what the row asks; the row fails, not the run."""


class Load:
    """One kind of work on one link. Subclasses begin units with `begin` and report them with `done`."""

    def __init__(self, link: LoadLink, options: dict[str, Any]) -> None:
        self.link = link
        self.options = options
        self.streams: int = options["streams"]
        self.units = 0
        self.latencies: list[float] = []
        self.active = 0
        self.stopping = False
        self.failure = ""
        self.changed = asyncio.Event()

    def begin(self, slot: int) -> None:
        """Begin the work of one of the streams; called once each."""
        raise NotImplementedError

    def done(self, started: float) -> None:
        """Count one unit."""
        self.units += 1
        self.latencies.append(self.link.now - started)

    def fail(self, text: str) -> None:
        """Give up."""
        self.failure = self.failure or text
        self.changed.set()

    def ended(self) -> None:
        """One of the streams is through."""
        self.active -= 1
        if not self.active:
            self.changed.set()

    def finish(self) -> None:
        """Ask all streams to end; work that ends by itself needs nothing more."""
        self.stopping = True

    async def wait(self, limit: float) -> None:
        """Wait until no stream is active, or something failed."""
        async with asyncio.timeout(limit):
            await self.changed.wait()
        if self.failure:
            raise WorkError(self.failure)

    def check(self) -> None:
        """Raise what went wrong."""
        if self.failure:
            raise WorkError(self.failure)

    async def run(self, seconds: float, watched: Watched) -> dict[str, Any]:
        """Warm up, measure, drain."""
        self.link.now = time.perf_counter()
        for slot in range(self.streams):
            self.active += 1
            self.begin(slot)
        await self.ready()
        await asyncio.sleep(self.options.get("warm_up", WARM_UP))
        self.check()
        units, self.latencies = self.units, []
        watched.begin()
        await asyncio.sleep(seconds)
        result = watched.end()
        result.update(units=self.units - units, **quantiles(self.latencies))
        self.check()
        self.finish()
        await self.wait(DRAIN_LIMIT)
        result["all_units"] = self.units
        return result

    async def ready(self) -> None:
        """Wait until every stream is at work."""


class Echo(Load):
    """WebSockets on which every message comes back; `flight` of them are on the way per stream."""

    def __init__(self, link: LoadLink, options: dict[str, Any]) -> None:
        super().__init__(link, options)
        size = options["size"]
        # A masked binary frame (RFC 6455 5.2), as a visitor's browser sends it.
        head = b"\x82" + (bytes([0x80 | size - 6]) if size < 132 else b"\xfe" + (size - 8).to_bytes(2)) + b"\1\2\3\4"
        self.message = head + bytes((7 * i + 1) & 0xFF for i in range(size - len(head)))
        self.fields = WEBSOCKET
        self.open = 0
        self.all_open = asyncio.Event()

    def begin(self, slot: int) -> None:
        EchoStream(self, self.options["flight"])

    async def ready(self) -> None:
        async with asyncio.timeout(DRAIN_LIMIT):
            await self.all_open.wait()

    def opened(self) -> None:
        self.open += 1
        if self.open == self.streams:
            self.all_open.set()

    def fail(self, text: str) -> None:
        super().fail(text)
        self.all_open.set()


class EchoStream:
    """One WebSocket."""

    __slots__ = ("flight", "load", "message", "partial", "sent", "size", "stream", "unchecked")

    def __init__(self, load: Echo, flight: int) -> None:
        self.load = load
        self.flight = flight
        self.message = load.message
        self.size = len(self.message)
        self.partial = 0
        self.sent: deque[float] = deque()
        self.unchecked = True
        self.stream: LoadStream = load.link.open(load.fields, self)

    def on_head(self, ok: bool) -> None:
        if not ok:
            self.load.fail("a stream was refused")
            return
        self.load.opened()
        now = self.load.link.now
        for _ in range(self.flight):
            self.sent.append(now)
            self.stream.send(self.message)

    def on_data(self, data: bytes, start: int, stop: int) -> None:
        if not self.sent:
            # Ended here already. Seen with cloudflared only, 500x4: more bytes than were sent. Why is not known.
            return
        got = self.partial + stop - start
        if self.unchecked and got >= self.size:
            self.unchecked = False
            if not self.partial and data[start : start + self.size] != self.message:
                self.load.fail("an echo differs from what was sent")
        load = self.load
        size = self.size
        while got >= size:
            got -= size
            load.done(self.sent.popleft())
            if load.stopping:
                if not self.sent:
                    self.stream.end()
                    return
            else:
                self.sent.append(load.link.now)
                self.stream.send(self.message)
        self.partial = got

    def on_end(self) -> None:
        if not self.load.stopping:
            self.load.fail("the connector ended a stream")
        self.load.ended()

    def on_reset(self) -> None:
        self.load.fail("the connector reset a stream")
        self.load.ended()


class Requests(Load):
    """Requests one after the other on each slot."""

    def __init__(self, link: LoadLink, options: dict[str, Any]) -> None:
        super().__init__(link, options)
        size = options.get("body", 0)
        self.body = bytes(i & 0xFF for i in range(size))
        extra = MORE_FIELDS if options.get("fields") else ()
        if size:
            extra = (*extra, (b"content-type", b"application/json"), (b"content-length", b"%d" % size))
        path = options.get("path", "/").encode()
        self.fields = request_fields(b"POST" if size else b"GET", path, *extra)
        self.size = 13

    def begin(self, slot: int) -> None:
        OneRequest(self)


class OneRequest:
    """One request; the next one begins when it ends."""

    __slots__ = ("load", "ok", "size", "started")

    def __init__(self, load: Requests) -> None:
        self.load = load
        self.ok = False
        self.size = 0
        self.started = load.link.now
        stream = load.link.open(load.fields, self, end=not load.body)
        if load.body:
            stream.send(load.body, end=True)

    def on_head(self, ok: bool) -> None:
        self.ok = ok

    def on_data(self, data: bytes, start: int, stop: int) -> None:
        self.size += stop - start

    def on_end(self) -> None:
        load = self.load
        if not self.ok or self.size != load.size:
            load.fail(f"a response was wrong: status 200 {self.ok}, {self.size} bytes")
        load.done(self.started)
        if load.stopping or load.failure:
            load.ended()
        else:
            OneRequest(load)

    def on_reset(self) -> None:
        self.load.fail("the connector reset a request")
        self.load.ended()


class Bulk(Load):
    """A given number of bytes, spread over the streams; units are bytes."""

    async def run(self, seconds: float, watched: Watched) -> dict[str, Any]:
        """Move all of it once; there is a small one before, so that the connection to the origin stands."""
        share = self.options["size"] // self.streams
        for size, measured in ((65_536, False), (share, True)):
            self.changed.clear()
            self.link.now = time.perf_counter()
            if measured:
                watched.begin()
            for _ in range(self.streams):
                self.active += 1
                self.one(size)
            await self.wait(120.0)
        result = watched.end()
        result.update(units=share * self.streams, **quantiles(self.latencies[-self.streams :]))
        return result

    def one(self, size: int) -> None:
        """Begin one transfer."""
        raise NotImplementedError


class Download(Bulk):
    """GET of many bytes."""

    def one(self, size: int) -> None:
        fields = request_fields(b"GET", b"/source/%d" % size)
        Transfer(self, size).start(fields, end=True)


class Upload(Bulk):
    """POST of many bytes."""

    def one(self, size: int) -> None:
        fields = request_fields(b"POST", b"/sink", (b"content-length", b"%d" % size))
        Transfer(self, 13).start(fields, end=False).send_bulk(size)


class Transfer:
    """One download or upload."""

    def __init__(self, load: Bulk, expected: int) -> None:
        self.load = load
        self.left = expected
        self.ok = False
        self.started = load.link.now

    def start(self, fields: Fields, *, end: bool) -> LoadStream:
        return self.load.link.open(fields, self, end=end)

    def on_head(self, ok: bool) -> None:
        self.ok = ok

    def on_data(self, data: bytes, start: int, stop: int) -> None:
        self.left -= stop - start

    def on_end(self) -> None:
        if not self.ok or self.left:
            self.load.fail(f"a transfer was wrong: status 200 {self.ok}, {self.left} bytes missing")
        self.load.done(self.started)
        self.load.ended()

    def on_reset(self) -> None:
        self.load.fail("the connector reset a transfer")
        self.load.ended()


class Churn(Load):
    """WebSocket open, one message, close; again."""

    def begin(self, slot: int) -> None:
        OneWebSocket(self, bytes(self.options["size"]))


class OneWebSocket:
    """One short life."""

    __slots__ = ("left", "load", "message", "started", "stream")

    def __init__(self, load: Load, message: bytes) -> None:
        self.load = load
        self.message = message
        self.left = len(message)
        self.started = load.link.now
        self.stream = load.link.open(WEBSOCKET, self)

    def on_head(self, ok: bool) -> None:
        if ok:
            self.stream.send(self.message)
        else:
            self.load.fail("a WebSocket was refused")

    def on_data(self, data: bytes, start: int, stop: int) -> None:
        self.left -= stop - start
        if not self.left:
            self.stream.end()

    def on_end(self) -> None:
        load = self.load
        if self.left:
            load.fail("the connector ended a WebSocket early")
        load.done(self.started)
        if load.stopping or load.failure:
            load.ended()
        else:
            OneWebSocket(load, self.message)

    def on_reset(self) -> None:
        self.load.fail("the connector reset a WebSocket")
        self.load.ended()


class Idle(Load):
    """WebSockets that say nothing: what each costs in memory, and all together in CPU."""

    opened = 0
    lost = 0

    async def run(self, seconds: float, watched: Watched) -> dict[str, Any]:
        self.streams = min(self.streams, self.link.room)  # more would be refused, and rightly
        before = watched.memory()
        began = time.perf_counter()
        streams: list[LoadStream] = []
        while len(streams) < self.streams:
            self.changed.clear()
            streams += [self.link.open(WEBSOCKET, self) for _ in range(min(IDLE_BATCH, self.streams - len(streams)))]
            async with asyncio.timeout(DRAIN_LIMIT):
                while self.opened < len(streams) and not self.failure:
                    self.changed.clear()
                    await self.changed.wait()
            self.check()
        opening = time.perf_counter() - began
        await asyncio.sleep(0.5)
        after = watched.memory()
        watched.begin()
        await asyncio.sleep(self.options["seconds"])
        result = watched.end()
        result.update(units=result["seconds"] / 60, p50=0.0, p99=0.0)
        result.update(bytes_per_stream=(after - before) / self.streams, opening=opening)
        self.check()
        self.active = len(streams)
        self.stopping = True
        self.changed.clear()
        for stream in streams:
            stream.end()
        await self.wait(DRAIN_LIMIT)
        return result

    def on_head(self, ok: bool) -> None:
        if ok:
            self.opened += 1
            self.changed.set()
        else:
            self.fail("a WebSocket was refused")

    def on_data(self, data: bytes, start: int, stop: int) -> None:
        self.fail("an idle WebSocket said something")

    def on_end(self) -> None:
        self.ended()
        if not self.stopping:
            self.fail("the connector ended an idle WebSocket")

    def on_reset(self) -> None:
        self.fail("the connector reset an idle WebSocket")
        self.ended()


def quantiles(values: list[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    ordered = sorted(values) or [0.0]
    return {"p50": ordered[len(ordered) // 2], "p99": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]}
