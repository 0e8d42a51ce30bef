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
    """Return one line per note with its bytes, and the bytes that no note covers in between."""
    lines: list[str] = []
    leaves = sorted(_leaves(notes), key=lambda note: (note[0], -note[1]))
    at = 0
    for start, length, name, value in leaves:
        if start > at:
            lines += _rows(data, at, start - at, "", colour)
        if length == 0 or start < at:  # a heading, or a second view of the same bytes
            lines.append(f"{start:08x}  {'':47}  {_shade(f'{name}: {value}', colour)}")
            continue
        lines += _rows(data, start, length, f"{name}: {value}", colour)
        at = max(at, start + length)
        if at >= LARGEST_DUMP:
            lines.append(f"{at:08x}  ... {len(data) - at} more bytes")
            return "\n".join(lines)
    if at < len(data):
        lines += _rows(data, at, min(len(data) - at, LARGEST_DUMP - at), "", colour)
    return "\n".join(lines)


def _leaves(notes: Sequence[Note]) -> list[Note]:
    """Turn notes that enclose others into headings of no length."""
    ordered = sorted(notes, key=lambda note: (note[0], -note[1]))
    found = []
    for number, (start, length, name, value) in enumerate(ordered):
        nested = number + 1 < len(ordered) and ordered[number + 1][0] < start + length
        found.append((start, 0 if nested else length, name, value))
    return found


def _rows(data: bytes, start: int, length: int, text: str, colour: bool) -> list[str]:
    lines = []
    for at, raw, shown in hex_rows(data, start, length):
        meaning = _shade(text, colour) if text and at == start else shown if not text else f"  {shown}"
        lines.append(f"{at:08x}  {raw:<47}  {meaning}".rstrip())
    return lines


def _shade(text: str, colour: bool) -> str:
    return f"\x1b[36m{text}\x1b[0m" if colour else text
