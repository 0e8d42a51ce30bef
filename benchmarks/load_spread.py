"""Many connectors at once, by the policies alone: when each would dial and where, in virtual time.

Owns: the simulation of 100,000 connectors that lose one edge address, all of them, or their supervisor's patience; its
plot. In: the pure policies of connector/protocol, a seed. Out: numbers and connector/docs/load-spread.svg.
Never: opens a socket or reads a clock; the same seed gives the same bytes.

    python -m benchmarks.load_spread [FILE.svg]      (writes the committed plot where no FILE is named)
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from connector.errors import EdgeDialError, EdgeLostError
from connector.protocol.edge_addresses import EdgeAddress, IpVersion, RegionAddresses, Use, learn
from connector.protocol.outer_backoff import OuterBackoff
from connector.protocol.protocol_choice import AddressTrials
from connector.protocol.reconnect import RetryPolicy, RetryState

PUBLISHED: RegionAddresses = (
    tuple(EdgeAddress(f"198.51.100.{number}", 7844) for number in range(10)),
    tuple(EdgeAddress(f"203.0.113.{number}", 7844) for number in range(10)),
)
"""As many addresses as the edge publishes of one family."""

LOST = EdgeLostError("connection with edge closed")
REFUSED = EdgeDialError("connection refused")


class Storm(NamedTuple):
    """What the connectors did after one edge address died at time 0."""

    first: list[float]
    """When each dialled the dead address again."""
    second: list[float]
    """When each dialled the next one."""
    landed: Counter[EdgeAddress]
    """Where that was."""


def one_edge_lost(connectors: int, *, seed: int, dial_seconds: float = 0.0) -> Storm:
    """All connectors hold four connections, one of them to the same address, which dies and stays dead.

    `dial_seconds` is what a failing dial takes: 0 for a refused one.
    """
    random = Random(seed).random  # noqa: S311  (a simulation)
    dead = PUBLISHED[0][0]
    start = learn(PUBLISHED, IpVersion.AUTO)._replace(uses=(Use(0, 0, dead),))
    policy = RetryPolicy()
    storm = Storm([], [], Counter())
    for _ in range(connectors):
        addresses = start
        for conn_index in (1, 2, 3):
            addresses, _ = addresses.get(conn_index, random=random())
        again = policy.decide(RetryState(0).registered(), LOST, now=0.0, random=random(), ever_registered=True)
        storm.first.append(again.retry_at)
        failed_at = again.retry_at + dial_seconds
        decision = policy.decide(again.state, REFUSED, now=failed_at, random=random(), ever_registered=True)
        _, effect = AddressTrials().failed(decision.failure)
        assert effect.rotate
        addresses, address = addresses.rotate(0, unreachable=effect.unreachable, now=failed_at, random=random())
        assert address is not None
        storm.second.append(decision.retry_at)
        storm.landed[address] += 1
    return storm


def all_edges_lost(connectors: int, seconds: float, *, seed: int) -> list[float]:
    """Give every dial of one connection per connector while nothing answers for `seconds` from time 0 on."""
    random = Random(seed).random  # noqa: S311  (a simulation)
    policy = RetryPolicy()
    dials: list[float] = []
    for _ in range(connectors):
        state, now = RetryState(0).registered(), 0.0
        error: Exception = LOST
        while True:
            decision = policy.decide(state, error, now=now, random=random(), ever_registered=True)
            state, now, error = decision.state, decision.retry_at, REFUSED
            if now >= seconds:
                break
            dials.append(now)
    return dials


def supervisors_restart(connectors: int, *, seed: int) -> list[float]:
    """Give the time at which each connector's supervisor restarts its connections after all of them ended at time 0."""
    random = Random(seed).random  # noqa: S311  (a simulation)
    times = []
    for _ in range(connectors):
        backoff = OuterBackoff()
        for conn_index in range(4):
            backoff = backoff.failed(conn_index, now=0.0, random=random())
        assert backoff.fire_at is not None
        times.append(backoff.fire_at)
    return times


def histogram(times: Iterable[float], width: float) -> list[int]:
    """Count the times in slots of `width` seconds from 0 on; slots after the last one are not there."""
    counts = Counter(int(at / width) for at in times)
    return [counts[slot] for slot in range(max(counts, default=-1) + 1)]


# --- the plot --------------------------------------------------------------------------------------------------------

CONNECTORS = 100_000
OUTAGE_CONNECTORS, OUTAGE_SECONDS = 20_000, 400.0
SEED = 1
PLOT = Path(__file__).resolve().parents[1] / "connector" / "docs" / "load-spread.svg"

_WIDTH, _HEIGHT, _LEFT, _GAP = 760, 150, 62, 62


