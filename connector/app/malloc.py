"""Tells glibc's malloc to keep the memory that payload buffers come and go in.

Owns: three settings of the C library, for the process. In: nothing. Out: whether they are in force.
Never: touches how much this program itself keeps.

*Strategy*: a read from a busy origin is a buffer of some 100 KiB. malloc takes such blocks as fresh pages from the
kernel and gives them back at once, so that every read pays for page faults and zeroing. Measured with eight parallel
downloads: 2.28 s of CPU a GB without, 1.56 s with, for 1 to 2 MiB more of peak memory (benchmarks/PROFILE.md).
"""

from __future__ import annotations

import sys

MMAP_THRESHOLD = 4 << 20
"""Bytes from which a block is mapped by itself; no buffer of ours is that large, bodies held back at most 1 MiB."""

TRIM_THRESHOLD = 16 << 20
"""Bytes free at the top of the heap that are kept: what a few hundred streams in full flow hand around."""

TOP_PAD = 1 << 20
"""Bytes by which the heap grows at once."""

_SETTINGS = ((-3, MMAP_THRESHOLD), (-1, TRIM_THRESHOLD), (-2, TOP_PAD))
"""The option numbers of glibc's <malloc.h>: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD."""


def keep_freed_memory() -> bool:
    """Put the settings in force where the C library is glibc; elsewhere nothing happens."""
    if sys.platform != "linux":
        return False
    import ctypes  # noqa: PLC0415  (only here)

    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (musl and others have none)
        return all(libc.mallopt(option, value) for option, value in _SETTINGS)
    except (OSError, AttributeError):
        return False
