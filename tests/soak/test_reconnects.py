"""An edge that drops the link at every request: after many reconnects the connector holds what it held after few."""

from __future__ import annotations

import http.client
import os
import ssl
import sys
from pathlib import Path

import pytest

from tests.support.origins import http_origin
from tests.support.processes import Child, tunnel

RECONNECTS = int(os.environ.get("RECONNECTS", "50"))
"""1,000 by `make soak`."""

WARM = max(15, RECONNECTS // 5)
"""Reconnects before the first look: caches and the allocator's pools are filled then."""

GROWTH = 6 << 20
"""Bytes that the rest may cost: far less than one of a link's buffers for each reconnect."""

pytestmark = [pytest.mark.soak, pytest.mark.timeout(120 + RECONNECTS)]


def held(child: Child) -> tuple[int, int, int]:
    """Resident bytes, open files, threads."""
    process = Path(f"/proc/{child.pid}")
    return child.memory(), len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("protocol", ["http2", "quic"])
def test_memory_is_flat_over_many_reconnects(tmp_path: Path, protocol: str) -> None:
    command = (
        *(sys.executable, "-m", "tests.soak.hasty", "run", "--edge", "{edge}", "--cacert", "{ca}"),
        *("--protocol", protocol, "--output", "json", "--token-file", "{token_file}"),
    )
    with (
        http_origin() as port,
        tunnel(tmp_path, f"http://127.0.0.1:{port}", edge_args=("--fault", "close-after:1"), command=command) as up,
    ):
        context = ssl.create_default_context(cafile=str(up.ca))
        warm = (0, 0, 0)
        for number in range(RECONNECTS):
            if number and number % 100 == 0:
                print(protocol, number, *held(up.connector), flush=True)
            if number == WARM:
                warm = held(up.connector)
            visitor = http.client.HTTPSConnection("localhost", up.port, context=context, timeout=60)
            try:
                visitor.request("GET", "/")
                visitor.getresponse().read()  # mostly 502: its link was dropped under it
            except (http.client.HTTPException, ConnectionError, ssl.SSLError):
                pass
            finally:
                visitor.close()
            up.edge.event("registered")
            up.connector.message("Registered tunnel connection")
            up.connector.events.clear()
            up.edge.events.clear()
        now = held(up.connector)
        sizes = f"{warm[0] / 1e6:.1f} MB after {WARM} and {now[0] / 1e6:.1f} MB at the end"
        print(f"{protocol}, {RECONNECTS} reconnects: {sizes}; files {warm[1]}, {now[1]}; threads {warm[2]}, {now[2]}")
        assert now[0] - warm[0] < GROWTH
        assert now[1] <= warm[1] + 4  # a link may be closing still
        assert now[2] == warm[2]
        up.connector.signal()
        assert up.connector.wait() == 0
        assert "Traceback" not in up.connector.text
