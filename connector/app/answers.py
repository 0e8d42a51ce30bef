"""Answers of the connector's own pages: the metrics address and, through the tunnel, management.

Owns: Answer and Routes. In: method, path, query. Out: an Answer. Never: sockets, streams.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qs

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"


class Answer(NamedTuple):
    """One response. `body` is sent as it is."""

    status: int
    body: bytes = b""
    content_type: str = TEXT
    headers: tuple[tuple[str, str], ...] = ()


NOT_FOUND = Answer(404, b"404 page not found\n")
NOT_ALLOWED = Answer(405)


def text_answer(text: str, status: int = 200) -> Answer:
    """Give plain text."""
    return Answer(status, text.encode("utf-8", "backslashreplace"))


def json_answer(value: Any, status: int = 200, *, content_type: str = JSON) -> Answer:
    """Give a value as JSON, with a line's end as Go writes it."""
    return Answer(status, json.dumps(value, separators=(",", ":"), default=str).encode() + b"\n", content_type)


Query = Mapping[str, list[str]]
Page = Callable[[Query], Answer | Awaitable[Answer]]
"""Makes a page; one that takes long is a coroutine."""

Routes = dict[str, Page]


def split_target(target: str) -> tuple[str, Query]:
    """Give path and query of a request target; fields that are not form-encoded are left out."""
    path, _, query = target.partition("?")
    try:
        return path, parse_qs(query, keep_blank_values=True, max_num_fields=64)
    except ValueError:  # too many fields
        return path, {}


def first(query: Query, name: str, default: str = "") -> str:
    """Give the first value of a query field."""
    return query.get(name, [default])[0]
