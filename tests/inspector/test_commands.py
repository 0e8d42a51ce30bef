"""The commands as a user starts them: capture while running, replay, inspect, the terminal table, conformance."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from connector.inspector.capture import CaptureModel, CaptureWriter, read_capture
from connector.inspector.hub import Inspector
from connector.wire import websocket
from tests.inspector.traffic import Later, down, open_stream, packet, play_everything, up, websocket_request
from tests.inspector.traffic import connect as mqtt_connect
from tests.support.aio import run
from tests.support.origins import http_origin, mosquitto
from tests.support.processes import MOSQUITTO, ROOT, Child, connector, tunnel


def test_captures_of_both_sides_and_a_replay_with_the_same_answers(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    mine, theirs = tmp_path / "connector.capture", tmp_path / "edge.capture"
    with http_origin() as port:
        with tunnel(
            state, f"http://127.0.0.1:{port}", edge_args=("--capture", str(theirs)),
            run_args=("--ha-connections", "1", "--capture", str(mine)),
        ) as up:  # fmt: skip
            for path in ("/a?access_token=SECRET-1", "/b"):
                subprocess.run(
                    ["curl", "-sf", "--cacert", up.ca, f"https://localhost:{up.port}{path}"],
                    check=True, capture_output=True, timeout=60,
                )  # fmt: skip
            up.connector.signal(signal.SIGTERM)
            assert up.connector.wait(60) == 0
        for file in (mine, theirs):
            data = file.read_bytes()
            assert b"SECRET-" not in data
            streams = list(CaptureModel(read_capture(str(file))[1]).streams.values())
            assert [(s.head["status"], s.end["how"]) for s in streams] == [(200, "complete")] * 2
            assert streams[1].open["target"] == "/b"
        with Child(
            sys.executable, "-m", "connector", "replay", "--to", f"http://127.0.0.1:{port}", "--filter", "path=/b", mine
        ) as again:
            again.wait(60)
            assert "1 streams, " in again.text, again.text


@pytest.mark.skipif(MOSQUITTO is None, reason="NO MOSQUITTO HERE")
def test_mqtt_is_replayed_against_a_broker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sessions at once: what the one publishes the other gets, under other packet numbers than then."""
    from connector.app.replay import main as replay

    file, password = tmp_path / "x.capture", tmp_path / "password"
    password.write_text("MQTT-PASSWORD-1\n")
    hub = Inspector("connector")
    writer = CaptureWriter(str(file), hub, Later())
    hub.recorders.append(writer.record)
    link = hub.open_link("http2", "192.0.2.7:7844", 0)
    ends = []
    for name in ("listener", "sensor"):
        sink, port, _, _ = open_stream(link, websocket_request())
        port.respond(101, [(b"Upgrade", b"websocket")])
        sink.on_data(up(mqtt_connect(name, username="u")))
        port.write(down(packet("CONNACK", session_present=False, reason=0)))
        ends.append((sink, port))
    (listener, to_listener), (sensor_, to_sensor) = ends
    listener.on_data(up(packet("SUBSCRIBE", packet_id=1, filters=[{"topic": "a/#", "qos": 1}])))
    to_listener.write(down(packet("SUBACK", packet_id=1, reasons=[1])))
    for number in (1, 2):
        publish = {"topic": "a/b", "payload": b"%d" % number, "qos": 1}
        sensor_.on_data(up(packet("PUBLISH", packet_id=number, **publish)))
        to_sensor.write(down(packet("PUBACK", packet_id=number)))
        to_listener.write(down(packet("PUBLISH", packet_id=40 + number, **publish)))
        listener.on_data(up(packet("PUBACK", packet_id=40 + number)))
    for sink, port in ends:
        sink.on_data(up(packet("DISCONNECT")))
        sink.on_eof()
        port.write_eof()
    writer.close()
    with mosquitto(tmp_path, "MQTT-PASSWORD-1") as broker:
        to = ["--to", f"http://127.0.0.1:{broker}", str(file)]
        assert replay(to) == 255
        assert "--mqtt-password-file" in capsys.readouterr().err
        for _ in range(2):
            assert replay([*to, "--mqtt-password-file", str(password)]) == 0
            out = capsys.readouterr().out
            assert "(5 of 5 sent, 4 packets expected)" in out
            assert out.count("same answer") == 2
        password.write_text("wrong")
        assert replay([*to, "--mqtt-password-file", str(password)]) == 1
        assert "the broker refused the connection" in capsys.readouterr().out


def test_messages_are_replayed(tmp_path: Path) -> None:
    """An echo of text in pieces, binary and pings; and an origin that answers something else."""
    file = tmp_path / "x.capture"
    hub = Inspector("connector")
    writer = CaptureWriter(str(file), hub, Later())
    hub.recorders.append(writer.record)
    link = hub.open_link("http2", "192.0.2.7:7844", 0)
    for answer in (b"hello you", b"something"):
        sink, port, _, _ = open_stream(link, websocket_request(b"/ws"))
        port.respond(101, [(b"Upgrade", b"websocket")])
        sink.on_data(up(b"hello ", fin=False, opcode=websocket.TEXT) + up(b"you", opcode=websocket.CONTINUATION))
        port.write(down(b"", opcode=websocket.PING) + down(answer, opcode=websocket.TEXT))
        sink.on_data(up(b"", opcode=websocket.PONG) + up(b"\0\1"))
        port.write(down(b"\0\1") + down(b"\x03\xe8", opcode=websocket.CLOSE))
        sink.on_eof()
        port.write_eof()
    writer.close()
    with (
        http_origin() as port_number,
        Child(sys.executable, "-m", "connector", "replay", "--to", f"http://127.0.0.1:{port_number}", file) as again,
    ):
        assert again.wait(60) == 1
    lines = [line for line in again.lines if "/ws" in line]
    assert "same answer (2 of 2 sent, 2 messages expected)" in lines[0]
    assert "answer 1 differs" in lines[1]


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    path = tmp_path / "x.capture"
    hub = Inspector("connector")
    writer = CaptureWriter(str(path), hub, Later())
    hub.recorders.append(writer.record)
    play_everything(hub)
    writer.close()
    return path


