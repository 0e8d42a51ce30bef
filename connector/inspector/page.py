"""The page: a small web server that shows what the inspector remembers, and takes the few orders it has.

Owns: routes, access rules, live updates. In: an Inspector, Controls. Out: JSON, the files in web/.
Never: listens beyond loopback unless told; answers a foreign Host or Origin; changes anything without the token.

Access: everything but the static files needs the token of the page's address, in the header `X-Inspector-Token` (or the
query of the live connection); Host must be an IP address, `localhost` or the name that was given to listen on, so that
no web site can reach in by DNS rebinding; Origin, where there is one, must be the page itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import secrets
from pathlib import Path
from typing import Any, Protocol

from aiohttp import WSMsgType, web

from connector.errors import ConfigError, ConnectorError, UsageError
from connector.inspector.capture import Item, read_bytes
from connector.inspector.capture_commands import export_bytes
from connector.inspector.decode import FORMS, decode, decode_mqtt
from connector.inspector.filters import Predicate, parse_filter
from connector.inspector.hub import Inspector
from connector.inspector.redact import redact_bytes, redact_values
from connector.inspector.render import annotated_rows
from connector.inspector.snippets import snippet
from connector.inspector.streams import StreamRecord
from connector.inspector.values import jsonable
from connector.inspector.wire_commands import bytes_of_text

WEB = Path(__file__).parent / "web"

TICK_SECONDS = 0.3
"""Between two live updates; only while a page is open."""

MAX_PAGES = 8
"""Pages open at a time; each costs a task and its updates."""

MAX_ROWS = 500
"""Rows in one update; the rest follows in the next."""

MAX_UPLOAD = 256 * 1024 * 1024
"""Bytes of a capture that is opened in the page."""

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
FILES = {
    "/": ("index.html", "text/html"), "/page.js": ("page.js", "text/javascript"),
    "/views.js": ("views.js", "text/javascript"), "/page.css": ("page.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}  # fmt: skip


class Controls(Protocol):
    """What the page may order beyond looking. `features` names what is there: replay, faults, capture."""

    features: tuple[str, ...]

    async def replay(self, record: StreamRecord, changes: dict[str, Any]) -> int:
        """Send a request again, with `method`, `target`, `host`, `headers`, `body` changed; return the new ID."""

    def faults(self) -> dict[str, Any]:
        """Return the faults in force, and the grammar."""

    def add_fault(self, text: str) -> None:
        """Switch a fault on. Errors: UsageError."""

    def clear_fault(self, name: str) -> None:
        """Switch a fault off; all of them without a name."""

    def start_capture(self, path: str) -> str:
        """Begin to record; return the file's name. Errors: ConfigError."""

    def stop_capture(self) -> None:
        """End the recording."""

    def capture_state(self) -> dict[str, Any] | None:
        """Return file and size of the recording at work, None without one."""


