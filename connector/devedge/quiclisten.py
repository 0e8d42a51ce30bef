"""The UDP socket of the edge side: datagrams to their connections, and theirs out.

Owns: the socket, the table of connection IDs, the datagrams that the kernel does not take at once.
In: datagrams. Out: `QuicLink`s, made by the first datagram of each connection.
Never: looks behind the header of a packet. Loads aioquic with the first datagram, not before.

*Strategy*: bound to all addresses (0.0.0.0, ::) the kernel would answer from the one that routing picks, which a
connector that asked another never hears. So each datagram's own address is asked for with it, and goes with the answer.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import socket
import struct
import sys
from collections import deque
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from connector.devedge.authority import EDGE_LEAF_NAMES, Authority, keylog_name
from connector.devedge.connectors import Roster
from connector.errors import ConfigError
from connector.transport.readiness import Readiness

if TYPE_CHECKING:
    from aioquic.quic.configuration import QuicConfiguration

    from connector.devedge.quicsession import QuicSession

READ_BURST = 64
"""Datagrams of one wake-up, before everything that they caused is sent."""

SOCKET_BUFFER = 4 * 1024 * 1024
"""Asked of the kernel for either direction; it may give less. quic-go asks for 7 MiB."""

SEND_QUEUE = 1024
"""Datagrams that wait for the socket; more are dropped, and loss recovery sends their content again."""

CID_LENGTH = 8

AIOQUIC = "1.7."
"""Versions whose private parts quicsession.py and quictls.py know; with 1.3 handshakes hang."""


_PKTINFO4 = 8
"""IP_PKTINFO of Linux; Python names it since 3.12."""
_INFO4 = struct.Struct("=i4s4s")  # interface, local address, the address in the header
_INFO6 = struct.Struct("=16si")  # address in the header, interface


class Route(NamedTuple):
    """Where a datagram came from and which of this machine's addresses it came to: what the answer has to follow."""

    host: str
    port: int
    peer: tuple[Any, ...]
    """As the socket wants it."""
    local: bytes
    """As the kernel wants it, in `IP_PKTINFO` or `IPV6_PKTINFO`."""


def _answering(info: bytes) -> bytes:
    """Turn what the kernel says of a datagram into what makes it answer from there, whatever the interface."""
    if len(info) == _INFO4.size:
        return _INFO4.pack(0, _INFO4.unpack(info)[1], bytes(4))
    address, interface = _INFO6.unpack(info)
    return _INFO6.pack(address, interface if IPv6Address(address).is_link_local else 0)


