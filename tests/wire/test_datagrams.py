"""Datagrams of both versions against the golden bytes, and what must not decode."""

from __future__ import annotations

import uuid
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.errors import WireError
from connector.wire import datagram_v2 as v2
from connector.wire import datagram_v3 as v3
from connector.wire.session_rpc import FAREWELL, MAX_TEXT, encode_unregister
from tests.support.vectors import vector

SESSION = uuid.UUID("0a1b2c3d-4e5f-4061-8273-8495a6b7c8d9").bytes
REQUEST = bytes.fromhex("00112233445566778899aabbccddeeff")


def test_version_2_vector() -> None:
    data = vector("datagram_v2_udp")
    assert v2.decode(data) == (v2.UDP, SESSION, b"hello")
    assert v2.encode(v2.UDP, SESSION, b"hello") == data
    assert v2.decode(b"packet\x01") == (v2.IP, b"", b"packet")
    identity = bytes.fromhex("0123456789abcdeffedcba9876543210001122334455667701")
    assert v2.decode(b"packet" + identity + b"\x02") == (v2.TRACED_IP, identity, b"packet")
    assert v2.decode_identity(identity) == "0123456789abcdeffedcba9876543210:11223344556677:0:1"
    assert v2.encode_identity("0123456789abcdeffedcba9876543210:11223344556677:0:1") == identity


@pytest.mark.parametrize("data", [b"", b"\x04", b"\xff", b"x" * 15 + b"\x00", b"x" * 24 + b"\x02", b"x" * 24 + b"\x03"])
def test_version_2_refuses(data: bytes) -> None:
    with pytest.raises(WireError):
        v2.decode(data)


@pytest.mark.parametrize("text", ["", "1:2:3", "x:0:0:1", "1" * 33 + ":0:0:1", "-1:0:0:1", "0:1" + "0" * 16 + ":0:1"])
def test_trace_identities_refused(text: str) -> None:
    with pytest.raises(WireError):
        v2.encode_identity(text)
    with pytest.raises(WireError):
        v2.decode_identity(text.encode())


def test_version_3_vectors() -> None:
    bundled = v3.Registration(REQUEST, ip_address("10.0.0.53").packed, 53, 210, b"abc")
    traced = v3.Registration(REQUEST, ip_address("2001:db8::1").packed, 443, 0, None, True)
    for name, flow in (("datagram_v3_register_v4_bundled", bundled), ("datagram_v3_register_v6_traced", traced)):
        assert v3.decode_registration(vector(name)) == flow
        assert v3.encode_registration(flow) == vector(name)
    assert v3.encode_payload(REQUEST, b"hi") == vector("datagram_v3_payload")
    for name, answer in (
        ("datagram_v3_response_ok", v3.Response(REQUEST, v3.OK)),
        ("datagram_v3_response_error", v3.Response(REQUEST, v3.ERROR, "oops")),
    ):
        assert v3.decode_response(vector(name)) == answer
        assert v3.encode_response(answer) == vector(name)


def test_version_3_refuses_what_is_cut_off_or_too_long() -> None:
    whole = vector("datagram_v3_register_v6_traced")
    for size in range(len(whole)):
        with pytest.raises(WireError):
            v3.decode_registration(whole[:size])
    long = v3.Registration(REQUEST, b"\x0a\0\0\1", 53, 0, b"x" * 1281)
    with pytest.raises(WireError, match="1281"):
        v3.decode_registration(v3.encode_registration(long))
    answer = vector("datagram_v3_response_error")
    for cut in (answer[:-1], answer + b"x", answer[:19], b"\x01" + answer[1:]):
        with pytest.raises(WireError):
            v3.decode_response(cut)
    assert len(v3.encode_response(v3.Response(REQUEST, v3.ERROR, "é" * 2000))) == 20 + v3.MAX_RESPONSE_TEXT


def test_the_end_of_a_session_is_the_originals_bytes() -> None:
    assert encode_unregister(SESSION, "session idle for 3m30s") == vector("rpc_bootstrap_q0") + vector(
        "rpc_call_unregisterUdpSession_q1"
    )
    assert FAREWELL.startswith(vector("rpc_finish_q0_keep"))
    assert FAREWELL.endswith(vector("rpc_abort_shutdown"))


def test_texts_of_every_length_make_whole_messages() -> None:
    import capnp  # noqa: F401

    from connector.transport.rpc import load_schema
    from tests.wire.test_proto_vectors import RPC

    schema = load_schema("tunnelrpc").SessionManager.schema.methods["unregisterUdpSession"].param_type
    for size in [*range(20), MAX_TEXT, MAX_TEXT + 1]:
        message = encode_unregister(SESSION, "x" * size)[48:]
        with RPC.Message.from_bytes(message) as read:
            assert read.call.interfaceId == 0x839445A59FB01686
            parameters = read.call.params.content.as_struct(schema)
            assert bytes(parameters.sessionId) == SESSION
            assert parameters.message == "x" * min(size, MAX_TEXT)


@given(st.binary(max_size=80))
def test_only_wire_errors(data: bytes) -> None:
    for decode in (v2.decode, v3.decode_registration, v3.decode_response, v2.decode_identity):
        try:
            decode(data)
        except WireError:
            pass


@given(st.binary(min_size=16, max_size=16), st.sampled_from([4, 16]), st.integers(0, 65535), st.integers(0, 65535),
       st.none() | st.binary(max_size=1280), st.booleans())  # fmt: skip
def test_registrations_survive(
    request_id: bytes, size: int, port: int, idle: int, payload: bytes | None, traced: bool
) -> None:
    flow = v3.Registration(request_id, b"\x0a" * size, port, idle, payload, traced)
    assert v3.decode_registration(v3.encode_registration(flow)) == flow
