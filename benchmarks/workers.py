"""Two workers against one, on two cores: `python -m benchmarks.workers`.

Owns: an edge whose load costs next to nothing, the connectors, the comparison.
In: a machine with two cores that has nothing else to do. Out: a table on stdout; `--json FILE`.
Never: counts work that the connector has not done.

*Strategy*: load and connector share the two cores, so a usual load generator would take half of what there is to gain.
This one is made of ready bytes: a request is one of 256 visitors' blocks with a `cf-ray` of its own, an answer is a
frame header. The rule answers `http_status:204`, so that no origin works beside the connector. The load's CPU time is
measured as well: if a request costs the connector c and the load l, one worker can do 1/c and two can do 2/(c+l) a
second on two cores; that limit is printed beside what was measured.
Both connectors are up all the time and take turns, so that the machine's moods hit both.
"""

# ruff: noqa: D102  (callbacks of one interface each, described there)
from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import capnp
import hpack
import uvloop

from benchmarks.fields import UPGRADE, request_fields
from benchmarks.process import cpu_of, family, memory_of, start, stop
from connector.devedge.authority import EDGE_LEAF_NAMES, Authority, StateDir
from connector.devedge.registrar import ControlStream, Grant, Registration
from connector.wire.h2_frames import (
    FLAG_END_HEADERS,
    FLAG_END_STREAM,
    FRAME_HEADER,
    HEADERS,
    PING,
    PREFACE,
    SETTINGS,
    SETTINGS_ACK,
    WINDOW_UPDATE,
    Setting,
    encode_frame,
    encode_settings,
    encode_window_update,
)
from connector.wire.token import Token, encode_token

CONNECTIONS: Final = 4
IN_FLIGHT: Final = 128
"""Requests in flight on each connection."""

VISITORS: Final = 256
"""Whose requests they are."""

WARM_UP: Final = 0.3
GOAL: Final = 1.8

_pack = FRAME_HEADER.pack
_unpack = FRAME_HEADER.unpack_from
_FIELDS: Final = request_fields(b"GET", b"/")


def visitors(encoder: hpack.Encoder) -> list[bytes]:
    """Give the header block of one request of each visitor.

    No two have the same path, address, browser and cookie: these are literals, as an edge sends what will not come
    again. What all have in common is in the dynamic table from the first block on, which has to be sent first.
    """
    blocks = []
    for number in range(VISITORS + 1):
        mine = {
            b":path": f"/items/{number * 7919 % 10_000}?page={number % 9}&from=list".encode(),
            b"user-agent": f"Mozilla/5.0 (X11; Linux x86_64; rv:{90 + number % 50}.0) Gecko/20100101 "
            f"Firefox/{90 + number % 50}.1".encode(),
            b"cf-connecting-ip": f"198.51.100.{number % 256}".encode(),
            b"x-forwarded-for": f"198.51.100.{number % 256}".encode(),
        }
        fields = [(name, mine.get(name, value)) for name, value in _FIELDS]
        fields.append((b"cookie", f"session={hashlib.sha256(str(number).encode()).hexdigest()}; theme=dark".encode()))
        fields += [
            (b"accept-language", f"en-GB,en;q=0.{number % 10},pt;q=0.5".encode()),
            (b"if-none-match", f'"{hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()}"'.encode()),
            (b"x-request-id", str(uuid.UUID(int=number << 64 | number)).encode()),
            (b"sec-ch-ua", f'"Chromium";v="{100 + number % 50}", "Not=A?Brand";v="{number % 99}"'.encode()),
        ]
        fields.append((b"referer", f"https://app.example.com/list?page={number % 9}".encode()))
        common = set(_FIELDS)
        marked = [field if field in common else hpack.NeverIndexedHeaderTuple(*field) for field in fields]
        blocks.append(encoder.encode(marked))
    return blocks


