"""A UDP proxy on loopback that loses, delays and reorders datagrams, and can change its own port (NAT rebinding).

The kernel here has no netem. Choices come from a seeded generator, so that a run can be repeated.
"""

from __future__ import annotations

import asyncio
import random
import socket


class UdpWeather:
    """`async with UdpWeather(edge_port, loss=0.01) as weather:` dial `weather.port` instead of the edge's."""

    def __init__(
        self,
        edge_port: int,
        *,
        loss: float = 0.0,
        delay: float = 0.0,
        jitter: float = 0.0,
        mtu: int = 65_536,
        seed: int = 1,
        port: int = 0,
    ) -> None:
        self.loss = loss
        self.delay = delay
        self.jitter = jitter
        self.mtu = mtu
        self.blocked = False
        self.passed = 0
        self.lost = 0
        self.port = port
        self._edge = ("127.0.0.1", edge_port)
        self._random = random.Random(seed)
        self._client: tuple[str, int] | None = None
        self._inside: socket.socket | None = None
        self._outside: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> UdpWeather:
        self._loop = asyncio.get_running_loop()
        self._inside = _bound(self.port)
        self.port = self._inside.getsockname()[1]
        self._loop.add_reader(self._inside, self._from_client)
        self.rebind()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._loop is not None
        for sock in (self._inside, self._outside):
            assert sock is not None
            self._loop.remove_reader(sock)
            sock.close()
        self._inside = self._outside = None

    def rebind(self) -> None:
        """The edge sees another port from now on."""
        assert self._loop is not None
        old, self._outside = self._outside, _bound()
        self._loop.add_reader(self._outside, self._from_edge)
        if old is not None:
            self._loop.remove_reader(old)
            old.close()

    def _from_client(self) -> None:
        assert self._inside is not None
        for _ in range(64):
            try:
                data, self._client = self._inside.recvfrom(65_536)
            except (BlockingIOError, ConnectionError):
                return
            self._forward(data, True)

    def _from_edge(self) -> None:
        assert self._outside is not None
        for _ in range(64):
            try:
                data = self._outside.recv(65_536)
            except (BlockingIOError, ConnectionError):
                return
            self._forward(data, False)

    def _forward(self, data: bytes, outwards: bool) -> None:
        if self.blocked or len(data) > self.mtu or self._random.random() < self.loss:
            self.lost += 1
            return
        self.passed += 1
        wait = self.delay + self._random.random() * self.jitter
        if wait:
            assert self._loop is not None
            self._loop.call_later(wait, self._send, data, outwards)
        else:
            self._send(data, outwards)

    def _send(self, data: bytes, outwards: bool) -> None:
        sock = self._outside if outwards else self._inside
        if sock is None or (not outwards and self._client is None):
            return
        try:
            sock.sendto(data, self._edge if outwards else self._client)
        except (BlockingIOError, ConnectionError):
            self.lost += 1


def _bound(port: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.bind(("127.0.0.1", port))
    except OSError:
        sock.close()
        raise
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sock.setblocking(False)
    return sock
