"""tshark opens what `capture export` writes: it decrypts with the secrets inside and finds the protocols."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from connector.inspector.capture import CaptureWriter, read_capture
from connector.inspector.capture_commands import export_bytes
from connector.inspector.hub import Inspector
from tests.inspector.traffic import Later, play_everything, play_http, play_mqtt

TSHARK = shutil.which("tshark")
needs_tshark = pytest.mark.skipif(TSHARK is None, reason="NO TSHARK HERE: apt-get install tshark")


def tshark(path: Path, *arguments: str) -> list[str]:
    assert TSHARK is not None
    result = subprocess.run(
        [TSHARK, "-n", "-r", str(path), *arguments], capture_output=True, text=True, timeout=100, check=True
    )
    return result.stdout.splitlines()


def exported(tmp_path: Path, protocol: str) -> Path:
    hub = Inspector("connector")
    writer = CaptureWriter(str(tmp_path / "x.capture"), hub, Later())
    hub.recorders.append(writer.record)
    if protocol == "http2":
        play_everything(hub)
    else:
        link = hub.open_link("quic", "192.0.2.7:7844", 0)
        play_http(link)
        play_mqtt(link)
    writer.close()
    path = tmp_path / "x.pcapng"
    path.write_bytes(export_bytes(read_capture(str(tmp_path / "x.capture"))[1], "pcapng"))
    return path


@needs_tshark
def test_http2_inside_tls(tmp_path: Path) -> None:
    path = exported(tmp_path, "http2")
    fields = ("-T", "fields", "-e", "http2.headers.method", "-e", "http2.headers.path")
    requests = [line for line in tshark(path, "-Y", "http2.headers.method", *fields) if line.strip()]
    assert "POST\t/a?access_token=[redacted]&b=2" in requests
    assert "GET\t/mqtt" in requests
    assert not tshark(path, "-Y", "_ws.malformed or tcp.analysis.flags or tls.alert_message")
    assert tshark(path, "-Y", "tls.handshake.extensions_alpn_str==h2")


@needs_tshark
def test_the_dissector_names_openings_and_metadata(tmp_path: Path) -> None:
    path = exported(tmp_path, "quic")
    script = Path(__file__).resolve().parents[2] / "connector" / "inspector" / "tunnel.lua"
    fields = ("-T", "fields", "-e", "cftunnel.kind", "-e", "cftunnel.type", "-e", "cftunnel.metadata.value")
    lines = tshark(path, "-X", f"lua_script:{script}", "-Y", "cftunnel.kind", *fields)
    # The two streams may overlap.
    assert sorted(line.split("\t")[:2] for line in lines) == [
        ["ConnectRequest", "0"], ["ConnectRequest", "1"], ["ConnectResponse", ""], ["ConnectResponse", ""],
    ]  # fmt: skip
    assert "web.example.com" in next(line for line in lines if line.startswith("ConnectRequest\t0"))
    assert any(line.startswith("ConnectResponse\t\t200,") for line in lines)
    assert not tshark(path, "-X", f"lua_script:{script}", "-Y", "cftunnel.malformed.expert or _ws.lua.error")


@needs_tshark
def test_quic(tmp_path: Path) -> None:
    path = exported(tmp_path, "quic")
    streams = tshark(path, "-Y", "quic.stream_data", "-T", "fields", "-e", "quic.stream_data")
    assert any(line.startswith("0a36cd12a13e3031") for line in streams), streams[:3]
    assert not tshark(path, "-Y", "_ws.malformed or quic.decryption_failed")
