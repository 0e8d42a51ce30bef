"""Path expressions without google-re2: its syntax, translated for Python's parser and run by an automaton.

Owns: the translation of RE2 syntax, and the refusal of what RE2 refuses or Python cannot read.
In: an expression from a configuration. Out: a search; PatternError.
Never: reads a configuration or a request.

Refused because RE2 has no such thing: look-around, back-references, conditionals, atomic groups, possessive
quantifiers, `\\Z`, `\\u`. Translated: `\\z`, `$` (RE2: only the very end), `\\Q...\\E`, `\\x{...}`, `[[:alpha:]]`,
`(?<name>`. Differences that remain, all of them refusals: `\\p{...}`, `\\C`, flag U, `(?i)` in the middle, a repeated
assertion (`^*`), two groups of one name, a class as the end of a range.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from connector.proxy.patterns import PatternError
from connector.proxy.patterns_nfa import Automaton, TooLargeError

_POSIX: Final = {
    "alnum": "0-9A-Za-z", "alpha": "A-Za-z", "ascii": r"\x00-\x7f", "blank": r"\t ", "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9", "graph": "!-~", "lower": "a-z", "print": " -~", "punct": r"!-/:-@\[-`{-~",
    "space": r"\t\n\v\f\r ", "upper": "A-Z", "word": "0-9A-Za-z_", "xdigit": "0-9A-Fa-f",
}  # fmt: skip
_MAX_REPEAT: Final = 1_000
_GROUP = re.compile(r"\(\?(?:P?<(?P<name>\w+)>|(?P<flags>[a-zA-Z]*(?:-[a-zA-Z]+)?)(?P<end>[:)]))")
_REPEAT = re.compile(r"\{(\d+)(?:,(\d*))?\}")
_ESCAPES: Final = "AbBdDsSwWafnrtv"


def fallback_search(expression: str) -> Callable[[str], bool]:
    """Return an unanchored search. Errors: PatternError."""
    translated = _Translation(expression).run()
    try:
        re.compile(translated, re.ASCII)
        return Automaton(translated).search
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"error parsing regexp: {error}: `{expression}`") from None
    except TooLargeError:
        raise PatternError(f"error parsing regexp: expression too large: `{expression}`") from None


class _Translation:
    """One walk over an expression."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.out: list[str] = []
        self.multiline = [False]
        self.after_repeat = False
        self.opening_flags = ""

    def fail(self, what: str) -> PatternError:
        return PatternError(f"error parsing regexp: {what}: `{self.text}`")

    def run(self) -> str:
        text = self.text
        while self.at < len(text):
            char = text[self.at]
            repeat = _REPEAT.match(text, self.at) if char == "{" else None
            if char in "*+?" or repeat:
                self.quantifier(char, repeat)
                continue
            self.after_repeat = False
            if char == "\\":
                self.escape(in_class=False)
            elif char == "[":
                self.character_class()
            elif char == "(":
                self.group()
            elif char == "{":
                self.emit("\\{", 1)
            elif char == "$":
                self.emit("$" if self.multiline[-1] else r"\Z", 1)
            else:
                if char == ")" and len(self.multiline) > 1:
                    self.multiline.pop()
                self.emit(char, 1)
        return self.opening_flags + "".join(self.out)

    def emit(self, piece: str, taken: int) -> None:
        self.out.append(piece)
        self.at += taken

    def quantifier(self, char: str, repeat: re.Match[str] | None) -> None:
        if self.after_repeat:
            raise self.fail("invalid nested repetition operator")
        if repeat:
            counts = [int(count) for count in repeat.groups() if count]
            if max(counts) > _MAX_REPEAT or counts != sorted(counts):
                raise self.fail("invalid repeat count")
        piece = repeat[0] if repeat else char
        self.emit(piece, len(piece))
        if self.text[self.at : self.at + 1] == "?":
            self.emit("?", 1)
        self.after_repeat = True

    def group(self) -> None:
        self.multiline.append(self.multiline[-1])
        if not self.text.startswith("(?", self.at):
            self.emit("(", 1)
            return
        found = _GROUP.match(self.text, self.at)
        if not found:
            raise self.fail(f"invalid or unsupported Perl syntax `{self.text[self.at : self.at + 4]}`")
        if found["name"]:
            self.emit(f"(?P<{found['name']}>", len(found[0]))
            return
        flags = found["flags"]
        if not flags and found["end"] == ")":
            raise self.fail("missing argument to repetition operator")
        on, _, off = flags.partition("-")
        if set(on + off) - set("ims"):
            raise self.fail(f"unsupported flags `{found[0]}`")
        if "m" in on:
            self.multiline[-1] = True
        if "m" in off:
            self.multiline[-1] = False
        if found["end"] == ":":
            self.emit(found[0] if flags else "(?:", len(found[0]))
            return
        # `(?i)` holds to the end of its group; `re` knows that only at the very start of the expression.
        inner = self.multiline.pop()
        self.multiline[-1] = inner
        if self.at == 0 and not off:
            self.opening_flags = found[0]
            self.at += len(found[0])
            return
        raise self.fail(f"flags `{found[0]}` are supported only at the start, or as `(?i:...)`")

    def escape(self, *, in_class: bool) -> None:
        text = self.text
        char = text[self.at + 1 : self.at + 2]
        if not char:
            raise self.fail("trailing backslash at end of expression")
        if char == "Q" and not in_class:
            end = text.find("\\E", self.at)
            literal = text[self.at + 2 : end if end >= 0 else len(text)]
            self.emit(re.escape(literal), len(literal) + (4 if end >= 0 else 2))
        elif char == "z" and not in_class:
            self.emit(r"\Z", 2)
        elif char == "x":
            found = re.compile(r"\\x(?:\{([0-9A-Fa-f]{1,8})\}|([0-9A-Fa-f]{2}))").match(text, self.at)
            if not found or int(found[1] or found[2], 16) > 0x10FFFF:
                raise self.fail("invalid escape sequence")
            self.emit(f"\\U{int(found[1] or found[2], 16):08x}", len(found[0]))
        elif (char.isascii() and char.isalpha()) and char not in _ESCAPES:
            raise self.fail(f"invalid or unsupported escape sequence: `\\{char}`")
        elif char.isdigit():
            found = re.compile(r"\\(0[0-7]{0,2}|[1-7][0-7]{1,2})").match(text, self.at)
            if not found or (char != "0" and len(found[1]) < 2):
                raise self.fail(f"invalid escape sequence: `\\{char}` (there are no back-references)")
            self.emit(f"\\x{int(found[1], 8) & 0xFF:02x}", len(found[0]))
        else:
            self.emit("\\" + char, 2)

    def character_class(self) -> None:
        text = self.text
        self.emit("[", 1)
        if text[self.at : self.at + 1] == "^":
            self.emit("^", 1)
        first = True
        while True:
            char = text[self.at : self.at + 1]
            if not char:
                raise self.fail("missing closing ]")
            if char == "]" and not first:
                self.emit("]", 1)
                return
            first = False
            if char == "\\":
                self.escape(in_class=True)
            elif text.startswith("[:", self.at) and (end := text.find(":]", self.at)) > 0:
                name = text[self.at + 2 : end]
                if name.removeprefix("^") not in _POSIX or name.startswith("^"):
                    raise self.fail(f"invalid or unsupported character class range: `[:{name}:]`")
                self.emit(_POSIX[name], end + 2 - self.at)
            elif char in "[&|~" or (char == "-" and text.startswith("--", self.at)):
                self.emit("\\" + char, 1)
            else:
                self.emit(char, 1)
