"""From rounds to figures, and from figures to text, JSON and a picture.

Owns: medians and ratios, the table, the JSON object, the SVG.
In: RowResult values. Out: text.
Never: measures, or leaves out what is unfavourable.
"""

from __future__ import annotations

import platform
from statistics import median
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.runner import RowResult

REFERENCE = "cloudflared"
MIB = 1 << 20


def figures_of(result: RowResult, name: str) -> dict[str, Any] | None:
    """What one connector did in one row: CPU per unit as min/median/max over the rounds, medians for the rest."""
    rounds = result.rounds.get(name)
    if not rounds:
        return None
    factor = result.row.factor
    cpu = [figures["cpu"] / figures["units"] * factor if figures["units"] else float("inf") for figures in rounds]

    def middle(key: str) -> float:
        return float(median(figures[key] for figures in rounds))

    found = {
        "cpu_per_unit": {"min": min(cpu), "median": median(cpu), "max": max(cpu)},
        "system_share": median(f["system"] / f["cpu"] if f["cpu"] else 0.0 for f in rounds),
        "units_per_second": median(f["units"] / f["seconds"] for f in rounds),
        "p50_ms": middle("p50") * 1e3,
        "p99_ms": middle("p99") * 1e3,
        "peak_memory": max(f["peak"] for f in rounds),
        "cpu_load": median(f["cpu"] / f["seconds"] for f in rounds),
        "edge_cpu_load": median(f["edge_cpu"] / f["seconds"] for f in rounds),
        "origin_cpu_load": median(f["origin_cpu"] / f["seconds"] for f in rounds),
        "rounds": len(rounds),
    }
    for key in ("rss", "bytes_per_stream", "opening", "lost"):
        if key in rounds[0]:
            found[key] = middle(key)
    return found


def row_object(result: RowResult, names: list[str]) -> dict[str, Any]:
    """One row for the JSON file. `cpu_ratio`: ours over cloudflared's; `ratios`: every connector's."""
    connectors = {name: figures_of(result, name) for name in names}
    reference = connectors.get(REFERENCE)
    base = reference["cpu_per_unit"]["median"] if reference else 0.0
    ratios = {
        name: found["cpu_per_unit"]["median"] / base if found and base else None for name, found in connectors.items()
    }
    return {
        "name": f"{result.transport} {result.row.name}",
        "row": result.row.name,
        "transport": result.transport,
        "unit": result.row.unit,
        "cpu_ratio": ratios.get("ours"),
        "ratios": ratios,
        "connectors": connectors,
        "errors": result.errors,
        "skipped": result.skipped,
    }


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {"python": platform.python_version(), "kernel": platform.release(), "arch": platform.machine()}


HEADER = (
    f"{'row':<15}{'connector':<12}{'CPU per unit':>22}{'ratio':>7}{'units/s':>9}{'p50 ms':>8}{'p99 ms':>8}{'peak':>7}"
)
WIDE = f"{'load':>6}{'edge':>6}{'origin':>7}"


def table_lines(row: dict[str, Any], *, wide: bool) -> list[str]:
    """The lines of one row: one per connector."""
    lines = []
    label = f"{row['row']:<15}"
    if row["skipped"]:
        return [f"{label}{'-':<12}  not run: {row['skipped']}"]
    for name, found in row["connectors"].items():
        if found is None:
            error = row["errors"].get(name)
            lines.append(f"{label}{name[:11]:<12}" + (f"  failed: {error}" if error else f"{'-':>22}"))
        else:
            cpu = found["cpu_per_unit"]
            span = "/".join(_short(cpu[key]) for key in ("min", "median", "max"))
            ratio = row["ratios"][name]
            line = (
                f"{label}{name[:11]:<12}{span:>22}{_ratio(ratio):>7}{_rate(found, row):>9}"
                f"{_ms(found['p50_ms']):>8}{_ms(found['p99_ms']):>8}{found['peak_memory'] / MIB:>5.0f} M"
            )
            if wide:
                line += f"{found['cpu_load']:>6.0%}{found['edge_cpu_load']:>6.0%}{found['origin_cpu_load']:>7.0%}"
            lines.append(line)
            if "bytes_per_stream" in found:
                idle = found["cpu_load"] * 100
                lines.append(f"{'':<17}{found['bytes_per_stream'] / 1024:.1f} KiB per idle WebSocket; CPU {idle:.2f} %")
            if found.get("lost"):
                lines.append(f"{'':<17}{found['lost']:.0f} datagrams lost and sent again in a round")
            if "rss" in found:
                lines.append(f"{'':<17}{found['rss'] / MIB:.1f} MiB resident after start")
        label = f"{row['unit']:>13}  "
    return lines


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ms(value: float) -> str:
    return "-" if not value else _short(value)


