"""URLs as cloudflared reads them: the rules of Go's `net/url`, which decide what is a valid service.

Owns: splitting, the refusals and their texts, and printing. In: text. Out: GoUrl; UrlError.
Never: knows what a URL is for.

Not `urllib.parse`: it takes what Go refuses (`http://a b`, `http://::1`) and refuses what Go takes (port 99999).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_PORT = re.compile(r"(?::[0-9]*)?")
_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_HOST = re.compile(r"[^\x00-\x20#/?@\\^`{|}\x7f]*")  # all but these: a range to U+10FFFF compiles in 3 ms
_USER = re.compile(r"[A-Za-z0-9\-._:~!$&'()*+,;=%@]*")


class UrlError(ValueError):
    """A text that Go's parser refuses."""


class GoUrl(NamedTuple):
    """The parts, decoded; `host` keeps port and brackets. `rest` is `?query#fragment` as written."""

    scheme: str = ""
    userinfo: str = ""
    host: str = ""
    path: str = ""
    rest: str = ""
    opaque: str = ""

    @property
    def hostname(self) -> str:
        """The host without port and brackets."""
        host = self.host[: len(self.host) - len(self._colon_port)]
        return host[1:-1] if host.startswith("[") and host.endswith("]") else host

    @property
    def port(self) -> str:
        """The digits of the port; empty when there is none."""
        return self._colon_port[1:]

    @property
    def _colon_port(self) -> str:
        at = self.host.rfind(":")
        return self.host[at:] if at >= 0 and _PORT.fullmatch(self.host, at) else ""

    def shown(self) -> str:
        """Print it without user name and password."""
        if self.opaque:
            return f"{self.scheme}:{self.opaque}{self.rest}"
        host = quote(self.host, safe="-_.~!$&'()*+,;=:[]<>\"")
        scheme = f"{self.scheme}:" if self.scheme else ""
        slashes = "//" if self.host or (self.scheme and not self.path) else ""
        return f"{scheme}{slashes}{host}{quote(self.path, safe='/$&+,;=:@-_.~!*()')}{self.rest}"


def parse_url(text: str) -> GoUrl:
    """Split `text`. Errors: UrlError with Go's words; user name and password are left out of them."""
    try:
        return _parse(text)
    except UrlError as error:
        raise UrlError(f"parse {_quoted(without_userinfo(text))}: {error}") from None


_ESCAPES: Final = dict(zip("\a\b\f\n\r\t\v", ("\\a", "\\b", "\\f", "\\n", "\\r", "\\t", "\\v"), strict=True))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda it: _ESCAPES.get(it[0], f"\\x{ord(it[0]):02x}"), escaped) + '"'


def without_userinfo(text: str) -> str:
    """Return a URL's text without user name and password."""
    return re.sub(r"(?<=//)[^/]*@", "", text)


def _parse(text: str) -> GoUrl:
    raw, mark, fragment = text.partition("#")
    _check_escapes(fragment)
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise UrlError("net/url: invalid control character in URL")
    if raw == "*":
        return GoUrl(path="*", rest=mark + fragment)
    found = _SCHEME.match(raw)
    if raw.startswith(":"):
        raise UrlError("missing protocol scheme")
    scheme = found[1].lower() if found else ""
    rest, question, query = (raw[found.end() :] if found else raw).partition("?")
    tail = (question + query if query or question else "") + (mark + fragment if fragment else "")
    if not rest.startswith("/"):
        if scheme:
            return GoUrl(scheme, opaque=rest, rest=tail)
        if ":" in rest.partition("/")[0]:
            raise UrlError("first path segment in URL cannot contain colon")
    userinfo = host = ""
    if rest.startswith("//") and (scheme or not rest.startswith("///")):
        authority, slash, path = rest[2:].partition("/")
        rest = slash + path
        userinfo, _, host = authority.rpartition("@")
        if not _USER.fullmatch(userinfo):
            raise UrlError("net/url: invalid userinfo")
        _check_escapes(userinfo)
        host = _host(host)
    _check_escapes(rest)
    return GoUrl(scheme, userinfo, host, unquote(rest, errors="surrogateescape"), tail)


def _check_escapes(text: str) -> None:
    found = _ESCAPE.search(text)
    if found:
        raise UrlError(f'invalid URL escape "{text[found.start() : found.start() + 3]}"')


def _host(text: str) -> str:
    """Check and decode a host with port."""
    bracket = text.rfind("[")
    if bracket > 0:
        raise UrlError("invalid IP-literal")
    if bracket == 0:
        end = text.rfind("]")
        if end < 0:
            raise UrlError("missing ']' in host")
        if not _PORT.fullmatch(text, end + 1):
            raise UrlError(f'invalid port "{text[end + 1 :]}" after host')
        address, percent, zone = text[1:end].partition("%")
        if percent and not zone.startswith("25"):
            raise UrlError(f'invalid URL escape "%{zone[:2]}"')
        literal = address + unquote(percent + zone)
        try:
            if ipaddress.ip_address(literal).version == 4:
                raise UrlError("invalid IP-literal")
        except ValueError as error:
            if isinstance(error, UrlError):
                raise
            raise UrlError(f"invalid host: {literal}") from None
        return f"[{literal}]{text[end + 1 :]}"
    colon = text.find(":")
    if colon >= 0 and not _PORT.fullmatch(text, colon):
        raise UrlError(f'invalid port "{text[colon:]}" after host')
    _check_escapes(text)
    if found := re.search(r"%(?!25)[0-7][0-9A-Fa-f]", text):
        raise UrlError(f'invalid URL escape "{found[0]}"')
    if not _HOST.fullmatch(text):
        bad = next(char for char in text if not _HOST.fullmatch(char))
        raise UrlError(f"invalid character {_quoted(bad)} in host name")
    return unquote(text, errors="surrogateescape")
