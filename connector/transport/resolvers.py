"""Three ways to ask the DNS: the system's resolver, DNS-over-TLS (RFC 7858) and DNS-over-HTTPS (RFC 8484).

Owns: questions, their transport, and the reading of answers. In: names. Out: Service records, TXT values, addresses.
Raises only DiscoveryError, which names the way and the question. Never: knows what the names mean, caches.

*Strategy*: dnspython makes and reads messages and runs the plain UDP/TCP exchange, with retry over the configured
servers; the two encrypted ways are one exchange on one connection each, on plain asyncio streams, so that they need no
HTTP client package and have one limit for all of it.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import dns.exception
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
from dns.rdata import Rdata
from dns.rdtypes.ANY.TXT import TXT
from dns.rdtypes.IN.SRV import SRV

from connector.errors import ConnectorError, DiscoveryError
from connector.protocol.edge_addresses import Service
from connector.protocol.http1 import ResponseParser, content_length_line, encode_request_head
from connector.transport.lookup import look_up

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import dns.asyncresolver

    from connector.protocol.ports import Buffer, Headers

SYSTEM_SECONDS = 5.0
"""Limit of one question to the system's resolver; dnspython's own default, glibc's for its first round."""

SECURE_SECONDS = 15.0
"""Limit of one question over TLS or HTTPS, connect and handshake included; cloudflared's limit for DNS-over-TLS."""

MAX_MESSAGE = 65_535
"""Bytes of one answer: what two octets of length can say."""

MAX_RECORDS = 64
"""Records taken from one answer; the edge publishes two regions with ten addresses of each family."""


class Endpoint(NamedTuple):
    """Where an encrypted resolver listens, and the name that its certificate must carry."""

    host: str
    port: int
    server_name: str


TLS_ENDPOINTS = (
    Endpoint("1.1.1.1", 853, "cloudflare-dns.com"),
    Endpoint("2606:4700:4700::1111", 853, "cloudflare-dns.com"),
)
HTTPS_ENDPOINTS = (
    Endpoint("1.1.1.1", 443, "cloudflare-dns.com"),
    Endpoint("2606:4700:4700::1111", 443, "cloudflare-dns.com"),
)
"""Tried in order: the first one that connects answers. The second of each serves networks without IPv4."""


class Resolver(Protocol):
    """One way to ask. Every call raises DiscoveryError when there is no usable answer."""

    @property
    def label(self) -> str:
        """Name the way, for log lines."""

    async def services(self, name: str) -> list[Service]:
        """Give the SRV records of `name`, unordered; at least one."""

    async def texts(self, name: str) -> list[bytes]:
        """Give the TXT values of `name`, the strings of each joined; at least one."""

    async def addresses(self, host: str) -> list[str]:
        """Give the numeric addresses of `host`, best first; at least one."""


class DnsResolver:
    """Reads answers; subclasses of this module say how a question travels (`_ask`)."""

    label = "DNS"

    async def services(self, name: str) -> list[Service]:
        """See `Resolver`."""
        return [
            Service(each.priority, each.weight, each.port, each.target.to_text(omit_final_dot=True) or ".")
            for each in await self._records(name, dns.rdatatype.SRV)
            if isinstance(each, SRV)
        ]

    async def texts(self, name: str) -> list[bytes]:
        """See `Resolver`."""
        records = await self._records(name, dns.rdatatype.TXT)
        return [b"".join(each.strings) for each in records if isinstance(each, TXT)]

    async def addresses(self, host: str) -> list[str]:
        """See `Resolver`. Both families are asked at the same time; one of them is enough."""
        types = (dns.rdatatype.A, dns.rdatatype.AAAA)
        results = await asyncio.gather(*(self._records(host, each) for each in types), return_exceptions=True)
        found: list[str] = []
        for result in results:
            if isinstance(result, list):
                found += [str(each.to_text()) for each in result]
            elif not isinstance(result, DiscoveryError):
                raise result
        if not found:
            raise next(result for result in results if isinstance(result, DiscoveryError))
        return order_by_route(found)

    async def _records(self, name: str, rdtype: dns.rdatatype.RdataType) -> list[Rdata]:
        question = f"{rdtype.name} {name}"
        try:
            answer = await self._ask(dns.name.from_text(name), rdtype)
        except TimeoutError:
            raise DiscoveryError(f"{self.label}: {question}: no answer in time") from None
        except (dns.exception.DNSException, UnicodeError, OSError, EOFError, ConnectorError, ValueError) as error:
            raise DiscoveryError(f"{self.label}: {question}: {_words(error)}") from error
        records = [] if answer is None else list(answer)[:MAX_RECORDS]
        if not records:
            raise DiscoveryError(f"{self.label}: {question}: the answer holds no such record")
        return records

    async def _ask(self, name: dns.name.Name, rdtype: dns.rdatatype.RdataType) -> dns.rrset.RRset | None:
        raise NotImplementedError


