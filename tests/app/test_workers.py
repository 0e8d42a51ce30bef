"""What workers are made of, each for itself: messages, the count, shared flows, settings, addresses, metrics."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest

from connector.app.config import RunConfig, run_config
from connector.app.flags import Flags, parse_level
from connector.app.log_stream import LogStreams
from connector.app.logs import Logger, LogOutput
from connector.app.workers import messages as say
from connector.app.workers.count import cgroup_quota, usable_cpus, wanted_workers
from connector.app.workers.flow_count import FlowCount, make_memory
from connector.app.workers.gather import Tally, add_up, counters
from connector.app.workers.one_worker import child_environment, describe_status
from connector.app.workers.pipe import Pipe
from connector.app.workers.settings import pack_config, pack_rules, unpack_config, unpack_rules
from connector.app.workers.shares import SharedBook, SharedChoice, SharedRotation, Silence, WorkerLog
from connector.errors import ConfigError, EdgeDialError, UsageError
from connector.protocol.counts import Histogram
from connector.protocol.edge_addresses import EdgeAddress
from connector.protocol.protocol_choice import RemoteFeatures, Selector, Transport
from connector.protocol.protocol_race import DialPlan, PathStatus, QuicPath, Reason
from connector.proxy.flows import FlowLimiter, FlowLimitError
from connector.proxy.ingress import parse_remote_config
from connector.wire.token import Token
from tests.support.aio import run, until

# -- messages ---------------------------------------------------------------------------------------------------------


def bodies(*messages: say.Message) -> list[bytes]:
    return say.FrameReader().receive(b"".join(map(say.encode, messages)))


def test_every_message_comes_out_as_it_went_in() -> None:
    path = QuicPath(PathStatus.BLOCKED, Reason.UDP_BLOCKED, 2, (1.5,), probe_at=9.0)
    selector = Selector(Transport.QUIC, Transport.HTTP2)
    down = [
        say.Run(3, registered=True), say.Address(1, "127.0.0.1", 7844), say.MoveOn(2), say.MoveOn(2, 1.5),
        say.Choice(selector, path, RemoteFeatures(50), 7844), say.Ask(4, "/x", {"seconds": ["1"]}), say.Stop(30.0),
    ]  # fmt: skip
    up = [
        say.Log("info", "text", {"a": 1, "b": [1, None], "c": {"d": "e"}}), say.Hello([]),
        say.DialFailed(DialPlan.RACE, forbidden=False), say.Registered(0, "::1", 1, Transport.QUIC, "dev01"),
        say.Numbers(1, [("a", ("b",), 2.0)], [("h", (), (1.0, 2.0), [1, 2, 3], 4.5)]),
    ]  # fmt: skip
    assert [say.to_worker.decode(body) for body in bodies(*down)] == down
    assert [say.to_leader.decode(body) for body in bodies(*up)] == up


def test_what_a_log_line_carries_becomes_text() -> None:
    (body,) = bodies(say.Log("error", "x", {"path": Path("/a"), "error": ValueError("no")}))
    assert say.to_leader.decode(body).fields == {"path": "/a", "error": "no"}


def test_frames_are_cut_wherever_the_bytes_are() -> None:
    data = say.encode(say.Ping(1)) + say.encode(say.Ping(2))
    reader = say.FrameReader()
    found = [body for byte in data for body in reader.receive(bytes([byte]))]
    assert [say.to_worker.decode(body).serial for body in found] == [1, 2]


def test_frames_and_messages_have_an_end() -> None:
    with pytest.raises(say.MessageTooLargeError, match="Text has"):
        say.encode(say.Text(1, "x" * say.MAX_MESSAGE))
    with pytest.raises(say.MessageTooLargeError, match="a frame of"):
        say.FrameReader().receive(b"\xff\xff\xff\xff")
    with pytest.raises(msgspec.MsgspecError):
        say.to_worker.decode(b"\x93\xa3Run\x01\xa1x")


def test_messages_with_a_secret_do_not_show_it() -> None:
    assert "hush" not in repr(say.UseToken("a", b"hush", "t", "")) + repr(say.TokenNews(b"hush", accepted=True))


async def pair() -> tuple[Pipe, list[Any], list[str], socket.socket]:
    ours, theirs = socket.socketpair()
    got: list[Any] = []
    ends: list[str] = []
    return await Pipe.open(ours, say.to_leader, got.append, ends.append), got, ends, theirs


def test_a_peer_that_talks_nonsense_is_left() -> None:
    async def main() -> None:
        _, got, ends, theirs = await pair()
        theirs.sendall(say.encode(say.Pong(1)) + b"\0\0\0\1\xc1")
        await until(lambda: ends, what="the end")
        assert got == [say.Pong(1)]
        assert "a message that is none" in ends[0]
        theirs.close()

    run(main())


def test_lines_are_dropped_and_counted_when_nobody_reads_and_one_end_is_told_once() -> None:
    async def main() -> None:
        pipe, _, ends, theirs = await pair()
        line = say.Log("info", "x" * 65536, {})
        while not pipe.dropped:
            pipe.send_if_room(line)
            await asyncio.sleep(0)
        theirs.close()
        await until(lambda: ends, what="the end")
        pipe.send(say.Pong(1))  # nobody is there: nothing happens
        pipe.close()
        assert len(ends) == 1

    run(main())


# -- how many ---------------------------------------------------------------------------------------------------------


def test_auto_is_what_may_be_used_and_not_more_than_there_are_connections() -> None:
    assert wanted_workers("3", 4) == 3
    assert wanted_workers("auto", 1) == 1
    assert 1 <= wanted_workers("auto", 32) <= (os.cpu_count() or 1)
    for text in ("0", "-1", "33", "two", "", "²"):
        with pytest.raises(UsageError, match="--workers"):
            wanted_workers(text, 4)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 0.5),
        ({"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/d\n1:memory:/d\n",
                "sys/fs/cgroup/cpu/d/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu/d/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "what is this"}, None),
        ({}, None),
    ],
)
def test_a_container_with_less_than_a_machine(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroup_quota(tmp_path) == quota
    assert usable_cpus(tmp_path) == max(1, min(usable_cpus(Path("/nowhere")), -(-int((quota or 99) * 10) // 10)))


def token_text() -> str:
    parts = {"a": "account", "t": str(uuid.uuid4()), "s": base64.b64encode(b"s" * 32).decode()}
    return base64.b64encode(json.dumps(parts).encode()).decode()


def config(*argv: str, env: dict[str, str] | None = None) -> RunConfig:
    return run_config(Flags([parse_level(argv)], env or {}), (), token_text())


def test_one_process_unless_somebody_wants_more() -> None:
    assert config().workers == 1
    assert config("--workers", "2").workers == 2
    assert config(env={"TUNNEL_WORKERS": "3"}).workers == 3


@pytest.mark.parametrize("flag", [("--inspect",), ("--capture", "x")])
def test_what_sees_one_process_only_is_refused(flag: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=f"{flag[0]} sees one process only and is not possible with 2 workers"):
        config("--workers", "2", *flag)
    config("--workers", "1", *flag)


# -- what is shared ---------------------------------------------------------------------------------------------------


def test_the_last_slot_of_the_flow_limit_is_one_for_all_workers() -> None:
    memory = make_memory(2)
    counts = [FlowCount(os.dup(memory), worker) for worker in (0, 1)]
    first, second = (FlowLimiter(3, count) for count in counts)
    assert first.take_udp()
    assert second.take_udp()
    assert first.take_udp()
    assert not second.take_udp()
    with pytest.raises(FlowLimitError):
        first.take_tcp()
    first.release()
    second.take_tcp()
    assert (first.active, second.active, counts[0].active) == (1, 2, 3)
    counts[0].clear(1)  # the second has died
    assert first.take_udp()
    unlimited = FlowLimiter(None, counts[0])
    assert all(unlimited.take_udp() for _ in range(5))
    for count in counts:
        count.close()
    os.close(memory)


def test_settings_and_rules_come_out_as_they_went_in_without_what_is_the_leaders() -> None:
    before = config("--workers", "2", "--grace-period", "7s", "--tag", "a=b", "--pidfile", "/x", "--edge", "h:1")
    rotated = Token("account", b"n" * 32, before.token.tunnel_id)
    after = unpack_config(pack_config(before, rotated))
    assert (after.grace_period, after.tags, after.token.secret) == (7.0, [("a", "b")], b"n" * 32)
    assert (after.pidfile, after.edges, after.watched) == (None, [], None)
    rules = parse_remote_config(
        4, {"ingress": [{"path": "^/x[0-9]+$", "service": "http://a"}, {"service": "http_status:404"}]}
    )
    assert rules.match(b"h", b"/x1").index == 0
    again = unpack_rules(pack_rules(rules))
    assert again == rules
    assert [again.match(b"h", path).index for path in (b"/x12", b"/y")] == [0, 1]


def test_no_proxy_of_the_environment_counts_in_a_worker_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", ".example.com")
    environ = {"HTTPS_PROXY": "http://proxy:1", "NO_PROXY": ".example.com"}
    before = config("--edge", "other.net:7844", env=environ)
    after = unpack_config(pack_config(before, before.token))
    assert after.proxy == before.proxy is not None
    assert [after.proxy_exempt(host) for host in ("a.example.com", "other.net")] == [True, False]


def test_an_address_is_asked_for_and_a_rotation_told() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        got: list[Any] = []
        leader = await Pipe.open(theirs, say.to_leader, got.append, lambda why: None)
        pipe = await Pipe.open(ours, say.to_worker, got.append, lambda why: None)
        book = SharedBook(pipe)
        pipe.hand_to(book.given)
        book.rotate(1, unreachable=True, leave_region=False)
        asked = asyncio.ensure_future(book.take(1))
        await until(lambda: len(got) == 2, what="both messages")
        assert got == [say.Rotate(1, unreachable=True, leave_region=False), say.NeedAddress(1)]
        leader.send(say.Address(1, "198.51.100.7", 7844))
        assert await asked == EdgeAddress("198.51.100.7", 7844)
        asked = asyncio.ensure_future(book.take(2))
        await until(lambda: len(got) == 3, what="the question")
        leader.send(say.Address(2, "", 0))
        assert await asked is None
        for each in (pipe, leader):
            each.close()
        await asyncio.sleep(0)

    run(main())


def test_what_happens_to_quic_counts_here_at_once_and_the_verdict_of_all_replaces_it() -> None:
    async def main() -> None:
        pipe, _, _, theirs = await pair()
        choice = SharedChoice(pipe, "auto", Logger(Silence()), clock=lambda: 0.0, draw=lambda: 0.5)
        assert choice.plan() is DialPlan.RACE
        error = EdgeDialError("no answer")
        choice.came_up(Transport.HTTP2, raced=True, quic_heard=False, quic_error=error)
        assert choice.dial_failed(DialPlan.RACE, error) is not None
        assert choice.link_ended(Transport.HTTP2, None) is Reason.EDGE_CLOSED
        choice.use_port(7845)
        await asyncio.sleep(0)
        theirs.setblocking(False)
        told = [say.to_leader.decode(body) for body in say.FrameReader().receive(theirs.recv(65536))]
        assert [type(message) for message in told] == [say.CameUp, say.DialFailed, say.LinkEnded, say.UsePort]
        blocked = QuicPath(PathStatus.BLOCKED, Reason.UDP_BLOCKED)
        choice.adopt(choice.knowledge[0], blocked, RemoteFeatures(), 7845)
        assert choice.plan() is DialPlan.HTTP2
        pipe.close()
        theirs.close()

    run(main())


def test_a_refused_token_is_told_and_the_one_before_is_in_force() -> None:
    async def main() -> None:
        pipe, _, _, theirs = await pair()
        old, new = (Token("a", secret * 32, uuid.uuid4()) for secret in (b"o", b"n"))
        rotation = SharedRotation(pipe, old)
        rotation.begin(new, ())
        assert rotation.before is old
        assert rotation.refused(new)
        assert rotation.token is old
        assert not rotation.refused(old)
        rotation.accepted(old)
        await asyncio.sleep(0)
        told = [say.to_leader.decode(body) for body in say.FrameReader().receive(theirs.recv(65536))]
        assert [(message.secret, message.accepted) for message in told] == [(b"n" * 32, False), (b"o" * 32, True)]
        pipe.close()
        theirs.close()

    run(main())


def test_lines_that_nobody_wants_stay_in_the_worker() -> None:
    async def main() -> None:
        pipe, _, _, theirs = await pair()
        output = WorkerLog()
        log = Logger(output)
        log.info("before there is anybody")
        output.attach(pipe, 20)
        log.debug("too low")
        log.info("told", connIndex=1)
        output.quiet = True
        log.warn("said by another")
        output.quiet = False
        output.set_threshold(0)
        log.debug("wanted now")
        await asyncio.sleep(0)
        told = [say.to_leader.decode(body) for body in say.FrameReader().receive(theirs.recv(65536))]
        assert [message.message for message in told] == ["told", "wanted now"]
        assert told[0].fields == {"connIndex": 1}
        pipe.close()
        theirs.close()

    run(main())


def test_one_person_streams_through_all_workers() -> None:
    async def main() -> None:
        class Session:
            def __init__(self, actor: str) -> None:
                self.actor = actor

            def on_event(self, level: str, event: str, text: str) -> None:
                """Nothing."""

        streams = LogStreams(Logger(LogOutput()))
        started: list[str] = []
        streams.on_actor = started.append
        streams.elsewhere = "somebody"
        other: Any = Session("another")
        same: Any = Session("somebody")
        assert not streams.start(other)
        assert streams.start(same)  # the leading process ends the session of the other worker
        assert started == ["somebody"]

    run(main())


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_numbers_add_up_and_counters_survive_their_worker() -> None:
    numbers: list[say.Number] = [
        ("cloudflared_tunnel_total_requests", (), 3.0),
        ("cloudflared_tunnel_concurrent_requests_per_tunnel", (), 1.0),
        ("connector_failures_total", ("origin",), 2.0),
    ]
    buckets: list[say.Buckets] = [("h", ("x",), (1.0, 2.0), [1, 0, 2], 7.0)]
    tally: Tally = {}
    add_up(tally, numbers, buckets)
    add_up(tally, numbers, buckets)
    assert tally["cloudflared_tunnel_total_requests", ()] == 6
    histogram = tally["h", ("x",)]
    assert isinstance(histogram, Histogram)
    assert (histogram.counts, histogram.sum) == ([2, 0, 4], 14.0)
    assert [name for name, _, _ in counters(numbers)] == [
        "cloudflared_tunnel_total_requests", "connector_failures_total",
    ]  # fmt: skip


def test_how_a_worker_ended_in_words() -> None:
    assert describe_status(-9) == "killed by SIGKILL"
    assert describe_status(-200) == "killed by signal 200"
    assert describe_status(3) == "it ended with status 3"


def test_a_workers_environment_has_no_secret_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNNEL_TOKEN", "hush")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setenv("SSL_CERT_FILE", "/x")
    found = child_environment()
    assert "TUNNEL_TOKEN" not in found
    assert "NOTIFY_SOCKET" not in found
    assert found["SSL_CERT_FILE"] == "/x"


def test_a_worker_of_another_version_says_what_to_do() -> None:
    life = os.pipe()
    command = [sys.executable, "-m", "connector.app.workers.child", "0.0.0", "0", "0", str(life[0]), "0"]
    done = subprocess.run(command, pass_fds=life[:1], capture_output=True, text=True, check=False)
    for descriptor in life:
        os.close(descriptor)
    assert done.returncode == 1
    assert "was installed while version 0.0.0 runs: restart the connector" in done.stdout
