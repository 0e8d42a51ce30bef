"""5,000 messages a second through a watched connector, with its page open: what it costs, and whether memory is flat.

`make soak-inspect` runs it for ten minutes; `ARGS='--minutes 2'` for two. It prints one line every ten seconds and a
verdict: messages a second, CPU of the connector without and with the inspector, resident memory at the start and end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import ssl
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from connector.wire import mqtt
from connector.wire.mqtt_encode import encode_packet
from connector.wire.websocket import BINARY, PING, PONG, Frame, FrameSplitter, encode_frame
from tests.inspector.test_browser import CHROMIUM, browser
from tests.support.origins import mosquitto
from tests.support.processes import MOSQUITTO, Tunnel, tunnel

TOPICS = 50
TICK = 0.02
GROWTH = 12 * 1024 * 1024
"""Bytes that resident memory may grow by between the first third and the end."""

MORE_CPU = 30.0
"""Percent of a core that the inspector may cost on top."""


class Client:
    """One MQTT client over WebSocket on asyncio; publishes in batches, counts what comes back."""

    def __init__(self) -> None:
        self.received = 0

    async def connect(self, up: Tunnel, name: str) -> None:
        context = ssl.create_default_context(cafile=str(up.ca))
        context.check_hostname = False
        self.reader, self.writer = await asyncio.open_connection(
            "127.0.0.1", up.port, ssl=context, server_hostname="localhost", limit=1 << 22
        )
        self.writer.write(
            b"GET /mqtt HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: mqtt\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert b" 101 " in head, head
        self.send(encode_packet(mqtt.CONNECT, {"client_id": name, "keep_alive": 0, "username": "u", "password": b"p"}))
        await self.reader.readexactly(6)

    def send(self, packet: bytes) -> None:
        self.writer.write(encode_frame(Frame(BINARY, packet, mask=b"\x11\x22\x33\x44")))

    async def read(self) -> None:
        """Count the messages that come, and answer pings: Mosquitto's WebSocket library sends one after 300 s."""
        splitter = FrameSplitter()
        while data := await self.reader.read(1 << 18):
            for frame in splitter.feed(data):
                if frame.opcode == BINARY:
                    self.received += 1
                elif frame.opcode == PING:
                    self.writer.write(encode_frame(Frame(PONG, frame.payload, mask=b"\x11\x22\x33\x44")))


async def load(up: Tunnel, rate: int, seconds: float, report: Any) -> float:
    """Publish `rate` messages a second to a subscriber behind the same tunnel; return what arrived a second."""
    publisher, subscriber = Client(), Client()
    await publisher.connect(up, "soak-publisher")
    await subscriber.connect(up, "soak-subscriber")
    subscriber.send(encode_packet(mqtt.SUBSCRIBE, {"packet_id": 1, "filters": [{"topic": "s/#", "qos": 0}]}))
    await subscriber.reader.readexactly(2 + 5)
    payload = b'{"temperature": 21.5, "humidity": 40, "sensor": "kitchen-12", "uptime": 123456}'
    packets = [
        encode_packet(mqtt.PUBLISH, {"topic": f"s/room{number:02}/t", "payload": payload}) for number in range(TOPICS)
    ]
    frames = [encode_frame(Frame(BINARY, packet, mask=b"\x11\x22\x33\x44")) for packet in packets]
    reading = asyncio.gather(publisher.read(), subscriber.read())
    started = time.monotonic()
    sent = 0
    next_report = started + 10
    while (now := time.monotonic()) < started + seconds:
        due = min(int((now - started) * rate) - sent, rate // 5)
        if due > 0:
            publisher.writer.write(b"".join(frames[(sent + at) % TOPICS] for at in range(due)))
            sent += due
            await publisher.writer.drain()
        if now >= next_report:
            next_report += 10
            report(sent, subscriber.received, now - started)
        await asyncio.sleep(TICK)
    elapsed = time.monotonic() - started
    await asyncio.sleep(1)
    received = subscriber.received
    reading.cancel()
    publisher.writer.close()
    subscriber.writer.close()
    await asyncio.gather(reading, return_exceptions=True)
    return received / elapsed


def cpu(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measured(rate: int, seconds: float, *, inspect: bool, quiet: bool = False) -> dict[str, float]:
    """Run the load once; return messages and CPU seconds a second, and memory in bytes at a third and at the end."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        (path / "state").mkdir()
        flags = ("--inspect",) if inspect else ()
        with mosquitto(path) as broker, tunnel(
            path / "state", f"http://127.0.0.1:{broker}", run_args=("--ha-connections", "1", *flags)
        ) as up:  # fmt: skip
            memory: list[tuple[float, int]] = []

            def report(sent: int, received: int, elapsed: float) -> None:
                memory.append((elapsed, up.connector.memory()))
                if not quiet:
                    words = "inspected" if inspect else "plain"
                    print(
                        f"{words:9} {elapsed:5.0f} s {received / elapsed:7.0f} messages/s {memory[-1][1] / 1e6:6.1f} MB"
                    )

            def run() -> float:
                before = cpu(up.connector.pid)
                found = asyncio.run(load(up, rate, seconds, report))
                return found, cpu(up.connector.pid) - before  # type: ignore[return-value]

            if inspect and CHROMIUM:
                event = next(e for e in up.connector.events if "inspector" in e)
                with browser() as page:
                    page.goto(event["inspector"])
                    page.wait_for_selector("#filter")
                    found, used = in_thread(run)
                    page.click("#view-mqtt")
                    page.wait_for_selector("#topics [data-topic]")
            else:
                found, used = run()  # type: ignore[misc]
            memory.append((seconds, up.connector.memory()))
            third = next((size for elapsed, size in memory if elapsed >= seconds / 3), memory[0][1])
            return {"rate": found, "cpu": used / seconds * 100, "third": third, "end": memory[-1][1]}


def in_thread(work: Any) -> Any:
    """Run `work` beside playwright's own loop."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rate", type=int, default=5_000)
    args = parser.parse_args()
    if MOSQUITTO is None:
        print("NO MOSQUITTO HERE")
        return 1
    plain = measured(args.rate, min(60.0, args.minutes * 30), inspect=False)
    watched = measured(args.rate, args.minutes * 60, inspect=True)
    more = watched["cpu"] - plain["cpu"] * watched["rate"] / max(1.0, plain["rate"])
    growth = watched["end"] - watched["third"]
    print(f"plain     {plain['rate']:7.0f} messages/s, {plain['cpu']:5.1f} % CPU")
    print(f"inspected {watched['rate']:7.0f} messages/s, {watched['cpu']:5.1f} % CPU, {more:.1f} % on top")
    print(f"memory    {watched['third'] / 1e6:.1f} MB after a third, {watched['end'] / 1e6:.1f} MB at the end")
    if not CHROMIUM:
        print("NO CHROMIUM HERE: no page was open")
    failed = more > MORE_CPU or growth > GROWTH or watched["rate"] < args.rate * 0.9
    print("FAILED" if failed else "fine")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