def _rate(found: dict[str, Any], row: dict[str, Any]) -> str:
    rate = found["units_per_second"]
    if row["unit"] == "s/GB":
        return f"{rate / MIB:.0f} MiB"
    if row["unit"] in ("s", "s/min", "MiB"):
        return "-"
    return f"{rate:.0f}"


def summary(rows: list[dict[str, Any]]) -> str:
    """How many rows reach which mark, and which do not."""
    ratios = {row["name"]: row["cpu_ratio"] for row in rows if row["cpu_ratio"] is not None}
    above = sorted((name for name in ratios if ratios[name] > 0.8), key=lambda name: -ratios[name])
    half = sum(ratio <= 0.5 for ratio in ratios.values())
    text = f"{len(ratios)} ratios: {half} at most 0.5, {len(ratios) - half - len(above)} up to 0.8, {len(above)} above"
    return text + "".join(f"{',' if number else ':'} {name} {ratios[name]:.2f}" for number, name in enumerate(above))


def svg(rows: list[dict[str, Any]], names: list[str], transport: str) -> str:
    """Bars of CPU per unit relative to cloudflared, or to the first connector where it did not run."""
    base_name = REFERENCE if REFERENCE in names else names[0]
    colours = ("#2a78d6", "#9aa4af", "#d9822b", "#4f9d5b", "#8d5bb5")
    height, left, scale = 16, 130, 260
    y = 50
    parts = []
    for row in rows:
        base = row["connectors"].get(base_name)
        if base is None:
            continue
        parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(row["row"])}</text>')
        for number, name in enumerate(names):
            found = row["connectors"][name]
            if found is None:
                continue
            ratio = found["cpu_per_unit"]["median"] / (base["cpu_per_unit"]["median"] or 1.0)
            width = min(ratio, 1.8) * scale
            colour = colours[number % len(colours)]
            text = f"{ratio:.2f}  ({_short(found['cpu_per_unit']['median'])} {row['unit']})"
            parts.append(f'<rect x="{left}" y="{y}" width="{width:.0f}" height="{height - 3}" fill="{colour}"/>')
            parts.append(f'<text x="{left + width + 6:.0f}" y="{y + 11}">{escape(text)}</text>')
            y += height
        y += 8
    marks = "".join(
        f'<line x1="{left + scale * at:.0f}" y1="42" x2="{left + scale * at:.0f}" y2="{y}" stroke="#666" '
        f'stroke-dasharray="3 3"/><text x="{left + scale * at:.0f}" y="38" text-anchor="middle">{at:g}</text>'
        for at in (0.5, 0.8, 1.0)
    )
    legend = "".join(
        f'<rect x="{left + 120 * i}" y="8" width="11" height="11" fill="{colours[i % len(colours)]}"/>'
        f'<text x="{left + 120 * i + 16}" y="18">{escape(name)}</text>'
        for i, name in enumerate(names)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{y + 30}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>{legend}{"".join(parts)}{marks}'
        f'<text x="{left}" y="{y + 18}">CPU time per unit of work over {escape(transport)}, {escape(base_name)} = 1; '
        "less is better</text>"
        "</svg>\n"
    )
