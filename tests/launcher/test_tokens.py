"""Tokens: the order of their sources, what is none, and that nobody sees them."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from launcher import tokens
from launcher.errors import UsageError

TUNNEL = "11112222-3333-4444-5555-666677778888"


def token(tunnel: str = TUNNEL) -> str:
    facts = {"a": "account", "t": tunnel, "s": base64.b64encode(b"x" * 32).decode()}
    return base64.b64encode(json.dumps(facts).encode()).decode()


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_sources_in_their_order(tmp_path: Path) -> None:
    names = [f"0000000{n}-3333-4444-5555-666677778888" for n in range(8)]
    file = write(tmp_path / "file", token(names[1]) + "\n")
    kept = write(tmp_path / "kept", token(names[6]))
    write(tmp_path / ".env", f"# seed\nCLOUDFLARE_TUNNEL_TOKEN='{token(names[4])}'\n")
    environment = {"TUNNEL_TOKEN": token(names[2]), "CLOUDFLARE_TUNNEL_TOKEN": token(names[3])}

    def find(**changes: object) -> str:
        options: dict[str, object] = {"directory": tmp_path, "kept": kept, "environment": environment}
        return tokens.find(**{**options, **changes}).tunnel  # type: ignore[arg-type]

    assert find(token=token(names[0]), token_file=file) == names[0]
    assert find(token_file=file) == names[1]
    assert find() == names[2]
    del environment["TUNNEL_TOKEN"]
    assert find() == names[3]
    assert find(environment={"TUNNEL_TOKEN_FILE": str(file)}) == names[1]
    assert find(environment={}) == names[4]
    write(tmp_path / ".env", "")
    assert find(environment={}) == names[6]
    assert find(environment={}, kept=None, prompt=lambda: token(names[7])) == names[7]
    with pytest.raises(UsageError, match="there is no tunnel token") as caught:
        find(environment={}, kept=None)
    assert "--token-file" in caught.value.advice


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("your_token", "still holds the placeholder"),
        ("", "is empty"),
        ("abc", "is not a tunnel token"),
        (base64.b64encode(b"[]").decode(), "is not a tunnel token"),
        (base64.b64encode(b'{"a":"x","t":"no uuid","s":"eA=="}').decode(), "is not a tunnel token"),
        (token()[:-9], "is not a tunnel token"),
        ("x" * 20_000, "has 20000 characters"),
    ],
)
def test_what_is_no_token_is_named_and_not_shown(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        tokens.check(text, "somewhere")
    if len(text) > 10 and text not in tokens.PLACEHOLDERS:
        assert text not in str(caught.value) + caught.value.advice


def test_the_dashboards_whole_command_may_be_pasted() -> None:
    for command in (f"cloudflared tunnel run --token {token()}", f"docker run x --token={token()} --more"):
        assert tokens.check(command, "paste").tunnel == TUNNEL


def test_a_token_hides_itself_and_readable_files_are_told(tmp_path: Path) -> None:
    found = tokens.check(token(), "x")
    assert token() not in repr(found)
    told: list[str] = []
    tokens.find(token_file=write(tmp_path / "t", token(), 0o644), directory=tmp_path, warn=told.append)
    assert "chmod 600" in told[0]
    tokens.find(token=token(), directory=tmp_path, warn=told.append)
    assert "prefer --token-file" in told[1]
    with pytest.raises(UsageError, match="No such file"):
        tokens.find(token_file=tmp_path / "absent", directory=tmp_path)


def test_env_files_as_compose_writes_them(tmp_path: Path) -> None:
    write(tmp_path / ".env", "A=1\n#B=2\nexport C=\"x y\"\nD=v # note\nE=\nnot a line\nF='q#q'\n")
    assert tokens.read_env_file(tmp_path / ".env") == {"A": "1", "C": "x y", "D": "v", "E": "", "F": "q#q"}
    assert tokens.read_env_file(tmp_path / "absent") == {}
