"""Bytes of a WebSocket client and of a SOCKS client: cut anywhere they read the same, and fail in words alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from connector.errors import WireError
from connector.proxy.socks import SocksError, SocksServer
from connector.wire.ws_stream import BINARY, ClientFrames, FrameFollower, PongFilter


def feed_frames(data: bytes, step: int) -> tuple[bytes, list[tuple[int, bytes]], bool]:
    """Return the payload of binary messages, the control frames, and whether the bytes were frames all along."""
    frames = ClientFrames()
    payload = b""
    control: list[tuple[int, bytes]] = []
    for at in range(0, len(data), step):
        try:
            pieces = frames.receive(memoryview(data)[at : at + step])
        except WireError:
            return payload, control, False
        for opcode, _, _, part in pieces:
            if opcode == BINARY:
                payload += part
            elif opcode > BINARY:
                control.append((opcode, part))
    return payload, control, True


def follow(data: bytes, step: int) -> tuple[bool, bool, int]:
    """Return what a follower knows at the end."""
    follower = FrameFollower(masked=True)
    for at in range(0, len(data), step):
        follower.follow(data[at : at + step])
    return follower.lost, follower.closed, -2 if follower.lost else follower.left


def feed_socks(data: bytes, step: int) -> tuple[bytes, str, bytes]:
    """Return what a client is told, where it wants to go, and what came behind."""
    server = SocksServer()
    told = b""
    for at in range(0, len(data), step):
        if server.destination is not None:
            return told, str(server.destination), server.rest() + data[at:]
        try:
            told += server.receive(data[at : at + step])
        except SocksError as error:
            return told + error.reply, "refused", b""
    return told, str(server.destination), server.rest() if server.destination is not None else b""


def check(data: bytes, step: int) -> None:
    """Hold all of it to the whole read at once."""
    whole, cut = feed_frames(data, len(data) or 1), feed_frames(data, step)
    assert whole[2] == cut[2]
    if whole[2]:
        assert whole == cut
    assert follow(data, len(data) or 1) == follow(data, step)
    assert feed_socks(data, len(data) or 1) == feed_socks(data, step)
    filter_ = PongFilter()
    passed = b"".join(bytes(filter_.filter(data[at : at + step])) for at in range(0, len(data), step))
    assert passed + filter_.rest() == data


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """Mostly frames of a client, some of them wrong."""
    made = b""
    for _ in range(draw(st.integers(0, 6))):
        first = draw(st.sampled_from([0x82, 0x81, 0x02, 0x80, 0x00, 0x88, 0x89, 0x8A, 0xC2, 0x83, 0x09]))
        size = draw(st.sampled_from([0, 1, 3, 125, 126, 200]))
        length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
        made += bytes([first]) + length + draw(st.binary(min_size=4, max_size=4)) + bytes(size)
    return made + draw(st.binary(max_size=20))


@given(frames(), st.integers(1, 40))
def test_frames(data: bytes, step: int) -> None:
    check(data, step)


@given(
    st.lists(st.sampled_from([b"\x05", b"\x01", b"\x00", b"\x03", b"\x04", b"\x09localhost"]), max_size=24),
    st.integers(1, 9),
)
def test_socks(parts: list[bytes], step: int) -> None:
    check(b"".join(parts), step)
