"""The command line in Go's flag syntax: levels of flags, then words; values from flags, then environment, then default.

Owns: parsing, value checks and precedence. In: argv and environ. Out: Level per level, Flags over all of them.
Never: acts on a value; puts a secret's value in an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from connector.app.durations import format_duration, parse_duration
from connector.app.flag_table import FLAGS, Flag
from connector.errors import UsageError

_TRUE = {"1", "t", "T", "true", "TRUE", "True"}
_FALSE = {"0", "f", "F", "false", "FALSE", "False"}
_BARE = {"true": True, "on": True, "false": False, "off": False}
"""What a duration that has a usual value may be as well."""
_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "uint": "a whole number, 0 or more",
    "duration": "a time with unit such as 30s, 1m30s or 500ms",
}
ANY_ADDRESS = "127.0.0.1:0"
"""Value of a flag of kind "optional" that stands alone."""
_ADDRESS = re.compile(r"[^-/ ][^/ ]*:\d+|:\d+")
_TIME = re.compile(r"[-+]?\.?[0-9]")
_TOKEN_LIKE = re.compile(r"eyJ[A-Za-z0-9+/=_-]{20,}")

Value = bool | int | float | str | list[str]


def looks_like_token(text: str) -> bool:
    """Tell whether `text` may hold a token (base64 of a JSON object), so that it must not be shown."""
    return _TOKEN_LIKE.search(text) is not None


class Level:
    """The flags given at one level: canonical name -> texts in order; `rest` is what follows them."""

    __slots__ = ("given", "help", "rest", "version")

    def __init__(self) -> None:
        self.given: dict[str, list[str]] = {}
        self.rest: list[str] = []
        self.help = False
        self.version = False


def parse_level(
    argv: Sequence[str], *, version_flag: bool = False, own: Sequence[Flag] = (), tunnel_flags: bool = True
) -> Level:
    """Read flags until the first word that is none, or past `--`. UsageError names the flag and what would be right.

    `own` are a command's own flags, which win over flags of `tunnel` with the same name.
    """
    level = Level()
    known = {**FLAGS, **{flag.name: flag for flag in own}} if tunnel_flags else {flag.name: flag for flag in own}
    aliases = {flag.alias: flag.name for flag in known.values() if flag.alias}
    spelled: dict[str, str] = {}
    at = 0
    while at < len(argv):
        word = argv[at]
        if len(word) < 2 or word[0] != "-":
            break
        at += 1
        if word == "--":
            break
        name, separator, text = word[2 if word.startswith("--") else 1 :].partition("=")
        if not name or name[0] in "-=":
            raise UsageError(
                f"Incorrect Usage: bad flag syntax: {_show(word)}", advice="Write --name value or --name=value."
            )
        if name in {"h", "help"}:
            level.help = True
            continue
        if version_flag and name in {"v", "V", "version"}:
            level.version = True
            continue
        flag = _find(name, known, aliases)
        if spelled.setdefault(flag.name, name) != name:
            raise UsageError(
                f"Incorrect Usage: Cannot use two forms of the same flag: {spelled[flag.name]} {name}",
                advice=f"Give --{flag.name} only.",
            )
        if not separator:
            if flag.kind == "bool":
                text = "true"
            elif flag.kind == "optional":
                text = ANY_ADDRESS
                if at < len(argv) and _ADDRESS.fullmatch(argv[at]):
                    text = argv[at]
                    at += 1
            elif flag.bare and not (at < len(argv) and _TIME.match(argv[at])):
                text = flag.bare
            elif at < len(argv):
                text = argv[at]
                at += 1
            else:
                raise UsageError(f"Incorrect Usage: flag needs an argument: -{name}", advice=f"{_wants(flag)}.")
        convert(flag, text, name)
        texts = level.given.setdefault(flag.name, [])
        if flag.kind != "list":
            texts.clear()
        texts.append(text)
    level.rest = list(argv[at:])
    return level


def _show(text: str) -> str:
    return "(hidden: looks like a token)" if looks_like_token(text) else text


def _find(name: str, known: Mapping[str, Flag], aliases: Mapping[str, str]) -> Flag:
    flag = known.get(aliases.get(name, name))
    if flag is not None:
        return flag
    from difflib import get_close_matches  # noqa: PLC0415  (slow to import, needed for typing errors only)

    close = get_close_matches(name, [*known, *(alias for alias in aliases if len(alias) > 1), "help", "version"], n=1)
    advice = f"Did you mean --{close[0]}?" if close else ""
    raise UsageError(f"Incorrect Usage: flag provided but not defined: -{_show(name)}", advice=advice)


def _wants(flag: Flag) -> str:
    if flag.choices:
        return "Allowed: " + ", ".join(flag.choices)
    return f"Allowed: {_KINDS.get(flag.kind, flag.metavar or 'a text')}"


def convert(flag: Flag, text: str, name: str, *, variable: str = "") -> Value:
    """Give `text` as the flag's type; UsageError as cloudflared words it, with what is allowed.

    `name` is the flag as it was spelled; `variable` where the text comes from instead.
    """
    try:
        match flag.kind:
            case "bool":
                if text not in _TRUE | _FALSE:
                    raise ValueError
                return text in _TRUE
            case "int" | "uint":
                return _whole_number(text, signed=flag.kind == "int")
            case "duration":
                if flag.bare and text.lower() in _BARE:
                    text = flag.bare if _BARE[text.lower()] else "0"
                return parse_duration(text)
            case "list":
                return [text]
    except OverflowError:
        raise _wrong(flag, text, name, variable, "value out of range") from None
    except ValueError:
        raise _wrong(flag, text, name, variable, "parse error") from None
    if flag.choices:
        lower = {"warning": "warn", "err": "error"}.get(text.lower(), text.lower())
        if lower not in flag.choices and text:
            if flag.lenient:
                return flag.default
            raise _wrong(flag, text, name, variable, "not one of its values")
        return lower or flag.default
    return text


_DIGITS = re.compile(r"[+-]?[0-9]+")
_BOUNDS = {True: (-(2**63), 2**63 - 1), False: (0, 2**64 - 1)}


def _whole_number(text: str, *, signed: bool) -> int:
    """Read decimal digits of at most 64 bits: OverflowError beyond, ValueError for anything else."""
    if not _DIGITS.fullmatch(text) or (not signed and text[0] in "+-"):
        raise ValueError(text)
    if len(text) > 40:  # more digits than any such number has; int() refuses thousands
        raise OverflowError(text)
    number = int(text)
    low, high = _BOUNDS[signed]
    if not low <= number <= high:
        raise OverflowError(text)
    return number


_GO_KINDS = {"uint": "uint64", "list": "string slice"}


def _wrong(flag: Flag, text: str, name: str, variable: str, cause: str) -> UsageError:
    shown = "(hidden)" if flag.secret else f'"{_show(text)}"'
    if variable:
        kind = _GO_KINDS.get(flag.kind, flag.kind)
        what = f"could not parse {shown} as {kind} value for flag {flag.name} from the environment variable {variable}"
    else:
        boolean = flag.kind == "bool"  # Go words it differently
        what = f"invalid {'boolean value' if boolean else 'value'} {shown} for {'' if boolean else 'flag '}-{name}"
    return UsageError(f"Incorrect Usage: {what}: {cause}", advice=f"{_wants(flag)}.")


def _as_text(flag: Flag, value: Value) -> str:
    if isinstance(value, list):
        return f"[{' '.join(value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return format_duration(float(value)) if flag.kind == "duration" and not isinstance(value, str) else str(value)


def _shown(flag: Flag, texts: list[str]) -> str:
    """Give what stood on the command line as cloudflared prints it."""
    if flag.kind == "list":
        return _as_text(flag, texts)
    return _as_text(flag, convert(flag, texts[-1], flag.name)) if flag.kind in {"bool", "duration"} else texts[-1]


class Flags:
    """The values in force: the most specific level first, then environment, file, default. Never prints secrets."""

    __slots__ = ("_environ", "_file", "_known", "_levels", "_path")

    def __init__(self, levels: Sequence[Level], environ: Mapping[str, str], *, own: Sequence[Flag] = ()) -> None:
        self._levels = list(levels)
        self._environ = environ
        self._known = {**FLAGS, **{flag.name: flag for flag in own}} if own else FLAGS
        self._file: Mapping[str, Value] = {}
        self._path = ""

    def with_file(self, values: Mapping[str, Value], path: str) -> Flags:
        """Give these flags with a file's values, which count where neither command line nor environment sets a flag."""
        flags = Flags(self._levels, self._environ)
        flags._known = self._known
        flags._file = dict(values)
        flags._path = path
        return flags

    @property
    def environ(self) -> Mapping[str, str]:
        """The environment, for what is no flag's."""
        return self._environ

    def source(self, name: str) -> str:
        """Name where the value comes from: `--token`, `TUNNEL_TOKEN`, a file's key, or nothing for the default."""
        if any(name in level.given for level in self._levels):
            return f"--{name}"
        return self._variable(self._known[name]) or (f"the key {name} of {self._path}" if name in self._file else "")

    def _variable(self, flag: Flag) -> str:
        for variable in flag.env:
            text = self._environ.get(variable)
            if text is not None and (text != "" or flag.kind == "string"):
                return variable
        return ""

    def is_set(self, name: str) -> bool:
        """Tell whether somebody gave the flag (an empty variable counts for strings)."""
        return self.source(name) != ""

    def value(self, name: str) -> Value:
        """Give the typed value of any flag; UsageError when its variable holds nonsense."""
        flag = self._known[name]
        for level in reversed(self._levels):
            texts = level.given.get(name)
            if texts is not None:
                return list(texts) if flag.kind == "list" else convert(flag, texts[-1], name)
        variable = self._variable(flag)
        if variable:
            text = self._environ[variable]
            if flag.kind == "list":
                return [part.strip() for part in text.split(",") if part.strip()]
            return convert(flag, text, name, variable=variable)
        if name in self._file:
            return self._file[name]
        if flag.kind == "list":
            return []
        return convert(
            flag, flag.default or {"bool": "false", "int": "0", "uint": "0", "duration": "0"}.get(flag.kind, ""), name
        )

    def text(self, name: str) -> str:
        """Give a string flag."""
        value = self.value(name)
        assert isinstance(value, str)
        return value

    def number(self, name: str) -> float:
        """Give an int or duration (seconds) flag."""
        value = self.value(name)
        assert isinstance(value, (int, float))
        return value

    def texts(self, name: str) -> list[str]:
        """Give a list flag."""
        value = self.value(name)
        assert isinstance(value, list)
        return value

    def given(self, effect: str) -> list[str]:
        """Name the flags of this effect that are set, sorted."""
        return sorted(name for name, flag in self._known.items() if flag.effect == effect and self.is_set(name))

    def check(self) -> None:
        """Convert every variable once, so that nonsense in the environment is an error even where nothing reads it."""
        for name in self._known:
            self.value(name)

    def unknown(self) -> list[tuple[str, str, str]]:
        """Name the lenient flags whose text is none of their choices: flag, text, and what is taken instead."""
        found = []
        for name, flag in self._known.items():
            if flag.lenient and (text := self._raw(name)) and self.value(name) == flag.default != text.lower():
                found.append((name, _show(text), flag.default))
        return found

    def _raw(self, name: str) -> str:
        for level in reversed(self._levels):
            if name in level.given:
                return level.given[name][-1]
        variable = self._variable(self._known[name])
        return self._environ[variable] if variable else ""

    def settings(self) -> dict[str, str]:
        """Give the flags set on the command line or in the file as text, secrets masked: for the `Settings` line."""
        shown: dict[str, str] = {}
        for name, value in self._file.items():
            if not self._variable(self._known[name]):
                shown[name] = "*****" if self._known[name].secret else _as_text(self._known[name], value)
        for level in self._levels:
            for name, texts in level.given.items():
                shown[name] = "*****" if self._known[name].secret else _shown(self._known[name], texts)
        for name in list(shown):
            if alias := self._known[name].alias:
                shown[alias] = shown[name]  # as cloudflared prints them
        return dict(sorted(shown.items()))
