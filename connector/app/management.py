"""Management through the tunnel: requests that the edge sends for the connector itself.

Owns: who may ask (the token's form), the routes, their answers and headers. In: requests for the management host.
Out: answers; LogStream sinks for /logs. Never: verifies the token's signature (the edge did, and only it has the key);
serves anything without a token.
"""

from __future__ import annotations

import asyncio
import base64
import fnmatch
import json
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from connector.app.answers import NOT_ALLOWED, NOT_FOUND, Answer, Query, Routes, first, json_answer, split_target
from connector.app.config import split_address
from connector.app.log_stream import LogStream, LogStreams
from connector.app.logs import Logger
from connector.errors import ConfigError
from connector.protocol.ports import Headers, Request, RequestKind, StreamPort, StreamSink
from connector.proxy.builtin import IGNORE
from connector.wire.ws_messages import accept_value

if TYPE_CHECKING:
    from uuid import UUID

    from connector.app.config import RunConfig
    from connector.app.state import TunnelState

ALGORITHM = "ES256"
_REFUSED = json_answer({"errors": [{"code": 1001, "message": "missing access_token query parameter"}]}, 400)
_PATTERN = "*.cloudflare.com"
_DEFLATE = b"permessage-deflate; server_no_context_takeover; client_no_context_takeover"

MAX_TOKEN = 16 * 1024
"""Characters of a token that are looked at; real ones have under 1,000."""


class Claims(NamedTuple):
    """Who asks: the part of the token that is used."""

    actor: str
    tunnel: str


