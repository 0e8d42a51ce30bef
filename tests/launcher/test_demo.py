"""The whole demo as its user runs it: every hop, every way to end it, and what is left afterwards: nothing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import demo as demo_module
from launcher import embedded, mosquitto
from launcher.processes import Child
from launcher.view import Console
from tests.launcher.support import linux, marked, needs_mosquitto, program, wait_gone, wait_none_marked
from tests.support.aio import run as aio_run

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [linux, pytest.mark.timeout(180)]

Facts = dict[str, Any]


class Run:
    """One `launcher demo`, its temporary directory, and the mark in the environment of all its processes."""

    def __init__(self, directory: Path, *arguments: str, stdout: int = subprocess.PIPE, **environment: str) -> None:
        self.mark = f"MARK={uuid.uuid4()}"
        self.directory = directory
        directory.mkdir(exist_ok=True)
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launcher", "demo", *arguments],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(directory), "PYTHONPATH": str(ROOT), name: value, **environment},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []

    def events(self) -> Iterator[Facts]:
        """JSON lines until the output ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            yield json.loads(line)

    def until(self, **wanted: str) -> Facts:
        """The next event that has these values."""
        for event in self.events():
            if all(str(event.get(key, "")).startswith(value) for key, value in wanted.items()):
                return event
        self.process.wait(30)
        assert self.process.stderr is not None
        raise AssertionError(f"no event {wanted} in:\n{''.join(self.lines)}\n{self.process.stderr.read()}")

    def end(self, limit: float = 40.0) -> tuple[int, str, str]:
        """Wait for its end; status, the rest of the output, errors."""
        out, err = self.process.communicate(timeout=limit)
        return self.process.returncode, out or "", err

    def nothing_left(self) -> None:
        """No process, no file."""
        wait_none_marked(self.mark)
        assert list(self.directory.iterdir()) == []


@contextlib.contextmanager
def demo(directory: Path, *arguments: str, **environment: str) -> Iterator[Run]:
    run = Run(directory, *arguments, **environment)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()
        run.process.communicate(timeout=40)
        wait_none_marked(run.mark)


BROKER = ["--broker", "mosquitto", "--public-port", "0"]


@needs_mosquitto
def test_once_checks_every_hop_and_leaves_nothing(tmp_path: Path) -> None:
    with demo(tmp_path / "t", *BROKER, "--once") as run:
        status, out, err = run.end()
        assert (status, err) == (0, "")
        for words in (
            "Mosquitto", "listening", "registered", "configuration version", "public TLS", "MQTT CONNECT",
            "MQTT SUBSCRIBE", "delivery", "wrong password refused", "anonymous refused", "Every hop works",
        ):  # fmt: skip
            assert words in out
        assert all(len(line) <= 80 for line in out.splitlines())
        run.nothing_left()


@pytest.mark.skipif(not embedded.available(), reason="NO amqtt HERE: the embedded broker is not tested")
def test_the_embedded_broker_does_it_too_and_is_named(tmp_path: Path) -> None:
    with demo(tmp_path / "t", "--broker", "embedded", "--public-port", "0", "--once") as run:
        status, out, _ = run.end()
        assert status == 0, out
        assert "using the embedded broker amqtt" in out
        run.nothing_left()


@needs_mosquitto
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_watching_is_an_orderly_end(tmp_path: Path, number: signal.Signals) -> None:
    with demo(tmp_path / "t", *BROKER, "--json") as run:
        run.until(event="ready")
        run.process.send_signal(number)
        events = list(run.events())
        assert run.end()[0] == 0
        assert not any(event["event"] == "failed" for event in events)
        run.nothing_left()


@needs_mosquitto
@pytest.mark.parametrize(
    "stage",
    [
        {"service": "broker"},
        {"service": "broker", "text": "ready"},
        {"service": "edge"},
        {"service": "connector"},
        {"hop": "public TLS"},
        {"hop": "delivery"},
        {"event": "ready"},
    ],
    ids=lambda stage: "-".join(stage.values()).replace(" ", "-"),
)
def test_sigkill_at_any_stage_leaves_no_process(tmp_path: Path, stage: dict[str, str]) -> None:
    with demo(tmp_path / "t", *BROKER, "--json") as run:
        run.until(**stage)
        pids = list(marked(run.mark))
        run.process.kill()
        run.process.wait(20)
        for pid in pids:
            wait_gone(pid)
        wait_none_marked(run.mark)
        (left,) = run.directory.iterdir()
        demo_module.remove_abandoned(run.directory)  # what the next demo does first
        assert not left.exists()


