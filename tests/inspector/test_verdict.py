"""Why a stream ended, in words: every hop that can cut it, from both sides, live and out of a capture."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from connector.errors import EdgeLostError, ProtocolError
from connector.inspector.capture import read_bytes, write_items
from connector.inspector.hub import Inspector
from connector.inspector.snapshot import load_items, snapshot_items
from connector.inspector.streams import StreamRecord
from connector.inspector.verdict import Verdict
from connector.protocol.ports import Request, RequestKind, ResetCode, ResponseSource, StreamPort, StreamSink
from tests.inspector.traffic import connect, down, open_stream, packet, up, websocket_request

CANCELLED = ProtocolError("the edge reset the stream: CANCEL")


class Session:
    """An MQTT session over one stream of a hub; `quiet` lets time pass."""

    def __init__(self, hub: Inspector, keep_alive: int = 600) -> None:
        self.hub = hub
        hub.started -= 1_000  # time that may pass within the recording
        link = hub.open_link("http2", "192.0.2.7:7844", 0)
        self.sink: StreamSink
        self.port: StreamPort
        self.sink, self.port, _, _ = open_stream(link, websocket_request())
        self.record: StreamRecord = hub.streams[hub.seen]
        self.port.respond(101, [(b"Upgrade", b"websocket")])
        self.sink.on_data(up(connect(keep_alive=keep_alive)))
        self.port.write(down(packet("CONNACK", session_present=False, reason=0)))

    def quiet(self, seconds: float) -> None:
        """Move everything so far into the past."""
        record = self.record
        assert record.frames is not None
        session = record.frames.mqtt
        assert session is not None
        record.started -= seconds
        for entry in record.frames.ring:
            entry.now -= seconds
        session.last = [at - seconds for at in session.last]
        session.ping_sent -= seconds if session.ping_sent else 0
        session.ping_answered -= seconds if session.ping_answered else 0

    def cut(self) -> None:
        self.sink.on_reset(CANCELLED)

    @property
    def verdict(self) -> Verdict:
        return self.record.verdict()


def test_an_idle_cut_is_known_by_its_coming_again() -> None:
    hub = Inspector("connector")
    first = Session(hub)
    assert first.verdict.line == "This session may be cut when it is quiet: the client's keep-alive is 600 s."
    assert first.verdict.advice == "Set it to 30 s."
    first.quiet(10)
    first.cut()
    assert first.verdict.hop == "edge"
    assert first.record.row()["why"] == "cut by the edge, idle 10 s"
    assert "if not, the visitor vanished" in first.verdict.evidence[-1]
    second = Session(hub)
    second.quiet(10)
    second.cut()
    assert first.verdict.evidence[0].startswith("2 of 2 ended connections of 'sensor-1' were cut after 10 s of silence")
    assert first.verdict.advice == "The client's keep-alive is 600 s, so it would have pinged too late: set it to 5 s."
    third = Session(hub)
    assert third.verdict.evidence == ["2 of 2 connections before this one were cut by the edge after 10 s of silence."]


def test_the_real_edge_s_limit_is_known() -> None:
    session = Session(Inspector("connector"), keep_alive=0)
    session.quiet(100)
    session.cut()
    assert session.verdict.evidence[0] == "Cloudflare's edge cuts a WebSocket in which nothing passes for 100 s."
    assert session.verdict.advice == "The client's keep-alive is off, so it never pings: set it to 30 s."


def _unanswered_ping(session: Session) -> None:
    session.sink.on_data(up(packet("PINGREQ")))
    session.quiet(8)
    session.sink.on_eof()
    session.port.write_eof()


def _goodbye(session: Session) -> None:
    session.sink.on_data(up(packet("DISCONNECT")))
    session.sink.on_eof()
    session.port.write_eof()


def _silent_client(session: Session) -> None:
    session.quiet(901)
    session.port.write_eof()
    session.sink.on_eof()


def _link_lost(session: Session) -> None:
    session.sink.on_reset(EdgeLostError("connection reset by the edge"))


def _origin_lost(session: Session) -> None:
    session.port.reset(ResetCode.FAILED)


def _broker_leaves(session: Session) -> None:
    session.port.write_eof()
    session.sink.on_eof()


ENDS: list[tuple[Callable[[Session], None], str, str, str]] = [
    (_unanswered_ping, "origin", "The broker stopped answering", "no PINGRESP"),
    (_goodbye, "", "The client said DISCONNECT", ""),
    (_silent_client, "visitor", "The broker ended the session because the client was silent", "closed by the origin"),
    (_link_lost, "link", "The link between edge and connector was lost", "link lost"),
    (_origin_lost, "connector", "The connector gave this MQTT connection up", "given up by the connector"),
    (_broker_leaves, "origin", "The broker ended this MQTT connection first", "closed by the origin"),
]


@pytest.mark.parametrize(("end", "hop", "line", "short"), ENDS)
def test_every_end_names_its_hop(end: Callable[[Session], None], hop: str, line: str, short: str) -> None:
    hub = Inspector("connector")
    session = Session(hub)
    end(session)
    assert session.verdict.line.startswith(line)
    assert (session.verdict.hop, session.record.row()["why"]) == (hop, short)
    # A recording of it says the same.
    again = Inspector("capture")
    load_items(again, read_bytes(write_items(snapshot_items(hub), redacted=True))[1])
    [loaded] = again.streams.values()
    assert (loaded.verdict().hop, loaded.verdict().line[:20]) == (hop, session.verdict.line[:20])


def test_a_ping_that_is_still_open() -> None:
    session = Session(Inspector("connector"), keep_alive=30)
    assert session.verdict.lines == []
    session.sink.on_data(up(packet("PINGREQ")))
    session.quiet(4)
    assert session.verdict.line == "The PINGREQ of 4 s ago has no PINGRESP: the broker does not answer."
    session.port.write(down(packet("PINGRESP")))
    assert session.verdict.lines == []


def test_requests() -> None:
    hub = Inspector("connector", describe=lambda request: (0, "http://127.0.0.1:1"))
    link = hub.open_link("http2", "192.0.2.7:7844", 0)
    request = Request(RequestKind.HTTP, b"GET", b"/", b"web.example.com", [])
    for number, (act, line) in enumerate(
        (
            (lambda sink, port: port.respond(502, [], ResponseSource.CONNECTOR) or port.write_eof(),
             "The connector answered 502 itself: it got no usable answer of the origin http://127.0.0.1:1."),
            (lambda sink, port: sink.on_reset(CANCELLED), "The edge cancelled the request after"),
            (lambda sink, port: port.respond(200, []) or port.write(b"abc") or port.reset(ResetCode.FAILED),
             "The answer was cut short after 3 bytes"),
            (lambda sink, port: sink.on_eof() or port.respond(200, []) or port.write_eof(), ""),
        ),
        1,
    ):  # fmt: skip
        sink, port, _, _ = open_stream(link, request)
        act(sink, port)
        assert hub.streams[number].verdict().line.startswith(line)
        assert bool(hub.streams[number].verdict().line) == bool(line)
