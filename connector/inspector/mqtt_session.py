"""One MQTT session as seen from the middle: who, what is subscribed, what is in flight, when the next ping is due.

Owns: MqttSession: both directions' packets, session state, and what is wrong. In: payload bytes of both directions.
Out: summaries of packets; a snapshot; the spans of secrets. Never: answers or keeps a message.
"""

from __future__ import annotations

from typing import Any

from connector.errors import WireError
from connector.inspector.decode import decode_mqtt
from connector.inspector.redact import is_secret_name, redact_text
from connector.inspector.topics import TopicTree
from connector.wire import mqtt

LARGEST_PACKET = 32_768
"""Bytes of one packet that are looked at; of a longer PUBLISH only its start. Half of what a frame keeps."""

MAX_IN_FLIGHT = 1_000
MAX_SUBSCRIPTIONS = 1_000
MAX_ALIASES = 1_000
MAX_PROBLEMS = 50
"""Entries remembered per session; Mosquitto allows 20 in flight and 65,535 aliases by default, nobody uses either."""

CLIENT, BROKER = 0, 1
"""Direction of a packet: from the client, from the broker."""


class Summary:
    """One packet in a line: name, text, and where it began in its direction's payload."""

    __slots__ = ("kind", "offset", "secrets", "size", "text")

    def __init__(self, kind: int, text: str, offset: int, size: int, secrets: list[tuple[int, int]]) -> None:
        self.kind = kind
        self.text = text
        self.offset = offset
        self.size = size
        self.secrets = secrets

    def shown(self, no_redact: bool) -> str:
        """Return the text without secrets. A client ID is none, and often looks like one."""
        return self.text if no_redact or self.kind == mqtt.CONNECT else redact_text(self.text)


