"""Section 7 of the edge connection: hashes, records, start protocol, the fall-back table, the address budget."""

from __future__ import annotations

import pytest

from connector.errors import ConfigError, WireError
from connector.protocol.protocol_choice import (
    ADDRESS_BUDGET,
    RECORD_RETRY_SECONDS,
    RECORD_SECONDS,
    AddressTrials,
    Effect,
    RemoteFeatures,
    Selector,
    Share,
    Transport,
    choose_by_share,
    datagram_version,
    decode_feature_record,
    decode_protocol_record,
    fnv1a_32,
    select_protocol,
    threshold,
)
from connector.protocol.reconnect import Failure

QUIC, HTTP2 = Transport.QUIC, Transport.HTTP2


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0x811C9DC5),
        (b"a", 0xE40C292C),
        (b"foobar", 0xBF9CF968),
        (b"0123456789abcdef0123456789abcdef", 0x86D04DB5),
    ],
)
def test_fnv1a(data: bytes, value: int) -> None:
    assert fnv1a_32(data) == value


def test_threshold() -> None:
    assert threshold("0123456789abcdef0123456789abcdef") == 25
    assert 0 <= threshold("\udc80 not utf-8") < 100


# -- records -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "shares"),
    [
        (b'[{"protocol":"quic","percentage":100}]', (Share("quic", 100),)),
        (b'[{"protocol":"QUIC","Percentage":-1},{"PROTOCOL":"http2","percentage":2147483647}]',
         (Share("quic", -1), Share("http2", 2147483647))),
        (b'[{"other":[1]},null]', (Share("", 0), Share("", 0))),
        (b'[{"protocol":null,"percentage":null}]', (Share("", 0),)),
        (b"[]", ()),
        (b" null ", ()),
    ],
)  # fmt: skip
def test_protocol_records(record: bytes, shares: tuple[Share, ...]) -> None:
    assert decode_protocol_record(record) == shares


@pytest.mark.parametrize(
    "record",
    [
        b"", b"[", b"{}", b'"quic"', b"1", b"[1]", b"[[]]", b'[{"protocol":1}]', b'[{"percentage":"100"}]',
        b'[{"percentage":1.0}]', b'[{"percentage":1e2}]', b'[{"percentage":true}]', b'[{"percentage":2147483648}]',
        b'[{"percentage":NaN}]', b"[] []", b"\xff", b"[" * 100_000, b'[{"percentage":' + b"9" * 5000 + b"}]",
    ],
)  # fmt: skip
def test_bad_protocol_records(record: bytes) -> None:
    with pytest.raises(WireError, match=r"TXT record protocol-v2\.argotunnel\.com cannot be used: "):
        decode_protocol_record(record)


@pytest.mark.parametrize(
    ("record", "features"),
    [
        (b"{}", RemoteFeatures(0, False)),
        (b"null", RemoteFeatures(0, False)),
        (b'{"dv3_2":30}', RemoteFeatures(30, False)),
        (b'{"DV3_2":4294967295,"skip_prechecks":true,"pq":50}', RemoteFeatures(4294967295, True)),
        (b'{"dv3_2":null,"skip_prechecks":null}', RemoteFeatures(0, False)),
        (b'{"dv3_2":1,"dv3_2":2}', RemoteFeatures(2, False)),
    ],
)
def test_feature_records(record: bytes, features: RemoteFeatures) -> None:
    assert decode_feature_record(record) == features


@pytest.mark.parametrize(
    "record",
    [b"", b"[]", b'{"dv3_2":-1}', b'{"dv3_2":4294967296}', b'{"dv3_2":"1"}', b'{"skip_prechecks":1}', b"Infinity"],
)
def test_bad_feature_records(record: bytes) -> None:
    with pytest.raises(WireError, match=r"TXT record cfd-features\.argotunnel\.com cannot be used: "):
        decode_feature_record(record)


@pytest.mark.parametrize(
    ("shares", "place", "expected"),
    [
        ([Share("quic", 100)], 99, QUIC),
        ([Share("quic", 25), Share("http2", 100)], 25, HTTP2),  # strictly greater
        ([Share("quic", 26), Share("http2", 100)], 25, QUIC),
        ([Share("http2", 100), Share("quic", 26)], 25, QUIC),  # the order is ours, not the record's
        ([Share("quic", 0), Share("http2", 0)], 0, QUIC),
        ([], 0, QUIC),
        ([Share("h2mux", 100)], 0, QUIC),
        ([Share("quic", 0), Share("quic", 100), Share("http2", 100)], 50, HTTP2),  # the first entry counts
        ([Share("quic", -5), Share("http2", -5)], 0, QUIC),
    ],
)
def test_shares(shares: list[Share], place: int, expected: Transport) -> None:
    assert choose_by_share(shares, place) is expected


