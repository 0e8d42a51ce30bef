"""Run by test_h2.py: begin a registration that is never answered, then leave the event loop with everything open."""

from __future__ import annotations

import asyncio
import sys
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import capnp
import uvloop

from connector.transport.h2 import dial_h2
from connector.transport.rpc import ConnectionOptions, RegistrationClient
from connector.transport.tls import edge_context
from connector.wire.token import Token
from tests.support.mini_edge import MiniEdge


def no_request(*_: object) -> object:
    raise AssertionError


async def main(directory: Path) -> None:
    async with capnp.kj_loop(), MiniEdge(directory) as edge:
        link = await dial_h2("127.0.0.1", edge.port, context=edge_context(edge.cacert), accept=no_request)
        control = (await edge.accepted()).open_control()

        async def register() -> None:
            async with RegistrationClient(await link.control_stream(5)) as client:
                options = ConnectionOptions(client_id=uuid.uuid4())
                await client.register(Token("a", b"b", uuid.uuid4()), 0, options, 30)

        task = asyncio.create_task(register())
        await control.read(48)
        print("registering", flush=True)
        task.cancel()


with asyncio.Runner(loop_factory=uvloop.new_event_loop if sys.argv[2] == "uvloop" else None) as runner:
    runner.run(main(Path(sys.argv[1])))
