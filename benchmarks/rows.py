"""What is measured: one Row per line of the table.

Owns: the list of rows, their units and sizes.
In: whether the run is quick or full. Out: Row values, which go to the edge process as JSON.
Never: measures.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, NamedTuple

TRANSPORTS = ("http2", "quic")

DATAGRAMS_3 = ("support_datagram_v3_2",)

MIB = 1 << 20


class Row(NamedTuple):
    """One line of the table. `work` names a class of the edge process or a procedure of the runner, `options` are its.

    `factor` turns seconds per unit into what `unit` says: 1e6 for us, 1 for s. `transports`: where it makes sense.
    `features`: what the connectors are asked to announce. `fresh`: needs connectors that did nothing before.
    """

    name: str
    work: str
    unit: str
    factor: float = 1e6
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    transports: tuple[str, ...] = TRANSPORTS
    features: tuple[str, ...] = ()
    fresh: bool = False


def all_rows(*, quick: bool, full: bool) -> list[Row]:
    """Every row in the order of the table."""
    size = (24 if quick else 256) * MIB
    idle = 10_000 if full else 400 if quick else 2_000
    warm = {"warm_up": 0.05} if quick else {}

    def echo(name: str, work: str, size: int, *counts: tuple[int, int]) -> list[Row]:
        return [
            Row(f"{name} {streams}x{flight}", work, "us/msg",
                options={"streams": streams, "flight": flight, "size": size, **warm})
            for streams, flight in counts
        ]  # fmt: skip

    def request(name: str, streams: int, **options: Any) -> Row:
        return Row(f"{name} c{streams}", "request", "us/req", options={"streams": streams, **options, **warm})

    def bulk(name: str, work: str, streams: int) -> Row:
        return Row(f"{name} x{streams}", work, "s/GB", 1e9, {"streams": streams, "size": size})

    def udp(version: int, flows: int) -> Row:
        options = {"streams": flows, "version": version, "size": 200, **warm}
        features = DATAGRAMS_3 if version == 3 else ()
        return Row(f"udp200 v{version} x{flows}", "udp", "us/trip", 1e6, options, ("quic",), features)

    mqtt = {"size": 128, **warm}
    return [
        *echo("echo128", "echo", 128, (1, 1), (50, 1), (50, 16), (500, 4)),
        *echo("echo4096", "echo", 4096, (50, 4)),
        Row("mqtt0 fan50", "fan-out", "us/msg", options={"streams": 50, "flight": 4, **mqtt}),
        Row("mqtt1 pairs10", "ping-pong", "us/msg", options={"streams": 10, **mqtt}),
        request("get", 1),
        request("get", 32),
        request("get", 256),
        request("post1k", 32, body=1024),
        request("headers", 32, fields=20, path="/fifteen"),
        bulk("down", "download", 1),
        bulk("down", "download", 8),
        bulk("up", "upload", 1),
        bulk("up", "upload", 8),
        Row("churn c16", "churn", "us/ws", options={"streams": 16, "size": 128, **warm}),
        *echo("tcp128", "private-tcp", 128, (1, 1), (50, 4)),
        *echo("tcprule128", "tcp-rule", 128, (1, 1), (50, 4)),
        udp(2, 1),
        udp(2, 50),
        udp(3, 1),
        udp(3, 50),
        Row(f"idle {idle}", "idle", "s/min", 1.0, {"streams": idle, "seconds": 1 if quick else 10}, fresh=True),
        Row("start", "start", "s", 1.0, fresh=True),
        Row("image", "image", "MiB", transports=("http2",), fresh=True),
    ]


def matches(row: Row, transport: str, pattern: str) -> bool:
    """Whether `pattern` (a part of a name, or one with `*`, `?`, `[...]`) means this row over this transport."""
    names = (row.name, f"{transport} {row.name}")
    if any(mark in pattern for mark in "*?["):
        return any(fnmatchcase(name, pattern) for name in names)
    return any(pattern in name for name in names)
