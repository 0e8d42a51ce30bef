"""Any bytes in a TXT record or a saved answer: a value, or exactly the error that the caller expects."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from connector.errors import WireError
from connector.protocol.protocol_choice import (
    RemoteFeatures,
    Share,
    Transport,
    choose_by_share,
    datagram_version,
    decode_feature_record,
    decode_protocol_record,
)
from connector.transport.discovery import decode_saved

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**34), 2**34), st.floats(), st.text(max_size=6),
    st.sampled_from(["quic", "http2", "HTTP2", "192.0.2.1", "::1", "fe80::1%x", ""]),
)  # fmt: skip
KEYS = st.one_of(
    st.sampled_from(
        ["protocol", "percentage", "Protocol", "dv3_2", "skip_prechecks", "version", "region", "regions", "saved_at"]
    ),
    st.text(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=12,
)
BYTES = st.one_of(st.binary(max_size=60), VALUES.map(lambda value: json.dumps(value).encode()))
CUT = st.builds(lambda data, at: data[:at], BYTES, st.integers(0, 80))
ANY = st.one_of(BYTES, CUT, st.integers(1, 200_000).map(lambda depth: b"[" * depth), st.just(b"9" * 10_000))


@settings(deadline=None)
@given(ANY, st.integers(0, 99))
def test_protocol_record(data: bytes, place: int) -> None:
    try:
        shares = decode_protocol_record(data)
    except WireError:
        return
    for share in shares:
        assert isinstance(share, Share)
        assert share.protocol == share.protocol.lower()
        assert -(2**31) <= share.percentage < 2**31
    assert choose_by_share(shares, place) in Transport


@settings(deadline=None)
@given(ANY, st.integers(0, 99))
def test_feature_record(data: bytes, place: int) -> None:
    try:
        features = decode_feature_record(data)
    except WireError:
        return
    assert isinstance(features, RemoteFeatures)
    assert type(features.skip_prechecks) is bool
    assert 0 <= features.datagram_v3_share < 2**32
    assert datagram_version((), features, place) in {2, 3}


ADDRESSES = st.lists(st.lists(SCALARS, max_size=3), max_size=3)
NEARLY = st.fixed_dictionaries(
    {
        "version": st.one_of(st.just(1), SCALARS),
        "region": st.just(""),
        "saved_at": SCALARS,
        "regions": st.one_of(st.lists(ADDRESSES, max_size=3), VALUES),
    }
).map(lambda value: json.dumps(value).encode())


@settings(deadline=None)
@given(st.one_of(ANY, NEARLY))
def test_saved_answer(data: bytes) -> None:
    saved = decode_saved(data, "")
    if saved is None:
        return
    assert len(saved.regions) == 2
    for address in (*saved.regions[0], *saved.regions[1]):
        assert 0 < address.port < 65536
        assert address.family == (6 if ":" in address.host else 4)