@needs_mosquitto
@pytest.mark.parametrize("stage", [{"service": "broker"}, {"service": "edge"}, {"hop": "public TLS"}])
def test_an_interrupt_while_starting_ends_by_that_signal(tmp_path: Path, stage: dict[str, str]) -> None:
    with demo(tmp_path / "t", *BROKER, "--json") as run:
        run.until(**stage)
        run.process.send_signal(signal.SIGINT)
        for event in run.events():
            if event["event"] == "ready":
                pytest.skip("it was faster than the signal")
        assert run.end()[0] == 128 + signal.SIGINT
        run.nothing_left()


@needs_mosquitto
@pytest.mark.parametrize("victim", ["broker", "dev edge", "connector"])
def test_a_child_that_dies_is_named_and_ends_the_demo(tmp_path: Path, victim: str) -> None:
    with demo(tmp_path / "t", *BROKER, "--json") as run:
        ready = run.until(event="ready")
        assert set(ready["pids"]) == {"broker", "dev edge", "connector"}
        os.kill(ready["pids"][victim], signal.SIGKILL)
        failed = run.until(event="failed")
        assert failed["hop"] == victim
        assert "killed by SIGKILL" in failed["message"]
        assert failed["tail"]
        assert run.end()[0] == 1
        run.nothing_left()


@needs_mosquitto
def test_a_child_that_hangs_does_not_hold_the_end(tmp_path: Path) -> None:
    with demo(tmp_path / "t", *BROKER, "--json") as run:
        ready = run.until(event="ready")
        os.kill(ready["pids"]["connector"], signal.SIGSTOP)
        run.process.send_signal(signal.SIGINT)
        run.until(event="stopping")
        run.process.send_signal(signal.SIGINT)  # twice: no waiting for the grace time
        assert run.end()[0] == 0
        run.nothing_left()


@needs_mosquitto
def test_a_closed_terminal_ends_it(tmp_path: Path) -> None:
    main, side = pty.openpty()
    run = Run(tmp_path / "t", *BROKER, stdout=side)
    os.close(side)
    seen = b""
    try:
        while b"Ctrl-C ends it" not in seen:
            seen += os.read(main, 65536)
        assert b"\x1b[32mbroker" in seen
    finally:
        os.close(main)
    # Not its controlling terminal, so there is no SIGHUP: the next line that cannot be written ends it.
    url = seen.decode().split("wss://127.0.0.1:")[1].split("/")[0]
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", int(url)), 10).close()
        subprocess.run(
            [sys.executable, "-c", CLIENT, f"https://127.0.0.1:{url}/"], check=False, capture_output=True, timeout=30
        )
    assert run.end()[0] == 0
    run.nothing_left()


CLIENT = """
import ssl, sys, urllib.request
urllib.request.urlopen(sys.argv[1], context=ssl._create_unverified_context(), timeout=10)
"""


@needs_mosquitto
def test_a_reader_that_leaves_early_ends_it(tmp_path: Path) -> None:
    with demo(tmp_path / "t", *BROKER) as run:
        assert run.process.stdout is not None
        run.process.stdout.readline()
        run.process.stdout.close()
        run.process.stdout = None
        assert run.end()[0] == 128 + signal.SIGPIPE
        run.nothing_left()


@needs_mosquitto
def test_no_secret_in_a_process_list_a_file_for_others_or_the_output(tmp_path: Path) -> None:
    with demo(tmp_path / "t", *BROKER, "--json") as run:
        ready = run.until(event="ready")
        password = ready["password"]
        (state,) = run.directory.iterdir()
        token = (state / "token").read_text().strip()
        assert len(token) > 100
        processes = marked(run.mark)
        assert len(processes) == 7  # the launcher, three guards, three children
        for pid, command in processes.items():
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace")
            for secret in (password, token):
                assert secret not in command
                assert secret not in environment
        for path in [state, *state.rglob("*")]:
            assert path.stat().st_mode & 0o077 == 0 or path.name == "ca.pem" or path.parent.stat().st_mode & 0o077 == 0
        run.process.send_signal(signal.SIGINT)
        list(run.events())
        assert sum(password in line for line in run.lines) == 1
        assert not any(token in line for line in run.lines)


