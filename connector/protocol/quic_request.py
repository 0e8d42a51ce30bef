"""From a ConnectRequest to a Request, and from a response head to a ConnectResponse (proto/README.md, QUIC part).

Owns: the rules for destinations, metadata keys and bodies of QUIC data streams; the spelling of response metadata.
In: a decoded ConnectRequest, or a response head. Out: Request or RequestError; framed bytes with the data preamble.
Never: touches streams or the connection.

*Strategy*: the proxy sees the same Request as over HTTP/2 (names in lower case, no hop-by-hop fields, cookies joined),
so that it never has to know the transport. What could change meaning at an HTTP/1.1 origin is refused here.
"""

from __future__ import annotations

from connector.errors import ConnectorError
from connector.protocol.ports import Headers, Request, RequestKind, ResponseSource
from connector.wire.connect import ConnectRequest, encode_connect_response
from connector.wire.h2_headers import CONTROL_PREFIX, NAME_CACHE_LIMIT, TOKEN_BYTES, canonical_name, is_field_value

SIGNATURE_LENGTH = 6
DATA_SIGNATURE = bytes.fromhex("0a36cd12a13e")
RPC_SIGNATURE = bytes.fromhex("52bb825cdb65")
VERSION = b"01"
"""Two bytes behind the data signature; sent as they are, not checked on arrival (proto/README.md, as cloudflared)."""

DATA_PREAMBLE = DATA_SIGNATURE + VERSION

HEADER_KEY = b"HttpHeader"

_TRACE = b"cf-trace-id"
_SPANS = b"Cf-Int-Cloudflared-Tracing"

_HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"upgrade", b"trailer"))
_KINDS = (RequestKind.HTTP, RequestKind.WEBSOCKET, RequestKind.TCP)

ORIGIN_FAILED = b"the connector got no response from the origin"
FLOW_LIMITED = b"failed to start tcp flow due to rate limiting: too many active flows"
REFUSED = b"the connector refused the flow"


class RequestError(ConnectorError):
    """A ConnectRequest that the proxy never sees: it is answered with this text."""


def decode_connect(connect: ConnectRequest) -> Request:
    """Return the Request that `connect` opens. Errors: RequestError."""
    if connect.kind >= len(_KINDS):
        raise RequestError(f"unknown connection type {connect.kind}")
    kind = _KINDS[connect.kind]
    if kind is RequestKind.TCP:
        return _tcp_request(connect)
    method = host = origin_form_host = trace = b""
    headers: list[tuple[bytes, bytes]] = []
    cookies: list[bytes] = []
    length = -1
    chunked = False
    names = _names
    for key, value in connect.metadata:
        if HEADER_KEY in key:
            name = names.get(key) or _header_name(key)
            if not is_field_value(value):
                raise RequestError(f"the value of {name[:64]!r} holds a control character")
            if name == b"content-length":
                length = _content_length(value, length)
            elif name == b"transfer-encoding":
                chunked = chunked or b"chunked" in value.lower()
            elif name == b"cookie":
                cookies.append(value)
            elif name == b"host":
                origin_form_host = origin_form_host or value
            elif name == _TRACE:
                trace = value
            elif name == b"te":
                if value.lower() == b"trailers":
                    headers.append((name, b"trailers"))
            elif name == b"expect":
                if b"100-continue" not in value.lower():
                    headers.append((name, value))
            elif name not in _HOP_BY_HOP and not name.startswith(CONTROL_PREFIX):
                headers.append((name, value))
        elif key == b"HttpMethod":
            method = value
        elif key == b"HttpHost":
            host = value
    if cookies:
        headers.append((b"cookie", b"; ".join(cookies)))
    method = method or b"GET"
    if method.translate(None, TOKEN_BYTES):
        raise RequestError(f"invalid method {method[:64]!r}")
    scheme, authority, target = _split_url(connect.dest)
    host = host or authority or origin_form_host
    if host.translate(None, b" \t/\\") != host or not is_field_value(host):
        raise RequestError(f"invalid host {host[:64]!r}")
    if kind is RequestKind.WEBSOCKET or chunked:
        # Both framings at once would let an origin split the body elsewhere than we do.
        length = -1
    else:
        length = max(length, 0)
        if length:
            headers.append((b"content-length", b"%d" % length))
    return Request(kind, method, target, host, headers, length, scheme, trace)


