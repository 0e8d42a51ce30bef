"""What the inspector makes of WebSocket and MQTT bytes, however they are cut; and that its memory ends somewhere."""

from __future__ import annotations

import random
import zlib
from time import monotonic

import pytest

from connector.inspector import hub as hub_module
from connector.inspector.frames import RING, Entry, FrameLog
from connector.inspector.hub import MAX_STREAMS, Inspector
from connector.protocol.ports import Request, RequestKind, ResetCode, ResponseSource
from connector.wire import mqtt, websocket
from tests.inspector.traffic import (
    SECRETS,
    connect,
    down,
    open_stream,
    packet,
    play_everything,
    play_mqtt,
    up,
    websocket_request,
)


def log_of(stream: bytes, *, seed: int = 0) -> tuple[FrameLog, list[Entry]]:
    entries: list[Entry] = []
    log = FrameLog(entries.append, None)
    rng = random.Random(seed)
    at = 0
    while at < len(stream):
        step = rng.choice((1, 2, 5, 40, 5_000))
        log.feed(0, stream[at : at + step], 1.0)
        at += step
    log.flush()
    return log, entries


@pytest.mark.parametrize("seed", range(5))
def test_no_byte_of_a_password_is_kept_wherever_frames_and_reads_cut_it(seed: int) -> None:
    rng = random.Random(seed)
    hello = connect()
    pieces = []
    at = 0
    while at < len(hello):
        step = rng.randint(1, 12)
        pieces.append(hello[at : at + step])
        at += step
    stream = b"".join(up(piece) for piece in pieces) + up(packet("PINGREQ"))
    log, entries = log_of(stream, seed=seed)
    joined = b"".join(entry.payload for entry in entries)
    assert SECRETS[0] not in joined
    assert b"*" * len(SECRETS[0]) in joined
    assert len(joined) == len(hello) + 2
    assert log.mqtt is not None
    assert log.mqtt.client_id == "sensor-1"
    assert [mqtt.NAMES[p.kind] for entry in entries for p in entry.packets] == ["CONNECT", "PINGREQ"]


def test_a_connect_that_never_ends_is_masked_whole() -> None:
    _, entries = log_of(up(connect()[:-4]))
    assert SECRETS[0][:4] not in b"".join(entry.payload for entry in entries)


def test_many_packets_in_a_frame_and_a_packet_in_many_frames() -> None:
    publish = packet("PUBLISH", topic="a", payload=b"x" * 300)
    stream = up(connect()) + up(publish * 3 + publish[:10]) + up(publish[10:200]) + up(publish[200:])
    log, entries = log_of(stream)
    assert log.mqtt is not None
    assert log.mqtt.counts[0] == {"CONNECT": 1, "PUBLISH": 4}
    assert [len(entry.packets) for entry in entries] == [1, 3, 0, 1]


def test_large_publishes_do_not_lose_the_thread() -> None:
    big = packet("PUBLISH", topic="big", payload=b"x" * 400_000)
    log, _ = log_of(up(connect()) + up(big) + up(packet("PUBLISH", topic="small", payload=b"y")))
    assert log.mqtt is not None
    assert log.mqtt.lost == ""
    assert log.mqtt.counts[0]["PUBLISH"] == 2


def test_compressed_messages() -> None:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = b""
    for text in (b"hello hello hello", b"hello again"):
        data = squeeze.compress(text) + squeeze.flush(zlib.Z_SYNC_FLUSH)
        stream += websocket.encode_frame(websocket.Frame(websocket.TEXT, data[:-4], rsv=4, mask=b"abcd"))
    stream += up(b"plain", opcode=websocket.TEXT)
    _, entries = log_of(stream)
    assert [entry.payload for entry in entries] == [b"hello hello hello", b"hello again", b"plain"]


