"""`connector edge` as a process: output, signals, exit status."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from connector.devedge import cli
from connector.wire.token import decode_token

CODE = "import sys; from connector.devedge.cli import main; sys.exit(main(sys.argv[1:]))"


def run_cli(*arguments: str, state: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, *arguments, "--state-dir", str(state)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


class Process:
    """A running `connector edge --output json`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[str] = []

    def event(self, name: str) -> dict[str, Any]:
        """Read lines until the event is there; the pipe closes when the process is killed by the test's limit."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            event = json.loads(line)
            if event["event"] == name:
                return event  # type: ignore[no-any-return]
        raise AssertionError(f"no {name} in {self.lines}")


@contextmanager
def edge_process(*arguments: str, state: Path) -> Iterator[Process]:
    command = [sys.executable, "-c", CODE, *arguments, "--state-dir", str(state), "--output", "json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield Process(process)
    finally:
        process.kill()
        process.communicate()


def test_help_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["token"], ["ca"]):
        with pytest.raises(SystemExit) as caught:
            cli.main([*arguments, "--help"])
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert max(len(line) for line in out.splitlines()) <= 80, out
        assert "%" not in out


def test_token_prints_the_token_and_nothing_else(tmp_path: Path) -> None:
    first = run_cli("token", "demo", state=tmp_path)
    assert first.returncode == 0
    assert "new tunnel 'demo'" in first.stderr
    token = decode_token(first.stdout.removesuffix("\n"))
    second = run_cli("token", "demo", state=tmp_path)
    assert (second.stdout, second.stderr) == (first.stdout, "")
    file = tmp_path / "edge.toml"
    file.write_text(f'[tunnels.mine]\nid = "{token.tunnel_id}"\naccount = "abc"\n')
    third = run_cli("token", "mine", "--config", str(file), state=tmp_path)
    assert decode_token(third.stdout.strip()).account_tag == "abc"
    wrong = run_cli("token", "other", "--config", str(file), state=tmp_path)
    assert wrong.returncode == 1
    assert "there is no tunnel 'other'" in wrong.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_gracefully(tmp_path: Path, number: signal.Signals) -> None:
    with edge_process("--tunnel", "demo", "--ingress", "http://127.0.0.1:1", state=tmp_path) as edge:
        listening = edge.event("listening")
        assert list(listening) == ["event", "time", "edge", "public", "ca", "tunnels"]
        assert listening["ca"] == str(tmp_path / "ca.pem")
        assert listening["tunnels"][0]["name"] == "demo"
        edge.process.send_signal(number)
        edge.event("stopped")
        assert edge.process.wait(timeout=30) == 0
        assert edge.process.stderr is not None
        assert edge.process.stderr.read() == ""
        stored = json.loads((tmp_path / "tunnels.json").read_text())
        assert stored["demo"]["secret"] not in "".join(edge.lines)


def test_a_taken_port_is_one_clear_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for flag in ("--listen", "--public"):
            result = run_cli(flag, address, state=tmp_path)
            assert result.returncode == 1
            assert f"connector edge: {flag} {address}: the port is taken" in result.stderr
            assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--listen", "nonsense"], 255, "--listen nonsense: not ADDRESS:PORT"),
        (["--fault", "nonsense"], 255, "no such fault"),
        (["--tunnel", "a b"], 1, "not a DNS label"),
        (["--config", "/nonexistent.toml"], 1, "/nonexistent.toml: No such file"),
        (["--tunnel", "a", "--tunnel", "b", "--ingress", "http://x"], 1, "--ingress with 2 tunnels"),
        (["--state-dir", "/proc/nope"], 1, "state directory /proc/nope"),
    ],
)
def test_errors_are_clear(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, text: str
) -> None:
    assert cli.main(["--state-dir", str(tmp_path), *arguments]) == status
    assert text in capsys.readouterr().err


def test_a_changed_file_is_taken_up_and_a_bad_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "edge.toml"
    file.write_text("[tunnels.demo]\ningress = [{ service = 'http://127.0.0.1:1' }]\n")
    with edge_process("--config", str(file), state=tmp_path / "state") as edge:
        edge.event("listening")
        file.write_text("[tunnels.demo]\ningress = [{ service = 'http://127.0.0.1:22' }]\n")
        assert edge.event("reloaded")["changed"] == ["demo"]
        file.write_text("[tunnels.demo]\ningress = 3\n")
        assert "must be a list" in edge.event("error")["error"]
        edge.process.send_signal(signal.SIGHUP)
        assert "must be a list" in edge.event("error")["error"]
        replacement = tmp_path / "new.toml"
        replacement.write_text("[tunnels.demo]\n[tunnels.two]\n")
        os.replace(replacement, file)
        assert edge.event("reloaded")["tunnels"] == ["demo", "two"]


def test_output_for_people(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, "--tunnel", "demo", "--state-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "listening" in line
        assert "tunnels demo" in line
        assert "\x1b" not in line
        time.strptime(line[:8], "%H:%M:%S")
    finally:
        process.kill()
        process.communicate()


def test_no_quic_leaves_the_udp_port_alone(tmp_path: Path) -> None:
    for flags, free in ((("--no-quic",), True), ((), False)):
        with edge_process(*flags, state=tmp_path) as edge:
            host, port = edge.event("listening")["edge"].rsplit(":", 1)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
                if free:
                    udp.bind((host, int(port)))
                else:
                    with pytest.raises(OSError, match="in use"):
                        udp.bind((host, int(port)))


@pytest.mark.parametrize("size", ["1199", "65001"])
def test_a_quic_packet_size_that_cannot_be(tmp_path: Path, size: str) -> None:
    result = run_cli("--quic-packet-size", size, state=tmp_path)
    assert (result.returncode, "not within 1200 to 65000" in result.stderr) == (255, True)
