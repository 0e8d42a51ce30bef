"""Whole exchanges with the `h2` library in the edge's place."""

from __future__ import annotations

import h2.events
import h2.settings
import pytest

from connector.protocol.ports import Request, StreamPort
from tests.support.h2_doubles import GET, POST, Pair, Sink


def test_get_is_answered_as_in_the_worked_example() -> None:
    pair = Pair()
    stream_id = pair.request()
    pair.to_engine()
    (sink,) = pair.sinks
    assert sink.calls == ["eof"]
    sink.port.respond(200, [(b"content-length", b"2"), (b"Content-Type", b"text/html")])
    sink.port.write(b"ok")
    sink.port.write_eof()
    pair.exchange()
    assert sorted(pair.response(stream_id)) == [
        (b":status", b"200"),
        (b"cf-cloudflared-response-headers", b"Q29udGVudC1MZW5ndGg:Mg;Q29udGVudC1UeXBl:dGV4dC9odG1s"),
        (b"cf-cloudflared-response-meta", b'{"src":"origin"}'),
        (b"content-length", b"2"),
    ]
    assert pair.body(stream_id) == b"ok"
    assert pair.saw(h2.events.StreamEnded, stream_id)
    assert pair.engine.open_streams == 0


@pytest.mark.parametrize("window", [1, 100, 65_535, 1_000_000])
@pytest.mark.parametrize("chunk", [1_000, 100_000])
def test_big_bodies_both_ways(window: int, chunk: int) -> None:
    size = 2_000 if window == 1 else 300_000
    body = bytes(range(256)) * (size // 256)

    class Echo(Sink):
        def on_data(self, data) -> None:
            super().on_data(data)
            self.port.write(data)

        def on_eof(self) -> None:
            super().on_eof()
            self.port.write_eof()

    def make(request: Request, port: StreamPort) -> Sink:
        sink = Echo(request, port)
        port.respond(200, [])
        return sink

    pair = Pair(make, settings={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
    stream_ids = [pair.request(POST, end=False) for _ in range(3)]
    sent = dict.fromkeys(stream_ids, 0)
    while any(done < len(body) for done in sent.values()):
        for stream_id in stream_ids:
            left = min(
                chunk,
                len(body) - sent[stream_id],
                pair.edge.local_flow_control_window(stream_id),
                pair.edge.max_outbound_frame_size,
            )
            if left:
                pair.edge.send_data(stream_id, body[sent[stream_id] : sent[stream_id] + left])
                sent[stream_id] += left
        pair.exchange()
    for stream_id in stream_ids:
        pair.edge.end_stream(stream_id)
    pair.exchange()
    for sink, stream_id in zip(pair.sinks, stream_ids, strict=True):
        assert bytes(sink.data) == body
        assert pair.body(stream_id) == body
        assert pair.saw(h2.events.StreamEnded, stream_id)
    assert pair.engine.open_streams == 0
    assert pair.engine.bytes_queued == 0
    assert not pair.errors


def test_host_names_come_from_authority() -> None:
    pair = Pair()
    pair.request([*GET, (b"host", b"other")])
    pair.to_engine()
    assert pair.sinks[0].request.host == b"app.example.com"


def test_payload_is_counted_without_a_counter_on_the_way() -> None:
    pair = Pair()
    stream_id = pair.request(POST, end=False)
    pair.exchange()
    port = pair.sinks[0].port
    assert port.traffic() == (0, 0)
    for _ in range(40):  # more than two windows each way
        pair.edge.send_data(stream_id, bytes(60_000)[: pair.edge.local_flow_control_window(stream_id)][:16_000])
        pair.exchange()
    sent = 40 * 16_000
    port.spans = b"c3BhbnM="
    port.respond(200, ())
    for _ in range(30):
        port.write(bytes(50_000))
    pair.exchange()
    assert port.traffic() == (sent, 1_500_000)
    assert (b"cf-int-cloudflared-tracing", b"c3BhbnM=") in pair.response(stream_id)
    pair.edge.end_stream(stream_id)
    port.write_eof()
    pair.exchange()
    assert port.traffic() == (sent, 1_500_000)
