"""MQTT over WebSocket through the tunnel, to a real Mosquitto.

Owns: as much of an MQTT 3.1.1 client as the two rows need.
In: a link of either transport. Out: figures of one round; a unit is a message that arrived at a client.
Never: speaks to the broker beside the tunnel.
"""

# ruff: noqa: D102  (callbacks of one interface each, described there)
from __future__ import annotations

import asyncio
import uuid
from typing import Any

from benchmarks.fields import MQTT
from benchmarks.link import LoadLink, LoadStream
from benchmarks.loads import DRAIN_LIMIT, Load

MASK = b"\0\0\0\0"
"""A mask that changes nothing, which RFC 6455 5.3 allows."""

CONNACK, PUBLISH, PUBACK, SUBACK = 0x20, 0x30, 0x40, 0x90


def frame(packet: bytes) -> bytes:
    """One masked binary frame."""
    size = len(packet)
    return (b"\x82" + (bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2))) + MASK + packet


def packet(kind: int, body: bytes) -> bytes:
    """One MQTT packet of less than 16 KiB."""
    size = len(body)
    return bytes([kind, size] if size < 128 else [kind, size & 0x7F | 0x80, size >> 7]) + body


def text(value: str) -> bytes:
    """A UTF-8 string with its length."""
    return len(value).to_bytes(2) + value.encode()


class Client:
    """One MQTT client, which subscribes to `topic` if it has one. `on_message(client, QoS, packet id)`."""

    __slots__ = ("buffer", "load", "name", "peer", "qos", "ready", "stream", "topic")

    def __init__(self, load: MqttLoad, topic: str, qos: int) -> None:
        self.load = load
        self.name = uuid.uuid4().hex[:20]
        self.topic = topic
        self.qos = qos
        self.peer = ""  # topic that answers go to
        self.buffer = b""
        self.ready = False
        self.stream: LoadStream = load.link.open(MQTT, self)

    def on_head(self, ok: bool) -> None:
        if not ok:
            self.load.fail("a WebSocket to the broker was refused")
            return
        body = text("MQTT") + b"\4\2" + (60).to_bytes(2) + text(self.name)
        self.stream.send(frame(packet(0x10, body)))

    def on_data(self, data: bytes, start: int, stop: int) -> None:
        if self.load.stopping:
            return
        data = self.buffer + data[start:stop] if self.buffer else data[start:stop]
        pos, end = 0, len(data)
        while end - pos >= 2:
            # Mosquitto sends one packet a frame, unmasked.
            length, at = data[pos + 1], pos + 2
            if length == 126:
                length, at = int.from_bytes(data[pos + 2 : pos + 4]), pos + 4
            if at + length > end:
                break
            if data[pos] == 0x82:
                self._packet(data, at)
            pos = at + length
        self.buffer = data[pos:]

    def _packet(self, data: bytes, at: int) -> None:
        kind = data[at] & 0xF0
        body = at + (2 if data[at + 1] < 0x80 else 3)
        if kind == PUBLISH:
            if data[at] & 0x06:
                place = body + 2 + int.from_bytes(data[body : body + 2])
                self.stream.send(frame(b"\x40\x02" + data[place : place + 2]))
            self.load.on_message(self)
        elif kind == CONNACK and self.topic:
            self.stream.send(frame(packet(0x82, b"\0\1" + text(self.topic) + bytes([self.qos]))))
        elif kind in {CONNACK, SUBACK}:
            self.ready = True
            self.load.changed.set()

    def on_end(self) -> None:
        if not self.load.stopping:
            self.load.fail("the connector or the broker ended a WebSocket")
        self.load.ended()

    def on_reset(self) -> None:
        self.load.fail("the connector reset a WebSocket")
        self.load.ended()


class MqttLoad(Load):
    """Clients that are connected first, then loaded; `active` counts their WebSockets."""

    def __init__(self, link: LoadLink, options: dict[str, Any]) -> None:
        super().__init__(link, options)
        self.root = "bench/" + uuid.uuid4().hex[:8]
        self.clients: list[Client] = []
        self.payload = bytes(i & 0xFF for i in range(options["size"]))

    def on_message(self, client: Client) -> None:
        raise NotImplementedError

    def connect(self) -> None:
        """Fill `clients`."""
        raise NotImplementedError

    def first(self) -> None:
        """Send what sets it going."""
        raise NotImplementedError

    def begin(self, slot: int) -> None:
        if not slot:
            self.connect()
        self.active = len(self.clients)

    async def ready(self) -> None:
        async with asyncio.timeout(DRAIN_LIMIT):
            while not self.failure and not all(client.ready for client in self.clients):
                self.changed.clear()
                await self.changed.wait()
        self.check()
        self.changed.clear()
        self.first()

    def finish(self) -> None:
        self.stopping = True
        for client in self.clients:
            client.stream.send(frame(b"\xe0\0"))
            client.stream.end()


class FanOut(MqttLoad):
    """QoS 0: one client publishes, all others get it; the next message goes out when one has arrived everywhere."""

    def __init__(self, link: LoadLink, options: dict[str, Any]) -> None:
        super().__init__(link, options)
        self.sent_at: list[float] = []
        self.message = frame(packet(PUBLISH, text(self.root) + self.payload))
        self.publisher: Client
        self.arrived = 0

    def connect(self) -> None:
        self.publisher = Client(self, "", 0)
        self.clients = [self.publisher, *(Client(self, self.root, 0) for _ in range(self.streams))]

    def first(self) -> None:
        for _ in range(self.options["flight"]):
            self._publish()

    def on_message(self, client: Client) -> None:
        number = self.arrived // self.streams  # the oldest message that is not everywhere
        self.arrived += 1
        self.done(self.sent_at[number])
        if not self.arrived % self.streams and not self.stopping:
            self._publish()

    def _publish(self) -> None:
        self.sent_at.append(self.link.now)
        self.publisher.stream.send(self.message)


class PingPong(MqttLoad):
    """QoS 1: pairs of clients, each answers what it gets from the other; every message is acknowledged twice."""

    def connect(self) -> None:
        for number in range(self.streams):
            topics = [f"{self.root}/{number}/{side}" for side in "ab"]
            for own, peer in (topics, reversed(topics)):
                client = Client(self, own, 1)
                client.peer = peer
                self.clients.append(client)
        self.sent_at: dict[str, float] = {}

    def first(self) -> None:
        for client in self.clients[::2]:
            self._publish(client)

    def on_message(self, client: Client) -> None:
        self.done(self.sent_at[client.topic])
        if not self.stopping:
            self._publish(client)

    def _publish(self, client: Client) -> None:
        self.sent_at[client.peer] = self.link.now
        client.stream.send(frame(packet(0x32, text(client.peer) + b"\0\1" + self.payload)))
