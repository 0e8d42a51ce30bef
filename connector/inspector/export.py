"""Captures in other programs' formats: JSON lines, and HAR for browsers' developer tools.

Owns: both formats. In: records of a file. Out: text. Never: adds what the capture does not hold; unmasks.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from connector import __version__
from connector.inspector.capture import CapturedStream, CaptureModel, Item
from connector.inspector.values import bytes_to_json


def to_jsonl(items: Iterable[Item]) -> Iterable[str]:
    """Yield one JSON text per record; the payload is the member `payload`, text or `{"hex": ...}`."""
    for item in items:
        fields = dict(item.fields)
        if item.payload:
            fields["payload"] = bytes_to_json(item.payload)
        yield json.dumps(fields, ensure_ascii=False)


def to_har(model: CaptureModel) -> str:
    """Return a HAR 1.2 document of all HTTP and WebSocket streams."""
    entries = [
        _entry(model, stream) for stream in model.streams.values() if stream.open.get("kind") in {"http", "websocket"}
    ]
    entries.sort(key=lambda entry: str(entry["startedDateTime"]))
    document = {
        "log": {
            "version": "1.2",
            "creator": {"name": "connector", "version": __version__},
            "pages": [],
            "entries": entries,
        }
    }
    return json.dumps(document, indent=1, ensure_ascii=False)


def _entry(model: CaptureModel, stream: CapturedStream) -> dict[str, Any]:
    started = stream.open.get("wall") or model.wall(stream.session, stream.open.get("at", 0.0))
    marks = stream.end.get("marks", {})
    total = float(stream.end.get("ms") or 0.0)
    connected = float(marks.get("connected", marks.get("reused", 0.0)))
    head = float(marks.get("head", total))
    request_headers = stream.open.get("headers", [])
    response_headers = stream.head.get("headers", [])
    url = stream.url
    entry: dict[str, Any] = {
        "startedDateTime": _stamp(started),
        "time": total,
        "request": {
            "method": stream.open.get("method", ""), "url": url, "httpVersion": _version(stream),
            "cookies": [], "headers": _fields([["host", stream.open.get("host", "")], *request_headers]),
            "queryString": [
                {"name": name, "value": value}
                for name, value in parse_qsl(urlsplit(url).query, keep_blank_values=True, errors="replace")
            ],
            "headersSize": -1, "bodySize": int(stream.end.get("up", len(stream.bodies[0]))),
        },
        "response": {
            "status": int(stream.head.get("status", 0)), "statusText": "", "httpVersion": _version(stream),
            "cookies": [], "headers": _fields(response_headers), "content": _content(stream, response_headers),
            "redirectURL": _value(response_headers, "location"), "headersSize": -1,
            "bodySize": int(stream.end.get("down", len(stream.bodies[1]))),
        },
        "cache": {},
        "timings": {
            "blocked": -1, "dns": -1, "connect": connected if "connected" in marks else -1, "ssl": -1,
            "send": 0, "wait": max(0.0, head - (connected if "connected" in marks else 0.0)),
            "receive": max(0.0, total - head),
        },
        "_transport": stream.open.get("transport"), "_rule": stream.open.get("rule"),
        "_service": stream.open.get("service"), "_ended": stream.end.get("how"),
        "_diagnosis": stream.end.get("diagnosis", []),
    }  # fmt: skip
    if stream.bodies[0]:
        entry["request"]["postData"] = _post(stream, request_headers)
    entry["_resourceType"] = "document" if "html" in entry["response"]["content"]["mimeType"] else "fetch"
    if stream.open.get("kind") == "websocket":
        entry["_resourceType"] = "websocket"
        entry["_webSocketMessages"] = [_message(model, stream, item) for item in stream.frames]
    return entry


def _stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _version(stream: CapturedStream) -> str:
    return "HTTP/3.0" if stream.open.get("transport") == "quic" else "HTTP/2.0"


def _fields(headers: list[list[str]]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in headers]


def _value(headers: list[list[str]], name: str) -> str:
    return next((value for key, value in headers if key.lower() == name), "")


def _content(stream: CapturedStream, headers: list[list[str]]) -> dict[str, Any]:
    body = stream.bodies[1]
    content: dict[str, Any] = {
        "size": int(stream.body_fields[1].get("size", len(body))),
        "mimeType": _value(headers, "content-type") or "application/octet-stream",
    }
    try:
        content["text"] = body.decode()
    except UnicodeDecodeError:
        content["text"] = base64.b64encode(body).decode()
        content["encoding"] = "base64"
    if stream.body_fields[1].get("truncated"):
        content["comment"] = f"only the first {len(body)} bytes were kept"
    return content


def _post(stream: CapturedStream, headers: list[list[str]]) -> dict[str, Any]:
    return {
        "mimeType": _value(headers, "content-type") or "application/octet-stream",
        "text": stream.bodies[0].decode("utf-8", "replace"),
    }


def _message(model: CaptureModel, stream: CapturedStream, item: Item) -> dict[str, Any]:
    """One message in the form that Chromium's developer tools write and read."""
    fields = item.fields
    text = fields.get("opcode") == 1
    message: dict[str, Any] = {
        "type": "receive" if fields.get("way") else "send",
        "time": model.wall(stream.session, fields.get("at", 0.0)),
        "opcode": fields.get("opcode"),
        "data": item.payload.decode("utf-8", "replace") if text else base64.b64encode(item.payload).decode(),
    }
    if fields.get("packets"):
        message["_mqtt"] = [" ".join(packet) for packet in fields["packets"]]
    return message