def test_a_bomb_is_not_unpacked() -> None:
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = bomb.compress(bytes(50_000_000)) + bomb.flush(zlib.Z_SYNC_FLUSH)
    log, entries = log_of(websocket.encode_frame(websocket.Frame(websocket.BINARY, data[:-4], rsv=4, mask=b"abcd")))
    assert "more than" in log.broken
    assert sum(len(entry.payload) for entry in entries) <= 65_536


def test_garbage_ends_the_looking_and_nothing_else() -> None:
    rng = random.Random(2)
    for _ in range(300):
        log, _ = log_of(rng.randbytes(200))
        log.feed(1, rng.randbytes(200), 1.0)
        session = log.mqtt
        if session is not None:
            session.snapshot(2.0)


def test_a_session_tells_its_story() -> None:
    hub = Inspector("connector")
    link = hub.open_link("http2", "192.0.2.7:7844", 0)
    sink, port, _, _ = open_stream(link, websocket_request())
    port.respond(101, [(b"Upgrade", b"websocket")])
    sink.on_data(up(connect(keep_alive=5, will={"topic": "gone", "payload": b"x", "qos": 1, "retain": True})))
    port.write(down(packet("CONNACK", session_present=True, reason=0)))
    sink.on_data(up(packet("SUBSCRIBE", packet_id=1, filters=[{"topic": "a/#", "qos": 1}, {"topic": "no", "qos": 2}])))
    port.write(down(packet("SUBACK", packet_id=1, reasons=[1, 128])))
    sink.on_data(up(packet("PUBLISH", topic="a", qos=2, packet_id=9, payload=b"1", retain=True)))
    port.write(down(packet("PUBREC", packet_id=9)))
    sink.on_data(up(packet("PINGREQ")))
    record = hub.streams[1]
    [session] = hub.sessions()
    assert session["will"] == {"topic": "gone", "qos": 1, "retain": True}
    assert [entry["topic"] for entry in session["subscriptions"]] == ["a/#"]
    assert session["in_flight"][0] | {"since": 0} == {
        "from": "client", "packet_id": 9, "topic": "a", "qos": 2, "state": "PUBREC", "since": 0,
    }  # fmt: skip
    assert session["ping_outstanding"]
    assert session["problems"] == ["subscription to no refused: unspecified error"]
    assert hub.topics.rows(monotonic())[0]["retained"]
    assert record.frames is not None
    for entry in record.frames.ring:
        entry.now -= 100
    assert record.frames.mqtt is not None
    record.frames.mqtt.last[0] -= 100
    record.frames.mqtt.ping_sent -= 100
    sink.on_reset(ConnectionError("the edge reset the stream: CANCEL"))
    told = record.diagnosis()
    assert told[0].startswith("The broker stopped answering: the client's PINGREQ of 100.")
    assert "Subscription to no refused: unspecified error." in told
    assert "The session ended without DISCONNECT, so the broker publishes its will to gone." in told


def test_calls_reach_both_ends_unchanged() -> None:
    hub = Inspector("connector")
    link = hub.open_link("http2", "x:1", 0)
    outer, inner, port, sink = open_stream(link, Request(RequestKind.HTTP, b"GET", b"/", b"h", ()))
    outer.on_data(b"up")
    outer.pause_writing()
    outer.resume_writing()
    inner.consumed(2)
    inner.respond(200, [(b"a", b"b")], ResponseSource.CONNECTOR)
    inner.write(b"down")
    inner.spans = b"s"
    outer.on_eof()
    inner.stop_reading()
    inner.write_eof()
    inner.reset(ResetCode.FAILED)
    assert sink.calls == [("data", b"up"), ("pause",), ("resume",), ("eof",)]
    assert port.calls == [
        ("consumed", 2), ("respond", 200), ("write", b"down"), ("stop_reading",), ("write_eof",),
        ("reset", ResetCode.FAILED),
    ]  # fmt: skip
    assert port.spans == b"s"
    assert hub.streams[1].how == "complete"


