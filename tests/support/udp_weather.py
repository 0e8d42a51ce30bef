"""A UDP proxy on loopback that loses, delays and reorders datagrams, and can change its own ports (NAT rebinding).

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
        self.starts: set[bytes] = set()
        """Source connection IDs of the Initial packets that clients sent: one for each attempt to connect."""
        self.port = port
        self._edge = ("127.0.0.1", edge_port)
        self._random = random.Random(seed)
        self._inside: socket.socket | None = None
        self._outside: dict[tuple[str, int], socket.socket] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> UdpWeather:
        self._loop = asyncio.get_running_loop()
        self._inside = _bound(self.port)
        self.port = self._inside.getsockname()[1]
        self._loop.add_reader(self._inside, self._from_clients)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._loop is not None
        assert self._inside is not None
        for sock in (self._inside, *self._outside.values()):
            self._loop.remove_reader(sock)
            sock.close()
        self._inside = None
        self._outside.clear()

    def rebind(self) -> None:
        """The edge sees other ports from now on."""
        assert self._loop is not None
        for client, old in list(self._outside.items()):
            self._open(client)
            self._loop.remove_reader(old)
            old.close()

    def _open(self, client: tuple[str, int]) -> socket.socket:
        assert self._loop is not None
        sock = self._outside[client] = _bound()
        self._loop.add_reader(sock, self._from_edge, sock, client)
        return sock

    def _from_clients(self) -> None:
        assert self._inside is not None
        for _ in range(64):
            try:
                data, client = self._inside.recvfrom(65_536)
            except (BlockingIOError, ConnectionError):
                return
            if data[0] & 0xF0 == 0xC0:  # an Initial packet of QUIC version 1
                at = 6 + data[5]
                self.starts.add(data[at + 1 : at + 1 + data[at]])
            self._forward(data, client, True)

    def _from_edge(self, sock: socket.socket, client: tuple[str, int]) -> None:
        for _ in range(64):
            try:
                data = sock.recv(65_536)
            except (BlockingIOError, ConnectionError):
                return
            self._forward(data, client, False)

    def _forward(self, data: bytes, client: tuple[str, int], outwards: bool) -> None:
        if self.blocked or len(data) > self.mtu or self._random.random() < self.loss:
            self.lost += 1
            return
        self.passed += 1
        wait = self.delay + self._random.random() * self.jitter
        if wait:
            assert self._loop is not None
            self._loop.call_later(wait, self._send, data, client, outwards)
        else:
            self._send(data, client, outwards)

    def _send(self, data: bytes, client: tuple[str, int], outwards: bool) -> None:
        if self._inside is None:
            return
        try:
            if outwards:
                (self._outside.get(client) or self._open(client)).sendto(data, self._edge)
            else:
                self._inside.sendto(data, client)
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
