"""The filter language of the page, the terminal and `connector capture filter`: which streams are meant.

Owns: grammar and evaluation. In: a text and rows. Out: a predicate; UsageError. Never: evaluates Python.

    term      = word | name OPERATOR value | "(" expression ")" | "not" term
    operator  = :  contains     =  equals     !=  differs     <  >  <=  >=  numbers     ~  regular expression
    expression = terms side by side (and), "or" between them

Names: method host path url status ms up down rule service kind transport conn client ray how mqtt topic id; a bare
word is searched for in the URL. Example: `status>=500 host:api or (kind=websocket mqtt:sensor)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from connector.errors import UsageError

NAMES = {
    "method": "method", "host": "host", "path": "target", "url": "url", "status": "status", "ms": "ms", "up": "up",
    "down": "down", "rule": "rule", "service": "service", "kind": "kind", "transport": "transport", "conn": "conn",
    "client": "client", "ray": "ray", "how": "how", "mqtt": "mqtt", "id": "id", "error": "error", "frames": "frames",
    "source": "source",
}  # fmt: skip

Predicate = Callable[[dict[str, Any]], bool]

_TOKENS = re.compile(r'\s*(?:(\()|(\))|((?:[^\s()"]|"(?:[^"\\]|\\.)*")+))')
_TERM = re.compile(r"^([a-z]+)(!=|<=|>=|[:=<>~])(.*)$", re.S)

LARGEST_FILTER = 1_000
"""Characters of a filter, and so its depth."""

_UNSAFE_REGEX = re.compile(r"[*+}]\)?[*+{]|\([^)]*[*+{][^)]*\)[*+{]|\\[1-9]")


def parse_filter(text: str) -> Predicate:
    """Return the predicate of `text`; everything passes an empty one. Errors: UsageError."""
    if len(text) > LARGEST_FILTER:
        raise UsageError(f"a filter of {len(text)} characters, more than {LARGEST_FILTER}")
    tokens: list[str] = []
    at = 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKENS.match(text, at)
        if match is None:
            raise UsageError(f"the filter is not understood from {text[at:]!r} on", advice="Quotes must be closed.")
        tokens.append(next(part for part in match.groups() if part))
        at = match.end()
    if not tokens:
        return lambda row: True
    parser = _Parser(tokens)
    found = parser.expression()
    if parser.at < len(tokens):
        raise UsageError(f"the filter has a ) too many, before {' '.join(tokens[parser.at :])!r}")
    return found


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def expression(self) -> Predicate:
        choices = [self.conjunction()]
        while self.peek().lower() == "or":
            self.at += 1
            choices.append(self.conjunction())
        return choices[0] if len(choices) == 1 else lambda row: any(choice(row) for choice in choices)

    def conjunction(self) -> Predicate:
        terms: list[Predicate] = []
        while self.peek() and self.peek() != ")" and self.peek().lower() != "or":
            if self.peek().lower() == "and":
                self.at += 1
                continue
            terms.append(self.term())
        if not terms:
            raise UsageError("the filter lacks a condition", advice="For example: status>=500 host:api")
        return terms[0] if len(terms) == 1 else lambda row: all(term(row) for term in terms)

    def term(self) -> Predicate:
        word = self.peek()
        self.at += 1
        if word == "(":
            inner = self.expression()
            if self.peek() != ")":
                raise UsageError("the filter lacks a closing )")
            self.at += 1
            return inner
        if word.lower() == "not":
            if not self.peek():
                raise UsageError("the filter ends after `not`")
            negated = self.term()
            return lambda row: not negated(row)
        match = _TERM.match(word)
        if match is None:
            text = _plain(word).lower()
            return lambda row: text in str(row.get("url", "")).lower() or text in str(row.get("mqtt") or "").lower()
        name, operator, value = match.groups()
        if name not in NAMES:
            raise UsageError(f"the filter has an unknown name {name!r}", advice=f"Names: {', '.join(sorted(NAMES))}.")
        return _compare(NAMES[name], operator, _plain(value))


def _plain(token: str) -> str:
    return re.sub(r'"((?:[^"\\]|\\.)*)"', lambda found: re.sub(r"\\(.)", r"\1", found.group(1)), token)


def _compare(key: str, operator: str, value: str) -> Predicate:
    lower = value.lower()
    if operator in {"<", ">", "<=", ">="}:
        try:
            number = float(value)
        except ValueError:
            raise UsageError(f"the filter compares {key} with {value!r}, which is no number") from None
        tests: dict[str, Callable[[float], bool]] = {
            "<": lambda found: found < number, ">": lambda found: found > number,
            "<=": lambda found: found <= number, ">=": lambda found: found >= number,
        }  # fmt: skip
        test = tests[operator]
        return lambda row: isinstance(row.get(key), int | float) and test(float(row[key]))
    if operator == "~":
        if _UNSAFE_REGEX.search(value) or len(value) > 200:
            raise UsageError(f"the regular expression {value!r} could take too long", advice="No nested repetition.")
        try:
            pattern = re.compile(value, re.I)
        except re.error as error:
            raise UsageError(f"the regular expression {value!r} is none: {error}") from None
        return lambda row: pattern.search(_shown(row.get(key))[:4_096]) is not None
    if operator == ":":
        return lambda row: lower in _shown(row.get(key)).lower()
    if operator == "=":
        return lambda row: _shown(row.get(key)).lower() == lower
    return lambda row: _shown(row.get(key)).lower() != lower


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