def read_token(token: str) -> Claims | None:
    """Give the claims of a management token, None for anything else. The signature is not checked."""
    parts = token.split(".")
    if len(parts) != 3 or len(token) > MAX_TOKEN:
        return None
    try:
        header, claims, _ = (base64.b64decode(_padded(part), altchars=b"-_", validate=True) for part in parts)
        algorithm = json.loads(header)["alg"]
        body: dict[str, Any] = json.loads(claims)
        found = (body["tun"]["id"], body["tun"]["account_tag"], body["actor"]["id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if algorithm != ALGORITHM or not all(isinstance(text, str) and text for text in found):
        return None
    return Claims(actor=found[2], tunnel=found[0])


def _padded(part: str) -> str:
    return part + "=" * (-len(part) % 4)


class Management:
    """One per run; `accept` is an Acceptor. `state` is set once the tunnel has one."""

    def __init__(
        self,
        config: RunConfig,
        connector_id: UUID,
        log: Logger,
        *,
        metrics: Callable[[Query], Answer | Awaitable[Answer]],
        profiles: Routes,
    ) -> None:
        self._config = config
        self._connector_id = connector_id
        self._log = log
        self._loop = asyncio.get_running_loop()
        self.streams = LogStreams(log)
        self.state: TunnelState | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._routes: Routes = {"/ping": lambda _: Answer(200), "/host_details": self.host_details}
        if config.management_diagnostics:
            self._routes |= {"/metrics": metrics, **profiles}

    def accept(self, request: Request, port: StreamPort) -> StreamSink:
        """Answer a request for the management host."""
        path, query = split_target(request.target.decode("latin-1"))
        claims = read_token(first(query, "access_token"))
        if claims is None:
            return self._send(request, port, _REFUSED)
        if path == "/logs":
            return self._stream(request, port, claims)
        page = self._routes.get(path)
        if page is None:
            return self._send(request, port, NOT_FOUND)
        if request.method != b"GET" and not (path == "/ping" and request.method == b"HEAD"):
            return self._send(request, port, NOT_ALLOWED)
        try:
            answer = page(query)
        except Exception as error:
            self._log.bug(f"Cannot answer the management request {path}", error)
            return self._send(request, port, Answer(500))
        if isinstance(answer, Answer):
            return self._send(request, port, answer)
        task = self._loop.create_task(self._send_later(request, port, answer), name="management page")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return IGNORE

    async def close(self) -> None:
        """End the log streams and what is being answered."""
        self.streams.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def host_details(self, _: Query) -> Answer:
        """Say who and where this connector is."""
        details: dict[str, str] = {"connector_id": str(self._connector_id)}
        address = self._own_address()
        if address:
            details["ip"] = address
        details["hostname"] = (
            f"custom:{self._config.label}" if self._config.label else socket.gethostname() or "unknown"
        )
        return json_answer(details)

    def _own_address(self) -> str:
        """Give this machine's address towards the edge; towards `--service-op-ip` where no link is up."""
        if self.state is not None:
            address = self.state.links.local_address()
            if address:
                return address
        try:
            host, port = split_address(self._config.service_op, "--service-op-ip")
            # A UDP socket is connected without a packet: the kernel only looks its route up.
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as trial:
                trial.connect((host, port))
                return str(trial.getsockname()[0])
        except (OSError, ConfigError):
            return ""

    async def _send_later(self, request: Request, port: StreamPort, answer: Awaitable[Answer]) -> None:
        try:
            made = await answer
        except Exception as error:
            self._log.bug("Cannot answer a management request", error)
            made = Answer(500)
        self._send(request, port, made)

    def _send(self, request: Request, port: StreamPort, answer: Answer) -> StreamSink:
        headers: list[tuple[bytes, bytes]] = [
            (b"Content-Type", answer.content_type.encode()), (b"Content-Length", b"%d" % len(answer.body)),
            *_cross_origin(request),
        ]  # fmt: skip
        port.respond(answer.status, headers)
        if request.method != b"HEAD" and answer.body:
            port.write(answer.body)
        port.write_eof()
        port.stop_reading()
        return IGNORE

    def _stream(self, request: Request, port: StreamPort, claims: Claims) -> StreamSink:
        if request.method != b"GET":
            return self._send(request, port, NOT_ALLOWED)
        fields = dict(request.headers)
        key = fields.get(b"sec-websocket-key", b"")
        if request.kind is not RequestKind.WEBSOCKET or not key:
            return self._send(request, port, Answer(426, b"WebSocket protocol violation: no upgrade was asked for\n"))
        if fields.get(b"sec-websocket-version", b"13") != b"13":
            return self._send(request, port, Answer(400, b"unsupported WebSocket protocol version\n"))
        if not _may_stream(fields.get(b"origin", b""), request.host):
            return self._send(request, port, Answer(403, b"request Origin is not authorized for Host\n"))
        offers = fields.get(b"sec-websocket-extensions", b"").split(b",")
        deflate = any(offer.partition(b";")[0].strip() == b"permessage-deflate" for offer in offers)
        headers: list[tuple[bytes, bytes]] = [
            (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), (b"Sec-Websocket-Accept", accept_value(key)),
        ]  # fmt: skip
        if deflate:
            headers.append((b"Sec-Websocket-Extensions", _DEFLATE))
        port.respond(101, headers)
        return LogStream(self.streams, port, claims.actor, deflate=deflate)


def _may_stream(origin: bytes, host: bytes) -> bool:
    """Tell whether a browser at `origin` may open the log stream; programs send no Origin."""
    if not origin:
        return True
    try:
        place = urlsplit(origin.decode("latin-1")).netloc.lower()
    except ValueError:
        return False
    return place == host.decode("latin-1").lower() or fnmatch.fnmatchcase(place, _PATTERN)


def _cross_origin(request: Request) -> Headers:
    """Give the CORS fields: the dashboard's origins may read, with credentials."""
    fields: list[tuple[bytes, bytes]] = [(b"Vary", b"Origin")]
    origin = next((value for name, value in request.headers if name == b"origin"), b"")
    if origin.startswith(b"https://") and fnmatch.fnmatchcase(origin.decode("latin-1"), f"https://{_PATTERN}"):
        fields += [(b"Access-Control-Allow-Origin", origin), (b"Access-Control-Allow-Credentials", b"true")]
    return fields
