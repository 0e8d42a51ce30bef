"""A connector that was given nothing but a token finds the edge by DNS. Two regions are two loopback addresses."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from connector.protocol.protocol_choice import FEATURE_RECORD
from tests.integration.test_private_network import ask, udp_origin
from tests.support.aio import run, until
from tests.support.dns_server import Zone
from tests.support.dns_thread import dns_server
from tests.support.processes import Child, Event, dev_edge, edge_token

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="all of 127.0.0.0/8 is needed")

SRV = ("_v2-origintunneld._tcp.argotunnel.com", "SRV")


def zone(port: int, *, service: tuple[str, str] = SRV) -> Zone:
    return {
        service: [f"1 1 {port} one.test.", f"1 1 {port} two.test."],
        ("one.test", "A"): ["127.0.0.1", "127.0.0.3"],
        ("two.test", "A"): ["127.0.0.2", "127.0.0.4"],
    }


@contextmanager
def edge_everywhere(tmp_path: Path) -> Iterator[tuple[Child, Event, int]]:
    with dev_edge(tmp_path, "--ingress", "http_status:204", "--listen", "0.0.0.0:0") as (edge, listening):
        yield edge, listening, int(listening["edge"].rpartition(":")[2])


def start(
    tmp_path: Path, dns_port: int, *args: str, ca: str, env: dict[str, str] | None = None, protocol: str = "http2"
) -> Child:
    command = (*(sys.executable, "-m", "tests.support.run_with_dns", str(dns_port)), *args)
    return Child(
        *(*command, "run", "--output", "json", "--cacert", ca, "--protocol", protocol),
        env={"TUNNEL_TOKEN": edge_token(tmp_path), **(env or {})},
    )


def test_a_token_alone_leads_to_four_connections_over_both_regions(tmp_path: Path) -> None:
    with edge_everywhere(tmp_path) as (edge, listening, port), dns_server(zone(port)) as dns:
        with start(tmp_path, dns.port, ca=listening["ca"]) as child:
            lines = [child.message("Registered tunnel connection") for _ in range(4)]
            assert [line["connIndex"] for line in lines] == [0, 1, 2, 3]
            assert {line["ip"] for line in lines} == {f"127.0.0.{number}" for number in (1, 2, 3, 4)}
            child.signal(signal.SIGTERM)
            for _ in range(4):
                edge.event("unregistered")
            assert child.wait() == 0
        assert ("udp", *SRV) in dns.questions


def test_the_record_of_features_turns_datagrams_of_version_3_on(tmp_path: Path) -> None:
    with (
        udp_origin() as origin,
        dev_edge(
            tmp_path, "--ingress", "http_status:204", "--listen", "0.0.0.0:0", "--udp", f"127.0.0.1:0={origin}"
        ) as (edge, listening),
    ):
        record = '"{\\"dv3_2\\":100}"'
        here = {("one.test", "A"): ["127.0.0.1"], ("two.test", "A"): ["127.0.0.1"]}  # where UDP is answered from
        answers = {**zone(int(listening["edge"].rpartition(":")[2])), **here, (FEATURE_RECORD, "TXT"): [record]}
        args = ("tunnel", "--ha-connections", "1")
        with dns_server(answers) as dns, start(tmp_path, dns.port, *args, ca=listening["ca"], protocol="quic"):
            announced = edge.event("registered")["features"]
            assert "support_datagram_v3_2" in announced
            forward = next(event for event in edge.events if event["event"] == "forward")
            host, _, port = forward["listen"].rpartition(":")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.connect((host, int(port)))
                assert ask(client, b"hello") == b"HELLO"
        assert ("udp", FEATURE_RECORD, "TXT") in dns.questions


def test_a_region_has_its_own_record(tmp_path: Path) -> None:
    service = ("_us-v2-origintunneld._tcp.argotunnel.com", "SRV")
    with edge_everywhere(tmp_path) as (_, listening, port), dns_server(zone(port, service=service)) as dns:
        with start(tmp_path, dns.port, "tunnel", "--region", "us", ca=listening["ca"]) as child:
            child.message("Registered tunnel connection")
        assert ("udp", *SRV) not in dns.questions


def test_a_start_without_dns_uses_the_saved_answer(tmp_path: Path) -> None:
    env = {"SAVED_ADDRESSES": str(tmp_path / "saved.json")}
    with edge_everywhere(tmp_path) as (_, listening, port):
        with dns_server(zone(port)) as dns, start(tmp_path, dns.port, ca=listening["ca"], env=env) as child:
            child.message("Registered tunnel connection")
        with dns_server({}) as dns, start(tmp_path, dns.port, ca=listening["ca"], env=env) as child:
            line = child.message("Edge addresses come from: answer saved")
            assert line["failures"]
            child.message("Registered tunnel connection")


def test_without_any_answer_the_start_ends_with_1(tmp_path: Path) -> None:
    with (
        edge_everywhere(tmp_path) as (_, listening, _port),
        dns_server({}) as dns,
        start(tmp_path, dns.port, ca=listening["ca"]) as child,
    ):
        assert child.wait(30) == 1
        assert "Cannot find the addresses of the edge" in child.text
        assert "--edge HOST:PORT" in child.text
        assert "Traceback" not in child.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_slow_look_up_ends_the_start_gracefully(tmp_path: Path, number: int) -> None:
    with dev_edge(tmp_path, "--ingress", "http_status:204") as (_, listening), dns_server({}) as dns:
        dns.silent |= {"udp", "tcp", "tls", "https"}
        with start(tmp_path, dns.port, ca=listening["ca"]) as child:
            child.message("Initial protocol")
            run(until(lambda: ("udp", *SRV) in dns.questions, limit=20, what="the first question"))
            child.signal(number)
            child.message("Initiating graceful shutdown")
            child.message("Tunnel server stopped")
            assert child.wait() == 0
            assert "Traceback" not in child.text


def test_the_ip_version_that_nobody_has_is_an_error(tmp_path: Path) -> None:
    with (
        edge_everywhere(tmp_path) as (_, listening, port),
        dns_server(zone(port)) as dns,
        start(tmp_path, dns.port, "tunnel", "--edge-ip-version", "6", ca=listening["ca"]) as child,
    ):
        assert child.wait(30) == 1
        assert "the edge has no address that can be used" in child.text


def test_a_dead_region_is_left(tmp_path: Path) -> None:
    """Region one does not answer: whoever starts there comes up in region two."""
    with edge_everywhere(tmp_path) as (_, listening, port):
        dead = {
            SRV: [f"1 1 {port} two.test.", "1 1 9 one.test."],
            ("one.test", "A"): [f"127.0.1.{number}" for number in range(1, 9)],
            ("two.test", "A"): ["127.0.0.2"],
        }
        with dns_server(dead) as dns, start(tmp_path, dns.port, ca=listening["ca"]) as child:
            line = child.message("Registered tunnel connection", limit=60)
            assert line["ip"] == "127.0.0.2"
            # The way there: at most two dials of the region that is dead, each followed by one announced wait.
            before = child.events[: child.events.index(line)]
            retries = [e for e in before if str(e.get("message", "")).startswith("Retrying connection in up to")]
            assert len(retries) <= 2
            assert all(e["ip"].startswith("127.0.1.") for e in retries)
            assert {e["connIndex"] for e in retries} <= {0}  # the others wait for the first


def test_the_address_to_dial_from_decides_the_ip_version(tmp_path: Path) -> None:
    with edge_everywhere(tmp_path) as (_, listening, port), dns_server(zone(port)) as dns:
        args = ("tunnel", "--edge-ip-version", "6", "--edge-bind-address", "127.0.0.5")
        with start(tmp_path, dns.port, *args, ca=listening["ca"]) as child:
            line = child.message("--edge-bind-address 127.0.0.5 overrides --edge-ip-version")
            assert line["level"] == "warn"
            assert child.message("Registered tunnel connection")["ip"].startswith("127.0.0.")
