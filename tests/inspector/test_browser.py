"""The page in a real Chromium, with Mosquitto, an MQTT client, the dev edge and the connector behind it.

What a person does is clicked: every view, filters, the keyboard, replay, edit and replay, copies, captures, faults.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from tests.support.origins import mosquitto
from tests.support.processes import MOSQUITTO, Child, Tunnel, tunnel

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
WHOLE = bool(os.environ.get("BROWSER"))
CLOUDFLARED = os.environ.get("CLOUDFLARED", "")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="NO CHROMIUM HERE: apt-get install chromium"),
    pytest.mark.skipif(MOSQUITTO is None, reason="NO MOSQUITTO HERE"),
]
needs_cloudflared = pytest.mark.skipif(not CLOUDFLARED, reason="CLOUDFLARED names no binary")
whole = pytest.mark.skipif(not WHOLE, reason="long: make test-browser")


class Origin(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        answer = json.dumps(
            {"method": self.command, "path": self.path, "size": len(body), "x": self.headers.get("x-new")}
        )
        self.send_response(201 if self.command == "POST" else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def inspected(
    tmp_path: Path, *, protocol: str = "http2", edge: bool = False, original: bool = False
) -> Iterator[tuple[Tunnel, str]]:
    """A tunnel and the address of a page: the connector's, or with `edge` the dev edge's; `original`: cloudflared."""
    command = (
        *(CLOUDFLARED, "tunnel", "--no-autoupdate", "--edge", "{edge}", "--cacert", "{ca}", "--no-prechecks"),
        *("--protocol", protocol, "run", "--token-file", "{token_file}"),
    )
    run_args = ("--ha-connections", "1", "--protocol", protocol, *(() if edge else ("--inspect",)))
    state = tmp_path / "state"
    state.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Origin)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with (
            mosquitto(tmp_path, "MQTT-PASSWORD-1") as broker,
            tunnel(
                state,
                f"mqtt.localhost=http://127.0.0.1:{broker}",
                edge_args=(
                    "--ingress", f"web.localhost=http://127.0.0.1:{server.server_address[1]}",
                    *(("--inspect",) if edge else ()),
                ),
                run_args=() if original else run_args,
                command=command if original else None,
            ) as up,
        ):  # fmt: skip
            process: Child = up.edge if edge else up.connector
            found = process.wait_for(lambda e: "inspector" in e and "http" in str(e["inspector"]), what="the page") \
                if not edge else next(e for e in up.edge.events if "inspector" in e)  # fmt: skip
            yield up, str(found["inspector"])
    finally:
        server.shutdown()
        server.server_close()


def ask(up: Tunnel, path: str, *more: str) -> None:
    subprocess.run(
        ["curl", "-s", "--cacert", up.ca, "--resolve", f"web.localhost:{up.port}:127.0.0.1", *more,
         f"https://web.localhost:{up.port}{path}"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip


@contextmanager
def sensor(up: Tunnel, messages: int = 12, name: str = "sensor-1") -> Iterator[mqtt.Client]:
    ready = threading.Event()
    client = mqtt.Client(CallbackAPIVersion.VERSION2, name, transport="websockets")
    client.ws_set_options(path="/mqtt", headers={"Host": "mqtt.localhost"})
    context = ssl.create_default_context(cafile=str(up.ca))
    context.check_hostname = False
    client.tls_set_context(context)
    client.username_pw_set("u", "MQTT-PASSWORD-1")
    client.will_set(f"status/{name}", "gone", qos=1, retain=True)
    client.on_connect = lambda *_: client.subscribe([("a/#", 1)])
    client.on_subscribe = lambda *_: ready.set()
    client.connect("127.0.0.1", up.port, keepalive=30)
    client.loop_start()
    try:
        assert ready.wait(30)
        for number in range(messages):
            message = json.dumps({"n": number, "token": "TOPIC-SECRET-1"})
            client.publish(f"a/room{number % 3}/temp", message, qos=number % 3, retain=True).wait_for_publish(30)
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


def is_problem(line: Any) -> bool:
    """Whether a console line is one; that a request was refused is not, the page shows it."""
    return line.type in {"error", "warning"} and "Failed to load resource" not in line.text


@contextmanager
def browser(width: int = 1280, theme: str = "light") -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=theme)
            context.set_default_timeout(30_000)
            page = context.new_page()
            page.problems = []
            page.on("pageerror", lambda error: page.problems.append(str(error)))
            page.on("console", lambda line: page.problems.append(line.text) if is_problem(line) else None)
            yield page
            assert page.problems == []
        finally:
            chromium.close()


def test_the_page_opens_and_shows_a_stream(tmp_path: Path) -> None:
    """The smoke of `make test`."""
    with inspected(tmp_path) as (up, url), browser() as page:
        ask(up, "/hello?access_token=QUERY-SECRET-1")
        page.goto(url)
        page.wait_for_selector("#streams tbody tr[data-id]")
        assert "token=" not in page.url
        page.click("tr[data-id='1']")
        page.wait_for_selector("[data-waterfall]")
        assert "QUERY-SECRET-1" not in page.content()


@whole
@pytest.mark.parametrize("original", [False, pytest.param(True, marks=needs_cloudflared)], ids=["ours", "cloudflared"])
@pytest.mark.parametrize("protocol", ["http2", "quic"])
def test_everything_a_person_does(tmp_path: Path, protocol: str, original: bool) -> None:
    """Through our connector on its own page; through cloudflared on the page of the edge, which sees its other end."""
    with (
        inspected(tmp_path, protocol=protocol, edge=original, original=original) as (up, url),
        sensor(up) as client,
        browser() as page,
    ):
        ask(up, "/x?access_token=QUERY-SECRET-1", "-H", "Authorization: Bearer BEARER-SECRET-1")
        ask(up, "/form", "--data", "user=x&password=FORM-SECRET-1")
        page.goto(url)
        page.wait_for_selector("tr[data-id='3']")
        # MQTT in its WebSocket: frames, a frame's bytes, the session.
        page.click("tr[data-id='1']")
        page.wait_for_selector("#frames tr[data-frame]")
        assert page.locator("#frames", has_text="PUBLISH a/room1/temp qos 1").count()
        page.click("#frames tr[data-frame] >> text=PUBLISH >> nth=0")
        page.wait_for_selector("dialog .hexview >> text=topic")
        page.keyboard.press("Escape")
        page.click("#tab-session")
        page.wait_for_selector("[data-session='sensor-1'] >> text=a/#")
        # A new message shows without a reload.
        page.click("#tab-frames")
        client.publish("a/live", "now", qos=1).wait_for_publish(30)
        page.wait_for_selector("#frames >> text=a/live")
        # A request: timing, headers, body, raw.
        page.click("tr[data-id='3']")
        page.wait_for_selector("[data-waterfall]")
        page.click("#tab-request")
        page.wait_for_selector("#content pre[data-body] >> text=user=x")
        page.click("#raw")
        page.wait_for_selector("#raw >> text=Show pretty")
        page.click("#tab-response")
        page.wait_for_selector("#content pre[data-body] >> text=/form")
        # Replay, edit and replay, copies.
        page.click("#tab-overview")
        page.click("#replay")
        page.wait_for_selector("tr[data-id='4'] >> text=replay of 3")
        page.click("tr[data-id='3']")
        page.click("#edit")
        page.fill("[name=target]", "/edited")
        page.fill("[name=headers]", page.input_value("[name=headers]") + "\nx-new: yes")
        page.fill("[name=body]", "other")
        page.click("#send")
        page.wait_for_selector("tr[data-id='5'] >> text=/edited")
        page.click("#tab-response")
        page.wait_for_selector("#content pre[data-body]:has-text('yes')")
        for kind, row, words in (
            ("curl", 3, "curl --include"),
            ("pytest", 3, "def test_"),
            ("mosquitto_pub", 1, "--topic"),
        ):
            page.click(f"tr[data-id='{row}']")
            page.click("#tab-overview")
            page.click(f"[data-copy={kind}]")
            page.wait_for_selector(f"#snippet:has-text('{words}')")
            page.keyboard.press("Escape")
        # The filter, a wrong one, the keyboard.
        page.fill("#filter", "kind=websocket")
        page.wait_for_selector("tr[data-id='3']", state="detached")
        page.fill("#filter", "colour=red")
        page.wait_for_selector("#filter-error >> text=colour")
        page.fill("#filter", "")
        page.wait_for_selector("tr[data-id='3']")
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")
        page.keyboard.press("j")
        page.keyboard.press("j")
        page.keyboard.press("Enter")
        page.wait_for_selector("#detail:not([hidden]) h2 >> text=/form")
        page.keyboard.press("Escape")
        page.wait_for_selector("#detail[hidden]", state="attached")
        page.keyboard.press("?")
        page.wait_for_selector("dialog[open] >> text=Keys and filters")
        page.keyboard.press("Escape")
        # The other views.
        page.keyboard.press("2")
        page.wait_for_selector("#topics [data-topic='a/room1/temp']")
        page.keyboard.press("3")
        page.wait_for_selector("#configurations .add")
        page.click("#calls >> text=registerConnection >> nth=-1")
        page.wait_for_selector("dialog .hexview >> text=auth.tunnelSecret")
        page.keyboard.press("Escape")
        page.wait_for_selector("#events >> text=" + ("registered" if original else "Registered tunnel connection"))
        page.keyboard.press("4")
        page.wait_for_selector("#wire tr[data-frame]")
        page.check("#no-payload")
        payload = (
            "[...document.querySelectorAll('#wire tbody tr')].filter((row) => "
            "['DATA', 'STREAM'].includes(row.children[2].textContent) && !row.children[5].textContent).length"
        )
        for _ in range(300):
            if not page.evaluate(payload):
                break
            page.wait_for_timeout(100)
        assert not page.evaluate(payload)
        words = "HEADERS" if protocol == "http2" else "ConnectRequest"
        page.click(f"#wire tr[data-frame] >> text={words} >> nth=0")
        page.wait_for_selector("dialog[open] .hexview")
        page.keyboard.press("Escape")
        page.keyboard.press("5")
        page.fill("#bytes", "30 05 00 01 61 68 69")
        page.click("#decode")
        page.wait_for_selector("#decoded >> text=PUBLISH")
        # Themes, exports, a capture.
        before = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.click("#theme")
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
        page.keyboard.press("1")
        for form in ("jsonl", "har", "pcapng"):
            with page.expect_download() as download:
                page.select_option("#export", form)
            data = Path(download.value.path()).read_bytes()
            assert len(data) > 1_000
            for secret in (
                b"QUERY-SECRET-1",
                b"BEARER-SECRET-1",
                b"FORM-SECRET-1",
                b"MQTT-PASSWORD-1",
                b"TOPIC-SECRET-1",
            ):
                assert secret not in data, (form, secret)
        content = page.content()
        assert not re.search(r"(QUERY|BEARER|FORM|TOPIC)-SECRET-1|MQTT-PASSWORD-1", content)
        page.click("#clear")
        page.wait_for_selector("tr[data-id='3']", state="detached")
        page.wait_for_selector("tr[data-id='1']")


@whole
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_narrow_windows(tmp_path: Path, theme: str) -> None:
    with inspected(tmp_path) as (up, url), sensor(up), browser(400, theme) as page:
        ask(up, "/x")
        page.goto(url)
        page.wait_for_selector("tr[data-id='2']")
        for view in ("mqtt", "control", "wire", "decode", "streams"):
            page.click(f"#view-{view}")
            page.wait_for_timeout(300)
            assert page.evaluate("document.documentElement.scrollWidth") <= 400, view
        page.click("tr[data-id='2']")
        page.wait_for_selector("[data-waterfall]")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.click("#close")
        page.wait_for_selector("tr[data-id='1']:visible")


@whole
def test_faults_from_the_edge_s_page(tmp_path: Path) -> None:
    with inspected(tmp_path, edge=True) as (up, url), browser() as page:
        ask(up, "/x")
        page.goto(url)
        page.wait_for_selector("tr[data-id='1']")
        page.click("#view-faults")
        page.fill("#fault", "nonsense:1")
        page.click("#add-fault")
        page.wait_for_selector("#notice >> text=no such fault")
        page.fill("#fault", "reset:1")
        page.click("#add-fault")
        page.wait_for_selector("#faults >> text=reset:1")
        ask(up, "/y")
        page.click("#view-streams")
        page.wait_for_selector("tr[data-id='2'] >> text=cut by the edge")
        page.click("#view-faults")
        page.click("#clear-faults")
        page.wait_for_selector("#faults >> text=reset:1", state="detached")
        page.click("#view-streams")
        page.click("tr[data-id='1']")
        page.click("#replay")
        page.wait_for_selector("tr[data-id='3'] >> text=replay of 1")


@whole
def test_mqtt_is_replayed_against_a_broker_and_through_an_edge(tmp_path: Path) -> None:
    """Two clients at once, all QoS, a retained message; the broker without a memory answers the same again."""
    state, file, password = tmp_path / "state", tmp_path / "x.capture", tmp_path / "password"
    state.mkdir()
    password.write_text("MQTT-PASSWORD-1\n")
    recorded, fresh = tmp_path / "recorded", tmp_path / "fresh"
    for path in (recorded, fresh):
        path.mkdir()
    with mosquitto(recorded, "MQTT-PASSWORD-1") as broker, tunnel(
        state, f"mqtt.localhost=http://127.0.0.1:{broker}",
        run_args=("--ha-connections", "1", "--capture", str(file)),
    ) as tun:  # fmt: skip
        with sensor(tun, 3, "sensor-1") as listener, sensor(tun, 6, "sensor-2"):
            listener.publish("a/done", "x", qos=1).wait_for_publish(30)
        tun.edge.wait_for(lambda e: e.get("event") == "stream_closed", what="the first end")
        tun.edge.wait_for(lambda e: e.get("event") == "stream_closed", what="the second end")
        tun.connector.signal()
        tun.connector.wait(30)
    assert b"MQTT-PASSWORD-1" not in file.read_bytes()

    def replay(*more: str | Path) -> tuple[int, str]:
        with Child(sys.executable, "-m", "connector", "replay", file, *more) as child:
            return child.wait(100), child.text

    with mosquitto(fresh, "MQTT-PASSWORD-1") as broker:
        to = ("--to", f"http://127.0.0.1:{broker}")
        status, text = replay(*to)
        assert (status, "--mqtt-password-file" in text) == (255, True), text
        status, text = replay(*to, "--mqtt-password-file", password)
        assert (status, text.count("same answer")) == (0, 2), text
        # What was retained by that run comes on top in the next, through an edge as well.
        with tunnel(state, f"mqtt.localhost=http://127.0.0.1:{broker}") as tun:
            to = ("--to", tun.public, "--cacert", tun.ca)
            status, text = replay(*to, "--mqtt-password-file", password)
            assert (status, "not in the capture: PUBLISH a/room0/temp of" in text) == (1, True), text
            assert " retained" in text
            status, text = replay(*to, "--mqtt-user", "nobody", "--mqtt-password-file", password)
            assert (status, "the broker refused the connection" in text) == (1, True), text
