"""What can go wrong ends in one clear line and a clean state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.containers.stacks import (
    ROOT,
    docker,
    environment,
    exists,
    launcher,
    stack,
)


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
        assert not docker("ps", "-aq", "--filter", f"name=^{made.name}-probe")
        docker("volume", "rm", volume)
        made.up().good()


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
        assert not docker("ps", "-aq", "--filter", f"name=^{made.name}-probe")
        password = made.run("user passwd", "device").good().event("users")["users"][0]["password"]
        made.passwords["device"] = password
        made.public()
