"""SSLKEYLOGFILE on either side of either transport: Wireshark's decoder reads with it what went over loopback."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.aio import run, until
from tests.support.processes import Child, dev_edge, edge_token

TSHARK, DUMPCAP = shutil.which("tshark"), shutil.which("dumpcap")

pytestmark = [
    pytest.mark.skipif(TSHARK is None or DUMPCAP is None, reason="tshark is not installed: apt-get install tshark"),
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="capturing on loopback needs root"),
]

SECRET = "what-nobody-else-should-read"


@contextmanager
def capture(directory: Path, port: int) -> Iterator[Path]:
    """Record what goes to and from `port` on loopback; the file is whole when this ends."""
    assert DUMPCAP is not None
    file = directory / "packets.pcapng"
    process = subprocess.Popen(
        [DUMPCAP, "-q", "-i", "lo", "-f", f"port {port}", "-w", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        while line := process.stderr.readline():
            if line.startswith("File: "):  # it captures from here on
                break
        else:
            raise AssertionError("dumpcap ended at once")
        yield file
        # It works through the kernel's buffer in its own time: it is done when it has written this.
        mark = os.urandom(16)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(mark, ("127.0.0.1", port))
        run(until(lambda: mark in file.read_bytes(), what="the capture is whole"))
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


def decrypted(file: Path, keylog: Path, protocol: str, port: int) -> str:
    """What tshark finds in the packets with these keys: the paths of requests, in either transport's words."""
    assert TSHARK is not None
    fields = ["http2.headers.path"] if protocol == "http2" else ["quic.stream_data"]
    command = [TSHARK, "-r", str(file), "-o", f"tls.keylog_file:{keylog}", "-T", "fields"]
    if protocol == "http2":
        command += ["-d", f"tcp.port=={port},tls"]  # HTTP/2 inside is known by its preface
    else:
        command += ["-d", f"udp.port=={port},quic"]
    for field in fields:
        command += ["-e", field]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=90)
    return done.stdout


def appears(text: str, protocol: str) -> bool:
    return SECRET in text if protocol == "http2" else SECRET.encode().hex() in text.replace(":", "")


@pytest.mark.parametrize("side", ["connector", "edge"])
@pytest.mark.parametrize("protocol", ["http2", "quic"])
def test_wireshark_reads_what_went_over_the_wire(tmp_path: Path, protocol: str, side: str) -> None:
    keylog = tmp_path / "keys.txt"
    mine = {"SSLKEYLOGFILE": str(keylog)}
    with dev_edge(tmp_path, "--ingress", "http_status:204", env=mine if side == "edge" else None) as (edge, listening):
        host, _, port = listening["edge"].rpartition(":")
        command = (sys.executable, "-m", "connector", "run", "--edge", f"{host}:{port}", "--cacert", listening["ca"])
        with (
            capture(tmp_path, int(port)) as file,
            Child(
                *(*command, "--protocol", protocol, "--output", "json"),
                env={"TUNNEL_TOKEN": edge_token(tmp_path), **(mine if side == "connector" else {})},
            ) as child,
        ):
            child.message("Registered tunnel connection")
            edge.event("configuration", applied=True)
            context = ssl.create_default_context(cafile=listening["ca"])
            public = int(listening["public"].rpartition(":")[2])
            visitor = http.client.HTTPSConnection("localhost", public, context=context, timeout=60)
            visitor.request("GET", f"/{SECRET}")
            assert visitor.getresponse().status == 204
            visitor.close()
            child.signal()
            assert child.wait() == 0
        assert keylog.stat().st_size
        assert appears(decrypted(file, keylog, protocol, int(port)), protocol)
        nothing = tmp_path / "nothing.txt"
        nothing.touch()
        assert not appears(decrypted(file, nothing, protocol, int(port)), protocol)
