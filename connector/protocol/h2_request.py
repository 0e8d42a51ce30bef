"""From the header fields of an HTTP/2 request to a Request (proto/README.md, HTTP/2 part).

Owns: what makes a request malformed, the kinds of request, the normalisation before the proxy sees one.
In: decoded header fields. Out: Request, or MalformedRequestError.
Never: touches streams, frames or the connection.

*Strategy*: as tolerant as Go's HTTP/2 server, which cloudflared is built on, except where a tolerant reading could
change meaning at an HTTP/1.1 origin (content-length): there the request is refused.
"""

from __future__ import annotations

from connector.errors import ConnectorError, Retry, Scope
from connector.protocol.ports import Request, RequestKind
from connector.wire.h2_headers import (
    CONNECTION_UPGRADE,
    CONTROL_PREFIX,
    NAME_CACHE_LIMIT,
    TCP_SOURCE,
    TOKEN_BYTES,
    UPGRADE_CONFIGURATION,
    UPGRADE_CONTROL,
    UPGRADE_WEBSOCKET,
    is_field_name,
    is_field_value,
)

PLAIN, PSEUDO, SPECIAL = 0, 1, 2

_PSEUDO_NAMES = (b":method", b":scheme", b":authority", b":path")
TRACE = b"cf-trace-id"
_CONNECTION_SPECIFIC = (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
_SPECIAL_NAMES = (
    *_CONNECTION_SPECIFIC,
    b"te",
    b"host",
    b"cookie",
    b"content-length",
    b"expect",
    b"trailer",
    CONNECTION_UPGRADE,
    TCP_SOURCE,
    TRACE,
)
_classes: dict[bytes, int] = dict.fromkeys(_PSEUDO_NAMES, PSEUDO) | dict.fromkeys(_SPECIAL_NAMES, SPECIAL)


class MalformedRequestError(ConnectorError):
    """A request that is refused before the proxy sees it: by RST_STREAM PROTOCOL_ERROR, or by `status` if not 0."""

    scope = Scope.STREAM
    retry = Retry.NEVER

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


def _classify(name: bytes) -> int:
    if not is_field_name(name):
        raise MalformedRequestError(f"the header name {name[:64]!r} is not a lower-case token")
    kind = SPECIAL if name.startswith(CONTROL_PREFIX) else PLAIN
    if len(_classes) < NAME_CACHE_LIMIT:
        _classes[name] = kind
    return kind


def _bad_value(fields: list[tuple[bytes, bytes]]) -> str:
    names = [name[:64] for name, value in fields if not is_field_value(value)]
    return f"the value of {names[0]!r} holds a control character"


def decode_request(fields: list[tuple[bytes, bytes]], ended: bool) -> tuple[Request, bool]:
    """Return the Request that `fields` open, and whether the peer waits for `:status 100`.

    `ended`: the HEADERS frame carried END_STREAM. Errors: MalformedRequestError.
    """
    if not is_field_value(b"".join([value for _, value in fields])):
        raise MalformedRequestError(_bad_value(fields))
    classes = _classes
    pseudo: dict[bytes, bytes] = {}
    special: dict[bytes, list[bytes]] = {}
    headers: list[tuple[bytes, bytes]] = []
    for field in fields:
        name, value = field
        kind = classes.get(name)
        if kind is None:
            kind = _classify(name)
        if not kind:
            headers.append(field)
        elif kind == PSEUDO:
            if headers or special:
                raise MalformedRequestError(f"{name!r} comes after other headers")
            if name in pseudo:
                raise MalformedRequestError(f"{name!r} comes twice")
            pseudo[name] = value
        else:
            special.setdefault(name, []).append(value)

    method, target, scheme = _request_line(pseudo)
    host = pseudo.get(b":authority", b"")
    content_length = 0 if ended else -1
    expects_continue = False
    request_kind = RequestKind.HTTP
    trace = b""
    if special:
        if TRACE in special:
            trace = special[TRACE][-1]
        if not host and b"host" in special:
            host = _check_host(special[b"host"][0])
        _check_connection_specific(special)
        if b"te" in special:
            headers.append((b"te", b"trailers"))
        if b"cookie" in special:
            headers.append((b"cookie", b"; ".join(special[b"cookie"])))
        if b"content-length" in special:
            content_length = _content_length(special[b"content-length"], ended)
            headers.append((b"content-length", b"%d" % content_length))
        for value in special.get(b"expect", ()):
            if b"100-continue" in [token.strip().lower() for token in value.split(b",")]:
                expects_continue = not ended
            else:
                headers.append((b"expect", value))
        request_kind = _kind(special)
    return Request(request_kind, method, target, host, headers, content_length, scheme, trace), expects_continue


def _check_host(host: bytes) -> bytes:
    if b" " in host or b"\t" in host or b"/" in host:
        raise MalformedRequestError(f":authority {host[:64]!r} is not a host")
    return host


def _request_line(pseudo: dict[bytes, bytes]) -> tuple[bytes, bytes, bytes]:
    """Return method, target and scheme after checking the pseudo headers (RFC 9113 section 8.3.1)."""
    method = pseudo.get(b":method", b"")
    target = pseudo.get(b":path", b"")
    scheme = pseudo.get(b":scheme", b"")
    if not method or method.translate(None, TOKEN_BYTES):
        raise MalformedRequestError(f":method {method[:64]!r} is not a method")
    authority = _check_host(pseudo.get(b":authority", b""))
    if method == b"CONNECT":
        if target or scheme or not authority:
            raise MalformedRequestError("CONNECT goes with :authority alone")
        return method, authority, b"https"
    if scheme not in (b"https", b"http"):
        raise MalformedRequestError(f":scheme {scheme[:64]!r} is neither http nor https")
    if target[:1] != b"/" and target != b"*":
        raise MalformedRequestError(f":path {target[:64]!r} does not start with a slash")
    if b" " in target or b"\t" in target:
        # Would end the target in an HTTP/1.1 request line.
        target = target.replace(b" ", b"%20").replace(b"\t", b"%09")
    return method, target, scheme


def _check_connection_specific(special: dict[bytes, list[bytes]]) -> None:
    """Refuse what RFC 9113 section 8.2.2 forbids, the way Go does: with status 400."""
    for name in _CONNECTION_SPECIFIC:
        if name in special:
            raise MalformedRequestError(f"the header {name.decode()} is not valid in HTTP/2", status=400)
    te = special.get(b"te")
    if te is not None and te not in ([b"trailers"], [b""]):
        raise MalformedRequestError("te may only be trailers in HTTP/2", status=400)
    if te == [b""]:
        del special[b"te"]


def _content_length(values: list[bytes], ended: bool) -> int:
    """Return the one content length; values that differ or lie would let an origin split the body otherwise."""
    value = values[0]
    if any(other != value for other in values) or not value.isdigit() or len(value) > 18:
        raise MalformedRequestError(f"content-length {b', '.join(values)[:64]!r} is not one number")
    length = int(value)
    if ended and length:
        raise MalformedRequestError(f"content-length {length} of a request without body")
    return length


def _kind(special: dict[bytes, list[bytes]]) -> RequestKind:
    """Return what the edge wants of the stream, by the order of proto/README.md."""
    upgrades = special.get(CONNECTION_UPGRADE)
    upgrade = upgrades[0] if upgrades else b""
    if upgrade == UPGRADE_CONFIGURATION:
        return RequestKind.CONFIGURATION
    if upgrade == UPGRADE_WEBSOCKET:
        return RequestKind.WEBSOCKET
    sources = special.get(TCP_SOURCE)
    if sources and sources[0]:
        return RequestKind.TCP
    if upgrade == UPGRADE_CONTROL:
        return RequestKind.CONTROL
    return RequestKind.HTTP
