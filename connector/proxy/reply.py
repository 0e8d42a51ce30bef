"""From errors to what the edge sees: the only table.

Owns: which error becomes which status and reset code, and the fields that describe an error in an event.
In: a StreamPort and an error. Out: a refused or reset stream.
Never: logs, counts or touches the origin.

Before a response head went out an error is a bare 502 with the connector as its source (flow limit: marked as such);
afterwards the stream is reset. The text goes to the event only: eyeballs learn nothing about the inside.
"""

from __future__ import annotations

from typing import Any

from connector.errors import ConnectorError, OriginDialError, OriginProtocolError, OriginTimeoutError
from connector.protocol.ports import ResetCode, ResponseSource, StreamPort
from connector.proxy.flows import FlowLimitError


class UnsupportedError(ConnectorError):
    """The edge or the configuration asks for something that this version does not serve."""


class BadRequestError(ConnectorError):
    """The request cannot be passed on as it is: it would not survive HTTP/1.1, or its body breaks its own length."""


class LengthRequiredError(ConnectorError):
    """The rule forbids chunked bodies and the body is too long to be buffered for its length."""


_STATUS: dict[type[BaseException], int] = {LengthRequiredError: 411}
_RESET: dict[type[BaseException], ResetCode] = {BadRequestError: ResetCode.PROTOCOL}
_KIND: tuple[tuple[type[BaseException], str], ...] = (
    (OriginTimeoutError, "timeout"),
    (OriginDialError, "dial"),
    (OriginProtocolError, "protocol"),
    (UnsupportedError, "unsupported"),
    (BadRequestError, "request"),
    (LengthRequiredError, "request"),
    (FlowLimitError, "flow limit"),
)


def refuse(port: StreamPort, error: BaseException, *, responded: bool) -> int:
    """End a stream because of `error`; return the status sent, or 0 for a reset."""
    if responded:
        port.reset(_RESET.get(type(error), ResetCode.FAILED))
        return 0
    status = _STATUS.get(type(error), 502)
    limited = isinstance(error, FlowLimitError)
    port.respond(status, (), ResponseSource.FLOW_LIMITED if limited else ResponseSource.CONNECTOR)
    port.write_eof()
    port.stop_reading()
    return status


def describe(error: BaseException) -> dict[str, Any]:
    """Return the event fields of an error: `error`, `cause` (one word) and, when known, `advice`."""
    fields: dict[str, Any] = {"error": str(error) or type(error).__name__}
    fields["cause"] = next((word for kind, word in _KIND if isinstance(error, kind)), "internal")
    advice = getattr(error, "advice", "")
    if advice:
        fields["advice"] = advice
    return fields
