"""Writes that wait for the end of a read: what one read of a link brings for an origin is one call to the kernel.

Owns: WriteQueue, which all exchanges of a dispatcher share.
In: `begin` and `end` of the links (Batch), writers with something to write. Out: `flush` of each writer, once.
Never: holds a byte itself.

*Strategy*: a read of the edge often brings many messages for one connection, and frames of 16 KiB of one upload.
Writing each is a call to the kernel each, and wakes the origin each time: with 16 small messages in flight per stream
that was most of all CPU time. As the link says where a read ends, the payload stays where it lies, and no call to the
loop is needed.
"""

from __future__ import annotations

from typing import Protocol


class Writer(Protocol):
    """Whoever has put a write off."""

    def flush(self) -> None:
        """Write what waits. One that raises does not keep the others from writing; the last error is raised then."""


class WriteQueue:
    """Writers with something to write. While `holding`, add yourself once and wait for `flush`; else write at once."""

    __slots__ = ("_writers", "holding")

    def __init__(self) -> None:
        self.holding = False
        self._writers: list[Writer] = []

    def begin(self) -> None:
        """A link hands on what one read brought."""
        self.holding = True

    def end(self) -> None:
        """That was all of it: borrowed buffers are about to be used again."""
        self.holding = False
        writers = self._writers
        if writers:
            self._writers = []
            problem: Exception | None = None
            for writer in writers:
                try:
                    writer.flush()
                except Exception as error:
                    problem = error
            if problem is not None:
                raise problem

    def add(self, writer: Writer) -> None:
        """Call `writer.flush` at the end of this read."""
        self._writers.append(writer)
