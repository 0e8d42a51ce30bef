"""What the edge does to headers on their way through, both directions (http2-transport sections 4 and 6).

Owns: the lists of names that are stripped or added, and the reading of a connector's response head.
In: header fields of a visitor or of a connector's response. Out: new field lists; `Head`.
Never: performs I/O or keeps state.
"""

from __future__ import annotations

import base64
import hashlib

from connector.devedge.h2session import RawHeaders
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
    """A connector's response head: status, the origin's headers, and who made it."""

    __slots__ = ("flow_limited", "from_connector", "headers", "status")

    def __init__(self, raw: RawHeaders) -> None:
        """Read it; raises WireError when it cannot be understood."""
        fields = dict(raw)
        try:
            self.status = int(fields.get(b":status", b""))
        except ValueError as error:
            raise WireError("the response has no status") from error
        if not 200 <= self.status <= 999:
            raise WireError(f"the response has status {self.status}")
        meta = fields.get(b"cf-cloudflared-response-meta", b"")
        self.from_connector = b'"src":"cloudflared"' in meta
        self.flow_limited = b'"flow_rate_limited":true' in meta
        serialised = fields.get(b"cf-cloudflared-response-headers")
        self.headers = decode_serialised_headers(serialised) if serialised else []

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