@needs_mosquitto
def test_everything_listens_on_loopback_only(tmp_path: Path) -> None:
    with demo(tmp_path / "t", *BROKER, "--json") as run:
        run.until(event="ready")
        inodes = set()
        for pid in marked(run.mark):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(link)
                    if target.startswith("socket:["):
                        inodes.add(target[8:-1])
        listening = []
        for table in ("tcp", "tcp6"):
            for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = row.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    listening.append(fields[1].partition(":")[0])
        assert len(listening) >= 4
        assert set(listening) == {"0100007F"}


@needs_mosquitto
def test_a_taken_public_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        with demo(tmp_path / "t", "--broker", "mosquitto", "--public-port", port, "--once") as run:
            status, out, _ = run.end()
            assert status == 1
            assert f"FAILED at dev edge: port {port} of 127.0.0.1 is taken" in out
            assert "--public-port" in out
            run.nothing_left()


@needs_mosquitto
def test_kept_state_is_used_again(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        with demo(tmp_path / "t", *BROKER, "--json", "--once", "--keep", str(tmp_path / "kept")) as run:
            ready = run.until(event="ready")
            assert run.end()[0] == 0
            found.append((ready["password"], Path(ready["ca"]).read_bytes()))
            run.nothing_left()
    assert found[0] == found[1]
    assert (tmp_path / "kept" / "broker" / "data" / "mosquitto.db").exists()


def test_a_directory_that_others_may_change_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with demo(tmp_path / "t", "--keep", str(shared), "--once") as run:
        status, out, _ = run.end()
        assert status == 1
        assert "FAILED at directory" in out
        assert "chmod go-w" in out


@needs_mosquitto
def test_the_demo_runs_over_quic_too(tmp_path: Path) -> None:
    with demo(tmp_path / "t", *BROKER, "--json", "--once", "--protocol", "quic") as run:
        assert run.until(event="ready")
        assert run.end()[0] == 0
        run.nothing_left()


@needs_mosquitto
def test_the_printed_commands_work(tmp_path: Path) -> None:
    """Pasted into a shell as they are; MQTT.js where Node and the package are there."""
    with demo(tmp_path / "t", *BROKER, "--json") as run:
        ready = run.until(event="ready")
        snippets = {snippet["title"].split()[0]: snippet["command"] for snippet in ready["snippets"]}
        publishers = ["aiomqtt"] + [name for name in ("mosquitto_pub",) if name in snippets]
        node = os.environ.get("MQTTJS_DIRECTORY")  # one with node_modules/mqtt
        publishers += ["MQTT.js"] if node else []
        for name in ("paho", "mosquitto_sub"):
            if name not in snippets:
                continue
            subscriber = subprocess.Popen(
                ["bash", "-c", snippets[name]],
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            try:
                run.until(event="subscribed")
                for publisher in publishers:
                    subprocess.run(["bash", "-c", snippets[publisher]], check=True, timeout=60, cwd=node or ROOT)
                assert subscriber.stdout is not None
                if name == "paho":
                    assert subscriber.stdout.readline().startswith("Success")
                for _ in publishers:
                    assert subscriber.stdout.readline().startswith("demo/hello hello")
            finally:
                os.killpg(subscriber.pid, signal.SIGTERM)
                subscriber.communicate(timeout=20)


@needs_mosquitto
def test_the_live_view_tells_what_all_three_do(tmp_path: Path) -> None:
    with demo(tmp_path / "t", *BROKER, "--json") as run:
        ready = run.until(event="ready")
        snippets = {snippet["title"].split()[0]: snippet["command"] for snippet in ready["snippets"]}
        subprocess.run(["bash", "-c", snippets["aiomqtt"]], check=True, timeout=60, cwd=ROOT)
        seen = []
        for event in run.events():
            seen.append((event["service"], event["event"]))
            if event["event"] == "stream_closed":
                break
        for wanted in [
            ("edge", "request"), ("edge", "response"), ("broker", "connected"), ("broker", "publish"),
        ]:  # fmt: skip
            assert wanted in seen


def test_directories_in_use_and_of_others_are_not_removed(tmp_path: Path) -> None:
    used, no_lock, linked = (tmp_path / f"tunnel-demo-{name}" for name in ("used", "nolock", "linked"))
    used.mkdir()
    no_lock.mkdir()
    linked.symlink_to(used)
    lock = demo_module.hold_lock(used)
    demo_module.remove_abandoned(tmp_path)
    assert used.exists()
    assert no_lock.exists()
    os.close(lock)
    demo_module.remove_abandoned(tmp_path)
    assert not used.exists()
    assert no_lock.exists()


class Sabotaged(demo_module.Demo):
    """A demo whose children are started with other flags."""

    def __init__(self, console: Console, change: dict[str, str]) -> None:
        super().__init__(demo_module.Options(broker="mosquitto", public_port=0, once=True), console)
        self._change = change

    async def _start_edge(self, broker: Any) -> Any:
        original = demo_module.tunnel_rules

        def rules(tunnel: str, service: str, proxied: bool) -> str:
            return original(tunnel, self._change.get("service", service), proxied)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo_module, "tunnel_rules", rules)
            return await super()._start_edge(broker)

    async def _start_python(self, name: str, flags: str, *args: Any, **kwargs: Any) -> Child:
        for old, new in self._change.items():
            if old == "service":
                continue
            flags = re.sub(old, new, flags)
        return await super()._start_python(name, flags, *args, **kwargs)


@needs_mosquitto
@pytest.mark.parametrize(
    ("change", "hop", "words"),
    [
        ({"^edge --listen": "edge --fault registration=permanent --listen"}, "registration", ""),
        ({"^edge --listen": "edge --fault registration=stall --listen"}, "registration", "within 3 s"),
        ({"--edge [0-9.:]+": "--edge 127.0.0.1:9"}, "registration", "within 3 s"),
        ({"^run ": "run --nonsense x "}, "connector", "ended by itself"),
        ({"^edge --listen": "edge --nonsense --listen"}, "dev edge", "ended by itself"),
        ({"^edge token demo": "edge token other"}, "registration", "Tunnel not found"),
        ({"^edge token demo": "edge token --nonsense"}, "dev edge", "no token"),
        ({"service": "http_status:99999"}, "configuration", ""),
        ({"service": "http://127.0.0.1:9"}, "WebSocket", "502"),
        ({"service": "http_status:418"}, "WebSocket", "418"),
    ],
    ids=str,
)
def test_every_hop_that_fails_is_named(
    change: dict[str, str], hop: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if "within" in words:
        monkeypatch.setattr(demo_module, "REGISTRATION_SECONDS", 3.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = io.StringIO()
    status = aio_run(Sabotaged(Console(out, as_json=True), change).run(), limit=60)
    failed = json.loads(out.getvalue().splitlines()[-1])
    assert status == 1
    assert failed["event"] == "failed"
    assert failed["hop"] == hop, failed
    assert words in failed["message"]
    assert failed["advice"]
    assert failed["tail"]
    assert list(tmp_path.iterdir()) == []


def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broker: str = "auto") -> tuple[int, list[Facts]]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = io.StringIO()
    options = demo_module.Options(broker=broker, public_port=0, once=True)
    status = aio_run(demo_module.Demo(options, Console(out, as_json=True)).run(), limit=60)
    return status, [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.skipif(not embedded.available(), reason="NO amqtt HERE: the embedded broker is not tested")
@pytest.mark.parametrize("why", ["missing", "too old", "without websockets"])
def test_where_mosquitto_cannot_be_had_the_embedded_broker_steps_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    directory = tmp_path / "bin"
    directory.mkdir()
    version = "1.6.12" if why == "too old" else "2.0.11"
    script = f"[ $1 = -h ] && echo 'mosquitto version {version}' && exit 3\n"
    path = program(directory / "mosquitto", script + "echo 'Error: Websockets support not available.' >&2; exit 1")
    monkeypatch.setattr(mosquitto, "find_program", lambda name: None if why == "missing" else path)
    monkeypatch.setattr(mosquitto, "broker_identity", lambda: None)
    state = tmp_path / "state"
    state.mkdir()
    status, events = in_process(monkeypatch, state)
    assert status == 0, events
    assert sum("using the embedded broker" in event.get("text", "") for event in events) == 1


def test_no_broker_at_all_is_told_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosquitto, "find_program", lambda name: None)
    monkeypatch.setattr(embedded, "available", lambda: False)
    for broker in ("auto", "mosquitto", "embedded"):
        status, events = in_process(monkeypatch, tmp_path, broker)
        assert status == 1
        assert (events[-1]["event"], events[-1]["hop"]) == ("failed", "broker")
        assert "apt install mosquitto" in events[-1]["advice"]
    assert list(tmp_path.iterdir()) == []
