"""Budgets in counts for datagrams: Python calls and calls into C per UDP payload, one way and the other, and no task.

From the frame that the QUIC engine hands out to the origin's socket, and from there to the link's queue.
"""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from connector.proxy.flows import Flows
from connector.proxy.udp import PrivateNetwork
from connector.wire import datagram_v3
from tests.benchmarks.test_counts import UNITS, Calls
from tests.support.aio import run

ID = b"I" * 16


@pytest.mark.parametrize(("version", "budget"), [(2, (5, 5)), (3, (4, 4))])
def test_a_payload_to_an_origin(version: int, budget: tuple[int, int]) -> None:
    up, _ = counted(version)
    assert up.python <= budget[0] * UNITS
    assert up.c <= budget[1] * UNITS


@pytest.mark.parametrize("version", [2, 3])
def test_a_payload_of_an_origin(version: int) -> None:
    _, down = counted(version)
    assert down.python <= 3 * UNITS
    assert down.c <= 5 * UNITS


def counted(version: int) -> tuple[Calls, Calls]:
    """Count for UNITS payloads each way, one in flight."""
    up, down = Calls(), Calls()

    async def main() -> None:
        network = PrivateNetwork(Flows(), asyncio.get_running_loop())
        sink = network.open_sink(0, version)
        sent: list[bytes] = []

        class Link(SimpleNamespace):
            datagram_limit = 1400
            datagram_room = 32

        link: Any = Link(send_datagram=lambda data: sent.append(data) is None)
        sink.attach(link)
        tasks = len(asyncio.all_tasks())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as origin:
            origin.bind(("127.0.0.1", 0))
            host, port = origin.getsockname()
            if version == 3:
                flow = datagram_v3.Registration(ID, socket.inet_aton(host), port)
                sink.on_datagram(datagram_v3.encode_registration(flow))
                frame = b"\x01" + ID + b"x" * 200
            else:
                sink.register_udp_session(ID, socket.inet_aton(host), port, 0, "")
                frame = b"x" * 200 + ID + b"\0"
            [udp] = [flow.origin for flow in sink.end._owned]
            assert udp is not None
            receive, readable = sink.on_datagram, udp._on_readable  # type: ignore[attr-defined]
            with up:
                for _ in range(UNITS):
                    receive(frame)
            origin.settimeout(20)
            _, address = origin.recvfrom(300)
            sent.clear()
            for _ in range(UNITS // 10):
                for _ in range(10):
                    origin.sendto(b"y" * 200, address)
                with down:
                    readable()
            assert len(sent) == UNITS
            assert len(asyncio.all_tasks()) == tasks
            sink.on_lost()
        await network.close()

    run(main())
    return up, down
