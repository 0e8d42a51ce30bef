"""What watching costs, in counts: an unwatched stream pays nothing, a watched one a known number of calls."""

from __future__ import annotations

import pytest

from connector.inspector.hub import Inspector
from connector.wire.h2_frames import DATA, encode_frame
from tests.benchmarks.test_counts import SWITCH, UNITS, UPGRADE, Calls, Link
from tests.inspector.traffic import connect, down, packet, up
from tests.support.aio import run


def counted(monkeypatch: pytest.MonkeyPatch, hub: Inspector | None, *, mqtt: bool = False) -> tuple[float, float]:
    """Return Python calls and calls into C for one message there and back."""
    counts = Calls()

    async def main() -> None:
        link = Link(monkeypatch)
        tap = None
        if hub is not None:
            tap = hub.open_link("http2", "192.0.2.1:1", 0)
            link.engine.accept = tap.acceptor(link.engine.accept)
        link.receive(link.head(*UPGRADE, end=False))
        await link.settle()
        [origin] = link.origins
        origin.protocol.data_received(SWITCH)
        link.sent()
        if mqtt:
            link.receive(encode_frame(DATA, 0, link.stream_id, up(connect())))
        message = packet("PUBLISH", topic="a/b", payload=b"x" * 100)
        there = encode_frame(DATA, 0, link.stream_id, up(message) if mqtt else up(b"x" * 108))
        back = down(message) if mqtt else down(b"x" * 108)
        begin, end = link.dispatcher.writes.begin, link.dispatcher.writes.end
        with counts:
            for _ in range(UNITS):
                if tap is not None:
                    tap.on_bytes(False, there)
                begin()
                link.engine.receive_data(there, 0.0)
                end()
                origin.protocol.data_received(back)
                out = link.engine.data_to_send()
                if tap is not None:
                    tap.on_bytes(True, out)
        await link.close()

    run(main())
    return counts.python / UNITS, counts.c / UNITS


def test_off_costs_nothing_and_on_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    off = counted(monkeypatch, None)
    frames = counted(monkeypatch, Inspector("connector"))
    mqtt = counted(monkeypatch, Inspector("connector"), mqtt=True)
    for name, found in (("off", off), ("WebSocket", frames), ("MQTT", mqtt)):
        print(f"{name:9} {found[0]:6.1f} Python calls, {found[1]:6.1f} calls into C per message there and back")
    assert off[0] <= 40
    assert frames[0] - off[0] <= 60
    assert mqtt[0] - off[0] <= 130


def test_nothing_is_kept_of_a_link_that_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The acceptor of an unwatched link is the proxy's own: there is no double in between to pay for."""

    async def main() -> None:
        link = Link(monkeypatch)
        assert link.engine.accept == link.dispatcher.accept
        await link.close()

    run(main())
