"""Streams that lead to a TCP connection: rules with TCP-like services, and private-network flows.

Owns: from the request to the splice: which destination, the dial, the answer, what waits meanwhile, the end.
In: calls of StreamSink and OriginUser. Out: a Splice (private network: raw bytes), a CarriedSplice (rules: WebSocket).
Never: parses frames or SOCKS itself (`carrier.py`, `wire/ws_stream.py`, `socks.py`).

Four kinds: PrivateFlow (address in the request, no rule), CarriedFlow (the rule's address, or a bastion's from the
request), SocksFlow (the address negotiated first; `proxyType: socks` negotiates in front of the rule's address).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import socket
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from connector.errors import ConnectorError, OriginDialError, OriginError, WireError
from connector.protocol.counts import COUNTS
from connector.protocol.ports import Buffer, Headers, Request, ResetCode, StreamPort
from connector.proxy import limits
from connector.proxy.carrier import CarriedSplice, answer_close
from connector.proxy.destinations import Destinations
from connector.proxy.dns_service import CONNECT_SECONDS
from connector.proxy.exchange import Owner
from connector.proxy.flows import Flows
from connector.proxy.go_url import UrlError, parse_url
from connector.proxy.ingress import OriginSettings, Rule, ServiceKind
from connector.proxy.origins import OriginConnection
from connector.proxy.proxy_protocol import client_address
from connector.proxy.reply import AccessDeniedError, BadRequestError, refuse
from connector.proxy.socks import (
    HOST_UNREACHABLE,
    NETWORK_UNREACHABLE,
    NOT_ALLOWED,
    REFUSED,
    SUCCEEDED,
    Destination,
    SocksError,
    SocksServer,
    allowed,
    encode_address,
    encode_reply,
)
from connector.proxy.splice import DrainQueue, Splice
from connector.proxy.watch import RequestTrace
from connector.proxy.ws_pings import PingClock
from connector.transport.daemon_thread import in_daemon_thread
from connector.wire.ws_stream import BINARY, CLOSE, NORMAL, PING, PONG, PROTOCOL_FAILURE, close_frame, encode_frame
from connector.wire.ws_stream import ClientFrames as Frames

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
JUMP_HEADER: Final = b"cf-access-jump-destination"
_NO_JUMP: Final = (
    "Did not receive final destination from client. The --destination flag is likely not set on the client side"
)


class FlowRoute:
    """One rule with a TCP-like service at work, or the private network (`rule` None)."""

    __slots__ = ("carried_drains", "clock", "destinations", "drains", "rule", "settings")

    def __init__(
        self,
        rule: Rule | None,
        settings: OriginSettings,
        destinations: Destinations,
        drains: DrainQueue,
        carried_drains: DrainQueue,
        clock: PingClock,
    ) -> None:
        self.rule = rule
        self.settings = settings
        self.destinations = destinations
        self.drains = drains
        self.carried_drains = carried_drains
        self.clock = clock


def switch_headers(request: Request) -> Headers:
    """Return the head of a 101: the WebSocket handshake's answer where the request has a key, else nothing."""
    key = next((value for name, value in request.headers if name.lower() == b"sec-websocket-key"), b"")
    if not key:
        return ()
    accept = base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())
    return (b"Connection", b"Upgrade"), (b"Sec-Websocket-Accept", accept), (b"Upgrade", b"websocket")


