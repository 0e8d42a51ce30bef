"""Real origins on loopback for end-to-end tests: an aiohttp server in a thread of its own, and a real Mosquitto."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import WSMsgType, web

from tests.support.processes import MOSQUITTO

CHUNK = bytes(range(256)) * 256


async def _echo(request: web.Request) -> web.Response:
    body = await request.read()
    lines = {
        "method": request.method,
        "target": request.raw_path,
        "headers": [[k, v] for k, v in request.headers.items()],
        "size": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    return web.json_response(lines)


async def _upload(request: web.Request) -> web.Response:
    digest, size = hashlib.sha256(), 0
    async for chunk in request.content.iter_any():
        digest.update(chunk)
        size += len(chunk)
    return web.json_response({"size": size, "sha256": digest.hexdigest()})


async def _download(request: web.Request) -> web.StreamResponse:
    left = int(request.query["size"])
    response = web.StreamResponse()
    if request.query.get("length"):
        response.content_length = left
    await response.prepare(request)
    while left > 0:
        await response.write(CHUNK[:left])
        left -= len(CHUNK)
    await response.write_eof()
    return response


async def _websocket(request: web.Request) -> web.WebSocketResponse:
    socket_ = web.WebSocketResponse(protocols=("mqtt", "echo"))
    await socket_.prepare(request)
    async for message in socket_:
        if message.type is WSMsgType.TEXT:
            await socket_.send_str(message.data)
        elif message.type is WSMsgType.BINARY:
            await socket_.send_bytes(message.data)
    return socket_


async def _stall(_request: web.Request) -> web.Response:
    await asyncio.Event().wait()
    return web.Response()


def application() -> web.Application:
    app = web.Application(client_max_size=1 << 30)
    app.router.add_get("/download", _download)
    app.router.add_route("*", "/upload", _upload)
    app.router.add_get("/ws", _websocket)
    app.router.add_get("/stall", _stall)
    app.router.add_route("*", "/{path:.*}", _echo)
    return app


@contextmanager
def http_origin(make: Callable[[], web.Application] = application) -> Iterator[int]:
    """Serve an aiohttp application from another thread; yields the port."""
    ready: threading.Event = threading.Event()
    state: dict[str, object] = {}

    async def serve() -> None:
        stop = asyncio.Event()
        runner = web.AppRunner(make(), access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        state["port"] = runner.addresses[0][1]
        state["loop"] = asyncio.get_running_loop()
        state["stop"] = stop
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(30), "the origin did not start"
    try:
        yield int(str(state["port"]))
    finally:
        loop, stop = state["loop"], state["stop"]
        assert isinstance(loop, asyncio.AbstractEventLoop)
        assert isinstance(stop, asyncio.Event)
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


def free_port() -> int:
    """A port that is free for TCP and UDP, from below the range that the system gives out by itself.

    So nobody who asks for port 0 meanwhile gets it.
    """
    while True:
        port = random.randrange(21_000, 32_000)
        if port in _handed_out:
            continue
        try:
            with (
                socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
            ):
                tcp.bind(("127.0.0.1", port))
                udp.bind(("127.0.0.1", port))
        except OSError:
            continue
        _handed_out.add(port)
        return port


_handed_out: set[int] = set()


@contextmanager
def raw_origin(answer: bytes | None, *, close: bool = True) -> Iterator[int]:
    """Answers the first bytes of a connection with `answer` (None: with nothing), then closes or waits."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def serve() -> None:
        held = []
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                break
            try:
                peer.recv(65536)
                if answer is not None:
                    peer.sendall(answer)
            except OSError:
                pass
            if close:
                peer.close()
            else:
                held.append(peer)
        for peer in held:
            peer.close()
        done.set()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


@contextmanager
def mosquitto(directory: Path, password: str = "p") -> Iterator[int]:
    """A real Mosquitto with a WebSocket listener on loopback and one user, `u`; yields the port."""
    assert MOSQUITTO is not None
    port = free_port()
    passwords = directory / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(passwords), "u", password], check=True, capture_output=True)
    passwords.chmod(0o644)
    config = directory / "mosquitto.conf"
    # Mosquitto 2.0 counts only plain listeners as a start, so there is one; and libwebsockets minds the address
    # only with IPv6 off.
    config.write_text(
        f"listener {free_port()} 127.0.0.1\nlistener {port} 127.0.0.1\nprotocol websockets\nsocket_domain ipv4\n"
        f"allow_anonymous false\npassword_file {passwords}\nuser root\n"
    )
    process = subprocess.Popen([MOSQUITTO, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, "mosquitto ended at start"
                threading.Event().wait(0.01)
        yield port
    finally:
        process.terminate()
        process.wait(30)
