"""MQTT packets: known bytes, every type both ways, any pieces, nothing but WireError for garbage."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.errors import WireError
from connector.wire import mqtt
from connector.wire.mqtt_encode import encode_packet

PROPERTIES: dict[str, Any] = {
    "user_property": [["a", "b"], ["a", "c"]], "reason_string": "why", "receive_maximum": 20,
}  # fmt: skip
EVERY: list[tuple[str, dict[str, Any], int]] = [
    ("CONNECT", {"client_id": "c", "keep_alive": 30, "clean_start": True, "version": 4}, 4),
    (
        "CONNECT",
        {
            "client_id": "c", "keep_alive": 0, "clean_start": False, "version": 5, "username": "u", "password": b"\0p",
            "properties": {"session_expiry_interval": 7, "authentication_data": b"x"},
            "will": {
                "topic": "w", "payload": b"gone", "qos": 2, "retain": True, "properties": {"will_delay_interval": 1},
            },
        },
        5,
    ),
    ("CONNECT", {"client_id": "old", "keep_alive": 1, "clean_start": True, "version": 3}, 3),
    ("CONNACK", {"session_present": True, "reason": 0}, 4),
    ("CONNACK", {"session_present": False, "reason": 135, "properties": {"maximum_qos": 1, "server_keep_alive": 9}}, 5),
    ("PUBLISH", {"topic": "a/b", "qos": 0, "retain": True, "dup": False, "payload": b"\x00\xff"}, 4),
    ("PUBLISH", {"topic": "a/b", "qos": 2, "retain": False, "dup": True, "packet_id": 7, "payload": b""}, 4),
    (
        "PUBLISH",
        {
            "topic": "", "qos": 1, "retain": False, "dup": False, "packet_id": 7, "payload": b"x",
            "properties": {
                "topic_alias": 3, "subscription_identifier": [1, 300], "content_type": "t", "correlation_data": b"c",
            },
        },
        5,
    ),
    *((name, {"packet_id": 65_535}, 4) for name in ("PUBACK", "PUBREC", "PUBREL", "PUBCOMP", "UNSUBACK")),
    ("PUBACK", {"packet_id": 1, "reason": 16, "properties": {"reason_string": "r"}}, 5),
    ("SUBSCRIBE", {"packet_id": 1, "filters": [{"topic": "#", "qos": 2}, {"topic": "+", "qos": 0}]}, 4),
    (
        "SUBSCRIBE",
        {
            "packet_id": 1, "properties": {"subscription_identifier": [128]},
            "filters": [{"topic": "#", "qos": 1, "no_local": True, "retain_as_published": False, "retain_handling": 2}],
        },
        5,
    ),
    ("SUBACK", {"packet_id": 1, "reasons": [0, 1, 2, 128]}, 4),
    ("SUBACK", {"packet_id": 1, "reasons": [0, 143], "properties": PROPERTIES}, 5),
    ("UNSUBSCRIBE", {"packet_id": 1, "topics": ["a", "b/#"]}, 4),
    ("UNSUBACK", {"packet_id": 1, "reasons": [0, 17]}, 5),
    ("PINGREQ", {}, 4),
    ("PINGRESP", {}, 5),
    ("DISCONNECT", {}, 4),
    ("DISCONNECT", {"reason": 4, "properties": PROPERTIES}, 5),
    ("AUTH", {"reason": 24, "properties": {"authentication_method": "m", "authentication_data": b"\0"}}, 5),
]  # fmt: skip


def encoded(name: str, fields: dict[str, Any], version: int) -> bytes:
    return encode_packet(mqtt.KINDS[name], fields, version)


@pytest.mark.parametrize(("name", "fields", "version"), EVERY)
def test_every_packet_comes_back_as_it_was(name: str, fields: dict[str, Any], version: int) -> None:
    packet = mqtt.decode_packet(encoded(name, fields, version), version)
    assert (packet.name, packet.fields) == (name, fields)


def test_every_type_is_among_them() -> None:
    assert {name for name, _, _ in EVERY} == set(mqtt.KINDS)


def test_known_bytes_of_a_connect() -> None:
    data = bytes.fromhex("101800044d5154540402003c000c73656e736f722d31323334350a"[:52])
    packet = mqtt.decode_packet(data, mqtt.V311)
    assert packet.fields == {"version": 4, "clean_start": True, "keep_alive": 60, "client_id": "sensor-12345"}


def test_paho_agrees_on_a_publish() -> None:
    assert encoded("PUBLISH", {"topic": "t/x", "payload": b"hi", "qos": 1, "packet_id": 10}, 4) == bytes.fromhex(
        "32090003742f78000a6869"
    )


def test_notes_cover_the_packet_without_gaps() -> None:
    for name, fields, version in EVERY:
        notes: list[mqtt.Note] = []
        data = encoded(name, fields, version)
        mqtt.decode_packet(data, version, notes)
        covered = bytearray(len(data))
        for start, length, _, _ in notes:
            covered[start : start + length] = b"\1" * length
        missing = len(data) - sum(covered)
        assert missing <= 2, (name, notes)  # at most a length byte of nested properties


@given(st.lists(st.sampled_from(EVERY), max_size=8), st.integers(0, 2**32))
def test_a_stream_cut_anywhere_gives_the_same_packets(packets: list[Any], seed: int) -> None:
    whole = [encoded(*packet) for packet in packets]
    stream = b"".join(whole)
    rng = random.Random(seed)
    splitter = mqtt.PacketSplitter(1_000)
    found: list[tuple[bytes, int]] = []
    at = 0
    while at < len(stream):
        step = rng.randint(1, 9)
        found += splitter.feed(stream[at : at + step])
        at += step
    assert [packet for packet, _ in found] == whole
    assert splitter.held == 0


def test_a_packet_longer_than_the_limit_comes_out_as_its_start() -> None:
    long = encoded("PUBLISH", {"topic": "t", "payload": b"x" * 5_000}, 4)
    ping = encoded("PINGREQ", {}, 4)
    for step in (1, 7, 100, 10_000):
        splitter = mqtt.PacketSplitter(100)
        found = []
        stream = ping + long + ping
        for at in range(0, len(stream), step):
            found += splitter.feed(stream[at : at + step])
        assert [size for _, size in found] == [2, len(long), 2]
        assert found[1][0] == long[: len(found[1][0])]
        assert len(found[1][0]) <= 100


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("00 00", "reserved type"),
        ("10 ff ff ff ff 01", "four bytes"),
        ("36 05 0001 61 0001", "QoS 3"),
        ("82 02 0001", "without a topic filter"),
        ("80 05 0001 0001 61", "flags 0"),
        ("c0 01 00", "too many"),
        ("30 03 0001 ff", "not UTF-8"),
        ("10 0c 0004 4d515454 04 01 003c 0000", "connect flags"),
    ],
)
def test_what_is_wrong_is_named(data: str, words: str) -> None:
    with pytest.raises(WireError, match=words):
        mqtt.decode_packet(bytes.fromhex(data))


def test_garbage_raises_wire_errors_only() -> None:
    rng = random.Random(20_261_124)
    corpus = [(encoded(*packet), packet[2]) for packet in EVERY]
    understood = 0
    for _ in range(6_000):
        data, version = rng.choice(corpus)
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            if rng.random() < 0.7:
                changed[rng.randrange(len(changed))] = rng.choice((0, 1, 2, 4, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            else:
                at = rng.randrange(len(changed))
                changed[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
            if not changed:
                changed = bytearray(b"\0")
        try:
            mqtt.decode_packet(bytes(changed), rng.choice((3, 4, version)), [])
            understood += 1
        except WireError:
            pass
        splitter = mqtt.PacketSplitter(50)
        try:
            splitter.feed(bytes(changed))
        except WireError:
            pass
    assert understood > 100


def test_what_cannot_be_encoded_is_named() -> None:
    with pytest.raises(WireError, match="'topic'"):
        encode_packet(mqtt.PUBLISH, {})
    with pytest.raises(WireError, match="no property 'colour'"):
        encode_packet(mqtt.PUBACK, {"packet_id": 1, "properties": {"colour": 1}}, 5)
    with pytest.raises(WireError, match="wrong kind"):
        encode_packet(mqtt.PUBACK, {"packet_id": "x"})
