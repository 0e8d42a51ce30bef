"""malloc keeps what is freed, where it can be told to."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
from connector.app.malloc import keep_freed_memory
assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytes(500_000)
before = faults()
for _ in range(100):
    bytearray(500_000)[::4096] = b"x" * 123
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_buffers_that_come_and_go_are_not_fresh_pages_each_time() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_000  # 100 times 123 pages without
