"""Mosquitto: finding it, its two dialects, and a real one behind our configuration."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest

from launcher import mosquitto, selfcheck
from launcher.credentials import User
from launcher.errors import HopError
from launcher.mosquitto import Binary, Broker
from tests.launcher.support import accepts, linux, needs_mosquitto, program, running_mosquitto, users, wait_gone
from tests.support.aio import run, until


def test_version_is_read_from_the_help_text(tmp_path: Path) -> None:
    path = program(tmp_path / "mosquitto", "echo 'mosquitto version 2.1.2'; echo; echo 'usage'; exit 3")
    assert mosquitto.find_mosquitto(path) == Binary(path, (2, 1, 2))
    assert str(mosquitto.find_mosquitto(path)) == "Mosquitto 2.1.2"


def test_an_old_one_is_refused_with_advice(tmp_path: Path) -> None:
    path = program(tmp_path / "mosquitto", "echo 'mosquitto version 1.6.12 (build)'")
    with pytest.raises(HopError, match=r"1\.6\.12 .* too old: 2\.0 is needed") as caught:
        mosquitto.find_mosquitto(path)
    assert "--broker embedded" in caught.value.advice


@pytest.mark.parametrize("script", ["exit 1", "echo nothing", "kill -9 $$"])
def test_one_that_does_not_say_its_version_is_refused(tmp_path: Path, script: str) -> None:
    with pytest.raises(HopError, match="does not tell its version"):
        mosquitto.find_mosquitto(program(tmp_path / "mosquitto", script))


def test_looks_in_path_then_where_daemons_hide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program(tmp_path / "mosquitto", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert mosquitto.find_program("mosquitto") == path
    assert "/usr/sbin" in mosquitto.SEARCH
    assert "/usr/local/sbin" in mosquitto.SEARCH
    assert any("homebrew" in place for place in mosquitto.SEARCH)


@pytest.mark.parametrize("version", [(2, 0, 11), (2, 1, 2)])
def test_configuration_is_closed_and_bounded(version: tuple[int, int, int]) -> None:
    text = mosquitto.configuration(version, 1111, 2222)
    lines = text.splitlines()
    if version >= (2, 1, 0):
        assert lines.count("listener_allow_anonymous false") == 2
    else:
        assert "allow_anonymous false" in lines
    assert "listener 1111 127.0.0.1" in lines
    assert "listener 2222 127.0.0.1" in lines
    assert lines.count("max_connections 1000") == 2
    for option in ("max_packet_size", "max_queued_messages", "max_queued_bytes", "password_file", "acl_file"):
        assert sum(line.startswith(option + " ") for line in lines) == 1
    assert ("global_max_connections 1000" in lines) is (version >= (2, 1, 0))
    assert "user" not in {line.split()[0] for line in lines if line}
    assert "user root" in mosquitto.configuration(version, 1, 2, user="root").splitlines()


def test_files_are_private_and_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    link = tmp_path / "passwords"
    link.symlink_to(victim)
    mosquitto.write_private(link, "new")
    assert victim.read_text() == "untouched"
    assert link.read_text() == "new"
    assert stat.S_IMODE(link.stat().st_mode) == 0o600


def test_a_taken_port_is_recognised() -> None:
    assert mosquitto.address_in_use(["1: Opening", "1: Error: Address already in use"])
    assert mosquitto.address_in_use(["Error: Unable to create websockets listener on port 1."])
    assert not mosquitto.address_in_use(["Error: Unknown configuration variable 'x'."])


def test_free_ports_differ() -> None:
    assert len(set(mosquitto.free_ports(8))) == 8


def test_open_to_others_sees_a_wide_open_port() -> None:
    with socket.create_server(("0.0.0.0", 0)) as wide, socket.create_server(("127.0.0.1", 0)) as narrow:
        assert not mosquitto.open_to_others(narrow.getsockname()[1])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
            except OSError:
                pytest.skip("NO ROUTE HERE: only loopback exists")
        assert mosquitto.open_to_others(wide.getsockname()[1])


@needs_mosquitto
def test_a_real_broker_lets_its_users_in_and_nobody_else(tmp_path: Path) -> None:
    demo, health = users()
    steps: list[selfcheck.Step] = []

    async def main() -> None:
        async with running_mosquitto(tmp_path / "broker", demo, health) as broker:
            for port in (broker.mqtt_port, broker.ws_port):
                assert not mosquitto.open_to_others(port)
            for path in (None, "/mqtt"):
                target = selfcheck.Target("127.0.0.1", broker.mqtt_port if path is None else broker.ws_port, path)
                await asyncio.to_thread(selfcheck.run, target, demo, health, steps.append)

    run(main(), limit=60)
    assert [step.hop for step in steps] == [
        selfcheck.CONNECT, selfcheck.SUBSCRIBE, selfcheck.DELIVERY, selfcheck.PUBLISH,
        selfcheck.CONNECT, selfcheck.CONNECT, selfcheck.CONNECT,
    ] * 2  # fmt: skip
    assert (tmp_path / "broker" / "data" / "mosquitto.db").exists()
    for file in ("passwords", "acl", "mosquitto.conf"):
        assert stat.S_IMODE((tmp_path / "broker" / file).stat().st_mode) == 0o600
        text = (tmp_path / "broker" / file).read_text()
        assert demo.password not in text
        assert health.password not in text


@needs_mosquitto
@linux
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_gives_the_broker_a_lesser_user(tmp_path: Path) -> None:
    demo, health = users()

    async def main() -> int:
        async with running_mosquitto(tmp_path, demo, health) as broker:
            assert broker.child.pid is not None
            assert os.stat(f"/proc/{broker.child.pid}").st_uid != 0
            os.kill(broker.child.guard_pid, 9)
            wait_gone(broker.child.pid)
            return await broker.child.exited

    assert run(main()) == -9


@needs_mosquitto
def test_a_taken_port_is_tried_again_with_others(tmp_path: Path) -> None:
    demo, health = users()
    binary = mosquitto.find_mosquitto()
    assert binary is not None
    asked: list[int] = []

    async def main(taken: int, which: int) -> None:
        def ports(count: int) -> list[int]:
            chosen = mosquitto.free_ports(count)
            if not asked:
                chosen[which] = taken
            asked.append(1)
            return chosen

        async def ready(broker: Broker) -> None:
            if taken in {broker.mqtt_port, broker.ws_port}:
                await never(broker)  # somebody else's listener may answer anything, or nothing
            await accepts(broker, health)

        broker = await mosquitto.start(
            tmp_path / str(which), [demo, health], binary, on_line=None, ready=ready, ports=ports
        )
        assert taken not in {broker.mqtt_port, broker.ws_port}
        await broker.child.stop()

    for which in (0, 1):
        asked.clear()
        with socket.create_server(("127.0.0.1", 0)) as holder:
            run(main(holder.getsockname()[1], which))
        assert len(asked) == 2


@pytest.fixture
def as_ourselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs in our private test directory cannot be run as another user."""
    monkeypatch.setattr(mosquitto, "broker_identity", lambda: None)


