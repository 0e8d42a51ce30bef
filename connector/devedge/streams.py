"""What a stream is to the code that does not care which protocol carries it.

Owns: the words shared by h2session.py and quicsession.py on one side, exchange.py and the RPC on the other.
In: nothing. Out: interfaces and one exception.
Never: does anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

RawHeaders = Sequence[tuple[bytes, bytes]]


class StreamHandler(Protocol):
    """What an owner of a stream implements. No call may raise; `on_eof` and `on_reset` are final for their side."""

    def on_headers(self, headers: RawHeaders) -> None:
        """Take the final header block (a response in the client role; unused in the server role)."""

    def on_data(self, data: bytes) -> None:
        """Take payload; `len(data)` of `Stream.consumed` is owed."""

    def on_eof(self, trailers: RawHeaders) -> None:
        """Take the end of the peer's side."""

    def on_reset(self, error: BaseException | None) -> None:
        """The stream is gone at once, both ways."""

    def pause_writing(self) -> None:
        """The send queue is full."""

    def resume_writing(self) -> None:
        """The send queue has room again."""


class Stream(Protocol):
    """One stream, as its handler uses it. Calls after its end are no-ops."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue payload (copied)."""

    def write_eof(self, trailers: RawHeaders = ()) -> None:
        """End this side behind everything queued."""

    def consumed(self, size: int) -> None:
        """Give receive credit back."""

    def reset(self) -> None:
        """Give the stream up; queued data is dropped and the handler hears nothing more."""


class StreamLostError(Exception):
    """A stream ended before its time: reset by the peer (`code`), or its connection is gone (`code` None)."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code
