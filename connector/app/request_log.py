"""Lines about requests: failures always, the rest at debug level, as cloudflared has them.

Owns: messages and fields of these lines, and which headers are masked in them. In: the dispatcher's events. Out: lines.
Never: the query of a URL; the value of a header that may hold a secret.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from connector.app.access_log import EVENT_HTTP, EVENT_TCP, describe_request
from connector.app.config import RunConfig
from connector.app.durations import format_duration
from connector.app.logs import MASK, Logger
from connector.protocol.ports import Request, RequestKind
from connector.protocol.protocol_choice import Transport

_SECRET_HEADERS = frozenset((
    b"authorization", b"cookie", b"proxy-authorization", b"cf-access-jwt-assertion", b"cf-access-client-secret",
    b"cf-access-token", b"x-api-key", b"sec-websocket-protocol",
))  # fmt: skip
"""Values that let somebody in. Some send a token as a WebSocket sub-protocol, browsers having no other header."""

_TYPES = {RequestKind.WEBSOCKET: "ws", RequestKind.TCP: "tcp"}
_PROBE = b"Mozilla/5.0 (compatible; Cloudflare-Traffic-Manager/1.0; +https://www.cloudflare.com/traffic-manager/;"
"""How the User-Agent of Cloudflare's load-balancer probes begins."""


def request_log(log: Logger) -> Callable[[str, dict[str, Any]], None]:
    """Give the listener for the dispatcher's events."""
    output = log.output

    def on_event(name: str, facts: dict[str, Any]) -> None:
        if name == "failed":
            request: Request = facts["request"]
            fields = _fields(request, facts)
            for key in ("error", "cause", "advice", "status"):
                if facts.get(key):
                    fields[key] = facts[key]
            fields["dest"] = describe_request(request).partition(" ")[2]
            fields["type"] = _TYPES.get(request.kind, "http")
            log.error("Request failed", **fields)
        elif name == "request" and output.enabled("debug"):
            request = facts["request"]
            fields = _fields(request, facts)
            fields["host"] = facts["host"]
            fields["path"] = facts["path"]
            fields["headers"] = shown_headers(request)
            fields["content-length"] = request.content_length
            log.debug(f"{describe_request(request)} HTTP/1.1", **fields)
        elif name == "finished" and output.enabled("debug"):
            request = facts["request"]
            fields = _fields(request, facts)
            fields["ms"] = facts.get("ms", 0)
            if not facts.get("whole", True):
                fields["cut"] = True
            log.debug(_status_text(facts["status"]), **fields)

    return on_event


def write_timeout_log(config: RunConfig, log: Logger) -> Callable[[Transport, int], None]:
    """Give the listener for streams that `--write-stream-timeout` ended."""

    def told(transport: Transport, conn_index: int) -> None:
        log.error(
            f"Closing {transport.value} stream due to timeout while writing",
            error=f"the edge took nothing for {format_duration(config.write_timeout)}",
            connIndex=conn_index,
            event=EVENT_HTTP,
            advice="--write-stream-timeout is how long; 0 is for ever.",
        )

    return told


def _fields(request: Request, facts: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"connIndex": request.conn_index}
    if "rule" in facts:
        fields["ingressRule"] = facts["rule"]
        fields["originService"] = facts["service"]
    tcp = request.kind is RequestKind.TCP
    fields["event"] = EVENT_TCP if tcp else EVENT_HTTP
    if tcp:
        fields["originService"] = "warp-routing"
        fields["destAddr"] = facts["host"]
    for name, value in request.headers:
        if name == b"cf-ray":
            fields["cfRay"] = value.decode("latin-1")
        elif name == b"user-agent" and value.startswith(_PROBE):
            fields["lbProbe"] = True
        elif name == b"flowid":
            fields["flowID"] = value.decode("latin-1")
    return fields


def shown_headers(request: Request) -> dict[str, list[str]]:
    """Give the headers as cloudflared logs them: an object of lists, names in canonical spelling, secrets masked."""
    shown: dict[str, list[str]] = {}
    for name, value in request.headers:
        spelled = "-".join(part.capitalize() for part in name.decode("latin-1").split("-"))
        text = MASK if name.lower() in _SECRET_HEADERS else value.decode("latin-1")
        shown.setdefault(spelled, []).append(text)
    return shown


def _status_text(status: int | None) -> str:
    if not status:
        return "no response"
    from http import HTTPStatus  # noqa: PLC0415  (debug lines only)

    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)
