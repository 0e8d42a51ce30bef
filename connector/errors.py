"""The error taxonomy: what dies, and whether to try again.

Owns: every exception class that crosses a module border in this package.
In: nothing. Out: classes whose `scope` and `retry` attributes callers test instead of matching on text.
Never: imports another module of the package, performs I/O or logs.
"""

from __future__ import annotations

from enum import Enum


class Scope(Enum):
    """What an error takes down with it."""

    STREAM = "stream"
    FLOW = "flow"
    CONNECTION = "connection"
    TUNNEL = "tunnel"
    PROCESS = "process"


class Retry(Enum):
    """What the owner of the thing that died should do next."""

    NEVER = "never"
    NOW = "now"
    BACKOFF = "backoff"
    FALLBACK = "fallback"


class ConnectorError(Exception):
    """Base of all errors here. `str(error)` says what broke; `advice` says what to do, when that is known."""

    scope: Scope = Scope.STREAM
    retry: Retry = Retry.NEVER

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice


class WireError(ConnectorError):
    """Bytes that do not decode. The only error that `connector.wire` raises."""


class UsageError(ConnectorError):
    """The command line or environment asks for something impossible: exit status 255 with a usage hint."""

    scope = Scope.PROCESS


class ConfigError(ConnectorError):
    """A configuration (file, flag or push) that cannot be put in force; the old one stays."""

    scope = Scope.TUNNEL


class ProtocolError(ConnectorError):
    """The peer broke the edge protocol on a whole connection (HTTP/2 connection error, bad RPC message)."""

    scope = Scope.CONNECTION
    retry = Retry.BACKOFF


class DiscoveryError(ConnectorError):
    """DNS gave no usable answer to one question, or no way led to the edge's addresses."""

    scope = Scope.PROCESS
    retry = Retry.BACKOFF


class EdgeDialError(ConnectorError):
    """No transport connection to an edge address: name lookup, TCP or timeout.

    `forbidden`: this system does not permit sending there (EPERM, EACCES).
    """

    scope = Scope.CONNECTION
    retry = Retry.BACKOFF
    forbidden = False


class EdgeTlsError(EdgeDialError):
    """TCP worked, TLS did not: untrusted certificate, wrong name, no common version."""


class EdgeLostError(ConnectorError):
    """An established link ended without being asked to. `by_edge`: the edge said so; else the path is lost."""

    scope = Scope.CONNECTION
    retry = Retry.BACKOFF
    by_edge = False


class RegistrationError(ConnectorError):
    """The edge answered registration with an error, or not at all.

    `retry_after` is in seconds (0 when the edge named none); `should_retry` is the edge's own word.
    """

    scope = Scope.CONNECTION
    retry = Retry.BACKOFF

    def __init__(self, message: str, *, should_retry: bool = False, retry_after: float = 0.0, advice: str = "") -> None:
        super().__init__(message, advice=advice)
        self.should_retry = should_retry
        self.retry_after = retry_after


class DuplicateConnectionError(RegistrationError):
    """Cause EDUPCONN: this edge server already has a connection with our conn_index; try another address."""

    retry = Retry.NOW


class UnauthorizedError(RegistrationError):
    """Cause text contains `Unauthorized`: wrong secret, or a tunnel that this edge does not know yet."""


class OriginError(ConnectorError):
    """The origin could not answer a request. Becomes a 502 while nothing was sent, else a reset.

    `cause` is one word for logs and metrics: dns, refused, unreachable, reset, tls, timeout, protocol or dial.
    """

    cause = "origin"

    def __init__(self, message: str, *, advice: str = "", cause: str = "") -> None:
        super().__init__(message, advice=advice)
        self.cause = cause or type(self).cause


class OriginDialError(OriginError):
    """DNS, TCP or TLS towards the origin failed."""

    cause = "dial"


class OriginProtocolError(OriginError):
    """The origin answered something that is not HTTP, or ended in the middle of it."""

    cause = "protocol"


class OriginTimeoutError(OriginError):
    """The origin did not do something within its named limit."""

    cause = "timeout"
