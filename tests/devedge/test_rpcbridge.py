"""Bytes of a connector that are no RPC, or that pycapnp would die of, before they reach pycapnp."""

from __future__ import annotations

import asyncio

import capnp
from hypothesis import given, settings
from hypothesis import strategies as st

from connector.devedge.rpcbridge import RpcBridge
from tests.support.aio import run
from tests.support.mini_edge import Registrar
from tests.support.vectors import vector


class Stream:
    """What the bridge asks of a stream."""

    def __init__(self) -> None:
        self.credited = 0
        self.resets = 0

    def consumed(self, n: int) -> None:
        self.credited += n

    def reset(self) -> None:
        self.resets += 1

    def write(self, data: bytes) -> None:
        pass

    def write_eof(self) -> None:
        pass


def bridge() -> tuple[RpcBridge, Stream]:
    made, stream = RpcBridge(), Stream()
    made.attach(stream)  # type: ignore[arg-type]
    return made, stream


@settings(deadline=None)
@given(st.lists(st.binary(max_size=64), max_size=8))
def test_any_bytes_reset_the_stream_or_wait(pieces: list[bytes]) -> None:
    made, stream = bridge()
    for piece in pieces:
        made.on_data(piece)
    assert stream.credited == sum(map(len, pieces))
    assert len(made._early) + made._messages.held <= stream.credited


def test_a_message_that_is_too_long_resets_the_stream() -> None:
    made, stream = bridge()
    made.on_data(bytes.fromhex("00000000ffffffff"))
    assert stream.resets == 1


def test_an_exception_that_is_not_text_does_not_end_the_process() -> None:
    hostile = bytearray(vector("rpc_abort_shutdown"))
    at = hostile.index(b"rpc: shutdown")
    hostile[at : at + 4] = b"\xff\xfe\xff\xfe"

    async def main() -> None:
        async with capnp.kj_loop():
            made, stream = bridge()
            io = await made.open()
            server = capnp.TwoPartyServer(io, bootstrap=Registrar())
            made.on_data(bytes(hostile))
            assert bytes(made._early).count(b"???? shutdown") == 1
            await made.serve()
            async with asyncio.timeout(30):
                await server.on_disconnect()
            server.close()
            made.close()
            assert not stream.resets

    run(main())
