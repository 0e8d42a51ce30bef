"""A connected UDP socket for one QUIC link: batched reads and writes.

Owns: the socket, its options, GRO on receive, GSO on send, what the kernel did not take yet.
In: an address; datagrams to send. Out: buffers of equally long datagrams; OSErrors that mean something.
Never: looks into a datagram, sets timers, makes a task.

*Strategy*: one wake-up reads until there is nothing left (at most READ_BURST times) and hands whole GRO buffers over; a
run of equally long datagrams goes out in one sendmsg. Kernel support for GSO does not mean that the way out has it: the
first EIO or EINVAL turns it off. EMSGSIZE is what an MTU probe that is too large gets, and is no error.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Sequence

from connector.errors import EdgeDialError
from connector.transport.link import format_address

READ_BURST = 32
"""Reads of one wake-up; with GRO up to 2 MB. More waits for the next loop turn. Precedents: quinn and qh3 32."""

READ_SIZE = 65_536
"""Bytes of one read; the largest GRO buffer."""

SOCKET_BUFFER = 4 * 1024 * 1024
"""Asked of the kernel for either direction; it gives less (Linux by default 208 KiB). Precedent: quic-go 7 MiB."""

SEND_QUEUE = 1_024
"""Datagrams kept while the kernel takes none; older QUIC packets are worth less than newer ones, so more are dropped
and loss recovery sends them again."""

_TRUNCATED = int(socket.MSG_TRUNC)  # as an enum, each test of it would be three calls

GSO_SEGMENTS = 64
GSO_BYTES = 65_000

_SOL_UDP = 17
_UDP_SEGMENT = 103
_UDP_GRO = 104
_MTU_DISCOVER = ((socket.AF_INET, socket.IPPROTO_IP, 10, 3), (socket.AF_INET6, socket.IPPROTO_IPV6, 23, 3))  # PROBE
_GSO_UNSUPPORTED = {errno.EIO, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOPROTOOPT}
_ANCILLARY = socket.CMSG_SPACE(4) if hasattr(socket, "CMSG_SPACE") else 0
_SEGMENT = struct.Struct("=H")
_GRO_SIZE = struct.Struct("=i")
_LINUX = sys.platform == "linux"


def open_udp(address: tuple[str, int], family: int, local: tuple[str, int] | None) -> socket.socket:
    """Return a non-blocking UDP socket, bound to `local` (or to a new port if its port is taken) and connected.

    Errors: OSError.
    """
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            try:
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
            except OSError:
                pass
        if _LINUX:
            for wanted, level, option_number, value in _MTU_DISCOVER:
                if wanted == family:
                    _maybe_set(sock, level, option_number, value)
            _maybe_set(sock, _SOL_UDP, _UDP_GRO, 1)
        if local is not None:
            try:
                sock.bind(local)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not local[1]:
                    raise
                sock.bind((local[0], 0))
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _maybe_set(sock: socket.socket, level: int, option: int, value: int) -> bool:
    try:
        sock.setsockopt(level, option, value)
    except OSError:
        return False
    return True


def has_gso(sock: socket.socket) -> bool:
    """Whether the kernel knows UDP segmentation."""
    if not _LINUX or not hasattr(sock, "sendmsg"):
        return False
    # A value set for the whole socket would cut plain sends too: only look, then take it back.
    return _maybe_set(sock, _SOL_UDP, _UDP_SEGMENT, 1200) and _maybe_set(sock, _SOL_UDP, _UDP_SEGMENT, 0)


class UdpSocket:
    """Owns `sock` from now on. `on_readable` is called when `receive` will find something; close it with `close`.

    `on_writable` is called when the kernel takes datagrams again after `send` returned False.
    """

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        *,
        on_readable: Callable[[], None],
        on_writable: Callable[[], None],
    ) -> None:
        self._sock = sock
        self._loop = loop
        self._on_readable_call = on_readable
        self._on_writable_call = on_writable
        self._queue: deque[tuple[list[bytes], int]] = deque()
        self._queued = 0
        self._gso = has_gso(sock)
        self._buffer = bytearray(READ_SIZE)
        self._view = memoryview(self._buffer)
        self._closed = False
        self.error: OSError | None = None
        """The last error that the kernel reported about the way to the peer (ICMP); cleared by whoever looks at it."""
        self.dropped = 0
        self.bytes_received = 0
        self.bytes_sent = 0
        loop.add_reader(sock, on_readable)

    def __repr__(self) -> str:
        return f"<UdpSocket {'closed' if self._closed else f'{self._queued} datagrams waiting'}>"

    @property
    def blocked(self) -> bool:
        """Whether the kernel takes no datagrams now."""
        return bool(self._queue)

    @property
    def gso(self) -> bool:
        """Whether runs of datagrams go out in one call."""
        return self._gso

    def close(self) -> None:
        """Close the socket; what waits is lost. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock)
        if self._queue:
            self._loop.remove_writer(self._sock)
            self._queue.clear()
        self._sock.close()

    # --- receiving -------------------------------------------------------------------------------------------------

    def receive(self, take: Callable[[bytes, int], None]) -> int:
        """Read what is there; call `take(buffer, datagram size)` for each read. Return how many reads brought data."""
        reads = 0
        failed = False
        read = self._read_gro if _LINUX else self._read_plain
        while reads < READ_BURST and not self._closed:
            try:
                data, segment = read()
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self.error = error  # an ICMP answer to something sent before; the next read may bring data
                reads += 1
                failed = True
                continue
            reads += 1
            if data:
                self.bytes_received += len(data)
                take(data, segment)
        if failed or not reads:
            self._loop.call_soon(self._watch_again)
        return reads

    def _watch_again(self) -> None:
        """uvloop stops watching a socket by itself once that had an error, also one that `send` has taken since."""
        if not self._closed:
            self._loop.remove_reader(self._sock)
            self._loop.add_reader(self._sock, self._on_readable_call)

    def _read_gro(self) -> tuple[bytes, int]:
        size, ancillary, flags, _ = self._sock.recvmsg_into([self._buffer], _ANCILLARY)
        if flags & _TRUNCATED:
            return b"", 0
        segment = size
        for level, kind, value in ancillary:
            if level == _SOL_UDP and kind == _UDP_GRO:
                segment = _GRO_SIZE.unpack(value)[0] if len(value) == 4 else _SEGMENT.unpack_from(value)[0]
        return bytes(self._view[:size]), segment

    def _read_plain(self) -> tuple[bytes, int]:
        data = self._sock.recv(READ_SIZE)
        return data, len(data)

    # --- sending ---------------------------------------------------------------------------------------------------

    def send(self, datagrams: Sequence[bytes]) -> bool:
        """Send in order; False when the kernel does not take more now (what is left waits here)."""
        if self._closed or not datagrams:
            return not self._closed
        groups = _runs(datagrams) if self._gso else [([datagram], len(datagram)) for datagram in datagrams]
        if self._queue:
            self._keep(groups)
            return False
        for place, (group, segment) in enumerate(groups):
            if not self._send_group(group, segment):
                self._keep(groups[place:])
                return False
        return True

    def _send_group(self, group: list[bytes], segment: int) -> bool:
        """Send one run; False when the kernel would block. Errors of the network drop the run."""
        sock = self._sock
        try:
            if len(group) == 1:
                self.bytes_sent += sock.send(group[0])
            else:
                self.bytes_sent += sock.sendmsg(group, [(_SOL_UDP, _UDP_SEGMENT, _SEGMENT.pack(segment))])
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            if len(group) > 1 and error.errno in _GSO_UNSUPPORTED:
                self._gso = False
                for place, datagram in enumerate(group):
                    if not self._send_group([datagram], len(datagram)):
                        self._keep([([left], len(left)) for left in group[place:]])
                        return True
            elif error.errno == errno.EMSGSIZE:
                self.dropped += len(group)  # an MTU probe; loss recovery learns from the silence
            elif error.errno == errno.ENOBUFS:
                self.dropped += len(group)
            else:
                self.error = error
                if error.errno == errno.ECONNREFUSED:
                    # The error belongs to an earlier datagram; this one was not sent.
                    try:
                        sock.send(group[0])
                    except OSError:
                        pass
                self.dropped += len(group)
        return True

    def _keep(self, groups: list[tuple[list[bytes], int]]) -> None:
        was_empty = not self._queue
        for group in groups:
            if self._queued >= SEND_QUEUE:
                self.dropped += len(group[0])
                continue
            self._queue.append(group)
            self._queued += len(group[0])
        if was_empty and self._queue:
            self._loop.add_writer(self._sock, self._on_writable)

    def _on_writable(self) -> None:
        queue = self._queue
        while queue:
            group, segment = queue.popleft()
            self._queued -= len(group)
            if not self._send_group(group, segment):
                queue.appendleft((group, segment))
                self._queued += len(group)
                return
        self._loop.remove_writer(self._sock)
        self._on_writable_call()


