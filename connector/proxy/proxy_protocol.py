"""PROXY protocol version 2 (HAProxy's proxy-protocol.txt): tells an origin which client a connection is for.

Owns: the bytes of the header. In: the eyeball's address, the origin's. Out: bytes for the very start of a connection.
Never: sends them; trusts a header that the eyeball could have set (the address is the edge's `Cf-Connecting-Ip`).
"""

from __future__ import annotations

import ipaddress
from struct import pack
from typing import Any, Final

from connector.protocol.ports import Headers

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
LOCAL: Final = SIGNATURE + b"\x20\x00\x00\x00"
"""The header of a connection for nobody known; receivers then use the connection's own address."""

_TCP4, _TCP6 = b"\x21\x11\x00\x0c", b"\x21\x21\x00\x24"
CLIENT_HEADER: Final = b"cf-connecting-ip"


def client_address(headers: Headers) -> str:
    """Return the eyeball's address as the edge names it; empty when it names none, or no address."""
    for name, value in headers:
        if name.lower() == CLIENT_HEADER:
            text = value.decode("latin-1").strip()
            try:
                return str(ipaddress.ip_address(text.partition("%")[0]))
            except ValueError:
                return ""
    return ""


def encode_proxy_header(client: str, origin: Any) -> bytes:
    """Return the header for a connection of `client` to `origin`, a socket address (of a unix socket: a path).

    The edge does not name the client's port: it is 0. Where the two families differ, the IPv4 one is written as a
    mapped IPv6 address, as the format demands one family.
    """
    if not client:
        return LOCAL
    source = ipaddress.ip_address(client)
    port = 0
    target: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(
        "0.0.0.0" if source.version == 4 else "::"
    )
    if isinstance(origin, tuple):
        target = ipaddress.ip_address(str(origin[0]).partition("%")[0])
        port = int(origin[1])
    if source.version == 4 and target.version == 4:
        return SIGNATURE + _TCP4 + source.packed + target.packed + pack(">HH", 0, port)
    return SIGNATURE + _TCP6 + _six(source) + _six(target) + pack(">HH", 0, port)


def _six(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bytes:
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed
