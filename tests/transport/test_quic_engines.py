"""The engines without sockets: what goes over the wire, self-checks, and the link's timers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aioquic.buffer import Buffer as AioBuffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import pull_quic_header

from connector.errors import ConfigError
from connector.protocol.quic_limits import QuicLimits
from connector.transport import quic_engine_aioquic, quic_engine_qh3
from connector.transport.quic import QuicLink, dial_quic
from connector.transport.quic_engine import (
    EngineSettings,
    EngineUnavailableError,
    QuicEngine,
    find_engine,
    has_post_quantum,
)
from connector.transport.quic_trust import quic_context
from tests.support.aio import run, until
from tests.support.certs import Authority
from tests.support.mini_quic_edge import MiniQuicEdge
from tests.transport.quic_rig import Acceptor, both


def settings(**changes: Any) -> EngineSettings:
    return EngineSettings("quic.cftunnel.com", Authority().pem().encode(), **changes)


def make(name: str, **changes: Any) -> QuicEngine:
    return find_engine(name)[1](settings(**changes))


class Recorder:
    """EngineEvents that writes down."""

    def __init__(self) -> None:
        self.receive_paused = False
        self.log: list[tuple[Any, ...]] = []

    def on_handshake_done(self) -> None:
        self.log.append(("handshake",))

    def on_stream_data(self, stream_id: int, data: Any, fin: bool) -> None:
        self.log.append(("data", stream_id, bytes(data), fin))

    def on_stream_reset(self, stream_id: int) -> None:
        self.log.append(("reset", stream_id))

    def on_stop_sending(self, stream_id: int) -> None:
        self.log.append(("stop", stream_id))

    def on_datagram_frame(self, data: bytes) -> None:
        self.log.append(("datagram", data))

    def on_terminated(self, code: int, reason: str, by_peer: bool) -> None:
        self.log.append(("end", code, reason, by_peer))


class Wire:
    """An engine and an aioquic server, joined in memory, with a clock of their own."""

    def __init__(self, engine: QuicEngine, directory: Path, server: QuicConfiguration) -> None:
        self.engine = engine
        self.events = Recorder()
        self.now = 1.0
        self.largest = 0
        self.first: list[bytes] = []
        self.server: QuicConnection | None = None
        self.configuration = server
        engine.connect(("127.0.0.1", 7844), self.now)

    def step(self) -> None:
        for datagram in self.engine.transmit(self.now):
            self.first.append(datagram)
            self.largest = max(self.largest, len(datagram))
            if self.server is None:
                header = pull_quic_header(AioBuffer(data=datagram), host_cid_length=8)
                self.server = QuicConnection(
                    configuration=self.configuration, original_destination_connection_id=header.destination_cid
                )
            self.server.receive_datagram(datagram, ("127.0.0.1", 1), self.now)
        if self.server is not None:
            for datagram, _ in self.server.datagrams_to_send(self.now):
                self.engine.receive(datagram, len(datagram), self.now)
        self.engine.dispatch(self.events)
        self.now += 0.01

    def run(self, done: Callable[[], object]) -> None:
        for _ in range(200):
            if done():
                return
            self.step()
            due = self.engine.next_timeout()
            if due is not None and due <= self.now:
                self.engine.handle_timeout(self.now)
            if self.server is not None:
                timer = self.server.get_timer()
                if timer is not None and timer <= self.now:
                    self.server.handle_timer(self.now)
        raise AssertionError(f"not done: {self.events.log}")


def wired(engine_name: str, directory: Path, **changes: Any) -> Wire:
    edge = MiniQuicEdge(directory)
    edge_settings = EngineSettings("quic.cftunnel.com", Path(edge.cacert).read_bytes(), **changes)
    wire = Wire(find_engine(engine_name)[1](edge_settings), directory, edge.configuration)
    wire.run(lambda: ("handshake",) in wire.events.log)
    return wire


@both
def test_transport_parameters_are_the_edge_protocols(tmp_path: Path, engine: str) -> None:
    limits = QuicLimits()
    wire = wired(engine, tmp_path)
    server = wire.server
    assert server is not None
    assert server._remote_max_streams_bidi == limits.max_streams
    assert server._remote_max_data == limits.connection_window
    assert server._remote_max_stream_data_bidi_local == limits.stream_window
    assert server._remote_max_stream_data_bidi_remote == limits.stream_window
    assert server._remote_max_idle_timeout == 5.0
    assert server._remote_max_datagram_frame_size == 16_383
    assert server.tls.alpn_negotiated == "argotunnel"
    assert wire.first
    assert len(wire.first[0]) in (1_200, 1_232)


def test_post_quantum_key_exchange_is_offered(tmp_path: Path) -> None:
    engine = make("qh3")
    engine.connect(("127.0.0.1", 7844), 0.0)
    hello = engine._connection._tls.tls  # type: ignore[attr-defined]
    assert 0x11EC in [int(group) for group in hello._supported_groups]


def test_post_quantum_only() -> None:
    assert has_post_quantum("qh3")
    assert not has_post_quantum("aioquic")
    engine = make("qh3", post_quantum_only=True)
    engine.connect(("127.0.0.1", 7844), 0.0)
    assert [int(group) for group in engine._connection._tls.tls._supported_groups] == [0x11EC]  # type: ignore[attr-defined]

    async def main() -> None:
        with pytest.raises(ConfigError, match="post-quantum"):
            await dial_quic(
                "127.0.0.1", 9, context=quic_context(), accept=Acceptor(), engine="aioquic", post_quantum_only=True
            )

    run(main())


@both
@pytest.mark.parametrize(("version", "size"), [(4, 1_232), (6, 1_252)])
def test_first_packets_pass_a_path_of_1280(engine: str, version: int, size: int) -> None:
    made = make(engine, ip_version=version)
    made.connect(("127.0.0.1", 7844) if version == 4 else ("::1", 7844), 0.0)
    assert made.mtu == size
    assert all(len(datagram) <= size for datagram in made.transmit(0.0))


def test_path_mtu_probing_stops_at_our_ceiling_and_can_be_off(tmp_path: Path) -> None:
    wire = wired("qh3", tmp_path)
    wire.run(lambda: wire.engine.mtu == 1_452)
    for _ in range(50):
        wire.step()
    assert wire.largest == wire.engine.mtu == 1_452
    wire = wired("qh3", tmp_path, path_mtu_discovery=False)
    for _ in range(50):
        wire.step()
    assert wire.engine.mtu == 1_232


@both
def test_more_streams_than_the_libraries_allow_by_themselves(tmp_path: Path, engine: str) -> None:
    wire = wired(engine, tmp_path)
    server = wire.server
    assert server is not None
    for number in range(1_000):
        server.send_stream_data(4 * number + 1, b"x")
    wire.run(lambda: sum(event[0] == "data" for event in wire.events.log) == 1_000)
    assert not server._streams_blocked_bidi


@both
def test_what_does_not_fit_wedges_nothing(tmp_path: Path, engine: str) -> None:
    wire = wired(engine, tmp_path)
    server = wire.server
    assert server is not None
    for _ in range(50):
        wire.step()
    for size in (1_500, 1_440, wire.engine.mtu - 43):
        assert not wire.engine.send_datagram(b"x" * size)
    assert wire.engine.send_datagram(b"y" * (wire.engine.mtu - 44))
    assert wire.engine.send_datagram(b"z")
    seen: list[bytes] = []

    def arrived() -> bool:
        while (event := server.next_event()) is not None:
            if type(event).__name__ == "DatagramFrameReceived":
                seen.append(event.data)  # type: ignore[attr-defined]
        return len(seen) == 2

    wire.run(arrived)
    assert seen == [b"y" * (wire.engine.mtu - 44), b"z"]


@both
def test_calls_on_streams_that_are_over_do_not_raise(tmp_path: Path, engine: str) -> None:
    wire = wired(engine, tmp_path)
    made, server = wire.engine, wire.server
    assert server is not None
    server.send_stream_data(1, b"x")
    wire.run(lambda: ("data", 1, b"x", False) in wire.events.log)
    server.stop_stream(1, 0)
    for _ in range(5):
        wire.step()
    assert ("stop", 1) in wire.events.log
    assert not made.send(1, b"late", False)
    for _ in range(2):
        made.reset_stream(1)
        made.stop_stream(1)
        made.credit(1, 10)
        made.reset_stream(4_001)
        made.stop_stream(4_001)
    assert made.queued(4_001) == 0
    made.close(0, "")
    made.ping()
    made.close(0, "")
    assert not made.send_datagram(b"x") or engine == "aioquic"


def test_taking_nothing_holds_the_peer_back(tmp_path: Path) -> None:
    """The rule that bounds memory with qh3: credit comes back when an event is taken, and only then."""
    limits = QuicLimits(stream_window=100_000, connection_window=150_000)
    wire = wired("qh3", tmp_path, limits=limits)
    server = wire.server
    assert server is not None
    wire.events.receive_paused = True
    for stream_id in (1, 5, 9):
        server.send_stream_data(stream_id, bytes(200_000))
    for _ in range(150):
        wire.step()
    sent = sum(stream.sender.highest_offset for stream in server._streams.values())
    assert sent <= 150_000
    assert not [event for event in wire.events.log if event[0] == "data"]
    wire.events.receive_paused = False
    wire.run(lambda: sum(len(event[2]) for event in wire.events.log if event[0] == "data") == 600_000)


def test_the_self_check_of_qh3_sees_a_limit_of_100(monkeypatch: pytest.MonkeyPatch) -> None:
    quic_engine_qh3.self_check.cache_clear()
    try:
        quic_engine_qh3.self_check()
        quic_engine_qh3.self_check.cache_clear()
        real = quic_engine_qh3.QuicConnectionCore

        def capped(*args: Any) -> Any:
            return real(*args[:21], min(args[21], 100), *args[22:])

        monkeypatch.setattr(quic_engine_qh3, "QuicConnectionCore", capped)
        with pytest.raises(EngineUnavailableError, match="limit of streams"):
            quic_engine_qh3.self_check()
        monkeypatch.setattr(quic_engine_qh3, "QuicConnectionCore", object)
        quic_engine_qh3.self_check.cache_clear()
        with pytest.raises(EngineUnavailableError, match="not the one"):
            quic_engine_qh3.self_check()
    finally:
        quic_engine_qh3.self_check.cache_clear()


def test_the_self_check_of_aioquic_sees_a_changed_library(monkeypatch: pytest.MonkeyPatch) -> None:
    quic_engine_aioquic.self_check.cache_clear()
    try:
        quic_engine_aioquic.self_check()
        quic_engine_aioquic.self_check.cache_clear()
        monkeypatch.delattr(QuicConnection, "_write_application")
        with pytest.raises(EngineUnavailableError, match="not the one"):
            quic_engine_aioquic.self_check()
    finally:
        quic_engine_aioquic.self_check.cache_clear()


class ImpatientEngine:
    """An engine whose deadline is always now."""

    name = "impatient"
    credit_by_stream = True
    alive = True
    congested = False
    mtu = 1_232

    def figures(self) -> dict[str, float]:
        return {}

    def __init__(self, due: Callable[[], float]) -> None:
        self.due = due
        self.timeouts = 0

    def connect(self, address: tuple[str, int], now: float) -> None:
        pass

    def dispatch(self, events: Any) -> None:
        pass

    def transmit(self, now: float) -> list[bytes]:
        return []

    def next_timeout(self) -> float | None:
        return self.due()

    def handle_timeout(self, now: float) -> None:
        assert now >= self.due() - 0.001
        self.timeouts += 1

    def ping(self) -> None:
        pass

    def close(self, code: int, reason: str) -> None:
        pass


def test_timers_are_never_armed_below_a_millisecond() -> None:
    async def main() -> None:
        from time import monotonic

        loop = asyncio.get_running_loop()
        delays: list[float] = []

        class Watching:
            def __getattr__(self, name: str) -> Any:
                return getattr(loop, name)

            def call_later(self, delay: float, *args: Any) -> asyncio.TimerHandle:
                delays.append(delay)
                return loop.call_later(delay, *args)

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.bind(("127.0.0.1", 0))
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.setblocking(False)
            sock.connect(peer.getsockname())
            engine: Any = ImpatientEngine(lambda: monotonic() + 0.00001)
            link = QuicLink(engine, sock, Acceptor(), loop=Watching())  # type: ignore[arg-type]
            for _ in range(50):
                link._flush()
            assert len(delays) == 1, "a timer that fires early enough is left alone"
            await until(lambda: engine.timeouts >= 20)
            assert min(delays) >= 0.00099
            link.abort()

    run(main())
