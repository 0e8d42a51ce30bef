from __future__ import annotations

import io
import json

import pytest

from connector.app.logs import Logger, LogOutput
from connector.app.precheck_report import Kind, Report, Row, Status

ONE, TWO = "region1.v2.argotunnel.com", "region2.v2.argotunnel.com"


def rows(dns: str = "PP", quic: str = "PP", http2: str = "PP", api: str = "P") -> list[Row]:
    letters = {"P": Status.PASS, "F": Status.FAIL, "S": Status.SKIP}
    texts = {
        Kind.DNS: "DNS Resolved successfully",
        Kind.QUIC: "QUIC connection successful",
        Kind.HTTP2: "HTTP/2 connection successful",
        Kind.API: "API is reachable",
    }
    found = []
    for kind, marks, targets in (
        (Kind.DNS, dns, (ONE, TWO)),
        (Kind.QUIC, quic, (ONE, TWO)),
        (Kind.HTTP2, http2, (ONE, TWO)),
        (Kind.API, api, ("api.cloudflare.com:443",)),
    ):
        for target, mark in zip(targets, marks, strict=True):
            status = letters[mark]
            found.append(Row(kind, target, status, texts[kind], "Do this." if status is Status.FAIL else ""))
    return found


def test_the_box_is_cloudflareds() -> None:
    stream = io.StringIO()
    Report(rows()).log(Logger(LogOutput(stream=stream)))
    lines = [line.split(" INF ", 1)[1] for line in stream.getvalue().splitlines()]
    assert lines[:13] == [
        "+-------------------------------------------------------------------------------------+",
        "|                               CONNECTIVITY PRE-CHECKS                               |",
        "+-------------------------------------------------------------------------------------+",
        "|  COMPONENT         TARGET                     STATUS  DETAILS                       |",
        "|  DNS Resolution    region1.v2.argotunnel.com  PASS    DNS Resolved successfully     |",
        "|  DNS Resolution    region2.v2.argotunnel.com  PASS    DNS Resolved successfully     |",
        "|  UDP Connectivity  region1.v2.argotunnel.com  PASS    QUIC connection successful    |",
        "|  UDP Connectivity  region2.v2.argotunnel.com  PASS    QUIC connection successful    |",
        "|  TCP Connectivity  region1.v2.argotunnel.com  PASS    HTTP/2 connection successful  |",
        "|  TCP Connectivity  region2.v2.argotunnel.com  PASS    HTTP/2 connection successful  |",
        "|  Cloudflare API    api.cloudflare.com:443     PASS    API is reachable              |",
        "|                                                                                     |",
        "|  SUMMARY: Environment is healthy. cloudflared will use 'quic' as primary protocol.  |",
    ]
    assert [line.split(" ")[0] for line in lines[14:]] == ["precheck"] * 8
    assert "hard_fail=false" in lines[-1]
    assert "suggested_protocol=quic" in lines[-1]


@pytest.mark.parametrize(
    ("marks", "protocol", "hard", "degraded", "suggested", "summary"),
    [
        ({}, "auto", False, False, "quic", "healthy. cloudflared will use 'quic'"),
        ({}, "http2", False, False, "http2", "healthy. cloudflared will use 'http2'"),
        ({"quic": "PF"}, "auto", False, True, "http2", "degraded transport. cloudflared will proceed using 'http2'"),
        ({"quic": "FF"}, "quic", False, True, "http2", "proceed using 'http2'"),
        ({"http2": "FF"}, "auto", False, True, "quic", "proceed using 'quic'"),
        ({"api": "F"}, "auto", False, True, "quic", "proceed using 'quic'"),
        ({"quic": "PF", "http2": "FP"}, "auto", True, False, "", "critical failures"),
        ({"dns": "FF", "quic": "SS", "http2": "SS"}, "auto", True, False, "", "critical failures"),
        ({"dns": "PF", "quic": "PS", "http2": "PS"}, "auto", True, False, "", "critical failures"),
        ({"quic": "SS", "http2": "SS"}, "auto", False, False, "", "SUMMARY: Environment is healthy."),
        ({"quic": "SS", "http2": "FP"}, "auto", False, True, "", "SUMMARY: Environment ready with degraded transport."),
    ],
)
def test_the_verdict(
    marks: dict[str, str], protocol: str, hard: bool, degraded: bool, suggested: str, summary: str
) -> None:
    report = Report(rows(**marks), protocol=protocol)
    assert (report.hard_fail, report.degraded, report.suggested) == (hard, degraded, suggested)
    assert summary in report.summary
    lines = report.lines()
    actions = [line for line in lines if line.endswith(": Do this.")]
    assert len(actions) == sum(mark.count("F") for mark in marks.values())
    assert all(line.startswith("ERROR" if hard else "WARNING") for line in actions)
    value = json.loads(json.dumps(report.to_json()))
    assert value["SuggestedProtocol"] == {"quic": 1, "http2": 0, "": None}[suggested]
    assert len(value["Results"]) == 7
