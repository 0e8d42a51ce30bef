"""One WebSocket of a capture, sent again: its messages in order, MQTT packet by packet, the answers compared.

Owns: Conversation. In: a captured stream, a client session. Out: what was different, as texts. Never: sends a message
before the answers came that preceded it in the capture; changes what is sent, but for the password and packet numbers.

*Strategy*: messages are compared in order, for the order within one direction is the protocol's. A broker is free to
answer in another order and to cut its packets into other messages, so MQTT is compared as a set of packets, without the
numbers that the broker gives to its own publishes: these are mapped in what acknowledges them.
"""

from __future__ import annotations

import asyncio
from typing import Any

from connector.errors import UsageError, WireError
from connector.inspector.capture import CapturedStream
from connector.wire import mqtt
from connector.wire.mqtt_encode import encode_packet

SECONDS = 30.0
"""Limit of the wait for one answer."""

LARGEST_PACKET = 65_536
"""Bytes of an MQTT packet: what a capture keeps of a frame."""

TEXT, BINARY, CLOSE = 1, 2, 8
MASK_RUN = b"******"


class Step:
    """One message of the visitor: when, what, and how many answers were there before it."""

    __slots__ = ("after", "at", "opcode", "payload")

    def __init__(self, at: float, opcode: int, payload: bytes, after: int) -> None:
        self.at = at
        self.opcode = opcode
        self.payload = payload
        self.after = after


