"""A configuration as written: typed, but not yet checked for sense.

Owns: the document's types, and reading them from decoded JSON. In: JSON values. Out: Document; ConfigError.
Never: applies a default. UNSET means "not written"; null counts as that, as in Go.

JSON: keys are matched without case, durations are whole seconds. YAML has its own reader (`ingress_yaml.py`).
"""

from __future__ import annotations

import re
import types
import typing
from functools import lru_cache
from typing import Any, Final

import msgspec
from msgspec import UNSET, Struct, UnsetType, field

from connector.errors import ConfigError


class Seconds(float):
    """A duration. A class of its own, so that each format can say how it is written."""

    __slots__ = ()


class IdleSeconds(Seconds):
    """A duration for which `true` is written where the usual one will do, and `false` for none at all."""

    __slots__ = ()


WS_KEEP_ALIVE: Final = IdleSeconds(40)
"""`wsKeepAlive: true`. Cloudflare cuts a WebSocket after 100 s without traffic: two PINGs may be lost."""

UInt = typing.Annotated[int, msgspec.Meta(ge=0)]
Text = str | UnsetType
Flag = bool | UnsetType
Duration = Seconds | UnsetType


class AccessDocument(Struct, frozen=True):
    """`access`."""

    required: Flag = UNSET
    team_name: Text = field(default=UNSET, name="teamName")
    audience: list[str] | UnsetType = field(default=UNSET, name="audTag")
    environment: Text = UNSET


class IPRuleDocument(Struct, frozen=True):
    """One of `ipRules`."""

    prefix: Text = UNSET
    ports: list[int] | UnsetType = UNSET
    allow: Flag = UNSET


class OriginRequestDocument(Struct, frozen=True):
    """`originRequest`, of a rule or of all."""

    connect_timeout: Duration = field(default=UNSET, name="connectTimeout")
    tls_timeout: Duration = field(default=UNSET, name="tlsTimeout")
    tcp_keep_alive: Duration = field(default=UNSET, name="tcpKeepAlive")
    no_happy_eyeballs: Flag = field(default=UNSET, name="noHappyEyeballs")
    keep_alive_connections: int | UnsetType = field(default=UNSET, name="keepAliveConnections")
    keep_alive_timeout: Duration = field(default=UNSET, name="keepAliveTimeout")
    http_host_header: Text = field(default=UNSET, name="httpHostHeader")
    origin_server_name: Text = field(default=UNSET, name="originServerName")
    match_sni_to_host: Flag = field(default=UNSET, name="matchSNItoHost")
    ca_pool: Text = field(default=UNSET, name="caPool")
    no_tls_verify: Flag = field(default=UNSET, name="noTLSVerify")
    disable_chunked_encoding: Flag = field(default=UNSET, name="disableChunkedEncoding")
    bastion_mode: Flag = field(default=UNSET, name="bastionMode")
    proxy_address: Text = field(default=UNSET, name="proxyAddress")
    proxy_port: UInt | UnsetType = field(default=UNSET, name="proxyPort")
    proxy_type: Text = field(default=UNSET, name="proxyType")
    ip_rules: list[IPRuleDocument] | UnsetType = field(default=UNSET, name="ipRules")
    http2_origin: Flag = field(default=UNSET, name="http2Origin")
    access: AccessDocument | UnsetType = UNSET
    # Extensions of this program
    ws_keep_alive: IdleSeconds | UnsetType = field(default=UNSET, name="wsKeepAlive")
    ws_subprotocols: list[str] | UnsetType = field(default=UNSET, name="wsSubprotocols")
    proxy_protocol: Text = field(default=UNSET, name="proxyProtocol")
    access_log: Flag = field(default=UNSET, name="accessLog")


class RuleDocument(Struct, frozen=True):
    """One of `ingress`."""

    hostname: str = ""
    path: str = ""
    service: str = ""
    origin_request: OriginRequestDocument = field(default_factory=OriginRequestDocument, name="originRequest")


class WarpRoutingDocument(Struct, frozen=True):
    """`warp-routing`."""

    connect_timeout: Duration = field(default=UNSET, name="connectTimeout")
    tcp_keep_alive: Duration = field(default=UNSET, name="tcpKeepAlive")
    max_active_flows: UInt | UnsetType = field(default=UNSET, name="maxActiveFlows")


class Document(Struct, frozen=True):
    """A whole configuration: a push of the edge, or what a YAML file says about ingress."""

    ingress: list[RuleDocument] = field(default_factory=list)
    origin_request: OriginRequestDocument = field(default_factory=OriginRequestDocument, name="originRequest")
    warp_routing: WarpRoutingDocument = field(default_factory=WarpRoutingDocument, name="warp-routing")


