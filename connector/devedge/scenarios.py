"""The cases of `connector conformance`: what any connector must do, against a dev edge with faults.

Owns: the cases. In: a Rig (edge, origin, visitor, connector process). Out: nothing, or Mismatch with what was expected
and what came. Never: names a connector: every case is about what the edge, the origin and the visitor see.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Protocol

from connector.devedge.faults import Faults
from connector.devedge.probe import BLOCK, Origin, Visitor, frame, read_frame
from connector.devedge.server import DevEdge

MIB = 1_048_576


class Mismatch(Exception):
    """The connector did something else."""

    def __init__(self, expected: object, came: object) -> None:
        super().__init__(f"{expected} / {came}")
        self.expected = str(expected)
        self.came = str(came)
        self.output = ""
        """What the connector printed last, where it did not even start."""


class Rig(Protocol):
    """One connector at work, registered unless the case says that it may not be."""

    edge: DevEdge
    origin: Origin
    visitor: Visitor
    protocol: str
    events: list[dict[str, Any]]

    async def event(self, name: str, *, limit: float = 30.0, after: int = 0, **fields: Any) -> dict[str, Any]:
        """Return an event of the edge, already seen or still to come."""

    def stop(self, number: int) -> None:
        """Send the connector a signal."""

    async def ended(self) -> int:
        """Wait for the connector's end; return its exit status."""


class Case(NamedTuple):
    """One case. `faults`: in force from the start. `own`: needs a connector of its own. `only`: a protocol. `note`:
    what is known of connectors that fail it, shown when one does.
    """

    area: str
    name: str
    run: Callable[[Any], Awaitable[None]]
    faults: tuple[str, ...] = ()
    own: bool = False
    only: str = ""
    note: str = ""

    @property
    def refused(self) -> bool:
        """Whether the first registration is not to be waited for."""
        return any(fault.startswith("registration") for fault in self.faults)


def expect(expected: object, came: object) -> None:
    """Raise Mismatch unless they are equal."""
    if expected != came:
        raise Mismatch(expected, came)


CASES: list[Case] = []