_CACHED_KEY = 80
"""Bytes of a key that is remembered at most: eyeballs choose names."""

_names: dict[bytes, bytes] = {}


def _header_name(key: bytes) -> bytes:
    """Return the lower-case name of a key as `HttpHeader:Name`. Errors: RequestError."""
    parts = key.split(b":")
    if len(parts) != 2:
        raise RequestError(f"header key {key[:64]!r} is malformed")
    name = parts[1].lower()
    if not name or name.translate(None, TOKEN_BYTES):
        raise RequestError(f"the header name {name[:64]!r} is no token")
    if len(_names) < NAME_CACHE_LIMIT and len(key) <= _CACHED_KEY:
        _names[key] = name
    return name


def _tcp_request(connect: ConnectRequest) -> Request:
    if not connect.dest or connect.dest.translate(None, b" \t/\\") != connect.dest or not is_field_value(connect.dest):
        raise RequestError(f"invalid TCP destination {connect.dest[:64]!r}")
    fields = {key: value for key, value in connect.metadata if is_field_value(value)}
    headers = [(b"flowid", fields[b"FlowID"])] if b"FlowID" in fields else []
    trace = fields.get(_TRACE, b"")
    return Request(RequestKind.TCP, b"CONNECT", connect.dest, connect.dest, headers, -1, trace=trace)


def _content_length(value: bytes, before: int) -> int:
    if not value.isdigit() or len(value) > 18 or before not in {-1, int(value)}:
        raise RequestError(f"content-length {value[:64]!r} is not one number")
    return int(value)


def _split_url(dest: bytes) -> tuple[bytes, bytes, bytes]:
    """Return scheme, authority (maybe empty) and target of an absolute URL or a path. Errors: RequestError."""
    scheme, authority, target = b"https", b"", dest
    if dest[:1] != b"/" and dest != b"*":
        before, separator, rest = dest.partition(b"://")
        scheme = before.lower()
        if not separator or scheme not in {b"http", b"https", b"ws", b"wss"}:
            raise RequestError(f"invalid request URL {dest[:128]!r}")
        scheme = scheme.replace(b"ws", b"http")
        end = min((place for mark in b"/?#" if (place := rest.find(mark)) >= 0), default=len(rest))
        authority, target = rest[:end].rpartition(b"@")[2], rest[end:]
        if not authority:
            raise RequestError(f"the request URL {dest[:128]!r} names no host")
    target = target.partition(b"#")[0]
    if target[:1] != b"/" and target != b"*":
        target = b"/" + target
    if not is_field_value(target):
        raise RequestError("the request URL holds a control character")
    if b" " in target or b"\t" in target:
        # Would end the target in an HTTP/1.1 request line.
        target = target.replace(b" ", b"%20").replace(b"\t", b"%09")
    return scheme, authority, target


# --- responses -------------------------------------------------------------------------------------------------------

_keys: dict[bytes, bytes] = {}


def _header_key(name: bytes) -> bytes:
    key = HEADER_KEY + b":" + canonical_name(name)
    if len(_keys) < NAME_CACHE_LIMIT:
        _keys[name] = key
    return key


def encode_head(status: int, headers: Headers, spans: bytes = b"") -> bytes:
    """Return preamble and ConnectResponse of an HTTP or WebSocket response; nothing is filtered, 101 stays 101.

    `spans` is the base64 that a traced request gets back.
    """
    keys = _keys
    metadata = [(b"HttpStatus", b"%d" % status)]
    for name, value in headers:
        metadata.append((keys.get(name) or _header_key(name), value))
    if spans:
        metadata.append((HEADER_KEY + b":" + _SPANS, spans))
    return DATA_PREAMBLE + encode_connect_response(b"", metadata)


def encode_error(text: bytes, source: ResponseSource = ResponseSource.CONNECTOR) -> bytes:
    """Return preamble and ConnectResponse of a failure before any response."""
    limited = source is ResponseSource.FLOW_LIMITED
    return DATA_PREAMBLE + encode_connect_response(text, ((b"FlowConnectRateLimited", b"true"),) if limited else ())


TCP_ACCEPTED = DATA_PREAMBLE + encode_connect_response()


def encode_accepted(spans: bytes) -> bytes:
    """Return TCP_ACCEPTED with the spans of a traced stream."""
    return DATA_PREAMBLE + encode_connect_response(b"", ((_SPANS, spans),)) if spans else TCP_ACCEPTED
