"""From errors to what the edge sees: the only table.

Owns: which error becomes which status and reset code, and the fields that describe an error in an event.
In: a StreamPort and an error. Out: a refused or reset stream.
Never: logs, counts or touches the origin.

Before a response head went out an error is a bare 502 with the connector as its source (flow limit: marked as such);
afterwards the stream is reset. The text goes to the event, and over QUIC to the edge, as cloudflared's does: eyeballs
learn nothing about the inside.
"""

from __future__ import annotations

from typing import Any, Final

from connector.errors import ConnectorError, OriginError
from connector.protocol.ports import ResetCode, ResponseSource, StreamPort
from connector.proxy.flows import FlowLimitError
from connector.proxy.socks import SocksError


class UnsupportedError(ConnectorError):
    """The edge or the configuration asks for something that this version does not serve."""


class BadRequestError(ConnectorError):
    """The request cannot be passed on as it is: it would not survive HTTP/1.1, or its body breaks its own length."""


class AccessDeniedError(ConnectorError):
    """The rule lets nobody in without a fitting Access token: 403."""


class AccessError(ConnectorError):
    """An Access token that cannot be trusted, or keys that could not be had: 502, as in cloudflared."""


class LengthRequiredError(ConnectorError):
    """The rule forbids chunked bodies and the body is too long to be buffered for its length."""


_STATUS: dict[type[BaseException], int] = {LengthRequiredError: 411, AccessDeniedError: 403}
_RESET: dict[type[BaseException], ResetCode] = {BadRequestError: ResetCode.PROTOCOL}
_SOURCE: dict[type[BaseException], ResponseSource] = {
    FlowLimitError: ResponseSource.FLOW_LIMITED,
    AccessDeniedError: ResponseSource.ORIGIN,  # an answer, not a failure
}
_KIND: tuple[tuple[type[BaseException], str], ...] = (
    (AccessDeniedError, "access"),
    (AccessError, "access"),
    (SocksError, "socks"),
    (UnsupportedError, "unsupported"),
    (BadRequestError, "request"),
    (LengthRequiredError, "request"),
    (FlowLimitError, "flow limit"),
)


MAX_REASON: Final = 1024
"""Bytes of an error's text that the edge is told over QUIC, where cloudflared tells it too."""


def refuse(port: StreamPort, error: BaseException, *, responded: bool, reason: str = "") -> int:
    """End a stream because of `error`; return the status sent, or 0 for a reset. `reason` stands for its text."""
    if responded:
        port.reset(_RESET.get(type(error), ResetCode.FAILED))
        return 0
    status = _STATUS.get(type(error), 502)
    source = _SOURCE.get(type(error), ResponseSource.CONNECTOR)
    text = reason or str(error) or type(error).__name__
    port.respond(status, (), source, text.encode("utf-8", "replace")[:MAX_REASON].decode("utf-8", "ignore").encode())
    port.write_eof()
    port.stop_reading()
    return status


def cause_of(error: BaseException) -> str:
    """Return the one word that logs and metrics have for an error: of an origin's error its own."""
    if isinstance(error, OriginError):
        return error.cause
    return next((word for kind, word in _KIND if isinstance(error, kind)), "internal")


def describe(error: BaseException) -> dict[str, Any]:
    """Return the event fields of an error: `error`, `cause` (one word) and, when known, `advice`."""
    fields: dict[str, Any] = {"error": str(error) or type(error).__name__, "cause": cause_of(error)}
    advice = getattr(error, "advice", "")
    if advice:
        fields["advice"] = advice
    return fields