class Control:
    """The control stream as the RPC server sees a stream."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._link.write(_pack(len(data) << 8, 0, 1) + bytes(data))

    def write_eof(self, trailers: object = ()) -> None:
        self._link.write(_pack(0, FLAG_END_STREAM, 1))

    def consumed(self, size: int) -> None:
        """The window is large."""

    def reset(self) -> None:
        self._link.close()


class Link(asyncio.Protocol):
    """One connection of a connector; implements the dev edge's Desk too."""

    fault: str | None = None

    def __init__(self, edge: Edge) -> None:
        self.edge = edge
        self.transport: asyncio.Transport | None = None
        self.tunnel = ""
        self.units = 0
        self._ids = itertools.count(3, 2)
        self._rays = itertools.count(0x8F3A_0000_0000_0000)
        self._rest = b""
        self._control = ControlStream(self, self.close)
        self._encoder = hpack.Encoder()
        self._blocks: list[bytes] = []
        self._visitor = 0
        self._wanted = False

    # -- work

    def begin(self) -> None:
        """Begin to load the connection."""
        self._wanted = True
        if not self._blocks:
            first, *self._blocks = visitors(self._encoder)
            flags = FLAG_END_HEADERS | FLAG_END_STREAM
            self.write(_pack(len(first) << 8 | HEADERS, flags, next(self._ids)) + first)
        self._ask(IN_FLIGHT)

    def pause(self) -> None:
        """Begin nothing new."""
        self._wanted = False

    def _ask(self, count: int) -> None:
        """Make requests of one visitor after the other."""
        blocks, ids, rays, visitor = self._blocks, self._ids, self._rays, self._visitor
        out: list[bytes] = []
        for _ in range(count):
            block = blocks[visitor]
            visitor = (visitor + 1) % VISITORS
            out += (
                _pack(len(block) + 29 << 8 | HEADERS, FLAG_END_HEADERS | FLAG_END_STREAM, next(ids)),
                block,
                b"\0\x06cf-ray\x14%x-LIS" % next(rays),
            )
        self._visitor = visitor
        self.write(b"".join(out))

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        block = self._encoder.encode([
            (b":method", b"POST"), (b":scheme", b"https"), (b":authority", b"x"), (b":path", b"/control"),
            (UPGRADE, b"control-stream"),
        ])  # fmt: skip
        settings = encode_settings([(Setting.ENABLE_PUSH, 0), (Setting.INITIAL_WINDOW_SIZE, 1 << 20)])
        self.write(
            PREFACE
            + settings
            + encode_window_update(0, (1 << 30) - 65_535)
            + _pack(len(block) << 8 | HEADERS, FLAG_END_HEADERS, 1)
            + block
        )
        self._control.start(Control(self))

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._control.on_reset(None)
        self.edge.lost(self)

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        end, pos, ended = len(data), 0, 0
        while end - pos >= 9:
            word, flags, identity = _unpack(data, pos)
            stop = pos + 9 + (word >> 8)
            if stop > end:
                break
            if identity > 1 and word & 0xFF < WINDOW_UPDATE:
                if flags & FLAG_END_STREAM:
                    ended += 1
            else:
                self._other(word & 0xFF, flags, identity, data[pos + 9 : stop])
            pos = stop
        self._rest = data[pos:] if pos < end else b""
        if ended:
            self.units += ended
            if self._wanted:
                self._ask(ended)

    def _other(self, kind: int, flags: int, identity: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags:
            self.write(SETTINGS_ACK)
        elif kind == PING and not flags:
            self.write(encode_frame(PING, 1, 0, payload))
        elif identity == 1 and kind == 0:
            if flags & FLAG_END_STREAM:
                self._control.on_eof(())
            elif payload:
                self._control.on_data(payload)

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def close(self) -> None:
        """End the connection."""
        if self.transport is not None:
            self.transport.close()

    # -- Desk

    def register(self, registration: Registration) -> Grant:
        self.tunnel = str(registration.tunnel)
        self.edge.registered(self)
        return Grant(uuid.uuid4(), "lis01", remotely_managed=False)

    def unregister(self) -> None:
        """It leaves; the link ends soon."""

    def local_configuration(self, config: bytes) -> None:
        """Of no interest."""

    def control_ended(self) -> None:
        self.close()


class Run(NamedTuple):
    """One measured stretch."""

    rate: float
    """Requests a second."""
    cpu: float
    """Seconds of the connector's CPU time per request."""
    load: float
    """The same of the load."""
    cores: float
    """Cores that the connector kept busy."""
    others: float
    """Cores that anybody else kept busy."""


class Edge:
    """The edge, and the load."""

    def __init__(self) -> None:
        self.links: dict[str, list[Link]] = {}
        self.changed = asyncio.Event()

    def registered(self, link: Link) -> None:
        """A connection is there."""
        self.links.setdefault(link.tunnel, []).append(link)
        self.changed.set()

    def lost(self, link: Link) -> None:
        """A connection is gone."""
        if link in self.links.get(link.tunnel, ()):
            self.links[link.tunnel].remove(link)

    async def connected(self, tunnel: str) -> None:
        """Wait until all connections are registered."""
        async with asyncio.timeout(30):
            while len(self.links.get(tunnel, ())) < CONNECTIONS:
                self.changed.clear()
                await self.changed.wait()

    async def measure(self, tunnel: str, pid: int, seconds: float) -> Run:
        """Load one connector for so long."""
        links = self.links[tunnel]
        for link in links:
            link.begin()
        await asyncio.sleep(WARM_UP)
        pids = family(pid)
        units, began = sum(link.units for link in links), time.perf_counter()
        cpu, own, busy = cpu_of(pids).total, time.process_time(), busy_cores()
        await asyncio.sleep(seconds)
        units = sum(link.units for link in links) - units
        took = time.perf_counter() - began
        cpu, own, busy = cpu_of(pids).total - cpu, time.process_time() - own, busy_cores() - busy
        for link in links:
            link.pause()
        await asyncio.sleep(WARM_UP)
        if not units:
            raise RuntimeError("the connector did nothing")
        return Run(units / took, cpu / units, own / units, cpu / took, max(0.0, (busy - cpu - own) / took))


def busy_cores() -> float:
    """Seconds of CPU time of the whole machine since it started."""
    fields = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))
    return float((sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK"))


async def compare(rounds: int, seconds: float) -> dict[str, Any]:
    """Run both connectors in turns; give the figures."""
    edge = Edge()
    connectors: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
    runs: dict[int, list[Run]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="bench-workers-") as directory:
        root = Path(directory)
        authority = Authority.open(StateDir(root / "edge"))
        server = await asyncio.get_running_loop().create_server(
            lambda: Link(edge), "127.0.0.1", 0, ssl=authority.server_context(EDGE_LEAF_NAMES)
        )
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            for workers in runs:
                connectors[workers] = start_connector(workers, root, address, str(authority.ca_file))
                await edge.connected(connectors[workers][0])
            for number in range(rounds):
                for workers in (1, 2) if number % 2 == 0 else (2, 1):
                    tunnel, process = connectors[workers]
                    run = await edge.measure(tunnel, process.pid, seconds)
                    runs[workers].append(run)
                    print(
                        f"round {number + 1}/{rounds}, workers: {workers}, {run.rate:,.0f} requests/s; cores: "
                        f"connector {run.cores:.2f}, others {run.others:.2f}",
                        file=sys.stderr,
                    )
            memory = {workers: memory_of(process.pid) for workers, (_, process) in connectors.items()}
        except BaseException:
            print((root / "log").read_text(errors="replace")[-3000:], file=sys.stderr)
            raise
        finally:
            for _, process in connectors.values():
                stop(process)
            server.close()
    return summary(runs, memory)


def start_connector(workers: int, root: Path, address: str, ca: str) -> tuple[str, subprocess.Popen[bytes]]:
    """Start one; give its tunnel and the process."""
    tunnel = uuid.uuid4()
    token = Token(account_tag=secrets.token_hex(16), secret=secrets.token_bytes(32), tunnel_id=tunnel)
    path = root / f"token{workers}"
    path.touch(mode=0o600)
    path.write_text(encode_token(token))
    config = root / "config.yml"
    config.write_text("ingress:\n- service: http_status:204\n")
    command = [
        *(sys.executable, "-m", "connector", "tunnel", "--config", str(config), "--no-prechecks"),
        *("--protocol", "http2", "--cacert", ca, *("--edge", address) * CONNECTIONS, "--metrics", "127.0.0.1:0"),
        *("--workers", str(workers), "--grace-period", "0s", "run", "--token-file", str(path)),
    ]
    with (root / "log").open("ab") as log:
        return str(tunnel), start(command, core=None, stderr=log)


def summary(runs: dict[int, list[Run]], memory: dict[int, int]) -> dict[str, Any]:
    """Give medians and ratios."""

    def middle(workers: int, name: str) -> float:
        return float(statistics.median(getattr(run, name) for run in runs[workers]))

    ratios = sorted(two.rate / one.rate for one, two in zip(runs[1], runs[2], strict=True))
    cost, load = middle(2, "cpu"), middle(2, "load")
    return {
        "ratio": {"min": ratios[0], "median": statistics.median(ratios), "max": ratios[-1]},
        "limit": 2 * middle(1, "cpu") / (cost + load),
        "one": {name: middle(1, name) for name in Run._fields} | {"memory": memory[1]},
        "two": {name: middle(2, name) for name in Run._fields} | {"memory": memory[2]},
    }


def main(argv: list[str] | None = None) -> int:
    """Compare, print, and say whether the goal is reached."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workers", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each (5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a round (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    options = parser.parse_args(argv)
    if len(os.sched_getaffinity(0)) < 2:
        print("two cores are needed", file=sys.stderr)
        return 1

    async def run() -> dict[str, Any]:
        async with capnp.kj_loop():
            return await compare(options.rounds, options.seconds)

    figures = uvloop.run(run())
    print("workers  requests/s  µs CPU each  µs of load  cores  others   MiB")
    for workers, name in ((1, "one"), (2, "two")):
        row = figures[name]
        print(
            f"{workers:>7}  {row['rate']:>10,.0f}  {row['cpu'] * 1e6:>11.1f}  {row['load'] * 1e6:>10.1f}  "
            f"{row['cores']:>5.2f}  {row['others']:>6.2f}  {row['memory'] / 2**20:>4.0f}"
        )
    ratio = figures["ratio"]
    print(
        f"two workers do {ratio['median']:.2f} x what one does ({ratio['min']:.2f} to {ratio['max']:.2f}); "
        f"with this load beside them two cores allow {figures['limit']:.2f}"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2))
    return 0 if ratio["median"] >= GOAL else 2


if __name__ == "__main__":
    raise SystemExit(main())
