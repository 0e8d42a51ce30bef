"""The edge's side of QUIC on qh3's compiled core: datagrams go in as the kernel gathered them, events come out.

Owns: QuicListener (the UDP socket), QuicLoadLink (one connector's connection), QuicLoadStream (one stream on it).
In: datagrams; `open`, `send`, `send_datagram`. Out: datagrams; calls on a StreamUser.
Never: knows the rows, favours a connector: what it sends depends on what it is told, not on who is at the other end.

*Strategy*: the library's facade drives the handshake, then its core is used directly. Receive credit comes back as
events are taken. Requests are encoded once per kind, with a place for the `cf-ray` that each of them has for itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import itertools
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qh3._hazmat import Certificate
from qh3.quic.configuration import QuicConfiguration
from qh3.quic.connection import QuicConnection
from qh3.tls import Epoch, load_pem_private_key

from benchmarks.fields import TCP_SOURCE, UPGRADE
from benchmarks.link import BULK, Fields, StreamUser
from connector.wire.connect import connect_length, decode_connect_response, encode_connect_request

DATA_PREAMBLE = bytes.fromhex("0a36cd12a13e") + b"01"

STREAM_WINDOW = 1 << 20
LINK_WINDOW = 16 << 20

PACKET_SIZE = 1452
"""Bytes of a packet: what quic-go's path MTU discovery arrives at."""

MAX_DATAGRAM_FRAME = 16_383

SOCKET_BUFFER = 7 << 20
"""As quic-go asks for, and with the same insistence."""

BULK_WAITING = 512 * 1024
"""Bytes of an upload that are given to the library ahead."""

READ_BURST = 32
READ_SIZE = 65_536
FLUSH_ROUNDS = 16
GSO_SEGMENTS = 64
GSO_BYTES = 65_000
TIMER_RESOLUTION = 0.001

INITIAL_SALT = bytes.fromhex("38762cf7f55934b34d179ae6a4c80cadccbb7f0a")
INITIAL_SUITE = ("aes-128-gcm", "aes-128-ecb")

WEBSOCKET, TCP = 1, 2
"""Types of ConnectRequest beside 0, HTTP."""

RAY = b"%016x-LIS"

_UDP_SEGMENT = 103
_UDP_GRO = 104
_ANCILLARY = socket.CMSG_SPACE(4)
_SEGMENT = struct.Struct("=H")

Address = tuple[str, int]


class QuicLoadStream:
    """One stream. `head`: bytes of a response head that is not whole yet; None when payload is passed on."""

    __slots__ = ("head", "link", "stream_id", "user", "waiting")

    def __init__(self, link: QuicLoadLink, stream_id: int, user: StreamUser, head: bytearray | None) -> None:
        self.link = link
        self.stream_id = stream_id
        self.user = user
        self.head = head
        self.waiting = 0

    def send(self, data: bytes, *, end: bool = False) -> None:
        """Send one message."""
        link = self.link
        if link.alive:
            link.core.send_stream(self.stream_id, data, end)
            link.dirty = True
            link.wake()

    def send_bulk(self, size: int) -> None:
        """Send so many bytes and the end."""
        self.waiting = size
        self.link.bulk[self] = None
        self.link.wake()

    def end(self) -> None:
        """Send FIN."""
        self.send(b"", end=True)

    # The RPC server's view of a stream.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send RPC bytes."""
        self.send(bytes(data))

    def write_eof(self, trailers: object = ()) -> None:
        """Send FIN; not one that is sent already, or on a stream that is gone."""
        try:
            self.end()
        except (RuntimeError, ValueError):
            pass

    def consumed(self, size: int) -> None:
        """Given back already."""

    def reset(self) -> None:
        """Give the stream up."""
        link = self.link
        if link.streams.pop(self.stream_id, None) is not None and link.alive:
            link.core.reset_stream(self.stream_id, 0)
            link.core.stop_sending(self.stream_id, 0)
            link.wake()


