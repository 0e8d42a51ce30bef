"""The interfaces between the layers: events for decisions, calls for payload.

Owns: the values and `typing.Protocol`s that transport and proxy share. Both sides import only this module.
In: nothing. Out: Request, StreamSink, StreamPort, Acceptor.
Never: behaviour, I/O, base classes to inherit from.

Strategy: whatever happens once per stream is a value (Request); whatever happens once per chunk is a direct
method call with a borrowed buffer. The same interfaces serve HTTP/2 and QUIC links.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Protocol

Buffer = bytes | bytearray | memoryview
Headers = Sequence[tuple[bytes, bytes]]
"""Header fields in order. Names of requests are as received (lower case over HTTP/2); names of responses are as the
origin spelled them. Values never contain CR, LF or NUL: the side that makes the value checks it."""


class RequestKind(IntEnum):
    """What the edge wants of a stream (http2-transport section 2; ConnectionType over QUIC)."""

    HTTP = 0
    WEBSOCKET = 1
    TCP = 2
    CONTROL = 3
    CONFIGURATION = 4


class ResponseSource(IntEnum):
    """Who made a response: goes into `cf-cloudflared-response-meta` over HTTP/2."""

    ORIGIN = 0
    CONNECTOR = 1
    FLOW_LIMITED = 2


class ResetCode(IntEnum):
    """Why one side gives a stream up. The transport maps it to its own wire code."""

    FAILED = 0
    CANCELLED = 1
    REFUSED = 2
    PROTOCOL = 3


class Request:
    """One stream's opening, as the edge sent it; immutable by convention after construction.

    `method` (`b"GET"`), `target` (`:path` with query, as received), `host` (`:authority`, or `host` when missing,
    may hold a port), `scheme`; `headers` without pseudo headers, without `host`, without the `cf-cloudflared-proxy-*`
    control headers, `cookie` fields joined. `content_length` is -1 when unknown (the stream stays open without
    a content-length) and 0 when there is no body. `trace` is the value of `cf-trace-id`, which is never in `headers`.
    `conn_index` says which edge connection it came over.
    """

    __slots__ = ("conn_index", "content_length", "headers", "host", "kind", "method", "scheme", "target", "trace")

    def __init__(
        self,
        kind: RequestKind,
        method: bytes,
        target: bytes,
        host: bytes,
        headers: Headers,
        content_length: int = -1,
        scheme: bytes = b"https",
        trace: bytes = b"",
    ) -> None:
        self.kind = kind
        self.method = method
        self.target = target
        self.host = host
        self.headers = headers
        self.content_length = content_length
        self.scheme = scheme
        self.trace = trace
        self.conn_index = 0

    def __repr__(self) -> str:
        path = self.target.partition(b"?")[0]  # a query may hold secrets
        return f"<Request {self.kind.name} {self.method!r} {self.host!r} {path!r}>"


class StreamSink(Protocol):
    """What the proxy implements, one per stream; the transport calls it. No call blocks or raises.

    Order: any number of `on_data`, then at most one `on_eof`; and at any time, also after `on_eof` while the response
    is not finished, at most one `on_reset`. After it nothing more is called and every call on the port is a no-op.
    `pause_writing`/`resume_writing` alternate, as in asyncio.
    """

    def on_data(self, data: Buffer) -> None:
        """Take request payload. Borrowed: the buffer is valid during the call (copy what must be kept), or until the
        end of the Batch where the link has one.

        The sink owes exactly `len(data)` of `StreamPort.consumed`, in any portions, as soon as the origin accepted it.
        """

    def on_eof(self) -> None:
        """Take the end of the request payload (END_STREAM, FIN)."""

    def on_reset(self, error: BaseException | None) -> None:
        """The peer reset the stream or the link is gone: abort the origin side and let go. Last call."""

    def pause_writing(self) -> None:
        """The edge does not take more now: stop reading the origin."""

    def resume_writing(self) -> None:
        """The edge takes more again."""


class StreamPort(Protocol):
    """What the transport implements, one per stream; the proxy calls it. No call blocks or raises.

    Legal order: `respond` once, `write`*, then `write_eof` or `reset`. Calls after the end of the stream
    are no-ops. `on_*` is never called from inside `respond`, `write`, `write_eof`; `pause_writing` may be.
    """

    spans: bytes
    """Set before `respond`: the base64 of this request's spans, for the header `cf-int-cloudflared-tracing`."""

    def respond(
        self, status: int, headers: Headers, source: ResponseSource = ResponseSource.ORIGIN, reason: bytes = b""
    ) -> None:
        """Send the response head. 101 is allowed: the transport translates it (HTTP/2: to 200).

        `reason` says in words why a refusal is one; only QUIC has a place for it.
        """

    def write(self, data: Buffer) -> None:
        """Queue payload; the buffer is copied or framed before the call returns. Never drops."""

    def write_eof(self, trailers: Headers = ()) -> None:
        """End the response side after everything queued. Half-close: the request side stays open."""

    def reset(self, code: ResetCode) -> None:
        """Give the stream up both ways at once; what is queued is dropped. No `on_reset` follows."""

    def stop_reading(self) -> None:
        """The rest of the request payload is not wanted: no `on_data`/`on_eof` follows; credit takes care of itself."""

    def consumed(self, n: int) -> None:
        """The origin accepted `n` more bytes: the only thing that gives receive credit back."""

    def traffic(self) -> tuple[int, int]:
        """Payload bytes from the edge and to it so far; also after the end. Nothing is paid for it per chunk."""


