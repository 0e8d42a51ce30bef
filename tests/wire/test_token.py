"""Tokens and credentials files: the published example, Go's rules, and every mistake a person makes."""

from __future__ import annotations

import base64
import json
import uuid

import pytest

from connector.wire.token import (
    MAX_DEPTH,
    MAX_TEXT,
    MESSAGE,
    NIL,
    Token,
    TokenError,
    decode_credentials,
    decode_token,
    encode_token,
)

TEXT = (
    "eyJhIjoiMDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWYiLCJzIjoiQUFFQ0F3UUZCZ2NJQ1FvTERBME9EeEFSRWhNVUZSWVhHQmthR3h3ZEho"
    "OD0iLCJ0IjoiZjFlMmQzYzQtYjVhNi00OTc4LThhOWItMGMxZDJlM2Y0YTViIn0="
)
TUNNEL = uuid.UUID("f1e2d3c4-b5a6-4978-8a9b-0c1d2e3f4a5b")
EXAMPLE = Token("0123456789abcdef0123456789abcdef", bytes(range(32)), TUNNEL)


def b64(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.b64encode(data).decode()


def test_published_example_both_ways() -> None:
    assert decode_token(TEXT) == EXAMPLE
    assert encode_token(EXAMPLE) == TEXT


def test_endpoint_survives() -> None:
    token = Token("acc", b"s", TUNNEL, "fed")
    assert decode_token(encode_token(token)) == token


def test_repr_hides_the_secret() -> None:
    token = Token("acc", b"very secret", TUNNEL)
    assert "very secret" not in repr(token)
    assert "11 bytes" in repr(token)


def test_equality_and_hash() -> None:
    assert hash(decode_token(TEXT)) == hash(EXAMPLE)
    assert Token(EXAMPLE.account_tag, b"", TUNNEL) != EXAMPLE
    assert EXAMPLE != "token"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("e30=", Token("", b"", NIL), id="empty-object"),
        pytest.param(b64(None), Token("", b"", NIL), id="null"),
        pytest.param(b64({"A": "x", "T": str(TUNNEL)}), Token("x", b"", TUNNEL), id="upper-case-keys"),
        pytest.param(b64(b'{"a":"1","A":"2"}'), Token("2", b"", NIL), id="last-wins"),
        pytest.param(b64({"a": "x", "z": [1, {"y": 2}]}), Token("x", b"", NIL), id="unknown-key"),
        pytest.param(b64({"a": None, "s": None, "t": None}), Token("", b"", NIL), id="nulls"),
        pytest.param(TEXT[:70] + "\r\n" + TEXT[70:] + "\n", EXAMPLE, id="line-breaks"),
        pytest.param(b64({"t": TUNNEL.hex}), Token("", b"", TUNNEL), id="uuid-32"),
        pytest.param(b64({"t": f"urn:uuid:{TUNNEL}"}), Token("", b"", TUNNEL), id="uuid-urn"),
        pytest.param(b64({"t": f"{{{TUNNEL}}}"}), Token("", b"", TUNNEL), id="uuid-braces"),
        pytest.param(b64({"s": "AAEC\r\nAw=="}), Token("", b"\0\1\2\3", NIL), id="line-break-in-secret"),
        pytest.param(b64(b'{"a":"\xff"}'), Token("\ufffd", b"", NIL), id="not-utf8-becomes-replacement"),
        pytest.param(b64(b'{"a":"\\ud800"}'), Token("\ufffd", b"", NIL), id="lone-surrogate"),
        pytest.param(b64(b'{"x":' + b"9" * 20_000 + b"}"), Token("", b"", NIL), id="huge-number-ignored"),
    ],
)
def test_accepted(text: str, expected: Token) -> None:
    assert decode_token(text) == expected


