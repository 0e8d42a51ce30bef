"""The inspector at work in a process: taps put in place, the page served, captures written.

Owns: the wiring of `--inspect` and `--capture` for `run` and `edge`, and what the page may order. In: settings.
Out: a running page, a capture file, log lines. Never: is loaded without one of the two flags.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from connector.app.config import RunConfig, split_address
from connector.app.dialler import Dialler
from connector.app.logs import Logger
from connector.errors import ConfigError, UsageError
from connector.inspector.capture import CaptureWriter
from connector.inspector.hub import Inspector
from connector.inspector.page import Page
from connector.inspector.streams import StreamRecord
from connector.protocol.ports import (
    Acceptor,
    Buffer,
    Headers,
    Request,
    RequestKind,
    ResetCode,
    ResponseSource,
    StreamSink,
)
from connector.proxy.dispatch import Dispatcher

LARGEST_REPLAY = 1_048_576
"""Bytes of a body that is sent again; more than a capture keeps."""

Say = Callable[[str, dict[str, Any]], None]
"""Prints one line: text and fields."""


@asynccontextmanager
async def inspected(config: RunConfig, dispatcher: Dispatcher, dialler: Dialler, log: Logger) -> AsyncIterator[None]:
    """Watch a run of the connector."""

    def describe(request: Request) -> tuple[int | None, str]:
        if request.kind not in {RequestKind.HTTP, RequestKind.WEBSOCKET}:
            return None, "private network"
        rule = dispatcher.ingress.match(request.host, request.target)
        return rule.index, rule.service.text

    hub = Inspector("connector", no_redact=config.no_redact, describe=describe, title=str(config.token.tunnel_id))
    dialler.tap = dispatcher.tap = log.output.tap = hub
    controls = ConnectorControls(hub, dispatcher.accept)

    def say(text: str, fields: dict[str, Any]) -> None:
        log.info(text, **fields)

    try:
        async with serve(hub, controls, config.inspect, config.capture, say, log.warn):
            yield
    finally:
        dialler.tap = dispatcher.tap = log.output.tap = None


@asynccontextmanager
async def serve(
    hub: Inspector,
    controls: CaptureControls,
    address: str | None,
    capture: str | None,
    say: Say,
    warn: Callable[[str], None],
) -> AsyncIterator[Page | None]:
    """Serve the page and write the capture, as far as they are asked for."""
    controls.warn = warn
    if hub.no_redact:
        warn("--no-redact: the inspector shows and keeps secrets; do not hand its captures on")
    try:
        if capture is not None:
            say(f"Capturing to {controls.start_capture(capture)}", {})
        if address is None:
            yield None
            return
        host, port = split_address(address, "--inspect", any_host=True)
        async with Page(hub, host, port, controls) as page:
            if host not in {"", "127.0.0.1", "localhost", "::1"}:
                warn(f"--inspect {address}: others on the network can reach this page; its address is all they need")
            say(f"Inspector: {page.url}", {"inspector": page.url})
            yield page
    finally:
        controls.stop_capture()


class CaptureControls:
    """What page and flags do with captures; the base of both kinds of Controls."""

    features: tuple[str, ...] = ("capture",)

    def __init__(self, hub: Inspector) -> None:
        self.hub = hub
        self.warn: Callable[[str], None] = lambda text: None
        self._writer: CaptureWriter | None = None

    def start_capture(self, path: str) -> str:
        """Begin to record into `path`, or a new file in the working directory."""
        if self._writer is not None and self._writer.active:
            raise UsageError(f"already capturing to {self._writer.path}", advice="Stop that first.")
        name = path or time.strftime(f"{self.hub.role}-%Y%m%d-%H%M%S.capture")
        if not path and Path(name).exists():
            raise ConfigError(f"{name} is there already", advice="Try again in a second.")
        loop = asyncio.get_running_loop()
        self._writer = CaptureWriter(name, self.hub, loop.call_later, self._failed)
        self.hub.recorders.append(self._writer.record)
        return str(Path(name).absolute())

    def stop_capture(self) -> None:
        """End the recording, if there is one."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self.hub.recorders.remove(writer.record)
            writer.close()

    def capture_state(self) -> dict[str, Any] | None:
        """Return file and size."""
        writer = self._writer
        if writer is None:
            return None
        return {"path": writer.path, "bytes": writer.size, "records": writer.records, "active": writer.active}

    def _failed(self, text: str) -> None:
        self.warn(text)
        self.hub.on_event("capture", {"error": text})

    async def replay(self, record: StreamRecord, changes: dict[str, Any]) -> int:
        """Not here."""
        raise UsageError("replay is not possible here")

    def faults(self) -> dict[str, Any]:
        """Not here."""
        raise UsageError("only the dev edge has faults")

    def add_fault(self, text: str) -> None:
        """Not here."""
        self.faults()

    def clear_fault(self, name: str) -> None:
        """Not here."""
        self.faults()


