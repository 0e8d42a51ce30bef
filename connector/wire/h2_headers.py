"""The edge protocol's header conventions over HTTP/2 (proto/README.md, HTTP/2 part).

Owns: canonical spelling of names, the serialised list in `cf-cloudflared-response-headers`, the response meta values,
the names of the control headers, and the encoded fields of response heads.
In: header fields from origins, or bytes from the peer. Out: bytes, or header fields; WireError for a bad list.
Never: keeps connection state: every encoded field is a literal that no table remembers, valid on any connection.

*Strategy*: a name is spelled, filtered and encoded once and then looked up; caches stop growing at NAME_CACHE_LIMIT.
"""

from __future__ import annotations

import binascii
from collections.abc import Sequence

from connector.errors import WireError
from connector.wire.h2_hpack import hpack_literal, hpack_string

Headers = Sequence[tuple[bytes, bytes]]

RESPONSE_HEADERS = b"cf-cloudflared-response-headers"
RESPONSE_META = b"cf-cloudflared-response-meta"
TRACING_HEADER = b"cf-int-cloudflared-tracing"
"""Where the spans of a traced request go back: a native header, not one of the serialised ones."""

META_ORIGIN = b'{"src":"origin"}'
META_CONNECTOR = b'{"src":"cloudflared"}'
META_FLOW_LIMITED = b'{"src":"cloudflared","flow_rate_limited":true}'

CONTROL_PREFIX = b"cf-cloudflared-proxy-"
"""Request headers of this prefix are for the connector, never for an origin."""
CONNECTION_UPGRADE = b"cf-cloudflared-proxy-connection-upgrade"
UPGRADE_WEBSOCKET = b"websocket"
UPGRADE_CONTROL = b"control-stream"
UPGRADE_CONFIGURATION = b"update-configuration"
TCP_SOURCE = b"cf-cloudflared-proxy-src"

NAME_CACHE_LIMIT = 2_048
"""Header names that one process remembers. The known names of HTTP are about 400; an origin that invents names would
otherwise grow the caches without end."""

TOKEN_BYTES = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""What a header name may consist of (RFC 9110 section 5.6.2)."""

_CONTROL_PREFIXES = (b":", b"cf-int-", b"cf-cloudflared-", b"cf-proxy-")

_canonical: dict[bytes, bytes] = {}
_serialised_names: dict[bytes, bytes] = {}


def canonical_name(name: bytes) -> bytes:
    """Return `name` as cloudflared spells it: `x-forwarded-for` -> `X-Forwarded-For`; not a token -> unchanged."""
    found = _canonical.get(name)
    if found is not None:
        return found
    if not name or name.translate(None, TOKEN_BYTES):
        return name
    spelled = b"-".join([part[:1].upper() + part[1:].lower() for part in name.split(b"-")])
    if len(_canonical) < NAME_CACHE_LIMIT:
        _canonical[name] = spelled
    return spelled


def is_control_response_header(name_lower: bytes) -> bool:
    """Return whether an origin's header of this lower-case name is withheld from the edge."""
    return name_lower.startswith(_CONTROL_PREFIXES)


def _serialised_name(name: bytes) -> bytes:
    """Return the base64 of the canonical `name` and a colon; empty for a name that is withheld from the edge."""
    if not name or is_control_response_header(name.lower()):
        encoded = b""
    else:
        encoded = binascii.b2a_base64(canonical_name(name), newline=False).rstrip(b"=") + b":"
    if len(_serialised_names) < NAME_CACHE_LIMIT:
        _serialised_names[name] = encoded
    return encoded


def encode_serialised_headers(headers: Headers) -> bytes:
    """Return an origin's headers as one value: `name:value` in unpadded base64, joined with `;`.

    Names get their canonical spelling. Control headers and nameless ones are left out.
    """
    names = _serialised_names
    encode = binascii.b2a_base64
    parts = []
    for name, value in headers:
        encoded = names.get(name)
        if encoded is None:
            encoded = _serialised_name(name)
        if encoded:
            parts.append(encoded + encode(value, newline=False).rstrip(b"="))
    return b";".join(parts)


def decode_serialised_headers(data: bytes) -> list[tuple[bytes, bytes]]:
    """Return the header fields of a serialised list; empty parts are skipped. Errors: WireError."""
    headers = []
    for part in data.split(b";"):
        if not part:
            continue
        name, colon, value = part.partition(b":")
        if not colon or b":" in value:
            raise WireError("a part of a serialised header list is not name:value")
        headers.append((_unpadded(name), _unpadded(value)))
    return headers


def _unpadded(data: bytes) -> bytes:
    try:
        return binascii.a2b_base64(data + b"==="[: -len(data) % 4], strict_mode=True)
    except binascii.Error as error:
        raise WireError(f"a serialised header list holds bad base64: {error}") from None


def is_field_name(name: bytes) -> bool:
    """Return whether `name` may be a field name over HTTP/2: a token without upper-case letters."""
    return bool(name) and not name.translate(None, TOKEN_BYTES) and name == name.lower()


# What a field value may not hold: control characters other than a tab. Go's HTTP/2 server, and with it cloudflared,
# draws the same line; RFC 9113 section 8.2.1 asks for CR, LF and NUL only.
_BAD_VALUE_BYTES = bytes([byte for byte in range(32) if byte != 9] + [127])
_GOOD_VALUE_BYTES = bytes([byte for byte in range(256) if byte not in _BAD_VALUE_BYTES])


def is_field_value(value: bytes) -> bool:
    """Return whether `value` holds no control character but tabs (above all no CR, LF or NUL)."""
    return not value.translate(None, _GOOD_VALUE_BYTES)


_STATUS_INDEX = {200: 8, 204: 9, 206: 10, 304: 11, 400: 12, 404: 13, 500: 14}
STATUS_FIELDS = [
    bytes((0x80 | _STATUS_INDEX[status],)) if status in _STATUS_INDEX else b"\x08\x03" + str(status).encode()
    for status in range(1000)
]
"""`:status` of every number, by static table entry where there is one. Numbers below 100 are not statuses."""

META_ORIGIN_FIELD = hpack_literal(RESPONSE_META, META_ORIGIN)
META_CONNECTOR_FIELD = hpack_literal(RESPONSE_META, META_CONNECTOR)
META_FLOW_LIMITED_FIELD = hpack_literal(RESPONSE_META, META_FLOW_LIMITED)
_RESPONSE_HEADERS_NAME = b"\x00" + hpack_string(RESPONSE_HEADERS)
_CONTENT_LENGTH_NAME = b"\x0f\x0d"  # static table entry 28 = 15 + 13


def response_headers_field(serialised: bytes) -> bytes:
    """Return the HPACK literal of `cf-cloudflared-response-headers` with this value."""
    return _RESPONSE_HEADERS_NAME + hpack_string(serialised)


def content_length_field(headers: Headers) -> bytes:
    """Return the HPACK literal that copies an origin's `content-length`; empty when it has none that is a number."""
    for name, value in headers:
        if len(name) == 14 and name.lower() == b"content-length":
            return _CONTENT_LENGTH_NAME + hpack_string(value) if value.isdigit() else b""
    return b""
