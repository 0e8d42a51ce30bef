"""The number of open flows of all workers, in memory that they share.

Owns: the shared memory, the lock that makes the last slot go to one flow only. In: flows that begin and end.
Out: whether one more may begin. Never: waits for a message.

*Strategy*: each worker writes only its own number, so that one that dies leaves nothing locked and nothing wrong but
that number, which the leading process sets back. Only where there is a limit is the sum taken, under a lock that the
kernel gives back when its holder dies (`fcntl`): two system calls per flow.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Final

SLOT: Final = 8
"""Bytes of a worker's number."""


def make_memory(workers: int) -> int:
    """Make the memory; give its descriptor. It is nobody's file: it has no name."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("flows", os.MFD_CLOEXEC)
    else:
        descriptor, path = tempfile.mkstemp(prefix="connector-flows-")
        os.unlink(path)
    os.ftruncate(descriptor, max(workers * SLOT, mmap.PAGESIZE))
    return descriptor


class FlowCount:
    """The numbers as one process sees them; `worker` is its own slot. Implements `proxy.flows.FlowCount`."""

    def __init__(self, descriptor: int, worker: int) -> None:
        self._descriptor = descriptor
        self._worker = worker
        self._memory = mmap.mmap(descriptor, 0)
        self._numbers = memoryview(self._memory).cast("q")
        self.clear(worker)

    def clear(self, worker: int) -> None:
        """Set a worker's number to 0: it begins, or has died."""
        self._numbers[worker] = 0

    @property
    def active(self) -> int:
        """Flows of all workers."""
        return sum(self._numbers)

    def take(self, limit: int) -> bool:
        """Take a slot; False when `limit` (0: none) is reached."""
        if not limit:
            self._numbers[self._worker] += 1
            return True
        import fcntl  # noqa: PLC0415  (not on Windows, where there are no workers)

        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            if sum(self._numbers) >= limit:
                return False
            self._numbers[self._worker] += 1
            return True
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def release(self) -> None:
        """Give a slot back."""
        self._numbers[self._worker] -= 1

    def close(self) -> None:
        """Let the memory go."""
        self._numbers.release()
        self._memory.close()
        os.close(self._descriptor)
