from __future__ import annotations

import asyncio
import socket
import ssl
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from connector.transport.lookup import look_up
from tests.support.aio import run
from tests.support.processes import Child, dev_edge, edge_token


def test_addresses_need_no_question_and_names_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        before = threading.active_count()
        for host in ("127.0.0.1", "::1"):
            assert (await look_up(host, 80))[0][4][:2] == (host, 80)
        assert threading.active_count() == before
        assert any(answer[4][0] in {"127.0.0.1", "::1"} for answer in await look_up("localhost", None))
        with pytest.raises(socket.gaierror):
            await look_up("name.invalid", 80)
        with pytest.raises((UnicodeError, socket.gaierror)):
            await look_up("x" * 70 + ".test", 80)

    run(main())


def test_a_silent_resolver_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    real = socket.getaddrinfo

    def silent(*args: Any, flags: int = 0, **kwargs: Any) -> Any:
        if not flags & socket.AI_NUMERICHOST:
            go.wait(30)
        return real(*args, flags=flags, **kwargs)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await look_up("localhost", 80)

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    run(main())  # the loop closes while the question is still open
    go.set()
    for thread in threading.enumerate():
        if thread.name == "look up localhost":
            thread.join(30)


RUN = """
import socket, sys, time
real = socket.getaddrinfo

def silent(host, *args, flags=0, **kwargs):
    if host in (b"api.cloudflare.com", b"origin.invalid") and not flags:
        print('{"asked": "' + host.decode() + '"}', flush=True)
        time.sleep(300)
    return real(host, *args, flags=flags, **kwargs)

socket.getaddrinfo = silent
from connector.app.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_run_ends_while_a_pre_check_and_an_origin_still_wait_for_a_resolver(tmp_path: Path, loop: str) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    with dev_edge(tmp_path, "--ingress", "http://origin.invalid:8080") as (edge, listening):
        args = (
            "run",
            "--edge",
            listening["edge"],
            "--cacert",
            listening["ca"],
            "--output",
            "json",
            "--grace-period",
            "1s",
        )
        env = {"TUNNEL_TOKEN": edge_token(tmp_path), "TUNNEL_NO_PRECHECKS": "false", "CONNECTOR_LOOP": loop}
        with Child(sys.executable, "-c", RUN, *args, env=env) as child:
            edge.event("configuration", applied=True)
            host, _, port = listening["public"].removeprefix("https://").rpartition(":")
            with socket.create_connection((host, int(port)), 20) as plain:
                context = ssl.create_default_context(cafile=listening["ca"])
                with context.wrap_socket(plain, server_hostname="localhost") as visitor:
                    visitor.sendall(b"GET / HTTP/1.1\r\nHost: test.localhost\r\n\r\n")
                    asked: set[str] = set()
                    child.wait_for(lambda e: asked.add(e.get("asked", "")) or len(asked - {""}) == 2, what="questions")
                    child.signal()
                    assert child.wait(60) == 0