class CommandLineDocument(Struct, frozen=True):
    """What `ingress validate --json` reads: cloudflared names one key differently there."""

    ingress: list[RuleDocument] = field(default_factory=list)
    origin_request: OriginRequestDocument = field(default_factory=OriginRequestDocument, name="originRequest")
    warp_routing: WarpRoutingDocument = field(default_factory=WarpRoutingDocument, name="WarpRouting")


@lru_cache(maxsize=64)
def keys_of(kind: type[Struct]) -> dict[str, tuple[str, Any]]:
    """Return what a document type may hold: key in lower case -> key as written, and its type without UNSET."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        name.lower(): (name, _plain(hints[attribute]))
        for attribute, name in zip(kind.__struct_fields__, kind.__struct_encode_fields__, strict=True)
    }


def _plain(hint: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not UnsetType)
    if typing.get_origin(hint) is typing.Annotated:
        hint = UInt
    return hint


def item_type(hint: Any) -> Any:
    """Return the type of a list's items; None for anything but a list."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is list else None


_INT64: Final = 2**63
_MESSAGE = re.compile(r"(?s)(?P<what>.*?)(?: - at `\$\.?(?P<where>[^`]*)`)?")
_EXPECTED = re.compile(r"Expected `(?P<want>[a-z]+)`(?:, got `(?P<got>[a-z]+)`)?(?P<bound> >= 0)?")
_WANTED: Final = {"str": "string", "bool": "boolean", "int": "integer", "array": "list", "object": "object"}
_GOT: Final = {"str": "a string", "bool": "a boolean", "int": "a number", "array": "a list", "object": "an object",
               "float": "a fraction", "null": "null"}  # fmt: skip


def read_json_document(value: object, kind: type[Document] | type[CommandLineDocument] = Document) -> Document:
    """Return the document that decoded JSON holds. Errors: ConfigError naming the key and what it should be."""
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ConfigError(f"the configuration must be a JSON object, not {_json_type(value)}")
    try:
        read = msgspec.convert(_fold(value, kind, ""), kind, dec_hook=_json_hook)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error))) from None
    return Document(read.ingress, read.origin_request, read.warp_routing)


def _fold(value: object, kind: Any, where: str) -> object:
    """Return a JSON value with known keys in their spelling, unknown ones and nulls left out."""
    if isinstance(value, int) and kind in _RANGES and value not in _RANGES[kind]:
        raise ConfigError(f"{where.lstrip('.')} does not fit into 64 bits")
    item = item_type(kind)
    if item is not None and isinstance(value, list):
        return [
            _fold(_EMPTY.get(item, {}) if part is None else part, item, f"{where}[{number}]")
            for number, part in enumerate(value)
        ]
    if isinstance(kind, type) and issubclass(kind, Struct) and isinstance(value, dict):
        known = keys_of(kind)
        return {
            known[key][0]: _fold(part, known[key][1], f"{where}.{known[key][0]}")
            for name, part in value.items()
            if part is not None and (key := name.lower()) in known
        }
    if isinstance(value, str) and not value.isascii():
        # JSON can hold half a surrogate pair; Go reads U+FFFD.
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


_RANGES: Final[dict[Any, range]] = {int: range(-_INT64, _INT64), UInt: range(-_INT64, 2 * _INT64)}

_EMPTY: Final[dict[Any, object]] = {str: "", int: 0}
"""What null means in a list of plain values."""


def _json_hook(kind: type, value: object) -> object:
    """Read a Seconds."""
    if kind is IdleSeconds and isinstance(value, bool):
        return WS_KEEP_ALIVE if value else IdleSeconds(0)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"must be an integer number of seconds, not {_json_type(value)}")
    if not -_INT64 <= value < _INT64:
        raise ValueError("does not fit into 64 bits")
    return kind(value)


def _json_type(value: object) -> str:
    if isinstance(value, float):
        return f"the fraction {value}"
    names = {type(None): "null", bool: "boolean", str: "str", int: "int", list: "array", dict: "object"}
    name = names.get(type(value), "")
    return {"null": "null", "boolean": "a boolean"}.get(name) or _GOT.get(name, type(value).__name__)


def _explain(message: str) -> str:
    """Turn msgspec's text into one that names the key first."""
    found = _MESSAGE.fullmatch(message)
    assert found is not None
    what, where = found["what"], found["where"] or "the configuration"
    expected = _EXPECTED.fullmatch(what)
    if expected is None:
        return f"{where} {what}"
    if expected["bound"]:
        return f"{where} must be 0 or more"
    got = f", not {_GOT.get(expected['got'], expected['got'])}" if expected["got"] else ""
    return f"{where} must be a JSON {_WANTED.get(expected['want'], expected['want'])}{got}"
