"""What the edge does to headers on their way through, both directions (http2-transport sections 4 and 6).

Owns: the lists of names that are stripped or added, and the reading of a connector's response head.
In: header fields of a visitor or of a connector's response. Out: new field lists; `Head`.
Never: performs I/O or keeps state.
"""

from __future__ import annotations

import base64
import hashlib

from connector.devedge.streams import RawHeaders
from connector.errors import WireError
from connector.wire.h2_headers import decode_serialised_headers

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding"
    b" upgrade http2-settings expect".split()
)

EDGE_SETS = frozenset((b"x-forwarded-proto", b"cdn-loop", b"host"))
"""Names that the edge replaces; those that begin with `cf-` go anyway."""

HANDSHAKE = frozenset((b"sec-websocket-version",))
"""Left out of a WebSocket request next to the hop-by-hop fields; the connector restores them."""

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

UPGRADE = b"cf-cloudflared-proxy-connection-upgrade"


def websocket_accept(key: bytes) -> bytes:
    """`Sec-WebSocket-Accept` for a key (RFC 6455 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + GUID).digest())  # noqa: S324 - the protocol asks for it


def request_headers(
    method: bytes, host: bytes, target: bytes, headers: RawHeaders, *, ray: str, client: str, websocket: bool
) -> list[tuple[bytes, bytes]]:
    """Make the header block of one proxied request. Names of `headers` are lower case."""
    dropped = HOP_BY_HOP | EDGE_SETS | _connection_names(headers) | (HANDSHAKE if websocket else frozenset())
    out = [(b":method", method), (b":scheme", b"https"), (b":authority", host), (b":path", target)]
    forwarded: list[bytes] = []
    for name, value in headers:
        if name == b"te" and value.strip().lower() == b"trailers":
            out.append((name, b"trailers"))  # the one hop-by-hop field that HTTP/2 keeps; gRPC needs it
        elif name in dropped or _edge_only(name):
            continue
        elif name == b"x-forwarded-for":
            forwarded.append(value)
        else:
            out.append((name, value))
    address = client.encode()
    out += [
        (b"cf-ray", ray.encode()),
        (b"cf-connecting-ip", address),
        (b"x-forwarded-for", b", ".join([*forwarded, address])),
        (b"x-forwarded-proto", b"https"),
        (b"cf-visitor", b'{"scheme":"https"}'),
        (b"cdn-loop", b"cloudflare; loops=1"),
        (b"cf-ipcountry", b"XX"),
    ]
    if websocket:
        out.append((UPGRADE, b"websocket"))
    return out


def _edge_only(name: bytes) -> bool:
    """Whether a visitor may not send this: every `cf-` name but those of Access clients."""
    return name.startswith(b"cf-") and not name.startswith(b"cf-access-")


def _connection_names(headers: RawHeaders) -> set[bytes]:
    names: set[bytes] = set()
    for name, value in headers:
        if name.lower() == b"connection":
            names.update(part.strip().lower() for part in value.split(b","))
    return names


class Head:
    """A connector's response head: status, the origin's headers, and who made it.

    `switched`: the origin accepted a WebSocket. `trouble`: why there is no answer of an origin, where that is told.
    """

    __slots__ = ("flow_limited", "from_connector", "headers", "status", "switched", "trouble")

    def __init__(self, status: bytes, headers: RawHeaders) -> None:
        """Raises WireError for a status that is none."""
        if not (len(status) == 3 and status.isdigit() and status >= b"101"):
            raise WireError(f"the response has status {status.decode('latin-1')!r}")
        self.status = int(status)
        self.headers = headers
        self.from_connector = False
        self.flow_limited = False
        self.switched = False
        self.trouble = ""

    @classmethod
    def of_http2(cls, raw: RawHeaders) -> Head:
        """Read a header block with serialised response headers; raises WireError."""
        fields = dict(raw)
        meta = fields.get(b"cf-cloudflared-response-meta", b"")
        serialised = fields.get(b"cf-cloudflared-response-headers")
        head = cls(fields.get(b":status", b""), decode_serialised_headers(serialised) if serialised else [])
        if head.status < 200:
            raise WireError(f"the response has status {head.status}")
        head.from_connector = b'"src":"cloudflared"' in meta
        head.flow_limited = b'"flow_rate_limited":true' in meta
        head.switched = head.status == 200 and head.get(b"sec-websocket-accept") is not None
        return head

    @classmethod
    def of_quic(cls, error: bytes, metadata: RawHeaders) -> Head:
        """Read a ConnectResponse, metadata as it came; raises WireError."""
        if error:
            head = cls(b"502", [])
            head.from_connector = True
            head.flow_limited = (b"FlowConnectRateLimited", b"true") in metadata
            head.trouble = error.decode("utf-8", "replace")
            return head
        status = b""
        headers: list[tuple[bytes, bytes]] = []
        for key, value in metadata:
            if key == b"HttpStatus":
                status = value
            elif key.startswith(b"HttpHeader:"):
                headers.append((key[11:], value))
        head = cls(status, headers)
        head.switched = head.status == 101
        return head

    def get(self, name: bytes) -> bytes | None:
        """First value of an origin header, name in lower case."""
        return next((value for known, value in self.headers if known.lower() == name), None)

    def end_to_end(self, *, drop: frozenset[bytes] = frozenset()) -> list[tuple[bytes, bytes]]:
        """The origin's headers without those of one hop."""
        named = _connection_names(self.headers)
        return [
            (name, value)
            for name, value in self.headers
            if (lower := name.lower()) not in HOP_BY_HOP and lower not in named and lower not in drop
        ]
