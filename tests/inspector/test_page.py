"""The page's server: who may ask, what may be ordered, and that nothing masked is in any answer."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp

from connector.inspector.capture import write_items
from connector.inspector.hub import Inspector
from connector.inspector.page import Page
from connector.inspector.snapshot import snapshot_items
from tests.inspector.traffic import SECRETS, play_everything
from tests.support.aio import run


class Client:
    """Asks a page as the browser does."""

    def __init__(self, page: Page, session: aiohttp.ClientSession) -> None:
        self.base = page.url.partition("/?")[0]
        self.headers = {"X-Inspector-Token": page.token}
        self.session = session

    async def get(self, path: str, **headers: str) -> tuple[int, bytes, Any]:
        async with self.session.get(self.base + path, headers={**self.headers, **headers}) as response:
            return response.status, await response.read(), response.headers

    async def json(self, path: str) -> Any:
        status, body, _ = await self.get(path)
        assert status == 200, body
        return json.loads(body)

    async def post(self, path: str, value: Any, **headers: str) -> tuple[int, Any]:
        data = value if isinstance(value, bytes) else json.dumps(value)
        async with self.session.post(self.base + path, data=data, headers={**self.headers, **headers}) as response:
            return response.status, await response.json()


def with_page(test: Any, *, role: str = "connector") -> None:
    async def main() -> None:
        hub = Inspector(role)
        if role != "capture":
            play_everything(hub)
        async with Page(hub, "127.0.0.1", 0) as page, aiohttp.ClientSession() as session:
            await test(hub, page, Client(page, session))
        await asyncio.sleep(0.05)  # aiohttp closes its sockets a turn later

    run(main())


PATHS = [
    "/api/state", "/api/streams/1", "/api/streams/2", "/api/streams/2/frames", "/api/streams/2/frames/3", "/api/mqtt",
    "/api/control", "/api/control/3", "/api/links/1/frames", "/api/streams/1/snippet?as=curl",
    "/api/streams/1/snippet?as=pytest", "/api/streams/2/snippet?as=mosquitto_pub", "/api/export?format=jsonl",
    "/api/export?format=har", "/api/export?format=pcapng",
]  # fmt: skip


def test_no_answer_holds_a_secret() -> None:
    async def test(hub: Inspector, page: Page, client: Client) -> None:
        for path in PATHS:
            status, body, headers = await client.get(path)
            assert status == 200, (path, body)
            for secret in SECRETS:
                assert secret not in body, path
                assert secret.hex().encode() not in body.replace(b" ", b""), path
            assert "default-src 'none'" in headers["Content-Security-Policy"]
            assert headers["X-Content-Type-Options"] == "nosniff"

    with_page(test)


def test_the_token_is_needed_for_everything_but_the_files() -> None:
    async def test(hub: Inspector, page: Page, client: Client) -> None:
        for path in [*PATHS, "/api/live"]:
            assert (await client.get(path, **{"X-Inspector-Token": "wrong"}))[0] == 403
        client.headers = {}
        assert (await client.get("/"))[0] == 200
        assert (await client.get("/page.js"))[0] == 200
        # The token in a URL is enough to look, not to change anything: a form of another site could have it.
        assert (await client.get(f"/api/state?token={page.token}"))[0] == 200
        assert (await client.post(f"/api/clear?token={page.token}", {}))[0] == 403

    with_page(test)


def test_foreign_hosts_and_origins_are_refused() -> None:
    async def test(hub: Inspector, page: Page, client: Client) -> None:
        port = client.base.rpartition(":")[2]
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", "localhost:1", f"localhost.evil:{port}"):
            assert (await client.get("/", Host=host))[0] == 421, host
        assert (await client.get("/", Host=f"localhost:{port}"))[0] == 200
        assert (await client.get("/api/state", Origin="http://evil.example"))[0] == 403
        assert (await client.get("/api/state", Origin="null"))[0] == 403
        assert (await client.get("/api/state", Origin=client.base))[0] == 200
        assert (await client.get("/../hub.py"))[0] == 404
        assert (await client.get("/web/index.html"))[0] == 404

    with_page(test)


def test_live_rows_follow_the_filter() -> None:
    async def test(hub: Inspector, page: Page, client: Client) -> None:
        async with client.session.ws_connect(f"{client.base}/api/live?token={page.token}") as socket:
            first = await socket.receive_json(timeout=20)
            assert [row["id"] for row in first["rows"]] == [1, 2]
            await socket.send_json({"filter": "kind=websocket"})
            while True:
                update = await socket.receive_json(timeout=20)
                if update.get("reset"):
                    break
            assert [row["id"] for row in update["rows"]] == [2]
            await socket.send_json({"filter": ""})
            await socket.send_json({"filter": "nonsense>"})
            while "filter_error" not in update:
                update = await socket.receive_json(timeout=20)
            assert "nonsense" in update["filter_error"]
            play_everything(hub)
            while not any(row["id"] == 4 for row in update.get("rows", [])):
                update = await socket.receive_json(timeout=20)

    with_page(test)


def test_what_cannot_be_done_is_said() -> None:
    async def test(hub: Inspector, page: Page, client: Client) -> None:
        assert (await client.get("/api/streams/99"))[0] == 404
        status, answer = await client.post("/api/streams/1/replay", {})
        assert (status, "not possible here" in answer["error"]) == (400, True)
        assert (await client.post("/api/faults", {"add": "delay:1"}))[0] == 400
        assert (await client.post("/api/clear", b"x" * 10))[0] == 200
        assert (await client.get("/api/export?format=doc"))[0] == 400
        assert (await client.post("/api/decode", {"text": "/etc/passwd"}))[0] == 400
        status, answer = await client.post("/api/decode", {"text": "c000", "form": "mqtt"})
        assert (status, answer["value"]) == (200, {"packet": "PINGREQ"})

    with_page(test)


def test_a_capture_can_be_opened(tmp_path: Path) -> None:
    hub = Inspector("connector")
    play_everything(hub)
    data = write_items(snapshot_items(hub), redacted=True)

    async def test(hub: Inspector, page: Page, client: Client) -> None:
        status, answer = await client.post("/api/open", data)
        assert (status, answer) == (200, {"streams": 2})
        assert (await client.json("/api/mqtt"))["sessions"][0]["client_id"] == "sensor-1"
        assert (await client.post("/api/open", b"no capture"))[0] == 400

    with_page(test, role="capture")