@pytest.mark.usefixtures("as_ourselves")
def test_ports_that_stay_taken_end_with_advice(tmp_path: Path) -> None:
    binary = Binary(program(tmp_path / "mosquitto", "echo 'Error: Address already in use' >&2; exit 1"), (2, 0, 11))

    async def main() -> None:
        with pytest.raises(HopError, match="taken 5 times") as caught:
            await mosquitto.start(tmp_path / "b", users(), binary, on_line=None, ready=never)
        assert caught.value.hop == "broker"
        assert "try again" in caught.value.advice

    run(main())


@pytest.mark.usefixtures("as_ourselves")
def test_a_broker_that_ends_at_once_is_told_with_its_last_lines(tmp_path: Path) -> None:
    binary = Binary(program(tmp_path / "mosquitto", "echo 'Error: no luck' >&2; exit 3"), (2, 0, 11))

    async def main() -> None:
        with pytest.raises(HopError, match="ended at once: exit status 3") as caught:
            await mosquitto.start(tmp_path / "b", users(), binary, on_line=None, ready=never)
        assert caught.value.tail == ["Error: no luck"]

    run(main())


async def never(_broker: Broker) -> None:
    await asyncio.Event().wait()


@linux
@pytest.mark.usefixtures("as_ourselves")
def test_a_readiness_that_fails_leaves_no_broker(tmp_path: Path) -> None:
    pids: list[int] = []

    async def fails(broker: Broker) -> None:
        await until(lambda: broker.child.pid is not None, what="pid")
        assert broker.child.pid is not None
        pids.append(broker.child.pid)
        raise HopError("broker", "not today")

    async def main() -> None:
        with pytest.raises(HopError, match="not today"):
            await mosquitto.start(
                tmp_path / "b",
                [User("a", "b", ())],
                Binary(program(tmp_path / "mosquitto", "exec sleep 60"), (2, 0, 11)),
                on_line=None,
                ready=fails,
            )

    run(main())
    wait_gone(pids[0])
