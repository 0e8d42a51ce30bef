"""A broker that hangs is seen, and seen again when it works."""

from __future__ import annotations

from pathlib import Path

from tests.containers.stacks import (
    inspect,
    kill_inside,
    stack,
    wait_until,
)


def test_health_goes_bad_and_good_again(tmp_path: Path) -> None:
    with stack("tfrozen", tmp_path) as made:
        made.up().good()
        wait_until("healthy", lambda: inspect(made.broker)["State"]["Health"]["Status"] == "healthy")
        kill_inside(made.broker, "STOP")
        wait_until("unhealthy", lambda: inspect(made.broker)["State"]["Health"]["Status"] == "unhealthy")
        status = made.run("status")
        assert status.status == 1
        assert status.event("status")["services"][0]["health"] == "unhealthy"
        assert made.run("doctor").status == 1
        kill_inside(made.broker, "CONT")
        wait_until("healthy", lambda: inspect(made.broker)["State"]["Health"]["Status"] == "healthy")
        made.public()
