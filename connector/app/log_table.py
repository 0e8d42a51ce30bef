"""Lines in a box, as cloudflared prints what a person should not miss.

Owns: the box. In: lines. Out: one info line per row. Never: changes what the lines say.
"""

from __future__ import annotations

from collections.abc import Sequence

from connector.app.logs import Logger

PADDING = 2


def box(lines: Sequence[str], *, title: str = "") -> list[str]:
    """Give the rows of a box around `lines`, with a centred title in a compartment of its own."""
    width = max(map(len, [*lines, title])) + 2 * PADDING
    border = "+" + "-" * width + "+"
    head = [border, f"|{title:^{width}}|"] if title else []
    return [*head, border, *(f"|{' ' * PADDING}{line:<{width - PADDING}}|" for line in lines), border]


def log_table(log: Logger, lines: Sequence[str], *, title: str = "") -> None:
    """Log `lines` in a box."""
    for row in box(lines, title=title):
        log.info(row)
