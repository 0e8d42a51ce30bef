"""The UDP socket of the edge side: datagrams to their connections, and theirs out.

Owns: the socket, the table of connection IDs, the datagrams that the kernel does not take at once.
In: datagrams. Out: `QuicLink`s, made by the first datagram of each connection.
Never: looks behind the header of a packet. Loads aioquic with the first datagram, not before.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import socket
from collections import deque
from typing import TYPE_CHECKING, Any, TextIO

from connector.devedge.authority import EDGE_LEAF_NAMES, Authority, keylog_name
from connector.devedge.connectors import Roster
from connector.errors import ConfigError

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


class QuicListener:
    """One UDP socket. `listen`, then `close`."""

    def __init__(self, roster: Roster, authority: Authority, datagram_size: int) -> None:
        self._roster = roster
        self._authority = authority
        self._datagram_size = datagram_size
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
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
            sock.bind((host, port))
        except BaseException:
            sock.close()
            raise
        self._socket = sock
        self._loop.add_reader(sock, self._read)

    def close(self) -> None:
        """Give the port back; the connections are closed already."""
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
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
                data, address = self._socket.recvfrom(65_536)
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
        elif self._socket is not None:
            try:
                self._socket.sendto(data, address)
            except BlockingIOError:
                self._unsent.append((data, address))
                self._loop.add_writer(self._socket, self._write)
            except OSError:
                pass  # no route, too large: as good as lost

    def _write(self) -> None:
        while self._unsent and self._socket is not None:
            data, address = self._unsent[0]
            try:
                self._socket.sendto(data, address)
            except BlockingIOError:
                return
            except OSError:
                pass
            self._unsent.popleft()
        if self._socket is not None:
            self._loop.remove_writer(self._socket)

    def add_id(self, connection_id: bytes, session: QuicSession) -> None:
        """Route a connection ID."""
        self._sessions[connection_id] = session

    def drop_id(self, connection_id: bytes) -> None:
        """Route it no more."""
        self._sessions.pop(connection_id, None)
