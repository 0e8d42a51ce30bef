"""A stack from its first `up` to its end, on a real engine, with real MQTT through the tunnel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import selfcheck
from launcher.credentials import User
from tests.containers.stacks import (
    ROOT,
    Stack,
    docker,
    environment,
    exists,
    find_message,
    inspect,
    kill_inside,
    leave_message,
    stack,
    wait_until,
)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack("tstack", tmp_path_factory.mktemp("tstack")) as made:
        result = made.up("--durability", "each").good()
        assert {one["name"] for one in result.event("users")["users"]} == {"admin", "device"}
        assert result.event("status")["up"] is True
        yield made


def test_messages_pass_through_the_tunnel_and_on_both_listeners(up: Stack) -> None:
    up.public()
    address = inspect(up.broker)["NetworkSettings"]["Networks"][f"{up.name}-network"]["IPAddress"]
    for target in (selfcheck.Target(address, 1883), selfcheck.Target(address, 9001, "/mqtt")):
        selfcheck.round_trip(target, up.user(), "device/direct")
        for user, password in ((None, None), ("device", "wrong")):
            with selfcheck.Session(target, user, password) as session, pytest.raises(selfcheck.RefusedError):
                session.connect()


def test_containers_are_locked_down_and_the_token_is_nowhere_to_be_seen(up: Stack) -> None:
    token = up.edge.token.read_text().strip()
    for name, user in ((up.broker, "1883:1883"), (up.connector, "65532:65532")):
        facts = inspect(name)
        host = facts["HostConfig"]
        assert facts["Config"]["User"] == user
        assert host["ReadonlyRootfs"] is True
        assert host["CapDrop"] == ["ALL"]
        assert "no-new-privileges" in host["SecurityOpt"][0]
        assert host["Memory"] > 0
        assert host["PidsLimit"] > 0
        assert host["RestartPolicy"]["Name"] == "unless-stopped"
        assert not host["PortBindings"]
        assert facts["Config"]["Healthcheck"]["Test"]
        assert token not in json.dumps(facts)
        assert token not in docker("history", "--no-trunc", facts["Config"]["Image"])
    assert token not in docker("top", up.connector)
    assert "mosquitto" in inspect(up.broker)["NetworkSettings"]["Networks"][f"{up.name}-network"]["Aliases"]


def test_a_second_up_changes_nothing(up: Stack) -> None:
    before = [inspect(name)["Id"] + inspect(name)["State"]["StartedAt"] for name in (up.broker, up.connector)]
    result = up.run("up").good()  # without options: everything was kept
    texts = [event["text"] for event in result.events if event["event"] == "progress"]
    assert texts.count("runs as wanted already") == 2
    assert before == [inspect(name)["Id"] + inspect(name)["State"]["StartedAt"] for name in (up.broker, up.connector)]


def test_status_tells_everything(up: Stack) -> None:
    facts = up.run("status").good().event("status")
    assert [one["state"] for one in facts["services"]] == ["running", "running"]
    assert facts["registrations"] == 1
    assert "http://mosquitto:9001" in facts["rule"]
    assert facts["last_error"] == ""
    wait_until("healthy", lambda: inspect(up.broker)["State"]["Health"]["Status"] == "healthy")


def test_users_and_rules_change_without_a_restart(up: Stack) -> None:
    started = inspect(up.broker)["State"]["StartedAt"]
    password = up.run("user add", "bob").good().event("users")["users"][0]["password"]
    bob, target = User("bob", password, ()), up.edge.target()
    selfcheck.round_trip(target, bob, "bob/own")
    with selfcheck.Session(target, bob.name, bob.password) as session:
        session.connect()
        assert session.publish("device/foreign", b"x") == 135
    up.run("acl allow", "bob", "plant/#", "--access", "write").good()
    with selfcheck.Session(target, bob.name, bob.password) as session:
        session.connect()
        assert session.publish("plant/1", b"x") in {0, 16}
        assert session.publish("device/foreign", b"x") == 135
    up.run("user remove", "bob").good()
    with selfcheck.Session(target, bob.name, bob.password) as session, pytest.raises(selfcheck.RefusedError):
        session.connect()
    assert up.run("user add", "a/b").one_line().startswith("user name 'a/b'")
    assert inspect(up.broker)["State"]["StartedAt"] == started


def test_doctor_finds_everything_well(up: Stack) -> None:
    public = f"localhost:{up.edge.public_port}"
    result = up.run("doctor", "--hostname", public, "--cafile", up.edge.ca).good()
    names = [event["name"] for event in result.events if event["event"] == "check"]
    for name in ("engine", "image", "volume", "configuration", "mqtt", "websocket", "connector", "rule", "public MQTT"):
        assert name in names
    assert not [event for event in result.events if event["event"] == "check" and event["good"] is False]
    snippets = result.event("clients")["snippets"]
    assert len(snippets) == 6
    assert all(str(up.edge.public_port) in one["command"] for one in snippets)


def test_a_killed_broker_comes_back_with_all_it_had(up: Stack) -> None:
    """--durability each: kill -9 loses neither retained messages nor queued QoS 1 messages."""
    old = up.edge.target(mqtt5=False)
    leave_message(old, up.user(), "reader-1")
    before = inspect(up.broker)["RestartCount"]
    kill_inside(up.broker, "KILL")
    wait_until("restart", lambda: inspect(up.broker)["RestartCount"] > before)
    find_message(old, up.user(), "reader-1")


def test_logs_follow_over_a_restart_and_killed_launchers_leave_the_stack_alone(up: Stack) -> None:
    follower = subprocess.Popen(
        [sys.executable, "-m", "launcher", "logs", "-f", "--name", up.name, "--state-dir", str(up.state), "--json"],
        stdout=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
    )
    assert follower.stdout is not None
    try:
        up.run("restart", "broker").good()
        seen, deadline = "", time.monotonic() + 60
        os.set_blocking(follower.stdout.fileno(), False)
        while time.monotonic() < deadline:
            seen += (follower.stdout.read() or b"").decode()
            if len(re.findall(r"mosquitto version \S+ running", seen)) >= 2 and "Registered tunnel" in seen:
                break
            time.sleep(0.2)
        assert "mosquitto version 2.0.11 terminating" in seen
        assert '"service": "connector"' in seen
        assert len(re.findall(r"mosquitto version \S+ running", seen)) >= 2
    finally:
        follower.kill()
        follower.wait()
        follower.stdout.close()
    up.public()


def test_settings_change_the_container_and_keep_the_data(up: Stack) -> None:
    old = up.edge.target(mqtt5=False)
    leave_message(old, up.user(), "reader-2")
    before = inspect(up.broker)["Id"]
    up.up("--durability", "interval").good()
    assert inspect(up.broker)["Id"] != before
    find_message(old, up.user(), "reader-2")


def test_a_lost_directory_is_made_again_from_the_containers(up: Stack) -> None:
    ids = inspect(up.broker)["Id"], inspect(up.connector)["Id"]
    moved = up.state.with_name("moved")
    up.state.rename(moved)
    up.run("up").good()
    assert (inspect(up.broker)["Id"], inspect(up.connector)["Id"]) == ids
    assert (up.state / "passwords").exists() or (up.state / "broker" / "passwords").exists()
    up.public()


def test_config_as_compose_is_what_compose_accepts(up: Stack, tmp_path: Path) -> None:
    text = up.run("config", "--compose").good().out
    (tmp_path / "compose.yaml").write_text(text)
    if "compose" not in docker("compose", "version", check=False).lower():
        pytest.skip("NO DOCKER COMPOSE HERE")
    assert docker("compose", "config", "-q", cwd=tmp_path) == ""


def test_down_drains_saves_and_keeps_the_data(up: Stack) -> None:
    old = up.edge.target(mqtt5=False)
    leave_message(old, up.user(), "reader-3")
    result = up.run("down").good()
    order = [event["service"] for event in result.events if event.get("text") == "gone"]
    assert order == ["connector", "broker"]
    assert not exists(up.broker)
    assert not exists(up.connector)
    up.edge.process.event("disconnected")
    assert up.run("status").status == 1
    up.up().good()
    find_message(old, up.user(), "reader-3")
    assert up.run("down", "--volumes").one_line().startswith("--volumes deletes")
    up.run("down", "--volumes", "--yes").good()
    assert f"{up.name}-broker-data" not in docker("volume", "ls", "-q")
    assert f"{up.name}-network" not in docker("network", "ls")
