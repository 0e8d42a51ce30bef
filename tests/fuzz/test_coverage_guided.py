"""A bounded smoke of the coverage-guided fuzzers; by hand they run as long as one likes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TARGETS = sorted(HERE.glob("fuzz_*.py"))


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="NO ATHERIS HERE: no wheel for this Python or platform"
)
@pytest.mark.parametrize("target", TARGETS, ids=lambda path: path.stem)
def test_no_input_found_breaks_a_decoder(target: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, target, "-runs=30000", "-max_total_time=15", "-max_len=2048", "-verbosity=0"],
        cwd=tmp_path,  # where a crashing input is left
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr[-3000:]
