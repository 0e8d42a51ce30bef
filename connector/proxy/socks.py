"""SOCKS5 (RFC 1928) as a server, without I/O: what a client asks for, what it is told, what a policy lets pass.

Owns: the negotiation's bytes, reply codes, the policy of `ipRules`. In: bytes of a client. Out: replies, a destination.
Never: resolves, dials, or knows what carries the bytes.

Only CONNECT without authentication is served, as cloudflared does; what the client sends behind its request is payload.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final

from connector.errors import ConnectorError
from connector.proxy.ingress import IPRule

SUCCEEDED, FAILED, NOT_ALLOWED, NETWORK_UNREACHABLE, HOST_UNREACHABLE, REFUSED = range(6)
COMMAND_NOT_SUPPORTED: Final = 7

_VERSION: Final = 5
_NO_AUTHENTICATION: Final = 0
_NONE_ACCEPTABLE: Final = b"\x05\xff"
_CONNECT: Final = 1
_IP4, _NAME, _IP6 = 1, 3, 4
_NOWHERE: Final = b"\x01\0\0\0\0\0\0"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class SocksError(ConnectorError):
    """A negotiation that ends here. `reply` is what the client is told first; may be empty."""

    def __init__(self, message: str, *, reply: bytes = b"", advice: str = "") -> None:
        super().__init__(message, advice=advice)
        self.reply = reply


class Destination:
    """What a client wants to be connected to: an address, or a name that is still to be resolved."""

    __slots__ = ("address", "name", "port")

    def __init__(self, name: bytes, address: Address | None, port: int) -> None:
        self.name = name
        self.address = address
        self.port = port

    def __str__(self) -> str:
        where = self.name.decode("ascii", "backslashreplace") if self.name else str(self.address)
        return f"[{where}]:{self.port}" if ":" in where else f"{where}:{self.port}"

    def encode(self) -> bytes:
        """Return the form that replies carry: the name where the client gave one."""
        if self.name:
            return bytes((_NAME, len(self.name))) + self.name + self.port.to_bytes(2, "big")
        assert self.address is not None
        return encode_address(self.address, self.port)


def encode_address(address: Address, port: int) -> bytes:
    """Return type, address and port."""
    return bytes((_IP4 if address.version == 4 else _IP6,)) + address.packed + port.to_bytes(2, "big")


def encode_reply(code: int, where: bytes = _NOWHERE) -> bytes:
    """Return a reply; `where` is an encoded address."""
    return bytes((_VERSION, code, 0)) + where


def allowed(rules: Sequence[IPRule], address: Address, port: int) -> tuple[bool, IPRule | None]:
    """Return the policy's word and the rule that said it: the first that applies decides, and without one it is no."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    for rule in rules:
        if rule.applies(address, port):
            return rule.allow, rule
    return False, None


class SocksServer:
    """One negotiation. Feed `receive` until `destination` is there; `rest` is then payload."""

    __slots__ = ("_buffer", "_greeted", "destination")

    def __init__(self) -> None:
        self.destination: Destination | None = None
        self._buffer = b""
        self._greeted = False

    def receive(self, data: bytes) -> bytes:
        """Take bytes of the client; return what to send to it. Errors: SocksError."""
        self._buffer += data
        reply = b""
        if not self._greeted:
            reply = self._greet()
        if self._greeted and self.destination is None:
            try:
                self.destination = self._request()
            except SocksError as error:
                error.reply = reply + error.reply  # both came at once
                raise
        return reply

    def rest(self) -> bytes:
        """Return what came behind the request."""
        rest, self._buffer = self._buffer, b""
        return rest

    def _greet(self) -> bytes:
        buffer = self._buffer
        if buffer and buffer[0] != _VERSION:
            raise SocksError(f"SOCKS version {buffer[0]} is not served, only 5")
        if len(buffer) < 2 or len(buffer) < 2 + buffer[1]:
            return b""
        methods = buffer[2 : 2 + buffer[1]]
        if _NO_AUTHENTICATION not in methods:
            raise SocksError(
                "the SOCKS client demands authentication", reply=_NONE_ACCEPTABLE, advice="Protect the rule by Access."
            )
        self._buffer = buffer[2 + len(methods) :]
        self._greeted = True
        return bytes((_VERSION, _NO_AUTHENTICATION))

    def _request(self) -> Destination | None:
        buffer = self._buffer
        if buffer and buffer[0] != _VERSION:
            raise SocksError(f"a SOCKS request of version {buffer[0]}")
        if len(buffer) < 5:
            return None
        kind = buffer[3]
        size = {_IP4: 4, _IP6: 16, _NAME: 1 + buffer[4]}.get(kind)
        if size is None:
            raise SocksError(f"the SOCKS address type {kind} does not exist")
        end = 4 + size + 2
        if len(buffer) < end:
            return None
        host = buffer[4 : end - 2]
        port = int.from_bytes(buffer[end - 2 : end], "big")
        self._buffer = buffer[end:]
        command = buffer[1]
        if command != _CONNECT:
            raise SocksError(f"the SOCKS command {command} is not served", reply=encode_reply(COMMAND_NOT_SUPPORTED))
        if kind == _NAME:
            return _named(host[1:], port)
        return Destination(b"", ipaddress.ip_address(host), port)


def _named(name: bytes, port: int) -> Destination:
    """Return a destination by name; some clients write addresses as names, which then need no look-up."""
    if not name:
        raise SocksError("the SOCKS request names no host", reply=encode_reply(HOST_UNREACHABLE))
    try:
        return Destination(name, ipaddress.ip_address(name.decode("ascii")), port)
    except ValueError:
        return Destination(name, None, port)
