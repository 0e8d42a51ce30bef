"""What ends an HTTP/2 connection on the peer's account: its errors, and floods of frames that are legal one by one.

Owns: H2Error, FloodGuard.
In: counts, `now`. Out: H2Error.
Never: sends anything; h2_connection.py turns an H2Error into GOAWAY.
"""

from __future__ import annotations

from connector.errors import ConnectorError, Retry, Scope
from connector.protocol.h2_limits import H2Limits
from connector.wire.h2_frames import ErrorCode


class H2Error(ConnectorError):
    """A connection error (RFC 9113 section 5.4.1). Never leaves H2Connection, which raises ProtocolError instead."""

    scope = Scope.CONNECTION
    retry = Retry.BACKOFF

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class FloodGuard:
    """Counts what a peer does in one stretch of `H2Limits.window` seconds; all counts start again when it is over."""

    __slots__ = ("_counts", "_limits", "_started", "now")

    def __init__(self, limits: H2Limits) -> None:
        self._limits = limits
        self._started = 0.0
        self._counts: dict[str, int] = {}
        self.now = 0.0  # set by the connection on every read

    def start(self, now: float) -> None:
        """Start a new stretch of time."""
        self.now = self._started = now
        self._counts.clear()

    def count(self, what: str, limit: int) -> None:
        """Count one `what`. Errors: H2Error ENHANCE_YOUR_CALM when it was one too many."""
        counts = self._counts
        spent = counts.get(what, 0) + 1
        if spent > limit:
            window = self._limits.window
            if self.now - self._started < window:
                raise H2Error(ErrorCode.ENHANCE_YOUR_CALM, f"more than {limit} {what} in {window:g} s")
            self.start(self.now)
            spent = 1
        counts[what] = spent

    def count_reset(self) -> None:
        """Count a stream that ends by a reset because of the peer."""
        self.count("stream resets", self._limits.max_resets)

    def count_empty(self) -> None:
        """Count DATA without payload that does not end its stream."""
        self.count("DATA frames without payload", self._limits.max_empty_frames)

    def count_ignored(self) -> None:
        """Count a frame that brings nothing."""
        self.count("frames without use", self._limits.max_ignored_frames)
