"""What can go wrong ends in one clear line and a clean state."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from launcher import selfcheck
from tests.containers.stacks import (
    ENGINE,
    ROOT,
    docker,
    environment,
    exists,
    inspect,
    kill_inside,
    launcher,
    stack,
    wait_until,
)


def test_health_goes_bad_and_good_again(tmp_path: Path) -> None:
    with stack("tfrozen", tmp_path) as made:
        made.up().good()
        wait_until("healthy", lambda: inspect(made.broker)["State"]["Health"]["Status"] == "healthy")
        kill_inside(made.broker, "STOP")
        wait_until("unhealthy", lambda: inspect(made.broker)["State"]["Health"]["Status"] == "unhealthy")
        status = made.run("status")
        assert status.status == 1
        assert status.event("status")["services"][0]["health"] == "unhealthy"
        assert made.run("doctor").status == 1
        kill_inside(made.broker, "CONT")
        wait_until("healthy", lambda: inspect(made.broker)["State"]["Health"]["Status"] == "healthy")
        made.public()


def test_two_ups_at_once(tmp_path: Path) -> None:
    with stack("ttwice", tmp_path) as made:
        command = [sys.executable, "-m", "launcher", "up", "--engine", "docker", *made.edge.options]
        command += ["--name", made.name, "--state-dir", str(made.state), "--json"]
        both = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), cwd=ROOT)
            for _ in range(2)
        ]
        outputs = [process.communicate(timeout=120) for process in both]
        codes = sorted(process.returncode for process in both)
        assert codes == [0, 1], outputs
        loser = next(out for process, (out, _) in zip(both, outputs, strict=True) if process.returncode == 1)
        failed = [json.loads(line) for line in loser.decode().splitlines() if '"failed"' in line]
        assert "is at work on this stack" in failed[0]["message"]
        assert docker("ps", "-q", "--filter", f"name=^{made.name}-").count("\n") == 1


def test_a_taken_name_and_another_directory(tmp_path: Path) -> None:
    with stack("ttaken", tmp_path) as made:
        docker("create", "--name", made.broker, "eclipse-mosquitto:2.1.2")
        assert "is taken by a container that is not ours" in made.up().one_line()
        assert not exists(made.connector)
        docker("rm", made.broker)
        made.up().good()
        (tmp_path / "second").mkdir()
        other = tmp_path / "second" / "stack"
        args = ("--name", made.name, "--state-dir", other, "--json")
        taken = launcher("up", "--engine", "docker", *made.edge.options, *args)
        taken.good()  # the same stack, taken over
        (other / "stack.json").write_text((other / "stack.json").read_text().replace('"id": "', '"id": "x'))
        assert "another directory" in launcher("up", *args).one_line()
        made.public()


def test_a_volume_that_cannot_be_written_or_is_full(tmp_path: Path) -> None:
    with stack("tvolume", tmp_path) as made:
        volume = f"{made.name}-broker-data"
        options = ["--driver", "local", "-o", "type=tmpfs", "-o", "device=tmpfs"]
        docker("volume", "create", *options, "-o", "o=size=1m,uid=0,mode=0755", volume)
        assert f"cannot write to the volume {volume}: Permission denied" in made.up().one_line()
        assert not exists(made.broker)
        docker("volume", "rm", volume)
        docker("volume", "create", *options, "-o", "o=size=16k,uid=1883,mode=0700", volume)
        line = made.up().one_line()
        assert "No space left on device" in line
        assert "make room" in line
        assert not exists(made.broker)
        assert not exists(f"{made.name}-probe")
        docker("volume", "rm", volume)
        made.up().good()


class Door(threading.Thread):
    """A unix socket before the engine's that closes for good after `requests` connections were made."""

    def __init__(self, path: Path, connections: int) -> None:
        super().__init__(daemon=True)
        self.left = connections
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.open: list[socket.socket] = []

    def run(self) -> None:
        while self.left > 0:
            ours, _ = self.listener.accept()
            self.left -= 1
            theirs = socket.socket(socket.AF_UNIX)
            theirs.connect(str(ENGINE / "docker.sock"))
            self.open += [ours, theirs]
            for one, other in ((ours, theirs), (theirs, ours)):
                threading.Thread(target=self._copy, args=(one, other), daemon=True).start()
        self.listener.close()
        for end in self.open:  # gone: in the middle of whatever was going on
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _copy(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65536):
                other.sendall(data)
        except OSError:
            pass
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_an_engine_that_goes_away_in_the_middle(tmp_path: Path) -> None:
    with stack("tgone", tmp_path) as made:
        for number, connections in enumerate((2, 3, 4)):
            path = Path(f"/tmp/tgone-{os.getpid()}-{number}.sock")
            door = Door(path, connections)
            door.start()
            try:
                line = made.up(DOCKER_HOST=f"unix://{path}").one_line()
            finally:
                path.unlink()
            assert any(words in line for words in ("went away", "does not answer", "did not answer")), line
        result = made.up().good()
        assert result.event("status")["up"]
        if not made.passwords:
            made.passwords["device"] = made.run("user passwd", "device").good().event("users")["users"][0]["password"]
        made.public()
    assert (
        "no docker engine"
        in launcher(
            "up", "--engine", "docker", "--state-dir", tmp_path / "no", "--json", DOCKER_HOST="unix:///nowhere.sock"
        ).one_line()
    )


