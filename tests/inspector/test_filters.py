"""The filter language."""

from __future__ import annotations

import random

import pytest

from connector.errors import UsageError
from connector.inspector.filters import parse_filter

ROW = {"url": "https://api.example.com/v1/x?q=1", "host": "api.example.com", "status": 502, "ms": 12.5, "kind": "http",
       "method": "POST", "mqtt": None, "target": "/v1/x?q=1", "rule": 0, "up": 10}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True), ("api", True), ("API v1", True), ("other", False), ("status>=500", True), ("status<500", False),
        ("status=502 method=post", True), ("method!=GET", True), ("host:example or status=200", True),
        ("not status=502", False), ("not (status=200 or kind=tcp)", True), ('path:"v1/x"', True), ("mqtt:x", False),
        ("host~^api", True), ("host~^x|com$", True), ("ms>12 ms<13", True), ("rule=0", True),
        ("status=502 and up=10", True),
    ],
)  # fmt: skip
def test_what_passes(text: str, expected: bool) -> None:
    assert parse_filter(text)(ROW) is expected


@pytest.mark.parametrize(
    "text", ["colour=red", "status>x", "(a", "a)", "not", "or", "a or", '"open', "host~(", 'host~"(a+)+$"', "a" * 2_000]
)
def test_what_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_filter(text)


def test_garbage_is_a_usage_error_or_a_filter() -> None:
    rng = random.Random(1)
    alphabet = ["(", ")", "not", "or", "and", "status", ">", "=", "~", "x", '"', " ", "host:", "5"]
    for _ in range(3_000):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(12)))
        try:
            parse_filter(text)(ROW)
        except UsageError:
            pass
