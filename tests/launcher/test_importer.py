"""Taking over the folders that people start with."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
from pathlib import Path

import pytest

from launcher import importer
from launcher.accounts import HEALTH, Rule
from launcher.credentials import verify_password
from launcher.output import Output
from launcher.stackdir import StackDir, StackError
from tests.launcher.test_tokens import token, write

SEED = """\
version: '3.8'
services:
  mosquitto:
    image: eclipse-mosquitto:latest
    volumes:
      - ./mosquitto.conf:/mosquitto/config/mosquitto.conf
    restart: unless-stopped
  cloudflared:
    image: cloudflare/cloudflared:latest
    command: tunnel --no-autoupdate run --token ${CLOUDFLARE_TUNNEL_TOKEN}
    environment:
      - CLOUDFLARE_TUNNEL_TOKEN
"""
CONF = "listener 1883\nallow_anonymous true\n\nlistener 9001\nprotocol websockets\n"


def seed(folder: Path, compose: str = SEED, conf: str = CONF) -> Path:
    folder.mkdir()
    (folder / "docker-compose.yml").write_text(compose)
    (folder / "mosquitto.conf").write_text(conf)
    write(folder / ".env", f"CLOUDFLARE_TUNNEL_TOKEN={token()}\n")
    return folder


def run(folder: Path, state: Path, *, dry_run: bool = False) -> tuple[int, list[dict[str, object]], StackDir]:
    out = io.StringIO()
    directory = StackDir(state)
    args = argparse.Namespace(name="tunnel", engine=None, dry_run=dry_run)
    with directory.changing("import"):
        status = asyncio.run(importer.import_folder(folder, directory, args, Output(as_json=True, out=out)))
    return status, [json.loads(line) for line in out.getvalue().splitlines()], directory


def test_the_seed_becomes_safe_and_is_told_why_it_was_not(tmp_path: Path) -> None:
    folder = seed(tmp_path / "seed")
    before = {path.name: path.read_text() for path in folder.iterdir()}
    status, events, directory = run(folder, tmp_path / "state")
    assert status == 0
    told = next(event for event in events if event["event"] == "import")
    unsafe = "\n".join(told["unsafe"])  # type: ignore[arg-type]
    for words in (
        "cloudflared: the token is on the command line",
        "image eclipse-mosquitto:latest is not pinned",
        "no volume for /mosquitto/data",
        "no health check",
        "starts without waiting",
        "allow_anonymous true",
        "persistence is off",
    ):
        assert words in unsafe
    assert token() not in json.dumps(events)
    assert directory.token_file.read_text().strip() == token()
    book = directory.accounts()
    users = next(event for event in events if event["event"] == "users")["users"]
    for one in users:  # type: ignore[attr-defined]
        assert verify_password(one["password"], book.hashes[one["name"]])
    assert not book.anonymous
    assert verify_password(directory.health_password(), book.hashes[HEALTH])
    assert {path.name: path.read_text() for path in folder.iterdir()} == before
    with pytest.raises(StackError, match="there is a stack"):
        run(folder, tmp_path / "state")


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    status, events, directory = run(seed(tmp_path / "seed"), tmp_path / "state", dry_run=True)
    assert status == 0
    assert not directory.exists
    assert next(event for event in events if event["event"] == "import")["written"] is False


def test_users_rules_and_database_are_kept(tmp_path: Path) -> None:
    compose = SEED.replace(
        "      - ./mosquitto.conf:/mosquitto/config/mosquitto.conf",
        "      - ./config:/mosquitto/config\n      - ./data:/mosquitto/data",
    )
    folder = seed(tmp_path / "seed", compose)
    (folder / "config").mkdir()
    (folder / "data").mkdir()
    (folder / "data" / "mosquitto.db").write_bytes(b"the database")
    (folder / "mosquitto.conf").unlink()
    (folder / "config" / "mosquitto.conf").write_text(
        "listener 1883\npassword_file /mosquitto/config/pw\nacl_file /mosquitto/config/acl\npersistence true\n"
    )
    (folder / "config" / "pw").write_text("alice:$7$101$abc$def\nbob:plain\n")
    (folder / "config" / "acl").write_text("topic read public/#\nuser alice\ntopic write a/#\n")
    _, events, directory = run(folder, tmp_path / "state")
    book = directory.accounts()
    assert book.hashes["alice"] == "$7$101$abc$def"
    assert verify_password("plain", book.hashes["bob"])
    assert book.rules["alice"] == [Rule("write", "a/#")]
    assert not book.anonymous
    assert (directory.broker / "data" / "mosquitto.db").read_bytes() == b"the database"
    texts = [str(event.get("text")) for event in events]
    assert any("plain text" in text for text in texts)
    assert any("without a user were left out" in text for text in texts)


def test_a_named_volume_goes_on_being_used(tmp_path: Path) -> None:
    compose = SEED.replace(
        "    restart: unless-stopped\n", "      - data:/mosquitto/data\n    restart: unless-stopped\n", 1
    )
    _, _, directory = run(seed(tmp_path / "My.Seed", compose + "volumes: {data: {}}\n"), tmp_path / "state")
    assert directory.load().data_volume == "myseed_data"
    named = compose + "volumes: {data: {external: true, name: elsewhere}}\n"
    _, _, directory = run(seed(tmp_path / "two", named), tmp_path / "state2")
    assert directory.load().data_volume == "elsewhere"


@pytest.mark.parametrize(
    ("compose", "words"),
    [
        ("services: [", "is no compose file"),
        ("services:\n  web: {image: nginx}\n", "has no Mosquitto service"),
        ("x: 1", "is no compose"),
    ],
)
def test_folders_of_another_kind_are_named(tmp_path: Path, compose: str, words: str) -> None:
    with pytest.raises(StackError, match=words):
        importer.read_folder(seed(tmp_path / "seed", compose))


def test_published_ports_and_privileges_are_told(tmp_path: Path) -> None:
    compose = SEED.replace("    restart: unless-stopped\n", "    ports: ['1883:1883']\n    cap_add: [SYS_ADMIN]\n", 1)
    unsafe = "\n".join(importer.read_folder(seed(tmp_path / "seed", compose)).unsafe)
    assert "port 1883:1883 is published" in unsafe
    assert "SYS_ADMIN" in unsafe
    with pytest.raises(StackError, match=r"has no docker-compose\.yml"):
        importer.read_folder(tmp_path)
