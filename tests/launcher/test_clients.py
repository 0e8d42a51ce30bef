"""Commands to paste. That they work is shown in test_demo.py, where something answers."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from launcher import clients
from launcher.clients import MosquittoClients, Place
from launcher.credentials import User
from tests.launcher.support import program


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place("127.0.0.1", 8443, "/mqtt", tmp_path / "ca.pem", 1883, tmp_path / "clients", "demo")


def commands(place: Place, found: MosquittoClients | None) -> dict[str, clients.Snippet]:
    return {snippet.title.split()[0]: snippet for snippet in clients.snippets(place, found)}


def test_every_command_names_the_public_side_and_the_ca(place: Place) -> None:
    found = commands(place, MosquittoClients((2, 1, 2), websockets=True))
    assert set(found) == {"paho", "aiomqtt", "MQTT.js", "mosquitto_sub", "mosquitto_pub"}
    for snippet in found.values():
        assert str(place.cafile) in snippet.command
        assert "8443" in snippet.command
    assert "--ws" in found["mosquitto_sub"].command
    assert "wss://127.0.0.1:8443/mqtt" in found["MQTT.js"].command


def test_mosquitto_clients_without_websockets_go_to_the_broker_and_say_so(place: Place) -> None:
    found = commands(place, MosquittoClients((2, 0, 11), websockets=False))
    for name in ("mosquitto_sub", "mosquitto_pub"):
        assert "--ws" not in found[name].command
        assert "-p 1883" in found[name].command
        assert "past the tunnel" in found[name].needs
    assert "mosquitto_sub" not in commands(place, None)


def test_passwords_are_in_private_files_only(place: Place) -> None:
    clients.write_files(place, User("demo", "topsecret", ("demo/#",)))
    assert place.password_file.read_text() == "topsecret"
    assert (place.directory / "mosquitto_sub").read_text() == "-u demo\n-P topsecret\n"
    for file in place.directory.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.directory.stat().st_mode) == 0o700
    for snippet in clients.snippets(place, MosquittoClients((2, 1, 0), websockets=True)):
        assert "topsecret" not in snippet.command


def test_paths_with_quotes_and_spaces_stay_one_word(tmp_path: Path) -> None:
    odd = tmp_path / 'it\'s "odd" $HOME'
    place = Place("127.0.0.1", 1, "/mqtt", odd / "ca.pem", 2, odd, "demo")
    for snippet in clients.snippets(place, MosquittoClients((2, 1, 0), websockets=True)):
        if snippet.title.startswith("paho"):
            compile(snippet.command.split("\n", 1)[1].rpartition("\n")[0], "snippet", "exec")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'mosquitto_sub version 2.1.2 running'; echo ' [--ws]'", MosquittoClients((2, 1, 2), websockets=True)),
        ("echo 'mosquitto_sub version 2.0.18 running'", MosquittoClients((2, 0, 18), websockets=False)),
        ("exit 1", None),
    ],
)
def test_the_installed_clients_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: MosquittoClients | None
) -> None:
    program(tmp_path / "mosquitto_sub", script)
    program(tmp_path / "mosquitto_pub", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert clients.installed_mosquitto_clients() == expected


def test_lines_fit_80_columns_with_a_usual_path() -> None:
    base = Path("/tmp/tunnel-demo-abcdefgh")
    place = Place("127.0.0.1", 8443, "/mqtt", base / "edge" / "ca.pem", 41234, base / "clients", "demo")
    for snippet in clients.snippets(place, MosquittoClients((2, 0, 11), websockets=False)):
        lines = snippet.command.splitlines()
        assert all(len(line) <= 80 for line in lines[1:]), snippet.command
