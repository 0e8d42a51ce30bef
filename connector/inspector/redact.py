"""What must not leave: secrets in headers, URLs, bodies, RPC and MQTT, replaced before anything is stored or shown.

Owns: the lists of names and patterns, and the replacement text. In: headers, targets, bytes, spans. Out: the same with
every secret masked. Never: changes traffic; keeps what it masked.

*Strategy*: where the place of a secret is known (header, query parameter, RPC field, MQTT password) it is masked by
place; bodies are searched for what looks like a secret. A mask inside a body has the length of what it hides, so
lengths and offsets stay true.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from urllib.parse import unquote_to_bytes

from connector.errors import WireError
from connector.wire.h2_headers import RESPONSE_HEADERS, decode_serialised_headers, encode_serialised_headers

MASK = b"[redacted]"

SECRET_HEADERS = frozenset((
    b"authorization", b"proxy-authorization", b"cookie", b"set-cookie", b"cf-access-token", b"cf-access-client-id",
    b"cf-access-client-secret", b"cf-access-jwt-assertion", b"x-api-key", b"x-auth-token", b"x-csrf-token",
    b"x-amz-security-token", b"www-authenticate", b"proxy-authenticate", b"authentication-info", b"x-vault-token",
    b"x-goog-api-key", b"private-token", b"sec-websocket-protocol-token",
))  # fmt: skip

_SECRET_WORD = (
    rb"(?:access[_-]?token|refresh[_-]?token|id[_-]?token|api[_-]?key|apikey|auth|authorization|bearer|client[_-]?secret|code|"
    rb"cookie|credential|credentials|jwt|key|pass|passwd|password|private[_-]?key|pwd|secret|session|session[_-]?id|sig|"
    rb"signature|token|tunnel[_-]?secret|x-amz-signature|x-amz-security-token)"
)
_SECRET_PARAMETER = re.compile(rb"(?i)^(?:[a-z0-9_.-]*[_.-])?" + _SECRET_WORD + rb"(?:\[\])?$")

_IN_BODIES = (
    # A JWT, or a tunnel's token: base64 of JSON.
    re.compile(rb"eyJ[A-Za-z0-9+/_=-]{16,}(?:\.[A-Za-z0-9_=-]+){0,2}"),
    re.compile(rb"(?i)\b(?:bearer|basic)\s+([A-Za-z0-9+/_.~=-]{6,})"),
    # "password": "...", token=..., also with the quotes escaped by another layer of JSON.
    re.compile(
        rb"(?i)\\?[\"']"
        + rb"(?:[a-z0-9_.-]*[_.-])?"
        + _SECRET_WORD
        + rb"\\?[\"']\s*:\s*\\?[\"']((?:[^\"'\\]|\\.){1,4096})"
    ),
    re.compile(rb"(?i)(?:^|[&?\s;,])(?:[a-z0-9_.-]*[_.-])?" + _SECRET_WORD + rb"=([^&\s;,\"'<>]{1,4096})"),
    re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----([A-Za-z0-9+/=\s]+)"),
)


def is_secret_header(name: bytes) -> bool:
    """Return whether the value of the header `name` is hidden."""
    lower = name.lower()
    return lower in SECRET_HEADERS or lower.endswith((b"-token", b"-secret", b"-password", b"-api-key", b"-signature"))


def redact_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers with secret values replaced, and URLs in them cleaned."""
    found = []
    for name, value in headers:
        if is_secret_header(name):
            found.append((name, MASK))
        elif name.lower() == RESPONSE_HEADERS:
            found.append((name, _redact_list(value)))
        elif name.lower() in {b"referer", b"location", b":path"}:
            found.append((name, redact_target(value)))
        else:
            found.append((name, redact_bytes(value)))
    return found


def _redact_list(value: bytes) -> bytes:
    """Look into a serialised header list; what is none is hidden."""
    try:
        return encode_serialised_headers(redact_headers(decode_serialised_headers(value)))
    except WireError:
        return MASK


def redact_target(target: bytes) -> bytes:
    """Return a request target or URL with the values of secret parameters replaced, and without a password."""
    target = re.sub(rb"^([a-z+]+://[^/@:]*):[^/@]*@", rb"\1:" + MASK + rb"@", target)
    path, mark, query = target.partition(b"?")
    if mark:
        parts = []
        for part in query.split(b"&"):
            name, equals, value = part.partition(b"=")
            plain = unquote_to_bytes(name)
            parts.append(name + equals + MASK if equals and value and _SECRET_PARAMETER.match(plain) else part)
        query = b"&".join(parts)
    return redact_bytes(path + mark + query)


def redact_bytes(data: bytes) -> bytes:
    """Return `data` with everything that looks like a secret masked by as many asterisks."""
    for pattern in _IN_BODIES:
        if pattern.search(data):
            data = pattern.sub(_masked, data)
    return data


def _masked(match: re.Match[bytes]) -> bytes:
    whole = match.group()
    if not match.re.groups:
        return b"*" * len(whole)
    start, stop = match.start(1) - match.start(), match.end(1) - match.start()
    inside = whole[start:stop]
    if inside == MASK:
        return whole
    return whole[:start] + b"*" * (stop - start) + whole[stop:]


def mask_spans(data: bytes, spans: Sequence[tuple[int, int]]) -> bytes:
    """Return `data` with asterisks in each (offset, length)."""
    if not spans:
        return data
    changed = bytearray(data)
    for start, length in spans:
        stop = min(len(changed), start + length)
        if start < stop:
            changed[start:stop] = b"*" * (stop - start)
    return bytes(changed)


def redact_values(value: object, names: frozenset[str] = frozenset()) -> object:
    """Return decoded values with the fields `names` (and the fixed secret ones) replaced."""
    hidden = names | _HIDDEN_FIELDS
    if isinstance(value, dict):
        return {
            key: (MASK.decode() if key in hidden and item else redact_values(item, names))
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [redact_values(item, names) for item in value]
    if isinstance(value, bytes):
        return redact_bytes(value)
    if isinstance(value, str):
        return redact_bytes(value.encode()).decode("utf-8", "replace")
    return value


_HIDDEN_FIELDS = frozenset(("tunnelSecret", "password", "authentication_data", "secret"))
