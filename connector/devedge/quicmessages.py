"""The messages that open a QUIC data stream, by pycapnp: a second opinion on connector/wire/connect.py.

Owns: the edge's ConnectRequest from the header block of a request, and the reading of a ConnectResponse.
In: header fields as for HTTP/2; bytes of a response stream. Out: bytes; error text and metadata.
Never: performs I/O, or trusts a length.
"""

from __future__ import annotations

from typing import Any

from connector.devedge.headers import UPGRADE
from connector.devedge.streams import RawHeaders
from connector.errors import WireError
from connector.transport.rpc import load_schema

DATA_SIGNATURE = bytes.fromhex("0a36cd12a13e")
RPC_SIGNATURE = bytes.fromhex("52bb825cdb65")
VERSION = b"01"
PREAMBLE = len(DATA_SIGNATURE) + len(VERSION)

MAX_RESPONSE = 4 * 1024 * 1024
"""Bytes of a ConnectResponse: 1 MiB of headers, and room for a wasteful encoder."""

MAX_SEGMENTS = 512


def connect_request(headers: RawHeaders, *, end_stream: bool) -> bytes:
    """Make the preamble of a request stream from what would open it over HTTP/2."""
    fields = dict(headers)
    kind = "websocket" if fields.get(UPGRADE) == b"websocket" else "http"
    metadata = [(b"HttpMethod", fields[b":method"]), (b"HttpHost", fields[b":authority"])]
    has_length = False
    for name, value in headers:
        if name.startswith(b":") or name == UPGRADE:
            continue
        has_length = has_length or name == b"content-length"
        metadata.append((b"HttpHeader:" + canonical(name), value))
    if not end_stream and not has_length and kind == "http":
        metadata.append((b"HttpHeader:Transfer-Encoding", b"chunked"))
    dest = fields[b":scheme"] + b"://" + fields[b":authority"] + fields[b":path"]
    return DATA_SIGNATURE + VERSION + encode_connect_request(kind, dest, metadata)


def encode_connect_request(kind: str, dest: bytes, metadata: RawHeaders) -> bytes:
    """Frame a ConnectRequest."""
    message = load_schema("quic_metadata").ConnectRequest.new_message()
    message.dest = dest
    message.type = kind
    for entry, (key, value) in zip(message.init("metadata", len(metadata)), metadata, strict=True):
        entry.key = key
        entry.val = value
    return bytes(message.to_bytes())


def canonical(name: bytes) -> bytes:
    """`x-forwarded-for` as `X-Forwarded-For`."""
    return b"-".join(part.capitalize() for part in name.split(b"-"))


def response_length(data: bytes | bytearray) -> int | None:
    """How long preamble and ConnectResponse are; None while that is not known. Raises WireError."""
    if data[:PREAMBLE] != (DATA_SIGNATURE + VERSION)[: len(data)]:
        raise WireError("the response stream does not begin with the data signature and version 01")
    if len(data) < PREAMBLE + 4:
        return None
    segments = int.from_bytes(data[PREAMBLE : PREAMBLE + 4], "little") + 1
    if segments > MAX_SEGMENTS:
        raise WireError(f"the ConnectResponse announces {segments} segments")
    table = PREAMBLE + (4 + 4 * segments + 7 & ~7)
    if len(data) < table:
        return None
    sizes = (int.from_bytes(data[at : at + 4], "little") for at in range(PREAMBLE + 4, PREAMBLE + 4 + 4 * segments, 4))
    length = table + 8 * sum(sizes)
    if length > MAX_RESPONSE:
        raise WireError(f"the ConnectResponse announces {length} bytes")
    return length


def decode_connect_response(data: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Read error text and metadata of a framed ConnectResponse; raises WireError."""
    try:
        with load_schema("quic_metadata").ConnectResponse.from_bytes(data) as message:
            found = [(_text(entry, "key"), _text(entry, "val")) for entry in message.metadata]
            return _text(message, "error"), found
    except Exception as error:  # what pycapnp makes of a KjException
        raise WireError(f"the ConnectResponse cannot be read: {error}") from None


def _text(struct: Any, field: str) -> bytes:
    """Bytes of a Text field; headers may hold any."""
    try:
        return str(getattr(struct, field)).encode()
    except UnicodeDecodeError as error:
        return error.object
