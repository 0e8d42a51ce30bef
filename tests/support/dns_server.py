"""A DNS server on loopback: UDP, TCP, TLS and HTTPS, with the misbehaviour that networks show.

`async with DnsServer(zone) as server:`; `zone` maps (name, type) to record texts. What it was asked stands in
`questions`; the switches may be changed while it runs.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import cast

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import h11

Zone = Mapping[tuple[str, str], Sequence[str]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class DnsServer:
    def __init__(self, zone: Zone, *, tls: ssl.SSLContext | None = None) -> None:
        self.zone = dict(zone)
        self.tls = tls
        self.questions: list[tuple[str, str, str]] = []
        """(transport, name, type) in the order of arrival."""
        self.silent: set[str] = set()
        """Transports, or types, that get no answer."""
        self.refusing: set[str] = set()
        """Transports, or types, that get SERVFAIL."""
        self.truncate = False
        """Answer over UDP with TC and nothing in it."""
        self.mangle: Callable[[bytes], bytes] = bytes
        """Applied to every answer."""
        self.http_status = 200
        self._servers: list[asyncio.Server] = []
        self._datagrams: asyncio.DatagramTransport | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = self.tls_port = self.https_port = 0

    @property
    def nameserver(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    async def __aenter__(self) -> DnsServer:
        loop = asyncio.get_running_loop()
        for _ in range(20):  # one port number for UDP and TCP
            tcp = await asyncio.start_server(self._serving(self._framed, "tcp"), "127.0.0.1", 0)
            self.port = tcp.sockets[0].getsockname()[1]
            try:
                self._datagrams, _ = await loop.create_datagram_endpoint(
                    lambda: _Datagrams(self), local_addr=("127.0.0.1", self.port)
                )
            except OSError:
                tcp.close()
                continue
            self._servers.append(tcp)
            break
        if self.tls is not None:
            for serve, transport in ((self._framed, "tls"), (self._http, "https")):
                server = await asyncio.start_server(self._serving(serve, transport), "127.0.0.1", 0, ssl=self.tls)
                self._servers.append(server)
                setattr(self, f"{transport}_port", server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._datagrams is not None
        self._datagrams.close()
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self._servers:
            await server.wait_closed()
        # A handshake that the client broke off ends in a task of asyncio's own, a little later.
        accepting = [task for task in asyncio.all_tasks() if "_accept_connection2" in repr(task)]
        if accepting:
            await asyncio.wait(accepting, timeout=30)

    def answer(self, transport: str, wire: bytes) -> bytes | None:
        """Give the answer to one question, None for silence."""
        try:
            query = dns.message.from_wire(wire)
        except dns.exception.DNSException:
            return None
        question = query.question[0]
        name, kind = question.name.to_text(omit_final_dot=True), dns.rdatatype.to_text(question.rdtype)
        self.questions.append((transport, name, kind))
        if self.silent & {transport, kind}:
            return None
        response = dns.message.make_response(query, recursion_available=True)
        if self.refusing & {transport, kind}:
            response.set_rcode(dns.rcode.SERVFAIL)
        elif self.truncate and transport == "udp":
            response.flags |= dns.flags.TC
        else:
            self._fill(response, name, kind)
        return self.mangle(response.to_wire())

    def _fill(self, response: dns.message.Message, name: str, kind: str) -> None:
        while (alias := self.zone.get((name, "CNAME"))) is not None:
            response.answer.append(dns.rrset.from_text(name + ".", 60, "IN", "CNAME", *alias))
            name = alias[0].rstrip(".")
        records = self.zone.get((name, kind))
        if records:
            response.answer.append(dns.rrset.from_text(name + ".", 60, "IN", kind, *records))
        elif not any(each == name for each, _ in self.zone):
            response.set_rcode(dns.rcode.NXDOMAIN)

    def _serving(
        self, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter, str], Awaitable[None]], transport: str
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            try:
                await serve(reader, writer, transport)
            except (OSError, EOFError, asyncio.CancelledError, h11.RemoteProtocolError):
                pass
            finally:
                self._tasks.discard(task)
                writer.transport.abort()

        return connected

    async def _framed(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, transport: str) -> None:
        while True:
            length = int.from_bytes(await reader.readexactly(2), "big")
            answer = self.answer(transport, await reader.readexactly(length))
            if answer is not None:
                writer.write(len(answer).to_bytes(2, "big") + answer)

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, transport: str) -> None:
        connection = h11.Connection(h11.SERVER)
        body = b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Request):
                assert (event.method, event.target) == (b"POST", b"/dns-query")
                assert (b"content-type", b"application/dns-message") in event.headers
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                break
        answer = self.answer(transport, body)
        if answer is None:
            await reader.read()  # until the client gives up
            return
        fields = [("content-type", "application/dns-message"), ("content-length", str(len(answer)))]
        for out in (h11.Response(status_code=self.http_status, headers=fields), h11.Data(answer), h11.EndOfMessage()):
            writer.write(connection.send(out) or b"")
        await writer.drain()
        await reader.read()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # uvloop's is none by class

    def datagram_received(self, data: bytes, addr: tuple[str | int, ...]) -> None:
        answer = self._server.answer("udp", data)
        if answer is not None:
            self._transport.sendto(answer, addr)
