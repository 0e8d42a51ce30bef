"""The one RPC that the connector makes beside its control stream: the end of a UDP session (proto/README.md ¶ 12).

Owns: the bytes of that exchange, written by hand because they never vary in shape: a session's end is no reason for an
RPC client with tasks and a socket pair.
In: session ID and text. Out: messages. Never: reads an answer beyond its framing.
"""

from __future__ import annotations

import struct
from typing import Final

from connector.wire.capnp import frame_message

MAX_TEXT: Final = 1024
"""Bytes of the text; longer ones are cut."""

_BOOTSTRAP: Final = bytes.fromhex(
    "0000000005000000 0000000001000100 0800000000000000 0000000001000100 0000000000000000 0000000000000000"
)
"""Bootstrap, question 0."""

_CALL: Final = bytes.fromhex(
    "0000000001000100 0200000000000000 0000000003000300"  # a call
    "0100000001000000 8616b09fa5459483 0000000000000000"  # question 1, method 1, SessionManager
    "0800000001000100 1800000000000200 0000000000000000"  # target; parameters; results to the caller
    "0000000001000000 0000000001000100"  # the target is promised
    "0000000000000000 0100000007000000 0000000001000000"  # by question 0, as it is
    "0400000000000200"  # the parameters are two pointers
)
_NO_CAPABILITIES: Final = bytes.fromhex("0000000001000100")

FAREWELL: Final = bytes.fromhex(
    "0000000004000000 0000000001000100 0400000000000000 0000000001000000 0000000001000000"  # finish 0, keep
    "0000000004000000 0000000001000100 0400000000000000 0000000001000000 0100000001000000"  # finish 1, keep
    "0000000008000000 0000000001000100 0100000000000000 0000000001000200"  # abort
    "0000000000000000 0500000072000000 0000000000000000 7270633a20736875 74646f776e000000"  # rpc: shutdown
)
"""What the client says when both answers are there."""

ANSWERS: Final = 2
"""Messages that answer `encode_unregister`: the bootstrap's return, the call's."""


def encode_unregister(session_id: bytes, text: str) -> bytes:
    """Return bootstrap and call in one flight; the call does not wait for the bootstrap's answer."""
    words = text.encode()[:MAX_TEXT].decode(errors="ignore").encode()
    padded = words + b"\0" * (8 - len(words) % 8)
    # List pointers: how many words behind the pointer, then size and kind of the elements.
    pointers = struct.pack(
        "<IIIIII",
        (2 + 2 + len(padded) // 8) << 2 | 1, 0 << 3 | 7,
        1 << 2 | 1, len(session_id) << 3 | 2,
        2 << 2 | 1, (len(words) + 1) << 3 | 2,
    )  # fmt: skip
    return _BOOTSTRAP + frame_message(_CALL + pointers + session_id + padded + _NO_CAPABILITIES)