BAD = [
    pytest.param("", "empty", id="empty"),
    pytest.param(f'"{TEXT}"', "quotation marks", id="double-quotes"),
    pytest.param(f"'{TEXT}'", "quotation marks", id="single-quotes"),
    pytest.param(f"\u201c{TEXT}\u201d", "quotation marks", id="typographic-quotes"),
    pytest.param('{"a":"x"}', "JSON inside a token", id="json"),
    pytest.param('{"AccountTag":"x","TunnelSecret":"AA=="}', "credentials file", id="credentials"),
    pytest.param(f"cloudflared service install {TEXT}", "leave out the command", id="command"),
    pytest.param(f"sudo cloudflared.exe service install {TEXT}", "leave out the command", id="sudo-command"),
    pytest.param(f" {TEXT}", "spaces around", id="space-before"),
    pytest.param(f"{TEXT}\t", "spaces around", id="tab-behind"),
    pytest.param("some words", "spaces in it", id="words"),
    pytest.param(f"TUNNEL_TOKEN={TEXT}", "after the equals sign", id="assignment"),
    pytest.param(f"--token={TEXT}", "after the equals sign", id="flag"),
    pytest.param("eyJ-_w==", "alphabet", id="url-safe"),
    pytest.param(str(TUNNEL), "tunnel ID", id="tunnel-id"),
    pytest.param(TEXT[:-9], "its end is missing", id="cut"),
    pytest.param(TEXT[:-8], "its end is missing", id="cut-at-a-group"),
    pytest.param(TEXT[1:], "start with eyJ", id="beginning-cut"),
    pytest.param("my token?", "spaces", id="other"),
    pytest.param("eyJ$", "characters that no token has", id="foreign"),
    pytest.param("t\u00f6ken", "characters", id="not-ascii"),
    pytest.param(b64(b"\xff\xfe"), "not JSON", id="binary"),
    pytest.param(b64([1]), "not an object", id="list"),
    pytest.param(b64("x"), "not an object", id="string"),
    pytest.param(b64(7), "not an object", id="number"),
    pytest.param(b64({"a": 1}), '"a" is not a string', id="account-number"),
    pytest.param(b64({"a": {"b": 1}}), '"a" is not a string', id="account-object"),
    pytest.param(b64({"s": "?"}), "secret", id="secret-alphabet"),
    pytest.param(b64({"s": "AAE"}), "secret", id="secret-padding"),
    pytest.param(b64({"s": [0]}), '"s" is not a string', id="secret-list"),
    pytest.param(b64({"t": "x"}), "not a UUID", id="uuid"),
    pytest.param(b64({"t": ""}), "not a UUID", id="uuid-empty"),
    pytest.param(b64({"t": "1_" + "0" * 30}), "not a UUID", id="uuid-underscore"),
    pytest.param(b64(b'{"a":NaN}'), "not JSON", id="nan"),
    pytest.param(b64(b"[" * (MAX_DEPTH + 1)), "nested", id="deep-list"),
    pytest.param(b64(b'{"a":' * 5_000), "nested", id="very-deep"),
    pytest.param("A" * (MAX_TEXT + 1), "characters", id="too-long"),
    pytest.param(TEXT + "=", "", id="excess-padding"),
    pytest.param(TEXT + TEXT, "", id="twice"),
    pytest.param("\ud800", "characters", id="surrogate"),
]


@pytest.mark.parametrize(("text", "advice"), BAD)
def test_refused_with_advice(text: str, advice: str) -> None:
    with pytest.raises(TokenError) as caught:
        decode_token(text)
    assert str(caught.value) == MESSAGE
    assert advice in caught.value.advice


@pytest.mark.parametrize(("text", "advice"), BAD)
def test_errors_never_quote_the_text(text: str, advice: str) -> None:
    with pytest.raises(TokenError) as caught:
        decode_token(text)
    shown = f"{caught.value!r} {caught.value.advice}"
    assert text[:12] not in shown or len(text) < 12
    assert caught.value.__cause__ is None


def test_credentials_file() -> None:
    fields = {
        "AccountTag": EXAMPLE.account_tag,
        "TunnelSecret": b64(EXAMPLE.secret),
        "TunnelID": str(TUNNEL),
        "Endpoint": "",
    }
    assert decode_credentials(json.dumps(fields)) == EXAMPLE
    assert decode_credentials(json.dumps({k.upper(): v for k, v in fields.items()})) == EXAMPLE
    del fields["TunnelID"]  # old files have none
    assert decode_credentials(json.dumps(fields)).tunnel_id == NIL


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("", "not JSON"),
        (TEXT, "--token"),
        ("[]", "not an object"),
        ('{"TunnelSecret":"!"}', "TunnelSecret"),
        ('{"TunnelID":"!"}', "TunnelID"),
        ('{"AccountTag":{}}', "AccountTag"),
        ("\ud800", "UTF-8"),
        ("{" * 100, "nested"),
        (" " * (MAX_TEXT + 1), "characters"),
    ],
)
def test_credentials_refused(text: str, advice: str) -> None:
    with pytest.raises(TokenError, match="credentials are not valid") as caught:
        decode_credentials(text)
    assert advice in caught.value.advice


@pytest.mark.parametrize("count", range(2, len(TEXT) - 4))
def test_every_cut_is_told(count: int) -> None:
    with pytest.raises(TokenError) as caught:
        decode_token(TEXT[:-count])
    assert "its end is missing" in caught.value.advice
