"""`connector decode` and `encode`: every vector, both ways, and no secret without being asked."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from connector.errors import ConnectorError, WireError
from connector.inspector.decode import FORMS, decode
from connector.inspector.encode import encode
from connector.inspector.render import annotate, annotated_rows
from connector.inspector.values import jsonable
from connector.inspector.wire_commands import decode_command, encode_command
from connector.wire.h2_frames import PREFACE, encode_goaway, encode_rst_stream, encode_settings, encode_window_update
from connector.wire.token import Token, encode_token
from tests.support.vectors import all_vectors

VECTORS = {name: bytes.fromhex(entry["hex"]) for name, entry in all_vectors().items() if name != "trace_identity"}
SECRET = bytes(range(32))
TOKEN = encode_token(Token("a" * 32, SECRET, __import__("uuid").UUID(int=7)))


@pytest.mark.parametrize("name", VECTORS)
def test_every_vector_is_recognised_and_made_again(name: str) -> None:
    data = VECTORS[name]
    found = decode(data)
    expected = next((form for form in ("datagram-v2", "datagram-v3") if form.replace("-", "_") in name), None) or (
        "connect-request"
        if "connect_request" in name
        else "connect-response"
        if "connect_response" in name
        else "capnp"
    )
    assert found.form == expected
    assert encode(found.form, json.loads(json.dumps(jsonable(found.value)))) == data


@pytest.mark.parametrize("form", FORMS)
def test_every_form_goes_through_json_and_back(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = next((data for data in VECTORS.values() if decode(data).form == form), None) or {
        "token": TOKEN.encode(), "h2": encode_settings([(4, 65_535)]) + encode_goaway(1, 2, b"x"),
        "mqtt": bytes.fromhex("3206000161000768690a02ffff"[:16]) + b"\xc0\x00",
        "websocket": bytes.fromhex("81850102030469676f6860"), "headers": b"QQ:Yg;Qw:ZA",
    }[form]  # fmt: skip
    text = data.decode() if form in {"token", "headers"} else data.hex()
    assert decode_command(["--as", form, "--json", "--no-redact", text]) == 0
    value = capsys.readouterr().out
    assert encode_command(["--as", form, value]) == 0
    assert capsys.readouterr().out.strip() == text


def test_the_dump_of_a_registration_tells_its_parts_and_no_secret() -> None:
    found = decode(VECTORS["rpc_call_registerConnection_q1"])
    text = annotate(found.data, found.notes)
    assert "auth.tunnelSecret: (32 bytes)" in text
    assert "options.client.features[2]: 'support_datagram_v2'" in text
    assert found.secrets == [(0xE0, 32)]


def test_rows_show_every_byte_once() -> None:
    for data in VECTORS.values():
        found = decode(data)
        shown = b"".join(bytes.fromhex(row[1]) for row in annotated_rows(found.data, found.notes))
        assert shown == data


def test_frames_of_http2() -> None:
    data = PREFACE + encode_settings([(4, 65_536), (9, 1)]) + encode_window_update(0, 5) + encode_rst_stream(3, 8)
    data += encode_goaway(7, 1, b"bye")
    found = decode(data)
    assert found.form == "h2"
    assert [frame["type"] for frame in found.value] == ["SETTINGS", "WINDOW_UPDATE", "RST_STREAM", "GOAWAY"]
    assert encode("h2", jsonable(found.value)) == data[len(PREFACE) :]


def test_header_lists() -> None:
    data = encode("headers", [["content-type", "text/plain"], ["x-a", "b"]])
    assert decode(data).form == "headers"
    assert decode(data, "headers").value == [[b"Content-Type", b"text/plain"], [b"X-A", b"b"]]


def test_a_token_is_explained_without_its_secret(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode_command([TOKEN]) == 0
    out = capsys.readouterr().out
    assert "tunnel ID: 00000000-0000-0000-0000-000000000007" in out
    assert SECRET.hex() not in out
    assert TOKEN not in out
    assert decode_command(["--json", TOKEN]) == 0
    assert "redacted" in capsys.readouterr().out
    assert decode_command(["--json", "--no-redact", TOKEN]) == 0
    captured = capsys.readouterr()
    assert "secrets are shown" in captured.err
    assert encode_command(["--as", "token", captured.out]) == 0
    assert capsys.readouterr().out.strip() == TOKEN


def test_passwords_of_mqtt_stay_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    packet = encode("mqtt", {"packet": "CONNECT", "client_id": "c", "username": "u", "password": "hunter2hunter2"})
    for arguments in ([packet.hex()], ["--json", packet.hex()]):
        assert decode_command(arguments) == 0
        out = capsys.readouterr().out
        assert "hunter2" not in out
        assert b"hunter2".hex(" ") not in out
    assert decode_command(["--json", "--no-redact", packet.hex()]) == 0
    assert "hunter2" in capsys.readouterr().out


def test_input_may_be_hex_base64_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = VECTORS["datagram_v3_payload"]
    raw, text = tmp_path / "raw", tmp_path / "text"
    raw.write_bytes(data)
    text.write_text(data.hex(" ") + "\n")
    for given in (data.hex(":"), __import__("base64").b64encode(data).decode(), str(raw), str(text)):
        assert decode_command([given]) == 0
        assert "datagram-v3" in capsys.readouterr().out


def test_what_is_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, huge = tmp_path / "empty", tmp_path / "huge"
    empty.touch()
    with huge.open("wb") as file:
        file.truncate(64 * 1024 * 1024 + 1)
    for given, told in (
        ("z!z", "neither hex nor base64, and there is no such file"), (" ", "the input is empty"),
        (str(tmp_path), "Is a directory"), (str(empty), "is empty"), (str(huge), "has more than 67108864 bytes"),
        (f"/{'x' * 300}", "there is no such file"), ("/nowhere", "there is no such file"),
    ):  # fmt: skip
        assert decode_command([given]) == 255
        [line, *_] = capsys.readouterr().err.splitlines()
        assert told in line, given
    for given, told in (("", "empty"), ("[]", "empty list"), ('[["a"]]', "[name, value] pairs"), ("{", "not JSON")):
        assert encode_command(["--as", "headers", given]) == 255
        assert told in capsys.readouterr().err
    assert decode_command(["ffffffff"]) == 1
    assert "no known form" in capsys.readouterr().err
    assert encode_command(["--as", "mqtt", '{"packet":"PUBLISH"}']) == 1
    assert "'topic'" in capsys.readouterr().err


def test_mutated_bytes_raise_wire_errors_only() -> None:
    rng = random.Random(7)
    corpus = [*VECTORS.values(), TOKEN.encode(), PREFACE + encode_settings([(1, 2)])]
    for _ in range(4_000):
        data = bytearray(rng.choice(corpus))
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(data))
            data[place] = rng.choice((0, 1, 2, 3, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        form = rng.choice(["auto", *FORMS])
        try:
            found = decode(bytes(data), form)
        except WireError:
            continue
        annotated_rows(found.data, found.notes)
        json.dumps(jsonable(found.value))


def test_json_of_any_shape_raises_errors_of_ours_only() -> None:
    rng = random.Random(3)
    shapes: list[Any] = [
        {},
        [],
        {"type": 1},
        {"packet": "CONNECT"},
        {"call": {}},
        5,
        "x",
        None,
        {"type": "UDP"},
        [[1, 2]],
    ]
    for form in FORMS:
        for shape in shapes:
            try:
                encode(form, shape)
            except ConnectorError:
                pass
    assert rng is not None
