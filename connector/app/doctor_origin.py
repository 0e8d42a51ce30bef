"""The hops of `connector doctor` from the rule to the service's answer.

Owns: what is sent to a service (one GET, or one WebSocket handshake and one MQTT CONNECT) and what its answers mean.
In: the rules, a target. Out: hops. Never: sends a visitor's data, follows a redirect, or leaves a session at a broker.
"""

from __future__ import annotations

import asyncio
import base64
import os
from typing import Any

from connector.app.doctor import HopFailedError, Target, Walk
from connector.proxy.ingress import Ingress, Rule, ServiceKind
from connector.proxy.origin_proxy import OriginProxies
from connector.proxy.origin_tls import connect_error, origin_context, tls_error
from connector.proxy.proxy_protocol import encode_proxy_header
from connector.transport.lookup import look_up

MAX_HEAD = 64 * 1024
"""Bytes of a response head."""

_MQTT_CODES = {
    1: "the broker does not speak MQTT 3.1.1",
    2: "the broker does not like the client's name",
    3: "the broker is not ready",
    4: "user name or password are wrong",
    5: "the broker lets nobody in without credentials",
}


async def walk_origin(walk: Walk, ingress: Ingress, target: Target) -> None:
    """Make the hops from the rule on."""
    rule: Rule | None = None
    async with walk.hop("rule") as detail:
        rule = ingress.match(target.host, target.path)
        where = rule.hostname or "any host"
        path = f" path {rule.path}" if rule.path else ""
        detail.append(f"rule {rule.index} ({where}{path}): {rule.service.text}")
    assert rule is not None
    service = rule.service
    rest = ["origin-dns", "origin-tcp", "origin-tls", "websocket" if target.websocket else "http", "mqtt"]
    if service.kind is not ServiceKind.HTTP and service.kind is not ServiceKind.TCP:
        for name in rest:
            walk.skip(name, f"the connector answers {service.text} by itself")
        return
    hop = OriginProxies(os.environ).hop_to(service, rule.settings)
    if hop is not None:
        way = f"a run reaches {service.text} through the proxy {hop.proxy} of the environment"
        _skip(walk, rest, hop.problem or f"{way}; with NO_PROXY={service.host} neither would")
        return
    addresses = await _resolve(walk, rule)
    if addresses is None:
        _skip(walk, rest[1:], "the name does not resolve")
        return
    reader, writer = await _connect(walk, rule, addresses)
    if writer is None or reader is None:
        _skip(walk, rest[2:], "no connection")
        return
    try:
        if service.kind is ServiceKind.TCP:
            _skip(walk, rest[2:], f"{service.text} takes bytes of any kind: nothing more can be asked")
            return
        if service.tls:
            async with walk.hop("origin-tls") as detail:
                detail.append(await _start_tls(rule, target, writer))
            if walk.failed():
                _skip(walk, rest[3:], "no TLS")
                return
        else:
            walk.skip("origin-tls", "the service is plain")
        if target.websocket:
            await _websocket(walk, rule, target, reader, writer)
        else:
            async with walk.hop("http") as detail:
                status, _ = await _ask(rule, target, reader, writer, {"Connection": "close"})
                detail.append(f"the service answers {status}")
            walk.skip("mqtt", "not a WebSocket: give wss:// to go on to MQTT")
    finally:
        writer.transport.abort()


def _skip(walk: Walk, names: list[str], why: str) -> None:
    for name in names:
        walk.skip(name, why)


async def _resolve(walk: Walk, rule: Rule) -> list[Any] | None:
    service = rule.service
    if service.path:
        walk.skip("origin-dns", "the service is a unix socket")
        return []
    found: list[Any] = []
    async with walk.hop("origin-dns") as detail:
        try:
            found = await look_up(service.host, service.port)
        except OSError as error:
            failure = connect_error(service, error, [])
            raise HopFailedError(str(failure), failure.advice) from None
        detail.append(", ".join(dict.fromkeys(str(each[4][0]) for each in found)))
    return None if walk.failed() else found


async def _connect(
    walk: Walk, rule: Rule, addresses: list[Any]
) -> tuple[asyncio.StreamReader | None, asyncio.StreamWriter | None]:
    service = rule.service
    reader = writer = None
    async with walk.hop("origin-tcp") as detail:
        tried: list[str] = []
        last: OSError = OSError("no address")
        if service.path:
            try:
                reader, writer = await asyncio.open_unix_connection(service.path, limit=MAX_HEAD)
            except OSError as error:
                last = error
            detail.append(f"connected to {service.path}")
        for family, _, _, _, address in addresses:
            try:
                reader, writer = await asyncio.open_connection(*address[:2], family=family, limit=MAX_HEAD)
            except OSError as error:
                last = error
                tried.append(f"{address[0]}:{address[1]}")
            else:
                detail.append(f"connected to {address[0]} port {address[1]}")
                break
        if writer is None:
            failure = connect_error(service, last, tried)
            raise HopFailedError(str(failure), failure.advice)
    if writer is not None and rule.settings.proxy_protocol:
        # As itself: some services (Mosquitto) close at once where nobody is named.
        ours, theirs = writer.get_extra_info("sockname"), writer.get_extra_info("peername")
        writer.write(encode_proxy_header(ours[0] if isinstance(ours, tuple) else "", theirs))
    return reader, writer


