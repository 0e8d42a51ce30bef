"""Tunnel tokens and credentials files <-> Token.

Owns: the value Token and both text forms of it. In: text from a command line, environment or file (untrusted).
Out: Token, or TokenError that says what is wrong with the text.
Never: reads a file, checks that the tunnel exists, or puts any part of the text into an error.

*Strategy*: a token decodes exactly as cloudflared decodes it (standard base64 with padding, CR and LF skipped, Go's
JSON rules: keys in any case, unknown ones ignored, null and missing ones empty). Only when that fails is the text
looked at a second time, to guess which well-known mistake it is; the guess is advice and accepts nothing.
"""

from __future__ import annotations

import binascii
import json
import re
import uuid
from typing import Any

from connector.errors import WireError

MAX_TEXT = 64 * 1024
"""Characters of a token or credentials text. Real ones have about 250; 64 KiB is what a process environment or an
argument can hold with ease, and keeps the JSON parser's depth and time bounded."""

MAX_DEPTH = 64
"""Nested brackets anywhere in the JSON. The format needs 1; beyond it parsers start to fail in their own ways."""

MESSAGE = "Provided Tunnel token is not valid."
"""cloudflared's text for every bad token."""

NIL = uuid.UUID(int=0)

_PLAIN = "[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"
_UUID = re.compile(rf"(?:[uU][rR][nN]:[uU][uU][iI][dD]:)?{_PLAIN}|\{{{_PLAIN}\}}|[0-9a-fA-F]{{32}}")
# The forms that Go's parser takes. uuid.UUID takes more, such as hyphens anywhere.

_ASK_AGAIN = "Copy the token again from the dashboard (Networks > Tunnels), or run `cloudflared tunnel token NAME`."


class TokenError(WireError):
    """A token that does not decode."""

    def __init__(self, advice: str, message: str = MESSAGE) -> None:
        super().__init__(message, advice=advice)


class Token:
    """Who the tunnel is and what proves it. `repr` and errors never show the secret."""

    __slots__ = ("account_tag", "endpoint", "secret", "tunnel_id")

    def __init__(self, account_tag: str, secret: bytes, tunnel_id: uuid.UUID, endpoint: str = "") -> None:
        self.account_tag = account_tag
        self.secret = secret
        self.tunnel_id = tunnel_id
        self.endpoint = endpoint

    def __repr__(self) -> str:
        endpoint = f" endpoint={self.endpoint!r}" if self.endpoint else ""
        return (
            f"<Token tunnel={self.tunnel_id} account={self.account_tag!r}{endpoint} secret=({len(self.secret)} bytes)>"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Token):
            return NotImplemented
        return (
            self.account_tag == other.account_tag
            and self.secret == other.secret
            and self.tunnel_id == other.tunnel_id
            and self.endpoint == other.endpoint
        )

    def __hash__(self) -> int:
        return hash((self.account_tag, self.tunnel_id, self.endpoint))


def decode_token(text: str) -> Token:
    """Return the Token that `text` stands for. Errors: TokenError."""
    if len(text) > MAX_TEXT:
        raise TokenError(f"The text has {len(text)} characters; a token has a few hundred. {_ASK_AGAIN}")
    try:
        data = _decode_base64(text)
        fields = _decode_object(data, "the decoded token")
        return Token(
            account_tag=_text(fields, "a"),
            secret=_bytes(fields, "s"),
            tunnel_id=_uuid(fields, "t"),
            endpoint=_text(fields, "e"),
        )
    except _BadFieldError as error:
        guess = _advice(text) if isinstance(error, _BadFormError) else ""
        raise TokenError(guess or f"What is wrong: {error}. {_ASK_AGAIN}") from None


def encode_token(token: Token) -> str:
    """Return the text form of `token`, as cloudflared writes it."""
    fields = {
        "a": token.account_tag,
        "s": binascii.b2a_base64(token.secret, newline=False).decode("ascii"),
        "t": str(token.tunnel_id),
    }
    if token.endpoint:
        fields["e"] = token.endpoint
    data = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def decode_credentials(text: str) -> Token:
    """Return the Token of a credentials file's JSON text; the tunnel ID is nil where the file lacks it.

    Errors: TokenError whose message names the credentials instead of the token.
    """
    message = "Provided tunnel credentials are not valid."
    if len(text) > MAX_TEXT:
        raise TokenError(f"The text has {len(text)} characters; credentials have a few hundred.", message)
    try:
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise _BadFieldError("the file is not UTF-8 text") from None
        fields = _decode_object(data, "the credentials file")
        return Token(
            account_tag=_text(fields, "AccountTag"),
            secret=_bytes(fields, "TunnelSecret"),
            tunnel_id=_uuid(fields, "TunnelID"),
            endpoint=_text(fields, "Endpoint"),
        )
    except _BadFieldError as error:
        advice = f"What is wrong: {error}. "
        if text.lstrip()[:3] == "eyJ":
            advice = "This is a token, not a credentials file: give it with --token. "
        advice += "A credentials file is the JSON that `cloudflared tunnel create` wrote as TUNNEL-UUID.json."
        raise TokenError(advice, message) from None


