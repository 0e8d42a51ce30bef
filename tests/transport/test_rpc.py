"""Registration over a real link: TLS, HTTP/2 by the h2 library, pycapnp or raw bytes at the other end."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tomllib
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import capnp
import pytest
import uvloop

from connector.errors import (
    ConnectorError,
    DuplicateConnectionError,
    EdgeLostError,
    RegistrationError,
    UnauthorizedError,
)
from connector.transport.h2 import H2Link, dial_h2
from connector.transport.rpc import (
    ABORT_SHUTDOWN,
    ConnectionOptions,
    RegistrationClient,
    address_bytes,
    go_arch,
    load_schema,
)
from connector.transport.tls import edge_context
from connector.wire.token import Token
from tests.support.aio import run, until
from tests.support.mini_edge import EdgeStream, MiniEdge, MiniEdgeConnection, Registrar, RpcServer, accept, refuse
from tests.support.vectors import vector

TOKEN = Token("acc", bytes(range(32)), uuid.UUID("f1e2d3c4-b5a6-4978-8a9b-0c1d2e3f4a5b"))
OPTIONS = ConnectionOptions(
    client_id=uuid.UUID("11223344-5566-4778-899a-abbccddeeff0"),
    features=("allow_remote_config", "serialized_headers"),
    version="1.2.3",
    origin_local_ip="192.168.1.5",
    num_previous_attempts=3,
)
LOOPS = [pytest.param(None, id="asyncio"), pytest.param(uvloop.new_event_loop, id="uvloop")]
Loop = Callable[[], asyncio.AbstractEventLoop] | None


def refuse_all(request: Any, port: Any) -> Any:
    raise AssertionError("no request expected")


class Setup:
    def __init__(self, edge: MiniEdge, link: H2Link, peer: MiniEdgeConnection, control: EdgeStream) -> None:
        self.edge, self.link, self.peer, self.control = edge, link, peer, control


@asynccontextmanager
async def linked(tmp_path: Path) -> AsyncIterator[Setup]:
    async with capnp.kj_loop(), MiniEdge(tmp_path) as edge:
        link = await dial_h2("127.0.0.1", edge.port, context=edge_context(edge.cacert), accept=refuse_all)
        peer = await edge.accepted()
        control = peer.open_control()
        try:
            yield Setup(edge, link, peer, control)
        finally:
            link.abort()
            try:
                await link.wait_closed()
            except Exception:
                pass


def with_link(tmp_path: Path, body: Callable[[Setup], Coroutine[Any, Any, None]], loop: Loop = None) -> None:
    async def main() -> None:
        async with linked(tmp_path) as setup:
            await body(setup)

    run(main(), loop_factory=loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_whole_life(tmp_path: Path, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        registrar = Registrar()
        async with RpcServer(s.control, registrar):
            async with RegistrationClient(await s.link.control_stream(5)) as client:
                details = await client.register(TOKEN, 2, OPTIONS, 5)
                assert str(details.uuid) == "0a1b2c3d-4e5f-4061-8273-8495a6b7c8d9"
                assert details.location == "lis01"
                assert details.remotely_managed
                await client.update_local_configuration(b'{"x":1}', 5)
                await client.unregister(5)
            async with asyncio.timeout(30):
                await s.control.ended.wait()
        assert s.control.reset in {None, 0}  # NO_ERROR: the rest of the request is not wanted
        assert bytes(s.control.data).endswith(ABORT_SHUTDOWN)
        assert s.control.status == 200
        (call,) = registrar.registered
        assert call["auth"] == {"accountTag": "acc", "tunnelSecret": bytes(range(32))}
        assert call["tunnelId"] == TOKEN.tunnel_id.bytes
        assert call["connIndex"] == 2
        assert call["options"] == {
            "client": {
                "clientId": OPTIONS.client_id.bytes,
                "features": ["allow_remote_config", "serialized_headers"],
                "version": "1.2.3",
                "arch": go_arch(),
            },
            "originLocalIp": bytes.fromhex("00000000000000000000ffffc0a80105"),
            "replaceExisting": False,
            "compressionQuality": 0,
            "numPreviousAttempts": 3,
        }
        assert registrar.configurations == [b'{"x":1}']
        assert registrar.unregistered == 1

    with_link(tmp_path, body, loop)


async def _register(
    s: Setup, registrar: Registrar, timeout: float = 5, kind: type[ConnectorError] = RegistrationError
) -> Any:
    async with RpcServer(s.control, registrar):
        with pytest.raises(kind) as caught:
            async with RegistrationClient(await s.link.control_stream(5)) as client:
                await client.register(TOKEN, 0, OPTIONS, timeout)
        async with asyncio.timeout(30):
            await s.control.ended.wait()
    return caught.value


REFUSALS = [
    ("EDUPCONN", 0, True, DuplicateConnectionError, "already connected to this server, trying another address"),
    ("EDUPCONN ", 0, True, RegistrationError, "EDUPCONN "),
    ("Unauthorized: Invalid tunnel secret", 0, False, UnauthorizedError, "Unauthorized: Invalid tunnel secret"),
    ("try later", 5_000_000_000, True, RegistrationError, "try later"),
    ("go away", -7, False, RegistrationError, "go away"),
    ("", 0, False, RegistrationError, "the edge refused the registration and gave no cause"),
]


@pytest.mark.parametrize(("cause", "after", "retry", "kind", "text"), REFUSALS)
def test_refusals(tmp_path: Path, cause: str, after: int, retry: bool, kind: type, text: str) -> None:
    async def body(s: Setup) -> None:
        error = await _register(s, Registrar(refuse(cause, after, retry)))
        assert type(error) is kind
        assert str(error) == text
        assert error.should_retry is retry
        assert error.retry_after == max(after, 0) / 1e9

    with_link(tmp_path, body)


@pytest.mark.parametrize("loop", LOOPS)
def test_rpc_exception(tmp_path: Path, loop: Loop) -> None:
    def answer(result: Any) -> None:
        raise capnp.KjException("boom")

    async def body(s: Setup) -> None:
        error = await _register(s, Registrar(answer))
        assert type(error) is RegistrationError
        assert "rpc exception" in str(error)
        assert "boom" in str(error)

    with_link(tmp_path, body, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_no_answer_in_time(tmp_path: Path, loop: Loop) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    async def body(s: Setup) -> None:
        error = await _register(s, Registrar(lambda result: never()), 0.2, EdgeLostError)
        assert str(error) == "registration: the edge did not answer within 0.2 seconds"

    with_link(tmp_path, body, loop)


def test_wrong_connection_id(tmp_path: Path) -> None:
    def answer(result: Any) -> None:
        accept(result)
        result.connectionDetails.uuid = b"short"

    async def body(s: Setup) -> None:
        assert "5 bytes instead of 16" in str(await _register(s, Registrar(answer)))

    with_link(tmp_path, body)


async def _register_raw(s: Setup, act: Callable[[], None], kind: type[ConnectorError] = RegistrationError) -> Any:
    """Start a registration, `act` when its first bytes are at the edge, return what it raised."""
    async with RegistrationClient(await s.link.control_stream(5)) as client:
        call = asyncio.ensure_future(client.register(TOKEN, 0, OPTIONS, 5))
        await s.control.read(48)
        act()
        with pytest.raises(kind) as caught:
            await call
    return caught.value


RAW: list[tuple[str, bytes, str]] = [
    ("http", b"HTTP/1.1 400 Bad Request\r\n\r\n", "no RPC"),
    ("huge", bytes.fromhex("00000000ffffffff") + b"\0" * 64, "no RPC"),
    ("zeros", b"\0" * 64, "no RPC"),
    ("ones", b"\x01\0\0\0\x01\0\0\0\x01\0\0\0" + b"\xff" * 64, "control stream"),
    ("abort", ABORT_SHUTDOWN, "aborted by remote: rpc: shutdown"),
]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("name", "data", "text"), RAW, ids=[row[0] for row in RAW])
def test_bytes_that_are_no_answer(tmp_path: Path, name: str, data: bytes, text: str, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        kind = RegistrationError if name == "abort" else EdgeLostError
        error = await _register_raw(s, lambda: s.control.send(data, end=name in {"zeros", "ones"}), kind)
        assert text in str(error)

    with_link(tmp_path, body, loop)


def test_recorded_answers(tmp_path: Path) -> None:
    async def body(s: Setup) -> None:
        data = vector("rpc_return_bootstrap") + vector("rpc_return_registerConnection_error")
        error = await _register_raw(s, lambda: s.control.send(data))
        assert (str(error), error.should_retry, error.retry_after) == ("try later", True, 5.0)

    with_link(tmp_path, body)


def test_unknown_discriminant(tmp_path: Path) -> None:
    answer = bytearray(vector("rpc_return_registerConnection_details"))
    answer[0x50] = 7

    async def body(s: Setup) -> None:
        error = await _register_raw(s, lambda: s.control.send(vector("rpc_return_bootstrap") + bytes(answer)))
        assert "does not know" in str(error)

    with_link(tmp_path, body)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("how", ["eof", "reset", "close", "cut"])
def test_stream_ends_before_the_answer(tmp_path: Path, how: str, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        def act() -> None:
            if how == "eof":
                s.control.send(b"", end=True)
            elif how == "reset":
                s.peer.h2.reset_stream(s.control.stream_id)
                s.peer.flush()
            elif how == "close":
                s.peer.close()
            else:
                s.peer.cut()

        error = await _register_raw(s, act, EdgeLostError)
        assert "control stream" in str(error)

    with_link(tmp_path, body, loop)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("how", ["close", "reset"])
def test_an_answer_with_the_end_right_behind_it_is_not_lost(tmp_path: Path, how: str, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        def act() -> None:
            s.control.send(vector("rpc_return_bootstrap") + vector("rpc_return_registerConnection_error"))
            if how == "reset":
                s.peer.h2.reset_stream(s.control.stream_id)
                s.peer.flush()
            else:
                s.peer.close()

        assert str(await _register_raw(s, act)) == "try later"

    with_link(tmp_path, body, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_edge_that_speaks_first_is_heard_once_pycapnp_listens(tmp_path: Path, loop: Loop) -> None:
    async def body(s: Setup) -> None:
        control = await s.link.control_stream(5)
        s.control.send(ABORT_SHUTDOWN)
        await until(lambda: control._backlog, what="the early message is here")
        with pytest.raises(RegistrationError, match="aborted by remote"):
            async with RegistrationClient(control) as client:
                await client.register(TOKEN, 0, OPTIONS, 5)

    with_link(tmp_path, body, loop)


def test_second_control_stream_is_refused(tmp_path: Path) -> None:
    async def body(s: Setup) -> None:
        await s.link.control_stream(5)
        second = s.peer.open_control()
        async with asyncio.timeout(30):
            await second.ended.wait()
        assert second.reset == 7  # REFUSED_STREAM

    with_link(tmp_path, body)


def test_no_control_stream(tmp_path: Path) -> None:
    async def main() -> None:
        async with MiniEdge(tmp_path) as edge:
            link = await dial_h2("127.0.0.1", edge.port, context=edge_context(edge.cacert), accept=refuse_all)
            with pytest.raises(EdgeLostError, match="no control stream within"):
                await link.control_stream(0.05)
            link.close()
            await link.wait_closed()

    run(main())


def test_call_after_close(tmp_path: Path) -> None:
    async def body(s: Setup) -> None:
        async with RpcServer(s.control, Registrar()):
            client = RegistrationClient(await s.link.control_stream(5))
            async with client:
                await client.register(TOKEN, 0, OPTIONS, 5)
            await client.close()
            with pytest.raises(RegistrationError, match="closed"):
                await client.unregister(1)

    with_link(tmp_path, body)


def test_cancelled_call(tmp_path: Path) -> None:
    async def body(s: Setup) -> None:
        async def work() -> None:
            async with RegistrationClient(await s.link.control_stream(5)) as client:
                await client.register(TOKEN, 0, OPTIONS, 5)

        task = asyncio.create_task(work())
        await s.control.read(48)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(30):
            await s.control.ended.wait()

    with_link(tmp_path, body)


def test_address_bytes() -> None:
    assert address_bytes("192.168.1.5") == bytes.fromhex("00000000000000000000ffffc0a80105")
    assert address_bytes("2001:db8::1") == bytes.fromhex("20010db8000000000000000000000001")
    for text in (None, "", "fe80::1%eth0", "localhost"):
        assert address_bytes(text) is None


def test_go_arch() -> None:
    assert go_arch("linux", "x86_64") == "linux_amd64"
    assert go_arch("linux", "aarch64") == "linux_arm64"
    assert go_arch("linux", "armv7l") == "linux_arm"
    assert go_arch("darwin", "arm64") == "darwin_arm64"
    assert go_arch("win32", "AMD64") == "windows_amd64"


def test_schemas_of_an_installed_package(tmp_path: Path) -> None:
    """The layout that pyproject.toml gives a wheel: no proto/ beside the package, copies inside it."""
    root = Path(__file__).parents[2]
    shutil.copytree(root / "connector", tmp_path / "connector", ignore=shutil.ignore_patterns("__pycache__"))
    project = tomllib.loads((root / "pyproject.toml").read_text())
    for source, target in project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items():
        (tmp_path / target).parent.mkdir(exist_ok=True)
        shutil.copy(root / source, tmp_path / target)
    for compiled in root.glob("connector__mypyc*"):
        shutil.copy(compiled, tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from connector.transport.rpc import load_schema;"
        "print(load_schema('tunnelrpc').__file__, load_schema('quic_metadata.capnp').__file__)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    files = done.stdout.split()
    assert [Path(file).parent for file in files] == [tmp_path / "connector" / "_schemas"] * 2


def test_unknown_schema() -> None:
    with pytest.raises(FileNotFoundError, match=r"no schema none\.capnp"):
        load_schema("none")