class Flow:
    """One stream and, in time, one TCP connection. What the edge sends before waits unacknowledged."""

    __slots__ = ("_dialled", "_edge_paused", "_eof", "_owner", "_pending", "_route", "_splice", "aborted", "client",
                 "finished", "on_data", "port", "request", "rule", "started", "status", "trace", "whole")  # fmt: skip

    on_data: Callable[[Buffer], None]

    def __init__(self, owner: Owner, request: Request, port: StreamPort, route: FlowRoute) -> None:
        self._owner = owner
        self._route = route
        self.request = request
        self.port = port
        self.rule = route.rule
        self.status = 0
        self.whole = False
        self.aborted = False
        self.finished = False
        self.started = 0.0
        self.trace: RequestTrace | None = None
        self.client = client_address(request.headers) if route.settings.proxy_protocol else None
        self._dialled: tuple[str, int, OriginSettings] | None = None
        self._splice: Splice | None = None
        self._pending: list[bytes] = []
        self._eof = False
        self._edge_paused = False
        self.on_data = self._keep

    def start(self) -> None:
        """Find the destination and dial."""
        try:
            host, port = self._destination()
        except ConnectorError as error:
            self._fail(error)
        else:
            self._dial(host, port, self._route.settings)

    # -- from the edge

    def _keep(self, data: Buffer) -> None:
        self._pending.append(bytes(data))

    def on_eof(self) -> None:
        """End the edge's direction."""
        self._eof = True
        if self._splice is not None:
            self._splice.on_eof()

    def on_reset(self, error: BaseException | None) -> None:
        """Drop the origin connection: the eyeball went away, or the link is gone."""
        self.aborted = True
        if self._splice is not None:
            self._splice.abort()
        self._finish()

    def pause_writing(self) -> None:
        """Stop reading the origin."""
        self._edge_paused = True
        if self._splice is not None:
            self._splice.pause_reading()

    def resume_writing(self) -> None:
        """Read the origin again."""
        self._edge_paused = False
        if self._splice is not None:
            self._splice.resume_reading()

    # -- the dial

    def _destination(self) -> tuple[str, int]:
        raise NotImplementedError

    def _dial(self, host: str, port: int, settings: OriginSettings) -> None:
        self._dialled = (host, port, settings)
        self._route.destinations.dial(self, host, port, settings)

    def on_connected(self, connection: OriginConnection) -> None:
        """Answer, and couple the two."""
        self._answer()
        self._couple(connection)
        pending, self._pending = self._pending, []
        if pending:
            self.on_data(b"".join(pending))
        if self._eof and self._splice is not None:
            self._splice.on_eof()

    def on_dial_failed(self, error: OriginError) -> None:
        """Answer 502."""
        COUNTS.add("cloudflared_proxy_connect_streams_errors")
        self._fail(error)

    def _answer(self) -> None:
        self.status = 101
        if self.started:
            COUNTS.observe("cloudflared_proxy_connect_latency", (monotonic() - self.started) * 1000)
        if self.trace is not None:
            self.port.spans = self.trace.connected()
        self.port.respond(101, switch_headers(self.request))
        self._owner.exchange_answered(self)

    def _couple(self, connection: OriginConnection) -> None:
        connection.user = None
        splice = self._splice = self._make_splice(connection)
        self.on_data = splice.on_data
        connection.transport.set_protocol(splice)
        if self._edge_paused:
            splice.pause_reading()

    def _make_splice(self, connection: OriginConnection) -> Splice:
        return Splice(self.port, connection, self._route.drains, self._done)

    # -- OriginUser: nothing comes before the splice has taken over but the end of a fresh connection

    def on_origin_data(self, data: Buffer) -> None:
        """Nothing: the splice is the transport's protocol."""

    def on_origin_eof(self) -> bool:
        """Nothing: as above."""
        return False

    def on_origin_lost(self, error: Exception | None) -> None:
        """Nothing: as above."""

    def on_origin_full(self) -> None:
        """Nothing: as above."""

    def on_origin_ready(self) -> None:
        """Nothing: as above."""

    # -- ends

    def _done(self) -> None:
        if not self.finished:
            self.whole = True
            self._finish()

    def _fail(self, error: ConnectorError) -> None:
        if self.finished:
            return
        sent = refuse(self.port, error, responded=self.status != 0, reason=self._reason(error))
        if sent:
            self.status = sent
            self.whole = True
        self._owner.exchange_failed(self, error)
        self._finish()

    def _reason(self, error: ConnectorError) -> str:
        return str(error)

    def go_away(self) -> bool:
        """Say that this side leaves, where a WebSocket carries the stream."""
        return self._splice is not None and not self.finished and self._splice.go_away()

    def cancel(self) -> None:
        """End both sides at once: the dispatcher closes."""
        if not self.finished:
            self.port.reset(ResetCode.CANCELLED)
            if self._splice is not None:
                self._splice.abort()
            self._finish()

    def _finish(self) -> None:
        if self.finished:
            return
        self.finished = True
        self.on_data = _ignore
        self._pending = []
        if self._dialled is not None:
            self._route.destinations.leave(self, *self._dialled)
        self._owner.exchange_finished(self)


