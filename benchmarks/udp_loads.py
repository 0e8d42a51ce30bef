"""UDP datagrams of a private network, over QUIC: both versions of the edge's protocol.

Owns: flows, each with one datagram on its way there and back.
In: a QUIC link, the port of the echo. Out: figures of one round; `lost` counts what had to be sent again.
Never: more than one datagram a flow in flight: queues on the way may drop.
"""

# ruff: noqa: D102  (callbacks of one interface each, described there)
from __future__ import annotations

import asyncio
import struct
import uuid
from typing import Any

from benchmarks.desk import call
from benchmarks.link import LoadLink
from benchmarks.loads import DRAIN_LIMIT, Load, WorkError
from benchmarks.quic_client import QuicLoadLink
from benchmarks.watched import Watched

VERSION_3 = "support_datagram_v3_2"

REPEAT = 0.2
"""Seconds until a datagram counts as lost."""

ADDRESS = bytes((127, 0, 0, 1))


class Flow:
    """One flow."""

    __slots__ = ("flow_id", "number", "opened", "payload", "sent")

    def __init__(self, size: int) -> None:
        self.flow_id = uuid.uuid4().bytes
        self.payload = bytes(i & 0xFF for i in range(size - 4))
        self.number = 0
        self.sent = 0.0
        self.opened = False


class UdpFlows(Load):
    """Datagrams to an echo."""

    def __init__(self, link: LoadLink, options: dict[str, Any]) -> None:
        super().__init__(link, options)
        if not isinstance(link, QuicLoadLink):
            raise WorkError("UDP needs QUIC")
        self.quic = link
        self.version: int = options["version"]
        if (VERSION_3 in link.features) != (self.version == 3):
            raise WorkError(f"the connector does not speak version {self.version} of the datagram protocol")
        self.flows = [Flow(options["size"]) for _ in range(self.streams)]
        self.by_id = {flow.flow_id: flow for flow in self.flows}
        self.lost = 0

    async def run(self, seconds: float, watched: Watched) -> dict[str, Any]:
        self.quic.on_datagram = self._on_datagram
        if self.version == 2:
            for flow in self.flows:
                await self._register(flow)
        else:
            async with asyncio.timeout(DRAIN_LIMIT):
                while not all(flow.opened for flow in self.flows):
                    for flow in self.flows:
                        if not flow.opened:
                            head = struct.pack("!BBHH16s", 0, 0, self.options["udp"], 0, flow.flow_id)
                            self.quic.send_datagram(head + ADDRESS)
                    await asyncio.sleep(0.1)
        repeat = self.link.loop.call_later(REPEAT, self._repeat)
        try:
            result = await super().run(seconds, watched)
        finally:
            repeat.cancel()
            self.stopping = True
            self.quic.on_datagram = lambda data: None
        result["lost"] = self.lost
        return result

    def begin(self, slot: int) -> None:
        self._send(self.flows[slot])

    async def _register(self, flow: Flow) -> None:
        error = await call(
            self.quic,
            lambda server: server.registerUdpSession(
                sessionId=flow.flow_id, dstIp=ADDRESS, dstPort=self.options["udp"], closeAfterIdleHint=0
            ),
            lambda answer: str(answer.result.err),
        )
        if error:
            raise WorkError(f"a UDP session was refused: {error}")

    def _send(self, flow: Flow) -> None:
        flow.sent = self.link.now
        flow.number += 1
        payload = flow.number.to_bytes(4) + flow.payload
        if self.version == 2:
            self.quic.send_datagram(payload + flow.flow_id + b"\0")
        else:
            self.quic.send_datagram(b"\1" + flow.flow_id + payload)

    def _on_datagram(self, data: bytes) -> None:
        if self.version == 2:
            flow_id, payload = data[-17:-1], data
        elif data[0] == 1:
            flow_id, payload = data[1:17], data[17:21]
        else:
            flow = self.by_id.get(data[2:18])
            if flow is not None and not data[1]:
                flow.opened = True
            return
        flow = self.by_id.get(flow_id)
        if flow is None or int.from_bytes(payload[:4]) != flow.number or not self.active:
            return
        self.done(flow.sent)
        if self.stopping:
            self.ended()
        else:
            self._send(flow)

    def _repeat(self) -> None:
        """Send again what did not come back; runs until the work has ended."""
        if not self.active or self.failure:
            return
        self.link.now = now = self.link.loop.time()
        for flow in self.flows:
            if flow.sent < now - REPEAT:
                self.lost += 1
                flow.number -= 1
                self._send(flow)
        self.link.loop.call_later(REPEAT, self._repeat)
