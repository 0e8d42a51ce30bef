"""When a socket can be read and written, told by any loop, also after the socket had an error.

Owns: the loop's watching of one socket. In: which of both its user wants to know. Out: calls of the user's callbacks.
Never: reads, writes or closes the socket.

*Strategy*: a socket with a pending error (POLLERR) gets one last call from uvloop, which then watches it no more, in
neither direction, and tells nobody. That it let go shows when the bound method that it was given is freed.
"""

from __future__ import annotations

import asyncio
import socket
import weakref
from collections.abc import Callable
from typing import Any


class Readiness:
    """The watching of one socket: `read` and `write` switch it, `close` ends it before the socket is closed."""

    __slots__ = ("__weakref__", "_loop", "_on_readable", "_on_writable", "_reader", "_sock", "_writer")

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        *,
        on_readable: Callable[[], None],
        on_writable: Callable[[], None] | None = None,
    ) -> None:
        self._sock = sock
        self._loop = loop
        self._on_readable = on_readable
        self._on_writable = on_writable
        self._reader: weakref.ref[Any] | None = None
        self._writer: weakref.ref[Any] | None = None

    def read(self, wanted: bool) -> None:
        """Call `on_readable` while there is something to read, or no more."""
        if not wanted:
            if self._reader is not None:
                self._reader = None
                self._loop.remove_reader(self._sock)
        elif self._reader is None:
            call = self._readable
            self._reader = weakref.ref(call, self._let_go)
            self._loop.add_reader(self._sock, call)

    def write(self, wanted: bool) -> None:
        """Call `on_writable` while the kernel takes something, or no more."""
        if not wanted:
            if self._writer is not None:
                self._writer = None
                self._loop.remove_writer(self._sock)
        elif self._writer is None:
            call = self._writable
            self._writer = weakref.ref(call, self._let_go)
            self._loop.add_writer(self._sock, call)

    def close(self) -> None:
        """Watch no more. Idempotent."""
        self.read(False)
        self.write(False)

    def _readable(self) -> None:
        self._on_readable()

    def _writable(self) -> None:
        assert self._on_writable is not None
        self._on_writable()

    def _let_go(self, which: weakref.ref[Any]) -> None:
        # Not from in here: uvloop forgets what is given to it before its last calls are done.
        if (which is self._reader or which is self._writer) and not self._loop.is_closed():
            self._loop.call_soon(self._again)

    def _again(self) -> None:
        reading, writing = self._reader is not None, self._writer is not None
        self.close()
        self.read(reading)
        self.write(writing)