Acceptor = Callable[[Request, StreamPort], StreamSink]
"""Called once per stream that the edge opens, before any payload. It may call `port.respond` and friends at once, and
must return a sink (one that ignores everything if the request was already answered). Must not raise."""


class Batch(Protocol):
    """Who wants to know where one read of a link begins and ends: the proxy, to join what goes to one origin.

    From `begin` to `end` buffers that `on_data` lent stay valid. Links of one loop never overlap in it.
    """

    def begin(self) -> None:
        """What one read brought is about to be handed on."""

    def end(self) -> None:
        """It was."""


class DatagramPort(Protocol):
    """What a QUIC link offers to whoever serves its datagrams. No call blocks or raises."""

    @property
    def datagram_limit(self) -> int:
        """Bytes of the largest datagram that fits now; it grows while the path's MTU is being found."""

    @property
    def datagram_room(self) -> int:
        """How many datagrams the link takes now. At 0 stop reading origins: `on_datagram_room` tells when to go on."""

    def send_datagram(self, data: bytes) -> bool:
        """Queue a datagram; False when it is too large, the queue is full, or the link is over."""

    def open_rpc(self, data: bytes, sink: StreamSink) -> StreamPort | None:
        """Open an RPC stream whose signature is followed by `data`; None when the link is over."""


class DatagramSink(Protocol):
    """Who serves the datagrams of one link. No call blocks or raises."""

    def attach(self, port: DatagramPort) -> None:
        """The link is up; called once, before anything else."""

    def on_datagram(self, data: bytes) -> None:
        """Take a datagram of the edge (untrusted)."""

    def on_datagram_room(self) -> None:
        """There is room again after `datagram_room` was 0."""

    def on_lost(self) -> None:
        """The link is over. Last call."""


class LinkTap(Protocol):
    """What looks on at one link; the inspector implements it. No call may raise, block or keep a buffer.

    A link has one or None, tested once per call (`is None`); streams are watched by `acceptor`, so a stream that
    nobody watches pays nothing at all.
    """

    def acceptor(self, accept: Acceptor) -> Acceptor:
        """Return an Acceptor that watches every stream of this link and passes it on to `accept`."""

    def on_bytes(self, outgoing: bool, data: Buffer) -> None:
        """Take decrypted bytes of an HTTP/2 connection, in order."""

    def on_stream_bytes(self, stream_id: int, outgoing: bool, data: Buffer, fin: bool) -> None:
        """Take bytes of a QUIC stream, in order."""

    def on_stream_ended(self, stream_id: int, outgoing: bool, what: str) -> None:
        """A QUIC stream was given up: `RESET_STREAM` or `STOP_SENDING`."""

    def on_datagram(self, outgoing: bool, data: Buffer) -> None:
        """Take a QUIC datagram frame."""

    def on_closed(self, error: BaseException | None) -> None:
        """The link is over."""


class StreamTap(Protocol):
    """What looks on at one request where there is no port to stand in for: on the dev edge. `way` 0 is up, 1 down."""

    def mark(self, name: str) -> None:
        """Something happened that is worth its time; only the first of a name counts."""

    def on_head(self, status: int, headers: Headers, source: str) -> None:
        """The response head came."""

    def on_payload(self, way: int, data: Buffer) -> None:
        """Payload passed."""

    def on_eof(self, way: int) -> None:
        """One direction ended in order."""

    def end(self, how: str, error: str = "") -> None:
        """The request is over; only the first call counts."""


class Tap(Protocol):
    """The inspector's only entrance: sees every link and, through them, both ends of every stream."""

    def open_link(self, protocol: str, remote: str, conn_index: int) -> LinkTap:
        """A link to `remote` is being dialled (or was accepted, on the edge's side)."""

    def open_exchange(self, request: Request, link: LinkTap | None) -> StreamTap:
        """The edge sends a request over `link`."""

    def on_origin(self, port: StreamPort, what: str) -> None:
        """Something happened between connector and origin on the stream of `port`: `connected`, `reused`."""

    def on_event(self, name: str, fields: dict[str, object]) -> None:
        """Something happened to the connector or the edge as a whole: a registration, a configuration, a retry."""