def test_a_killed_connector_leaves_a_good_capture(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    file = tmp_path / "x.capture"
    with tunnel(state, "http_status:204", run_args=("--ha-connections", "1", "--capture", str(file))) as up:
        for _ in range(5):
            subprocess.run(
                ["curl", "-sf", "--cacert", up.ca, f"https://localhost:{up.port}/"], check=True, timeout=60
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while not CaptureModel(read_capture(str(file))[1]).streams:  # it is written every tenth of a second
            assert time.monotonic() < deadline, "nothing was captured"
            time.sleep(0.05)
        up.connector.signal(signal.SIGKILL)
        up.connector.wait(30)
    _, items = read_capture(str(file))
    assert CaptureModel(items).streams


def test_inspect_shows_a_file_and_what_is_added_to_it(capture: Path) -> None:
    with Child(sys.executable, "-m", "connector", "inspect", capture) as page:
        for _ in range(3_000):
            if page.lines:
                break
            signal.sigtimedwait([], 0.01)
        url = page.lines[0].removeprefix("Inspector: ")
        base, _, token = url.partition("/?token=")

        def rows() -> list[dict[str, Any]]:
            request = Request(base + "/api/state", headers={"X-Inspector-Token": token})
            with urlopen(request, timeout=30) as response:
                found: list[dict[str, Any]] = json.loads(response.read())["rows"]
                return found

        assert len(rows()) == 2
        hub = Inspector("connector")
        writer = CaptureWriter(str(capture), hub, Later())
        hub.recorders.append(writer.record)
        play_everything(hub)
        writer.close()
        for _ in range(300):
            if len(rows()) == 4:
                break
            signal.sigtimedwait([], 0.1)
        assert len(rows()) == 4
        page.signal(signal.SIGTERM)
        assert page.wait(30) == 0


def test_the_terminal_table(capture: Path) -> None:
    pytest.importorskip("textual")
    from connector.app.tui import FileSource, make_app

    async def main() -> None:
        app = make_app(FileSource(str(capture)))
        async with app.run_test(size=(120, 40)) as pilot:
            table = app.query_one("#table")
            assert table.row_count == 2
            await pilot.press("enter")
            await pilot.pause()
            lines = str(app.screen.query_one("#lines").render())
            assert "PUBLISH a/b qos 1" in lines
            assert "SECRET" not in lines
            await pilot.press("escape", "slash", *"kind=http", "enter")
            await pilot.pause()
            assert table.row_count == 1
            await pilot.press("slash", *"=nonsense>", "enter")
            await pilot.pause()

    run(main())


def test_tui_and_replay_say_what_is_wrong(capsys: pytest.CaptureFixture[str], capture: Path) -> None:
    from connector.app.replay import main as replay
    from connector.app.tui import main as tui

    assert tui(["http://127.0.0.1:1/"]) == 255
    assert "token" in capsys.readouterr().err
    assert tui(["/nowhere"]) == 1
    assert replay(["--to", "ftp://x", str(capture)]) == 255
    assert replay(["--to", "http://x", "--filter", "id=77", str(capture)]) == 255


def test_conformance_of_this_connector_and_of_a_bad_one() -> None:
    base = [sys.executable, "-m", "connector", "conformance", "--json", "--protocol", "http2"]
    good = subprocess.run(
        [*base, "--case", "says what it is", "--case", "with a query", "--case", "small and large"],
        cwd=ROOT, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    verdicts = [json.loads(line) for line in good.stdout.splitlines()]
    assert [verdict["verdict"] for verdict in verdicts] == ["pass"] * 3, good.stdout + good.stderr
    assert good.returncode == 0
    bad = subprocess.run(
        [*base, "--case", "says what it is", "--connector", "false"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    [verdict] = [json.loads(line) for line in bad.stdout.splitlines()]
    assert (verdict["verdict"], bad.returncode) == ("FAIL", 1)
    assert "ended with status 1" in verdict["came"]


def test_the_edge_says_where_its_page_is(tmp_path: Path) -> None:
    with connector("edge", "--state-dir", tmp_path, "--output", "json", "--inspect", "--fault", "delay:10ms") as edge:
        url = edge.event("inspector")["inspector"]
        base, _, token = url.partition("/?token=")
        edge.event("listening")
        request = Request(
            base + "/api/faults", data=b'{"add": "reset:2"}', headers={"X-Inspector-Token": token}, method="POST"
        )
        with urlopen(request, timeout=30) as response:
            assert json.loads(response.read())["active"] == ["delay:10ms", "reset:2"]
        edge.event("fault", on="reset:2")
