"""What is measured: one Row per line of the table.

Owns: the list of rows, their units and sizes.
In: whether the run is quick or full. Out: Row values, which go to the edge process as JSON.
Never: measures.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One line of the table. `work` names a class of the edge process or a procedure of the runner, `options` are its.

    `factor` turns seconds per unit into what `unit` says: 1e6 for us, 1 for s.
    """

    name: str
    work: str
    unit: str
    factor: float = 1e6
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)


MIB = 1 << 20


def all_rows(*, quick: bool, full: bool) -> list[Row]:
    """Every row in the order of the table."""
    size = (64 if quick else 256) * MIB
    idle = 10_000 if full else 1_000 if quick else 2_000
    echo = [
        Row(f"echo{size} {streams}x{flight}", "echo", "us/msg", options={"streams": streams, "flight": flight,
                                                                        "size": size})
        for size, streams, flight in ((128, 1, 1), (128, 50, 1), (128, 50, 16), (128, 500, 4), (4096, 50, 4))
    ]  # fmt: skip
    get = [Row(f"get c{n}", "request", "us/req", options={"streams": n}) for n in (1, 32, 256)]
    return [
        *echo,
        *get,
        Row("post1k c32", "request", "us/req", options={"streams": 32, "body": 1024}),
        Row("headers c32", "request", "us/req", options={"streams": 32, "fields": 20, "path": "/fifteen"}),
        Row("down x1", "download", "s/GB", 1e9, {"streams": 1, "size": size}),
        Row("down x8", "download", "s/GB", 1e9, {"streams": 8, "size": size}),
        Row("up x1", "upload", "s/GB", 1e9, {"streams": 1, "size": size}),
        Row("up x8", "upload", "s/GB", 1e9, {"streams": 8, "size": size}),
        Row("churn c16", "churn", "us/ws", options={"streams": 16, "size": 128}),
        Row(f"idle {idle}", "idle", "s/min", 1.0, {"streams": idle, "seconds": 2 if quick else 10}),
        Row("start", "start", "s", 1.0),
    ]
