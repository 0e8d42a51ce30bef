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


ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", "\\d", "\\b", "^", "$", "x", "/", "(?i:A)", "\\W"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{2,}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=8,
)


@given(EXPRESSIONS, st.text(alphabet="abxAB1/\n ", max_size=12))
def test_both_engines_find_the_same(expression: str, text: str) -> None:
    found = compile_path(expression, engine="re2").found_in(text)
    try:
        other = compile_path(expression, engine="fallback")
    except PatternError:
        return
    assert other.found_in(text) is found


@pytest.mark.parametrize("engine", ["re2", "fallback"])
@pytest.mark.parametrize("expression", ["(a+)+$", "(a|aa)+$", "(.*)*x$", "a*a*a*a*a*a*b", "^(a?){50}a{50}$"])
def test_no_expression_stalls(engine: str, expression: str) -> None:
    """Each of these takes a backtracking engine years."""
    assert not compile_path(expression, engine=engine).found_in("a" * 2_000 + "!")


def test_an_expression_that_is_too_large_is_refused() -> None:
    with pytest.raises(PatternError, match="too large"):
        compile_path("(?:abcdefghij){1000}", engine="fallback")
