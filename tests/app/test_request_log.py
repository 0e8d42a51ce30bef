"""Lines about requests: the fields that log pipelines match on, and no secret among them."""

from __future__ import annotations

import io
import json
from typing import Any

from connector.app.access_log import access_log
from connector.app.logs import Logger, LogOutput
from connector.app.request_log import request_log
from connector.protocol.ports import RequestKind
from connector.proxy.ingress import parse_remote_config
from tests.support.memory_port import request

RULE = parse_remote_config(1, {"ingress": [{"service": "http://127.0.0.1:8000"}]}).rules[0]
HEADERS = [
    (b"cf-ray", b"8a1b-LIS"), (b"cookie", b"session=s3cret"), (b"authorization", b"Basic czNjcmV0"), (b"x-a", b"1"),
    (b"x-a", b"2"), (b"cf-connecting-ip", b"203.0.113.7"),
    (b"user-agent", b"Mozilla/5.0 (compatible; Cloudflare-Traffic-Manager/1.0; "
     b"+https://www.cloudflare.com/traffic-manager/; pool-id: x)"),
]  # fmt: skip


def lines(level: str = "debug") -> tuple[Logger, Any]:
    stream = io.StringIO()
    log = Logger(LogOutput(level=level, json_lines=True, stream=stream))
    return log, lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def facts(**more: Any) -> dict[str, Any]:
    asked = request(target="/p?token=s3cret", headers=HEADERS, length=-1)
    asked.conn_index = 2
    return {
        "request": asked, "kind": "http", "method": "GET", "host": "app.example.com", "path": "/p",
        "rule": 0, "service": "http://127.0.0.1:8000", **more,
    }  # fmt: skip


def test_debug_lines_of_a_request() -> None:
    log, seen = lines()
    on_event = request_log(log)
    on_event("request", facts())
    on_event("response", facts(status=200))
    on_event("finished", facts(status=200, whole=True, ms=1.5))
    first, last = seen()
    assert first["message"] == "GET https://app.example.com/p HTTP/1.1"
    assert first["event"] == 1
    assert first["connIndex"] == 2
    assert first["ingressRule"] == 0
    assert first["originService"] == "http://127.0.0.1:8000"
    assert first["cfRay"] == "8a1b-LIS"
    assert first["lbProbe"] is True
    assert first["content-length"] == -1
    assert first["headers"]["X-A"] == ["1", "2"]
    assert first["headers"]["Cookie"] == first["headers"]["Authorization"] == ["*****"]
    assert last["message"] == "200 OK"
    assert "s3cret" not in json.dumps(seen())


def test_a_failure_is_a_line_at_every_level() -> None:
    log, seen = lines("error")
    on_event = request_log(log)
    on_event("request", facts())
    on_event("failed", facts(status=502, error="refused", cause="dial", advice="start it"))
    (line,) = seen()
    assert line["message"] == "Request failed"
    assert (line["error"], line["cause"], line["advice"]) == ("refused", "dial", "start it")
    assert (line["dest"], line["type"], line["event"]) == ("https://app.example.com/p", "http", 1)


def test_the_access_log() -> None:
    log, seen = lines("info")
    asked = facts()["request"]
    access_log(log)(asked, RULE, 200, True, (3, 5), 0.0123)
    access_log(log)(request(kind=RequestKind.TCP, host="10.0.0.1:22"), None, 0, False, (1, 2), 1.0)
    http, tcp = seen()
    assert http["message"] == "access GET https://app.example.com/p"
    assert {name: http[name] for name in ("ray", "client", "ingressRule", "status", "bytesIn", "bytesOut", "ms")} == {
        "ray": "8a1b-LIS", "client": "203.0.113.7", "ingressRule": 0, "status": 200, "bytesIn": 3, "bytesOut": 5,
        "ms": 12.3,
    }  # fmt: skip
    assert (tcp["message"], tcp["event"], tcp["cut"]) == ("access TCP 10.0.0.1:22", 2, True)
    assert "s3cret" not in json.dumps([http, tcp])