class MqttSession:
    """One session. `feed` with the payload of each direction in order; `lost` tells why it is not followed any more."""

    def __init__(self, topics: TopicTree | None) -> None:
        self._topics = topics
        self._splitters = (mqtt.PacketSplitter(LARGEST_PACKET), mqtt.PacketSplitter(LARGEST_PACKET))
        self._offsets = [0, 0]
        self._aliases: tuple[dict[int, str], dict[int, str]] = ({}, {})
        self.version = mqtt.V311
        self.client_id = ""
        self.username: str | None = None
        self.clean = True
        self.keep_alive = 0
        self.will: dict[str, Any] | None = None
        self.state = "new"
        self.session_present = False
        self.subscriptions: dict[str, dict[str, Any]] = {}
        self.in_flight: dict[tuple[int, int], dict[str, Any]] = {}
        self.counts: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self.problems: list[str] = []
        self.lost = ""
        self.last = [0.0, 0.0]
        self.last_text = ["", ""]
        self.ping_sent = 0.0
        self.ping_answered = 0.0
        self._pending: dict[int, list[dict[str, Any]]] = {}

    def opening(self, way: int) -> bool:
        """Whether a packet that may hold a secret (CONNECT, AUTH) has begun and is not whole."""
        return self._splitters[way].opening in {mqtt.CONNECT, mqtt.AUTH}

    def feed(self, way: int, data: bytes, missing: int, now: float) -> list[Summary]:
        """Return the packets that `data` completed. `missing` bytes follow it that were not kept."""
        if self.lost:
            return []
        try:
            packets = self._splitters[way].feed(data)
            if missing:
                packets += self._splitters[way].skip(missing)
        except WireError as error:
            self._lose(way, str(error))
            return []
        return [self._packet(way, packet, size, now) for packet, size in packets]

    def _packet(self, way: int, packet: bytes, size: int, now: float) -> Summary:
        offset = self._offsets[way]
        self._offsets[way] += size
        kind = packet[0] >> 4
        name = mqtt.NAMES[kind]
        counts = self.counts[way]
        counts[name] = counts.get(name, 0) + 1
        self.last[way] = now
        secrets: list[tuple[int, int]] = []
        try:
            if kind == mqtt.PUBLISH:
                text = self._publish(way, packet, size, now, secrets)
            elif kind in {mqtt.CONNECT, mqtt.AUTH}:
                value, _, secrets, self.version = decode_mqtt(packet, self.version)
                text = self._connect(value) if kind == mqtt.CONNECT else f"reason {value.get('reason', 0)}"
            else:
                text = self._other(way, mqtt.decode_packet(packet, self.version), now)
        except (WireError, KeyError) as error:
            if kind in {mqtt.CONNECT, mqtt.AUTH}:
                secrets = [(2, size - 2)]
            text = f"not understood: {error}" if size == len(packet) else f"{size} bytes, too long to be looked into"
            if size == len(packet):
                self._problem(f"{name} of the {_who(way)} is malformed: {error}")
        self.last_text[way] = f"{name} {text}".strip()
        return Summary(kind, text, offset, size, secrets)

    def _publish(self, way: int, packet: bytes, size: int, now: float, secrets: list[tuple[int, int]]) -> str:
        if size != len(packet):  # its start is enough for the topic
            found = mqtt.packet_length(packet)
            assert found is not None
            cursor = mqtt.Cursor(packet, found[0], len(packet))
            topic, qos, retain, payload = cursor.text("topic"), packet[0] >> 1 & 3, bool(packet[0] & 1), b""
            fields: dict[str, Any] = {"packet_id": cursor.two("packet_id") if qos else 0}
        else:
            fields = mqtt.decode_packet(packet, self.version).fields
            topic, qos, retain, payload = fields["topic"], fields["qos"], fields["retain"], fields["payload"]
        properties = fields.get("properties") or {}
        if any(is_secret_name(name.encode()) for name, _ in properties.get("user_property") or ()):
            secrets += decode_mqtt(packet, self.version)[2]
        alias = properties.get("topic_alias")
        if alias is not None:
            aliases = self._aliases[way]
            if topic and len(aliases) < MAX_ALIASES:
                aliases[alias] = topic
            topic = topic or aliases.get(alias, f"(alias {alias})")
        if way == CLIENT and self._topics is not None:
            self._topics.publish(topic, payload, size, qos, retain, now)
        if qos and len(self.in_flight) < MAX_IN_FLIGHT:
            self.in_flight[way, fields["packet_id"]] = {"topic": topic, "qos": qos, "state": "PUBLISH", "since": now}
        flags = "".join((" retained" if retain else "", " dup" if packet[0] & 8 else ""))
        number = f" id {fields['packet_id']}" if qos else ""
        return f"{topic} qos {qos}{flags}{number} {len(payload)} bytes"

    def _connect(self, value: dict[str, Any]) -> str:
        self.client_id = value["client_id"]
        self.username = value.get("username")
        self.clean = value["clean_start"]
        self.keep_alive = value["keep_alive"]
        will = value.get("will")
        self.will = {key: will[key] for key in ("topic", "qos", "retain")} if will else None
        self.state = "connecting"
        word = {3: "3.1", 4: "3.1.1", 5: "5.0"}[self.version]
        return f"{self.client_id!r} MQTT {word} keep alive {self.keep_alive} s{' clean' if self.clean else ''}"

    def _other(self, way: int, packet: mqtt.Packet, now: float) -> str:
        fields, kind = packet.fields, packet.kind
        match kind:
            case mqtt.CONNACK:
                reason = fields["reason"]
                self.state = "connected" if reason == 0 else "refused"
                self.session_present = fields["session_present"]
                server = (fields.get("properties") or {}).get("server_keep_alive")
                self.keep_alive = self.keep_alive if server is None else server
                if reason:
                    self._problem(f"the broker refused the connection: {_reason(reason, self.version)}")
                return f"{_reason(reason, self.version)}{', session present' if self.session_present else ''}"
            case mqtt.SUBSCRIBE:
                if len(self._pending) < MAX_IN_FLIGHT:
                    self._pending[fields["packet_id"]] = fields["filters"]
                return ", ".join(f"{item['topic']} qos {item['qos']}" for item in fields["filters"])
            case mqtt.SUBACK:
                for item, reason in zip(self._pending.pop(fields["packet_id"], []), fields["reasons"], strict=False):
                    if reason >= 128:
                        self._problem(f"subscription to {item['topic']} refused: {_reason(reason, mqtt.V5)}")
                    elif len(self.subscriptions) < MAX_SUBSCRIPTIONS:
                        self.subscriptions[item["topic"]] = {"qos": reason, "since": now}
                return ", ".join(_reason(reason, mqtt.V5) for reason in fields["reasons"])
            case mqtt.UNSUBSCRIBE:
                for topic in fields["topics"]:
                    self.subscriptions.pop(topic, None)
                return ", ".join(fields["topics"])
            case mqtt.PUBACK | mqtt.PUBCOMP:
                self.in_flight.pop((1 - way, fields["packet_id"]), None)
                return f"id {fields['packet_id']}"
            case mqtt.PUBREC | mqtt.PUBREL:
                owner = 1 - way if kind == mqtt.PUBREC else way
                entry = self.in_flight.get((owner, fields["packet_id"]))
                if entry is not None:
                    entry["state"] = packet.name
                return f"id {fields['packet_id']}"
            case mqtt.PINGREQ:
                self.ping_sent = now
                return ""
            case mqtt.PINGRESP:
                self.ping_answered = now
                return f"after {(now - self.ping_sent) * 1000:.0f} ms" if self.ping_sent else ""
            case mqtt.DISCONNECT:
                self.state = "disconnected"
                reason = fields.get("reason", 0)
                if way == BROKER:
                    self._problem(f"the broker ended the session: {_reason(reason, mqtt.V5)}")
                return f"by the {_who(way)}: {_reason(reason, mqtt.V5) if reason else 'normal'}"
            case _:
                return f"id {fields['packet_id']}" if "packet_id" in fields else ""

    def _lose(self, way: int, error: str) -> None:
        self.lost = f"bytes of the {_who(way)} are no MQTT: {error}"
        self._problem(self.lost)

    def _problem(self, text: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text)

    def snapshot(self, now: float, *, ended: bool = False, no_redact: bool = False) -> dict[str, Any]:
        """Return the session for the page; times are seconds ago or to go."""
        plain = str if no_redact else redact_text
        waiting = self.ping_sent > self.ping_answered
        countdown: float | None = None
        if self.keep_alive and self.last[CLIENT] and not ended:
            countdown = round(self.keep_alive * 1.5 - (now - self.last[CLIENT]), 1)
        return {
            "client_id": self.client_id,
            "username": plain(self.username) if self.username else None,
            "version": self.version,
            "state": self.state,
            "clean": self.clean,
            "session_present": self.session_present,
            "keep_alive": self.keep_alive,
            "will": {**self.will, "topic": plain(self.will["topic"])} if self.will else None,
            "countdown": countdown,
            "ping_outstanding": waiting and not ended,
            "ping_age": round(now - self.ping_sent, 1) if waiting else None,
            "last_client": round(now - self.last[CLIENT], 1) if self.last[CLIENT] else None,
            "last_broker": round(now - self.last[BROKER], 1) if self.last[BROKER] else None,
            "subscriptions": [{"topic": plain(topic), **entry} for topic, entry in self.subscriptions.items()],
            "in_flight": [
                {
                    "from": _who(way),
                    "packet_id": number,
                    **entry,
                    "topic": plain(entry["topic"]),
                    "since": round(now - entry["since"], 1),
                }
                for (way, number), entry in self.in_flight.items()
            ],
            "from_client": self.counts[CLIENT],
            "from_broker": self.counts[BROKER],
            "problems": [plain(problem) for problem in self.problems],
        }


def _who(way: int) -> str:
    return "broker" if way else "client"


def _reason(code: int, version: int) -> str:
    if version != mqtt.V5 and code < len(mqtt.CONNACK_3):
        return mqtt.CONNACK_3[code]
    return mqtt.REASONS.get(code, f"reason {code}")
