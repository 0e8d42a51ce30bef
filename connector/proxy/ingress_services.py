"""Services: from the text of a rule, or of a flag, to a Service.

Owns: the forms of a service, their order of precedence and the texts that refuse the rest. In: text. Out: Service.
Never: looks at other parts of a rule. Errors: ConfigError.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final
from urllib.parse import unquote

from connector.errors import ConfigError
from connector.proxy.go_url import UrlError, parse_url, without_userinfo
from connector.proxy.idna_names import lookup_name
from connector.proxy.ingress_model import Service, ServiceKind

_DEFAULT_PORTS: Final = {"ssh": 22, "rdp": 3389, "smb": 445, "tcp": 7864}
_FLAG_SCHEMES: Final = frozenset(("http", "https", "rdp", "ssh", "smb", "tcp"))


def parse_service(text: str, *, bastion: bool = False) -> Service:
    """Return the service that `text` names; `bastion` is the rule's bastionMode."""
    if text.startswith("unix:"):
        return Service(ServiceKind.HTTP, text, path=text[5:])
    if text.startswith("unix+tls:"):
        return Service(ServiceKind.HTTP, text, path=text[9:], tls=True)
    if text.startswith("http_status:"):
        number = text[12:]
        if not re.fullmatch(r"[+-]?[0-9]+", number):
            raise ConfigError(f"invalid HTTP status code: {number[:40]!r} is not a number")
        shown = number.lstrip("+").lstrip("0") or "0"  # int() refuses thousands of digits
        if len(shown) != 3 or not 100 <= int(shown) <= 999:
            raise ConfigError(f"invalid HTTP status code: {shown[:20]} is not between 100 and 999")
        return Service(ServiceKind.STATUS, f"http_status:{shown}", status=int(shown))
    if text in {"hello_world", "hello-world"}:
        return Service(ServiceKind.HELLO, "hello_world")
    if text == "socks-proxy":
        return Service(ServiceKind.SOCKS, text)
    if text == "bastion" or bastion:
        return Service(ServiceKind.BASTION, "bastion")
    return _url_service(text)


def _url_service(text: str) -> Service:
    shown = without_userinfo(text)
    try:
        url = parse_url(text)
    except UrlError as error:
        raise ConfigError(str(error), advice=_scheme_advice(shown)) from None
    if not url.scheme or not url.hostname:
        raise ConfigError(
            f"{shown} is an invalid address, please make sure it has a scheme and a hostname",
            advice=_scheme_advice(shown),
        )
    if url.path:
        raise ConfigError(
            f"{shown} is an invalid address, ingress rules don't support proxying to a different path on the origin "
            "service. The path will be the same as the eyeball request's path"
        )
    scheme, port = url.scheme, min(int(url.port[:9] or 0), 999_999)
    host = url.hostname
    if not host.isascii():
        host = lookup_name(host) or host
    if scheme in {"http", "https", "ws", "wss"}:
        tls = scheme in {"https", "wss"}
        return Service(ServiceKind.HTTP, url.shown(), host, port or (443 if tls else 80), tls=tls, scheme=scheme)
    where = url.host
    if not url.port and scheme in _DEFAULT_PORTS:
        port = _DEFAULT_PORTS[scheme]
        where = f"[{url.hostname}]:{port}" if ":" in url.hostname else f"{url.hostname}:{port}"
    return Service(ServiceKind.TCP, f"{scheme}://{where}", host, port, scheme=scheme)


def _scheme_advice(shown: str) -> str:
    return f"write http://{shown}" if re.fullmatch(r"[A-Za-z0-9.-]+(?::[0-9]+)?", shown) else ""


def port_problem(service: Service) -> str:
    """Return why no connection to a service can work because of its port; empty when it can."""
    if service.kind not in {ServiceKind.HTTP, ServiceKind.TCP} or service.path:
        return ""
    if not service.port:
        return f"{service.text} has no port, and the scheme {service.scheme} has no default"
    return f"the port of {service.text} is beyond 65535" if service.port > 65535 else ""


# -- the single origin of --url


def service_from_url_flag(text: str) -> Service:
    """Return the service that `--url` names: no scheme means http, and with a scheme a path is cut off."""
    try:
        url = parse_url(_validated(text))
    except UrlError as error:
        raise ConfigError(f"Error validating origin URL: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"Error validating origin URL: {error}", advice=error.advice) from None
    return _url_service(f"{url.scheme}://{url.host}")


def _validated(text: str) -> str:
    """Return `--url` as a URL with a scheme; a host without scheme keeps its path."""
    if not text:
        raise ConfigError("URL should not be empty")
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if _is_address(bare):
        return f"http://[{bare}]" if ":" in bare else f"http://{bare}"
    host, port = _split(text)
    if host and _is_address(host):
        return _joined("http", host, port)
    try:
        url = parse_url(unquote(text, errors="surrogateescape"))
    except UrlError:
        raise ConfigError(f"URL {without_userinfo(text)} has invalid format") from None
    if url.scheme and url.host:
        if url.scheme not in _FLAG_SCHEMES:
            raise ConfigError(f"Currently Cloudflare Tunnel does not support {url.scheme} protocol.")
        name = url.hostname
        return _joined(url.scheme, name if _is_address(name) else _ascii(name), url.port)
    if not host:
        name, slash, path = text.partition("/")
        return f"http://{_ascii(name)}{slash}{path}"
    return _joined("http", _ascii(host), port)


def _joined(scheme: str, host: str, port: str) -> str:
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{port}" if port else f"{scheme}://{host}"


def _split(text: str) -> tuple[str, str]:
    """Return host and port of `host:port`; both empty when it is none. The port may carry a path."""
    host, colon, port = text.rpartition(":")
    if not colon:
        return "", ""
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1], port
    return ("", "") if ":" in host or "[" in host or "]" in host else (host, port)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def _ascii(name: str) -> str:
    return name if name.isascii() else lookup_name(name) or name