@pytest.mark.parametrize(
    ("features", "share", "place", "version"),
    [
        ((), 0, 0, 2),
        ((), 1, 0, 3),
        ((), 25, 25, 2),
        ((), 26, 25, 3),
        (("support_datagram_v3_2",), 0, 99, 3),
        (("support_datagram_v2",), 100, 0, 2),
        (("support_datagram_v2", "support_datagram_v3_2"), 0, 99, 3),
        (("support_datagram_v3",), 0, 0, 2),
    ],
)
def test_datagram_version(features: tuple[str, ...], share: int, place: int, version: int) -> None:
    assert datagram_version(features, RemoteFeatures(share), place) == version


# -- start protocol ----------------------------------------------------------------------------------------------------

FULL = (Share("quic", 100),)
NONE = (Share("quic", 0), Share("http2", 100))


@pytest.mark.parametrize(
    ("flag", "token", "shares", "current", "fallback"),
    [
        ("quic", True, FULL, QUIC, None),
        ("quic", False, NONE, QUIC, None),
        ("http2", True, FULL, HTTP2, None),
        ("h2mux", False, FULL, HTTP2, None),
        ("auto", True, NONE, QUIC, HTTP2),
        ("auto", False, FULL, QUIC, HTTP2),
        ("auto", False, NONE, HTTP2, HTTP2),
        ("auto", False, None, HTTP2, HTTP2),
        ("auto", True, None, QUIC, HTTP2),
    ],
)
def test_start_protocol(
    flag: str, token: bool, shares: tuple[Share, ...] | None, current: Transport, fallback: Transport | None
) -> None:
    selector, warning = select_protocol(flag, token_given=token, shares=shares, place=25, now=10.0)
    assert (selector.current, selector.fallback) == (current, fallback)
    assert bool(warning) == (shares is None or flag == "h2mux")
    assert (selector.refresh_at is not None) == (flag == "auto" and not token)
    assert selector.guessed == (flag == "auto" and not token and shares is None)


@pytest.mark.parametrize("flag", ["", "QUIC", "tcp", "auto "])
def test_unknown_protocols(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^unknown protocol {flag}, "):
        select_protocol(flag, token_given=True, shares=FULL, place=0, now=0.0)


def test_the_record_is_looked_up_again_after_an_hour() -> None:
    selector, _ = select_protocol("auto", token_given=False, shares=FULL, place=25, now=0.0)
    assert not selector.refresh_due(RECORD_SECONDS - 1)
    assert selector.refresh_due(RECORD_SECONDS)
    kept = selector.refreshed(None, 25, RECORD_SECONDS)
    assert kept.current is QUIC
    assert not kept.refresh_due(RECORD_SECONDS + RECORD_RETRY_SECONDS - 1)
    assert kept.refresh_due(RECORD_SECONDS + RECORD_RETRY_SECONDS)
    changed = kept.refreshed(NONE, 25, 5000.0)
    assert (changed.current, changed.refresh_at) == (HTTP2, 5000.0 + RECORD_SECONDS)


def test_a_guess_ends_with_the_first_record() -> None:
    selector, _ = select_protocol("auto", token_given=False, shares=None, place=25, now=0.0)
    assert selector.refresh_due(RECORD_RETRY_SECONDS)
    assert selector.refreshed(FULL, 25, 60.0) == Selector(QUIC, HTTP2, 60.0 + RECORD_SECONDS)


@pytest.mark.parametrize("flag", ["quic", "http2", "auto"])
def test_where_the_record_does_not_matter_it_is_never_due(flag: str) -> None:
    selector, _ = select_protocol(flag, token_given=True, shares=FULL, place=25, now=0.0)
    assert not selector.refresh_due(1e12)
    assert selector.refreshed(NONE, 25, 1e12) == selector


# -- after a failure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "effect"),
    [
        (Failure.DIAL, Effect(rotate=True, unreachable=True)),
        (Failure.DUPLICATE, Effect(rotate=True, unreachable=False)),
        (Failure.UNAUTHORIZED, Effect(rotate=False, unreachable=False)),
        (Failure.REFUSED, Effect(rotate=False, unreachable=False)),
        (Failure.REFUSED_FOR_NOW, Effect(rotate=False, unreachable=False)),
        (Failure.LOST, Effect(rotate=False, unreachable=False)),
        (Failure.INTERNAL, Effect(rotate=False, unreachable=False)),
    ],
)
def test_classification(failure: Failure, effect: Effect) -> None:
    after, found = AddressTrials(3).failed(failure)
    assert found == effect
    assert after == AddressTrials(4 if failure is Failure.DIAL else 3)


def test_every_failure_has_an_effect() -> None:
    for failure in Failure:
        AddressTrials().failed(failure)


@pytest.mark.parametrize("budget", [-1, 0, 1, ADDRESS_BUDGET, 20])
def test_the_address_budget(budget: int) -> None:
    state, over = AddressTrials(), []
    for _ in range(3 * (max(budget, 0) + 1)):
        state, effect = state.failed(Failure.DIAL, budget=budget)
        assert effect.rotate
        assert effect.unreachable
        over.append(effect.start_over)
    assert over == ([False] * budget + [True]) * 3
    assert ADDRESS_BUDGET == 8


def test_registration_refills_the_budget() -> None:
    assert AddressTrials(7).registered() == AddressTrials()
