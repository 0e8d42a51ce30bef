"""An HTTP/2 origin behind the whole tunnel: requests as gRPC makes them, with trailers, on one connection."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.aio import run
from tests.support.certs import Authority
from tests.support.h2_origin import H2Origin
from tests.support.processes import connector, dev_edge, edge_token

CURL = shutil.which("curl")


@pytest.mark.skipif(CURL is None, reason="curl is not installed: no client that shows trailers")
@pytest.mark.parametrize("protocol", ["http2", "quic"])
def test_a_call_with_trailers_through_the_tunnel(tmp_path: Path, protocol: str) -> None:
    def calls(url: str) -> None:
        with dev_edge(tmp_path) as (edge, listening):
            token = tmp_path / "token"
            token.write_text(edge_token(tmp_path))
            options = ("--protocol", protocol, "--url", url, "--http2-origin", "--no-tls-verify", "--token-file", token)
            with connector("run", "--edge", listening["edge"], "--cacert", listening["ca"], *options):
                edge.event("registered")
                public = f"https://localhost:{listening['public'].rpartition(':')[2]}"
                curl = [str(CURL), "-sv", "--http2", "--max-time", "25", "--cacert", str(listening["ca"])]
                for number in range(3):
                    words = [*curl, "-H", "TE: trailers", "-d", f"call {number}", f"{public}/echo"]
                    done = subprocess.run(words, capture_output=True, text=True, check=False)
                    assert done.stdout == f"call {number}", done.stderr
                    assert " 200" in done.stderr
                    if protocol == "quic":  # which has no place for trailers, in cloudflared neither
                        assert "grpc-status" not in done.stderr
                    elif "HTTP/2 200" in done.stderr:  # a curl without HTTP/2 shows no trailers
                        assert "grpc-status: 0" in done.stderr
                        assert "grpc-message: fine" in done.stderr

    async def main() -> None:
        async with H2Origin(Authority().server_context(tmp_path, "a.example")) as origin:
            await asyncio.to_thread(calls, origin.url)
            assert len(origin.connections) == 1
            assert [dict(headers)[b":method"] for headers in origin.requests] == [b"POST"] * 3

    run(main(), limit=90)