class SystemResolver(DnsResolver):
    """The resolver that this machine is configured with. `nameservers` (host, port) stand in for it, in tests.

    Addresses come from the system's own look-up, so that its hosts file and its order (RFC 6724) count.
    """

    label = "system resolver"

    def __init__(self, *, nameservers: Sequence[tuple[str, int]] | None = None, limit: float = SYSTEM_SECONDS) -> None:
        self._nameservers = nameservers
        self._limit = limit

    async def addresses(self, host: str) -> list[str]:
        """See `Resolver`."""
        if self._nameservers is not None:
            return await super().addresses(host)
        try:
            async with asyncio.timeout(self._limit):
                answers = await look_up(host, None)
        except TimeoutError:
            raise DiscoveryError(f"{self.label}: address of {host}: no answer in time") from None
        except (OSError, UnicodeError) as error:
            raise DiscoveryError(f"{self.label}: address of {host}: {_words(error)}") from error
        found = list(dict.fromkeys(str(answer[4][0]) for answer in answers))[:MAX_RECORDS]
        if not found:
            raise DiscoveryError(f"{self.label}: address of {host}: empty answer")
        return found

    async def _ask(self, name: dns.name.Name, rdtype: dns.rdatatype.RdataType) -> dns.rrset.RRset | None:
        # Made for every question: the system's configuration changes with the network.
        resolver = _stub_resolver(self._nameservers)
        async with asyncio.timeout(self._limit):
            answer = await resolver.resolve(name, rdtype, search=False, lifetime=self._limit)
        return answer.rrset


def _stub_resolver(nameservers: Sequence[tuple[str, int]] | None) -> dns.asyncresolver.Resolver:
    """Make dnspython's resolver without its QUIC and HTTP/3 parts: they load all of aioquic, 16 MB, where it exists."""
    try:
        import dns._features as features  # noqa: PLC0415

        features.force("doq", False)
        features.force("doh", False)
    except (ImportError, AttributeError):
        pass  # a saving only, and dnspython does not promise this switch
    from dns import asyncresolver, nameserver  # noqa: PLC0415

    resolver = asyncresolver.Resolver(configure=nameservers is None)
    if nameservers is not None:
        resolver.nameservers = [nameserver.Do53Nameserver(host, port) for host, port in nameservers]
    return resolver


class _SecureResolver(DnsResolver):
    """One question on one TLS connection to the first endpoint that lets us connect."""

    alpn = "dot"

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        context: ssl.SSLContext | None = None,
        limit: float = SECURE_SECONDS,
    ) -> None:
        self._endpoints = endpoints
        self._context = context
        self._limit = limit

    async def _ask(self, name: dns.name.Name, rdtype: dns.rdatatype.RdataType) -> dns.rrset.RRset | None:
        query = dns.message.make_query(name, rdtype)
        # Nobody on the path can guess what TLS hides, and an answer for everybody may be cached (RFC 8484 section 4.1).
        query.id = 0
        async with asyncio.timeout(self._limit), self._connection() as (reader, writer, endpoint):
            data = await self._exchange(reader, writer, query.to_wire(), endpoint)
        answer = dns.message.from_wire(data)
        if not isinstance(answer, dns.message.QueryMessage) or not query.is_response(answer):
            raise ValueError("the answer belongs to another question")
        if answer.rcode() != dns.rcode.NOERROR:
            raise ValueError(dns.rcode.to_text(answer.rcode()))
        return answer.resolve_chaining().answer

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, Endpoint]]:
        if self._context is None:
            self._context = ssl.create_default_context()
            self._context.set_alpn_protocols([self.alpn])
        failed: OSError | None = None
        for endpoint in self._endpoints:
            try:
                reader, writer = await asyncio.open_connection(
                    endpoint.host, endpoint.port, ssl=self._context, server_hostname=endpoint.server_name
                )
            except OSError as error:
                failed = failed or error
                continue
            try:
                yield reader, writer, endpoint
            finally:
                writer.transport.abort()
            return
        raise failed or OSError("no endpoint is known")

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, query: bytes, endpoint: Endpoint
    ) -> bytes:
        raise NotImplementedError


