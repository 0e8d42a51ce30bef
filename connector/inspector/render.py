"""Annotated dumps: bytes with offsets, and beside them what they mean.

Owns: the text form of a hex dump. In: bytes and notes (offset, length, name, value). Out: lines.
Never: decodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Note = tuple[int, int, str, str]

ROW = 16
"""Bytes of a row."""

LARGEST_DUMP = 65_536
"""Bytes that are dumped; more is cut with a line that says so."""


def hex_rows(data: bytes, start: int, length: int) -> Iterable[tuple[int, str, str]]:
    """Yield offset, hex and printable text of rows of up to 16 bytes."""
    for at in range(start, start + length, ROW):
        part = data[at : min(at + ROW, start + length)]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        yield at, part.hex(" "), text


def annotate(data: bytes, notes: Sequence[Note], *, colour: bool = False) -> str:
    """Return the rows of `annotated_rows` as lines."""
    lines = []
    for at, raw, name, shown in annotated_rows(data, notes):
        meaning = f"\x1b[36m{name}\x1b[0m" if colour and name else name
        lines.append(f"{at:08x}  {raw:<47}  {meaning or shown}".rstrip())
    return "\n".join(lines)


def annotated_rows(data: bytes, notes: Sequence[Note]) -> list[tuple[int, str, str, str]]:
    """Return (offset, hex, meaning, printable text) per row: at least one for every note, and what no note covers."""
    rows: list[tuple[int, str, str, str]] = []
    at = 0
    for start, length, name, value in _leaves(notes):
        if start > at:
            rows += _rows(data, at, start - at, "")
            at = start
        if length == 0 or start < at:  # a heading, or a second view of the same bytes
            rows.append((start, "", f"{name}: {value}", ""))
            continue
        rows += _rows(data, start, length, f"{name}: {value}")
        at = start + length
        if at >= LARGEST_DUMP:
            rows.append((at, "", f"... {len(data) - at} more bytes", ""))
            return rows
    if at < len(data):
        rows += _rows(data, at, min(len(data) - at, LARGEST_DUMP - at), "")
    return rows


def _leaves(notes: Sequence[Note]) -> list[Note]:
    """Sort by place, and turn notes that enclose others into headings of no length in front of them."""
    ordered = sorted(notes, key=lambda note: (note[0], -note[1]))
    found = []
    for number, (start, length, name, value) in enumerate(ordered):
        nested = number + 1 < len(ordered) and ordered[number + 1][0] < start + length
        found.append((start, 0 if nested else length, name, value))
    return found


def _rows(data: bytes, start: int, length: int, text: str) -> list[tuple[int, str, str, str]]:
    return [(at, raw, text if at == start else "", shown) for at, raw, shown in hex_rows(data, start, length)]
