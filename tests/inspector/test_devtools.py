"""An exported HAR opened in Chromium's own developer tools: the network panel imports it and shows what was captured.

Behind `make test-browser`. The panel's modules are Chromium's own affair: where they have other names, it skips.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from connector.inspector.capture_commands import export_bytes
from connector.inspector.hub import Inspector
from connector.inspector.snapshot import snapshot_items
from tests.inspector.test_browser import CHROMIUM, WHOLE
from tests.inspector.traffic import play_everything
from tests.support.aio import run

pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="NO CHROMIUM HERE: apt-get install chromium"),
    pytest.mark.skipif(not WHOLE, reason="long: make test-browser"),
]

OPEN = """(async () => {
  const views = await import('./ui/legacy/legacy.js');
  await views.ViewManager.ViewManager.instance().showView('network');
  const network = await import('./panels/network/network.js');
  const logs = await import('./models/logs/logs.js');
  const view = network.NetworkPanel.NetworkPanel.instance().networkLogView;
  await view.onLoadFromFile(new File([HAR], 'capture.har', {type: 'application/json'}));
  return JSON.stringify(logs.NetworkLog.NetworkLog.instance().requests().map((request) => [
    request.requestMethod, request.url(), request.statusCode, request.resourceType().name(),
    request.frames().map((frame) => [frame.type, frame.text.length > 0]), request.responseHeaders.length > 0,
  ]));
})()"""


class Session:
    """One target of Chromium's debugging protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._last = 0

    async def call(self, method: str, **params: Any) -> Any:
        self._last += 1
        await self._socket.send_json({"id": self._last, "method": method, "params": params})
        while (answer := await self._socket.receive_json(timeout=60)).get("id") != self._last:
            pass
        return answer.get("result", answer)


def test_a_har_opens_in_the_network_panel(tmp_path: Path) -> None:
    hub = Inspector("connector")
    play_everything(hub)
    har = export_bytes(snapshot_items(hub), "har").decode()

    async def main(port: int) -> list[Any]:
        base = f"http://127.0.0.1:{port}/json"
        async with aiohttp.ClientSession() as session:

            async def targets(start: str) -> list[Any]:
                async with session.get(base) as response:
                    return [target for target in await response.json() if target["url"].startswith(start)]

            async def first(start: str) -> Any:
                async with asyncio.timeout(60):
                    while not (found := await targets(start)):  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
                return found[0]

            page = await first("about:blank")
            async with session.get(base + "/version") as response:
                url = (await response.json())["webSocketDebuggerUrl"]
            tools = f"devtools://devtools/bundled/inspector.html?ws=127.0.0.1:{port}/devtools/page/{page['id']}"
            async with session.ws_connect(url, max_msg_size=0) as socket:
                await Session(socket).call("Target.createTarget", url=tools)
            async with session.ws_connect(
                (await first("devtools://"))["webSocketDebuggerUrl"], max_msg_size=0
            ) as socket:
                front = Session(socket)
                await front.call("Runtime.evaluate", expression=f"window.HAR = {json.dumps(har)}; null")
                async with asyncio.timeout(60):
                    while True:  # its own start takes a moment
                        answer = await front.call(
                            "Runtime.evaluate", expression=OPEN, awaitPromise=True, returnByValue=True
                        )
                        if "exceptionDetails" not in answer:
                            return json.loads(answer["result"]["value"])
                        told = answer["exceptionDetails"].get("exception", {}).get("description", "")
                        if "is not a function" in told or "Failed to fetch" in told:
                            pytest.skip(f"this Chromium's developer tools are made otherwise: {told[:80]}")
                        await asyncio.sleep(0.2)

    profile = tmp_path / "profile"
    process = subprocess.Popen(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run",
         "--remote-allow-origins=*", "--disable-background-networking", f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (file := profile / "DevToolsActivePort").exists() or not file.read_text().strip():
            assert time.monotonic() < deadline, "Chromium did not start"
            time.sleep(0.1)
        found = run(main(int(file.read_text().split()[0])), limit=110)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        shutil.rmtree(profile, ignore_errors=True)
    web, mqtt = sorted(found, key=lambda request: request[3])
    assert web[:4] == ["POST", "https://web.example.com/a?access_token=[redacted]&b=2", 200, "fetch"]
    assert mqtt[:4] == ["GET", "https://mqtt.example.com/mqtt", 101, "websocket"]
    assert [kind for kind, _ in mqtt[4]] == ["send"] * 3 + ["receive", "send", "receive", "send"]
    assert all(has_text for _, has_text in mqtt[4])
    assert web[5]
