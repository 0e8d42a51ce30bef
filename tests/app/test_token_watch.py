from __future__ import annotations

import io
import os
import uuid
from pathlib import Path

import pytest

from connector.app.logs import Logger, LogOutput
from connector.app.token_watch import TokenWatch
from connector.wire.token import Token, encode_token
from tests.support.aio import run, until

OLD = Token("account", b"o" * 32, uuid.UUID(int=1))
NEW = Token("account", b"n" * 32, uuid.UUID(int=1))
OTHER = Token("account", b"n" * 32, uuid.UUID(int=2))


def watching(path: Path, write: list[str], until_line: str) -> tuple[list[Token], str]:
    stream = io.StringIO()
    found: list[Token] = []

    async def main() -> None:
        watch = TokenWatch(str(path), OLD, Logger(LogOutput(stream=stream)), found.append, interval=0.01)
        watch.start()
        for text in write:
            new = path.with_name("new")
            new.write_text(text)
            new.rename(path)
        await until(lambda: until_line in stream.getvalue(), what=until_line)
        watch.close()

    run(main())
    return found, stream.getvalue()


def test_a_new_token_is_handed_over_once(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(encode_token(OLD))
    found, text = watching(path, [encode_token(NEW) + "\n"], "registering again")
    assert found == [NEW]
    assert encode_token(NEW)[40:] not in text


def test_a_change_between_the_start_and_the_first_look_counts(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(encode_token(NEW))
    assert watching(path, [], "registering again")[0] == [NEW]


@pytest.mark.parametrize(
    ("content", "line"),
    [("nonsense", "holds no token"), ("", "holds no token"), (encode_token(OTHER), "token of another tunnel")],
)
def test_what_cannot_be_used_leaves_the_old_token_in_force(tmp_path: Path, content: str, line: str) -> None:
    path = tmp_path / "token"
    path.write_text(encode_token(OLD))
    found, text = watching(path, [content], line)
    assert found == []
    assert "stays in use" in text


def test_a_link_that_is_swung_to_another_file_is_seen(tmp_path: Path) -> None:
    """As Kubernetes replaces a secret: token -> ..data/token, and ..data is a link that is renamed over."""
    for name, token in (("one", OLD), ("two", NEW)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(encode_token(token))
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "token").symlink_to("..data/token")
    stream = io.StringIO()
    found: list[Token] = []

    async def main() -> None:
        watch = TokenWatch(str(tmp_path / "token"), OLD, Logger(LogOutput(stream=stream)), found.append, interval=0.01)
        watch.start()
        (tmp_path / "..new").symlink_to("two")
        os.replace(tmp_path / "..new", tmp_path / "..data")
        await until(lambda: found)
        watch.close()

    run(main())
    assert found == [NEW]