async def _start_tls(rule: Rule, target: Target, writer: asyncio.StreamWriter) -> str:
    settings = rule.settings
    name = (
        settings.origin_server_name or (target.host if settings.match_sni_to_host else rule.service.host) or "localhost"
    )
    try:
        await writer.start_tls(origin_context(settings), server_hostname=name)
    except OSError as error:
        failure = tls_error(rule.service, error, name)
        raise HopFailedError(str(failure), failure.advice) from None
    trust = "not checked (noTLSVerify)" if settings.no_tls_verify else f"trusted for {name}"
    return f"{writer.get_extra_info('ssl_object').version()}, the certificate is {trust}"


async def _ask(
    rule: Rule,
    target: Target,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    fields: dict[str, str],
) -> tuple[int, dict[str, str]]:
    """Send one GET and read the head of the answer. Errors: HopFailedError."""
    host = rule.settings.http_host_header or target.host
    lines = [f"GET {target.path} HTTP/1.1", f"Host: {host}", "User-Agent: connector-doctor", "Accept: */*"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError as error:
        said = f"; it said {error.partial[:60]!r}" if error.partial else ""
        raise HopFailedError(
            f"the service closed the connection without an HTTP answer{said}",
            "Is this the right port? A plain MQTT port (1883) is none: a broker needs its websockets listener here.",
        ) from None
    except asyncio.LimitOverrunError:
        raise HopFailedError("the service's answer is not HTTP", "Is this the right port?") from None
    first, *rest = head.split("\r\n")
    words = first.split(None, 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
        raise HopFailedError(f"the service's answer is not HTTP: {first[:60]!r}", "Is this the right port?")
    headers = {name.lower().strip(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
    return int(words[1]), headers


async def _websocket(
    walk: Walk, rule: Rule, target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    protocol = ""
    async with walk.hop("websocket") as detail:
        fields = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
            "Sec-WebSocket-Protocol": "mqtt",
        }
        status, headers = await _ask(rule, target, reader, writer, fields)
        if status != 101:
            raise HopFailedError(
                f"the service answers the WebSocket handshake with {status}",
                "Check the path, and that the service's WebSocket listener is the one that the rule names.",
            )
        protocol = headers.get("sec-websocket-protocol", "")
        detail.append(f"101, sub-protocol {protocol or 'none'}")
    if walk.failed():
        walk.skip("mqtt", "no WebSocket")
    elif protocol.lower() != "mqtt":
        walk.skip("mqtt", "the service did not choose the sub-protocol mqtt: no broker")
    else:
        async with walk.hop("mqtt") as detail:
            detail.append(await _mqtt(reader, writer))


def _frame(payload: bytes) -> bytes:
    """Make a masked binary frame of at most 125 bytes (RFC 6455 section 5)."""
    mask = os.urandom(4)
    masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
    return bytes((0x82, 0x80 | len(payload))) + mask + masked


async def _mqtt(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    """Send an MQTT 3.1.1 CONNECT with a clean session, read CONNACK, and say goodbye."""
    name = f"doctor-{os.urandom(4).hex()}".encode()
    body = b"\x00\x04MQTT\x04\x02\x00\x0a" + len(name).to_bytes(2, "big") + name
    writer.write(_frame(bytes((0x10, len(body))) + body))
    payload = b""
    while len(payload) < 4:
        try:
            opcode, data = await _read_frame(reader)
        except asyncio.IncompleteReadError:
            opcode, data = 8, b""
        if opcode == 8:
            raise HopFailedError(
                "the broker closed the WebSocket instead of answering CONNECT",
                "See the broker's log. It may want credentials, or TLS, or may be full.",
            )
        if opcode in {0, 2}:
            payload += data
    if payload[0] != 0x20 or payload[1] != 2:
        raise HopFailedError(f"the answer to CONNECT is no CONNACK: {payload[:8].hex()}", "Is this an MQTT broker?")
    code = payload[3]
    if code in {4, 5}:
        return f"CONNACK code {code}: {_MQTT_CODES[code]}; the way to the broker is whole"
    if code:
        raise HopFailedError(f"CONNACK code {code}: {_MQTT_CODES.get(code, 'refused')}", "See the broker's log.")
    writer.write(_frame(b"\xe0\x00") + _close_frame())
    return "CONNACK: the broker takes anonymous clients"


def _close_frame() -> bytes:
    frame = bytearray(_frame((1000).to_bytes(2, "big")))
    frame[0] = 0x88
    return bytes(frame)


async def _read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    first, second = await reader.readexactly(2)
    length = second & 0x7F
    if length == 126:
        length = int.from_bytes(await reader.readexactly(2), "big")
    if length == 127 or length > MAX_HEAD:
        raise HopFailedError("the service sends a large WebSocket message unasked", "Is this an MQTT broker?")
    return first & 0x0F, await reader.readexactly(length)
