"""The bridge between a stream and a socket: nothing lost, nothing unbounded, nothing leaked."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import capnp
import pytest
import uvloop

from connector.errors import EdgeLostError, ProtocolError, RegistrationError
from connector.protocol.ports import Buffer, Headers, ResetCode, ResponseSource
from connector.transport.bridge import MAX_MESSAGE, SocketBridge
from connector.transport.rpc import ABORT_SHUTDOWN, ConnectionOptions, RegistrationClient, load_schema
from connector.wire.capnp import frame_message
from connector.wire.token import Token
from tests.support.aio import run, until
from tests.support.vectors import vector

Loop = Callable[[], asyncio.AbstractEventLoop] | None
both_loops = pytest.mark.parametrize(
    "loop", [pytest.param(None, id="asyncio"), pytest.param(uvloop.new_event_loop, id="uvloop")]
)


class Port:
    """Records what the bridge does to its stream."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.data = bytearray()
        self.credit = 0

    def respond(self, status: int, headers: Headers, source: ResponseSource = ResponseSource.ORIGIN) -> None:
        self.calls.append(f"respond {status}")

    def write(self, data: Buffer) -> None:
        self.data += data

    def write_eof(self, trailers: Headers = ()) -> None:
        self.calls.append("eof")

    def reset(self, code: ResetCode) -> None:
        self.calls.append(f"reset {code.name}")

    def stop_reading(self) -> None:
        self.calls.append("stop")

    def consumed(self, n: int) -> None:
        self.credit += n


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def bridged(body: Callable[[SocketBridge, Port, socket.socket], Coroutine[Any, Any, None]], loop: Loop) -> None:
    async def main() -> None:
        before = open_descriptors()
        port = Port()
        bridge = SocketBridge(port, loop=asyncio.get_running_loop())
        far = bridge.take_socket()
        try:
            await body(bridge, port, far)
        finally:
            bridge.close()
            far.close()
        await bridge.ended
        assert open_descriptors() == before

    run(main(), loop_factory=loop)


BIG = frame_message(bytes(range(256)) * 900)  # 225 KiB, below MAX_MESSAGE


@both_loops
def test_to_the_far_end_with_backpressure(loop: Loop) -> None:
    async def body(bridge: SocketBridge, port: Port, far: socket.socket) -> None:
        for _ in range(4):
            bridge.on_data(BIG)
        bridge.on_eof()
        assert port.credit < 4 * len(BIG)  # the socket's buffer is full, the rest is not credited
        received = bytearray()
        while data := await asyncio.get_running_loop().sock_recv(far, 65536):
            received += data
        assert received == BIG * 4
        assert port.credit == len(received)

    bridged(body, loop)


@both_loops
def test_from_the_far_end_while_paused(loop: Loop) -> None:
    async def body(bridge: SocketBridge, port: Port, far: socket.socket) -> None:
        bridge.pause_writing()
        far.sendall(b"x" * 1000)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not port.data
        bridge.resume_writing()
        await until(lambda: len(port.data) == 1000)
        assert port.calls == ["respond 200"]
        far.sendall(b"y" * 1000)
        far.close()
        await bridge.ended
        assert port.data == b"x" * 1000 + b"y" * 1000
        assert port.calls == ["respond 200", "eof", "stop"]

    bridged(body, loop)


@both_loops
def test_farewell_only_between_messages(loop: Loop) -> None:
    async def body(bridge: SocketBridge, port: Port, far: socket.socket) -> None:
        bridge.farewell = ABORT_SHUTDOWN
        far.sendall(vector("rpc_bootstrap_q0"))
        bridge.close()  # takes along what the far end wrote
        assert bytes(port.data) == vector("rpc_bootstrap_q0") + ABORT_SHUTDOWN

    bridged(body, loop)

    async def cut(bridge: SocketBridge, port: Port, far: socket.socket) -> None:
        bridge.farewell = ABORT_SHUTDOWN
        far.sendall(vector("rpc_bootstrap_q0")[:-1])
        far.close()
        await bridge.ended
        assert bytes(port.data) == vector("rpc_bootstrap_q0")[:-1]

    bridged(cut, loop)


@both_loops
def test_reset_shows_as_the_end(loop: Loop) -> None:
    async def body(bridge: SocketBridge, port: Port, far: socket.socket) -> None:
        error = ProtocolError("gone")
        bridge.on_reset(error)
        assert await asyncio.get_running_loop().sock_recv(far, 10) == b""
        assert bridge.error is error
        far.send(b"nobody hears this")
        bridge.close()
        assert port.calls == ["stop"]
        bridge.on_data(b"late")

    bridged(body, loop)


@both_loops
def test_garbage_resets_the_stream(loop: Loop) -> None:
    async def body(bridge: SocketBridge, port: Port, far: socket.socket) -> None:
        bridge.on_data(b"<html>")
        assert port.calls == ["reset PROTOCOL", "stop"]
        assert isinstance(bridge.error, ProtocolError)

    bridged(body, loop)


