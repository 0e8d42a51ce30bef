"""WebSocket transparency, judged by the Autobahn test suite: its client talks to an echo server through the tunnel.

What the suite finds through the tunnel must be, case by case, what it finds at the echo server itself, and that is held
to a strict list: everything OK but for the cases named here. `make autobahn` fetches the suite and runs what takes two
minutes; without it (AUTOBAHN names its folder) this skips loudly.

With `ARGS=--all` every case runs, section by section. What is done is written to AUTOBAHN/sections.json, with its time
and a digest of the sources: a run that was cut short goes on where it stopped, a change of the connector begins anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import websockets

from tests.support.processes import ROOT, tunnel

AUTOBAHN = os.environ.get("AUTOBAHN", "")
ALL = bool(os.environ.get("AUTOBAHN_ALL"))
pytestmark = [
    pytest.mark.skipif(
        not AUTOBAHN, reason="NO AUTOBAHN SUITE: WebSocket transparency is not judged by it (make autobahn)"
    ),
    pytest.mark.timeout(4000),
]

FRAMES = ["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*"]
"""All that is about frames, messages and closing."""
SAMPLES = ["9.1.1", "9.2.1", "9.3.1", "9.5.1", "12.1.1", "12.1.5", "13.1.1"]
"""Of limits (9) and compression (12, 13), whose cases have hundreds of thousands of messages together."""
SOME = {"frames": (FRAMES, 245), "samples": (SAMPLES, 7)}
"""Cases of a section, and how many those are at least."""
EVERY = {
    "frames": (FRAMES, 245),
    **{f"9.{n}": ([f"9.{n}.*"], 6) for n in range(1, 9)},
    **{f"12.{n}": ([f"12.{n}.*"], 18) for n in range(1, 6)},
    **{f"13.{n}": ([f"13.{n}.*"], 18) for n in range(1, 8)},
}
SECTIONS = EVERY if ALL else SOME
LONGEST = 3600
"""Seconds for one section."""

# What the echo server (the `websockets` library) does otherwise than the suite's ideal, with or without a tunnel:
EAGER = ("3.", "4.1.", "4.2.", "5.15", "6.4.")
"""It may report an error a moment later than it could be seen, after an echo that was due before: NON-STRICT or OK, as
the pieces happen to arrive."""
INFORMATIONAL = {"7.1.6", "7.13.1", "7.13.2"}
"""The suite only notes what happens."""
WRONG_CODE = {"7.1.5"}
"""It answers a Close within a fragmented message with 1002, where the suite wants the code of that Close."""


def verdict(case: str, outcome: dict[str, object]) -> tuple[object, ...]:
    """Return what must be the same everywhere."""
    behavior = outcome["behavior"]
    if case.startswith(EAGER) and behavior == "NON-STRICT":
        behavior = "OK"
    return behavior, outcome["behaviorClose"], outcome["remoteCloseCode"]


def wanted(case: str) -> str:
    """Return the one behaviour that is expected of the echo server."""
    return "INFORMATIONAL" if case in INFORMATIONAL else "FAILED" if case in WRONG_CODE else "OK"


@contextmanager
def echo_server() -> Iterator[int]:
    ready = threading.Event()
    state: dict[str, object] = {}

    async def echo(talk: websockets.ServerConnection) -> None:
        try:
            async for message in talk:
                await talk.send(message)
        except websockets.ConnectionClosed:
            pass

    async def main() -> None:
        stop = asyncio.Event()
        async with websockets.serve(echo, "127.0.0.1", 0, max_size=None, ping_interval=None) as server:
            state["port"] = next(iter(server.sockets)).getsockname()[1]
            state["end"] = (asyncio.get_running_loop(), stop)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(20)
    yield int(str(state["port"]))
    loop, stop = state["end"]  # type: ignore[misc]
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)


class Done:
    """What was run of the suite on these very sources, kept in a file from run to run."""

    def __init__(self, file: Path) -> None:
        self._file = file
        digest = hashlib.sha256()
        for source in sorted((ROOT / "connector").rglob("*.py")):
            digest.update(source.read_bytes())
        self._sources = digest.hexdigest()[:16]
        try:
            self._sections: dict[str, dict[str, object]] = json.loads(file.read_text())
        except (OSError, ValueError):
            self._sections = {}

    def has(self, section: str) -> bool:
        return self._sections.get(section, {}).get("sources") == self._sources

    def add(self, section: str, cases: int, seconds: float) -> None:
        self._sections[section] = {"cases": cases, "seconds": round(seconds), "sources": self._sources}
        self._file.write_text(json.dumps(self._sections, indent=1) + "\n")


@pytest.fixture(scope="module")
def done() -> Done:
    return Done(Path(AUTOBAHN) / "sections.json")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, str]]]:
    """The echo server, directly and behind a tunnel over either transport."""
    with ExitStack() as stack:
        port = stack.enter_context(echo_server())
        found = [{"agent": "direct", "url": f"ws://127.0.0.1:{port}"}]
        for protocol in ("http2", "quic"):
            state = tmp_path_factory.mktemp(protocol)
            up = stack.enter_context(tunnel(state, f"http://127.0.0.1:{port}", run_args=("--protocol", protocol)))
            assert up.registered["protocol"] == protocol
            found.append({"agent": protocol, "url": f"wss://localhost:{up.port}"})
        yield found


@pytest.mark.parametrize("section", SECTIONS)
def test_the_tunnel_changes_nothing(section: str, servers: list[dict[str, str]], done: Done, tmp_path: Path) -> None:
    if ALL and done.has(section):
        pytest.skip(f"section {section} has passed on these sources; remove {AUTOBAHN}/sections.json to run it again")
    cases, least = SECTIONS[section]
    spec = {
        "outdir": str(tmp_path / "report"),
        "servers": servers,
        "cases": cases,
        "exclude-cases": [],
        "exclude-agent-cases": {},
    }
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec))
    began = time.monotonic()
    wstest = [Path(AUTOBAHN) / "wstest", "-m", "fuzzingclient", "-s", file]
    subprocess.run(wstest, check=True, cwd=tmp_path, capture_output=True, timeout=LONGEST)
    seconds = time.monotonic() - began
    found = json.loads((tmp_path / "report" / "index.json").read_text())
    assert set(found) == {"direct", "http2", "quic"}
    direct = {case: verdict(case, outcome) for case, outcome in found["direct"].items()}
    assert len(direct) >= least
    unexpected = {case: outcome for case, outcome in direct.items() if outcome[0] != wanted(case)}
    assert not unexpected, f"the echo server itself does otherwise than listed: {unexpected}"
    for protocol in ("http2", "quic"):
        through = {case: verdict(case, outcome) for case, outcome in found[protocol].items()}
        different = {
            case: (outcome, direct.get(case)) for case, outcome in through.items() if outcome != direct.get(case)
        }
        assert not different, f"over {protocol} otherwise than directly: {different}"
        assert set(through) == set(direct)
    print(f"section {section}: {len(direct)} cases, each over three ways, in {seconds:.0f} s")
    if ALL:
        done.add(section, len(direct), seconds)
