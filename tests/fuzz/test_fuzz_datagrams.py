"""Any datagrams in any order: no exception leaves the tables, and the books stay right."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from connector.wire import datagram_v2 as v2
from connector.wire import datagram_v3 as v3
from tests.protocol.test_datagrams import ADDRESS, ID, OTHER, Rig

REGISTRATIONS = st.builds(
    v3.encode_registration,
    st.builds(
        v3.Registration, st.sampled_from([ID, OTHER]), st.sampled_from([ADDRESS, b"\xfd" * 16]), st.integers(0, 65535),
        st.integers(0, 65535), st.none() | st.binary(max_size=20),
    ),
)  # fmt: skip
PIECES = st.one_of(
    st.binary(max_size=60),
    REGISTRATIONS,
    st.builds(lambda head, flow, rest: bytes([head]) + flow + rest, st.integers(0, 5), st.sampled_from([ID, OTHER]),
              st.binary(max_size=30)),
    st.builds(lambda rest, flow, kind: rest + flow + bytes([kind]), st.binary(max_size=30),
              st.sampled_from([ID, OTHER]), st.integers(0, 5)),
)  # fmt: skip


def feed_both_versions(datagrams: list[bytes]) -> None:
    rig = Rig()
    rig.slots.limit = 2
    three, two = rig.v3(0), rig.v2(1)
    two.register_udp_session(ID, ADDRESS, 53, 0, 0.0)
    for number, data in enumerate(datagrams):
        three.receive(data, float(number))
        two.receive(data, float(number))
        for link in rig.links:
            for sent in link.take():
                v3.decode_response(sent)
        alive = [origin for origin in rig.origins if not origin.closed]
        assert len(alive) == rig.slots.taken == rig.wheel.size <= 2
    rig.wheel.advance(1e6)
    assert rig.slots.taken == rig.wheel.size == 0
    for _, message, fields in rig.events:
        assert len(message) + len(str(fields)) < 600


@given(st.lists(PIECES, max_size=12))
def test_any_datagrams(datagrams: list[bytes]) -> None:
    feed_both_versions(datagrams)


@given(st.lists(st.tuples(st.binary(max_size=40), st.sampled_from([v2.UDP, v2.IP])), max_size=8))
def test_payloads_of_version_2_arrive_whole(payloads: list[tuple[bytes, int]]) -> None:
    rig = Rig()
    end = rig.v2()
    end.register_udp_session(ID, ADDRESS, 53, 0, 0.0)
    for payload, kind in payloads:
        end.receive(v2.encode(kind, ID if kind == v2.UDP else b"", payload), 0.0)
    assert rig.origins[0].sent == [payload for payload, kind in payloads if kind == v2.UDP]
    assert [packet for _, packet in rig.icmp] == [payload for payload, kind in payloads if kind == v2.IP]