def _runs(datagrams: Sequence[bytes]) -> list[tuple[list[bytes], int]]:
    """Cut `datagrams` into runs for GSO: all of one length, but the last of a run may be shorter."""
    runs: list[tuple[list[bytes], int]] = []
    group: list[bytes] = []
    segment = total = 0
    ended = True
    for datagram in datagrams:
        size = len(datagram)
        if ended or size > segment or len(group) >= GSO_SEGMENTS or total + size > GSO_BYTES:
            group = []
            segment, total = size, 0
            runs.append((group, segment))
            ended = False
        group.append(datagram)
        total += size
        ended = ended or size < segment
    return runs


UDP_ADVICE = (
    "Check network and firewall: the connector needs outgoing UDP to port 7844 of the edge, or --protocol http2."
)


def explain_udp_error(error: OSError, host: str, port: int, local: tuple[str, int] | None) -> EdgeDialError:
    """Return the EdgeDialError for a UDP socket that could not be set up or whose first packets bounced."""
    peer = format_address(host, port)
    text = error.strerror or str(error)
    if error.errno == errno.ECONNREFUSED:
        return EdgeDialError(
            f"{peer} refuses UDP packets",
            advice="Nothing listens there for QUIC: check host and port of --edge; a dev edge must be running.",
        )
    if error.errno in {errno.EADDRNOTAVAIL, errno.EADDRINUSE, errno.EINVAL} and local is not None:
        return EdgeDialError(
            f"cannot bind {format_address(*local)} to reach {peer} by UDP: {text}",
            advice="--edge-bind-address must be an address of this machine, of the same family as the edge's.",
        )
    failure = EdgeDialError(f"cannot send UDP to {peer}: {text}", advice=UDP_ADVICE)
    failure.forbidden = error.errno in {errno.EPERM, errno.EACCES}
    return failure
