"""`connector tail`: a connector's log, live, through the edge.

Owns: the WebSocket to the management host, the filters, the lines. In: a Call. Out: lines on stdout; an exit status.
Never: prints the token; goes on after the edge closed the stream (it says why).
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import ssl
import sys
from typing import Any
from urllib.parse import urlencode

from connector.app.command_table import Call
from connector.app.config import MANAGEMENT_HOST, split_address
from connector.app.log_formats import EVENT_NAMES, console_line
from connector.errors import ConfigError, ConnectorError, EdgeDialError, EdgeTlsError, UsageError
from connector.wire.ws_messages import (
    CLOSE,
    NORMAL,
    PING,
    PONG,
    TEXT,
    MessageReader,
    WebSocketError,
    accept_value,
    encode_close,
    encode_frame,
)

DIAL_SECONDS = 15.0
MAX_MESSAGE = 1 << 20
MAX_HEAD = 32 * 1024

LEVELS = ("debug", "info", "warn", "error")


class TailError(ConnectorError):
    """The stream cannot be had, or ended: the text says why."""


def tail(call: Call) -> int:
    """Stream until interrupted. Status 0 when stopped by hand or closed properly, else 1."""
    flags = call.flags
    if len(call.arguments) > 1:
        raise UsageError(f"{call.program} tail takes one argument: the management token.")
    token = call.arguments[0] if call.arguments else flags.text("token")
    if not token:
        raise UsageError(
            "tail needs a management token",
            advice="Give it with TUNNEL_MANAGEMENT_TOKEN. For the dev edge: connector edge management NAME.",
        )
    events = flags.texts("event")
    for event in events:
        if event not in EVENT_NAMES:
            raise UsageError(f"unknown event type {event}", advice=f"Allowed: {', '.join(EVENT_NAMES)}.")
    level = flags.text("level") or "debug"
    if level not in LEVELS:
        raise UsageError(f"unknown level {level}", advice=f"Allowed: {', '.join(LEVELS)}.")
    try:
        sampling = float(flags.text("sample") or "1")
    except ValueError:
        raise UsageError("--sample must be a number from 0 to 1") from None
    if not 0 <= sampling <= 1:
        raise UsageError("--sample must be a number from 0 to 1")
    filters: dict[str, Any] = {"level": level}
    if events:
        filters["events"] = events
    if 0 < sampling < 1:
        filters["sampling"] = sampling
    host = flags.text("management-hostname") or MANAGEMENT_HOST
    where = split_address(flags.text("connect"), "--connect") if flags.text("connect") else (host, 443)
    query = {"access_token": token}
    if flags.text("connector-id"):
        query["connector_id"] = flags.text("connector-id")
    as_json = flags.text("output") == "json"
    return asyncio.run(_run(where, host, query, filters, flags.text("cacert"), as_json=as_json))


async def _run(
    where: tuple[str, int], host: str, query: dict[str, str], filters: dict[str, Any], cacert: str, *, as_json: bool
) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        if sys.platform != "win32":
            loop.add_signal_handler(number, stop.set)
    reader, writer = await _connect(where, host, cacert)
    try:
        await _upgrade(reader, writer, host, query)
        start = json.dumps({"type": "start_streaming", "filters": filters}).encode()
        writer.write(encode_frame(TEXT, start, mask=os.urandom(4)))
        reading = asyncio.create_task(_read(reader, writer, as_json=as_json))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
            writer.write(encode_close(NORMAL, mask=os.urandom(4)))
            return 0
        finally:
            reading.cancel()
            stopping.cancel()
            await asyncio.gather(reading, stopping, return_exceptions=True)
    finally:
        writer.close()
        try:
            async with asyncio.timeout(2):
                await writer.wait_closed()
        except (OSError, TimeoutError):
            pass


async def _connect(where: tuple[str, int], host: str, cacert: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    try:
        context = ssl.create_default_context(cafile=cacert or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"--cacert: {cacert}: {error}", advice="Give a file with PEM certificates.") from None
    context.set_alpn_protocols(["http/1.1"])
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            return await asyncio.open_connection(*where, ssl=context, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raise EdgeTlsError(
            f"{where[0]}:{where[1]} shows a certificate that is not trusted: {error.verify_message}",
            advice="For the dev edge: --cacert $(connector edge ca).",
        ) from None
    except TimeoutError:
        raise EdgeDialError(f"no answer from {where[0]}:{where[1]} within {DIAL_SECONDS:g} seconds") from None
    except OSError as error:
        raise EdgeDialError(f"cannot connect to {where[0]}:{where[1]}: {error.strerror or error}") from None


async def _upgrade(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, query: dict[str, str]
) -> None:
    key = base64.b64encode(os.urandom(16))
    writer.write(
        f"GET /logs?{urlencode(query)} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key.decode()}\r\n\r\n".encode("latin-1")
    )
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status = int(head.split(" ", 2)[1])
            if status == 101:
                fields = dict(line.lower().partition(": ")[::2] for line in head.split("\r\n")[1:])
                if fields.get("sec-websocket-accept") != accept_value(key).decode().lower():
                    raise TailError("the answer to the WebSocket handshake is not one: wrong Sec-WebSocket-Accept")
                return
            body = (await reader.read(4096)).decode("utf-8", "replace").strip()
    except (
        OSError,
        asyncio.IncompleteReadError,
        asyncio.LimitOverrunError,
        ValueError,
        IndexError,
        TimeoutError,
    ) as error:
        raise TailError(f"no WebSocket at the management host: {error or type(error).__name__}") from None
    advice = "The token may be of another tunnel, or over." if status in {400, 401, 403} else ""
    raise TailError(f"the management host answered {status}: {body}", advice=advice)


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, as_json: bool) -> int:
    """Print events until the stream ends; give the exit status."""
    messages = MessageReader(masked=False, limit=MAX_MESSAGE)
    while data := await reader.read(65536):
        try:
            found = messages.receive(data)
        except WebSocketError as error:
            raise TailError(f"the stream is no WebSocket any more: {error}") from None
        for message in found:
            if message.opcode == TEXT:
                _print(message.data, as_json=as_json)
            elif message.opcode == PING:
                writer.write(encode_frame(PONG, message.data, mask=os.urandom(4)))
            elif message.opcode == CLOSE:
                if message.code == NORMAL:
                    print(f"closed: {message.data.decode()}", file=sys.stderr)
                    return 0
                raise TailError(f"closed by the connector: {message.code} {message.data.decode()}")
    raise TailError("the stream ended without a goodbye: the connector or the way to it is gone")


def _print(data: bytes, *, as_json: bool) -> None:
    try:
        entries = json.loads(data)["logs"]
    except (ValueError, KeyError, TypeError):
        return
    for entry in entries:
        if as_json:
            print(json.dumps(entry, separators=(",", ":"), ensure_ascii=False), flush=True)
            continue
        fields = dict(entry.get("fields", {}))
        fields["event"] = entry.get("event", EVENT_NAMES[0])
        line = console_line(entry.get("time", ""), entry.get("level", "debug"), entry.get("message", ""), fields)
        print(line, flush=True)
