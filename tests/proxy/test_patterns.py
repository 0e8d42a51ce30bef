"""Path expressions: RE2's syntax, with the library and without it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.proxy.patterns import PatternError, compile_path

MATCHING = [
    (r"^/api", "/api/x", True),
    (r"\.(jpg|png)$", "/x.png", True),
    (r"x$", "x\n", False),
    (r"(?m)x$", "x\ny", True),
    (r"(?i)ABC", "xabcx", True),
    (r"(?i:A)b", "ab", True),
    (r"(?i:A)b", "aB", False),
    (r"\z", "", True),
    (r"a\z", "a\n", False),
    (r"\Qa.b\E+", "a.bbb", True),
    (r"\Qa.b", "axb", False),
    (r"[[:alpha:]]+\d", "/abc1", True),
    (r"^[[:digit:]x-]+$", "1-x", True),
    (r"[^[:space:]]", " ", False),
    (r"[]a]", "]", True),
    (r"[a[b]", "[", True),
    (r"[a&&b]", "&", True),
    (r"\x{41}\x42", "AB", True),
    (r"\101", "A", True),
    (r"(?P<n>a)(?<m>b)", "ab", True),
    (r"a{2,3}", "aa", True),
    (r"a{,3}", "a{,3}", True),
    (r"a{x", "a{x", True),
    (r"\d", "٣", False),
    (r"a*?b", "aab", True),
    (r"\/path\-x", "/path-x", True),
    (r"", "anything", True),
]


@pytest.mark.parametrize("engine", ["re2", "fallback"])
@pytest.mark.parametrize(("expression", "text", "found"), MATCHING)
def test_search(engine: str, expression: str, text: str, found: bool) -> None:
    assert compile_path(expression, engine=engine).found_in(text) is found


@pytest.mark.parametrize(
    "expression",
    [
        "(", ")", "[a", "a**", "a*+", "a++", "a?+", "*a", "(?=a)", "(?!a)", "(?<=a)", "(?<!a)", "(?P=n)", r"(a)\1",
        "(?>a)", "(?(1)a|b)", "(?#c)", r"\Z", r"\u0041", r"\C", "a{1001}", "a{3,2}", "\\",
        r"\x{110000}", r"\xg0", "[[:nope:]]", r"[\p{Foo}]", "[b-a]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("engine", ["re2", "fallback"])
def test_refused(engine: str, expression: str) -> None:
    with pytest.raises(PatternError, match="error parsing regexp"):
        compile_path(expression, engine=engine)


@given(st.text(alphabet=r"ab()[]{}*+?|\^$.,-:<>=!PQEzxdi01", max_size=12))
def test_any_expression_compiles_or_is_refused(expression: str) -> None:
    try:
        pattern = compile_path(expression)
    except PatternError:
        return
    pattern.found_in("/abc")