class _BadFieldError(Exception):
    """What is wrong, in words that quote nothing of the text."""


class _BadFormError(_BadFieldError):
    """The text as a whole is not base64, or what it holds is not JSON."""


def _decode_base64(text: str) -> bytes:
    try:
        data = text.encode("ascii")
    except UnicodeEncodeError:
        raise _BadFormError("it holds characters outside ASCII") from None
    data = data.replace(b"\r", b"").replace(b"\n", b"")
    try:
        # Strict mode refuses foreign characters, missing and excess padding, as Go's decoder does.
        return binascii.a2b_base64(data, strict_mode=True) if data else b""
    except ValueError:
        raise _BadFormError("it is not standard base64 with padding") from None


def _decode_object(data: bytes, what: str) -> dict[str, Any]:
    """Return the top-level fields with keys folded to lower case; the last of equal ones wins, as in Go."""
    _check_depth(data, what)
    try:
        value = json.loads(data.decode("utf-8", "replace"), parse_constant=_refuse_constant, parse_int=_keep_number)
    except (ValueError, RecursionError):
        raise _BadFormError(f"{what} is not JSON") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _BadFieldError(f"{what} is JSON but not an object")
    return {key.lower(): field for key, field in value.items() if field is not None}


def _check_depth(data: bytes, what: str) -> None:
    """Refuse deep nesting before any parser meets it; brackets inside strings count too, tokens have none."""
    depth = 0
    for byte in data:
        if byte in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise _BadFieldError(f"{what} is nested too deeply")
        elif byte in b"]}":
            depth -= 1


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _keep_number(digits: str) -> float:
    """Numbers mean nothing here; an int of thousands of digits would cost time, or fail in its own way."""
    return 0.0


def _text(fields: dict[str, Any], key: str) -> str:
    value = fields.get(key.lower(), "")
    if not isinstance(value, str):
        raise _BadFieldError(f'"{key}" is not a string')
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates, by \ud800 escapes: they become U+FFFD, as in Go
        value = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in value)
    return value


def _bytes(fields: dict[str, Any], key: str) -> bytes:
    value = _text(fields, key)
    try:
        return _decode_base64(value)
    except _BadFieldError:
        raise _BadFieldError(f'"{key}" (the secret) is not standard base64 with padding') from None


def _uuid(fields: dict[str, Any], key: str) -> uuid.UUID:
    if key.lower() not in fields:
        return NIL
    value = _text(fields, key)
    if _UUID.fullmatch(value) is None:
        raise _BadFieldError(f'"{key}" (the tunnel ID) is not a UUID')
    return uuid.UUID(value)


_BASE64 = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")


def _advice(text: str) -> str:
    """Guess which well-known mistake `text` is; empty when it is none of them."""
    stripped = text.strip()
    if not stripped:
        return f"The token is empty. {_ASK_AGAIN}"
    if stripped[0] in "\"'`\u201c\u2018" or stripped[-1] in "\"'`\u201d\u2019":
        return "The token is inside quotation marks: remove them (env files and compose files keep them as they are)."
    if stripped[0] == "{":
        if '"TunnelSecret"' in stripped or '"tunnelsecret"' in stripped.lower():
            return "This is the text of a credentials file, not a token: give it with --credentials-contents."
        return f"This is the JSON inside a token: a token is its base64 form and starts with eyJ. {_ASK_AGAIN}"
    words = stripped.split()
    if len(words) > 1:
        if any(word.startswith("eyJ") for word in words):
            return "Only the last word, which starts with eyJ, is the token: leave out the command around it."
        return f"The text has spaces in it, a token has none. {_ASK_AGAIN}"
    if text != stripped and text.strip("\r\n") != stripped:
        return "There are spaces around the token: remove them."
    if stripped.startswith(("token=", "--token=", "TUNNEL_TOKEN=")):
        return "Give only what stands after the equals sign: it starts with eyJ."
    if "-" in stripped or "_" in stripped:
        if _UUID.fullmatch(stripped):
            return f"This is a tunnel ID, not a token; a token starts with eyJ. {_ASK_AGAIN}"
        return f"It has - or _ in it, which are not in the token's alphabet (standard base64). {_ASK_AGAIN}"
    if not set(stripped) <= _BASE64 | set("\r\n"):
        return f"It holds characters that no token has. {_ASK_AGAIN}"
    if stripped.startswith("eyJ") and _looks_cut(stripped):
        return f"It starts like a token but its end is missing. {_ASK_AGAIN}"
    if not stripped.startswith("ey") and len(stripped) > 4:
        return f"Tokens start with eyJ: this is another secret, or its beginning is missing. {_ASK_AGAIN}"
    return ""


def _looks_cut(text: str) -> bool:
    body = text.replace("\r", "").replace("\n", "").rstrip("=")
    if len(body) % 4 == 1:
        return True
    try:
        data = binascii.a2b_base64(body + "=" * (-len(body) % 4))
    except ValueError:
        return False
    return not data.rstrip().endswith(b"}")