class _Connection(QuicConnection):
    """The facade, with an event pump that leaves events alone that are not TLS."""

    def __init__(self, configuration: QuicConfiguration, first_id: bytes) -> None:
        super().__init__(configuration=configuration, original_destination_connection_id=first_id)
        self.native: deque[tuple[Any, ...]] = deque()

    def take_nameless(self, first_id: bytes, address: Address, now: float) -> None:
        """Prepare for a client without a connection ID of its own, as quic-go's are; the library does not know such.

        It goes on writing to the ID that the client made up for it. So it is told that the client's ID is empty, that
        its own is the made-up one, and the keys of the first packets are made here (RFC 9001 5.2).
        """
        self.host_cid = first_id
        self._remote_addr = address
        self._version = 1
        self._create_core(address, b"", now)
        self._create_tls(remote_source_cid=b"")
        core = self._core
        assert core is not None
        for direction, key in zip(("receive", "send"), initial_keys(first_id), strict=True):
            core.install_packet_key(direction, int(Epoch.INITIAL), INITIAL_SUITE, *key, 0)

    def _drain_core(self) -> None:
        core, tls = self._core, self._tls
        assert core is not None
        assert tls is not None
        while (native := core.next_event()) is not None:
            if native[0] == "crypto_data":
                tls.receive_crypto(Epoch(native[1]), native[3], native[2], version=core.version)
                self._drain_tls()
            else:
                self.native.append(native)


