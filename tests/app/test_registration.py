"""Every answer that registration can get, from a dev edge that commits the fault, and what the connector does then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.origins import free_port
from tests.support.processes import Child, connector, dev_edge, edge_token

INGRESS = ("--ingress", "http_status:204")


@contextmanager
def against(tmp_path: Path, fault: str, *args: str) -> Iterator[tuple[Child, Child]]:
    with dev_edge(tmp_path, *INGRESS, "--fault", fault) as (edge, listening):
        command = ("run", "--edge", listening["edge"], "--cacert", listening["ca"], "--output", "json", *args)
        with connector(*command, env={"TUNNEL_TOKEN": edge_token(tmp_path)}) as child:
            yield edge, child


@pytest.mark.parametrize(
    ("fault", "message", "text"),
    [
        ("registration=unauthorized*1", "Register tunnel error from server side", "Unauthorized"),
        ("registration=EDUPCONN*1", "Unable to establish connection.", "already connected to this server"),
        ("registration=retry-after:1*1", "Register tunnel error from server side", ""),
        ("registration=close*1", "Serve tunnel error", ""),
        ("registration=garbage*1", "Serve tunnel error", ""),
        ("registration=stall*1", "Serve tunnel error", "0.5 seconds"),
    ],
)
def test_what_is_retried_before_the_first_registration(tmp_path: Path, fault: str, message: str, text: str) -> None:
    with against(tmp_path, fault, "--rpc-timeout", "500ms" if "stall" in fault else "5s") as (edge, child):
        line = child.message(message)
        assert line["level"] == "error"
        assert text in line["error"]
        assert line["connIndex"] == 0
        limit = "3s" if "retry-after:1" in fault else "2s"
        assert child.message(f"Retrying connection in up to {limit}")["level"] == "info"
        edge.event("registered")
        child.signal()
        assert child.wait() == 0


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("registration=permanent", ""),
        ("registration=exception", ""),
    ],
)
def test_what_ends_the_process_before_the_first_registration(tmp_path: Path, fault: str, text: str) -> None:
    with against(tmp_path, fault, "--rpc-timeout", "500ms") as (_, child):
        line = child.message("initial tunnel connection failed")
        assert line["level"] == "error"
        assert line["error"]
        assert text in line["error"]
        assert child.wait() == 1
        assert "Initiating shutdown" in child.text


def test_the_edges_retry_after_is_waited_for(tmp_path: Path) -> None:
    with against(tmp_path, "registration=retry-after:3*1") as (edge, child):
        refused = edge.event("register_refused")
        assert child.message("Retrying connection in up to 5s")
        started = time.monotonic()
        registered = edge.event("registered")
        assert refused["time"] < registered["time"]
        assert time.monotonic() - started > 2  # a lower bound only: being late is no failure


def test_after_the_first_registration_nothing_ends_the_process(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with dev_edge(tmp_path, *INGRESS, "--listen", address) as (edge, listening):
        command = ("run", "--edge", address, "--cacert", listening["ca"], "--output", "json")
        with connector(*command, env={"TUNNEL_TOKEN": edge_token(tmp_path)}) as child:
            child.message("Registered tunnel connection")
            edge.process.kill()
            edge.wait()
            child.message("Lost connection with the edge")
            with dev_edge(tmp_path, *INGRESS, "--listen", address, "--fault", "registration=permanent*1") as (again, _):
                again.event("register_refused", limit=30)
                child.message("Register tunnel error from server side")
                child.message("Connection starts over in up to 20s")
                again.event("registered", limit=60)
                child.signal()
                assert child.wait() == 0


def test_a_duplicate_goes_to_the_other_address(tmp_path: Path) -> None:
    with (
        dev_edge(tmp_path, *INGRESS, "--fault", "registration=EDUPCONN") as (full, listening),
        dev_edge(tmp_path, *INGRESS) as (other, other_listening),
    ):
        # The region with more addresses is tried first; naming the full edge twice makes it that.
        full_edge = ("--edge", listening["edge"])
        edges = (*full_edge, "--edge", other_listening["edge"], *full_edge, "--ha-connections", "1")
        command = ("run", *edges, "--cacert", listening["ca"], "--output", "json")
        with connector(*command, env={"TUNNEL_TOKEN": edge_token(tmp_path)}) as child:
            full.event("register_refused")
            assert other.event("registered")["conn_index"] == 0
            child.signal()
            assert child.wait() == 0


def test_several_addresses_get_a_connection_each(tmp_path: Path) -> None:
    with (
        dev_edge(tmp_path, *INGRESS) as (first, listening),
        dev_edge(tmp_path, *INGRESS) as (second, second_listening),
    ):
        edges = ("--edge", listening["edge"], "--edge", second_listening["edge"])
        command = ("run", *edges, "--cacert", listening["ca"], "--output", "json")
        with connector(*command, env={"TUNNEL_TOKEN": edge_token(tmp_path)}) as child:
            # Which region is first is drawn.
            assert {edge.event("registered")["conn_index"] for edge in (first, second)} == {0, 1}
            child.signal()
            first.event("unregistered")
            second.event("unregistered")
            assert child.wait() == 0