class ConnectorControls(CaptureControls):
    """Orders to a running connector: a replay goes through its rules to its origins, as if the edge had sent it."""

    features = ("capture", "replay")

    def __init__(self, hub: Inspector, accept: Acceptor) -> None:
        super().__init__(hub)
        self._accept = accept

    async def replay(self, record: StreamRecord, changes: dict[str, Any]) -> int:
        """Send it again; the answer is the new stream's record."""
        request, body = changed_request(record, changes)
        again = self.hub.open_stream(request, "replay", 0, -1, replay=record.identity)
        port = _DiscardingPort()
        sink = self.hub.watch(request, port, self._accept, again)
        port.sink = sink
        if body:
            sink.on_data(body)
        sink.on_eof()
        return again.identity


def changed_request(record: StreamRecord, changes: dict[str, Any]) -> tuple[Request, bytes]:
    """Return the request of `record` with `changes`, and its body. Errors: UsageError."""
    if record.kind is not RequestKind.HTTP:
        raise UsageError("only HTTP requests can be sent again here", advice="For a WebSocket: connector replay FILE.")
    kept = record.bodies[0]
    if "body" in changes:
        body = str(changes["body"]).encode()
    else:
        if kept.truncated:
            raise UsageError(
                f"only {len(kept.kept)} of the {kept.size} bytes of the body were kept", advice="Edit the request."
            )
        body = bytes(kept.kept)
    if len(body) > LARGEST_REPLAY:
        raise UsageError(f"a body of {len(body)} bytes, more than {LARGEST_REPLAY}")
    headers: list[tuple[bytes, bytes]] = list(record.headers)
    if "headers" in changes:
        # What was masked in the page is put back from memory.
        original = {name.lower(): value for name, value in headers}
        headers = []
        for pair in changes["headers"]:
            if not (isinstance(pair, list) and len(pair) == 2):
                raise UsageError("headers are pairs of name and value")
            name, value = str(pair[0]).strip().lower().encode(), str(pair[1]).encode()
            if value == b"[redacted]":
                value = original.get(name, value)
            headers.append((name, value))
    headers = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    for name, value in headers:
        if (
            not name
            or any(byte < 33 or byte > 126 or byte == 58 for byte in name)
            or any(c in value for c in b"\r\n\0")
        ):
            raise UsageError(f"{name!r}: {value!r} is no header")
    method = str(changes.get("method", record.method.decode("latin-1"))).encode()
    target = str(changes["target"]).encode() if "target" in changes else record.target
    host = str(changes["host"]).encode() if "host" in changes else record.host
    if b"[redacted]" in target:
        raise UsageError("the path still has a masked value", advice="Write the real one in its place.")
    if not method.isalpha() or not target.startswith(b"/") or any(byte < 33 or byte > 126 for byte in target + host):
        raise UsageError("method, path or host are not what HTTP takes")
    if body:
        headers.append((b"content-length", str(len(body)).encode()))
    return Request(RequestKind.HTTP, method, target, host, headers, len(body), record.scheme), body


class _DiscardingPort:
    """The port of a replay: nobody waits for the answer but the record."""

    def __init__(self) -> None:
        self.spans = b""
        self.sink: StreamSink | None = None
        self._down = 0

    def respond(
        self, status: int, headers: Headers, source: ResponseSource = ResponseSource.ORIGIN, reason: bytes = b""
    ) -> None:
        """Ignore."""

    def write(self, data: Buffer) -> None:
        """Count."""
        self._down += len(data)

    def write_eof(self, trailers: Headers = ()) -> None:
        """Ignore."""

    def reset(self, code: ResetCode) -> None:
        """Ignore."""

    def stop_reading(self) -> None:
        """Ignore."""

    def consumed(self, n: int) -> None:
        """Ignore."""

    def traffic(self) -> tuple[int, int]:
        """Payload so far."""
        return 0, self._down
