"""What must not leave: secrets in headers, URLs, bodies, RPC and MQTT, replaced before anything is stored or shown.

Owns: the lists of names and patterns, and the replacement text. In: headers, targets, bytes, spans. Out: the same with
every secret masked. Never: changes traffic; keeps what it masked.

*Strategy*: where the place of a secret is known (header, query parameter, RPC field, MQTT password) it is masked by
place; everything else is searched for what looks like a secret: a telling name in front of it, the form of a known kind
of token, or a long word that nobody would think of (see `looks_random`). A mask inside a body has the length of what it
hides, so lengths and offsets stay true.
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

_PLAIN_HEADERS = frozenset((
    b"sec-websocket-key", b"sec-websocket-accept", b"etag", b"if-match", b"if-none-match", b"traceparent", b"cf-ray",
    b"x-request-id", b"x-correlation-id", b"x-amzn-trace-id", b"cf-trace-id", b"uber-trace-id", b"content-md5",
    b"digest", b"content-digest", b"content-security-policy", b"content-type", b"idempotency-key", b"surrogate-key",
    b"x-cache-key", b"status-code",
))  # fmt: skip
"""Headers whose random values open nothing, and are needed to find a request again."""

SHORTEST_TOKEN = 20
"""Characters from which on a word may be masked for its looks alone: AWS key IDs and device tokens have 20."""

_WORD = re.compile(rb"[A-Za-z0-9_-]{20,}={0,2}")
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{24,}={0,2}")
_KNOWN = re.compile(rb"\d+|[0-9a-f]{16}(?:-[A-Z]{3})?|-{2,}.*")
"""Numbers, rays and the boundaries of multipart bodies are no secrets, however they look."""
_UUID = re.compile(rb"(?i)(?:[a-z]+[-_])*[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_CLASSES = bytes(
    1 if 48 <= byte < 58 else 2 if 97 <= byte < 123 else 3 if 65 <= byte < 91 else 0 for byte in range(256)
)
_IDENTIFIER = re.compile(r"(?i)(?:id|tag|identity)$")
_CUT_WORD = re.compile(rb"[A-Za-z0-9+/_=~.%-]{1,8192}\Z")

_STEMS = (
    b"token", b"key", b"auth", b"secret", b"pass", b"pwd", b"session", b"code", b"cookie", b"credential", b"jwt",
    b"sig", b"bearer", b"basic", b"amz-",
)  # fmt: skip
"""What every telling name has in it: where none is, the patterns of names need not be tried."""

_NAMED = (
    # A user property of MQTT 5: each text behind its length.
    re.compile(
        rb"&\x00[\x01-\x40](?i:(?:[a-z0-9_.-]*[_.-])?"
        + _SECRET_WORD
        + rb")[\x00-\x0f][\x00-\xff]([^\x00-\x1f]{1,4096})"
    ),
    # Fields of forms in several parts, elements of XML.
    re.compile(
        rb"(?i)\bname=\"?(?:[a-z0-9_.-]*[_.-])?" + _SECRET_WORD + rb"\"?[^\r\n]{0,200}\r?\n(?:[^\r\n]{1,400}\r?\n){0,8}"
        rb"\r?\n([^\r\n]{1,4096})"
    ),
    re.compile(rb"(?i)<(?:[a-z0-9_.-]*[_.:-])?" + _SECRET_WORD + rb"(?:\s[^<>]{0,400})?>\s*([^<>]{1,4096})</"),
    re.compile(rb"(?i)\b(?:bearer|basic)\s+([A-Za-z0-9+/_.~=-]{6,})"),
    # "password": "...", token=..., also with the quotes escaped by another layer of JSON.
    re.compile(
        rb"(?i)\\?[\"']"
        + rb"(?:[a-z0-9_.-]*[_.-])?"
        + _SECRET_WORD
        + rb"\\?[\"']\s*:\s*\\?[\"']((?:[^\"'\\]|\\.){1,4096})"
    ),
    re.compile(
        rb"(?i)\\?[\"'](?:[a-z0-9_.-]*[_.-])?(?:pass|passwd|password|pwd|secret|token)\\?[\"']\s*:\s*([0-9]{3,64})"
    ),
    re.compile(rb"(?i)(?:^|[&?\s;,])(?:[a-z0-9_.-]*[_.-])?" + _SECRET_WORD + rb"=([^&\s;,\"'<>]{1,4096})"),
)

_IN_BODIES = (
    # Kinds of tokens that say what they are.
    re.compile(
        rb"\b(?:gh[opsur]_|github_pat_|glpat-|xox[a-z]-|sk-|[spr]k_(?:live|test)_|AKIA|ASIA|AIza|ya29\.|SG\.|npm_|hf_|"
        rb"dop_v1_|shp(?:at|ss|ca)_|lin_api_|pypi-)([A-Za-z0-9_.-]{10,})"
    ),
    # A password in a URL.
    re.compile(rb"(?i)\b[a-z][a-z0-9+.-]{1,20}://[^/@:\s\"'<>]{0,256}:([^/@\s\"'<>]{1,1024})@"),
    # A JWT, or a tunnel's token: base64 of JSON.
    re.compile(rb"eyJ[A-Za-z0-9+/_=-]{16,}(?:\.[A-Za-z0-9_=-]+){0,2}"),
    re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----([A-Za-z0-9+/=\s]+)"),
)


def is_secret_header(name: bytes) -> bool:
    """Return whether the value of the header `name` is hidden."""
    lower = name.lower()
    return lower in SECRET_HEADERS or (lower not in _PLAIN_HEADERS and is_secret_name(lower))


def is_secret_name(name: bytes) -> bool:
    """Return whether what is called `name` is a secret."""
    return _SECRET_PARAMETER.match(name) is not None


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
        elif name.lower() in _PLAIN_HEADERS:
            found.append((name, value))
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


def redact_bytes(data: bytes, *, cut: bool = False) -> bytes:
    """Return `data` with everything that looks like a secret masked by as many asterisks.

    `cut`: the data went on, so its last word may be the beginning of a secret.
    """
    lower = data.lower()
    patterns = _NAMED + _IN_BODIES if any(stem in lower for stem in _STEMS) else _IN_BODIES
    for pattern in patterns:
        if pattern.search(data):
            data = pattern.sub(_masked, data)
    if len(data) >= SHORTEST_TOKEN:
        data = _WORD.sub(_masked_if_random, _BASE64.sub(_masked_if_base64, data))
    if cut:
        data = _CUT_WORD.sub(_masked, data)
    return data


def redact_text(text: str) -> str:
    """Return `text` with the same masked."""
    return redact_bytes(text.encode("utf-8", "surrogateescape")).decode("utf-8", "replace")


def redact_notes(notes: Iterable[tuple[int, int, str, str]]) -> list[tuple[int, int, str, str]]:
    """Return what annotates a dump, masked; identifiers stay: they are needed, and open nothing."""
    return [
        (start, size, name, text if _IDENTIFIER.search(name) else redact_text(text))
        for start, size, name, text in notes
    ]


def looks_random(word: bytes) -> bool:
    """Return whether no person would have thought of `word`, 20 characters and more of letters and digits.

    Counted are changes between letters and digits, and between cases where a name in CamelCase has none: random base64
    has 40 in 100 characters, hexadecimal 47, names have hardly any. Of 20,000 random words of each usual kind 2 % of
    those of 20 characters and 0.1 % of those of 32 are missed; of 2,000 long names in this project none is hit.
    """
    if _KNOWN.fullmatch(word) or _UUID.fullmatch(word):
        return False
    kinds = word.translate(_CLASSES)
    if 2 not in kinds and 3 not in kinds:
        return False
    return _changes(kinds) >= max(3.0, 0.09 * len(word))


def _changes(kinds: bytes) -> int:
    found = 0
    last = len(kinds) - 1
    for at in range(last):
        mine, after = kinds[at], kinds[at + 1]
        if not mine or not after or mine == after:
            continue
        if mine == 1 or after == 1 or (at + 2 <= last and (kinds[at + 2] == 3 if mine == 3 else kinds[at + 2] != 2)):
            found += 1
    return found


def _masked_if_random(match: re.Match[bytes]) -> bytes:
    word = match.group()
    return b"*" * len(word) if looks_random(word) else word


def _masked_if_base64(match: re.Match[bytes]) -> bytes:
    """Mask base64 with `/` and `+` in it; a path has more parts, and its parts are words."""
    word = match.group()
    parts = word.count(b"/") + word.count(b"+") + 1
    if parts == 1 or len(word) < 8 * parts or _UUID.search(word):
        return word  # the other pattern looks at whole words
    kinds = word.translate(_CLASSES)
    mixed = 1 in kinds and 2 in kinds and 3 in kinds
    return b"*" * len(word) if mixed and _changes(kinds) >= 0.2 * len(word) else word


def _masked(match: re.Match[bytes]) -> bytes:
    whole = match.group()
    if not match.re.groups:  # all of it is the secret
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
        if set(value) == {"key", "val"}:  # metadata of a ConnectRequest
            name = str(value["key"]).removeprefix("HttpHeader:").encode()
            return {"key": value["key"], "val": redact_headers([(name, str(value["val"]).encode())])[0][1].decode()}
        return {
            key: (
                MASK.decode()
                if key in hidden and item
                else item
                if key in _PLAIN_FIELDS
                else redact_values(item, names)
            )
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        if len(value) == 2 and all(isinstance(item, str | bytes) for item in value):  # a header, a user property
            name = value[0] if isinstance(value[0], bytes) else value[0].encode()
            if is_secret_header(name):
                return [value[0], MASK.decode()]
        return [redact_values(item, names) for item in value]
    if isinstance(value, bytes):
        return redact_bytes(value)
    if isinstance(value, str):
        return redact_bytes(value.encode()).decode("utf-8", "replace")
    return value


_PLAIN_FIELDS = frozenset(("ray", "cfRay", "client_id", "connection", "connector"))
_HIDDEN_FIELDS = frozenset(("tunnelSecret", "password", "authentication_data", "secret"))