class QuicLoadLink:
    """One connection. `on_control` gets the connector's first stream, `on_lost` hears of the end."""

    protocol = "quic"

    def __init__(
        self,
        listener: QuicListener,
        first_id: bytes,
        source_id: bytes,
        address: Address,
        on_control: Callable[[QuicLoadLink, QuicLoadStream], StreamUser],
        on_lost: Callable[[QuicLoadLink], None],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.now = 0.0
        self.features: list[str] = []
        self.room = 1 << 30  # the core lets streams wait beyond the connector's limit
        self.core: Any = None
        self.alive = True
        self.streams: dict[int, QuicLoadStream] = {}
        self.bulk: dict[QuicLoadStream, None] = {}
        self.on_datagram: Callable[[bytes], None] = lambda data: None
        self._listener = listener
        self._address = address
        self._on_control = on_control
        self._on_lost = on_lost
        configuration = dataclasses.replace(listener.configuration, connection_id_length=len(first_id))
        self._connection = _Connection(configuration, first_id)
        if not source_id:
            self._connection.take_nameless(first_id, address, time.perf_counter())
        self.ids = {first_id, self._connection.host_cid}
        self._established = False
        self._rays = itertools.count(0x8F3A_0000_0000_0000)
        self._fields: Fields = ()
        self._parts: tuple[bytes, bytes] = (b"", b"")
        self._heads: dict[bytes, bool] = {}
        self.dirty = False
        self._due = False
        self._reading = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    # --- for the rows ----------------------------------------------------------------------------------------------

    def open(self, fields: Fields, user: StreamUser, *, end: bool = False) -> QuicLoadStream:
        """Open the stream of a request."""
        if fields is not self._fields:
            ray = RAY % 0
            before, _, after = connect_request(fields, ray).rpartition(ray)
            self._fields, self._parts = fields, (before, after)
        before, after = self._parts
        stream = self.open_stream(user, bytearray())
        stream.send(before + RAY % next(self._rays) + after, end=end)
        return stream

    def open_stream(self, user: StreamUser, head: bytearray | None = None) -> QuicLoadStream:
        """Open a stream without a word on it."""
        stream_id = self.core.open_stream(False)
        stream = self.streams[stream_id] = QuicLoadStream(self, stream_id, user, head)
        return stream

    def send_datagram(self, data: bytes) -> None:
        """Send a DATAGRAM frame."""
        self.core.send_datagram(data)
        self.dirty = True
        self.wake()

    def wake(self) -> None:
        """Flush in this loop turn, once."""
        if not self._due and not self._reading:
            self._due = True
            self.loop.call_soon(self._flush)

    def close(self) -> None:
        """Say CONNECTION_CLOSE."""
        if self.alive:
            self.core.close(0, None, b"")
            self._flush()
            self._end()

    abort = close

    # --- from the listener -----------------------------------------------------------------------------------------

    def receive(self, data: bytes, segment: int, now: float) -> None:
        """Take datagrams of `segment` bytes each; the last may be shorter."""
        if self._established:
            self.core.receive_gro_buffer(data, segment, self._address, now)
            return
        for start in range(0, len(data), segment):
            self._connection.receive_datagram(data[start : start + segment], self._address, now)
        self.core = self._connection._core
        self._established = self._connection._handshake_complete

    def settle(self, now: float) -> None:
        """Hand out what was received, then send."""
        if not self.alive or self.core is None:
            return
        self.now = now
        self._reading = True
        self._dispatch()
        self._reading = False
        if self.alive:
            self._flush()

    # --- inside ----------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        native_events = self._connection.native
        next_event = self.core.next_event
        streams = self.streams
        while self.alive:
            native = native_events.popleft() if native_events else next_event()
            if native is None:
                break
            kind = native[0]
            if kind == "stream_data":
                _, stream_id, data, fin = native
                stream = streams.get(stream_id)
                if stream is None:
                    if stream_id & 1 or stream_id:
                        continue
                    stream = streams[0] = QuicLoadStream(self, 0, None, None)  # type: ignore[arg-type]
                    stream.user = self._on_control(self, stream)
                if fin:
                    del streams[stream_id]
                if data:
                    if stream.head is None:
                        stream.user.on_data(data, 0, len(data))
                    else:
                        self._head(stream, data)
                if fin:
                    stream.user.on_end()
                if self.dirty:
                    self._transmit()
            elif kind == "datagram":
                self.on_datagram(native[1])
                if self.dirty:
                    self._transmit()
            elif kind == "stream_reset":
                stream = streams.pop(native[1], None)
                if stream is not None:
                    self.bulk.pop(stream, None)
                    stream.user.on_reset()
            elif kind == "stop_sending":
                stream = streams.get(native[1])
                if stream is not None:
                    stream.waiting = 0
                    self.bulk.pop(stream, None)
            elif kind == "connection_id_issued":
                self.ids.add(native[1])
            elif kind in {"peer_closed", "protocol_error", "connection_terminated"}:
                self._end()

    def _head(self, stream: QuicLoadStream, data: bytes) -> None:
        """Read preamble and ConnectResponse; connectors say the same again and again, so it is looked up first."""
        head = stream.head
        assert head is not None
        whole = bytes(head + data) if head else data
        ok = self._heads.get(whole)
        length = len(whole)
        if ok is None:
            at = connect_length(whole[8:])
            if at is None or len(whole) < 8 + at:
                head += data
                return
            length = 8 + at
            response = decode_connect_response(whole[8:length])
            status = dict(response.metadata).get(b"HttpStatus")
            ok = not response.error and status in {None, b"200", b"101"} and whole.startswith(DATA_PREAMBLE)
            if len(self._heads) < 256:
                self._heads[whole[:length]] = ok
        stream.head = None
        stream.user.on_head(ok)
        if length < len(whole):
            stream.user.on_data(whole, length, len(whole))

    def _pump(self) -> None:
        """Give uploads to the library."""
        core = self.core
        for stream in list(self.bulk):
            room = BULK_WAITING - core.get_send_buffer_size(stream.stream_id)
            while stream.waiting and room > 0:
                size = min(stream.waiting, len(BULK))
                stream.waiting -= size
                room -= size
                core.send_stream(stream.stream_id, BULK[:size], not stream.waiting)
            if not stream.waiting:
                del self.bulk[stream]

    def _flush(self) -> None:
        self._due = False
        core = self.core
        if core is None or not self.alive:
            return
        if self.bulk:
            self._pump()
        now = self._transmit()
        timer = core.get_timer()
        if timer is None:
            return
        deadline = max(timer[1], now + TIMER_RESOLUTION)
        if self._timer is None or deadline < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = deadline
            self._timer = self.loop.call_later(deadline - now, self._on_timer)

    def _transmit(self) -> float:
        """Send what may be sent; returns the time.

        Called after every event that made a stream say something: visitors do not wait for each other, and what a
        connector saves by messages that share packets would be a present of this edge. quic-go does likewise: its
        sender runs as soon as the writer of a stream blocks.
        """
        now = time.perf_counter()
        self.dirty = False
        poll = self.core.poll_transmit
        for _ in range(FLUSH_ROUNDS):
            datagrams: list[bytes] = []
            while len(datagrams) < GSO_SEGMENTS and (transmit := poll(now)) is not None:
                datagrams.append(transmit[0])
            if datagrams:
                self._listener.send(datagrams, self._address)
            if len(datagrams) < GSO_SEGMENTS:
                break
        else:
            self.wake()
        return now

    def _on_timer(self) -> None:
        self._timer = None
        if self.alive:
            now = time.perf_counter()
            timer = self.core.get_timer()
            if timer is not None and timer[1] <= now + TIMER_RESOLUTION / 2:
                if self._established:
                    self.core.handle_timer(now)
                else:
                    self._connection.handle_timer(now)
            self.settle(self.now)

    def _end(self) -> None:
        if self.alive:
            self.alive = False
            if self._timer is not None:
                self._timer.cancel()
            streams, self.streams = self.streams, {}
            self.bulk.clear()
            for stream in streams.values():
                stream.user.on_reset()
            self._listener.forget(self._address)
            self._on_lost(self)


class QuicListener:
    """One UDP socket for all connectors, which are told apart by their addresses: none of them moves."""

    def __init__(
        self,
        configuration: QuicConfiguration,
        on_control: Callable[[QuicLoadLink, QuicLoadStream], StreamUser],
        on_lost: Callable[[QuicLoadLink], None],
    ) -> None:
        self.configuration = configuration
        self._on_control = on_control
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._links: dict[Address, QuicLoadLink] = {}
        self._buffer = bytearray(READ_SIZE)
        self._view = memoryview(self._buffer)
        self._unsent: deque[tuple[Sequence[bytes], Address]] = deque(maxlen=1024)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        for usual, forced in ((socket.SO_RCVBUF, 33), (socket.SO_SNDBUF, 32)):
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, forced, SOCKET_BUFFER)
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, usual, SOCKET_BUFFER)
        self._socket.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
        self._socket.bind(("127.0.0.1", 0))

    def listen(self) -> int:
        """Begin; returns the port."""
        self._loop.add_reader(self._socket, self._read)
        return int(self._socket.getsockname()[1])

    def close(self) -> None:
        """Give the port back."""
        for link in list(self._links.values()):
            link.close()
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def forget(self, address: Address) -> None:
        """A connection is over."""
        self._links.pop(address, None)

    def send(self, datagrams: list[bytes], address: Address) -> None:
        """Send in order, equally long ones in one call."""
        start = 0
        while start < len(datagrams):
            segment = len(datagrams[start])
            stop, total = start + 1, segment
            most = GSO_BYTES // segment
            while stop < len(datagrams) and stop - start < most:
                size = len(datagrams[stop])
                if size > segment:
                    break
                stop += 1
                total += size
                if size < segment:
                    break
            self._send(datagrams[start:stop], address)
            start = stop

    def _send(self, group: Sequence[bytes], address: Address) -> None:
        ancillary = [(socket.IPPROTO_UDP, _UDP_SEGMENT, _SEGMENT.pack(len(group[0])))] if len(group) > 1 else []
        try:
            self._socket.sendmsg(group, ancillary, 0, address)
        except BlockingIOError:
            if not self._unsent:
                self._loop.add_writer(self._socket, self._write)
            self._unsent.append((group, address))
        except OSError:
            pass  # the connector's process is gone; its time runs out

    def _write(self) -> None:
        self._loop.remove_writer(self._socket)
        unsent, self._unsent = self._unsent, deque(maxlen=self._unsent.maxlen)
        for group, address in unsent:
            self._send(group, address)

    def _read(self) -> None:
        sock, buffer, view, links = self._socket, self._buffer, self._view, self._links
        touched: dict[QuicLoadLink, None] = {}
        now = time.perf_counter()
        for _ in range(READ_BURST):
            try:
                size, ancillary, _, address = sock.recvmsg_into([buffer], _ANCILLARY)
            except BlockingIOError:
                break
            except OSError:
                continue
            segment = size
            for _, kind, value in ancillary:
                if kind == _UDP_GRO:
                    segment = int.from_bytes(value, "little")
            link = links.get(address)
            if buffer[0] & 0xF0 == 0xC0:
                link = self._by_initial(link, bytes(view[:size]), address)
            if link is None:
                continue
            link.receive(bytes(view[:size]), segment, now)
            touched[link] = None
        for link in touched:
            link.settle(now)

    def _by_initial(self, link: QuicLoadLink | None, data: bytes, address: Address) -> QuicLoadLink | None:
        """The link of an Initial packet; another try from the same port makes another one."""
        at = 6 + data[5]
        wanted = data[6:at]
        if link is not None and wanted in link.ids:
            return link
        if link is not None:
            link.abort()
        if len(data) < 1200:
            return None
        source = data[at + 1 : at + 1 + data[at]]
        link = self._links[address] = QuicLoadLink(self, wanted, source, address, self._on_control, self._on_lost)
        return link