class QuicListener:
    """One UDP socket. `listen`, then `close`. To its sessions an address is opaque, with host and port first."""

    def __init__(self, roster: Roster, authority: Authority, datagram_size: int) -> None:
        self._roster = roster
        self._authority = authority
        self._datagram_size = datagram_size
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._ready: Readiness | None = None
        self._info: tuple[int, int] | None = None
        """Level and type of the ancillary data that names the own address; None when there is only one."""
        self._sessions: dict[bytes, QuicSession] = {}
        self._configuration: QuicConfiguration | None = None
        self._keylog: TextIO | None = None
        self._unsent: deque[tuple[bytes, Any]] = deque(maxlen=SEND_QUEUE)

    def listen(self, host: str, port: int, family: int) -> None:
        """Take the port; raises OSError, and ConfigError without aioquic."""
        try:
            found = importlib.metadata.version("aioquic")
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if not found.startswith(AIOQUIC):
            raise ConfigError(
                f"QUIC on the edge side needs aioquic {AIOQUIC}x, and there is {found}",
                advice="Install that version, or start with --no-quic.",
            )
        sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if ip_address(host).is_unspecified:
                self._info = _ask_for_addresses(sock, family)
            sock.bind((host, port))
        except BaseException:
            sock.close()
            raise
        self._socket = sock
        self._ready = Readiness(sock, self._loop, on_readable=self._read, on_writable=self._write)
        self._ready.read(True)

    def close(self) -> None:
        """Give the port back; the connections are closed already."""
        if self._socket is not None and self._ready is not None:
            self._ready.close()
            self._socket.close()
            self._socket = None
        if self._keylog is not None:
            self._keylog.close()
            self._keylog = None

    # From the kernel.

    def _read(self) -> None:
        touched: dict[QuicSession, None] = {}
        for _ in range(READ_BURST):
            if self._socket is None:
                break
            try:
                data, address = self._receive(self._socket)
            except BlockingIOError:
                break
            except OSError:
                continue  # an ICMP error of some earlier datagram
            session = None
            if self._roster.faults.loss and self._roster.faults.loses():
                continue
            if data and not data[0] & 0x80:
                session = self._sessions.get(data[1 : 1 + CID_LENGTH])
            elif data:
                session = self._by_long_header(data, address)
            if session is not None and self._guarded(session, session.receive, data, address):
                touched[session] = None
        for session in touched:
            self._guarded(session, session.settle)

    def _receive(self, sock: socket.socket) -> tuple[bytes, Any]:
        if self._info is None:
            return sock.recvfrom(65_536)
        data, ancillary, _, peer = sock.recvmsg(65_536, socket.CMSG_SPACE(_INFO6.size))
        local = next((_answering(value) for level, kind, value in ancillary if (level, kind) == self._info), b"")
        return data, Route(peer[0], peer[1], peer, local)

    def _by_long_header(self, data: bytes, address: Any) -> QuicSession | None:
        from connector.devedge import quicsession  # noqa: PLC0415 - heavy, and needed by connectors over QUIC only
        from connector.devedge.quiclink import QuicLink  # noqa: PLC0415

        known = quicsession.destination(data)
        if known is None:
            return None
        connection_id, opens, answer = known
        session = self._sessions.get(connection_id)
        if session is not None:
            return session
        if answer is not None:
            if opens or len(data) >= 1200:
                self.send(answer, address)
            return None
        if not opens:
            return None
        if self._configuration is None:
            self._configuration = quicsession.configuration(self._datagram_size)
            self._authority.load_leaf(self._configuration, EDGE_LEAF_NAMES)
            name = keylog_name()
            if name is not None:
                self._keylog = open(name, "a", encoding="ascii")  # noqa: SIM115  (closed with the socket)
                self._configuration.secrets_log_file = self._keylog
        return QuicLink(self._roster, self, self._configuration, connection_id)

    def _guarded(self, session: QuicSession, call: Any, *args: Any) -> bool:
        """One connection's trouble must not be another's: what the library raises ends that connection."""
        try:
            call(*args)
        except Exception as error:
            self._loop.call_exception_handler({"message": "dev edge: a QUIC connection failed", "exception": error})
            session.fail(error)
            return False
        return True

    # Owner of the sessions.

    def send(self, data: bytes, address: Any) -> None:
        """Send a datagram, now or when the socket takes it."""
        if self._roster.faults.loss and self._roster.faults.loses():
            return
        if self._unsent:
            self._unsent.append((data, address))
        elif self._socket is not None and self._ready is not None:
            try:
                self._send(self._socket, data, address)
            except BlockingIOError:
                self._unsent.append((data, address))
                self._ready.write(True)
            except OSError:
                pass  # no route, too large: as good as lost

    def _write(self) -> None:
        while self._unsent and self._socket is not None:
            data, address = self._unsent[0]
            try:
                self._send(self._socket, data, address)
            except BlockingIOError:
                return
            except OSError:
                pass
            self._unsent.popleft()
        if self._ready is not None:
            self._ready.write(False)

    def _send(self, sock: socket.socket, data: bytes, address: Any) -> None:
        if self._info is not None and address.local:
            sock.sendmsg([data], [(*self._info, address.local)], 0, address.peer)
        else:
            sock.sendto(data, address if self._info is None else address.peer)

    def add_id(self, connection_id: bytes, session: QuicSession) -> None:
        """Route a connection ID."""
        self._sessions[connection_id] = session

    def drop_id(self, connection_id: bytes) -> None:
        """Route it no more."""
        self._sessions.pop(connection_id, None)


def _ask_for_addresses(sock: socket.socket, family: int) -> tuple[int, int] | None:
    """Have the kernel say where each datagram came to; None on systems where that is not known how."""
    if sys.platform != "linux":
        return None
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        return socket.IPPROTO_IPV6, socket.IPV6_PKTINFO
    sock.setsockopt(socket.IPPROTO_IP, _PKTINFO4, 1)
    return socket.IPPROTO_IP, _PKTINFO4