def _case(
    area: str, name: str, *faults: str, own: bool = False, only: str = "", note: str = ""
) -> Callable[[Callable[[Any], Awaitable[None]]], Callable[[Any], Awaitable[None]]]:
    def add(run: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
        CASES.append(Case(area, name, run, faults, own or bool(faults), only, note))
        return run

    return add


# --- registration and configuration ----------------------------------------------------------------------------------


@_case("registration", "says what it is")
async def _registers(rig: Rig) -> None:
    event = await rig.event("registered")
    expect(rig.protocol, event["protocol"])
    missing = {"allow_remote_config", "serialized_headers"} - set(event["features"])
    if missing or not event["version"]:
        raise Mismatch("a version and the features allow_remote_config, serialized_headers", event)


@_case("configuration", "a pushed configuration is applied")
async def _applies(rig: Rig) -> None:
    expect(True, (await rig.event("configuration"))["applied"])


@_case("configuration", "a bad configuration is refused, the old one stays")
async def _refuses_configuration(rig: Rig) -> None:
    seen = len(rig.events)
    rig.edge.push(50, {"ingress": [{"hostname": "a", "service": "nonsense://"}]})
    event = await rig.event("configuration", after=seen)
    expect(False, event["applied"])
    expect(200, (await rig.visitor.ask("/")).status)


@_case("configuration", "a newer version is in force at once", own=True)
async def _newer(rig: Rig) -> None:
    seen = len(rig.events)
    rig.edge.push(60, {"ingress": [{"service": "http_status:418"}]})
    expect(True, (await rig.event("configuration", after=seen))["applied"])
    expect(418, (await rig.visitor.ask("/")).status)


# --- HTTP ------------------------------------------------------------------------------------------------------------


@_case("http", "GET with a query, and what the edge adds")
async def _get(rig: Rig) -> None:
    reply = await rig.visitor.ask("/a/b?x=%2F&y=1", headers=("X-Own: 1",))
    expect((200, "/a/b?x=%2F&y=1"), (reply.status, json.loads(reply.body)["target"]))
    lines, _ = rig.origin.seen["/a/b"]
    names = {line.partition(":")[0].lower() for line in lines[1:]}
    missing = {"x-own", "cf-ray", "cf-connecting-ip", "x-forwarded-for", "x-forwarded-proto"} - names
    if missing:
        raise Mismatch("the visitor's and the edge's headers at the origin", f"without {sorted(missing)}")
    internal = [name for name in names if name.startswith("cf-cloudflared-")]
    expect([], internal)


@_case("http", "POST with a length")
async def _post(rig: Rig) -> None:
    reply = await rig.visitor.ask("/post", method="POST", body=b"hello")
    expect(5, json.loads(reply.body)["size"])
    expect(b"hello", rig.origin.seen["/post"][1])


@_case("http", "PUT of unknown length")
async def _chunked(rig: Rig) -> None:
    body = BLOCK * 3
    reply = await rig.visitor.ask("/put", method="PUT", body=body, chunked=True)
    expect(hashlib.sha256(body).hexdigest(), json.loads(reply.body)["sha256"])


@_case("http", "HEAD has no body")
async def _head(rig: Rig) -> None:
    reply = await rig.visitor.ask("/", method="HEAD")
    expect((200, b""), (reply.status, reply.body))


@_case("http", "statuses pass: 204, 304, 404, 503")
async def _statuses(rig: Rig) -> None:
    for status in (204, 304, 404, 503):
        expect(status, (await rig.visitor.ask(f"/status/{status}")).status)


@_case("http", "two Set-Cookie stay two")
async def _cookies(rig: Rig) -> None:
    expect(["a=1", "b=2"], sorted((await rig.visitor.ask("/cookies")).all("set-cookie")))


@_case("http", "8 MiB down")
async def _down(rig: Rig) -> None:
    reply = await rig.visitor.ask(f"/bytes/{8 * MIB}")
    expect((8 * MIB, True), (len(reply.body), reply.whole))
    expect(BLOCK * (8 * MIB // len(BLOCK)) == reply.body, True)


@_case("http", "4 MiB up")
async def _up(rig: Rig) -> None:
    body = BLOCK * (4 * MIB // len(BLOCK))
    reply = await rig.visitor.ask("/up", method="PUT", body=body)
    expect(hashlib.sha256(body).hexdigest(), json.loads(reply.body)["sha256"])


@_case("http", "an event stream is not held back", own=True)
async def _events(rig: Rig) -> None:
    reader, writer = await rig.visitor.connect()
    try:
        writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        seen = b""
        async with asyncio.timeout(20):
            while b"data: 1" not in seen:
                data = await reader.read(65_536)
                if not data:
                    break
                seen += data
        expect(True, b"data: 1" in seen)
        rig.origin.release.set()
    except TimeoutError:
        raise Mismatch("the first event while the response is open", "nothing within 20 s") from None
    finally:
        writer.close()


@_case("http", "50 requests at once")
async def _many(rig: Rig) -> None:
    replies = await asyncio.gather(*(rig.visitor.ask(f"/many/{number}") for number in range(50)))
    expect([f"/many/{number}" for number in range(50)], [json.loads(reply.body)["target"] for reply in replies])


@_case("origin", "an origin that answers garbage is 502")
async def _garbage(rig: Rig) -> None:
    expect(502, (await rig.visitor.ask("/garbage")).status)


@_case("origin", "a short response that is cut is not taken for whole")
async def _cut(rig: Rig) -> None:
    """Nine bytes of a thousand. Over HTTP/2 cloudflared still has them and the head in a buffer of 4 KiB when the
    origin breaks off, and RST_STREAM is all that it sends: the edge answers 502. Both are honest.
    """
    reply = await rig.visitor.ask("/cut")
    if reply.status < 500 and (reply.status, reply.whole) != (200, False):
        raise Mismatch("status 200 and an end that is seen as a cut, or 502", f"{reply.status}, whole: {reply.whole}")


@_case("origin", "a long response that is cut is passed on as far as it goes")
async def _cut_late(rig: Rig) -> None:
    reply = await rig.visitor.ask("/cut-late")
    expect((200, False, True), (reply.status, reply.whole, len(reply.body) > 0))


@_case("origin", "a dead origin is 502", own=True)
async def _dead(rig: Rig) -> None:
    seen = len(rig.events)
    rig.edge.push(70, {"ingress": [{"service": "http://127.0.0.1:1"}]})
    await rig.event("configuration", after=seen)
    expect(502, (await rig.visitor.ask("/")).status)


@_case("origin", "a visitor who leaves frees the origin", own=True)
async def _leaves(rig: Rig) -> None:
    _, writer = await rig.visitor.connect()
    writer.write(b"GET /hold HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await _until(lambda: "/hold" in rig.origin.seen, "the request at the origin")
    writer.transport.abort()
    await _until(lambda: rig.origin.open == 0, "the origin's connection to end")


# --- WebSocket -------------------------------------------------------------------------------------------------------


@_case("websocket", "echo, small and large")
async def _echo(rig: Rig) -> None:
    reply, reader, writer = await rig.visitor.websocket("/ws")
    expect(101, reply.status)
    try:
        async with asyncio.timeout(30):
            for size in (0, 1, 125, 126, 65_535, 65_536, 300_000):
                data = (BLOCK * 5)[:size]
                writer.write(frame(2, data, mask=b"\1\2\3\4"))
                opcode, back = await read_frame(reader)
                expect((2, True), (opcode, back == data))
    finally:
        writer.close()


@_case("websocket", "1,000 messages stay in order")
async def _order(rig: Rig) -> None:
    _, reader, writer = await rig.visitor.websocket("/ws")
    try:
        writer.write(b"".join(frame(1, b"%d" % number, mask=b"\0\0\0\0") for number in range(1_000)))
        async with asyncio.timeout(30):
            for number in range(1_000):
                expect((1, b"%d" % number), await read_frame(reader))
    finally:
        writer.close()


@_case("websocket", "the origin's close reaches the visitor")
async def _close(rig: Rig) -> None:
    _, reader, writer = await rig.visitor.websocket("/ws-close")
    try:
        writer.write(frame(1, b"bye", mask=b"\0\0\0\0"))
        async with asyncio.timeout(30):
            expect((8, b"\x03\xe8"), await read_frame(reader))
            expect(b"", await reader.read(1))
    finally:
        writer.close()


@_case("websocket", "100 at once")
async def _hundred(rig: Rig) -> None:
    async def one(number: int) -> None:
        _, reader, writer = await rig.visitor.websocket("/ws")
        try:
            writer.write(frame(1, b"%d" % number, mask=b"\0\0\0\0"))
            async with asyncio.timeout(30):
                expect((1, b"%d" % number), await read_frame(reader))
        finally:
            writer.close()

    await asyncio.gather(*(one(number) for number in range(100)))


# --- faults ----------------------------------------------------------------------------------------------------------


async def _registers_in_the_end(rig: Rig) -> None:
    await rig.event("register_refused", limit=60)
    await rig.event("registered", limit=90)
    await rig.event("configuration")
    expect(200, (await rig.visitor.ask("/")).status)


_case("recovery", "registration refused as a duplicate", "registration=EDUPCONN*1")(_registers_in_the_end)
_case(
    "recovery", "registration refused, retry after 1 s", "registration=retry-after:1*1",
    note="cloudflared 2026.8.2 ends when its first registration is refused with anything but EDUPCONN, whether it may "
    "try again or not; over QUIC the refusal reaches it as the end of the connection, which it does retry.",
)(_registers_in_the_end)  # fmt: skip


@_case("recovery", "GOAWAY: registers again", "goaway-after:1", own=True, only="http2")
async def _goaway(rig: Rig) -> None:
    await _again(rig)


@_case("recovery", "a connection that is cut: registers again", "cut-after:1")
async def _cut_link(rig: Rig) -> None:
    await _again(rig)


@_case("recovery", "garbage on the control stream is survived", "malformed-after:1")
async def _malformed(rig: Rig) -> None:
    await rig.event("registered")
    await asyncio.sleep(1.5)  # the fault's own time; what follows waits for events
    rig.edge.roster.faults.clear()
    for _ in range(30):
        try:
            if (await rig.visitor.ask("/")).status == 200:
                return
        except OSError:
            pass
        await asyncio.sleep(1)
    raise Mismatch("requests are served afterwards", "none within 30 s")


@_case("recovery", "a reset stream takes no other along", "reset:2")
async def _reset(rig: Rig) -> None:
    first = await rig.visitor.ask("/")
    second = await rig.visitor.ask("/hold")
    rig.origin.release.set()
    third = await rig.visitor.ask("/")
    expect((200, 502, 200), (first.status, second.status, third.status))


@_case("recovery", "5 % of packets lost", "loss:5", only="quic")
async def _loss(rig: Rig) -> None:
    reply = await rig.visitor.ask(f"/bytes/{MIB}")
    expect((MIB, True), (len(reply.body), reply.whole))


@_case("recovery", "a slow edge slows the origin, memory stays", "slow:2000000")
async def _slow(rig: Rig) -> None:
    reply = await rig.visitor.ask(f"/bytes/{4 * MIB}")
    expect((4 * MIB, True), (len(reply.body), reply.whole))


# --- the end ---------------------------------------------------------------------------------------------------------


@_case("shutdown", "SIGTERM: unregisters, finishes what is open, status 0", own=True)
async def _drains(rig: Rig) -> None:
    asking = asyncio.create_task(rig.visitor.ask("/hold"))
    await _until(lambda: "/hold" in rig.origin.seen, "the request at the origin")
    rig.stop(signal.SIGTERM)
    await rig.event("unregistered")
    rig.origin.release.set()
    reply = await asking
    expect((200, b"held"), (reply.status, reply.body))
    expect(0, await rig.ended())


async def _again(rig: Rig) -> None:
    await rig.event("registered")
    await rig.event("disconnected", limit=30)
    seen = len(rig.events)
    rig.edge.roster.faults.clear()
    await rig.event("registered", limit=90, after=max(0, seen - 3))
    for _ in range(40):  # the first connection after the fault may be the one that was doomed
        if (await rig.visitor.ask("/")).status == 200:
            return
        await asyncio.sleep(0.5)
    raise Mismatch("requests are served afterwards", "none within 20 s")


async def _until(condition: Callable[[], bool], what: str, limit: float = 20.0) -> None:
    try:
        async with asyncio.timeout(limit):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise Mismatch(what, f"nothing within {limit:g} s") from None


__all__ = ["CASES", "Case", "Faults", "Mismatch", "Rig", "expect"]
