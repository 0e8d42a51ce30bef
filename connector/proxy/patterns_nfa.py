"""A search that never backtracks, for where google-re2 has no wheel.

Owns: the automaton of one expression and its run over a path. In: an expression in Python's syntax. Out: found or not.
Never: captures or look-around; time grows with the path's length times the expression's size, whatever both are.

*Strategy*: Python's own parser makes a tree of the expression, the tree becomes Thompson's automaton, and a run follows
all its states at once. Sets of states that were seen before are remembered with where each character led (a lazy DFA).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any, Final

MAX_STATES: Final = 5_000
"""States of one automaton. RE2 stops at 8 MiB, which is more; path expressions have some tens."""

MAX_SETS: Final = 2_000
"""Remembered steps; a hostile path makes new ones, so there must be an end."""

Test = Callable[[str], bool]
Assertion = Callable[[str, str], bool]
"""Takes the characters before and after a place, empty at the ends."""


class TooLargeError(ValueError):
    """The automaton would have too many states."""


def _word(char: str) -> bool:
    return char.isascii() and (char.isalnum() or char == "_")


_CATEGORIES: Final[dict[str, Test]] = {
    "CATEGORY_DIGIT": lambda char: char.isascii() and char.isdigit(),
    "CATEGORY_SPACE": lambda char: char in set("\t\n\f\r "),
    "CATEGORY_WORD": _word,
}
_ASSERTIONS: Final[dict[str, Assertion]] = {
    "AT_BEGINNING_STRING": lambda before, _: not before,
    "AT_END_STRING": lambda _, after: not after,
    "AT_BOUNDARY": lambda before, after: bool(before and _word(before)) != bool(after and _word(after)),
    "AT_NON_BOUNDARY": lambda before, after: bool(before and _word(before)) == bool(after and _word(after)),
}


class Automaton:
    """One expression; `search` as often as one likes."""

    def __init__(self, expression: str) -> None:
        self._steps: list[tuple[str, Any, tuple[int, ...]]] = [("end", None, ())]
        tree = _parser.parse(expression, re.ASCII)
        self._start = self._sequence(tree, 0, tree.state.flags)
        self._asserts = any(kind == "assert" for kind, _, _ in self._steps)
        self._seen: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def search(self, text: str) -> bool:
        """Tell whether the expression matches anywhere."""
        states: frozenset[int] = frozenset()
        before = ""
        for after in text:
            states = self._closed(states | {self._start}, before, after)
            if 0 in states:
                return True
            states = self._moved(states, after)
            before = after
        return 0 in self._closed(states | {self._start}, before, "")

    def _moved(self, states: frozenset[int], char: str) -> frozenset[int]:
        key = (states, char)
        found = self._seen.get(key)
        if found is None:
            steps = self._steps
            found = frozenset(
                steps[state][2][0] for state in states if steps[state][0] == "char" and steps[state][1](char)
            )
            if len(self._seen) >= MAX_SETS:
                self._seen.clear()
            self._seen[key] = found
        return found

    def _closed(self, states: frozenset[int], before: str, after: str) -> frozenset[int]:
        key = (states, "" if not self._asserts else f"{before}\0{after}\0")
        found = self._seen.get(key)
        if found is not None:
            return found
        result: set[int] = set()
        queue = list(states)
        while queue:
            state = queue.pop()
            if state in result:
                continue
            result.add(state)
            kind, test, following = self._steps[state]
            if kind == "split" or (kind == "assert" and test(before, after)):
                queue.extend(following)
        found = frozenset(result)
        if len(self._seen) >= MAX_SETS:
            self._seen.clear()
        self._seen[key] = found
        return found

    # -- building, from the end to the beginning

    def _add(self, kind: str, test: Any, *following: int) -> int:
        if len(self._steps) >= MAX_STATES:
            raise TooLargeError
        self._steps.append((kind, test, following))
        return len(self._steps) - 1

    def _sequence(self, tree: Any, following: int, flags: int) -> int:
        for operator, argument in reversed(list(tree)):
            following = self._one(operator, argument, following, flags)
        return following

    def _one(self, operator: Any, argument: Any, following: int, flags: int) -> int:
        match str(operator):
            case "MAX_REPEAT" | "MIN_REPEAT":
                low, high, inner = argument
                return self._repeat(low, high, inner, following, flags)
            case "SUBPATTERN":
                _, added, dropped, inner = argument
                return self._sequence(inner, following, (flags | added) & ~dropped)
            case "BRANCH":
                return self._add("split", None, *(self._sequence(each, following, flags) for each in argument[1]))
            case "AT":
                return self._add("assert", _assertion(str(argument), flags), following)
            case _:
                return self._add("char", _test(operator, argument, flags), following)

    def _repeat(self, low: int, high: Any, inner: Any, following: int, flags: int) -> int:
        if high is _constants.MAXREPEAT:
            loop = self._add("split", None)
            self._steps[loop] = ("split", None, (self._sequence(inner, loop, flags), following))
            start = loop
        else:
            start = following
            for _ in range(high - low):
                start = self._add("split", None, self._sequence(inner, start, flags), following)
        for _ in range(low):
            start = self._sequence(inner, start, flags)
        return start


def _assertion(name: str, flags: int) -> Assertion:
    if name == "AT_BEGINNING":
        if flags & re.MULTILINE:
            return lambda before, _: before in {"", "\n"}
        name = "AT_BEGINNING_STRING"
    if name == "AT_END":  # the translation writes the end of the text as \Z
        return lambda _, after: after in {"", "\n"}
    return _ASSERTIONS[name]


def _test(operator: Any, argument: Any, flags: int) -> Test:
    name = str(operator)
    if name == "ANY":
        return (lambda char: True) if flags & re.DOTALL else (lambda char: char != "\n")
    if name in {"LITERAL", "NOT_LITERAL"}:
        argument = [(_constants.LITERAL, argument)]
    negated = name == "NOT_LITERAL"
    parts: list[Test] = []
    for kind, value in argument:
        match str(kind):
            case "NEGATE":
                negated = True
            case "LITERAL":
                parts.append(lambda char, value=value: ord(char) == value)  # type: ignore[misc]
            case "RANGE":
                parts.append(lambda char, value=value: value[0] <= ord(char) <= value[1])  # type: ignore[misc]
            case _:
                parts.append(_category(str(value)))
    folded = bool(flags & re.IGNORECASE)

    def test(char: str) -> bool:
        forms = {char, char.lower(), char.upper()} if folded else {char}
        return any(part(form) for part in parts for form in forms if len(form) == 1) != negated

    return test


def _category(name: str) -> Test:
    plain = _CATEGORIES[name.replace("_NOT_", "_")]
    return (lambda char: not plain(char)) if "_NOT_" in name else plain
