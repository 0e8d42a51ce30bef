"""The command line: help that fits, errors with advice, exit statuses."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launcher import cli


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(list(argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    "argv",
    [["--help"], *([word, "--help"] for word in ("demo", "up", "status", "config", "user", "acl", "doctor", "import"))],
)
def test_help_fits_80_columns(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    status, out, _ = output(capsys, *argv)
    assert status == 0
    assert all(len(line) <= 80 for line in out.splitlines())
    if "demo" in argv:
        assert "exit status:" in out
        for flag in ("--once", "--json", "--broker", "--protocol", "--public-port", "--keep"):
            assert flag in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["demo", "--broker", "x"], "invalid choice: 'x'"),
        (["demo", "--public-port", "70000"], "'70000' is not a port"),
        (["demo", "--public-port", "-1"], ""),
        (["demo", "--onc"], "--onc"),
        (["demo", "extra"], "extra"),
        (["demo", "--protocol", "h3"], "invalid choice"),
        (["nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_wrong_arguments_are_named_with_advice(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    status, out, err = output(capsys, *argv)
    assert (status, out) == (2, "")
    assert words in err
    assert "--help" in err


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = output(capsys)
    assert status == 2
    assert "demo" in err


def test_help_does_not_wait_for_what_it_does_not_need() -> None:
    code = (
        "import sys; from launcher import cli; cli.main(['demo', '--help']); assert 'paho' not in ' '.join(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