class PrivateFlow(Flow):
    """A TCP flow of the private network: `ip:port` in the request, raw bytes. Holds a slot of the flow limiter."""

    __slots__ = ("_flows",)

    def __init__(self, owner: Owner, request: Request, port: StreamPort, route: FlowRoute, flows: Flows) -> None:
        super().__init__(owner, request, port, route)
        self._flows = flows

    def _dial(self, host: str, port: int, settings: OriginSettings) -> None:
        packed = ipaddress.ip_address(host.partition("%")[0]).packed
        resolver = self._flows.dns.maybe_resolver(packed, port, tcp=True)
        if resolver is not None:
            host, port = str(ipaddress.ip_address(resolver[0])), resolver[1]
            settings = OriginSettings(connect_timeout=CONNECT_SECONDS, tcp_keep_alive=-1)
        super()._dial(host, port, settings)

    def _reason(self, error: ConnectorError) -> str:
        """Return cloudflared's words before ours."""
        where = self.request.host.decode("latin-1")
        return f"unable to dial tcp to origin {where}: {error}" if isinstance(error, OriginError) else str(error)

    def _destination(self) -> tuple[str, int]:
        return parse_address(self.request.host.decode("latin-1"))

    def _finish(self) -> None:
        if not self.finished:
            self._flows.limiter.release()
        super()._finish()


def parse_address(text: str) -> tuple[str, int]:
    """Read `10.0.0.1:22` or `[fd00::1]:22`; names are no addresses. Errors: BadRequestError."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address(host[1:-1] if bracketed else host)
        if not colon or (address.version == 6) is not bracketed or not (port.isascii() and port.isdigit()):
            raise ValueError
        if int(port[:6]) > 65535:
            raise ValueError
    except ValueError:
        raise BadRequestError(f"unable to dial tcp to origin {text[:128]!r}: that is no address with a port") from None
    return str(address), int(port)


class CarriedFlow(Flow):
    """A TCP-like rule: the bytes are frames of a WebSocket that ends here."""

    __slots__ = ()

    def _destination(self) -> tuple[str, int]:
        assert self.rule is not None
        service = self.rule.service
        if service.kind is ServiceKind.TCP:
            return service.host, service.port
        value = next((value for name, value in self.request.headers if name.lower() == JUMP_HEADER), b"")
        if not value:
            raise BadRequestError(_NO_JUMP, advice="`cloudflared access tcp --destination HOST:PORT` sets the header.")
        return jump_destination(value.decode("utf-8", "surrogateescape"))

    def _make_splice(self, connection: OriginConnection) -> Splice:
        route = self._route
        return CarriedSplice(self.port, connection, route.carried_drains, self._done, Frames(), route.clock)


def jump_destination(text: str) -> tuple[str, int]:
    """Return host and port of a bastion's destination: `host:port`, or a URL. Errors: BadRequestError."""
    where = text
    try:
        where = parse_url(text).host or text
    except UrlError:
        pass
    where = where.partition("/")[0]
    host, colon, port = where.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (":" in bare and bare is host):
        raise BadRequestError(
            f"the jump destination {text[:128]!r} has no port", advice="The client must name HOST:PORT."
        )
    if port.isascii() and port.isdigit() and 0 < int(port[:6]) <= 65535:
        return bare, int(port)
    try:
        return bare, socket.getservbyname(port, "tcp")
    except (OSError, UnicodeError):
        raise BadRequestError(f"the port of the jump destination {text[:128]!r} is no port") from None


