"""Path expressions: RE2, as cloudflared reads them.

Owns: PathPattern, the choice of engine, Go's words for what is wrong. In: an expression. Out: a pattern; PatternError.
Never: reads a configuration or a request.

*Strategy*: the package google-re2 is the library that Go's regexp copies: same syntax, and time linear in the path, so
that no expression stalls the loop. Where it has no wheel, `patterns_fallback` runs most of the same syntax on an
automaton of its own, slower but as linear.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

__all__ = ["PathPattern", "PatternError", "compile_path"]

_SURROGATES = re.compile("[\ud800-\udfff]")

_WORDS: Final = (
    ("no argument for repetition operator", "missing argument to repetition operator"),
    ("bad repetition operator", "invalid nested repetition operator"),
    ("invalid perl operator", "invalid or unsupported Perl syntax"),
    ("invalid repetition size", "invalid repeat count"),
    ("missing )", "missing closing )"),
    ("missing ]", "missing closing ]"),
    ("trailing \\", "trailing backslash at end of expression"),
    ("invalid named capture group", "invalid named capture"),
)
"""What RE2 says, and what Go says for the same."""

_DEPTH: Final = 998
"""Groups within groups; Go's parser stops at a height of 1,000."""

_REFUSED = re.compile(
    r"\\(?P<byte>C)|\\.|\(\?P?<(?P<name>\w+)>|(?P<repeat>\{(?:[0-9]{9,}(?:,[0-9]*)?|[0-9]+,[0-9]{9,})\})", re.DOTALL
)
_CLASS = re.compile(
    r"\\(?P<letter>[pP])\{(?P<not>\^?)(?P<class>[A-Za-z_ ]+)\}|(?P<other>\\Q.*?(?:\\E|\Z)|\\.)", re.DOTALL
)
_CATEGORIES: Final = {
    "other": "C", "control": "Cc", "format": "Cf", "privateuse": "Co", "surrogate": "Cs", "letter": "L",
    "lowercaseletter": "Ll", "modifierletter": "Lm", "otherletter": "Lo", "titlecaseletter": "Lt",
    "uppercaseletter": "Lu", "mark": "M", "combiningmark": "M", "spacingmark": "Mc", "enclosingmark": "Me",
    "nonspacingmark": "Mn", "number": "N", "decimalnumber": "Nd", "digit": "Nd", "letternumber": "Nl",
    "othernumber": "No", "punctuation": "P", "punct": "P", "connectorpunctuation": "Pc", "dashpunctuation": "Pd",
    "closepunctuation": "Pe", "finalpunctuation": "Pf", "initialpunctuation": "Pi", "otherpunctuation": "Po",
    "openpunctuation": "Ps", "symbol": "S", "currencysymbol": "Sc", "modifiersymbol": "Sk", "mathsymbol": "Sm",
    "othersymbol": "So", "separator": "Z", "lineseparator": "Zl", "paragraphseparator": "Zp", "spaceseparator": "Zs",
}  # fmt: skip
"""Long names of general categories (Unicode's PropertyValueAliases)."""


class PatternError(ValueError):
    """An expression that cloudflared would refuse, or that cannot be run here."""


class PathPattern:
    """One compiled expression; equal to another of the same text."""

    __slots__ = ("_search", "text")

    def __init__(self, text: str, search: Callable[[str], bool]) -> None:
        self.text = text
        self._search = search

    def found_in(self, path: str) -> bool:
        """Tell whether the expression matches anywhere in a decoded path; bytes that are no UTF-8 count as U+FFFD."""
        return self._search(path if path.isascii() else _SURROGATES.sub("\ufffd", path))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PathPattern) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"<PathPattern {self.text!r}>"


def compile_path(expression: str, *, engine: str = "") -> PathPattern:
    """Return the pattern for an unanchored search. `engine` re2 or fallback chooses. Errors: PatternError."""
    if engine != "fallback":
        try:
            import re2  # type: ignore[import-untyped]  # noqa: PLC0415  (optional; only rules with a path need it)
        except ImportError:
            if engine == "re2":
                raise
        else:
            return PathPattern(expression, _re2_search(re2, expression))
    from connector.proxy.patterns_fallback import fallback_search  # noqa: PLC0415  (only where RE2 is missing)

    return PathPattern(expression, fallback_search(expression))


def _re2_search(re2: Any, expression: str) -> Callable[[str], bool]:
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    if problem := _refused_by_go(expression):
        raise PatternError(f"error parsing regexp: {problem}")
    try:
        search = re2.compile(_CLASS.sub(_short_class, expression), options=options).search
    except re2.error as error:
        raise PatternError(_go_words(error, expression)) from None
    except UnicodeEncodeError:
        raise PatternError(f"error parsing regexp: invalid UTF-8: `{expression!r}`") from None
    return lambda path: search(path.encode()) is not None


def _refused_by_go(expression: str) -> str:
    """Return what Go says of expressions that RE2 takes; empty for all others."""
    for piece in _REFUSED.finditer(expression):
        if piece["byte"]:
            return "invalid escape sequence: `\\C`"
        if piece["name"] and not piece["name"].isascii():
            return f"invalid named capture: `{piece[0]}`"
        if piece["repeat"]:
            return f"invalid repeat count: `{piece[0]}`"
    depth = deepest = 0
    if expression.count("(") >= _DEPTH:
        for piece in re.finditer(r"\\.|[()]", expression):
            depth += {"(": 1, ")": -1}.get(piece[0], 0)
            deepest = max(deepest, depth)
    return f"expression nests too deeply: `{expression}`" if deepest >= _DEPTH else ""


def _short_class(found: re.Match[str]) -> str:
    """Return a Unicode class by the name that RE2 knows; Go takes long names and any case too."""
    if found["other"]:
        return found["other"]
    name = found["class"].replace("_", "").replace(" ", "").lower()
    short = _CATEGORIES.get(name)
    if short is None:
        short = "_".join(part.capitalize() for part in found["class"].split("_"))
        if found["class"] in {"Any", "Nko", "SignWriting"} or len(found["class"]) <= 2:
            short = found["class"]
    return f"\\{found['letter']}{{{found['not']}{short}}}"


def _go_words(error: Exception, expression: str) -> str:
    """Return Go's text for RE2's error."""
    cause = error.args[0] if error.args else ""
    text = cause.decode("utf-8", "replace") if isinstance(cause, bytes) else str(cause)
    for theirs, words in _WORDS:
        if text.startswith(theirs):
            text = words + text[len(theirs) :]
            break
    what, colon, where = text.partition(": ")
    if where.startswith("(?<"):
        what, where = "invalid named capture", expression
    elif what.startswith("trailing"):
        return f"error parsing regexp: {what}: ``"
    elif what == "invalid UTF-8" and expression.isascii():
        what = "invalid escape sequence"
    return f"error parsing regexp: {what}: `{where if colon else expression}`"
