"""Runs inside a network namespace of its own (see test_private_lan.py): a private LAN, and pings and UDP through it.

    this namespace  10.9.0.1, fd09::1  <-- veth -->  10.9.0.2, fd09::2  the LAN's, with a UDP echo in it

The dev edge is in this process, the connector a child; `argv` is the datagram version and the connector's command,
with {edge}, {ca} and {token_file} to be filled in. Prints one line per thing that holds; exit status 0 when all do.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import capnp

from connector.devedge.datagrams import DatagramDesk, UdpFlow, echo_request
from connector.devedge.forward import quic_desk
from connector.devedge.server import DevEdge, Settings
from tests.support.aio import until
from tests.support.processes import Child

ECHO = """
import socket
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", 5353))
    print("ready", flush=True)
    while True:
        data, address = sock.recvfrom(65536)
        sock.sendto(data.upper(), address)
"""

DEVICE4, DEVICE6 = "100.96.0.7", "fd77::7"
"""The device that pings: an address that exists nowhere here."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=20)


def make_lan() -> subprocess.Popen[bytes]:
    """Make the LAN; its process runs the echo, and the LAN is gone when that ends."""
    Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 0")
    ip("link", "set", "lo", "up")
    ip("link", "add", "here", "type", "veth", "peer", "name", "there")
    setup = "read line; ip link set lo up; ip addr add 10.9.0.2/24 dev there; ip addr add fd09::2/64 dev there nodad;" \
        " ip link set there up; exec \"$0\" -c \"$1\""  # fmt: skip
    lan = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", setup, sys.executable, ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert lan.stdin is not None
    assert lan.stdout is not None
    here = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{lan.pid}/ns/net") == here:  # unshare has not done it yet
        os.sched_yield()
    ip("link", "set", "there", "netns", str(lan.pid))
    ip("addr", "add", "10.9.0.1/24", "dev", "here")
    ip("addr", "add", "fd09::1/64", "dev", "here", "nodad")
    ip("link", "set", "here", "up")
    ip("route", "add", "default", "via", "10.9.0.2")
    lan.stdin.write(b"go\n")
    lan.stdin.flush()
    assert lan.stdout.readline() == b"ready\n"
    return lan


async def pings(desk: DatagramDesk) -> None:
    for device, host, here, echoed, exceeded in (
        (DEVICE4, "10.9.0.2", "10.9.0.1", 0, 11),
        (DEVICE6, "fd09::2", "fd09::1", 129, 3),
    ):
        for size in (0, 56, 1000):
            pong = await desk.ping(device, host, identifier=77, data=b"d" * size, limit=30)
            assert (pong.source, pong.kind, pong.ttl, pong.data) == (host, echoed, 255, b"d" * size), pong
        print("echo", host, flush=True)
        for identifier in range(20):  # one flow each
            assert (await desk.ping(device, host, identifier=1000 + identifier, limit=30)).kind == echoed
        pong = await desk.ping(device, host, identifier=78, ttl=1, data=b"trace", limit=30)
        assert (pong.kind, pong.ttl) == (exceeded, 255)
        assert pong.source == here or ":" in pong.source, pong
        print("exceeded", pong.source, flush=True)
    for nonsense in (b"", b"\x45", echo_request(b"\x0a\x09\0\x02" * 1, b"\x0a\x09\0\x02", 1, 1, 64, b"")[:-3]):
        desk.send_packet(nonsense)
    try:
        await desk.ping(DEVICE4, "10.9.0.77", limit=2)
    except TimeoutError:
        print("silence 10.9.0.77", flush=True)
    assert (await desk.ping(DEVICE4, "10.9.0.2", limit=30)).kind == 0


async def traced(desk: DatagramDesk) -> None:
    """A traced ping of version 2 brings two packets of spans with the same identity: of the request, of the reply."""
    identity = bytes.fromhex("0123456789abcdeffedcba9876543210 0011223344556677 01")
    spans: list[bytes] = []
    desk.link.datagram_listeners.append(lambda data: spans.append(data) if data[-1] == 3 else None)
    packet = echo_request(b"\x64\x60\0\7", b"\x0a\x09\0\2", 4242, 1, 64, b"traced")
    for _ in range(30):
        assert desk.link.send_datagram(packet + identity + b"\x02")
        try:
            await until(lambda: any(b"icmp-echo-reply" in data for data in spans), limit=1)
        except AssertionError:
            continue
        break
    assert any(b"icmp-echo-request" in data for data in spans), spans
    assert any(b"icmp-echo-reply" in data for data in spans), spans
    assert all(data[-26:-1] == identity for data in spans)
    print("traced", flush=True)


async def udp(desk: DatagramDesk) -> None:
    for host in ("10.9.0.2", "fd09::2"):
        came: list[bytes] = []
        flow = await desk.open_udp((host, 5353), came.append)
        await echoed(flow, came, b"hello")
        await echoed(flow, came, b"x" * 1000)
        await flow.close()
        print("udp", host, flush=True)


async def echoed(flow: UdpFlow, came: list[bytes], payload: bytes) -> None:
    for _ in range(30):
        assert flow.send(payload)
        try:
            await until(lambda: payload.upper() in came, limit=1)
        except AssertionError:
            continue
        return
    raise AssertionError(f"no answer to {len(payload)} bytes")


async def main(state: Path, version: int, command: list[str]) -> None:
    settings = Settings(state, tunnel_names=["test"], ingress=["http_status:418"])
    async with capnp.kj_loop(), DevEdge(settings) as edge:
        token = state / "token"
        token.write_text(edge.token())
        host, port = edge.edge_address
        known = {"{edge}": f"{host}:{port}", "{ca}": str(edge.ca_file), "{token_file}": str(token)}
        applied = asyncio.ensure_future(edge.wait_event("configuration", limit=60))
        with Child(*(known.get(word, word) for word in command)) as child:
            try:
                await applied
                desk = quic_desk(edge)
                assert desk.version == version
                await pings(desk)
                await udp(desk)
                if version == 2:
                    await traced(desk)
            except BaseException:
                print(child.text, file=sys.stderr, flush=True)
                raise
            await asyncio.get_running_loop().run_in_executor(None, child.__exit__, None, None, None)


if __name__ == "__main__":
    lan = make_lan()
    try:
        asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
    finally:
        lan.kill()
        lan.wait()
