"""Capture files: what is written comes back, whatever cuts the file; nothing masked is in any export."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from connector.errors import ConfigError, WireError
from connector.inspector.capture import CaptureModel, CaptureWriter, read_bytes, read_capture, write_items
from connector.inspector.capture_commands import export_bytes, main, select
from connector.inspector.hub import Inspector
from connector.inspector.snapshot import load_items, snapshot_items
from tests.inspector.traffic import SECRETS, Later, play_everything


def recorded(path: Path, *, no_redact: bool = False) -> Inspector:
    hub = Inspector("connector", no_redact=no_redact)
    later = Later()
    writer = CaptureWriter(str(path), hub, later)
    hub.recorders.append(writer.record)
    play_everything(hub)
    writer.close()
    return hub


def test_everything_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "x.capture"
    recorded(path)
    reader, items = read_capture(str(path))
    assert (reader.cut, reader.redacted) == (0, True)
    model = CaptureModel(items)
    assert {stream.open["kind"] for stream in model.streams.values()} == {"http", "websocket"}
    web = next(stream for stream in model.streams.values() if stream.open["kind"] == "http")
    assert (web.head["status"], web.end["how"]) == (200, "complete")
    assert web.bodies[1].startswith(b'{"hello"')
    mqtt = next(stream for stream in model.streams.values() if stream.frames)
    packets = [item.fields["packets"][0][0] for item in mqtt.frames if item.fields.get("packets")]
    assert packets == ["CONNECT", "CONNACK", "PUBLISH", "PUBACK", "DISCONNECT"]
    assert any(item.fields["name"] == "registerConnection" for _, item in model.control)
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("form", ["file", "jsonl", "har", "pcapng", "snapshot"])
def test_no_secret_is_in_any_byte(tmp_path: Path, form: str) -> None:
    path = tmp_path / "x.capture"
    hub = recorded(path)
    data = path.read_bytes()
    if form == "snapshot":
        data = write_items(snapshot_items(hub), redacted=True)
    elif form != "file":
        data = export_bytes(read_capture(str(path))[1], form)
    for secret in SECRETS:
        assert secret not in data, f"{secret!r} in {form}"
        assert secret.hex().encode() not in data


def test_without_redaction_the_secrets_are_there_and_that_is_loud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.capture"
    recorded(path, no_redact=True)
    data = path.read_bytes()
    assert all(secret in data for secret in SECRETS)
    assert main(["show", str(path)]) == 0
    assert "NOT redacted" in capsys.readouterr().err


def test_a_file_cut_anywhere_is_good_up_to_there_and_goes_on(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    recorded(whole)
    data = whole.read_bytes()
    _, items = read_capture(str(whole))
    ends = [item.offset for item in items[1:]] + [len(data)]
    rng = random.Random(5)
    for cut in [16, 17, len(data) - 1, *(rng.randrange(16, len(data)) for _ in range(40))]:
        reader, found = read_bytes(data[:cut])
        assert len(found) == sum(end <= cut for end in ends)
        assert reader.cut == cut - max([16, *(end for end in ends if end <= cut)])
    path = tmp_path / "cut"
    path.write_bytes(data[: len(data) - 3])
    recorded(path)
    reader, again = read_capture(str(path))
    assert reader.cut == 0
    assert len(again) == 2 * len(items) - 1
    assert len(CaptureModel(again).sessions) == 2


def test_damage_in_the_middle_ends_the_reading_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    recorded(path)
    data = bytearray(path.read_bytes())
    _, items = read_bytes(bytes(data))
    data[items[3].offset + 20] ^= 0xFF
    reader, found = read_bytes(bytes(data))
    assert len(found) == 3
    assert reader.cut == len(data) - items[3].offset


def test_what_is_no_capture_is_said(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello")
    with pytest.raises(WireError, match="no capture file"):
        read_capture(str(tmp_path / "x"))
    with pytest.raises(WireError, match="version 9"):
        read_bytes(b"TTAPCAP\n\0\x09" + bytes(6))
    with pytest.raises(ConfigError, match="no capture file"):
        CaptureWriter(str(tmp_path / "x"), Inspector("connector"), Later())
    assert (tmp_path / "x").read_text() == "hello"
    with pytest.raises(ConfigError, match="No such file"):
        CaptureWriter(str(tmp_path / "none" / "x"), Inspector("connector"), Later())
    recorded(tmp_path / "y")
    with pytest.raises(ConfigError, match="redacted"):
        CaptureWriter(str(tmp_path / "y"), Inspector("connector", no_redact=True), Later())


def test_a_full_disk_ends_the_capture_and_nothing_else(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    hub = Inspector("connector")
    told: list[str] = []
    writer = CaptureWriter(str(tmp_path / "x"), hub, Later(), told.append)
    import os

    os.dup2(os.open("/dev/full", os.O_WRONLY), writer._file)
    hub.recorders.append(writer.record)
    play_everything(hub)
    writer.flush()
    play_everything(hub)
    writer.close()
    assert len(told) == 1
    assert "No space left" in told[0]
    assert not writer.active


def test_the_limit_ends_it(tmp_path: Path) -> None:
    hub = Inspector("connector")
    told: list[str] = []
    writer = CaptureWriter(str(tmp_path / "x"), hub, Later(), told.append, limit=1_000)
    hub.recorders.append(writer.record)
    play_everything(hub)
    writer.flush()
    assert "has reached 1000 bytes" in told[0]


def test_filter_and_exports_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x"
    recorded(path)
    assert main(["filter", str(path), "kind=websocket", "-o", str(tmp_path / "ws")]) == 0
    assert [s.open["kind"] for s in CaptureModel(read_capture(str(tmp_path / "ws"))[1]).streams.values()] == [
        "websocket"
    ]
    assert main(["filter", str(path), "kind=websocket", "-o", str(tmp_path / "ws")]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["export", str(path), "-o", str(tmp_path / "x.har")]) == 0
    har = json.loads((tmp_path / "x.har").read_text())
    entry = next(entry for entry in har["log"]["entries"] if entry["response"]["status"] == 200)
    assert entry["request"]["queryString"][0] == {"name": "access_token", "value": "[redacted]"}
    socket = next(entry for entry in har["log"]["entries"] if entry.get("_resourceType") == "websocket")
    assert socket["_webSocketMessages"][0]["type"] == "send"
    assert main(["export", "--format", "jsonl", str(path)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["t"] == "session"
    assert main(["show", "--stream", "2", str(path)]) == 0
    assert "CONNECT 'sensor-1'" in capsys.readouterr().out
    assert main(["export", str(path), "-o", str(tmp_path / "x.doc")]) == 255
    assert main(["show", "--filter", "status>", str(path)]) == 255


def test_a_loaded_capture_shows_what_the_live_page_showed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    live = recorded(path)
    hub = Inspector("capture")
    load_items(hub, read_capture(str(path))[1])
    for mine, theirs in zip(hub.rows(), live.rows(), strict=True):
        for key in ("kind", "method", "url", "status", "up", "down", "how", "mqtt", "frames", "ray"):
            assert mine[key] == theirs[key], key
    assert [topic["topic"] for topic in hub.topics.rows(1.0)] == [topic["topic"] for topic in live.topics.rows(1.0)]
    assert hub.sessions()[0]["client_id"] == "sensor-1"


def test_selecting_keeps_what_belongs_to_no_stream(tmp_path: Path) -> None:
    recorded(tmp_path / "x")
    _, items = read_capture(str(tmp_path / "x"))
    assert {item.fields["t"] for item in select(items, "id=99")} == {"session", "link", "control", "event"}


def test_unknown_records_and_fields_are_passed_over(tmp_path: Path) -> None:
    recorded(tmp_path / "x")
    _, items = read_capture(str(tmp_path / "x"))
    new: Callable[..., Any] = items[0]._replace
    items.insert(3, new(fields={"t": "later", "at": 1}, payload=b"x"))
    items.append(new(fields={"t": "frame", "id": 77}))
    assert len(CaptureModel(items).streams) == 2
    for form in ("jsonl", "har", "pcapng"):
        assert export_bytes(items, form)