class TlsResolver(_SecureResolver):
    """DNS-over-TLS. `context` replaces the system's roots, in tests."""

    label = "DNS-over-TLS"

    def __init__(
        self,
        endpoints: Sequence[Endpoint] = TLS_ENDPOINTS,
        *,
        context: ssl.SSLContext | None = None,
        limit: float = SECURE_SECONDS,
    ) -> None:
        super().__init__(endpoints, context=context, limit=limit)

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, query: bytes, endpoint: Endpoint
    ) -> bytes:
        writer.write(len(query).to_bytes(2, "big") + query)
        length = int.from_bytes(await reader.readexactly(2), "big")
        return await reader.readexactly(length)


class HttpsResolver(_SecureResolver):
    """DNS-over-HTTPS, as a POST over HTTP/1.1. `context` replaces the system's roots, in tests."""

    label = "DNS-over-HTTPS"
    alpn = "http/1.1"

    def __init__(
        self,
        endpoints: Sequence[Endpoint] = HTTPS_ENDPOINTS,
        *,
        path: bytes = b"/dns-query",
        context: ssl.SSLContext | None = None,
        limit: float = SECURE_SECONDS,
    ) -> None:
        super().__init__(endpoints, context=context, limit=limit)
        self._path = path

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, query: bytes, endpoint: Endpoint
    ) -> bytes:
        fields = [(b"accept", _MEDIA_TYPE), (b"content-type", _MEDIA_TYPE), (b"connection", b"close")]
        head = encode_request_head(
            b"POST", self._path, endpoint.server_name.encode(), fields, framing=content_length_line(len(query))
        )
        writer.write(head + query)
        response = _Response()
        parser = ResponseParser(response, b"POST")
        while not parser.complete:
            data = await reader.read(MAX_MESSAGE)
            if data:
                parser.receive_data(data)
            else:
                parser.receive_eof()
            if len(response.body) > MAX_MESSAGE:
                raise ValueError("the answer is too long")
        if response.status != 200:
            raise ValueError(f"HTTP status {response.status}")
        return bytes(response.body)


_MEDIA_TYPE = b"application/dns-message"


class _Response:
    """Collects one HTTP response."""

    def __init__(self) -> None:
        self.status = 0
        self.body = bytearray()

    def on_head(self, status: int, headers: Headers) -> None:
        self.status = status

    def on_body(self, data: Buffer) -> None:
        self.body += data

    def on_complete(self, trailers: Headers) -> None:
        pass


def order_by_route(addresses: Sequence[str]) -> list[str]:
    """Order an answer that the system did not order: families without a route last, IPv6 first among the others.

    Connecting a UDP socket asks the kernel for a route and sends nothing.
    """
    routed: dict[int, bool] = {}
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        if family not in routed:
            try:
                with socket.socket(family, socket.SOCK_DGRAM) as probe:
                    probe.connect((address, 9))
                routed[family] = True
            except OSError:
                routed[family] = False
    return sorted(
        dict.fromkeys(addresses),
        key=lambda each: (not routed[socket.AF_INET6 if ":" in each else socket.AF_INET], ":" not in each),
    )


def _words(error: BaseException) -> str:
    if isinstance(error, dns.exception.Timeout):
        return "no answer in time"
    if isinstance(error, EOFError):
        return "the connection ended before the answer"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__