def test_a_token_that_the_edge_does_not_know(tmp_path: Path) -> None:
    with stack("ttoken", tmp_path) as made:
        (tmp_path / "foreign").mkdir()
        from tests.support.processes import edge_token

        foreign = edge_token(tmp_path / "foreign", "other")
        made.edge.token.write_text(foreign)
        line = made.up("--timeout", "20").one_line()
        assert "connector" in line
        assert inspect(made.broker)["State"]["Running"]
        made.edge.token.write_text("eyJub3QiOiJhIHRva2VuIn0=")
        bad = made.up()
        assert bad.status == 2
        assert "is not a tunnel token" in bad.event("failed")["message"]


def test_killed_half_way_goes_on_where_it_was(tmp_path: Path) -> None:
    with stack("thalf", tmp_path) as made:
        command = [sys.executable, "-m", "launcher", "up", "--engine", "docker", *made.edge.options]
        command += ["--name", made.name, "--state-dir", str(made.state), "--json"]
        for awaited in ("Mosquitto 2.0.11", "starting"):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), cwd=ROOT)
            assert process.stdout is not None
            for line in process.stdout:
                if awaited in line.decode():
                    break
            process.kill()
            process.wait()
            process.stdout.close()
        result = made.up().good()
        assert result.event("status")["up"]
        assert not exists(f"{made.name}-probe")
        password = made.run("user passwd", "device").good().event("users")["users"][0]["password"]
        made.passwords["device"] = password
        made.public()


def test_own_configuration_is_checked_before_it_is_used(tmp_path: Path) -> None:
    with stack("town", tmp_path) as made:
        made.up().good()
        before = inspect(made.broker)["Id"]
        own = tmp_path / "mosquitto.conf"
        own.write_text("listener 1883\nallow_anonymous true\nlistener 9001\nprotocol websockets\n")
        assert "lets everybody in" in made.up("--config", own).one_line()
        own.write_text("listener 1883\nno_such_option 1\npassword_file /mosquitto/config/passwords\n")
        line = made.up("--config", own).one_line()
        assert "refuses that configuration" in line
        assert "no_such_option" in line
        assert inspect(made.broker)["Id"] == before
        own.write_text(
            "listener 1883\nlistener 9001\nprotocol websockets\nallow_anonymous false\n"
            "password_file /mosquitto/config/passwords\nacl_file /mosquitto/config/acl\n"
            "persistence true\npersistence_location /mosquitto/data/\n"
        )
        made.up("--config", own).good()
        made.public()
        made.up("--config", "").good()
        made.public()


def test_open_to_everyone_only_when_told_twice(tmp_path: Path) -> None:
    with stack("topen", tmp_path) as made:
        assert "say it twice" in made.up("--allow-anonymous").one_line()
        assert not exists(made.broker)
        made.up("--allow-anonymous", "--yes").good()
        with selfcheck.Session(made.edge.target(), None, None) as session:
            session.connect()
        assert made.run("status").good().event("status")["open_to_everyone"] is True
        assert made.run("doctor").status == 1
        made.up("--no-allow-anonymous").good()
        time.sleep(0)
        with selfcheck.Session(made.edge.target(), None, None) as session:
            try:
                session.connect()
                raise AssertionError("still open")
            except selfcheck.RefusedError:
                pass
