"""Wake-ups: the kernel's own notices in a network namespace, made-up ones byte by byte, and clocks that jump."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connector.transport import wakeups
from connector.transport.wakeups import Cause, ClockWatch, NetworkMemory, Wakeup, Wakeups
from tests.support.aio import run, until
from tests.support.loops import LOOPS

# -- the real kernel ---------------------------------------------------------------------------------------------------


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, timeout=10)


def make_link() -> None:
    """Make w0: a dummy interface, or one end of a veth pair where the kernel has no dummies."""
    command = ["ip", "link", "add", "w0", "type", "dummy"]
    if subprocess.run(command, check=False, capture_output=True, timeout=10).returncode:
        ip("link add w0 type veth peer name w1")
        ip("link set w1 up")
    ip("link set w0 addrgenmode none")  # no address of its own accord, some time after it is up


def link_up() -> None:
    """Bring w0 up, and wait until the kernel has a carrier: it tells so later, in a notice of its own."""
    ip("link set w0 up")
    for _ in range(1000):
        shown = subprocess.run(
            ["ip", "-o", "link", "show", "w0"], check=True, capture_output=True, text=True, timeout=10
        )
        if "LOWER_UP" in shown.stdout and "state DOWN" not in shown.stdout:
            return
    raise AssertionError(f"w0 does not come up: {shown.stdout}")


class Log:
    """What was told, and waiting for it."""

    def __init__(self) -> None:
        self.causes: list[Cause] = []

    def __call__(self, wakeup: Wakeup) -> None:
        assert wakeup.causes
        self.causes += wakeup.causes

    async def expect(self, *causes: Cause) -> None:
        """Wait for the causes; nothing else may have been told."""
        await until(lambda: set(causes) <= set(self.causes), what=f"{causes}, told: {self.causes}")
        assert set(self.causes) == set(causes)
        self.causes.clear()


async def changes() -> None:
    make_link()
    log = Log()
    source = Wakeups(log, min_interval=0.0)
    source.start()
    assert source.watches_network
    ip("link set w0 up")
    await log.expect(Cause.LINK_UP)
    ip("link set w0 mtu 1400")  # a notice without news
    ip("addr add 192.0.2.1/24 dev w0")
    await log.expect(Cause.ADDRESS_NEW)
    ip("link set w0 alias same")
    ip("addr change 192.0.2.1/24 dev w0 valid_lft 1000 preferred_lft 1000")  # renewed, not new
    ip("route add 198.51.100.0/24 via 192.0.2.7")  # not the default route
    ip("route add default via 192.0.2.9")
    await log.expect(Cause.ROUTE_NEW)
    ip("route replace default via 192.0.2.9")
    ip("route replace default via 192.0.2.8")
    await log.expect(Cause.ROUTE_NEW)
    ip("addr add 2001:db8::1/64 dev w0 nodad")
    await log.expect(Cause.ADDRESS_NEW)
    ip("addr del 192.0.2.1/24 dev w0")
    await log.expect(Cause.ADDRESS_GONE)
    ip("link set w0 down")
    ip("link set w0 up")
    await until(lambda: Cause.LINK_UP in log.causes, what=f"the link again, told: {log.causes}")
    source.close()
    ip("addr add 192.0.2.3/24 dev w0")
    await asyncio.sleep(0)


async def what_was_there_is_no_news() -> None:
    make_link()
    link_up()
    ip("addr add 192.0.2.1/24 dev w0")
    log = Log()
    source = Wakeups(log, min_interval=0.0)
    source.start()
    memory = source._memory
    await until(lambda: not memory._wanted and memory._dumped is None, what="the list of what exists")
    assert memory._links
    assert memory._addresses
    ip("link set w0 mtu 1300")
    ip("addr add 192.0.2.2/24 dev w0")
    await log.expect(Cause.ADDRESS_NEW)
    source.close()


async def too_many_at_once() -> None:
    wakeups.RECEIVE_BUFFER = 1  # the kernel makes it its minimum
    make_link()
    link_up()
    log = Log()
    source = Wakeups(log, min_interval=0.0)
    source.start()
    await until(lambda: source._memory._dumped is None, what="the list of what exists")
    for number in range(1, 60):
        ip(f"addr add 192.0.2.{number}/32 dev w0")  # the loop does not run meanwhile
    await until(lambda: Cause.MISSED in log.causes, what=f"MISSED, told: {log.causes}")
    await until(lambda: source._memory._dumped is None, what="the list of what exists, again")
    assert len(source._memory._addresses) == 59
    log.causes.clear()
    ip("addr add 198.51.100.1/32 dev w0")
    await log.expect(Cause.ADDRESS_NEW)
    source.close()


SCENES = {scene.__name__: scene for scene in (changes, what_was_there_is_no_news, too_many_at_once)}


def missing() -> str:
    if sys.platform != "linux":
        return "netlink is Linux's"
    if os.geteuid() != 0:
        return "needs root for a network namespace"
    for program in ("unshare", "ip"):
        if shutil.which(program) is None:
            return f"needs the program {program} (util-linux, iproute2)"
    made = subprocess.run(
        ["unshare", "-n", "ip", "link", "add", "w0", "type", "veth", "peer", "name", "w1"],
        check=False,
        capture_output=True,
        text=True,
        timeout=10,
    )
    return f"no namespace or interface can be made here: {made.stderr.strip()}" if made.returncode else ""


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("scene", SCENES)
def test_notices_of_the_kernel(scene: str, loop: str) -> None:
    why = missing()
    if why:
        pytest.skip(f"WAKE-UPS NOT TESTED AGAINST A KERNEL: {why}")
    code = "import sys; from tests.transport import test_wakeups; test_wakeups.child(*sys.argv[1:])"
    command = ["unshare", "-n", sys.executable, "-W", "error", "-c", code, scene, loop]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def child(scene: str, loop: str) -> None:
    """Run one scene; called in a fresh network namespace."""
    run(SCENES[scene](), loop_factory=LOOPS[loop])


# -- life cycle and pace -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", LOOPS.values(), ids=LOOPS)
def test_start_and_close_leave_nothing(factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> None:
        source = Wakeups(lambda wakeup: None)
        source.close()
        source = Wakeups(lambda wakeup: None)
        source.start()
        await asyncio.sleep(0)
        source.close()
        source.close()
        assert not source.watches_network

    run(main(), loop_factory=factory)


def test_without_netlink_the_clocks_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> socket.socket:
        raise PermissionError(1, "Operation not permitted")

    async def main() -> None:
        lasting = [0.0]
        told: asyncio.Future[Wakeup] = asyncio.get_running_loop().create_future()
        source = Wakeups(told.set_result, clocks=ClockWatch(lambda: 0.0, lambda: lasting[0]), tick=0.001)
        with monkeypatch.context() as patched:
            patched.setattr(socket, "socket", forbidden)
            source.start()
        assert not source.watches_network
        lasting[0] = 600.0
        assert await told == Wakeup((Cause.RESUMED,))
        source.close()

    run(main())


def test_one_call_at_once_and_the_rest_of_the_interval_together() -> None:
    async def main() -> None:
        calls: list[tuple[Cause, ...]] = []
        source = Wakeups(lambda wakeup: calls.append(wakeup.causes), min_interval=3600.0)
        source._loop = asyncio.get_running_loop()
        source._tell({Cause.LINK_UP})
        assert calls == [(Cause.LINK_UP,)]
        for _ in range(100):
            source._tell({Cause.ADDRESS_NEW})
            source._tell({Cause.LINK_UP})
        assert len(calls) == 1
        assert source._told is not None
        source._told.cancel()
        source._interval_over()
        assert calls[1:] == [(Cause.LINK_UP, Cause.ADDRESS_NEW)]
        assert source._told is not None  # and the next interval runs
        source._told.cancel()
        source._interval_over()
        assert len(calls) == 2
        assert not source._told
        source.close()

    run(main())


def test_closing_from_inside_the_call() -> None:
    async def main() -> None:
        source = Wakeups(lambda wakeup: source.close(), min_interval=0.0)
        source.start()
        source._tell({Cause.MISSED})
        assert not source.watches_network
        await asyncio.sleep(0)

    run(main())


def test_clocks() -> None:
    running, lasting = [0.0], [1000.0]
    watch = ClockWatch(lambda: running[0], lambda: lasting[0])

    def after(run_for: float, last_for: float) -> bool:
        running[0] += run_for
        lasting[0] += last_for
        return watch.jumped()

    assert not after(5.0, 5.0)
    assert not after(5.0, 5.5)  # a busy machine, a slewing clock
    assert after(5.0, 305.0)
    assert not after(5.0, 5.0)  # told once
    assert not after(5.0, -3600.0)  # set back
    assert not after(5.0, 5.0)
    assert not ClockWatch().jumped()


# -- made-up notices ---------------------------------------------------------------------------------------------------


def message(kind: int, payload: bytes, sequence: int = 0) -> bytes:
    data = struct.pack("=IHHII", 16 + len(payload), kind, 0, sequence, 0) + payload
    return data + bytes(-len(data) % 4)


def link(index: int, flags: int, kind: int = 16, sequence: int = 0, master: int | None = None) -> bytes:
    attribute = b"" if master is None else struct.pack("=HHI", 8, 10, master)
    return message(kind, struct.pack("=BxHiII", 0, 1, index, flags, 0xFFFFFFFF) + attribute, sequence)


def address(index: int, value: bytes, *, kind: int = 20, flags: int = 0, scope: int = 0, sequence: int = 0) -> bytes:
    family = 2 if len(value) == 4 else 10
    attribute = struct.pack("=HH", 4 + len(value), 1) + value
    return message(kind, struct.pack("=BBBBI", family, 24, flags, scope, index) + attribute, sequence)


RUNS, UP_ONLY, LOOPBACK = 0x41, 0x1, 0x49
V4, V6 = b"\xc0\0\2\1", b"\x20\1\x0d\xb8" + bytes(12)


@pytest.mark.parametrize(
    ("notices", "causes"),
    [
        ([link(2, RUNS)], [{Cause.LINK_UP}]),
        ([link(2, RUNS), link(2, RUNS)], [{Cause.LINK_UP}, set()]),
        ([link(2, UP_ONLY), link(2, RUNS)], [set(), {Cause.LINK_UP}]),
        ([link(2, RUNS), link(2, UP_ONLY), link(2, RUNS)], [{Cause.LINK_UP}, set(), {Cause.LINK_UP}]),
        ([link(2, RUNS), link(2, RUNS, kind=17), link(2, RUNS)], [{Cause.LINK_UP}, set(), {Cause.LINK_UP}]),
        ([link(1, LOOPBACK)], [set()]),
        ([link(7, RUNS, master=3), link(7, RUNS, master=0)], [set(), {Cause.LINK_UP}]),
        ([address(2, V4)], [{Cause.ADDRESS_NEW}]),
        ([address(2, V4), address(2, V4), address(3, V4)], [{Cause.ADDRESS_NEW}, set(), {Cause.ADDRESS_NEW}]),
        ([address(2, V6, flags=0x40), address(2, V6, flags=0x80)], [set(), {Cause.ADDRESS_NEW}]),
        ([address(2, V4), address(2, V4, kind=21)], [{Cause.ADDRESS_NEW}, {Cause.ADDRESS_GONE}]),
        ([address(2, V4, kind=21)], [set()]),
        ([address(2, V6, scope=253), address(1, V4, scope=254)], [set(), set()]),
        ([link(2, RUNS) + address(2, V4)], [{Cause.LINK_UP, Cause.ADDRESS_NEW}]),
    ],
)
def test_what_is_news(notices: list[bytes], causes: list[set[Cause]]) -> None:
    memory = NetworkMemory()
    assert [memory.receive(notice)[0] for notice in notices] == causes


def test_the_list_of_what_exists_is_asked_for_in_two_steps() -> None:
    memory = NetworkMemory()
    first = memory.dump()
    assert struct.unpack_from("=IHHII", first) == (20, 18, 0x301, 18, 0)
    assert memory.receive(link(2, RUNS, sequence=18)) == (set(), b"")
    assert memory.receive(link(3, RUNS)) == ({Cause.LINK_UP}, b"")  # a real change in between
    causes, second = memory.receive(message(3, bytes(4), sequence=18))
    assert (causes, second[4]) == (set(), 22)
    assert memory.receive(address(2, V4, sequence=22)) == (set(), b"")
    assert memory.receive(message(3, bytes(4), sequence=22)) == (set(), b"")
    assert memory.receive(link(2, RUNS) + address(2, V4)) == (set(), b"")
    assert memory.receive(address(2, V6, sequence=22)) == ({Cause.ADDRESS_NEW}, b"")


def test_memory_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakeups, "MAX_KNOWN", 3)
    memory = NetworkMemory()
    for index in range(1, 20):
        memory.receive(link(index, RUNS) + address(index, V4))
    assert len(memory._links) == len(memory._addresses) == 3
    assert memory.receive(link(19, RUNS))[0] == {Cause.LINK_UP}  # unknown counts as news


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.builds(message, st.integers(0, 40), st.binary(max_size=60), st.integers(0, 30)),
        ),
        max_size=6,
    ).map(b"".join)
)
def test_any_bytes_are_taken(data: bytes) -> None:
    memory = NetworkMemory()
    memory.dump()
    causes, request = memory.receive(data)
    assert causes <= set(Cause)
    assert isinstance(request, bytes)
