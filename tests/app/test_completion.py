"""The completion scripts, run by the shells themselves."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from connector.app.completion import SHELLS, script

CASES = [
    ("connector ", ["run", "tunnel", "edge", "version", "completion"], ["update", "ready2"]),
    ("connector ru", ["run"], ["tunnel"]),
    ("connector tunnel ", ["run", "ready"], ["version"]),
    ("connector tunnel --loglevel debug ru", ["run"], ["debug"]),
    ("connector run --tok", ["--token", "--token-file"], ["--url"]),
    ("connector tunnel run --edge-ip-version ", ["auto", "4", "6"], ["run"]),
    ("connector completion ", ["bash", "zsh", "fish"], ["run"]),
]


def needs(shell: str) -> str:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"no {shell} here; apt-get install {shell}")
    return path


def words(shell: str, program: str) -> list[str]:
    result = subprocess.run([needs(shell), "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
    return result.stdout.split()


def in_bash(line: str) -> list[str]:
    empty = "''" if line[-1] == " " else ""
    return words(
        "bash",
        f"{script('bash', 'connector')}\nCOMP_WORDS=({line}{empty})\n"
        'COMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n_connector\nprintf "%s\\n" "${COMPREPLY[@]}"',
    )


def in_fish(line: str) -> list[str]:
    program = f"{script('fish', 'connector')}\ncomplete -C '{line}' | string replace -r '\\t.*' ''"
    return words("fish", program)


@pytest.mark.parametrize(("line", "there", "absent"), CASES)
@pytest.mark.parametrize("complete", [in_bash, in_fish], ids=["bash", "fish"])
def test_the_shell_offers_what_fits(complete: object, line: str, there: list[str], absent: list[str]) -> None:
    assert callable(complete)
    found = complete(line)
    assert not set(there) - set(found), found
    assert not set(absent) & set(found), found


def test_zsh_takes_the_script() -> None:
    stubs = 'compdef() { print "compdef $@" }\n_describe() { print described }\n_arguments() { print -l -- "$@" }\n'
    text = script("zsh", "connector")
    assert words("zsh", stubs + text) == ["compdef", "_connector", "connector"]
    ask = "\nwords=(connector tunnel run --tok)\nCURRENT=4\n_connector"
    found = " ".join(words("zsh", stubs + text + ask))
    assert "--token-file[Read the token from FILE" in found
    assert "--edge-ip-version[auto, 4 or 6" in found


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_made_for_either_name(shell: str) -> None:
    text = script(shell, "cloudflared")
    assert {"bash": "-F _cloudflared cloudflared\n", "zsh": "compdef _cloudflared cloudflared\n"}.get(
        shell, "complete -c cloudflared "
    ) in text
    assert "_connector" not in text
    assert "-c connector" not in text
    assert "eyJ" not in text
