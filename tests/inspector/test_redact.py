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
    b'{"x-session-id":"SECRETVALUE"}', b"postgres://u:SECRETVALUE@db/x", b"<a:password x='1'> SECRETVALUE</a:password>",
    b'Content-Disposition: form-data; name="api_key"\r\nContent-Type: text/plain\r\n\r\nSECRETVALUE\r\n--x',
    b"ghp_SECRETVALUE0123456789", b"xSECRETVALUEa1B2c3D4e5F6",
]  # fmt: skip


@pytest.mark.parametrize("data", SECRETS)
def test_bodies(data: bytes) -> None:
    masked = redact_bytes(data)
    assert b"SECRETVALUE" not in masked
    assert len(masked) == len(data)


@pytest.mark.parametrize("data", [
    b'{"name": "value"}', b"tokens are fine", b"keyboard=qwerty", b"a" * 10_000, b"",
    b"https://web.example.com:8443/a/b-long-name-of-something/index.html", b"test_the_page_opens_and_shows_a_stream",
    b"f1e2d3c4-b5a6-4978-8a9b-0c1d2e3f4a5b", b"91ffb152111c0c20-DEV", b"1795537922302000000000",
    b"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/156.0.0.0 Safari/537.36",
    b"application/vnd.openxmlformats-officedocument.wordprocessingml.document", b"2026-11-24T15:51:29.304Z",
])  # fmt: skip
def test_what_is_no_secret_stays(data: bytes) -> None:
    assert redact_bytes(data) == data


def test_numbers_under_telling_names() -> None:
    assert redact_bytes(b'{"password": 12345678, "code": 4001}') == b'{"password": ********, "code": 4001}'


def test_the_end_of_what_was_cut_may_be_half_a_secret() -> None:
    assert redact_bytes(b"hello wor") == b"hello wor"
    assert redact_bytes(b"hello wor", cut=True) == b"hello ***"


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
