"""A stream as something to paste: curl, mosquitto_pub, or a pytest test.

Owns: the texts. In: a stream's record. Out: text, secrets masked as everywhere. Never: runs anything.
"""

from __future__ import annotations

import shlex
from urllib.parse import urlsplit

from connector.errors import UsageError
from connector.inspector.mqtt_session import CLIENT
from connector.inspector.redact import redact_bytes, redact_headers, redact_target, redact_text
from connector.inspector.streams import DOWN, UP, StreamRecord, identifier
from connector.wire import mqtt

KINDS = ("curl", "mosquitto_pub", "pytest")

_DROPPED = frozenset((
    b"content-length", b"host", b"connection", b"upgrade", b"transfer-encoding", b"cf-ray", b"cf-connecting-ip",
    b"cf-visitor", b"cf-warp-tag-id", b"cdn-loop", b"x-forwarded-for", b"x-forwarded-proto", b"sec-websocket-key",
    b"sec-websocket-version", b"sec-websocket-extensions", b"cf-ipcountry",
))  # fmt: skip
"""What the client or the edge adds by itself."""

LONGEST_BODY = 4_096
"""Bytes of a body that go into a snippet."""


def snippet(record: StreamRecord, kind: str) -> str:
    """Return the text. Errors: UsageError for a kind that does not fit the stream."""
    if kind == "curl":
        return _curl(record)
    if kind == "mosquitto_pub":
        return _mosquitto(record)
    if kind == "pytest":
        return _pytest(record)
    raise UsageError(f"no snippet of kind {kind!r}", advice=f"Kinds: {', '.join(KINDS)}.")


def _plain(record: StreamRecord) -> tuple[str, str, list[tuple[str, str]], bytes]:
    """Method, URL, headers worth repeating, body; masked unless secrets are kept."""
    keep = record.hub.no_redact
    target = record.target if keep else redact_target(record.target)
    headers = record.headers if keep else redact_headers(record.headers)
    shown = [
        (name.decode("latin-1"), value.decode("utf-8", "replace"))
        for name, value in headers
        if name.lower() not in _DROPPED and not name.lower().startswith(b"cf-")
    ]
    body = bytes(record.bodies[UP].kept[:LONGEST_BODY])
    url = f"{record.scheme.decode()}://{record.host.decode('utf-8', 'replace')}{target.decode('utf-8', 'replace')}"
    cut = record.bodies[UP].size > len(body)
    return record.method.decode("latin-1"), url, shown, body if keep else redact_bytes(body, cut=cut)


def _curl(record: StreamRecord) -> str:
    method, url, headers, body = _plain(record)
    words = ["curl", "--include"]
    if method not in {"GET", "POST"} or (method == "POST" and not body):
        words += ["--request", method]
    for name, value in headers:
        words += ["--header", f"{name}: {value}"]
    tail = ""
    if body:
        try:
            words += ["--data-binary", body.decode()]
        except UnicodeDecodeError:
            words += ["--data-binary", "@-" if len(body) <= 1_024 else "@BODY"]
            if len(body) <= 1_024:
                escaped = "".join(f"\\x{byte:02x}" for byte in body)
                tail = f"printf '{escaped}' | "
    return tail + " ".join(shlex.quote(word) for word in [*words, url])


def _mosquitto(record: StreamRecord) -> str:
    session = record.frames.mqtt if record.frames is not None else None
    if record.frames is None or session is None:
        raise UsageError("this stream carries no MQTT")
    parts = urlsplit(f"//{record.host.decode('latin-1')}")
    base = ["mosquitto_pub", "--host", parts.hostname or "localhost", "--port", str(parts.port or 443)]
    version = {3: "mqttv31", 4: "mqttv311", 5: "mqttv5"}[session.version]
    base += ["--id", session.client_id or "replay", "--protocol-version", version]
    if session.username:
        name = session.username if record.hub.no_redact else redact_text(session.username)
        base += ["--username", name, "--pw", "PASSWORD"]
    lines: list[str] = []
    for entry in reversed(record.frames.ring):
        if entry.way != CLIENT or len(lines) >= 10:
            continue
        for packet in entry.packets:
            if packet.kind != mqtt.PUBLISH:
                continue
            try:
                fields = _publish(entry.payload, session.version, record.hub.no_redact)
            except (UsageError, ValueError):
                continue
            words = [*base, "--topic", fields[0], "--qos", str(fields[2]), "--message", fields[1]]
            lines.append(" ".join(shlex.quote(word) for word in [*words, *(["--retain"] if fields[3] else [])]))
            break
    note = (
        f"# Publishes of {session.client_id or 'this client'}, the newest first. mosquitto_pub speaks MQTT over TCP,\n"
        "# not over WebSocket: give host and port of the broker's TCP listener.\n"
    )
    if not lines:
        raise UsageError("no publish of this client is in memory any more")
    return note + "\n".join(lines)


def _publish(payload: bytes, version: int, keep: bool) -> tuple[str, str, int, bool]:
    found = mqtt.packet_length(payload)
    if found is None or found[1] > len(payload):
        raise UsageError("the packet is not whole")
    fields = mqtt.decode_packet(payload[: found[1]], version).fields
    message = fields["payload"] if keep else redact_bytes(fields["payload"])
    topic = fields["topic"] if keep else redact_text(fields["topic"])
    return topic, message.decode("utf-8", "replace"), fields["qos"], fields["retain"]


def _pytest(record: StreamRecord) -> str:
    method, url, headers, body = _plain(record)
    name = identifier(f"{method}_{urlsplit(url).path}")
    response = bytes(record.bodies[DOWN].kept[:200])
    cut = record.bodies[DOWN].size > len(response)
    expected = response if record.hub.no_redact else redact_bytes(response, cut=cut)
    lines = [
        "import urllib.error", "import urllib.request", "", "",
        f"def test_{name}() -> None:",
        "    request = urllib.request.Request(",
        f"        {url!r},",
        f"        method={method!r},",
        f"        headers={dict(headers)!r},",
        *([f"        data={body!r},"] if body else []),
        "    )",
        "    try:",
        "        with urllib.request.urlopen(request, timeout=30) as response:",
        "            status, body = response.status, response.read()",
        "    except urllib.error.HTTPError as error:",
        "        status, body = error.code, error.read()",
        f"    assert status == {record.status or 200}",
    ]  # fmt: skip
    if expected and not record.bodies[DOWN].truncated and len(record.bodies[DOWN].kept) <= 200:
        lines.append(f"    assert body == {expected!r}")
    return "\n".join(lines) + "\n"
