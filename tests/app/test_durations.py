from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.app.durations import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("1m30s", 90), ("1.5h", 5400), ("0", 0), ("500ms", 0.5), ("-2s", -2), ("+1m", 60), (".5s", 0.5)],
)
def test_gos_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "s", "1 s", "1d", "--1s", "1s ", "1sx", "nan", "1e3s", "-"])
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (2, "2s"), (64, "1m4s"), (180, "3m0s"), (3600, "1h0m0s"), (0.25, "250ms"), (1.5, "1.5s"), (10, "10s")],
)
def test_durations_are_printed_as_go_does(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(0, 10**7))
def test_what_is_printed_is_read_again(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000)
