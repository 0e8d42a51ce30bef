"""PARITY.md's tables of endpoints and log events against the source and a running tunnel."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import connector
from tests.support.processes import tunnel

SOURCE = Path(connector.__file__).parent
TEXT = (SOURCE / "PARITY.md").read_text()
PATH_ROW = re.compile(r"^\| (`/[^|]*`) \| (yes|no) \| (.*) \|$", re.M)
EVENT_ROW = re.compile(r"^\| `([^|]*?)` \| ((?:`[\w-]+` ?)*) \| (yes|no|other words) \| (.*) \|$", re.M)
OURS = (
    "access GET https://", "The edge refuses", "Connecting via", "Tunnel connection options", "Registering tunnel",
    "Edge addresses come from", "QUIC was probed", "The network changed", "Requests get 503", "Flags without effect",
    "+---", "|  ",
)  # fmt: skip
"""How lines of a quiet run begin that cloudflared does not have, at debug level or as this program's own."""


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def events() -> dict[str, tuple[set[str], str, str]]:
    rows = EVENT_ROW.findall(section("Log events"))
    return {message: (set(re.findall(r"`([\w-]+)`", fields)), state, here) for message, fields, state, here in rows}


def fragments() -> str:
    """Every string of the program, f-strings with … for what varies."""
    found = []
    for path in [*SOURCE.glob("app/*.py"), *SOURCE.glob("proxy/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(parts))
    return "\n".join(found)


def test_every_message_that_is_called_the_same_is_in_the_source() -> None:
    table = events()
    assert len(table) > 40
    source = fragments()
    dynamic = {"200 OK", "GET https://… HTTP/1.1", "Settings: map[…]", "Environmental variables map[…]"}
    for message, (_, state, here) in table.items():
        if message not in dynamic and state == "yes":
            pieces = message.split("…")
            assert any(all(piece in line for piece in pieces) for line in source.split("\n")), message
        if state == "other words":
            assert re.findall(r"`(.*?)`", here)[0].split("…")[0] in source, message
        if state == "no":
            assert message not in source, message


def pattern(message: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, message.split("…"))))


def test_a_run_prints_nothing_that_the_table_lacks_and_fields_are_as_there(tmp_path: Path) -> None:
    table = {pattern(message): row for message, row in events().items()}
    table |= {
        pattern(re.findall(r"`(.*?)`", here)[0]): (fields, state, "")
        for fields, state, here in list(table.values()) if state == "other words"
    }  # fmt: skip
    env = {"TUNNEL_LOGLEVEL": "info", "TUNNEL_ACCESS_LOG": "true"}
    seen = []
    for service in ("http_status:404", "http://127.0.0.1:1"):
        with tunnel(tmp_path, service, env=env) as it:
            subprocess.run(
                ["curl", "-s", "--cacert", str(it.ca), "-o", "/dev/null", f"{it.public}/a"], check=True, timeout=30
            )
            it.connector.message("access ")
            it.connector.signal()
            assert it.connector.wait() == 0
            seen += it.connector.events
    for event in seen:
        message = event["message"]
        if message.startswith(OURS):
            continue
        rows = [row for form, row in table.items() if form.fullmatch(message)]
        assert rows, f"no row for {message!r}"
        allowed = rows[0][0] | {"level", "message", "time", "advice", "repeated"}
        if message != "Request failed":
            assert set(event) <= allowed, event
        assert rows[0][1] != "no", message
    names = {event["message"].split(" ")[0] for event in seen}
    assert {"Starting", "Registered", "Updated", "Unregistered", "Request", "Environmental", "Metrics"} <= names


def test_every_endpoint_answers_as_the_table_says(tmp_path: Path) -> None:
    metrics, management = section("Endpoints").split("Management (")
    with tunnel(tmp_path, "http_status:204", run_args=("--metrics", "127.0.0.1:0")) as it:
        line = it.connector.message("Starting metrics server on ")["message"]
        address = line.split()[-1].removesuffix("/metrics")
        rows = PATH_ROW.findall(metrics)
        assert len(rows) == 15
        for paths, state, _ in rows:
            for path in re.findall(r"`(.*?)`", paths):
                query = "?seconds=0.1" if path.endswith("profile") else ""
                try:
                    with urlopen(f"http://{address}{path}{query}", timeout=30) as answer:
                        status = answer.status
                except HTTPError as error:
                    status = error.code
                expected = 403 if path.endswith("cmdline") else 200
                assert status == (expected if state == "yes" else 404), path
    known = {path for paths, _, _ in PATH_ROW.findall(management) for path in re.findall(r"`(.*?)`", paths)}
    code = (SOURCE / "app" / "management.py").read_text() + (SOURCE / "app" / "pages.py").read_text()
    assert known == {"/ping", "/host_details", "/logs", "/metrics", "/debug/pprof/heap", "/debug/pprof/goroutine"}
    assert all(f'"{path}"' in code for path in known)
