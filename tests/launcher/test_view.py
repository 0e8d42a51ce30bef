"""What is printed: the children's lines in words, floods folded, secrets and control characters kept out."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest

from launcher import view
from launcher.view import BrokerReader, Console, EdgeReader, Event, read_connector

V20 = """\
1: mosquitto version 2.0.11 running
New client connected from ::ffff:127.0.0.1:49225 as sensor 1 (p2, c1, k60, u'demo').
No will message specified.
Sending CONNACK to sensor 1 (0, 0)
Received SUBSCRIBE from sensor 1
\tdemo/# (QoS 1)
sensor 1 1 demo/#
Received PUBLISH from sensor 1 (d0, q1, r1, m2, 'demo/it's', ... (32 bytes))
Sending PUBACK to sensor 1 (m2, rc0)
Denied PUBLISH from sensor 1 (d0, q0, r0, m0, 'x', ... (0 bytes))
Sending CONNACK to ::ffff:127.0.0.1 (0, 135)
Client <unknown> closed its connection.
Client sensor 1 has exceeded timeout, disconnecting.
Error: Unable to write pid file."""

V21 = """\
New client connected from 127.0.0.1:48187 as s (p5, c1, k30, u'health').
Client s [127.0.0.1:48187] disconnected: not authorised.
New client connected from 127.0.0.1:48188 as s (p4, c1, k30).
Client s [127.0.0.1:48188] closed its connection."""


def broker(text: str) -> list[tuple[str, str]]:
    reader = BrokerReader()
    return [(event.name, event.text) for line in text.splitlines() if (event := reader.read(line)) is not None]


def test_mosquitto_2_0_in_words() -> None:
    assert broker(V20) == [
        ("connected", "+ sensor 1 (demo) connected, MQTT 3.1.1"),
        ("publish", "> demo/it's (32 B, QoS 1, retained) from sensor 1 (demo)"),
        ("denied", "! refused by the rules: x (0 B, QoS 0) from sensor 1 (demo)"),
        ("refused", "! ::ffff:127.0.0.1 refused: not authorised (135)"),
        ("disconnected", "- sensor 1 (demo) has exceeded timeout, disconnecting"),
        ("log", "Error: Unable to write pid file."),
    ]


def test_mosquitto_2_1_in_words() -> None:
    assert broker(V21) == [
        ("connected", "+ s (health) connected, MQTT 5"),
        ("disconnected", "- s (health) disconnected: not authorised"),
        ("connected", "+ s connected, MQTT 3.1.1"),
        ("disconnected", "- s closed its connection"),
    ]


def test_subscriptions_name_who_wants_what() -> None:
    lines = "New client connected from 127.0.0.1:1 as a (p5, c1, k30, u'demo').\na 1 demo/#"
    assert broker(lines)[-1] == ("subscribed", "< demo/# (QoS 1) wanted by a (demo)")


def test_facts_are_for_programs() -> None:
    event = BrokerReader().read("Received PUBLISH from a (d0, q1, r0, m2, 'demo/x', ... (32 bytes))")
    assert event is not None
    assert event.facts == {"client": "a", "topic": "demo/x", "qos": 1, "retain": False, "bytes": 32}


def test_remembered_clients_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BrokerReader, "MAX_KNOWN", 10)
    monkeypatch.setattr(EdgeReader, "MAX_OPEN", 10)
    reader, edge = BrokerReader(), EdgeReader()
    for number in range(100):
        reader.read(f"New client connected from 127.0.0.1:1 as {number} (p5, c1, k30, u'x').")
        edge.read(json.dumps({"event": "request", "ray": f"{number:08}", "method": "GET", "path": "/"}))
    assert len(reader._known) == 10
    assert len(edge._open) == 10


def test_an_edge_request_is_told_with_its_end() -> None:
    reader = EdgeReader()
    base = {"ray": "04f0d5852fce3b47-DEV"}
    request = {"kind": "websocket", "method": "GET", "path": "/mqtt", "client": "127.0.0.1"}
    texts = [
        reader.read(json.dumps({"event": name, **base, **fields})).text
        for name, fields in (
            ("request", request),
            ("response", {"status": 101}),
            ("stream_closed", {"bytes_up": 1234, "bytes_down": 5, "ms": 4200}),
        )
    ]
    assert texts == [
        "04f0d585 WebSocket /mqtt from 127.0.0.1",
        "04f0d585 WebSocket /mqtt -> 101",
        "04f0d585 WebSocket /mqtt closed: 1.2 kB up, 5 B down, 4.2 s",
    ]


@pytest.mark.parametrize(
    ("facts", "text", "bad"),
    [
        ({"event": "register_refused", "cause": "Unauthorized"}, "refused a connector: Unauthorized", True),
        ({"event": "configuration", "version": 2, "applied": True}, "configuration version 2 applied", False),
        (
            {"event": "configuration", "version": 2, "applied": False, "error": "rule 1"},
            "configuration version 2 refused: rule 1",
            True,
        ),
        ({"event": "disconnected", "error": "reset"}, "connector disconnected: reset", True),
        ({"event": "unregistered", "error": None}, "connector unregistered", False),
        ({"event": "new", "time": "x", "a": 1}, "new a=1", False),
    ],
)
def test_other_edge_events(facts: dict[str, object], text: str, bad: bool) -> None:
    event = EdgeReader().read(json.dumps(facts))
    assert (event.text, event.bad) == (text, bad)


@pytest.mark.parametrize("line", ["plain", "[1]", '{"event": 1}', '{"x": 2}', '"text"', "{"])
def test_lines_that_are_no_events_are_told_as_they_are(line: str) -> None:
    assert EdgeReader().read(line).text == line


def test_the_connectors_lines_in_words() -> None:
    line = json.dumps({"level": "error", "message": "Unable to reach", "error": "refused", "time": "x", "connIndex": 0})
    event = read_connector(line)
    assert (event.text, event.bad) == ("Unable to reach connIndex=0 error=refused", True)
    assert read_connector("Traceback").text == "Traceback"
    assert not read_connector('{"level":"info","message":"ok"}').bad


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (5e12, "5000.0 GB")]
)
def test_size(count: float, text: str) -> None:
    assert view.size(count) == text


@pytest.mark.parametrize(("ms", "text"), [(3, "3 ms"), (4200, "4.2 s"), (600_000, "10 min")])
def test_duration(ms: float, text: str) -> None:
    assert view.duration(ms) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def frozen(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]
    monkeypatch.setattr(view.time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_a_terminal_gets_colours_and_lines_that_fit(terminal: Terminal) -> None:
    Console(terminal).event(Event("broker", "log", "x" * 500))
    line = terminal.getvalue()
    assert "\x1b[32mbroker" in line
    plain = line.replace("\x1b[32m", "").replace("\x1b[0m", "").rstrip("\n")
    assert len(plain) <= 80
    assert plain.endswith("…")


def test_no_color_and_pipes_get_plain_text(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    pipe = io.StringIO()
    for out in (terminal, pipe):
        console = Console(out)
        console.event(Event("broker", "log", "text", bad=True))
        console.failure("broker", "why", "advice", ["tail"])
        assert "\x1b" not in out.getvalue()
    assert "FAILED at broker: why" in pipe.getvalue()


def test_a_strangers_control_characters_do_not_reach_the_terminal() -> None:
    out = io.StringIO()
    console = Console(out)
    console.event(Event("broker", "connected", "+ \x1b]0;pwned\x07\x9b2J\r\u202e connected"))
    console.failure("broker", "bad \x1b[2J", "do \x1b[2J", ["\x1b[2J"])
    assert not any(c in out.getvalue() for c in "\x1b\x07\x9b\r\u202e")


def test_secrets_are_hidden_everywhere_but_where_they_are_revealed() -> None:
    for as_json in (False, True):
        out = io.StringIO()
        console = Console(out, as_json=as_json)
        console.hide("s3cret")
        console.event(Event("edge", "log", "s3cret", {"line": "s3cret"}))
        console.progress("edge", "s3cret")
        console.check("hop", "s3cret", 1.0)
        console.text("s3cret")
        console.failure("hop", "s3cret", "s3cret", ["s3cret"])
        assert "s3cret" not in out.getvalue()
        console.reveal("s3cret", event="ready", password="s3cret")
        assert "s3cret" in out.getvalue()


def test_floods_are_folded_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = frozen(monkeypatch)
    out = io.StringIO()
    console = Console(out)
    for _ in range(1000):
        console.event(Event("broker", "publish", "message"))
    console.event(Event("broker", "connected", "somebody"))
    lines = out.getvalue().splitlines()
    assert len(lines) == view.MESSAGES_PER_SECOND + 1
    assert "somebody" in lines[-1]
    advance(1.0)
    console.flush_folded()
    console.flush_folded()
    assert out.getvalue().splitlines()[-1].endswith(f"... and {1000 - view.MESSAGES_PER_SECOND} more events")
    for _ in range(1000):
        console.event(Event("edge", "request", "request"))
    advance(1.0)
    console.event(Event("edge", "request", "the next second"))
    assert len(out.getvalue().splitlines()) == len(lines) + 1 + view.LINES_PER_SECOND + 2


def test_programs_get_all_of_it_as_json() -> None:
    out = io.StringIO()
    console = Console(out, as_json=True)
    for number in range(200):
        console.event(Event("broker", "publish", "text", {"bytes": number, "event": "fake", "time": "fake"}))
    console.text("for people")
    facts = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [fact["bytes"] for fact in facts] == list(range(200))
    assert all(fact["event"] == "publish" and fact["service"] == "broker" and fact["time"] != "fake" for fact in facts)


def test_a_reader_that_left_is_noticed_once() -> None:
    class Gone(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    lost: list[int] = []
    console = Console(Gone(), on_lost=lambda: lost.append(1))
    console.text("a")
    console.text("b")
    assert lost == [1]