class Conversation:
    """One WebSocket. `open`, then each of `steps` with `send` in the order of the capture, then `finish`."""

    def __init__(self, stream: CapturedStream, user: str | None, password: bytes | None) -> None:
        self.steps: list[Step] = []
        self.expected: list[bytes] = []
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.sent = 0
        self.is_mqtt = False
        self._user = user
        self._password = password
        self._version = mqtt.V311
        self._received: list[bytes] = []
        self._splitter = mqtt.PacketSplitter(LARGEST_PACKET)
        self._numbers: dict[int, int] = {}  # packet numbers of the broker, then and now
        self._news = asyncio.Event()
        self._over = False
        self._socket: Any = None
        self._reading: asyncio.Task[None] | None = None
        self._read_capture(stream)

    def _read_capture(self, stream: CapturedStream) -> None:
        splitter = mqtt.PacketSplitter(LARGEST_PACKET)
        parts: list[list[bytes]] = [[], []]
        opcodes = [0, 0]
        for item in stream.frames:
            fields = item.fields
            opcode, way = int(fields.get("opcode", 0)), 1 if fields.get("way") else 0
            if opcode == CLOSE:
                return
            if opcode > CLOSE:
                continue  # pings are the client library's own affair
            if fields.get("length", 0) > len(item.payload) or (opcode and parts[way]):
                self.notes.append("a message was not kept whole: what follows it is not sent")
                return
            if opcode:
                opcodes[way] = opcode
            parts[way].append(item.payload)
            if not fields.get("fin", True):
                continue
            message = b"".join(parts[way])
            parts[way].clear()
            if not way:
                if not self.steps and not self.expected:
                    self.is_mqtt = bool(message) and message[0] >> 4 == mqtt.CONNECT and b"MQ" in message[2:14]
                self.steps.append(Step(float(fields.get("at", 0.0)), opcodes[way], message, len(self.expected)))
            elif self.is_mqtt:
                self.expected += [packet for packet, _ in splitter.feed(message)]
            else:
                self.expected.append(message)

    async def open(self, session: Any, url: str, headers: dict[str, str], tls: Any, protocols: list[str]) -> None:
        """Open the WebSocket. Errors: aiohttp's."""
        self._socket = await session.ws_connect(
            url, headers=headers, ssl=tls, protocols=protocols, max_msg_size=0, heartbeat=None
        )
        self._reading = asyncio.create_task(self._read(), name="replayed websocket")

    async def _read(self) -> None:
        try:
            async for message in self._socket:
                data = message.data.encode() if isinstance(message.data, str) else message.data
                if not isinstance(data, bytes | bytearray):
                    break
                if self.is_mqtt:
                    self._received += [packet for packet, _ in self._splitter.feed(bytes(data))]
                else:
                    self._received.append(bytes(data))
                self._news.set()
        except WireError as error:
            self.problems.append(f"what came is no MQTT: {error}")
        finally:
            self._over = True
            self._news.set()

    async def send(self, step: Step) -> None:
        """Wait for what preceded `step`, then send it; does nothing once there is a problem."""
        if self.problems or not await self._until(step.after):
            return
        payload = self._translated(step.payload) if self.is_mqtt else step.payload
        if MASK_RUN in payload:
            self.notes.append("masked parts are sent as asterisks")
        try:
            if step.opcode == TEXT:
                await self._socket.send_str(payload.decode("utf-8", "replace"))
            else:
                await self._socket.send_bytes(payload)
        except (ConnectionError, RuntimeError):
            self.problems.append(f"it ended after {len(self._received)} of {len(self.expected)} answers{self._why()}")
            return
        self.sent += 1

    async def finish(self) -> None:
        """Wait for the last answers, close, compare."""
        if not self.problems:
            await self._until(len(self.expected))
        if self._socket is not None:
            await self._socket.close()
        if self._reading is not None:
            await asyncio.wait([self._reading], timeout=SECONDS)
            self._reading.cancel()
        if not self.problems:
            self.problems += self._compared_packets() if self.is_mqtt else self._compared_messages()

    async def _until(self, count: int) -> bool:
        try:
            async with asyncio.timeout(SECONDS):
                while len(self._received) < count and not self._over:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            self.problems.append(f"answer {len(self._received) + 1} of {count} did not come within {SECONDS:.0f} s")
        if len(self._received) < count and not self.problems:
            self.problems.append(f"it ended after {len(self._received)} of {count} answers{self._why()}")
        return not self.problems

    def _why(self) -> str:
        """A refusal is the usual reason."""
        for packet in self._received if self.is_mqtt else ():
            if packet[0] >> 4 == mqtt.CONNACK and (
                reason := mqtt.decode_packet(packet, self._version).fields["reason"]
            ):
                return f": the broker refused the connection, reason {reason}"
        return ""

    # -- MQTT

    def _translated(self, payload: bytes) -> bytes:
        """Put the password in, and the broker's new packet numbers into what acknowledges them."""
        out = b""
        for packet, size in mqtt.PacketSplitter(LARGEST_PACKET).feed(payload):
            kind = packet[0] >> 4
            if size != len(packet):
                return payload
            if kind == mqtt.CONNECT:
                out += self._connect(packet)
            elif kind in {mqtt.PUBACK, mqtt.PUBREC, mqtt.PUBCOMP}:
                self._learn_numbers()
                number = int.from_bytes(packet[2:4], "big")
                out += packet[:2] + self._numbers.get(number, number).to_bytes(2, "big") + packet[4:]
            else:
                out += packet
        return out or payload

    def _connect(self, packet: bytes) -> bytes:
        fields = mqtt.decode_packet(packet, self._version).fields
        self._version = fields["version"]
        if self._user is not None:
            fields["username"] = self._user
        if self._password is not None:
            fields["password"] = self._password
        elif MASK_RUN[:1] in (fields.get("password") or b"")[:1]:
            raise UsageError(
                "the MQTT password is masked in the capture", advice="Give it with --mqtt-password-file FILE."
            )
        return encode_packet(mqtt.CONNECT, fields, self._version)

    def _learn_numbers(self) -> None:
        """The n-th publish of the broker with a number then is the n-th with one now."""
        then, now = (
            [
                number
                for packet in packets
                if packet[0] >> 4 == mqtt.PUBLISH and packet[0] & 6
                for number in [mqtt.decode_packet(packet, self._version).fields["packet_id"]]
            ]
            for packets in (self.expected, self._received)
        )
        self._numbers = dict(zip(then, now, strict=False))

    def _compared_packets(self) -> list[str]:
        missing, more = list(self.expected), []
        for packet in self._received:
            same = next((at for at, other in enumerate(missing) if self._same(other, packet)), None)
            if same is None:
                more.append(packet)
            else:
                del missing[same]
        return [f"missing: {self._told(packet)}" for packet in missing[:5]] + [
            f"not in the capture: {self._told(packet)}" for packet in more[:5]
        ]

    def _same(self, then: bytes, now: bytes) -> bool:
        if then[0] >> 4 != mqtt.PUBLISH or now[0] >> 4 != mqtt.PUBLISH:
            return not differs(then, now)
        one, other = (mqtt.decode_packet(packet, self._version).fields for packet in (then, now))
        return not differs(one["payload"], other["payload"]) and all(
            one[name] == other[name] for name in ("topic", "qos", "retain")
        )

    def _told(self, packet: bytes) -> str:
        name = mqtt.NAMES[packet[0] >> 4]
        fields = mqtt.decode_packet(packet, self._version).fields
        if name == "PUBLISH":
            return (
                f"{name} {fields['topic']} of {len(fields['payload'])} bytes{' retained' if fields['retain'] else ''}"
            )
        return f"{name} {', '.join(f'{key} {value}' for key, value in fields.items())}"

    # -- anything else

    def _compared_messages(self) -> list[str]:
        found = [
            f"answer {number} differs"
            for number, (then, now) in enumerate(zip(self.expected, self._received, strict=False), 1)
            if differs(then, now)
        ]
        if (more := len(self._received) - len(self.expected)) > 0:
            found.append(f"{more} answers more than in the capture")
        return found[:5]


def differs(captured: bytes, found: bytes) -> bool:
    """Compare, passing over what is masked in the capture."""
    if captured == found:
        return False
    if b"*" not in captured or len(captured) != len(found):
        return True
    return any(mine not in (theirs, 42) for mine, theirs in zip(captured, found, strict=True))
