"""What must not leave does not leave."""

from __future__ import annotations

import pytest

from connector.inspector.redact import redact_bytes, redact_headers, redact_target

SECRETS = [
    b'{"password": "SECRETVALUE"}', b"{'api_key':'SECRETVALUE'}", b'{"a":{"accessToken":"SECRETVALUE"}}',
    b"user=a&password=SECRETVALUE&b=1", b"Authorization: Bearer SECRETVALUE",
    b"x eyJhbGciOiJIUzI1NiIsSECRETVALUE.e30.abc y",
    b'"{\\"token\\": \\"SECRETVALUE\\"}"', b"client_secret=SECRETVALUE", b"refresh_token=SECRETVALUE",
    b"-----BEGIN PRIVATE KEY-----\nSECRETVALUE\n-----END PRIVATE KEY-----", b"Basic SECRETVALUE",
    b'{"x-session-id":"SECRETVALUE"}',
]  # fmt: skip


@pytest.mark.parametrize("data", SECRETS)
def test_bodies(data: bytes) -> None:
    masked = redact_bytes(data)
    assert b"SECRETVALUE" not in masked
    assert len(masked) == len(data)


@pytest.mark.parametrize("data", [b'{"name": "value"}', b"tokens are fine", b"keyboard=qwerty", b"a" * 10_000, b""])
def test_what_is_no_secret_stays(data: bytes) -> None:
    assert redact_bytes(data) == data


def test_headers_and_targets() -> None:
    headers = [
        (b"Authorization", b"Bearer x"), (b"cookie", b"a=b"), (b"CF-Access-Client-Secret", b"s"), (b"x-my-token", b"t"),
        (b"accept", b"*/*"), (b"Location", b"https://u:p@h/?code=1&x=2"),
    ]  # fmt: skip
    masked = dict(redact_headers(headers))
    assert masked[b"accept"] == b"*/*"
    assert masked[b"Location"] == b"https://u:[redacted]@h/?code=[redacted]&x=2"
    assert {masked[name] for name in (b"Authorization", b"cookie", b"CF-Access-Client-Secret", b"x-my-token")} == {
        b"[redacted]"
    }
    assert redact_target(b"/p?Access%5FToken=abc&q=1") == b"/p?Access%5FToken=[redacted]&q=1"
    assert redact_target(b"/p?q=1") == b"/p?q=1"


def test_no_pattern_takes_long() -> None:
    for hostile in (
        b'"password":"' + b"\\" * 50_000,
        b"a" * 60_000 + b"=",
        b"eyJ" * 20_000,
        b"_token" * 10_000,
        b"&" * 60_000,
    ):
        redact_bytes(hostile)  # the suite's time limit is the assertion