def test_memory_stays_under_its_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "MEMORY_CEILING", 16_000_000)
    hub = Inspector("connector")
    link = hub.open_link("http2", "x:1", 0)
    for number in range(3 * MAX_STREAMS):
        outer, inner, _, _ = open_stream(link, Request(RequestKind.HTTP, b"POST", b"/", b"h", ()))
        outer.on_data(bytes(3_000))
        if number % 3:
            outer.on_eof()
            inner.respond(200, ())
            inner.write_eof()
    assert hub.kept <= 16_000_000 + 10_000
    assert len(hub.streams) <= MAX_STREAMS
    assert hub.forgotten > 0
    counted = sum(record.memory for record in hub.streams.values())
    assert abs(counted - hub.kept) < 10_000
    sink, port = play_mqtt(link, end=False)
    for number in range(5 * RING):
        sink.on_data(up(packet("PUBLISH", topic="t", payload=b"x" * 900)))
        port.write(down(packet("PUBLISH", topic="t", payload=b"%d" % number)))
    assert hub.kept <= 16_000_000 + 10_000
    assert abs(sum(record.memory for record in hub.streams.values()) - hub.kept) < 10_000


def test_a_stream_that_was_forgotten_goes_on() -> None:
    hub = Inspector("connector")
    link = hub.open_link("http2", "x:1", 0)
    sink, port = play_mqtt(link, end=False)
    for _ in range(MAX_STREAMS + 1):
        open_stream(link, Request(RequestKind.HTTP, b"GET", b"/", b"h", ()))
    assert 1 not in hub.streams
    sink.on_data(up(packet("PUBLISH", topic="t", payload=b"x")))
    port.write_eof()
    sink.on_reset(None)


def test_links_show_frames_calls_and_no_secret() -> None:
    hub = Inspector("connector")
    link = play_everything(hub)
    rows = link.rows(0, 100)
    assert [row["kind"] for row in rows][:3] == ["PREFACE", "SETTINGS", "HEADERS"]
    text = repr(rows) + repr([row.row(full=True) for row in hub.control])
    for secret in SECRETS:
        assert secret.decode("latin-1") not in text
        assert secret.hex() not in text.replace(" ", "")
    assert "registerConnection answered" in [row.name for row in hub.control]
    assert hub.links[1].summary()["open"] is False


def test_configuration_pushes_become_diffs() -> None:
    hub = Inspector("connector")
    hub.on_configuration(1, '{"ingress":[{"service":"http://a"}]}')
    hub.on_configuration(2, '{"ingress":[{"service":"http://b"}],"secret":"HIDE-ME-1"}')
    first, second = hub.configurations
    assert (first["version"], second["version"]) == (1, 2)
    assert any(line.startswith("-") and "http://a" in line for line in second["diff"])
    assert any(line.startswith("+") and "http://b" in line for line in second["diff"])
    assert "HIDE-ME-1" not in second["text"]


def test_a_bug_of_the_inspector_stays_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Inspector("connector")
    link = hub.open_link("http2", "x:1", 0)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    outer, inner, port, sink = open_stream(link, Request(RequestKind.HTTP, b"GET", b"/", b"h", ()))
    for name in ("on_payload", "on_eof", "on_head", "end"):
        monkeypatch.setattr(type(hub.streams[1]), name, fail)
    monkeypatch.setattr(type(link), "_find_frames", fail)
    link.on_bytes(False, b"x")
    outer.on_data(b"up")
    outer.on_eof()
    inner.respond(200, ())
    inner.write(b"down")
    inner.write_eof()
    outer.on_reset(None)
    assert sink.calls == [("data", b"up"), ("eof",), ("reset", "None")]
    assert port.calls == [("respond", 200), ("write", b"down"), ("write_eof",)]
    assert "a bug" in hub.streams[1].error
    assert "a bug" in link.summary()["error"]
    monkeypatch.setattr(hub, "open_stream", fail)
    open_stream(link, Request(RequestKind.HTTP, b"GET", b"/", b"h", ()))
