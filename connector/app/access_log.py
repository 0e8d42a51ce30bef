"""The access log: one line a request, off by default (`--access-log`).

Owns: the line. In: a request that is over. Out: one info line with `event` 1 (http) or 2 (tcp).
Never: the query or a header that could hold a secret.
"""

from __future__ import annotations

from typing import Any

from connector.app.logs import Logger
from connector.app.meters import OnFinished
from connector.protocol.ports import Request, RequestKind
from connector.proxy.ingress import Rule

EVENT_HTTP, EVENT_TCP = 1, 2
"""The field `event` of lines about requests; lines about connections have 0."""

_WANTED = {b"cf-ray": "ray", b"cf-connecting-ip": "client"}


def access_log(log: Logger) -> OnFinished:
    """Give the listener that writes the lines."""

    def on_finished(
        request: Request, rule: Rule | None, status: int, whole: bool, traffic: tuple[int, int], seconds: float
    ) -> None:
        fields: dict[str, Any] = {"connIndex": request.conn_index}
        for name, value in request.headers:
            wanted = _WANTED.get(name)
            if wanted is not None:
                fields[wanted] = value.decode("latin-1")
        if rule is not None:
            fields["ingressRule"] = rule.index
            fields["originService"] = rule.service.text
        tcp = request.kind is RequestKind.TCP
        fields.update(
            status=status,
            bytesIn=traffic[0],
            bytesOut=traffic[1],
            ms=round(seconds * 1000, 1),
            event=EVENT_TCP if tcp else EVENT_HTTP,
        )
        if not whole:
            fields["cut"] = True
        log.info(f"access {describe_request(request)}", **fields)

    return on_finished


def describe_request(request: Request) -> str:
    """Give method and URL, without the query: it may hold secrets."""
    host = request.host.decode("latin-1")
    if request.kind is RequestKind.TCP:
        return f"TCP {host}"
    path = request.target.partition(b"?")[0].decode("latin-1")
    return f"{request.method.decode('latin-1')} https://{host}{path}"
