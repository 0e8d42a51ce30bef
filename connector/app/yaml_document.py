"""YAML configuration files, read as cloudflared's library reads them.

Owns: the typed walk over a file's nodes, unused keys, Go's texts with line numbers. In: bytes. Out: YamlFile.
Never: opens a file, or gives a flag its meaning. Errors: ConfigError.

*Strategy*: libyaml parses, as in Go (which ports it); but what a scalar means depends on the field that takes it: `5`
is a fine text and no duration, `yes` a boolean only where one is wanted. So the nodes are walked by the document's
types instead of being converted first.
"""

from __future__ import annotations

import base64
import math
import re
from typing import Any, Final

import yaml
from msgspec import Struct

from connector.app.durations import parse_duration
from connector.errors import ConfigError
from connector.proxy.ingress_document import (
    WS_KEEP_ALIVE,
    AccessDocument,
    Document,
    IdleSeconds,
    IPRuleDocument,
    OriginRequestDocument,
    RuleDocument,
    Seconds,
    UInt,
    WarpRoutingDocument,
    item_type,
    keys_of,
)

MAX_DEPTH: Final = 64
"""Brackets within brackets; the format needs 6. The C parser recurses per level."""

MAX_MERGES: Final = 100
"""Mappings that one `<<` may pull in, directly or through others."""

_GO_TYPES: Final[dict[Any, str]] = {
    str: "string", bool: "bool", int: "int", UInt: "uint", Seconds: "time.Duration", IdleSeconds: "time.Duration",
    RuleDocument: "config.UnvalidatedIngressRule", OriginRequestDocument: "config.OriginRequestConfig",
    AccessDocument: "config.AccessConfig", IPRuleDocument: "config.IngressIPRule",
    WarpRoutingDocument: "config.WarpRoutingConfig", Document: "config.configFileSettings",
}  # fmt: skip
_NULLS: Final = frozenset(("", "~", "null", "Null", "NULL"))
_BOOLEANS: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_OLD_BOOLEANS: Final = {
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "off", "Off", "OFF"), False),
}
_MAX_SECONDS: Final = 2**63 / 1e9
"""Go counts nanoseconds in 64 bits."""
_INTEGER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO]?[0-7]+|[1-9][0-9]*|0)")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL: Final = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
_TIMESTAMP = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt ].*)?")
_MERGE: Final = "tag:yaml.org,2002:merge"

Node = Any
"""A node of PyYAML, which has no types."""


class YamlFile(Struct, frozen=True):
    """What one file says. `settings` are the top-level keys that are flags, or nothing."""

    document: Document
    tunnel: str = ""
    settings: dict[str, Any] = {}
    unused: tuple[str, ...] = ()
    """Keys that mean nothing where they stand, in Go's words."""
    empty: bool = False