@both_loops
def test_message_above_the_limit(loop: Loop) -> None:
    async def body(bridge: SocketBridge, port: Port, far: socket.socket) -> None:
        bridge.on_data(frame_message(bytes(MAX_MESSAGE))[:8])
        assert port.calls == ["reset PROTOCOL", "stop"]

    bridged(body, loop)


@both_loops
def test_far_end_gone(loop: Loop) -> None:
    async def body(bridge: SocketBridge, port: Port, far: socket.socket) -> None:
        bridge.on_data(BIG)
        bridge.on_data(BIG)
        far.close()
        await bridge.ended
        assert port.credit == 2 * len(BIG)
        bridge.on_data(BIG)
        assert port.credit == 3 * len(BIG)

    bridged(body, loop)


def test_the_socket_is_given_once() -> None:
    async def body(bridge: SocketBridge, port: Port, far: socket.socket) -> None:
        with pytest.raises(RuntimeError, match="taken before"):
            bridge.take_socket()

    bridged(body, None)


NAMES = [
    "rpc_return_bootstrap",
    "rpc_return_registerConnection_details",
    "rpc_return_registerConnection_error",
    "rpc_return_exception",
    "rpc_abort_shutdown",
    "rpc_finish_q0_keep",
    "rpc_call_updateConfiguration_q1",
    "rpc_bootstrap_q0",
]


@both_loops
@pytest.mark.parametrize("seed", range(4))
def test_mutated_answers_end_in_details_or_registration_error(seed: int, loop: Loop) -> None:
    """pycapnp is native code: whatever the edge answers, this process lives on. Longer runs by hand."""
    rng = random.Random(seed)
    options = ConnectionOptions(client_id=uuid.UUID(int=1))

    async def main() -> None:
        async with capnp.kj_loop():
            for _ in range(60):
                messages = [bytearray(vector(NAMES[0])), bytearray(vector(rng.choice(NAMES[1:4])))]
                for _ in range(rng.randint(0, 2)):
                    messages.insert(rng.randint(0, 2), bytearray(vector(rng.choice(NAMES))))
                for message in messages:
                    for _ in range(rng.randint(0, 4)):
                        message[rng.randrange(8, len(message))] = rng.choice(
                            [0, 1, 2, 3, 5, 8, 0xFF, rng.randrange(256)]
                        )
                bridge = SocketBridge(Port(), loop=asyncio.get_running_loop())
                try:
                    async with RegistrationClient(bridge) as client:
                        call = asyncio.ensure_future(
                            client.register(Token("a", b"b", uuid.UUID(int=2)), 0, options, 0.05)
                        )
                        await asyncio.sleep(0)
                        bridge.on_data(b"".join(messages))
                        bridge.on_eof()
                        await call
                except (RegistrationError, EdgeLostError):
                    pass

    load_schema("tunnelrpc")  # keeps its files open from the first use on,
    run(asyncio.sleep(0), loop_factory=loop)  # and uvloop a pipe
    before = open_descriptors()
    run(main(), loop_factory=loop)
    assert open_descriptors() <= before


@both_loops
@pytest.mark.parametrize("turns", range(1, 7))
@pytest.mark.parametrize("garbage", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff" * 50_000], ids=["http", "ones"])
def test_garbage_while_pycapnp_takes_the_socket(garbage: bytes, turns: int, loop: Loop) -> None:
    """The end that the bridge makes of it is held back like data: pycapnp would end the process with it."""

    async def main() -> None:
        async with capnp.kj_loop():
            port = Port()
            bridge = SocketBridge(port, loop=asyncio.get_running_loop(), held=True)

            async def register() -> None:
                async with RegistrationClient(bridge) as client:
                    await client.register(
                        Token("a", b"b", uuid.UUID(int=2)), 0, ConnectionOptions(client_id=uuid.UUID(int=1)), 5
                    )

            call = asyncio.ensure_future(register())
            for _ in range(turns):
                await asyncio.sleep(0)
            assert bridge._far is None
            bridge.on_data(garbage)
            bridge.on_data(b"and more of it")
            with pytest.raises(EdgeLostError, match="no RPC"):
                await call
            await bridge.ended
            assert port.calls[-2:] == ["reset PROTOCOL", "stop"]
            assert port.credit == len(garbage) + len(b"and more of it")

    run(main(), loop_factory=loop)


@both_loops
def test_a_reset_behind_data_loses_nothing(loop: Loop) -> None:
    """The far end went with something unread: the kernel tells that as an error, after what it had written."""

    async def main() -> None:
        port = Port()
        bridge = SocketBridge(port, loop=asyncio.get_running_loop())
        far = bridge.take_socket()
        far.setblocking(False)
        bridge.on_data(frame_message(bytes(8)))
        sent = far.send(bytes(150_000))
        far.close()
        await until(bridge.ended.done)
        assert len(port.data) == sent > 65_536
        assert port.calls == ["respond 200", "eof", "stop"]

    run(main(), loop_factory=loop)