class Page:
    """One page server. `async with Page(...)`: afterwards `url` is where it is, token included."""

    def __init__(self, hub: Inspector, host: str, port: int, controls: Controls | None = None) -> None:
        self.hub = hub
        self.token = secrets.token_urlsafe(24)
        self.url = ""
        self._host = host or "127.0.0.1"
        self._port = port
        self._controls = controls
        self._sockets: dict[web.WebSocketResponse, Predicate] = {}
        self._sent: dict[web.WebSocketResponse, set[int]] = {}
        self._ticker: asyncio.Task[None] | None = None
        self._runner: web.AppRunner | None = None
        self.loaded: list[Item] | None = None
        """Records of the capture on show; None: what is in memory."""

    async def __aenter__(self) -> Page:
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_UPLOAD)
        for path in FILES:
            app.router.add_get(path, self._file)
        add = app.router
        add.add_get("/api/live", self._live)
        add.add_get("/api/state", self._state)
        add.add_get("/api/streams/{id:\\d+}", self._stream)
        add.add_get("/api/streams/{id:\\d+}/frames", self._frames)
        add.add_get("/api/streams/{id:\\d+}/frames/{seq:\\d+}", self._frame)
        add.add_get("/api/streams/{id:\\d+}/snippet", self._snippet)
        add.add_post("/api/streams/{id:\\d+}/replay", self._replay)
        add.add_get("/api/mqtt", self._mqtt)
        add.add_get("/api/control", self._control)
        add.add_get("/api/control/{seq:\\d+}", self._control_message)
        add.add_get("/api/links/{id:\\d+}/frames", self._link_frames)
        add.add_post("/api/decode", self._decode)
        add.add_post("/api/clear", self._clear)
        add.add_get("/api/faults", self._faults)
        add.add_post("/api/faults", self._change_faults)
        add.add_post("/api/capture", self._capture)
        add.add_get("/api/export", self._export)
        add.add_post("/api/open", self._open)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError(
                f"--inspect {self._host}:{self._port}: {error.strerror or error}",
                advice="Give another address, or port 0 for a free one.",
            ) from None
        host, port = self._runner.addresses[0][:2]
        self._port = port
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{port}/?token={self.token}"
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
        for socket in list(self._sockets):
            with contextlib.suppress(Exception):
                await socket.close()
        if self._runner is not None:
            await self._runner.cleanup()

    # -- access

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if not self._is_own_host(request.host):
            return self._refused(421, f"this page is not served for the host {request.host[:80]!r}")
        origin = request.headers.get("Origin")
        if origin is not None and origin != f"http://{request.host}":
            return self._refused(403, "a request from another site")
        if request.path.startswith("/api/"):
            given = request.headers.get("X-Inspector-Token") or request.query.get("token", "")
            if request.method != "GET" and "X-Inspector-Token" not in request.headers:
                given = ""  # a header cannot be set by another site, a form's address can
            if not secrets.compare_digest(given.encode(), self.token.encode()):
                return self._refused(403, "the token is missing or wrong: open the address that the log shows")
        try:
            response: web.StreamResponse = await handler(request)
        except web.HTTPException as error:
            return self._refused(error.status, error.reason)
        except ConnectorError as error:
            return self._refused(400, f"{error}. {error.advice}".strip())
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    def _is_own_host(self, host: str) -> bool:
        name, _, port = host.rpartition(":")
        if not port.isdigit():
            name, port = host, "80"
        name = name.strip("[]").lower()
        if int(port) != self._port:
            return False
        if name in {"localhost", self._host.lower()}:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _refused(self, status: int, text: str) -> web.Response:
        return web.json_response({"error": text}, status=status, headers=HEADERS)

    # -- static

    async def _file(self, request: web.Request) -> web.Response:
        name, kind = FILES[request.path]
        return web.Response(body=(WEB / name).read_bytes(), content_type=kind, charset="utf-8")

    # -- live

    async def _live(self, request: web.Request) -> web.StreamResponse:
        if len(self._sockets) >= MAX_PAGES:
            return self._refused(503, f"{MAX_PAGES} pages are open already")
        socket = web.WebSocketResponse(heartbeat=30.0, max_msg_size=65_536)
        await socket.prepare(request)
        self._sockets[socket] = parse_filter("")
        self._sent[socket] = set()
        if self._ticker is None:
            self._ticker = asyncio.create_task(self._tick(), name="inspector page")
        try:
            await self._send_all(socket)
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    await self._order(socket, message.data)
        except (ConnectionError, RuntimeError):
            pass
        finally:
            self._sockets.pop(socket, None)
            self._sent.pop(socket, None)
        return socket

    async def _order(self, socket: web.WebSocketResponse, text: str) -> None:
        try:
            order = json.loads(text)
            self._sockets[socket] = parse_filter(str(order.get("filter", "")))
        except (ValueError, AttributeError):
            return
        except UsageError as error:
            await socket.send_json({"filter_error": f"{error}. {error.advice}".strip()})
            return
        await self._send_all(socket)

    async def _send_all(self, socket: web.WebSocketResponse) -> None:
        predicate = self._sockets[socket]
        rows = [row for row in self.hub.rows() if predicate(row)]
        self._sent[socket] = {row["id"] for row in rows}
        await socket.send_json({"reset": True, "rows": rows, "status": self._status()})

    async def refresh(self) -> None:
        """Send every page everything."""
        for socket in list(self._sockets):
            with contextlib.suppress(ConnectionError, RuntimeError):
                await self._send_all(socket)

    async def _tick(self) -> None:
        """Tell every page what changed. One task for all; it ends when the last page goes."""
        try:
            while self._sockets:
                await asyncio.sleep(TICK_SECONDS)
                rows = [record.row(self.hub.no_redact) for record in self.hub.changed()[:MAX_ROWS]]
                status = self._status()
                for socket, predicate in list(self._sockets.items()):
                    sent = self._sent.get(socket)
                    if sent is None:
                        continue
                    matching = [row for row in rows if predicate(row)]
                    gone = [row["id"] for row in rows if row["id"] in sent and not predicate(row)]
                    if len(sent) > len(self.hub.streams):
                        gone += [identity for identity in sent if identity not in self.hub.streams]
                    sent.update(row["id"] for row in matching)
                    sent.difference_update(gone)
                    with contextlib.suppress(ConnectionError, RuntimeError):
                        await socket.send_json({"rows": matching, "gone": gone, "status": status})
        finally:
            self._ticker = None

    # -- looking

    def _status(self) -> dict[str, Any]:
        features = list(self._controls.features) if self._controls is not None else []
        capture = self._controls.capture_state() if self._controls is not None else None
        return {**self.hub.status(), "features": features, "capture": capture, "forms": list(FORMS)}

    def _record(self, request: web.Request) -> StreamRecord:
        record = self.hub.streams.get(int(request.match_info["id"]))
        if record is None:
            raise web.HTTPNotFound(reason="this stream is not remembered any more")
        return record

    async def _state(self, request: web.Request) -> web.Response:
        predicate = parse_filter(request.query.get("filter", ""))
        rows = [row for row in self.hub.rows() if predicate(row)]
        return _json({"status": self._status(), "rows": rows})

    async def _stream(self, request: web.Request) -> web.Response:
        return _json(self._record(request).detail(self.hub.no_redact))

    async def _frames(self, request: web.Request) -> web.Response:
        after, limit = _number(request, "after", 0), min(_number(request, "limit", 200), 1_000)
        return _json(self.hub.frames(self._record(request), after, limit))

    async def _frame(self, request: web.Request) -> web.Response:
        record = self._record(request)
        frames = record.frames
        wanted = int(request.match_info["seq"])
        entry = next((entry for entry in frames.ring if entry.seq == wanted), None) if frames is not None else None
        if frames is None or entry is None:
            raise web.HTTPNotFound(reason="this frame is not remembered any more")
        payload = entry.payload if self.hub.no_redact else redact_bytes(entry.payload)
        notes: list[tuple[int, int, str, str]] = []
        value: Any = None
        if frames.mqtt is not None and entry.packets:
            with contextlib.suppress(ConnectorError):
                value, notes = _explain_mqtt(payload, frames.mqtt.version, self.hub.no_redact)
        return _json({
            **self.hub.describe_frame(record, entry), "value": value,
            "hex": annotated_rows(payload, notes),
        })  # fmt: skip

    async def _snippet(self, request: web.Request) -> web.Response:
        return _json({"text": snippet(self._record(request), request.query.get("as", "curl"))})

    async def _mqtt(self, request: web.Request) -> web.Response:
        from time import monotonic  # noqa: PLC0415

        topics = self.hub.topics.rows(monotonic(), self.hub.no_redact)
        return _json({"sessions": self.hub.sessions(), "topics": topics[:2_000], "topics_total": len(topics)})

    async def _control(self, request: web.Request) -> web.Response:
        after = _number(request, "after", 0)
        hub = self.hub
        return _json({
            "links": [link.summary() for link in hub.links.values()],
            "messages": [row.row() for row in hub.control if row.seq > after],
            "events": [event for event in hub.events if event["seq"] > after],
            "configurations": [entry for entry in hub.configurations if entry["seq"] > after],
        })  # fmt: skip

    async def _control_message(self, request: web.Request) -> web.Response:
        wanted = int(request.match_info["seq"])
        row = next((row for row in self.hub.control if row.seq == wanted), None)
        if row is None:
            raise web.HTTPNotFound(reason="this message is not remembered any more")
        found = row.row(full=True)
        found["hex"] = annotated_rows(row.data, row.notes)
        del found["notes"]
        return _json(found)

    async def _link_frames(self, request: web.Request) -> web.Response:
        link = self.hub.links.get(int(request.match_info["id"]))
        if link is None:
            raise web.HTTPNotFound(reason="this link is not remembered any more")
        after, limit = _number(request, "after", 0), min(_number(request, "limit", 300), 2_000)
        return _json(
            {"link": link.summary(), "frames": link.rows(after, limit, payload=request.query.get("payload") != "0")}
        )

    async def _decode(self, request: web.Request) -> web.Response:
        order = await _object(request)
        form = str(order.get("form", "auto"))
        text = str(order.get("text", ""))[:1_000_000].strip()
        found = decode(bytes_of_text(text, form), form)
        keep = self.hub.no_redact
        shown, notes = (found.data, found.notes) if keep else found.masked()
        return _json({
            "form": found.form, "size": len(found.data), "hex": annotated_rows(shown, notes),
            "value": jsonable(found.value if keep else redact_values(found.value)),
        })  # fmt: skip

    # -- orders

    def _controlling(self, feature: str) -> Controls:
        if self._controls is None or feature not in self._controls.features:
            raise UsageError(f"{feature} is not possible here")
        return self._controls

    async def _replay(self, request: web.Request) -> web.Response:
        controls = self._controlling("replay")
        return _json({"id": await controls.replay(self._record(request), await _object(request))})

    async def _clear(self, request: web.Request) -> web.Response:
        self.hub.clear()
        await self.refresh()
        return _json({})

    async def _faults(self, request: web.Request) -> web.Response:
        return _json(self._controlling("faults").faults())

    async def _change_faults(self, request: web.Request) -> web.Response:
        controls = self._controlling("faults")
        order = await _object(request)
        if "add" in order:
            controls.add_fault(str(order["add"]))
        if "clear" in order:
            controls.clear_fault(str(order["clear"]))
        return _json(controls.faults())

    async def _capture(self, request: web.Request) -> web.Response:
        controls = self._controlling("capture")
        order = await _object(request)
        if order.get("stop"):
            controls.stop_capture()
            return _json({})
        return _json({"path": controls.start_capture(str(order.get("path", "")))})

    async def _export(self, request: web.Request) -> web.Response:
        """Export what is in memory, or the capture that was opened here."""
        form = request.query.get("format", "jsonl")
        if form not in {"jsonl", "har", "pcapng"}:
            raise UsageError(f"no format {form!r}", advice="Formats: jsonl, har, pcapng.")
        if self.loaded is not None:
            items = self.loaded
        else:
            from connector.inspector.snapshot import snapshot_items  # noqa: PLC0415

            items = snapshot_items(self.hub)
        data = await asyncio.get_running_loop().run_in_executor(None, export_bytes, items, form)
        name = f"capture.{form}"
        return web.Response(
            body=data,
            content_type="application/octet-stream",
            headers={"Content-Disposition": f'attachment; filename="{name}"'},
        )

    async def _open(self, request: web.Request) -> web.Response:
        """Show a capture file that the browser sends."""
        if self.hub.role != "capture":
            raise UsageError("this page shows a running process", advice="Use: connector inspect FILE.")
        from connector.inspector.snapshot import load_items  # noqa: PLC0415

        data = await request.read()
        reader, self.loaded = read_bytes(data, "the file")
        self.hub.no_redact = not reader.redacted
        load_items(self.hub, self.loaded)
        await self.refresh()
        return _json({"streams": len(self.hub.streams)})


def _explain_mqtt(payload: bytes, version: int, keep: bool) -> tuple[Any, list[tuple[int, int, str, str]]]:
    from connector.wire.mqtt import packet_length  # noqa: PLC0415

    values, notes, at = [], [], 0
    while at < len(payload):
        found = packet_length(payload, at)
        if found is None or at + found[1] > len(payload):
            break
        value, inner, _, version = decode_mqtt(payload[at : at + found[1]], version)
        values.append(jsonable(value if keep else redact_values(value)))
        notes += [(start + at, size, name, text) for start, size, name, text in inner]
        at += found[1]
    return values[0] if len(values) == 1 else values, notes


def _json(value: Any) -> web.Response:
    return web.json_response(value)


def _number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name, "")
    return int(text) if text.isdigit() and len(text) < 16 else default


async def _object(request: web.Request) -> dict[str, Any]:
    try:
        value = json.loads(await request.read() or b"{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UsageError("the body is no JSON object")
    return value