def read_yaml(data: bytes, name: str) -> YamlFile:
    """Read the first document of a file; `name` goes into errors."""
    try:
        node = _compose(data)
    except yaml.YAMLError as error:
        raise ConfigError(f"error parsing YAML in config file at {name}: yaml: {_yaml_words(error)}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"error parsing YAML in config file at {name}: {error}") from None
    if node is None:
        return YamlFile(Document(), empty=True)
    walk = _Walk()
    result = walk.top(node)
    if walk.errors:
        lines = "".join(f"\n  {line}" for line in walk.errors)
        raise ConfigError(
            f"error parsing YAML in config file at {name}: yaml: unmarshal errors:{lines}", advice=walk.advice
        )
    return result


def _compose(data: bytes) -> Node:
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    open_anchors: list[str | None] = []
    tags: dict[int, str] = {}
    for event in yaml.parse(data, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_anchors.append(event.anchor)
            if len(open_anchors) > MAX_DEPTH:
                raise yaml.YAMLError(f"nested more than {MAX_DEPTH} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            open_anchors.pop()
        elif isinstance(event, yaml.AliasEvent) and event.anchor in open_anchors:
            raise yaml.YAMLError(f"anchor '{event.anchor}' value contains itself")
        elif isinstance(event, yaml.ScalarEvent) and event.tag is not None and event.start_mark is not None:
            tags[event.start_mark.index] = event.tag
        elif isinstance(event, yaml.DocumentStartEvent) and (event.version or (1, 1)) != (1, 1):
            raise yaml.YAMLError("found incompatible YAML document")
        elif isinstance(event, yaml.DocumentEndEvent):
            break  # further documents do not matter
    root = next(yaml.compose_all(data, Loader=loader), None)
    if tags:
        _apply_tags(root, tags)
    return root


_TAG: Final = "tag:yaml.org,2002:"


def _apply_tags(root: Node, tags: dict[int, str]) -> None:
    """Give scalars the style that `resolve` reads as their explicit tag asks for. Errors: yaml.YAMLError."""
    seen: set[int] = set()
    queue = [root]
    while queue:
        node = queue.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            queue.extend(part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            queue.extend(node.value)
        elif (tag := tags.get(node.start_mark.index, "")).startswith(_TAG):
            _apply_tag(node, tag.removeprefix(_TAG))


def _apply_tag(node: Node, name: str) -> None:
    if name == "str":
        node.style = '"'
    elif name == "binary":
        try:
            node.value = base64.b64decode("".join(node.value.splitlines()), validate=True).decode("utf-8", "replace")
        except ValueError:
            raise yaml.YAMLError("!!binary value contains invalid base64 data") from None
        node.style = '"'
    elif name in _NAMED:
        node.style = None
        value = resolve(node)
        found = {bool: "bool", int: "int", float: "float", str: "str"}.get(type(value), "null")
        if name != found and (name, found) != ("float", "int"):
            raise yaml.YAMLError(f"cannot decode !!{found} `{node.value}` as a !!{name}")


_NAMED: Final = frozenset(("bool", "int", "float", "null"))


def _yaml_words(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    return f"line {mark.line + 1}: {problem}" if mark is not None else str(problem)


def resolve(node: Node) -> Any:
    """Return what a scalar means by itself: None, bool, int, float or str. Timestamps stay text."""
    text: str = node.value
    if node.style in {"'", '"', "|", ">"}:
        return text
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if text.lower() in _SPECIAL and text.lower() == text:
        return _SPECIAL[text]
    plain = text.replace("_", "")
    if _INTEGER.fullmatch(plain) and len(plain) < 100:
        number = _integer(plain)
        return number if -(2**63) <= number < 2**64 else float(number)
    return float(plain) if _FLOAT.fullmatch(plain) else text


def _integer(text: str) -> int:
    sign, digits = (-1, text[1:]) if text[0] == "-" else (1, text.lstrip("+"))
    if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
        digits = "0o" + digits[1:]
    return sign * int(digits, 0)


def _short_tag(node: Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "!!map"
    if isinstance(node, yaml.SequenceNode):
        return "!!seq"
    value = resolve(node)
    if isinstance(value, str):
        plain = node.style not in {"'", '"', "|", ">"}
        return "!!timestamp" if plain and _TIMESTAMP.fullmatch(value) else "!!str"
    return {bool: "!!bool", int: "!!int", float: "!!float"}.get(type(value), "!!null")


def go_type(kind: Any) -> str:
    """Return Go's name of a document's type."""
    item = item_type(kind)
    return f"[]{go_type(item)}" if item is not None else _GO_TYPES[kind]


class _Walk:
    """One walk over a file's nodes; collects every error, as Go does."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.unused: list[str] = []
        self.advice = ""

    def top(self, node: Node) -> YamlFile:
        """Read the whole file."""
        if isinstance(node, yaml.ScalarNode) and resolve(node) is None:
            return YamlFile(Document())
        if not isinstance(node, yaml.MappingNode):
            self._refuse(node, Document)
            return YamlFile(Document())
        known = dict(keys_of(Document).values())
        values: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        tunnel = ""
        for key, _, part in self._pairs(node):
            if key == "tunnel":
                tunnel = self._value(part, str) or ""
            elif key in known:
                value = self._value(part, known[key])
                if value is not None:
                    values[key.replace("-", "_").replace("originRequest", "origin_request")] = value
            else:
                settings[key] = _generic(part)
        return YamlFile(Document(**values), tunnel, settings, tuple(self.unused))

    def _pairs(self, node: Node) -> list[tuple[str, int, Node]]:
        """Return a mapping's keys, lines and values with `<<` resolved; its own keys win over merged ones."""
        seen: dict[str, int] = {}
        before = len(self.errors)
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                self.errors.append(f'line {line}: mapping key "{key.value}" already defined at line {seen[key.value]}')
            seen.setdefault(key.value, line)
        if len(self.errors) > before:
            return []
        pairs: dict[str, tuple[str, int, Node]] = {}
        queue, merges = [node], 0
        while queue:
            for key, value in queue.pop(0).value:
                line = key.start_mark.line + 1
                if key.tag == _MERGE or (key.value == "<<" and key.style is None):
                    sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                    merges += len(sources)
                    if merges > MAX_MERGES or not all(isinstance(source, yaml.MappingNode) for source in sources):
                        self.errors.append(f"line {line}: map merge requires map or sequence of maps as the value")
                        return []
                    queue.extend(sources)
                elif isinstance(key, yaml.ScalarNode):
                    pairs.setdefault(key.value, (key.value, line, value))
                else:
                    self._refuse(key, str)
        return list(pairs.values())

    def _value(self, node: Node, kind: Any) -> Any:
        """Return a node as `kind`, or None for null and for what cannot be read."""
        if isinstance(node, yaml.ScalarNode):
            value = resolve(node)
            return None if value is None else self._scalar(node, value, kind)
        item = item_type(kind)
        if item is not None and isinstance(node, yaml.SequenceNode):
            parts = [self._value(part, item) for part in node.value]
            return [part for part in parts if part is not None]  # null items count for nothing, as in Go
        if isinstance(kind, type) and issubclass(kind, Struct) and isinstance(node, yaml.MappingNode):
            return self._struct(node, kind)
        self._refuse(node, kind)
        return None

    def _struct(self, node: Node, kind: type[Struct]) -> Struct:
        attributes = dict(zip(kind.__struct_encode_fields__, kind.__struct_fields__, strict=True))
        known = dict(keys_of(kind).values())
        values: dict[str, Any] = {}
        for key, line, part in self._pairs(node):
            if key not in known:
                self.unused.append(f"line {line}: field {key} not found in type {go_type(kind)}")
                continue
            value = self._value(part, known[key])
            if value is not None:
                values[attributes[key]] = value
        return kind(**values)

    def _scalar(self, node: Node, value: Any, kind: Any) -> Any:
        text: str = node.value
        if kind is str:
            return text
        if kind is bool:
            if isinstance(value, bool):
                return value
            if text in _OLD_BOOLEANS:
                return _OLD_BOOLEANS[text]
        elif kind is IdleSeconds and (isinstance(value, bool) or text in _OLD_BOOLEANS):
            return WS_KEEP_ALIVE if value is True or _OLD_BOOLEANS.get(text) else IdleSeconds(0)
        elif kind in {Seconds, IdleSeconds}:
            if isinstance(value, str):
                try:
                    seconds = parse_duration(value)
                except ValueError:
                    seconds = math.inf
                if abs(seconds) < _MAX_SECONDS:
                    return kind(seconds)
            self.advice = self.advice or "Durations need a unit here: 30s, 1m30s, 500ms."
        elif kind in {int, UInt} and isinstance(value, (int, float)) and not isinstance(value, bool):
            limit = 2**63 if kind is int else 2**64
            high = limit if isinstance(value, float) else limit - 1  # Go compares fractions with a rounded limit
            if math.isfinite(value) and (-limit if kind is int else 0) <= value <= high:
                return min(int(value), limit - 1)
        self._refuse(node, kind)
        return None

    def _refuse(self, node: Node, kind: Any) -> None:
        shown = ""
        if isinstance(node, yaml.ScalarNode):
            text = node.value if len(node.value) <= 10 else node.value[:7] + "..."
            shown = f" `{text}`"
        line = node.start_mark.line + 1
        self.errors.append(f"line {line}: cannot unmarshal {_short_tag(node)}{shown} into {go_type(kind)}")


def _generic(node: Node) -> Any:
    """Return a flag's value: a scalar, or a list of scalars; of anything else only its kind matters."""
    if isinstance(node, yaml.ScalarNode):
        return resolve(node)
    if isinstance(node, yaml.SequenceNode):
        return [resolve(part) if isinstance(part, yaml.ScalarNode) else {} for part in node.value]
    return {}