def initial_keys(first_id: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Key, IV and header protection key of the client's and the server's Initial packets (RFC 9001 5.2)."""
    common = hmac.digest(INITIAL_SALT, first_id, "sha256")
    found = []
    for who in (b"client in", b"server in"):
        secret = _expand(common, who, 32)
        found.append(
            (_expand(secret, b"quic key", 16), _expand(secret, b"quic iv", 12), _expand(secret, b"quic hp", 16))
        )
    return found


def _expand(secret: bytes, label: bytes, size: int) -> bytes:
    """HKDF-Expand-Label of TLS 1.3, for at most one block."""
    label = b"tls13 " + label
    return hmac.digest(secret, size.to_bytes(2) + bytes([len(label)]) + label + b"\0\1", "sha256")[:size]


def connect_request(fields: Fields, ray: bytes) -> bytes:
    """Preamble and ConnectRequest of what would open a request over HTTP/2."""
    known = dict(fields)
    if TCP_SOURCE in known:
        return DATA_PREAMBLE + encode_connect_request(TCP, known[b":authority"], ((b"FlowID", ray),))
    kind = WEBSOCKET if UPGRADE in known else 0
    metadata = [(b"HttpMethod", known[b":method"]), (b"HttpHost", known[b":authority"])]
    for name, value in fields:
        if not name.startswith(b":") and name != UPGRADE:
            metadata.append((b"HttpHeader:" + b"-".join(part.capitalize() for part in name.split(b"-")), value))
    metadata.append((b"HttpHeader:Cf-Ray", ray))
    dest = known[b":scheme"] + b"://" + known[b":authority"] + known[b":path"]
    return DATA_PREAMBLE + encode_connect_request(kind, dest, metadata)


class _Configuration(QuicConfiguration):
    """With a loader of its own: the library's loses the last line break, and with it every third certificate."""

    def load_cert_chain(self, certfile: Any, keyfile: Any = None, password: Any = None) -> None:
        """Take a file of certificates and, last, their key."""
        text = Path(certfile).read_text("ascii")
        mark = "-----BEGIN PRIVATE KEY-----"
        chain, _, key = text.partition(mark)
        ends = "-----END CERTIFICATE-----"
        ders = [ssl.PEM_cert_to_DER_cert(part.strip() + "\n" + ends) for part in chain.split(ends) if part.strip()]
        self.certificate, *self.certificate_chain = map(Certificate, ders)
        self.private_key = load_pem_private_key((mark + key).encode())


def configuration() -> QuicConfiguration:
    """How the edge does QUIC."""
    return _Configuration(
        alpn_protocols=["argotunnel"],
        is_client=False,
        idle_timeout=30.0,
        max_data=LINK_WINDOW,
        max_stream_data=STREAM_WINDOW,
        max_datagram_size=PACKET_SIZE,
        max_datagram_frame_size=MAX_DATAGRAM_FRAME,
        probe_datagram_size=False,
    )
