"""The topics of all MQTT sessions seen, with rates and the last message of each.

Owns: TopicTree. In: publishes. Out: rows for the page. Never: more than MAX_TOPICS topics.
"""

from __future__ import annotations

from typing import Any

from connector.inspector.redact import redact_bytes, redact_text
from connector.inspector.values import bytes_to_json

MAX_TOPICS = 5_000
"""Topics remembered; the one that was silent longest goes. A fleet with a topic per device has thousands."""

KEPT_PAYLOAD = 256
"""Bytes of a topic's last message."""


class Topic:
    """One topic: counts since the start, and its last message."""

    __slots__ = ("bytes", "count", "last", "last_count", "payload", "qos", "rate", "retained")

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0
        self.last = 0.0
        self.last_count = 0
        self.rate = 0.0
        self.payload = b""
        self.qos = 0
        self.retained = False


class TopicTree:
    """All topics of one inspector. `publish` per message; `rows` when somebody looks."""

    def __init__(self) -> None:
        self._topics: dict[str, Topic] = {}
        self._measured = 0.0

    def __len__(self) -> int:
        return len(self._topics)

    def publish(self, name: str, payload: bytes, size: int, qos: int, retained: bool, now: float) -> None:
        """Count one message that a client sent to the broker."""
        topic = self._topics.get(name)
        if topic is None:
            if len(self._topics) >= MAX_TOPICS:
                del self._topics[min(self._topics, key=lambda key: self._topics[key].last)]
            topic = self._topics[name] = Topic()
        topic.count += 1
        topic.bytes += size
        topic.last = now
        topic.payload = payload[:KEPT_PAYLOAD]
        topic.qos = qos
        topic.retained = topic.retained or retained

    def rows(self, now: float, no_redact: bool = False) -> list[dict[str, Any]]:
        """Return one row per topic, sorted by name; rates are per second since rows were asked for before."""
        elapsed = now - self._measured
        if elapsed >= 0.5:
            for topic in self._topics.values():
                topic.rate = (topic.count - topic.last_count) / elapsed if self._measured else 0.0
                topic.last_count = topic.count
            self._measured = now
        return [
            {
                "topic": name if no_redact else redact_text(name),
                "count": topic.count,
                "bytes": topic.bytes,
                "rate": round(topic.rate, 2),
                "age": round(now - topic.last, 1),
                "qos": topic.qos,
                "retained": topic.retained,
                "last": bytes_to_json(topic.payload if no_redact else _plain(topic)),
            }
            for name, topic in sorted(self._topics.items())
        ]


def _plain(topic: Topic) -> bytes:
    return redact_bytes(topic.payload, cut=len(topic.payload) == KEPT_PAYLOAD)