class SocksFlow(CarriedFlow):
    """SOCKS5 inside the WebSocket, then the bytes.

    Of a `socks-proxy` rule the client names the destination, and the rule's `ipRules` decide; of a TCP rule with
    `proxyType: socks` the destination is the rule's, whatever the client names.
    """

    __slots__ = ("_connection", "_frames", "_lookup", "_socks", "_timer", "_wanted")

    def __init__(self, owner: Owner, request: Request, port: StreamPort, route: FlowRoute) -> None:
        super().__init__(owner, request, port, route)
        self._frames = Frames()
        self._socks = SocksServer()
        self._wanted: Destination | None = None
        self._lookup: asyncio.Task[str] | None = None
        self._connection: OriginConnection | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Negotiate at once where the client names the destination; dial first where the rule does."""
        assert self.rule is not None
        if self.rule.service.kind is ServiceKind.SOCKS:
            self._negotiate()
        else:
            super().start()

    def _negotiate(self) -> None:
        self._answer()
        self._timer = self._owner.loop.call_later(limits.SOCKS_WAIT, self._too_late)
        self.on_data = self._on_negotiation

    def _too_late(self) -> None:
        self._timer = None
        self._refuse(SocksError(f"no SOCKS request within {limits.SOCKS_WAIT:g} s"))

    def _on_negotiation(self, data: Buffer) -> None:
        """Take frames until the client has said where it wants to go; what comes behind that waits."""
        size = len(data)
        payload = b""
        try:
            for opcode, _, _, part in self._frames.receive(data):
                if opcode == BINARY:
                    payload += part
                elif opcode == PING:
                    self.port.write(encode_frame(PONG, part))
                elif opcode == CLOSE:
                    self._close(answer_close(part))
                    return
        except WireError:
            self._close(close_frame(PROTOCOL_FAILURE))
            return
        if self._wanted is not None:
            if payload:
                self._pending.append(payload)
            self.port.consumed(size - len(payload))
            return
        try:
            reply = self._socks.receive(payload)
        except SocksError as error:
            self._refuse(error)
            return
        if reply:
            self.port.write(encode_frame(BINARY, reply))
        wanted = self._socks.destination
        if wanted is None:
            self.port.consumed(size)
            return
        self._wanted = wanted
        rest = self._socks.rest()
        if rest:
            self._pending.append(rest)
        self.port.consumed(size - len(rest))
        self._stop_timer()
        self._go(wanted)

    def _go(self, wanted: Destination) -> None:
        connection = self._connection
        if connection is not None:
            self._connection = None
            self._succeed(connection)
        elif wanted.address is not None:
            self._judge(wanted)
        else:
            loop = self._owner.loop
            name = wanted.name
            self._lookup = lookup = loop.create_task(in_daemon_thread(lambda: _resolve(name), "look up for SOCKS"))
            lookup.add_done_callback(self._resolved)

    def _resolved(self, lookup: asyncio.Task[str]) -> None:
        wanted = self._wanted
        error = None if lookup.cancelled() else lookup.exception()
        if self.finished or wanted is None or lookup.cancelled():
            return
        if error is not None:
            failed = OriginDialError(f"no such host {str(wanted)!r}: unable to resolve it to check access", cause="dns")
            self._refuse_with(NOT_ALLOWED, wanted.encode(), failed)
            return
        wanted.address = ipaddress.ip_address(lookup.result())
        self._judge(wanted)

    def _judge(self, wanted: Destination) -> None:
        assert self.rule is not None
        assert wanted.address is not None
        passes, by = allowed(self.rule.ip_rules, wanted.address, wanted.port)
        if passes:
            self._dial(str(wanted.address), wanted.port, self._route.settings)
            return
        because = f"by the rule for {by.network}" if by is not None else "because no rule of ipRules allows it"
        error = AccessDeniedError(
            f"SOCKS: {wanted} ({wanted.address}) is denied {because}",
            advice="ipRules of the rule decide, first match first; what none allows is denied",
        )
        self._refuse_with(NOT_ALLOWED, wanted.encode(), error)

    def on_connected(self, connection: OriginConnection) -> None:
        """Tell the client, or negotiate now."""
        if self.status:
            self._succeed(connection)
            return
        # proxyType: socks. What the origin says first waits in its socket.
        connection.transport.pause_reading()
        self._connection = connection
        self._negotiate()
        pending, self._pending = self._pending, []
        if pending:
            self.on_data(b"".join(pending))
        if self._eof and self._splice is None:
            self._close(close_frame(NORMAL))

    def _succeed(self, connection: OriginConnection) -> None:
        self.port.write(encode_frame(BINARY, encode_reply(SUCCEEDED, _local_address(connection))))
        self._couple(connection)
        splice = self._splice
        assert isinstance(splice, CarriedSplice)
        if not self._edge_paused:
            connection.transport.resume_reading()
        pending, self._pending = self._pending, []
        for payload in pending:
            splice.push(payload)
        if self._eof:
            splice.on_eof()

    def _make_splice(self, connection: OriginConnection) -> Splice:
        route = self._route
        return CarriedSplice(self.port, connection, route.carried_drains, self._done, self._frames, route.clock)

    def on_eof(self) -> None:
        """End the edge's direction; a negotiation ends with it."""
        super().on_eof()
        if self._splice is None and self.status and self._wanted is None:
            self._close(close_frame(NORMAL))

    def on_origin_lost(self, error: Exception | None) -> None:
        """The rule's origin went before the client had said what it wants."""
        self._connection = None
        self._close(close_frame(NORMAL))

    def on_dial_failed(self, error: OriginError) -> None:
        """Tell the client by a reply code, once there is a conversation."""
        if not self.status:
            super().on_dial_failed(error)
            return
        code = HOST_UNREACHABLE
        if error.cause == "refused":
            code = REFUSED
        elif "network is unreachable" in str(error).lower():
            code = NETWORK_UNREACHABLE
        self._refuse_with(code, None, error)

    def _refuse_with(self, code: int, where: bytes | None, error: ConnectorError) -> None:
        reply = encode_reply(code) if where is None else encode_reply(code, where)
        self.port.write(encode_frame(BINARY, reply))
        self._owner.exchange_failed(self, error)
        self._close(close_frame(NORMAL))

    def _refuse(self, error: SocksError) -> None:
        if error.reply:
            self.port.write(encode_frame(BINARY, error.reply))
        self._owner.exchange_failed(self, error)
        self._close(close_frame(NORMAL))

    def _close(self, frame: bytes) -> None:
        """End a conversation that came to nothing."""
        if self.finished:
            return
        self.port.write(frame)
        self.port.write_eof()
        self.port.stop_reading()
        self.whole = True
        self._finish()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _finish(self) -> None:
        self._stop_timer()
        if self._lookup is not None:
            self._lookup.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()
        super()._finish()

    def go_away(self) -> bool:
        """Close 1001, also during the negotiation."""
        if self._splice is None and self.status and not self.finished:
            self._close(close_frame(1001))
            return True
        return super().go_away()


def _resolve(name: bytes) -> str:
    """Return one address of a name, IPv4 first (as cloudflared has it). Runs in a thread. Errors: any."""
    infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    infos.sort(key=lambda info: info[0] != socket.AF_INET)
    return str(infos[0][4][0]).partition("%")[0]


def _local_address(connection: OriginConnection) -> bytes:
    name: Any = connection.transport.get_extra_info("sockname")
    return encode_address(ipaddress.ip_address(str(name[0]).partition("%")[0]), int(name[1]))


def _ignore(data: Buffer) -> None:
    """Take what comes after the end."""
