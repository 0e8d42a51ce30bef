"""The eyeball's end of a WebSocket that the connector terminates, over a MemoryPort; shares no code with it."""

from __future__ import annotations

from tests.support.memory_port import MemoryPort

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
UPGRADE = [(b"sec-websocket-key", KEY)]


def frame(opcode: int, payload: bytes, *, fin: bool = True, key: bytes = b"\x01\x02\x03\x04") -> bytes:
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 65_536:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    mask = (key * (size // 4 + 1))[:size]
    masked = (int.from_bytes(payload, "big") ^ int.from_bytes(mask, "big")).to_bytes(size, "big")
    return bytes([0x80 * fin | opcode]) + length + key + masked


def parse(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Return the whole, unmasked frames in `data` as (first byte, payload), and the rest."""
    frames = []
    while len(data) >= 2:
        size, at = data[1], 2
        assert size < 128, "a server does not mask"
        if size == 126:
            size, at = int.from_bytes(data[2:4], "big"), 4
        elif size == 127:
            size, at = int.from_bytes(data[2:10], "big"), 10
        if len(data) < at + size:
            break
        frames.append((data[0], data[at : at + size]))
        data = data[at + size :]
    return frames, data


def frames(port: MemoryPort) -> list[tuple[int, bytes]]:
    found, rest = parse(bytes(port.body))
    assert not rest or not port.ended, f"half a frame at the end: {rest!r}"
    return found


def binary(port: MemoryPort) -> bytes:
    """What came in binary messages."""
    return b"".join(payload for first, payload in frames(port) if first == 0x82)


async def received(port: MemoryPort, size: int) -> bytes:
    """Wait for `size` bytes of binary messages."""
    await port.until(lambda: len(binary(port)) >= size or port.ended or port.reset_code is not None)
    return binary(port)
