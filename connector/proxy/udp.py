"""Private networks over datagrams: the sockets of UDP flows, and what one process needs to serve them.

Owns: the connected sockets, the timer of the idle wheel, the sink of each link.
In: links that want a sink; datagrams and RPC through it. Out: datagrams to origins and to the edge.
Never: a task, future or queue per flow or packet; reads what flows carry.

*Strategy*: a flow's socket has one reader on the loop, which takes a few datagrams at a time and hands them to the link
directly. When the link takes no more the reader leaves until there is room, so that the kernel's buffer, which has an
end, is what fills and drops. Sending is the same the other way: a socket that takes no more has a short queue with a
short time.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from ipaddress import ip_address
from typing import Final
from uuid import UUID

from connector.protocol.datagrams import DatagramsV2, DatagramsV3, OnEvent, Shared, UdpFlow
from connector.protocol.idle_wheel import IdleWheel
from connector.protocol.ports import DatagramPort
from connector.proxy.flows import Flows
from connector.proxy.icmp import FlowTracing, IcmpProxy
from connector.proxy.session_end import SessionEnd
from connector.wire.otlp import OK

READ_SIZE: Final = 1500
"""Bytes read of one datagram; what is longer than MAX_PAYLOAD is dropped anyway. Precedent: cloudflared."""

READ_BATCH: Final = 16
"""Datagrams of one flow in one loop turn, so that flows take turns."""

WRITE_QUEUE: Final = 512
"""Payloads that wait for an origin's socket; more are dropped. Precedent: cloudflared's version 3."""

WRITE_SECONDS: Final = 0.2
"""Age at which a waiting payload is dropped: late is as bad as lost. Precedent: cloudflared."""


class UdpOrigin:
    """The connected socket of one flow. Implements FlowOrigin."""

    __slots__ = ("_flow", "_loop", "_queue", "_reading", "_socket", "_writing")

    def __init__(self, flow: UdpFlow, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._flow = flow
        self._socket = sock
        self._loop = loop
        self._queue: deque[tuple[float, bytes]] | None = None
        self._reading = True
        self._writing = False
        loop.add_reader(sock, self._on_readable)

    @property
    def local_address(self) -> str:
        """See FlowOrigin."""
        host, port = self._socket.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def send(self, payload: bytes, now: float) -> None:
        """See FlowOrigin."""
        if self._writing:
            self._enqueue(payload, now)
            return
        try:
            self._socket.send(payload)
        except BlockingIOError:
            self._enqueue(payload, now)
        except OSError as error:
            self._on_error(error)

    def resume_reading(self) -> None:
        """See FlowOrigin."""
        if not self._reading and self._socket.fileno() >= 0:
            self._reading = True
            self._loop.add_reader(self._socket, self._on_readable)

    def close(self) -> None:
        """See FlowOrigin."""
        if self._socket.fileno() < 0:
            return
        if self._reading:
            self._loop.remove_reader(self._socket)
        if self._writing:
            self._loop.remove_writer(self._socket)
        self._queue = None
        self._socket.close()

    def _enqueue(self, payload: bytes, now: float) -> None:
        if self._queue is None:
            self._queue = deque()
        if len(self._queue) >= WRITE_QUEUE:
            self._flow.drop("write_full")
            return
        self._queue.append((now + WRITE_SECONDS, payload))
        if not self._writing:
            self._writing = True
            self._loop.add_writer(self._socket, self._on_writable)

    def _on_writable(self) -> None:
        now = self._loop.time()
        queue = self._queue
        while queue:
            deadline, payload = queue[0]
            if deadline < now:
                self._flow.drop("write_deadline_exceeded")
            else:
                try:
                    self._socket.send(payload)
                except BlockingIOError:
                    return
                except OSError as error:
                    self._on_error(error)
                    if self._queue is None:
                        return
            queue.popleft()
        self._writing = False
        self._loop.remove_writer(self._socket)

    def _on_readable(self) -> None:
        flow = self._flow
        recv = self._socket.recv
        port = flow.end.port
        now = self._loop.time()
        for _ in range(READ_BATCH):
            if port is None or port.datagram_room <= 0:
                self._reading = False
                self._loop.remove_reader(self._socket)
                flow.end.pause(flow)
                return
            try:
                payload = recv(READ_SIZE)
            except BlockingIOError:
                return
            except OSError as error:
                self._on_error(error)
                return
            flow.answer(payload, now)

    def _on_error(self, error: OSError) -> None:
        """The kernel has bad news. A payload too long for the way is lost alone; everything else ends the flow."""
        if isinstance(error, ConnectionRefusedError) or error.errno not in _LOST_ALONE:
            self._flow.failed(error)
        else:
            self._flow.drop("write_failed")


def _lost_alone() -> frozenset[int]:
    import errno  # noqa: PLC0415  (constants only)

    return frozenset((errno.EMSGSIZE, errno.ENOBUFS, errno.EPERM))


_LOST_ALONE: Final = _lost_alone()


class PrivateNetwork:
    """Datagrams of one process, over all its links. `open_sink` for every QUIC link; `close` at the end.

    `icmp` is None where the system allows no ping sockets.
    """

    def __init__(
        self,
        flows: Flows,
        loop: asyncio.AbstractEventLoop,
        *,
        icmp: IcmpProxy | None = None,
        tracing: FlowTracing | None = None,
        on_event: OnEvent = lambda level, message, fields: None,
        on_started: Callable[[UdpFlow], None] | None = None,
    ) -> None:
        self._flows = flows
        self._loop = loop
        self._icmp = icmp
        self._tracing = tracing
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._wheel = IdleWheel(loop.time())
        self._shared = Shared(
            open_origin=self._open,
            slots=flows.limiter,
            wheel=self._wheel,
            wake=self.wake,
            on_event=on_event,
            on_started=on_started,
        )
        if icmp is not None:
            icmp.start(self._wheel, self.wake, on_event, tracing)

    @property
    def watched(self) -> int:
        """How many flows, ICMP included, are alive."""
        return self._wheel.size

    def open_sink(self, conn_index: int, version: int) -> LinkDatagrams:
        """Make the sink of a link that is about to be dialled; `version` is 2 or 3."""
        icmp = self._icmp.request if self._icmp is not None else None
        end: DatagramsV2 | DatagramsV3
        if version == 3:
            end = DatagramsV3(self._shared, conn_index, icmp)
        else:
            end = DatagramsV2(self._shared, conn_index, icmp, self._tell_end)
        return LinkDatagrams(end, self._loop, self._icmp, self._tracing)

    def moved_away(self, flow_id: bytes, began: float) -> bool:
        """See Shared.moved_away."""
        return self._shared.moved_away(flow_id, began)

    async def close(self) -> None:
        """End the timer and what looks for a resolver; flows ended with their links."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._icmp is not None:
            self._icmp.close()
        await self._flows.dns.close()

    def wake(self) -> None:
        """See that the wheel's timer fires when something is due."""
        due = self._wheel.next_due()
        if due is None:
            return
        if self._timer is not None:
            if self._timer_at <= due:
                return
            self._timer.cancel()
        self._timer_at = due
        self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        # The loop's clock may be a hair early.
        self._wheel.advance(max(self._loop.time(), self._timer_at))
        self.wake()

    def _open(self, flow: UdpFlow) -> None:
        resolver = self._flows.dns.maybe_resolver(flow.address, flow.port, tcp=False)
        address, port = resolver if resolver is not None else (flow.address, flow.port)
        sock = socket.socket(socket.AF_INET6 if len(address) == 16 else socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            sock.connect((str(ip_address(address)), port))
            flow.origin = UdpOrigin(flow, sock, self._loop)
        except BaseException:
            sock.close()
            raise

    def _tell_end(self, end: DatagramsV2, session_id: bytes, text: str) -> None:
        if end.port is not None:
            SessionEnd(end.port, session_id, text, self._wheel, self._loop.time())
            self.wake()


class LinkDatagrams:
    """The sink of one link, and its answers to the session RPC. Implements DatagramSink."""

    __slots__ = ("_icmp", "_receive", "_time", "_tracing", "end", "version")

    def __init__(
        self,
        end: DatagramsV2 | DatagramsV3,
        loop: asyncio.AbstractEventLoop,
        icmp: IcmpProxy | None,
        tracing: FlowTracing | None = None,
    ) -> None:
        self.end = end
        self.version = end.version
        self._receive: Callable[[bytes, float], None] = end.receive
        self._time = loop.time
        self._tracing = tracing
        self._icmp = icmp

    def attach(self, port: DatagramPort) -> None:
        """See DatagramSink."""
        self.end.attach(port)

    def on_datagram(self, data: bytes) -> None:
        """See DatagramSink."""
        self._receive(data, self._time())

    def on_datagram_room(self) -> None:
        """See DatagramSink."""
        self.end.on_datagram_room()

    def on_lost(self) -> None:
        """See DatagramSink."""
        self.end.on_lost()
        if self._icmp is not None:
            self._icmp.lost(self.end)

    def register_udp_session(
        self, session_id: bytes, address: bytes, port: int, idle_nanoseconds: int, trace: str
    ) -> tuple[str, bytes]:
        """See RpcHandlers."""
        traced = self._tracing(trace.encode()) if trace and self._tracing is not None else None
        error = self.end.register_udp_session(session_id, address, port, idle_nanoseconds, self._time())
        if traced is None:
            return error, b""
        target = ip_address(address)
        attributes: list[tuple[str, str | int | bool]] = [
            ("session-id", str(UUID(bytes=session_id))),
            ("dst", f"{getattr(target, 'ipv4_mapped', None) or target}:{port}"),
        ]  # fmt: skip
        flow = self.end.session(session_id) if isinstance(self.end, DatagramsV2) else None
        if flow is not None and flow.origin is not None:
            attributes += [("socket-bind-success", True), ("src", flow.origin.local_address)]
        traced.end("register-session", tuple(attributes), status=OK, error=error)
        return error, b"" if error else traced.spans()

    def unregister_udp_session(self, session_id: bytes, message: str) -> None:
        """See RpcHandlers."""
        self.end.unregister_udp_session(session_id, message)