def plot(storm: Storm, outage: Sequence[float], restarts: Sequence[float]) -> str:
    """Draw the dials of `one_edge_lost`, of `all_edges_lost` and of `supervisors_restart`, as SVG."""
    first, second = histogram(storm.first, 0.1), histogram(storm.second, 0.1)
    both = [[*counts, *[0] * (50 - len(counts))][:50] for counts in (first, second)]
    landed = [count for _, count in sorted(storm.landed.items())]
    panels = (
        ("One address dies, which held one of the four connections of everybody: dials per 0.1 s",
         0.1, "s after the loss", both, ("#4477aa", "#ee6677"), ("the dead address", "another one")),
        ("Where they landed: connections per address of the region", 1.0, "address", [landed], ("#228833",), ()),
        (f"Nothing answers {OUTAGE_CONNECTORS:,} connectors for 400 s: dials of one connection each, per second",
         1.0, "s after the loss", [histogram(outage, 1.0)], ("#4477aa",), ()),
        ("All four connections of everybody waited together: restarts per second",
         1.0, "s after the last one ended", [histogram(restarts, 1.0)], ("#aa3377",), ()),
    )  # fmt: skip
    height = len(panels) * (_HEIGHT + _GAP) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH + _LEFT + 20}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for place, (title, width, unit, series, colours, names) in enumerate(panels):
        parts += _panel(place * (_HEIGHT + _GAP) + 30, title, width, unit, series, colours, names)
    return "\n".join([*parts, "</svg>", ""])


def _panel(
    top: int,
    title: str,
    width: float,
    unit: str,
    series: Sequence[Sequence[int]],
    colours: Sequence[str],
    names: Sequence[str],
) -> list[str]:
    """One bar chart: the series stand on each other; `width` is what one slot is worth on the x axis."""
    slots = max(map(len, series))
    highest = max(sum(column) for column in zip(*series, strict=True))
    step = _WIDTH / slots
    parts = [f'<text x="{_LEFT}" y="{top - 8}" font-weight="bold">{title}</text>']
    for share in (0.0, 0.5, 1.0):
        y = top + _HEIGHT * (1 - share)
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ccc"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{round(highest * share):,}</text>')
    floor = [0.0] * slots
    for counts, colour in zip(series, colours, strict=True):
        path = []
        for slot, count in enumerate(counts):
            if count:
                size = count / highest * _HEIGHT
                x, y = _LEFT + slot * step, top + _HEIGHT - floor[slot]
                path.append(f"M{x:.1f} {y:.1f}v-{size:.1f}h{max(step - 0.4, 0.6):.1f}v{size:.1f}z")
                floor[slot] += size
        parts.append(f'<path fill="{colour}" d="{"".join(path)}"/>')
    for tick in range(6):
        x = _LEFT + _WIDTH * tick / 5
        parts.append(
            f'<text x="{x:.0f}" y="{top + _HEIGHT + 16}" text-anchor="middle">{slots * width * tick / 5:g}</text>'
        )
    parts.append(f'<text x="{_LEFT + _WIDTH}" y="{top + _HEIGHT + 30}" text-anchor="end">{unit}</text>')
    for place, (name, colour) in enumerate(zip(names, colours, strict=bool(names))):
        x = _LEFT + _WIDTH - 250 + 130 * place
        parts.append(f'<rect x="{x}" y="{top + 6}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="{top + 15}">{name}</text>')
    return parts


def report(storm: Storm, outage: Sequence[float], restarts: Sequence[float]) -> list[str]:
    """Say in numbers what the plot shows."""
    together = histogram([*storm.first, *storm.second], 0.1)
    hum = histogram(outage, 1.0)
    return [
        f"connectors                                     {CONNECTORS:,}",
        f"dials of all of them                           {sum(together):,}",
        f"most in 0.1 s                                  {max(together):,}",
        f"last dial, s after the loss                    {max(storm.second):.2f}",
        f"connections on one address of the region       {min(storm.landed.values()):,} to "
        f"{max(storm.landed.values()):,}, {len(storm.landed)} addresses",
        f"long outage of {OUTAGE_CONNECTORS:,}: most dials in 1 s       {max(hum):,}",
        f"... dials in 1 s from 200 s on                  {min(hum[200:400]):,} to {max(hum[200:400]):,}",
        f"restarts of supervisors: most in 1 s           {max(histogram(restarts, 1.0)):,}",
    ]


def main(arguments: Sequence[str]) -> int:
    """Write the plot and print the numbers."""
    storm = one_edge_lost(CONNECTORS, seed=SEED)
    outage = all_edges_lost(OUTAGE_CONNECTORS, OUTAGE_SECONDS, seed=SEED)
    restarts = supervisors_restart(CONNECTORS, seed=SEED)
    path = Path(arguments[0]) if arguments else PLOT
    path.write_text(plot(storm, outage, restarts), encoding="utf-8")
    print("\n".join(report(storm, outage, restarts)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
