"""ICMP packets: checksums that the kernel made, quotes, and what must not decode."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.errors import WireError
from connector.wire import icmp

HERE4, THERE4 = ip_address("10.0.0.1").packed, ip_address("10.0.0.2").packed
HERE6, THERE6 = ip_address("fd00::1").packed, ip_address("fd00::2").packed


def request(source: bytes, destination: bytes, ttl: int = 64, data: bytes = b"hello") -> bytes:
    kind = icmp.ECHO4 if len(source) == 4 else icmp.ECHO6
    return icmp.encode_packet(source, destination, icmp.encode_message(kind, 0x1234, 7, data), ttl)


def test_checksum_of_rfc_1071() -> None:
    assert icmp.checksum(bytes.fromhex("0001f203f4f5f6f7")) == ~0xDDF2 & 0xFFFF
    assert icmp.checksum(b"") == 0xFFFF
    assert icmp.checksum(b"\xff" * 65535) == icmp.checksum(b"\xff\0")


@pytest.mark.parametrize(("source", "destination"), [(HERE4, THERE4), (HERE6, THERE6)])
@pytest.mark.parametrize("data", [b"", b"x", b"hello" * 100])
def test_what_is_made_is_read_and_sums_to_zero(source: bytes, destination: bytes, data: bytes) -> None:
    packet = request(source, destination, 64, data)
    echo = icmp.decode_echo_request(packet)
    assert echo[:5] == (source, destination, 64, 0x1234, 7)
    assert echo.message[8:] == data
    if len(source) == 4:
        assert icmp.checksum(packet[:20]) == icmp.checksum(packet[20:]) == 0
    else:
        pseudo = source + destination + struct.pack("!II", len(echo.message), 58)
        assert icmp.checksum(pseudo + echo.message) == 0


@pytest.mark.parametrize(("source", "destination", "quote"), [(HERE4, THERE4, 548), (HERE6, THERE6, 1232)])
def test_time_exceeded_quotes_the_packet(source: bytes, destination: bytes, quote: int) -> None:
    packet = request(source, destination, 1, b"z" * 1210)
    router = THERE4 if len(source) == 4 else THERE6
    answer = icmp.encode_time_exceeded(packet, icmp.decode_echo_request(packet), router)
    head = 20 if len(source) == 4 else 40
    assert answer[head] == (11 if len(source) == 4 else 3)
    assert answer[head + 8 :] == packet[:quote]
    assert answer[12:20] == router + source if len(source) == 4 else answer[8:40] == router + source
    with pytest.raises(WireError, match="only echo requests"):
        icmp.decode_echo_request(answer)


def test_replies_carry_the_original_identifier() -> None:
    message = icmp.encode_message(icmp.ECHO4_REPLY, 9, 7, b"data")
    assert icmp.with_identifier(message, 0x1234, icmp.ECHO4_REPLY) == bytes.fromhex("0000000012340007") + b"data"


@pytest.mark.parametrize(
    ("packet", "what"),
    [
        (b"", "empty"),
        (b"\x20" * 40, "IP version 2"),
        (request(HERE4, THERE4)[:19], "19 bytes"),
        (request(HERE4, THERE4)[:-1], "whose header says"),
        (request(HERE6, THERE6)[:-1], "whose header says"),
        (request(HERE6, THERE6)[:39], "39 bytes"),
        (b"\x44" + request(HERE4, THERE4)[1:], "whose header says"),
        (request(HERE4, THERE4)[:9] + b"\x11" + request(HERE4, THERE4)[10:], "protocol 17"),
        (request(HERE6, THERE6)[:6] + b"\x00" + request(HERE6, THERE6)[7:], "followed by 0"),
        (request(HERE4, THERE4)[:6] + b"\x20" + request(HERE4, THERE4)[7:], "fragment"),
        (icmp.encode_packet(HERE4, THERE4, b"\x08\0\0\0"), "4 bytes"),
        (icmp.encode_packet(HERE4, THERE4, icmp.encode_message(13, 1, 1, b"")), "type 13"),
        (icmp.encode_packet(HERE6, THERE6, icmp.encode_message(8, 1, 1, b"")), "type 8"),
        (icmp.encode_packet(HERE4, THERE4, icmp.encode_message(8, 1, 1, b"", code=1)), "code 1"),
    ],
)
def test_everything_else_is_refused_by_name(packet: bytes, what: str) -> None:
    with pytest.raises(WireError, match=what):
        icmp.decode_echo_request(packet)


@given(st.binary(max_size=120))
def test_only_wire_errors(data: bytes) -> None:
    for packet in (data, b"\x45" + data, b"\x60" + data):
        try:
            icmp.decode_echo_request(packet)
        except WireError:
            pass
