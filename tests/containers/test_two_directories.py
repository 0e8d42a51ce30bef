"""One name, two directories, at the same moment: one stack comes of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.containers.stacks import ROOT, docker, environment, launcher, stack


def test_two_ups_of_one_name_from_two_directories(tmp_path: Path) -> None:
    with stack("tdouble", tmp_path) as made:
        command = [sys.executable, "-m", "launcher", "up", "--engine", "docker", *made.edge.options]
        command += ["--name", made.name, "--json", "--state-dir"]
        both = [
            subprocess.Popen([*command, tmp_path / word], stdout=subprocess.PIPE, env=environment(), cwd=ROOT)
            for word in ("one", "two")
        ]
        outputs = [process.communicate(timeout=120)[0].decode() for process in both]
        for process, out in zip(both, outputs, strict=True):
            assert "Traceback" not in out
            assert (process.returncode, out.count('"failed"')) in {(0, 0), (1, 1)}
        again = [launcher(*command[3:], tmp_path / word).status for word in ("one", "two")]
        assert 0 in again, outputs  # the owner's; the other one may be told that it is not its own
        assert docker("ps", "-q", "--filter", f"name=^{made.name}-").count("\n") == 1
        assert len(docker("network", "ls", "-q", "--filter", f"name={made.name}-").split()) == 1
